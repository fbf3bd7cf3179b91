"""A float64 attention whose logits can be read, its blocks made by hand, and AFOpt on it."""

import torch
from torch import nn

from hf_precond.architectures.attention_block import AttentionBlock, Heads
from hf_precond.architectures.groups import parameter_groups
from hf_precond.architectures.structure import LayerMatrix, ModelStructure, RowSelection
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.optimizer import AFOpt
from hf_precond.optimizers.afopt.scope import attention_matrices
from hf_precond.statistics.collector import MomentCollector


class Attention(nn.Module):
    """Multi-head attention in plain products; ``logits`` keeps its gradient.

    Args:
        d: width.
        heads: query heads.
        kv_heads: key-value heads.
        bias: q, k, v, o have one.
        fused: one weight for q, k and v, one above the other.
        causal: mask the future.
    """

    def __init__(self, d=16, heads=2, kv_heads=None, bias=True, fused=False, causal=False):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.size, self.causal, self.fused = d // heads, causal, fused
        width = self.kv_heads * self.size
        if fused:
            self.qkv = nn.Linear(d, d + 2 * width, bias=bias)
        else:
            self.q = nn.Linear(d, d, bias=bias)
            self.k = nn.Linear(d, width, bias=bias)
            self.v = nn.Linear(d, width, bias=bias)
        self.o = nn.Linear(d, d, bias=bias)
        self.double()

    def project(self, x):
        if self.fused:
            width = self.kv_heads * self.size
            return self.qkv(x).split([self.heads * self.size, width, width], -1)
        return self.q(x), self.k(x), self.v(x)

    def split(self, x):
        x = x.unflatten(-1, (-1, self.size)).transpose(-3, -2)
        return x.repeat_interleave(self.heads // x.shape[-3], -3)

    def forward(self, x, keep=None):
        """``keep``: ``[B, T]``, False for keys that are padding."""
        q, k, v = (self.split(part) for part in self.project(x))
        self.queries, self.keys = q, k
        self.logits = q @ k.mT / self.size**0.5
        if self.logits.requires_grad:
            self.logits.retain_grad()
        logits = self.logits
        if self.causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        if keep is not None:
            logits = logits.masked_fill(~keep[:, None, None, :], -torch.inf)
        self.probabilities = logits.softmax(-1)
        values = self.probabilities @ v
        return self.o(values.transpose(-3, -2).flatten(-2))


def matrices_of(module, prefix=""):
    """q, k, v and o of an :class:`Attention`."""
    bias = "bias" if module.o.bias is not None else None
    if not module.fused:
        return [LayerMatrix(prefix + name, getattr(module, name), bias=bias) for name in "qkvo"]
    width, total = module.heads * module.size, module.qkv.weight.shape[0]
    other = module.kv_heads * module.size
    spans = {
        "q": (0, width),
        "k": (width, width + other),
        "v": (width + other, total),
    }
    parts = [
        LayerMatrix(
            f"{prefix}qkv[{name}]", module.qkv, bias=bias, rows=RowSelection(1, span, total)
        )
        for name, span in spans.items()
    ]
    return [*parts, LayerMatrix(prefix + "o", module.o, bias=bias)]


def blocks_of(module, roles="qkvo", **fields):
    """Blocks of one :class:`Attention`, the matrices of ``roles`` in scope."""
    parts = dict(zip("qkvo", matrices_of(module), strict=True))
    heads = Heads(module.heads, module.kv_heads, module.size, module.size)
    block = AttentionBlock("", module, **parts, heads=heads, trainable=frozenset(roles), **fields)
    return ModelStructure(
        matrices=[parts[role] for role in roles],
        attention=[block],
        open_statistics=lambda requests: MomentCollector(module, requests),
    )


PLAIN = {"momentum": 0.0, "nesterov": False, "damping": 1e-12, "direction": "inverse"}


def optimizer_of(module, roles="qkvo", **fields):
    """AFOpt on one :class:`Attention`; the least-squares direction unless said otherwise."""
    block_fields = {k: fields.pop(k) for k in ("rotary", "normed", "observed") if k in fields}
    config = AFOptConfig.create(**{**PLAIN, **fields})
    return AFOpt(list(module.parameters()), blocks_of(module, roles, **block_fields), config)


def spectral(module, **fields):
    """AFOpt on one :class:`Attention`, in the default direction."""
    return optimizer_of(module, **{"direction": "spectral", "damping": 1.0, **fields})


def changes(module, optimizer):
    """Name to change of every parameter in one step."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in module.named_parameters()}


def create(model, **fields):
    """AFOpt on a model of transformers."""
    config = AFOptConfig.create(**fields)
    structure = attention_matrices(model, config)
    return AFOpt(parameter_groups(model, config), structure, config)


def directions(optimizer):
    """Role to the unscaled direction of the gradients that are there now, ``[out, in(+1)]``.

    Takes the statistics collected and refreshes, as the step would; changes no parameter.
    """
    with torch.no_grad():
        for bound in optimizer.bound:
            optimizer.allocate(bound)
        optimizer._update_statistics()
        optimizer.refresh()
        actual = {}
        for plan in optimizer.plan.matrices:
            gradient = plan.bound.gradient()[None]
            actual[plan.role] = optimizer.directions([plan], gradient)[0]
        return actual


def cosine(a, b):
    return (torch.sum(a * b) / (a.norm() * b.norm())).item()


def inputs(batch, tokens, d, spread=1.0, shift=0.0, seed=0):
    """Features with a covariance spread of ``spread`` and a mean of ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    mix, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -torch.tensor(spread).log10().item() / 2, d, dtype=torch.float64)
    draw = torch.randn(batch, tokens, d, generator=generator, dtype=torch.float64)
    return (draw * scales) @ mix.mT + shift


def backward(module, x, seed=1, **more):
    """Gradients of a fixed nonlinear function of the outputs; returns −∂L/∂S."""
    module.zero_grad()
    output = module(x, **more)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    loss = (output * target).sum() + (output**2).sum() / 2
    loss.backward()
    return -module.logits.grad


def logit_step(module, x, steps, size=1e-6):
    """First-order change of the logits along ``-steps`` (role to [W | b] change)."""
    with torch.no_grad():
        weights = dict(zip("qkvo", matrices_of(module), strict=True))
        features = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
        heads = {}
        for role in "qk":
            full = weights[role].read()
            heads[role] = module.split(features[..., : full.shape[1]] @ full.mT)
        change = 0
        scale = module.size**-0.5
        if "q" in steps:
            moved = module.split(features[..., : steps["q"].shape[1]] @ steps["q"].mT)
            change = change - scale * moved @ heads["k"].mT
        if "k" in steps:
            moved = module.split(features[..., : steps["k"].shape[1]] @ steps["k"].mT)
            change = change - scale * heads["q"] @ moved.mT
        return change

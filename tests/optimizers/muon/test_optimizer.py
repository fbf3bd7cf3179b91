"""Muon against torch's beside AdamW, and NorMuon against its formula, matrix by matrix."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

from hf_precond.optimizers.muon import step as muon_step
from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make, train_step

LR, DECAY = 1e-2, 0.1


class Peer:
    """``torch.optim.Muon`` on pieces of a model's weights, ``torch.optim.AdamW`` on the rest.

    Args:
        model: what it trains.
        pieces: name of a weight to a function that cuts a tensor of its shape into matrices.
        optimizer: ours, whose routing says which of the others decay.
        muon: constructs Muon from a list of parameters.
    """

    def __init__(self, model, pieces, optimizer, muon):
        named = dict(model.named_parameters())
        self.views = [(named[name], cut) for name, cut in pieces.items()]
        self.own = [[nn.Parameter(v.detach().clone()) for v in cut(p)] for p, cut in self.views]
        self.muon = muon([parameter for parts in self.own for parameter in parts])
        rest = [r for r in optimizer.routing if r.name not in pieces and r.treatment == "adamw"]
        groups = [
            {"params": [named[r.name] for r in rest if r.group == label], "weight_decay": decay}
            for label, decay in (("decay", DECAY), ("no decay", 0.0))
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR)

    @torch.no_grad()
    def step(self):
        for (parameter, cut), own in zip(self.views, self.own, strict=True):
            for part, gradient in zip(own, cut(parameter.grad), strict=True):
                part.grad = gradient.detach().clone()
        self.muon.step()
        self.adamw.step()
        for (parameter, cut), own in zip(self.views, self.own, strict=True):
            for part, view in zip(own, cut(parameter), strict=True):
                view.copy_(part)


def torchs(parameters, **fields):
    fields = {"lr": LR, "weight_decay": DECAY, "adjust_lr_fn": "match_rms_adamw"} | fields
    return torch.optim.Muon(parameters, **fields)


def whole(tensor):
    return [tensor.flatten(1)]


def compare(ours, pieces, losses, muon=torchs, **fields):
    """Train a model by ours and a copy by the peer; every parameter is equal after every step."""
    theirs = copy.deepcopy(ours)
    optimizer = create_optimizer(ours, "muon", lr=LR, weight_decay=DECAY, **fields)
    treated = {route.name for route in optimizer.routing if route.treatment == "preconditioned"}
    assert treated == set(pieces)
    peer = Peer(theirs, pieces, optimizer, muon)
    before = copy.deepcopy(ours)
    for loss in losses:
        for model, stepper in ((ours, optimizer), (theirs, peer)):
            model.zero_grad()
            loss(model).backward()
            stepper.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)
    moved = zip(ours.named_parameters(), before.parameters(), strict=True)
    assert all((p - q).abs().max() > 1e-3 for (name, p), q in moved if name in pieces)
    return optimizer


def network(dtype):
    """Three matrices of one shape, a tall and a wide one."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20)]
    layers = [nn.Embedding(12, 8), *layers, nn.LayerNorm(20), nn.Linear(20, 3)]
    return nn.Sequential(*layers).to(dtype)


def regressions(dtype, count=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(12, (16, 4), generator=generator)
        goal = torch.randn(16, 4, 3, generator=generator).to(dtype)
        yield lambda model, x=tokens, y=goal: (model(x) - y).square().mean()


def texts(name, count=3):
    return [lambda model, s=s: model(**batch(name, s)).loss for s in range(count)]


LINEARS = {f"{n}.weight": whole for n in (1, 2, 3, 4, 6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"nesterov": False, "momentum": 0.8}, {"ns_steps": 3}, {"adjust_lr_fn": "original"}],
    ids=str,
)
def test_plain_matrices_step_as_under_torchs_muon(fields, dtype):
    model = network(dtype)
    compare(model, LINEARS, regressions(dtype), lambda ps: torchs(ps, **fields), **fields)


def test_lr_scale_multiplies_the_step_and_not_the_decay():
    def muon(parameters):
        return torchs(parameters, lr=3 * LR, weight_decay=DECAY / 3)

    compare(network(torch.float32), LINEARS, regressions(torch.float32), muon, lr_scale=3.0)


def test_batches_may_be_cut(monkeypatch):
    monkeypatch.setitem(muon_step.CHUNK, "cpu", 130)  # two matrices of 8 by 8, one of 8 by 20
    compare(network(torch.float32), LINEARS, regressions(torch.float32))


def test_fused_projections_of_gpt2_are_three_matrices():
    pieces = {}
    for layer in ("transformer.h.0", "transformer.h.1"):
        pieces[f"{layer}.attn.c_attn.weight"] = lambda t: t.split(16, dim=1)
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            pieces[f"{layer}.{name}.weight"] = whole
    optimizer = compare(make("gpt2", dtype=torch.float64), pieces, texts("gpt2"))
    assert "tied" in optimizer.routing["transformer.wte.weight"].reason
    reason = optimizer.routing["transformer.h.0.attn.c_attn.weight"].reason
    assert reason == "queries; keys; values"


def test_the_projections_of_torchs_attention_are_three_matrices():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).double()
    pieces = {
        "self_attn.in_proj_weight": lambda t: t.split(16),
        **dict.fromkeys(("self_attn.out_proj.weight", "linear1.weight", "linear2.weight"), whole),
    }
    inputs = torch.randn(3, 5, 16).double()
    compare(layer, pieces, [lambda model: model(inputs).pow(3).mean()] * 3)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_are_stepped_one_by_one(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 12, "num_local_experts": 3,
        "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    if kind == "mixtral":
        config = MixtralConfig(**sizes)
    else:
        config = GptOssConfig(**sizes, layer_types=["full_attention"])
    # The grouped products of the other implementations are float32.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    pieces = {
        name: (lambda t: t.unbind(0)) if parameter.dim() == 3 else whole
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 or name.endswith("_proj.weight")
    }
    optimizer = compare(model.double(), pieces, texts("llama"))
    reasons = {route.reason for route in optimizer.routing}
    assert "3 experts" in reasons


def test_convolutions_are_matrices_and_those_of_groups_one_a_group():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv1d(8, 4, 1), nn.ConvTranspose1d(4, 4, 3),
    )  # fmt: skip

    def loss(model):
        x = images
        for layer in model:
            x = x.flatten(2) if isinstance(layer, nn.Conv1d) else x
            x = layer(x).tanh()
        return x.square().mean()

    images = torch.randn(4, 3, 10, 10)
    pieces = {"0.weight": whole, "1.weight": lambda t: t.flatten(1).chunk(2), "3.weight": whole}
    optimizer = compare(model, pieces, [loss] * 3)
    assert optimizer.routing["2.weight"].reason == "convolution of a single row or column"
    assert optimizer.routing["4.weight"].reason == "transposed convolution"


def test_adapters_are_two_matrices_each_and_b_is_cut_like_the_fused_weight():
    model = make("gpt2")
    targets = ["c_attn", "c_fc", "lm_head"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    pieces = {
        name: (lambda t: t.split(16)) if "c_attn.lora_B" in name else whole
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lm_head" not in name
    }
    assert len(pieces) == 8
    optimizer = compare(model, pieces, texts("gpt2"))
    head = next(r for r in optimizer.routing if "lm_head" in r.name and "lora_A" in r.name)
    assert head.treatment == "adamw" and "output head" in head.reason


@pytest.mark.parametrize("shape", [(5, 48, 48), (3, 64, 16), (4, 24, 96), (2, 7, 300)], ids=str)
def test_the_batched_sign_points_where_float64_does(shape):
    from hf_precond.linalg.matrix_functions import newton_schulz

    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    matrices *= torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    low = newton_schulz(matrices.bfloat16(), 5, EPS).double()
    for found, matrix in zip(low, matrices, strict=True):
        x = matrix / matrix.norm()
        for _ in range(5):
            gram = x @ x.T
            x = DEFAULT_A * x + (DEFAULT_B * gram + DEFAULT_C * gram @ gram) @ x
        assert torch.cosine_similarity(found.flatten(), x.flatten(), dim=0) > 0.999


# NorMuon ------------------------------------------------------------------------------


def sign(matrix):
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    return _zeropower_via_newtonschulz(matrix, coefficients, 5, EPS).double()


class RowNormalised(torch.optim.Optimizer):
    """NorMuon by its formula, one matrix at a time, in float64 but for the sign.

    Args:
        parameters: matrices ``[out, in]``, or their transposes.
        beta2: β₂ of the rows' mean squares.
        transposed: whether parameters are ``[in, out]``.
    """

    def __init__(self, parameters, beta2=0.95, transposed=False):
        super().__init__(parameters, {"lr": LR})
        self.beta2, self.transposed = beta2, transposed

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            weight = parameter.T if self.transposed else parameter
            gradient, state = parameter.grad, self.state[parameter]
            momentum = state["momentum"] = 0.95 * state.get("momentum", 0) + 0.05 * gradient
            ahead = 0.95 * momentum + 0.05 * gradient
            found = sign(ahead).T if self.transposed else sign(ahead)
            rows, columns = found.shape
            even, squares = torch.zeros_like(found), state.get("squares", [0.0] * rows)
            for i in range(rows):
                mean = sum(float(x) ** 2 for x in found[i]) / columns
                squares[i] = self.beta2 * squares[i] + (1 - self.beta2) * mean
                even[i] = found[i] / (squares[i] ** 0.5 + 1e-8)
            state["squares"] = squares
            even *= found.norm() / even.norm()
            length = 0.2 * max(rows, columns) ** 0.5
            weight.copy_((1 - LR * DECAY) * weight - LR * length * even)


@pytest.mark.parametrize("beta2", [0.95, 0.5])
def test_normuon_follows_its_formula(beta2):
    model = network(torch.float64)
    fields = {"variant": "normuon", "normuon_beta2": beta2}
    losses = regressions(torch.float64)
    optimizer = compare(model, LINEARS, losses, lambda ps: RowNormalised(ps, beta2), **fields)
    assert optimizer.state[model[4].weight]["row_second_moment"].shape == (20,)


def test_normuons_rows_are_outputs_where_weights_are_transposed():
    pieces = {}
    for layer in ("transformer.h.0", "transformer.h.1"):
        pieces[f"{layer}.attn.c_attn.weight"] = lambda t: t.split(16, dim=1)
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            pieces[f"{layer}.{name}.weight"] = whole
    model = make("gpt2", dtype=torch.float64)
    muon = lambda ps: RowNormalised(ps, transposed=True)  # noqa: E731
    optimizer = compare(model, pieces, texts("gpt2"), muon, variant="normuon")
    fused = optimizer.state[model.transformer.h[0].attn.c_attn.weight]
    assert fused["q.row_second_moment"].shape == (16,)


def test_normuon_keeps_the_norm_of_each_expert_and_evens_its_rows():
    torch.manual_seed(0)
    module = nn.Module()
    module.num_experts = 3
    module.weight = nn.Parameter(torch.randn(3, 6, 10))
    fields = {"lr": LR, "normuon_beta2": 0.0}
    steps = {}
    for variant in ("muon", "normuon"):
        own = copy.deepcopy(module)
        optimizer = create_optimizer(own, "muon", variant=variant, **fields)
        own.weight.grad = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(2))
        optimizer.step()
        steps[variant] = (module.weight - own.weight).detach()
    torch.testing.assert_close(steps["muon"].norm(dim=(1, 2)), steps["normuon"].norm(dim=(1, 2)))
    rows = steps["normuon"].norm(dim=2)  # β₂ = 0: every row's own root mean square
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    assert steps["muon"].norm(dim=2).std(dim=1).min() > 1e-4


# What a run shows ----------------------------------------------------------------------


def test_the_momentum_is_all_that_is_kept_of_a_matrix():
    model = make("bert")
    optimizer = create_optimizer(model, "muon")
    train_step(model, optimizer, batch("bert"))
    for matrix in optimizer.structure.matrices:
        assert list(optimizer.state[matrix.weight_parameter]) == ["momentum_buffer"]
    assert "exp_avg_sq" in optimizer.state[model.classifier.weight]
    assert "exp_avg_sq" in optimizer.state[model.bert.embeddings.word_embeddings.weight]


def test_a_matrix_without_gradient_is_left_out_and_one_of_zeros_only_decays():
    model = network(torch.float32)
    optimizer = create_optimizer(model, "muon", lr=LR, weight_decay=DECAY)
    before = copy.deepcopy(model)
    next(regressions(torch.float32))(model).backward()
    model[1].weight.grad = None
    model[2].weight.grad.zero_()
    optimizer.step()
    assert torch.equal(model[1].weight, before[1].weight)
    torch.testing.assert_close(model[2].weight, (1 - LR * DECAY) * before[2].weight)


def test_the_report_is_of_the_last_step_where_the_momentum_is_the_gradients():
    """Without momentum the step that it gives now is the one that was taken."""
    model = network(torch.float64)
    fields = {"momentum": 0.0, "variant": "normuon", "normuon_beta2": 0.0}
    optimizer = create_optimizer(model, "muon", lr=LR, **fields)
    assert optimizer.report() == {}
    before = copy.deepcopy(model)
    next(regressions(torch.float64))(model).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a scheduler comes after the step
    found, cosines = optimizer.diagnostics(), []
    for name in ("1", "2", "3", "4", "6"):
        step = before[int(name)].weight - model[int(name)].weight
        ratio = float(step.norm() / model[int(name)].weight.norm())
        assert found[f"update_ratio/{name}"] == pytest.approx(ratio, rel=1e-9)
        gradient = model[int(name)].weight.grad.flatten()
        cosines.append(float(torch.cosine_similarity(step.flatten(), gradient, dim=0)))
        sign_rows = sign(model[int(name)].weight.grad).square().mean(1)
        expected = float((sign_rows.max() / sign_rows.mean()).sqrt())
        assert found[f"row_ratio/{name}"] == pytest.approx(expected, rel=1e-9)
    assert found["cosine"] == pytest.approx(sum(cosines) / 5, rel=1e-9)
    assert all(value == value and value > 0 for value in found.values())


def test_the_report_of_fused_projections_is_one_value_each():
    model = make("gpt2")
    optimizer = create_optimizer(model, "muon")
    train_step(model, optimizer, batch("gpt2"))
    names = {name for name in optimizer.diagnostics() if "c_attn" in name}
    assert names == {
        f"update_ratio/transformer.h.{layer}.attn.c_attn[{part}]"
        for layer in (0, 1)
        for part in "qkv"
    }
    optimizer = create_optimizer(model, "muon", diagnostics="off")
    train_step(model, optimizer, batch("gpt2"))
    assert optimizer.diagnostics() == {"matrices": 12.0}

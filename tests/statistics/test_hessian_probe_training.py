"""How the probe sits in training: kernels, checkpointing, compiled code, Accelerator.backward."""

import copy
import gc
import pickle

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from hf_precond.architectures.modules import find_norms
from hf_precond.statistics.hessian_probe import CurvatureProbe
from hf_precond.statistics.requests import CurvatureRequest
from tests.optimizers.models import batch, make


class Attention(nn.Module):
    """Norm, attention by torch's fused kernel, head; notes whether the fused kernel may run."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)
        self.fused = []

    def forward(self, x):
        self.fused.append(torch.backends.cuda.flash_sdp_enabled())
        x = self.norm(x).unsqueeze(1)
        return self.head(scaled_dot_product_attention(x, x, x).squeeze(1).mean(1))


def attention_model(seed=0):
    torch.manual_seed(seed)
    return Attention()


def inputs(seed=0):
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed=0):
    return nn.functional.cross_entropy(model(inputs(seed)), torch.arange(4) % 3)


def open_source(model, probe="rademacher"):
    norms = find_norms(model)
    return CurvatureProbe(model, [CurvatureRequest(n.name, n, probe) for n in norms])


def expected(model, loss_of, step=0):
    """The estimates by a source of its own, everything switched by hand."""
    source = open_source(model)
    source.enable(True, step)
    with source.context():
        source.observe(loss_of())
    taken = {key: statistic.sum for key, statistic in source.take().items()}
    source.close()
    return taken


def agree(taken, wanted, rtol=1e-5):
    assert taken.keys() == wanted.keys()
    for key, statistic in taken.items():
        error = (statistic.sum - wanted[key]).norm() / wanted[key].norm()
        assert error < rtol, (key, error)


def test_the_kernel_is_switched_on_due_steps_only_and_back():
    model = attention_model()
    source = open_source(model)
    wrapped = Accelerator(cpu=True)
    for step in range(3):
        source.enable(step == 1, step)
        wrapped.backward(loss_of(model))
        assert torch.backends.cuda.flash_sdp_enabled()
        assert bool(source.take()) == (step == 1)
    source.enable(True, 3)
    with torch.no_grad():
        loss_of(model)
    assert model.fused == [True, False, True, True]
    source.close()


def test_a_trainer_that_calls_a_part_of_the_model():
    model = nn.ModuleDict({"body": attention_model()})
    source = open_source(model)
    source.enable(True, 0)
    Accelerator(cpu=True).backward(loss_of(model["body"]))
    assert len(source.take()) == 2
    source.close()
    assert not model["body"]._forward_pre_hooks


def test_parameters_sharded_by_fsdp2_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        source = open_source(model)
        source.enable(True, 0)
        with pytest.raises(RuntimeError, match=r"sharded \(FSDP2.*train with DDP"):
            source.observe(model(torch.randn(5, 4)).square().mean())
        source.close()
    finally:
        dist.destroy_process_group()


def test_without_the_switch_the_error_says_what_to_do():
    model = attention_model()
    source = open_source(model)
    loss = loss_of(model)  # before the step was due
    source.enable(True, 0)
    with pytest.raises(RuntimeError, match=r"attn_implementation='sdpa'.*use_reentrant=False"):
        source.observe(loss)
    source.close()


@pytest.mark.parametrize("inside", ["one", "all"])
def test_reentrant_checkpoints_that_hide_norms_are_refused(inside):
    """Their gradients are none in a product's graph, which is not the same as a layer dropped."""
    first, last = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.LayerNorm(4)
    model = nn.Sequential(nn.Linear(4, 4), first, last if inside == "one" else nn.Tanh())
    source = open_source(model)
    source.enable(True, 0)

    def loss(reentrant):
        hidden = checkpoint(first, model[0](torch.ones(3, 4)), use_reentrant=reentrant)
        return (model[2](hidden) ** 3).sum()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        source.observe(loss(True))
    assert source.observe(loss(False))
    assert len(source.take()) == (4 if inside == "one" else 2)
    source.close()


class Square(torch.autograd.Function):
    """By a kernel of its own: autograd does not see how the gradient was made."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return (2 * ctx.saved_tensors[0] * grad).detach()


class OnceSquare(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class TwiceSquare(Square):
    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class FusedLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass."""

    @staticmethod
    def forward(ctx, logits, labels):
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            loss = nn.functional.cross_entropy(logits, labels)
            ctx.save_for_backward(*torch.autograd.grad(loss, logits))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None


@pytest.mark.parametrize("fused", [Square, OnceSquare, FusedLoss])
def test_fused_kernels_are_refused_instead_of_taken_for_linear(fused):
    torch.manual_seed(0)
    norm, head, labels = nn.LayerNorm(8), nn.Linear(8, 3), torch.arange(4) % 3
    model = nn.Sequential(norm, head)
    source = open_source(model)
    source.enable(True, 0)
    x = torch.randn(4, 8)
    if fused is FusedLoss:
        loss = FusedLoss.apply(model(x), labels)
    else:
        loss = nn.functional.cross_entropy(head(fused.apply(norm(x))), labels)
    with pytest.raises(RuntimeError, match=f"{fused.__name__}Backward.*fused kernels"):
        source.observe(loss)
    loss.backward()
    source.close()


def test_custom_functions_with_two_derivatives_serve():
    class Identity(torch.autograd.Function):
        """Linear: of a constant gradient its own has no graph."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.clone()

    torch.manual_seed(0)
    norm, head, labels = nn.LayerNorm(8), nn.Linear(8, 3), torch.arange(4) % 3
    model, x = nn.Sequential(norm, head), torch.randn(4, 8)

    def loss(square):
        return nn.functional.cross_entropy(head(square(norm(x))), labels)

    wanted = expected(model, lambda: loss(torch.square))
    found = expected(model, lambda: Identity.apply(loss(TwiceSquare.apply)))
    for key, estimate in found.items():
        torch.testing.assert_close(estimate, wanted[key])


def test_a_forward_whose_backward_never_came_is_switched_back_by_the_step():
    model = attention_model()
    source = open_source(model)
    source.enable(True, 0)
    loss = loss_of(model)
    assert not torch.backends.cuda.flash_sdp_enabled()
    source.observe(loss)
    source.take()
    assert torch.backends.cuda.flash_sdp_enabled()
    source.close()


def test_two_models_do_not_mix():
    first, second = attention_model(0), attention_model(1)
    one, two = open_source(first), open_source(second)
    accelerator = Accelerator(cpu=True)
    one.enable(True, 0)
    two.enable(True, 0)
    loss_one, loss_two = loss_of(first), loss_of(second, 1)
    accelerator.backward(loss_one)
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert one.estimates and not two.estimates
    accelerator.backward(loss_two)
    assert torch.backends.cuda.flash_sdp_enabled()
    wanted = expected(second, lambda: loss_of(second, 1))
    agree(two.take(), wanted)
    agree(one.take(), expected(first, lambda: loss_of(first)))
    one.close()
    two.close()


def test_the_wrapper_lives_as_long_as_a_source():
    plain = Accelerator.backward
    one, two = open_source(attention_model()), open_source(attention_model())
    assert Accelerator.backward is not plain
    one.close()
    one.close()
    assert Accelerator.backward is not plain
    two.close()
    assert Accelerator.backward is plain
    forgotten = open_source(model := attention_model())
    assert Accelerator.backward is not plain
    del forgotten
    gc.collect()
    assert Accelerator.backward is plain
    assert not model._forward_pre_hooks


def test_a_copy_of_the_model_has_an_inert_hook():
    model = attention_model()
    source = open_source(model)
    source.enable(True, 0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(twin)
        assert torch.backends.cuda.flash_sdp_enabled()
    source.close()


def test_a_source_whose_optimizer_stopped_rests():
    """Two trainings of one model: the first optimizer's last step left a probe due."""
    model = attention_model()
    source = open_source(model)
    source.enable(True, 20)
    accelerator, other = Accelerator(cpu=True), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        accelerator.backward(loss_of(model))
        other.step()
        other.zero_grad()
    assert not source.estimates and not source.due
    assert model.fused == [False, False, True]
    source.enable(True, 40)
    accelerator.backward(loss_of(model))
    assert len(source.take()) == 2
    source.close()


def test_accumulation_in_accelerate_is_part_of_the_loss():
    model = attention_model()
    source = open_source(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    source.enable(True, 4)
    for seed in range(2):
        accelerator.backward(loss_of(model, seed))
    wanted = expected(model, lambda: sum(loss_of(model, seed) for seed in range(2)) / 2, step=4)
    taken = source.take()
    agree(taken, wanted)
    assert all(statistic.count == 1 for statistic in taken.values())
    source.close()


def test_the_same_loss_is_taken_once():
    model = attention_model()
    source = open_source(model)
    source.enable(True, 0)
    with source.context():
        loss = loss_of(model)
        source.observe(loss)
        Accelerator(cpu=True).backward(loss)
    agree(source.take(), expected(model, lambda: loss_of(model)))
    source.close()


def test_under_a_loss_scaler_the_products_are_those_of_the_unscaled_loss():
    model = attention_model()
    source = open_source(model)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    source.enable(True, 0)
    accelerator.backward(loss_of(model))
    scaled = model.norm.weight.grad.clone()
    model.zero_grad()
    loss_of(model).backward()
    torch.testing.assert_close(scaled, model.norm.weight.grad * 2**10)
    agree(source.take(), expected(model, lambda: loss_of(model)))
    source.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_give_the_same_products(reentrant):
    model = make("bert")
    wanted = expected(model, lambda: model(**batch("bert")).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    functions = [layer._gradient_checkpointing_func for layer in model.bert.encoder.layer]
    if reentrant:
        model.enable_input_require_grads()
    source = open_source(model)
    source.enable(True, 0)
    Accelerator(cpu=True).backward(model(**batch("bert")).loss)
    agree(source.take(), wanted)
    again = [layer._gradient_checkpointing_func for layer in model.bert.encoder.layer]
    assert again == functions
    source.close()


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_models_run_uncompiled_on_due_steps(how):
    model = make("vit")
    wanted = expected(model, lambda: model(**batch("vit")).loss)
    source = open_source(model)
    if how == "function":
        compiled = torch.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
        compiled = model
    accelerator = Accelerator(cpu=True)
    for step in range(3):
        source.enable(step != 1, 0)
        accelerator.backward(compiled(**batch("vit")).loss)
        taken = source.take()
        if step != 1:
            agree(taken, wanted)
    source.close()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_differences_of_gradients_agree_with_the_products(name):
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape).mul_(parameter.dim() > 1)
    wanted = expected(model, lambda: model(**batch(name)).loss)
    source = open_source(model)
    source.enable(True, 0)
    before = copy.deepcopy(model)
    source.observe(lambda: model(**batch(name)).loss)
    taken = source.take()
    joined = torch.cat([statistic.sum for statistic in taken.values()])
    exact = torch.cat([wanted[key] for key in taken])
    assert taken.keys() == wanted.keys()
    assert (joined - exact).norm() / exact.norm() < 1e-3
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is None
    source.close()


def test_differences_where_the_graph_cannot_be_used():
    """Reentrant checkpointing out of reach of the switch, dropout, BatchNorm's buffers."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.3)
            self.second, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x, reentrant):
            x = self.drop(torch.tanh(self.first(x)))
            if reentrant:
                return checkpoint(lambda h: self.head(self.second(h)), x, use_reentrant=True)
            return self.head(self.second(x))

    torch.manual_seed(0)
    model = Model()
    x, labels = torch.randn(16, 6), torch.arange(16) % 3

    def loss(reentrant=True):
        return nn.functional.cross_entropy(model(x, reentrant), labels)

    torch.manual_seed(3)
    wanted = expected(model, lambda: loss(False))
    source = open_source(model)
    source.enable(True, 0)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        source.observe(loss())
    torch.manual_seed(3)
    buffers, state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    source.observe(loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    Accelerator(cpu=True).backward(loss())
    taken = source.take()
    joined = torch.cat([statistic.sum for statistic in taken.values()])
    exact = torch.cat([wanted[key] for key in taken])
    assert (joined - exact).norm() / exact.norm() < 1e-3
    source.close()


class ShiftedRMSNorm(nn.Module):
    """The RMSNorm of Gemma, whose weight is the scale's distance from 1."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


@pytest.mark.parametrize(
    ("make_norm", "probe", "size"),
    [
        *[(ShiftedRMSNorm, "rademacher", size) for size in (0.0, 1e-6, 1e-3)],
        (ShiftedRMSNorm, "exact", 1e-3),
        (nn.LayerNorm, "exact", 1.0),
    ],
)
def test_the_step_of_the_differences_suits_weights_and_vectors(make_norm, probe, size):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16)]
    for _ in range(3):
        layers += [make_norm(16), nn.Linear(16, 16), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, make_norm):
                module.weight.copy_(size * torch.randn(16))
    source = open_source(model, probe)
    x = torch.randn(32, 8)
    labels = torch.randint(0, 3, (32,))

    def loss_function():
        return nn.functional.cross_entropy(model(x), labels)

    found = []
    for way in (loss_function(), loss_function):
        source.enable(True, 0)
        source.observe(way)
        found.append(torch.cat([statistic.sum.flatten() for statistic in source.take().values()]))
    source.close()
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-3


def test_a_graph_made_before_the_differences_can_still_be_run_backward():
    model, twin = (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for each in (model, twin):
        each[0].eval()  # its graph then holds the running statistics
    source = open_source(model)
    source.enable(True, 0)
    loss = model(x).square().mean()
    source.observe(lambda: model(x).square().mean())
    loss.backward()
    twin(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    source.close()


def test_memory_is_flat():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    source = open_source(model)
    x = torch.randn(1024, 64)
    process, used = psutil.Process(), []
    for step in range(200):
        source.enable(True, step)
        with source.context():
            loss = model(x).square().mean()
            source.observe(loss)
            loss.backward()
        source.take()
        model.zero_grad()
        used.append(process.memory_info().rss)
    # A graph that stayed alive would hold a megabyte or more a step.
    assert used[-1] - used[19] < 20e6
    source.close()

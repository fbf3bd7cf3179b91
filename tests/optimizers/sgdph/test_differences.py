"""Losses without a second derivative under the Trainer: compute_loss is run again.

The oracle is the same training with a loss that has two derivatives, by double backward.
"""

import itertools
import random
import warnings

import numpy
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import create_optimizer


class FusedLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, as fused losses do."""

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


class OnceSquare(torch.autograd.Function):
    """A layer inside the model that is marked."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Model(nn.Module):
    """Both kinds of norm, dropout from three generators, and counters."""

    def __init__(self, square=torch.square, dropout=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.batch_norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)
        self.drop, self.square, self.calls = nn.Dropout(dropout), square, 0

    def forward(self, x):
        self.calls += 1
        if self.training and self.drop.p:
            x = x * (1 + 0.1 * random.random() + 0.1 * numpy.random.rand())
        hidden = self.square(torch.tanh(self.batch_norm(self.first(x))))
        return self.head(self.drop(self.norm(hidden)))


class Fused(Trainer):
    """Its loss is fused, and it keeps metrics as TRL's trainers do."""

    def __init__(self, *args, loss=FusedLoss.apply, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.metrics, self.tokens = loss, {"train": {"losses": []}}, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.loss(model(inputs["x"]), inputs.pop("labels"))
        self.metrics["train"]["losses"].append(loss.item())
        self.tokens += len(inputs["x"])
        return (loss, None) if return_outputs else loss


def rows(count=24):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": number % 3} for number, row in enumerate(x)]


def train(folder, model=None, trainer=Fused, optim="sgdph", optim_args=None, resume=None, **values):
    loss = values.pop("loss", FusedLoss.apply)
    fields = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 8,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "remove_unused_columns": False, "logging_steps": 1, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(optim=optim, optim_args=optim_args, **fields | values)
    made = trainer(model or Model(), arguments, train_dataset=rows(), loss=loss)
    random.seed(5)
    numpy.random.seed(5)
    try:
        made.train(resume_from_checkpoint=resume)
    except BaseException:
        own_optimizer(made.optimizer).close()  # which the traceback keeps alive
        raise
    return made


def curvature(made):
    own = own_optimizer(made.optimizer)
    assert own.diagnostics()["probes"] >= 1
    return torch.cat([own.state[n.parameter]["curvature"].flatten() for n in own.structure.norms])


def away(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


SENTENCE = "cannot be differentiated twice.*compute_loss is run again"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_fused_losses_are_probed_by_differences(precision, accumulation, tmp_path):
    """The same loss, batch, dropout and accumulation as the training, under autocast in float32."""
    values = {
        "bf16": precision == "bf16", "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 24 // accumulation,
    }  # fmt: skip
    exact = train(tmp_path, loss=nn.functional.cross_entropy, **values)
    with pytest.warns(UserWarning, match=f"^sgdph: the loss of Fused {SENTENCE}"):
        found = train(tmp_path, **values)
    # Under autocast the loss itself, computed outside the model, is exact's bfloat16.
    assert away(curvature(found), curvature(exact)) < (2e-3 if precision == "float32" else 0.05)
    heads = (found.model.head.parameters(), exact.model.head.parameters())
    for ours, theirs in zip(*heads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_layer_of_the_model_that_is_once_differentiable(tmp_path):
    exact = train(tmp_path, loss=nn.functional.cross_entropy)
    with pytest.warns(UserWarning, match="once_differentiable|OnceSquare"):
        found = train(tmp_path, Model(OnceSquare.apply), loss=nn.functional.cross_entropy)
    assert away(curvature(found), curvature(exact)) < 2e-3


def test_nothing_else_is_changed_or_counted_twice(tmp_path):
    """At rate 0 every loss is that of the same training by AdamW, bit for bit, dropout included."""
    values = {"max_steps": 5, "learning_rate": 0.0, "weight_decay": 0.0}
    plain = train(tmp_path, optim="adamw_torch", **values)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = train(tmp_path, optim_args="probe_interval=2", **values)
    assert len([w for w in said if "compute_loss is run again" in str(w.message)]) == 1
    assert found.metrics == plain.metrics and len(found.metrics["train"]["losses"]) == 5
    assert found.tokens == plain.tokens == 40
    assert found.model.calls == plain.model.calls == 5
    for ours, theirs in zip(found.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for key in ("loss", "grad_norm"):
        ours, theirs = ([e[key] for e in m.state.log_history if key in e] for m in (found, plain))
        assert ours == theirs and len(ours) == 5
    assert "compute_loss" not in vars(found)


@pytest.mark.slow
def test_compiled_models_are_served_too(tmp_path):
    exact = train(tmp_path, loss=nn.functional.cross_entropy)
    with pytest.warns(UserWarning, match="compute_loss is run again"):
        found = train(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    torch._dynamo.reset()
    assert away(curvature(found), curvature(exact)) < 2e-3


def test_training_goes_on_and_lowers_the_loss(tmp_path):
    found = train(tmp_path, Model(dropout=0.0), max_steps=45, learning_rate=1e-2)
    losses = found.metrics["train"]["losses"]
    assert len(losses) == 45
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_it_takes_the_same_path_bit_for_bit(bf16, tmp_path):
    values = {
        "max_steps": 7, "save_strategy": "steps", "save_steps": 4, "optim_args": "probe_interval=3",
        "bf16": bf16,
    }  # fmt: skip
    whole = train(tmp_path, **values)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-4"), **values)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def ctc(logits, labels):
    """A sequence of 8 frames and two labels, by torch's kernel."""
    log_probs = nn.functional.log_softmax(logits, -1).unsqueeze(1)
    lengths = torch.tensor([len(logits)]), torch.tensor([2])
    return nn.functional.ctc_loss(log_probs, labels[None, :2].clamp(min=1), *lengths)


def enumerated_ctc(logits, labels):
    """Minus the log of the summed probabilities of all paths that collapse to the labels."""
    wanted, paths = labels[:2].clamp(min=1).tolist(), []
    for path in itertools.product(range(3), repeat=len(logits)):
        shortened = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol for symbol in shortened if symbol] == wanted:
            paths.append(path)
    log_probs = nn.functional.log_softmax(logits, -1)
    found = log_probs[torch.arange(len(logits)), torch.tensor(paths)].sum(1)
    return -found.logsumexp(0) / 2  # as torch's mean, by the number of labels


def cached(logits, labels):
    """GradCache's way: the loss knows detached outputs, and a hook runs the graph behind them."""
    outputs = logits.detach().requires_grad_()
    loss = nn.functional.cross_entropy(outputs, labels)
    gradient = torch.autograd.grad(loss, outputs, retain_graph=True)[0]
    loss.register_hook(lambda grad: logits.backward(gradient * grad))
    return loss


@pytest.mark.parametrize(
    ("loss", "twice"),
    [(cached, nn.functional.cross_entropy), (ctc, enumerated_ctc)],
    ids=["gradcache", "ctc"],
)
def test_other_losses_without_a_second_derivative(loss, twice, tmp_path):
    exact = train(tmp_path, loss=twice)
    with pytest.warns(UserWarning, match=SENTENCE):
        found = train(tmp_path, loss=loss)
    assert away(curvature(found), curvature(exact)) < 2e-3


class Mixed(Fused):
    """Two calls of compute_loss in one backward pass, and one that is only looked at."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.compute_loss(model, dict(inputs))
        first = self.compute_loss(model, dict(inputs))
        second = self.compute_loss(model, {k: v.flip(0) for k, v in inputs.items()})
        loss = first * 2
        loss += second / 3
        self.backward(loss)
        return loss.detach()

    def backward(self, loss):
        self.accelerator.backward(loss)


class Plain(Mixed):
    """Never comes to Accelerator.backward."""

    def backward(self, loss):
        loss.backward()


class Scaled(Mixed):
    """Under a loss scale; the gradients stay scaled here, the curvature must not."""

    def backward(self, loss):
        own_optimizer(self.optimizer).statistics.loss_scale = 2.0**10
        (loss * 2.0**10).backward()


class Probing(Fused):
    """Hands over the function itself, as a loop without a Trainer does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        columns = dict(inputs)

        def function():
            return self.loss(model(columns["x"]), columns["labels"])

        state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        own_optimizer(self.optimizer).probe(function)
        random.setstate(state[0])
        numpy.random.set_state(state[1])
        torch.set_rng_state(state[2])
        return function()


def test_a_function_that_the_trainer_hands_over_counts_alone(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handed = train(tmp_path, trainer=Probing)
    with pytest.warns(UserWarning, match="compute_loss is run again"):
        found = train(tmp_path)
    assert away(curvature(found), curvature(handed)) < 2e-3


class Penalised(Mixed):
    """A part of the loss is made outside compute_loss."""

    def backward(self, loss):
        self.accelerator.backward(loss + self.model.norm.weight.square().sum())


@pytest.mark.parametrize("trainer", [Mixed, Plain, Scaled])
def test_a_training_step_of_the_trainers_own(trainer, tmp_path):
    exact = train(tmp_path, trainer=Mixed, loss=nn.functional.cross_entropy)
    with pytest.warns(UserWarning, match="compute_loss is run again"):
        found = train(tmp_path, trainer=trainer)
    assert away(curvature(found), curvature(exact)) < 2e-3


def test_a_loss_from_elsewhere_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"comes from its compute_loss. Otherwise choose adamr or"
    ):
        train(tmp_path, trainer=Penalised)


def test_a_loss_that_is_never_the_same_is_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def drawn(logits, labels):
        noise = torch.randn(logits.shape, generator=generator)
        return FusedLoss.apply(logits * (1 + noise), labels)

    with pytest.raises(RuntimeError, match=r"returned .* and then .* Choose adamr or afopt"):
        train(tmp_path, loss=drawn)


def test_accelerate_alone_has_no_function_to_run_again():
    model = Model()
    optimizer = create_optimizer(model, "sgdph")
    accelerator, row = Accelerator(cpu=True), rows()
    x, labels = torch.stack([r["x"] for r in row]), torch.tensor([r["labels"] for r in row])
    with pytest.raises(RuntimeError, match=r"optimizer\.probe\(lambda: .* choose adamr or afopt"):
        accelerator.backward(FusedLoss.apply(model(x), labels))
    optimizer.zero_grad()
    optimizer.probe(lambda: FusedLoss.apply(model(x), labels))
    accelerator.backward(FusedLoss.apply(model(x), labels))
    optimizer.step()
    assert optimizer.diagnostics()["probes"] == 1
    optimizer.close()

"""SGD-PH under the stock Trainer: the loss it probes is the one that is trained."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make


class Rows(torch.utils.data.Dataset):
    """A fixed batch, row by row."""

    def __init__(self, name, size=8):
        self.columns = batch(name, size=size)

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.columns.items()}


def train(model, optimizer, folder, rows=None, trainer=Trainer, compute_loss_func=None, **values):
    fields = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 8,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    made = trainer(
        model,
        TrainingArguments(**fields | values),
        train_dataset=rows or Rows("bert"),
        optimizers=(optimizer, None),
        compute_loss_func=compute_loss_func,
    )
    made.train()
    return made


def curvature_of(loss, model, optimizer):
    """``(1 - β_h) z ∘ Hz`` of a loss by hand, for step 0."""
    norms = optimizer.structure.norms
    parameters = [norm.parameter for norm in norms]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (sum(p.numel() for p in parameters),), generator=generator)
    z = (2.0 * signs - 1).split([p.numel() for p in parameters])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    products = torch.autograd.grad(gradients, parameters, grad_outputs=z)
    share = 1 - optimizer.config.stat_decay
    curvature = torch.cat([share * s * h for s, h in zip(z, products, strict=True)])
    return curvature, torch.cat(gradients).detach()


def norms_of(optimizer, read):
    return torch.cat([read(norm.parameter) for norm in optimizer.structure.norms])


def away(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


def smoothed(logits, labels):
    return nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)


def weighted(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Distilled(Trainer):
    """Its loss is computed outside the model, as sentence-transformers' is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        loss = model(**inputs).logits.square().mean()
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", ["model", "smoothing", "function", "subclass"])
def test_the_loss_probed_is_the_loss_trained(kind, accumulation, tmp_path):
    model, inputs = make("bert").eval(), batch("bert", size=8)
    optimizer = create_optimizer(model, "sgdph")
    model.set_attn_implementation("eager")
    logits = model(**inputs).logits
    loss = {
        "model": lambda: nn.functional.cross_entropy(logits, inputs["labels"]),
        "smoothing": lambda: smoothed(logits, inputs["labels"]),
        "function": lambda: nn.functional.cross_entropy(logits, inputs["labels"]),
        "subclass": lambda: logits.square().mean(),
    }[kind]()
    curvature, gradient = curvature_of(loss, model, optimizer)
    trained = []
    optimizer.register_step_pre_hook(
        lambda *_: trained.append(norms_of(optimizer, lambda p: p.grad))
    )
    model.set_attn_implementation("sdpa")
    train(
        model,
        optimizer,
        tmp_path,
        trainer=Distilled if kind == "subclass" else Trainer,
        compute_loss_func=weighted if kind == "function" else None,
        label_smoothing_factor=0.3 if kind == "smoothing" else 0.0,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )
    # Whether micro-batches are summed or averaged, and their sum divided once more, depends on the
    # kind of loss and on the release of transformers: what counts is what was trained.
    times = (trained[0] @ gradient / gradient.square().sum()).item()
    assert min(abs(times / n - 1) for n in (1 / accumulation, 1, accumulation)) < 1e-4
    assert away(trained[0], times * gradient) < 1e-4
    ours = norms_of(optimizer, lambda p: optimizer.state[p]["curvature"])
    assert away(ours, times * curvature) < 1e-4
    assert torch.backends.cuda.flash_sdp_enabled()
    optimizer.close()


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_checkpointing_and_bfloat16(name, tmp_path):
    def curvature(probe_autocast=False, **values):
        model = make(name)
        optimizer = create_optimizer(model, "sgdph", probe_autocast=probe_autocast)
        train(model, optimizer, tmp_path, rows=Rows(name), **values)
        found = norms_of(optimizer, lambda p: optimizer.state[p]["curvature"])
        optimizer.close()
        assert found.dtype == torch.float32
        return found

    exact = curvature(gradient_checkpointing=True)
    assert away(curvature(bf16=True), exact) < 1e-5
    # bfloat16 keeps eight bits; the products go through it twice.
    low = curvature(probe_autocast=True, bf16=True)
    assert 1e-4 < away(low, exact) < 0.05


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_the_norm_steps_stay_within_a_factor_of_ten_of_adamws(name, tmp_path):
    model, ratios = make(name), []
    optimizer = create_optimizer(model, "sgdph", lr=1e-3)
    optimizer.register_step_post_hook(
        lambda *_: ratios.append(optimizer.diagnostics()["norm_update_over_adamw"])
    )
    train(model, optimizer, tmp_path, rows=Rows(name), max_steps=45, num_train_epochs=45)
    assert len(ratios) == 45
    assert min(ratios) > 0.1 and max(ratios) < 10, ratios
    optimizer.close()


def test_twenty_one_steps_probe_twice_and_lower_the_loss(tmp_path):
    model = make("bert")
    optimizer = create_optimizer(model, "sgdph", lr=3e-3)
    made = train(model, optimizer, tmp_path, max_steps=21, num_train_epochs=21, logging_steps=1)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert optimizer.diagnostics()["probes"] == 2
    optimizer.close()


def test_resumed_from_a_checkpoint_it_takes_the_same_path(tmp_path):
    torch.manual_seed(0)
    values = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "num_train_epochs": 9}
    whole = make("bert")
    optimizer = create_optimizer(whole, "sgdph", probe_interval=3)
    train(whole, optimizer, tmp_path, per_device_train_batch_size=4, **values)
    optimizer.close()
    model = make("bert", seed=3)
    optimizer = create_optimizer(model, "sgdph", probe_interval=3)
    made = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_grad_norm=0.0,
            learning_rate=1e-3, lr_scheduler_type="constant", per_device_train_batch_size=4,
            **values,
        ),
        train_dataset=Rows("bert"),
        optimizers=(optimizer, None),
    )  # fmt: skip
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    optimizer.close()

"""Training through the stock Trainers and this package's, with every name."""

import itertools
import json
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_precond import AFOpt, PrecondSeq2SeqTrainer, PrecondTrainer, load_config
from hf_precond.config.hub import CONFIG_FILE, version
from hf_precond.integrations.arguments import own_optimizer
from hf_precond.integrations.callback import logged_diagnostics
from hf_precond.optimizers.base.reporting import REPORT_INTERVAL
from hf_precond.registry import get_info, list_optimizers
from tests.integrations.tiny import bart, bert, llama, sequence_data, t5, text_data

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)
OFTEN = {
    "adamr": "basis_interval=2",
    "afopt": "stat_interval=1,inverse_interval=2",
    "muon": "variant=normuon",
    "nkfac": "stat_interval=1,inverse_interval=2",
    "sgdph": "probe_interval=2",
}


def make(name, folder, model=None, data=None, cls=Trainer, kind=TrainingArguments, **fields):
    """A Trainer on a CPU that logs every step."""
    own = {
        "optim": name,
        "optim_args": OFTEN[name],
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    args = kind(str(folder), **own | fields)
    return cls(model or bert(), args, train_dataset=data or text_data())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@each_name
@pytest.mark.parametrize("cls", [Trainer, PrecondTrainer])
def test_a_classifier_learns(name, cls, tmp_path):
    trainer = make(name, tmp_path, cls=cls, max_steps=40, learning_rate=2e-2)
    trainer.train()
    seen = losses(trainer)
    assert len(seen) == 40 and all(map(math.isfinite, seen))
    assert sum(seen[-8:]) < 0.7 * sum(seen[:8])


@each_name
def test_a_language_model_trains(name, tmp_path):
    data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data()]
    trainer = make(name, tmp_path, llama(), data, max_steps=12, learning_rate=5e-3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@each_name
@pytest.mark.parametrize("model", [t5, bart])
@pytest.mark.parametrize("cls", [Seq2SeqTrainer, PrecondSeq2SeqTrainer])
def test_sequence_to_sequence_models_train(name, model, cls, tmp_path):
    trainer = make(
        name,
        tmp_path,
        model(),
        sequence_data(),
        cls,
        Seq2SeqTrainingArguments,
        max_steps=10,
        learning_rate=5e-3,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@each_name
def test_scheduler_and_warmup_set_the_learning_rate_of_every_group(name, tmp_path):
    trainer = make(
        name,
        tmp_path,
        learning_rate=8e-4,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_steps=6,
        optim_args=OFTEN[name] + ",head_lr_scale=4",
    )
    seen = []
    trainer.add_callback(Groups(seen))
    trainer.train()
    factors = [0, 0.5, 1, 0.75, 0.5, 0.25]
    for groups, factor in zip(seen, factors, strict=True):
        heads = {label: lr for label, lr in groups.items() if label.startswith("head")}
        assert heads and len(groups) > len(heads)
        for label, lr in groups.items():
            peak = 8e-4 * (4 if label in heads else 1)
            assert lr == pytest.approx(peak * factor)
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged == pytest.approx([8e-4 * f for f in factors])


def Groups(seen):
    """A callback that notes the groups' learning rates before every step."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    return Callback()


@each_name
def test_weight_decay_goes_to_the_decay_groups(name, tmp_path):
    trainer = make(name, tmp_path, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {
        names[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"] == 0.1
    }
    assert decayed == set(trainer.get_decay_parameter_names(trainer.model))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_max_grad_norm_clips_what_the_optimizer_gets(tmp_path):
    trainer = make("adamr", tmp_path, max_steps=1, max_grad_norm=1e-3, lr_scheduler_type="constant")
    norms = []
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(
        lambda own, args, kwargs: norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.model.parameters()))
        )
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


@each_name
@pytest.mark.parametrize("cls", [Trainer, PrecondTrainer])
def test_diagnostics_are_in_the_logs_once_and_reach_other_callbacks(name, cls, tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    args = OFTEN[name] + ",diagnostics=full"
    trainer = make(name, tmp_path, cls=cls, max_steps=3, optim_args=args)
    trainer.add_callback(Reporter())
    trainer.train()
    diagnostics = own_optimizer(trainer.optimizer).diagnostics()
    expected = {f"optim_{key.partition('/')[0]}" for key in diagnostics}  # of layers, the worst
    history = [e for e in trainer.state.log_history if "loss" in e]
    assert expected == {key for key in history[-1] if key.startswith("optim_")}
    for entry, reported in zip(history, seen, strict=False):
        assert entry == {**reported, "step": entry["step"]}
        assert all(isinstance(entry[key], float) for key in expected & set(entry))
    assert not any(k.startswith("optim_") for k in trainer.state.log_history[-1])


def test_the_logs_show_the_worst_layer(tmp_path, monkeypatch):
    args = OFTEN["afopt"] + ",attention_entropy=true,diagnostics=full"
    trainer = make("afopt", tmp_path, max_steps=3, optim_args=args)
    seen, report = [], AFOpt.logged
    monkeypatch.setattr(AFOpt, "logged", lambda own: seen.append(report(own)) or seen[-1])
    trainer.train()
    diagnostics = seen[-1]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    for kind, worst in (
        ("logit_change", max),
        ("logit_change_max", max),
        ("entropy", min),
        ("entropy_min", min),
    ):
        layers = [value for key, value in diagnostics.items() if key.startswith(f"{kind}/")]
        assert len(set(layers)) == 2 and logged[f"optim_{kind}"] == worst(layers)


def test_a_layer_that_is_nan_is_the_worst(tmp_path):
    trainer = make("afopt", tmp_path, max_steps=1)
    trainer.train()
    own = own_optimizer(trainer.optimizer)
    own.logged = lambda: {"entropy/a": 1.0, "entropy/b": math.nan, "x/b": math.nan, "x/a": 2.0}
    assert all(map(math.isnan, logged_diagnostics(own).values()))


COMPUTED = {
    "muon": {"optim_update_ratio", "optim_row_ratio", "optim_cosine"},
    "afopt": {"optim_cosine", "optim_logit_change", "optim_condition_input"},
    "sgdph": {"optim_norm_curvature_rms", "optim_norm_clipped"},
}


def logged_keys(trainer):
    """The optimizer's keys in every training log."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key for key in entry if key.startswith("optim_")} for entry in logs]


@each_name
@pytest.mark.parametrize("choice", ["auto", "full", "off"])
def test_diagnostics_by_choice(name, choice, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_precond.optimizers.base.reporting.REPORT_INTERVAL", 3)
    args = f"{OFTEN[name]},diagnostics={choice}"
    trainer = make(name, tmp_path, max_steps=5, optim_args=args)
    trainer.train()
    first, *between, fourth, last = logged_keys(trainer)
    if choice == "off":
        assert not first | fourth | last and not any(between)
        return
    computed = COMPUTED.get(name, set())
    assert computed <= first and computed <= fourth and first, "the first log, and three steps on"
    for keys in (*between, last):
        assert keys and (computed <= keys if choice == "full" else not computed & keys)


class Operations(TorchDispatchMode):
    """Counts the operations that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@each_name
def test_logging_every_step_adds_at_most_two_percent_of_the_work(name, tmp_path):
    counts, steps = {}, 10
    for choice in ("off", "auto"):
        trainer = make(name, tmp_path, max_steps=steps, optim_args=f"diagnostics={choice}")
        with Operations() as operations:
            trainer.train()
        counts[choice] = operations.count
    with Operations() as counting:
        own_optimizer(trainer.optimizer).counted()
    report = counts["auto"] - counts["off"] - steps * counting.count  # at the first log alone
    assert report >= 0
    added = report / REPORT_INTERVAL + counting.count
    assert added <= 0.02 * counts["off"] / steps, (
        f"{report} a report, {counts['off']} {steps} steps"
    )


@each_name
@pytest.mark.parametrize("cls", [Trainer, PrecondTrainer])
def test_the_config_lies_beside_every_checkpoint(name, cls, tmp_path):
    trainer = make(
        name, tmp_path, cls=cls, max_steps=4, save_strategy="steps", save_steps=2, weight_decay=0.02
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    used = own_optimizer(trainer.optimizer).config
    assert used.weight_decay == 0.02 and used.lr == 1e-3
    for folder in ("checkpoint-2", "checkpoint-4", "."):
        assert load_config(tmp_path / folder) == used
    assert (tmp_path / "final" / CONFIG_FILE).exists() == (cls is PrecondTrainer)


@each_name
def test_training_twice_with_one_trainer_continues_with_live_hooks(name, tmp_path):
    trainer = make(name, tmp_path, max_steps=4, lr_scheduler_type="constant")
    trainer.train()
    optimizer = own_optimizer(trainer.optimizer)
    refreshed = dict(optimizer.diagnostics())
    trainer.train()
    assert own_optimizer(trainer.optimizer) is optimizer and optimizer.steps == 8
    once = make(name, tmp_path, max_steps=4, lr_scheduler_type="constant")
    once.train()
    assert dict(own_optimizer(once.optimizer).diagnostics()) == refreshed


def hooks(model):
    """Hooks installed anywhere in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [h for m in model.modules() for kind in kinds for h in getattr(m, kind).values()]


@each_name
def test_the_trained_model_has_no_hooks(name, tmp_path):
    model = bert()
    trainer = make(name, tmp_path, model)
    trainer.train()
    assert hooks(model) == []
    torch.save(model, tmp_path / "model.pt")


def scaled(trainer, scale, **fields):
    """Train with a loss scaler, as float16 training on a GPU does."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **fields)
    trainer.train()
    return trainer


@each_name
@pytest.mark.parametrize("growth", [1, 1000], ids=["growing", "constant"])
def test_a_loss_scale_changes_nothing(name, growth, tmp_path):
    optim_args = "basis_source=feature,basis_interval=2" if name == "adamr" else OFTEN[name]
    fields = {"max_grad_norm": 0.0, "optim_args": optim_args}
    plain = make(name, tmp_path, **fields)
    plain.train()
    with_scaler = scaled(make(name, tmp_path, **fields), 2.0**10, growth_interval=growth)
    assert losses(with_scaler) == losses(plain)
    for a, b in zip(plain.model.parameters(), with_scaler.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_output_gradients_are_collected_without_the_loss_scale():
    import types

    from accelerate.optimizer import AcceleratedOptimizer

    from hf_precond import create_optimizer
    from hf_precond.integrations.callback import PrecondCallback

    model = bert()
    optimizer = create_optimizer(model, "nkfac", stat_interval=1)
    batch = {
        key: torch.stack([torch.as_tensor(d[key]) for d in text_data(4)])
        for key in ("input_ids", "labels")
    }

    def statistics_of(scaler):
        wrapped = types.SimpleNamespace(optimizer=optimizer, scaler=scaler)
        PrecondCallback().on_step_begin(None, None, None, optimizer=wrapped)
        loss = model(**batch).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        return optimizer.statistics.take()

    assert hasattr(AcceleratedOptimizer, "step_was_skipped")
    plain = statistics_of(None)
    for scaler in (
        torch.amp.GradScaler("cpu", init_scale=2.0**12),
        torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=False),
    ):
        scaled_sums = statistics_of(scaler)
        assert plain.keys() == scaled_sums.keys()
        for key, statistic in plain.items():
            assert torch.equal(statistic.sum, scaled_sums[key].sum), key


@each_name
def test_a_step_that_the_scaler_skips_leaves_no_trace(name, tmp_path):
    data = text_data(count=8)
    fields = {
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }
    plain = make(name, tmp_path, data=data, max_steps=3, **fields)
    plain.train()
    trainer = make(name, tmp_path, data=data, max_steps=4, **fields)
    scaled(trainer, 2.0**127, backoff_factor=2.0**-120)
    assert own_optimizer(trainer.optimizer).steps == 3
    for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@each_name
def test_accumulation_equals_the_larger_batch(name, tmp_path):
    # A model whose loss is summed over num_items_in_batch: others ignore it, and the Trainer
    # then trains a loss that is larger by the number of micro-batches.
    data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data()]
    whole = make(name, tmp_path, llama().double(), data)
    whole.train()
    parts = make(
        name,
        tmp_path,
        llama().double(),
        data,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@each_name
def test_auto_find_batch_size_restarts_with_live_hooks(name, tmp_path):
    failures = itertools.chain([True], itertools.repeat(False))

    class Small(Trainer):
        def training_step(self, *args, **kwargs):
            if next(failures):
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    trainer = make(name, tmp_path, cls=Small, auto_find_batch_size=True, max_steps=3)
    trainer.train()
    assert trainer._train_batch_size < 8 and len(losses(trainer)) == 3


# Of the optimizer's own paper, and whether the package says that it is a reconstruction.
PAPERS = {
    "adamr": ("theses.lib.polyu.edu.hk/handle/200/13232", True),
    "afopt": ("theses.lib.polyu.edu.hk/handle/200/13232", True),
    "muon": ("kellerjordan.github.io/posts/muon", False),
    "nkfac": ("doi.org/10.1007/978-3-031-43421-1_15", False),
    "sgdph": ("arxiv.org/abs/2403.02681", False),
}


@each_name
def test_the_model_card_says_the_optimizer_right(name, tmp_path):
    trainer = make(name, tmp_path, cls=PrecondTrainer, max_steps=2, weight_decay=0.02)
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(tags="mine")
    card = (tmp_path / "README.md").read_text()
    title = get_info(name).title
    line = next(line for line in card.splitlines() if line.startswith("- optimizer:"))
    assert line.startswith(f"- optimizer: {title} (hf_precond, --optim {name}) with")
    assert "weight_decay=0.02" in line and OFTEN[name].split(",")[0] in line
    assert "OptimizerNames" not in card and "epsilon=" not in card
    assert card.count("### Optimizer") == 1 and card.count(CONFIG_FILE) == 1
    assert card.index("### Optimizer") < card.index("### Framework versions")
    assert "- hf_precond" in card and "- mine" in card
    versions = card[card.index("### Framework versions") :]
    assert card.count(f"- hf_precond {version()}\n") == 1 == versions.count("- hf_precond ")
    assert versions.index("- Transformers") < versions.index("- hf_precond")
    paper, reconstructed = PAPERS[name]
    assert paper in card and ("a reconstruction from" in card) == reconstructed
    assert "[`hf_precond`](https://" in card and "config=FOLDER_OR_HUB_ID`" in card
    for field, value in json.loads((tmp_path / CONFIG_FILE).read_text()).items():
        if field not in ("optimizer", "hf_precond_version", "betas"):
            assert f"| {field} | {value} |" in card


def test_a_stock_optimizer_is_left_alone(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make("adamr", tmp_path, cls=PrecondTrainer, optim="adamw_torch", optim_args=None)
        trainer.train()
        trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Use OptimizerNames.ADAMW_TORCH with betas" in card and "### Optimizer" not in card
    assert not (tmp_path / CONFIG_FILE).exists()
    assert trainer.optimizer_config is None


def test_a_model_in_which_nothing_is_preconditioned_is_refused(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))

        def forward(self, input_ids, labels=None):
            return {"loss": self.bias.square().sum()}

    for name in NAMES:
        with pytest.raises(ValueError, match=r"unfreeze|declare_attention"):
            make(name, tmp_path, Plain()).train()

"""LoRA, DoRA and ``modules_to_save`` with every optimizer, through the Trainer."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from hf_precond import PrecondTrainer
from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import list_optimizers
from tests.integrations.test_trainer import OFTEN, losses, make
from tests.integrations.tiny import bert, llama, text_data
from tests.optimizers.models import weights
from tests.optimizers.test_shared import hooks

NAMES = list_optimizers()
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj"],
}
# Heads are trained whole; the norms too, without which SGD-PH has nothing to do.
WHOLE = {
    "bert": ["classifier", "LayerNorm"],
    "llama": ["lm_head", "input_layernorm", "norm"],
}
BASES = {"bert": bert, "llama": llama}
KINDS = {"lora": {}, "dora": {"use_dora": True}}
each_case = pytest.mark.parametrize(
    ("name", "family", "kind"), [(n, f, k) for n in NAMES for f in BASES for k in KINDS]
)


def adapted(family, kind, whole=True, seed=0):
    """A base model, and a copy of it with adapters."""
    base = BASES[family](seed=seed)
    torch.manual_seed(seed + 1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS[family],
        modules_to_save=WHOLE[family] if whole else None,
        task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM",
        **KINDS[kind],
    )
    if not whole:
        config.task_type = None
    return base, peft.get_peft_model(copy.deepcopy(base), config)


def rows(family):
    if family == "bert":
        return text_data()
    return [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data()]


def train(name, family, model, folder, resume=None, **fields):
    optim_args = OFTEN[name] + (",scope=all_linear" if name == "afopt" else "")
    own = {"optim_args": optim_args, "max_steps": 6, "weight_decay": 0.01, "learning_rate": 5e-3}
    trainer = make(name, folder, model, rows(family), PrecondTrainer, **own | fields)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model, family):
    model.eval()
    with torch.no_grad():
        return model(torch.stack([row["input_ids"] for row in rows(family)[:8]])).logits


def is_trained(name):
    return any(part in name for part in ("lora_", "modules_to_save"))


@each_case
def test_only_the_trainable_leaves_move_and_merged_they_compute_the_same(
    name, family, kind, tmp_path
):
    base, model = adapted(family, kind)
    before = weights(model)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key in before if is_trained(key)}
    assert any("magnitude" in key for key in trainable) == (kind == "dora")
    trainer = train(name, family, model, tmp_path)
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]) == (key not in trainable), key
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    routes = {route.name: route.treatment for route in own_optimizer(trainer.optimizer).routing}
    assert {key for key in routes if routes[key] == "frozen"} == set(before) - trainable
    preconditioned = {key for key in routes if routes[key] == "preconditioned"}
    if name == "sgdph":
        assert preconditioned and all("orm" in key for key in preconditioned)
    else:
        adapters = {key for key in trainable if "lora_A" in key or "lora_B" in key}
        assert len(adapters) >= 8 and adapters <= preconditioned, adapters - preconditioned
    assert_merges(base, model, family)


def assert_merges(base, model, family):
    expected, plain = logits(model, family), logits(base, family)
    assert (expected - plain).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert type(merged) is type(base) and hooks(merged) == 0
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(logits(merged, family), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_learn(name, family, tmp_path):
    _, model = adapted(family, "dora")
    seen = losses(train(name, family, model, tmp_path, max_steps=40, learning_rate=2e-2))
    assert sum(seen[-8:]) < sum(seen[:8]) - 0.05


@pytest.mark.parametrize("name", NAMES)
def test_resumed_adapters_are_bit_equal(name, tmp_path):
    _, whole = adapted("bert", "dora")
    train(name, "bert", whole, tmp_path, save_strategy="steps", save_steps=3)
    _, again = adapted("bert", "dora", seed=7)
    # The frozen weights are no part of the checkpoint.
    again.load_state_dict({k: v for k, v in whole.state_dict().items() if not is_trained(k)}, False)
    train(name, "bert", again, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    for key, value in weights(again).items():
        assert torch.equal(value, whole.state_dict()[key]), key


@pytest.mark.parametrize("family", BASES)
def test_sgdph_says_that_adapters_alone_have_no_norms(family, tmp_path):
    _, model = adapted(family, "lora", whole=False)
    with pytest.raises(ValueError, match="sgdph") as error:
        train("sgdph", family, model, tmp_path)
    assert "norm" in str(error.value)


LOADER = """
import importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_precond":
            raise ImportError("hf_precond is blocked")

sys.meta_path.insert(0, Block())
try:
    import hf_precond
except ImportError:
    pass
else:
    raise SystemExit("hf_precond was imported")

import peft, torch, transformers

folder = sys.argv[1]
kinds = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
for case in json.load(open(f"{folder}/cases.json")):
    family = case.split("-")[1]
    base = getattr(transformers, kinds[family]).from_pretrained(f"{folder}/{case}/base")
    model = peft.PeftModel.from_pretrained(base, f"{folder}/{case}/adapter").eval()
    saved = torch.load(f"{folder}/{case}/outputs.pt", weights_only=True)
    with torch.no_grad():
        found = model(saved["input_ids"]).logits
        merged = model.merge_and_unload()(saved["input_ids"]).logits
    torch.testing.assert_close(found, saved["logits"], rtol=0, atol=0)
    torch.testing.assert_close(merged, saved["logits"], rtol=1e-4, atol=1e-5)
    print("loaded", case)
assert not any(name.startswith("hf_precond.") for name in sys.modules)
"""


@pytest.mark.slow
def test_saved_adapters_load_where_the_package_cannot_be_imported(tmp_path):
    cases = []
    for name in NAMES:
        for family in BASES:
            for kind in KINDS:
                case = f"{name}-{family}-{kind}"
                base, model = adapted(family, kind)
                base.save_pretrained(tmp_path / case / "base")
                trainer = train(name, family, model, tmp_path / case / "run")
                trainer.save_model(str(tmp_path / case / "adapter"))
                saved = {
                    "input_ids": torch.stack([row["input_ids"] for row in rows(family)[:8]]),
                    "logits": logits(model, family),
                }
                torch.save(saved, tmp_path / case / "outputs.pt")
                cases.append(case)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    root = str(Path(__file__).parents[2])
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p != root]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [word for case in cases for word in ("loaded", case)]


@pytest.mark.parametrize("attached", ["at once", "when training begins"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_plus_has_its_rates_and_resumes_bit_for_bit(name, attached, tmp_path):
    """peft makes the optimizer by its class, before any Trainer is there."""
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    from hf_precond.integrations.arguments import parse_pairs
    from hf_precond.registry import get_info

    info = get_info(name)

    def run(folder, checkpoint=None):
        _, model = adapted("llama", "lora")
        if checkpoint is not None:  # it holds what trains
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                torch.nn.init.normal_(parameter)
        values = info.config_cls.parse(parse_pairs(OFTEN[name]))
        if attached == "at once":
            values["attach_to"] = model
        optimizer = create_loraplus_optimizer(
            model, info.optimizer_cls, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1,
            **values,
        )  # fmt: skip
        args = make(
            name, folder, model, rows("llama"), optim="adamw_torch", optim_args=None, max_steps=4,
            save_strategy="steps", save_steps=2, lr_scheduler_type="constant",
        ).args  # fmt: skip
        before = weights(model)
        trainer = Trainer(
            model, args, train_dataset=rows("llama"), optimizers=(optimizer, None)
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, before

    whole, before = run(tmp_path / "whole")
    own = own_optimizer(whole.optimizer)
    held = {id(p): group for group in own.param_groups for p in group["params"]}
    for key, parameter in whole.model.named_parameters():
        moved = not torch.equal(before[key], parameter)
        assert moved == parameter.requires_grad, key
        if parameter.requires_grad:
            up = "lora_B" in key or parameter.dim() == 1
            assert held[id(parameter)]["lr"] == (16e-3 if up else 1e-3), key
    pair = [route for route in own.routing if ".q_proj.lora_" in route.name]
    if name != "sgdph":
        assert {route.treatment for route in pair} == {"preconditioned"}
    assert "not stepped" not in own.routing.count()
    again, _ = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[2:] == losses(whole)[2:]
    trained = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    for key in trained:
        assert torch.equal(weights(whole.model)[key], weights(again.model)[key]), key

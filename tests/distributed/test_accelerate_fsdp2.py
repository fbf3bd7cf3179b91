"""FSDP2 by accelerate's own code: parameters swapped at prepare, ``save_state``, ``load_state``.

accelerate shards on accelerators only; told that it runs under FSDP, its code does all the same on
a CPU.
"""

import inspect
import os
import re
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import load_fsdp_optimizer
from torch.distributed.fsdp import FSDPModule

from hf_precond.distributed.collectives import is_sharded
from hf_precond.registry import create_optimizer
from tests import ranks
from tests.distributed.test_checkpoint import LAST, SAVED
from tests.distributed.test_fsdp2 import SHARDABLE, all_full
from tests.optimizers.models import batch, make, train_step
from tests.optimizers.test_shared import QUICK

LAYERS = {"bert": "BertLayer", "gpt2": "GPT2Block"}
FORMATS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
BY_ENVIRONMENT = "as accelerate launch says"
# accelerate 1.6 fills the empty state of a fresh optimizer from shards, which loads nothing, and
# waits for ever for a whole model's.
resumes = pytest.mark.skipif(
    "get_optimizer_state_dict" not in inspect.getsource(load_fsdp_optimizer),
    reason="this accelerate cannot load what it saved under FSDP2",
)
ADAPTERS = {"lora": {}, "dora": {"use_dora": True}}


def model_of(kind, seed):
    """``bert``, or ``bert-lora`` for one whose adapters, head and norms alone train."""
    model_name, _, adapter = kind.partition("-")
    model = make(model_name, seed=seed, dtype=torch.float64)
    if not adapter:
        return model
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4,
        target_modules=["query", "value", "intermediate.dense"],
        modules_to_save=["classifier", "LayerNorm"],
        **ADAPTERS[adapter],
    )
    return peft.get_peft_model(model, config).train()


def run_under_fsdp2(accelerator, layer, state_dict_type):
    """Tell an accelerator so; each ``layer`` is sharded on its own."""
    kind = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = kind
    if state_dict_type == BY_ENVIRONMENT:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        return
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        state_dict_type=state_dict_type,
    )


class Run:
    """One prepared model and optimizer."""

    def __init__(self, name, kind, state_dict_type, seed):
        model = model_of(kind, seed)
        self.model_name = model_name = kind.partition("-")[0]
        fields = {"lr": 1e-3, "weight_decay": 0.01} | QUICK.get(name, {})
        self.optimizer = create_optimizer(model, name, **fields)
        if state_dict_type is None:
            self.model, self.accelerator = model, None
            return
        self.accelerator = Accelerator(cpu=True)
        run_under_fsdp2(self.accelerator, LAYERS[model_name], state_dict_type)
        self.model, self.stepper = self.accelerator.prepare(model, self.optimizer)
        layers = [m for m in self.model.modules() if type(m).__name__.endswith(LAYERS[model_name])]
        assert len(layers) == 2 and all(isinstance(layer, FSDPModule) for layer in layers)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert all(is_sharded(parameter) for parameter in held)
        assert {id(p) for p in held} == {id(p) for p in self.model.parameters() if p.requires_grad}

    def advance(self, first, last):
        for step in range(first, last):
            inputs = batch(self.model_name, step, dtype=torch.float64)
            if self.accelerator is None:
                train_step(self.model, self.optimizer, inputs)
                continue
            self.accelerator.backward(self.model(**inputs).loss)
            self.stepper.step()
            self.stepper.zero_grad()
        return all_full(self.model)


def cases():
    whole = [(n, m, f) for n in SHARDABLE for m in LAYERS for f in FORMATS]
    return whole + [(n, f"bert-{a}", FORMATS[0]) for n in SHARDABLE for a in ADAPTERS]


def trained_and_saved(folder):
    found = {}
    for case in cases():
        run = Run(*case, seed=0)
        run.advance(0, SAVED)
        run.accelerator.save_state(os.path.join(folder, *case))
        found |= {"/".join((*case, k)): v for k, v in run.advance(SAVED, LAST).items()}
    return found


def loaded_and_trained(folder):
    found = {}
    for case in cases():
        run = Run(*case, seed=7)
        run.accelerator.load_state(os.path.join(folder, *case))
        assert run.optimizer.steps == SAVED
        found |= {"/".join((*case, k)): v for k, v in run.advance(SAVED, LAST).items()}
    return found


@resumes
@pytest.mark.slow
def test_swapped_parameters_train_as_whole_ones_and_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    results = ranks.run(trained_and_saved, str(tmp_path))
    singles = {(n, m): Run(n, m, None, seed=0).advance(0, LAST) for n, m, _ in cases()}
    for name, model_name, kind in cases():
        for key, value in singles[name, model_name].items():
            found = [result[f"{name}/{model_name}/{kind}/{key}"] for result in results]
            assert torch.equal(*found), key
            torch.testing.assert_close(found[0], value, rtol=1e-5, atol=1e-8, msg=key)
    for result in ranks.run(loaded_and_trained, str(tmp_path)):
        assert result.keys() == results[0].keys()
        for key, value in result.items():
            assert torch.equal(value, results[0][key]), key


def sgdph_refuses():
    run = Run("sgdph", "bert", FORMATS[0], seed=0)
    with pytest.raises(RuntimeError, match="FSDP2") as error:
        run.advance(0, 1)
    return str(error.value)


@pytest.mark.slow
def test_sgdph_is_refused_at_the_first_loss_with_what_to_use_instead():
    for message in ranks.run(sgdph_refuses):
        assert message.startswith("sgdph: the model is sharded (FSDP2")
        assert "train with DDP" in message


def documented_environment(folder):
    """What ``accelerate launch`` tells the ranks of sharding, by the file in docs/migration.md."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    text = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    (folder / "fsdp2.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    words = ["--config_file", str(folder / "fsdp2.yaml"), "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.use_fsdp and arguments.num_processes == 2
    told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith("FSDP_")}


def trained_by(environment):
    os.environ |= environment
    found = {}
    for name in SHARDABLE:
        run = Run(name, "gpt2", BY_ENVIRONMENT, seed=0)
        plugin = run.accelerator.state.fsdp_plugin
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        found |= {f"{name}/{key}": value for key, value in run.advance(0, LAST).items()}
    return found


@pytest.mark.slow
def test_the_documented_configuration_trains_as_one_process_does(tmp_path):
    results = ranks.run(trained_by, documented_environment(tmp_path))
    for name in SHARDABLE:
        for key, value in Run(name, "gpt2", None, seed=0).advance(0, LAST).items():
            found = [result[f"{name}/{key}"] for result in results]
            assert torch.equal(*found), key
            torch.testing.assert_close(found[0], value, rtol=1e-5, atol=1e-8, msg=key)

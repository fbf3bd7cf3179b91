"""DeepSpeed, FSDP1 and Megatron-LM are refused before anything is trained, FSDP2 is not."""

import types

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.training_args import OptimizerNames

from hf_precond.integrations.arguments import FOLLOWS
from hf_precond.integrations.registration import look_up
from hf_precond.registry import create_optimizer, list_optimizers
from tests.optimizers.models import make

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)


def through_the_trainer(model, name, **fields):
    """What the Trainer calls, with training arguments that have ``fields``."""
    defaults = {field: 0.5 for names in FOLLOWS.values() for field in names}
    args = types.SimpleNamespace(
        optim=OptimizerNames(name), deepspeed=None, optim_args=None, process_index=1,
        **defaults | fields,
    )  # fmt: skip
    kind, values = look_up(args, model)
    return kind(model.parameters(), **values)


each_way = pytest.mark.parametrize("build", [create_optimizer, through_the_trainer])


def assert_says(error, name, strategy):
    message = str(error.value)
    assert message.startswith(f"{name}: {strategy}")
    assert "use DDP (torchrun), or FSDP2" in message and "fsdp_version: 2" in message


@pytest.fixture
def accelerate_runs(monkeypatch):
    """Sets what accelerate was set up for."""

    def set_up(kind, **state):
        shared = {"distributed_type": kind} | state
        monkeypatch.setattr(AcceleratorState, "_shared_state", shared)

    return set_up


@each_name
@each_way
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_refused_at_every_stage(name, build, stage, accelerate_runs):
    plugin = types.SimpleNamespace(zero_stage=stage)
    accelerate_runs(DistributedType.DEEPSPEED, deepspeed_plugins={"default": plugin})
    with pytest.raises(ValueError) as error:
        build(make("bert"), name)
    assert_says(error, name, "DeepSpeed is not supported at any ZeRO stage")


@each_name
@pytest.mark.parametrize(
    "fields", [{"deepspeed_plugin": 1}, {"deepspeed_plugin": {"zero_optimization": {"stage": 1}}}]
)
def test_deepspeed_in_the_training_arguments_is_refused(name, fields):
    with pytest.raises(ValueError) as error:
        through_the_trainer(make("bert"), name, **fields)
    assert_says(error, name, "DeepSpeed")


@each_name
def test_copies_of_a_model_on_several_gpus_are_refused(name):
    with pytest.raises(ValueError) as error:
        create_optimizer(torch.nn.DataParallel(make("bert")), name)
    assert_says(error, name, "nn.DataParallel")
    with pytest.raises(ValueError) as error:
        through_the_trainer(make("bert"), name, n_gpu=2)
    assert_says(error, name, "nn.DataParallel")
    assert "CUDA_VISIBLE_DEVICES=0" in str(error.value)


@each_name
def test_parameters_partitioned_by_zero_3_are_refused_without_accelerate(name):
    model = make("bert")
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    with pytest.raises(ValueError) as error:
        create_optimizer(model, name)
    assert_says(error, name, "DeepSpeed")


@each_name
@each_way
def test_fsdp1_is_refused_before_the_model_is_wrapped_and_fsdp2_is_not(
    name, build, accelerate_runs
):
    accelerate_runs(DistributedType.FSDP, fsdp_plugin=types.SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError) as error:
        build(make("bert"), name)
    assert_says(error, name, "FSDP1")
    accelerate_runs(DistributedType.FSDP, fsdp_plugin=types.SimpleNamespace(fsdp_version=2))
    build(make("bert"), name).close()


@each_name
@each_way
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_model_wrapped_by_fsdp1_is_refused(name, build, use_orig_params, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            make("bert"), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(ValueError) as error:
            build(model, name)
    finally:
        dist.destroy_process_group()
    assert_says(error, name, "FSDP1")


@each_name
def test_megatron_is_refused(name, accelerate_runs):
    accelerate_runs(DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError) as error:
        create_optimizer(make("bert"), name)
    assert_says(error, name, "Megatron-LM")


@each_name
@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_one_process_and_ddp_are_served(name, kind, accelerate_runs):
    accelerate_runs(kind)
    create_optimizer(make("bert"), name).close()

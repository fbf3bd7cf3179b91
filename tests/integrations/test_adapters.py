"""Several adapters of one model: another one for a second training, two at once."""

import peft
import pytest
import torch

from hf_precond.architectures.attention import find_attention
from hf_precond.integrations.arguments import own_optimizer
from tests.integrations.test_trainer import make
from tests.integrations.tiny import llama, text_data
from tests.optimizers.models import weights

NAMES = ["adamr", "afopt", "nkfac", "sgdph"]


def data():
    return [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data()]


def adapted(name="", **fields):
    """A model with the adapters a and b, a in use."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False, **fields
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.set_adapter("a")
    if name == "sgdph":
        model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_second_training_of_another_adapter_names_the_remedy_that_works(name, tmp_path):
    model = adapted(name)
    trainer = make(name, tmp_path, model, data(), max_steps=2)
    trainer.train()
    model.set_adapter("b")
    if name == "sgdph":
        model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lora_A\.b") as error:
        trainer.train()
    assert "trainer.optimizer = trainer.lr_scheduler = None" in str(error.value)
    trainer.optimizer = trainer.lr_scheduler = None
    before = weights(model)
    trainer.train()
    for key, value in weights(model).items():
        trains = ".b." in key or (name == "sgdph" and key.endswith("model.norm.weight"))
        assert torch.equal(value, before[key]) != trains, key


@pytest.mark.parametrize("name", NAMES[:3])
def test_two_active_adapters_are_both_preconditioned(name, tmp_path):
    model = adapted()
    model.base_model.set_adapter(["a", "b"])
    trainer = make(name, tmp_path, model, data(), max_steps=3)
    before = weights(model)
    trainer.train()
    own = own_optimizer(trainer.optimizer)
    routes = {r.name: r.treatment for r in own.routing if "lora_" in r.name}
    assert len(routes) == 24 and set(routes.values()) == {"preconditioned"}
    assert all(own.state[bound.weight] for bound in own.bound)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in routes)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_an_attention_computes_with_holds_every_active_adapter(fields, frozen):
    model = adapted(**fields).double().eval()
    model.base_model.set_adapter(["a", "b"])
    if frozen:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".b." in key)
    eye = torch.eye(16, dtype=torch.float64)
    for block in find_attention(model):
        assert len(block.pairs("q")) == 2
        for role, layer in (("q", "q_proj"), ("v", "v_proj"), ("o", "o_proj")):
            found = block.effective(role)
            torch.testing.assert_close(found, getattr(block.module, layer)(eye).mT.detach())

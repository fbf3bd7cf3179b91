"""AFOpt's ``scope="auto"``: what a model decides, and what a resumed training keeps."""

import copy
import logging

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from hf_precond import AFOptConfig
from hf_precond.optimizers.afopt.optimizer import AFOpt
from hf_precond.registry import create_optimizer

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ATTENTION = 8
"""Matrices of attention in the two layers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("body"))
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**SIZES)).save_pretrained(path)
    return path


def loaded(folder: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return tf.BertForSequenceClassification.from_pretrained(folder, num_labels=3).train()


def made() -> torch.nn.Module:
    torch.manual_seed(1)
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3)).train()


def adapted(folder: str) -> torch.nn.Module:
    lora = LoraConfig(r=2, target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS")
    return get_peft_model(loaded(folder), lora).train()


def kinds(optimizer: torch.optim.Optimizer) -> set[str]:
    """The last names of the layers below the adapters that are preconditioned."""
    return {bound.matrix.name.split(".")[-3] for bound in optimizer.bound}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    ids, labels = torch.arange(24).view(4, 6), torch.tensor([0, 1, 2, 0])
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


def count(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer.bound)


def test_linear_layers_that_were_loaded_are_left_to_adamw(folder, caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = create_optimizer(loaded(folder), "afopt")
    assert count(optimizer) == ATTENTION
    route = optimizer.routing["bert.encoder.layer.1.output.dense.weight"]
    assert route.treatment == "adamw"
    assert (
        route.reason == "linear layer: outside scope=attention (auto, of a model that was loaded)"
    )
    said = [r.message for r in caplog.records if "scope=all_linear" in r.message]
    assert said == [
        "afopt: this model's weights were loaded, so its attention is preconditioned and its other "
        "linear layers are left to adamw (scope=attention); scope=all_linear preconditions them "
        "too, as earlier releases did."
    ]


def test_from_random_weights_all_linear_layers_are_preconditioned(caplog):
    model = made()
    optimizer = create_optimizer(model, "afopt")
    assert count(optimizer) == count(create_optimizer(model, "afopt", scope="all_linear")) > 8
    assert "scope" not in caplog.text


def test_what_is_set_holds(folder):
    for scope, matrices in (("query_key", 4), ("attention", 8), ("all_linear", 13)):
        assert count(create_optimizer(loaded(folder), "afopt", scope=scope)) == matrices


def test_only_loaded_layers_that_train_decide(folder):
    model = loaded(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "attention" in name
    assert create_optimizer(model, "afopt").structure.decided == {"scope": "all_linear"}
    model = loaded(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "attention" not in name
    optimizer = create_optimizer(model, "afopt")
    assert optimizer.structure.decided == {"scope": "all_linear"} and count(optimizer) == 5


def test_adapters_do_not_decide(folder):
    """Of LoRA no linear layer that was loaded trains, so all of its A and B are preconditioned."""
    model = adapted(folder)
    optimizer = create_optimizer(model, "afopt")
    assert optimizer.structure.decided == {"scope": "all_linear"}
    assert kinds(optimizer) == {"query", "dense"} and count(optimizer) == 8
    optimizer = create_optimizer(model, "afopt", scope="attention")
    assert kinds(optimizer) == {"query"} and count(optimizer) == 4
    (left,) = {r.reason for r in optimizer.routing if "intermediate" in r.name and "lora" in r.name}
    assert left == "adapter of a linear layer: outside scope=attention"


def test_adapters_of_heads_are_left_to_the_fallback_optimizer(folder):
    lora = LoraConfig(r=2, target_modules=["query", "classifier"])
    optimizer = create_optimizer(get_peft_model(loaded(folder), lora), "afopt")
    assert kinds(optimizer) == {"query"}


def test_adapters_that_share_a_matrix_are_left_to_the_fallback_optimizer(folder):
    model = adapted(folder)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.lora_A["default"].weight = first.lora_A["default"].weight
    assert kinds(create_optimizer(model, "afopt")) == {"query"}
    model = adapted(folder)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.lora_B["default"] = first.lora_B["default"]
    assert kinds(create_optimizer(model, "afopt")) == {"query"}


def test_adapters_of_transposed_parameters_are_left_to_the_fallback_optimizer():
    """There PEFT's A meets the layer's outputs."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 8}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).train()
    names = ["mlp.c_fc.weight", "attn.c_proj.weight", "attn.c_attn.weight"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    with pytest.raises(ValueError, match="no matrix in scope"):
        create_optimizer(model, "afopt")


def test_muon_beneath_takes_no_adapters(folder):
    optimizer = create_optimizer(adapted(folder), "afopt", scope="attention", base="muon")
    assert not [m for m in optimizer.structure.hidden if "lora" in m.name]


def test_a_state_without_identity_knows_the_adapters_of_the_attention(folder, caplog):
    model = adapted(folder)
    model.bert.encoder.layer[0].output.dense.weight.requires_grad = True  # decides
    optimizer = create_optimizer(model, "afopt", head="lr")
    assert optimizer.structure.decided == {"scope": "attention"}
    train(model, optimizer)
    state = optimizer.state_dict()
    del state["hf_precond"]
    again = create_optimizer(model, "afopt", head="lr")
    caplog.clear()
    again.load_state_dict(state)
    assert count(again) == 4 and not caplog.text


@pytest.mark.parametrize("scaling", ["adaptive", "norm_recovery"])
@pytest.mark.parametrize("way", ["attached", "attached later"])
def test_adapters_that_release_0_2_left_to_adamw_begin_anew(folder, way, scaling, caplog):
    model, fields = adapted(folder), {"scaling": scaling}
    optimizer = create_optimizer(model, "afopt", scope="attention", **fields)
    train(model, optimizer)
    state = optimizer.state_dict()
    state["hf_precond"]["layout"]["scope"] = "all_linear"  # what release 0.2 wrote
    if way == "attached":
        resumed = create_optimizer(model, "afopt", **fields)
        resumed.load_state_dict(state)
    else:
        groups = [group["params"] for group in optimizer.param_groups]
        resumed = AFOpt([{"params": params} for params in groups], **fields)
        resumed.load_state_dict(state)
        resumed.attach(model)
    assert caplog.text.count("left 4 matrices of adapters outside the attention to adamw") == 1
    held = [resumed.state.get(bound.weight) for bound in resumed.bound]
    assert sum(bool(each) for each in held) == 4
    train(model, resumed)
    kept = [resumed.state[bound.weight] for bound in resumed.bound]
    name, other = ("momentum", "exp_avg") if scaling == "adaptive" else ("exp_avg", "momentum")
    assert all(name in state and other not in state for state in kept)
    caplog.clear()
    again = create_optimizer(model, "afopt", **fields)
    again.load_state_dict(resumed.state_dict())
    assert "adapters" not in caplog.text


def test_a_decision_outlasts_layers_that_are_unfrozen(folder):
    """A momentum of weeks is not dropped because attention joins."""
    model = loaded(folder)
    attention = [p for n, p in model.named_parameters() if "attention" in n]
    for parameter in attention:
        parameter.requires_grad = False
    optimizer = create_optimizer(model, "afopt", params=model.parameters())
    train(model, optimizer)
    assert count(optimizer) == 5
    for parameter in attention:
        parameter.requires_grad = True
    optimizer.attach(model)
    assert count(optimizer) == 13


def test_a_decision_for_layers_that_are_frozen_is_taken_anew(folder):
    model = loaded(folder)
    optimizer = create_optimizer(model, "afopt", params=model.parameters())
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "attention" not in name
    optimizer.attach(model)
    assert count(optimizer) == 5


@pytest.mark.parametrize("way", ["attached", "attached later", "prepared", "no identity"])
@pytest.mark.parametrize("scope", ["all_linear", "attention"])
def test_a_resumed_training_keeps_its_scope(folder, scope, way):
    """Of a model made anew from its config, and of one from a checkpoint of the training.

    accelerate loads an optimizer's own state into it; torch's distributed checkpoints have no
    identity, which alone knows of a new head.
    """
    model, fields = loaded(folder), {"lr": 1e-3, "head": "lr" if way == "no identity" else "auto"}
    optimizer = create_optimizer(model, "afopt", params=model.parameters(), scope=scope, **fields)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    for other in (loaded(folder), made()):
        other.load_state_dict(weights)
        if way == "attached later":
            resumed = AFOpt(other.parameters(), **fields)
            resumed.load_state_dict(state)
            resumed.attach(other)
        else:
            resumed = create_optimizer(other, "afopt", params=other.parameters(), **fields)
            if way == "prepared":
                resumed.load_state_dict(resumed.state_dict())
            if way == "no identity":
                state = {name: value for name, value in state.items() if name != "hf_precond"}
            resumed.load_state_dict(state)
        assert resumed.config.scope == "auto"
        assert count(resumed) == count(optimizer)
        train(other, resumed, 2)
        for name, weight in other.state_dict().items():
            torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)


def test_a_state_of_other_fields_changes_nothing(folder):
    model = loaded(folder)
    optimizer = create_optimizer(model, "afopt", scope="all_linear", direction="inverse")
    train(model, optimizer)
    mine = create_optimizer(loaded(folder), "afopt")
    with pytest.raises(ValueError, match="direction='inverse' there"):
        mine.load_state_dict(optimizer.state_dict())
    train(mine.structure.model, mine)
    assert count(mine) == ATTENTION and mine.config == AFOptConfig()


def test_the_state_names_what_was_decided(folder):
    layout = create_optimizer(loaded(folder), "afopt").state_dict()["hf_precond"]["layout"]
    assert layout["scope"] == "attention"
    assert create_optimizer(loaded(folder), "afopt").config.scope == "auto"


def test_states_of_several_scopes_follow_each_other(folder):
    """Also one that was saved before there was a model."""
    mine, states = create_optimizer(loaded(folder), "afopt"), {}
    for scope in ("all_linear", "attention", "query_key"):
        model = loaded(folder)
        optimizer = create_optimizer(model, "afopt", scope=scope)
        train(model, optimizer)
        states[count(optimizer)] = optimizer.state_dict()
    for matrices in (13, 8, 4, 13):
        mine.load_state_dict(states[matrices])
        assert count(mine) == matrices
    model = loaded(folder)
    early = AFOpt(model.parameters())
    state = early.state_dict()
    early.attach(model)
    early.load_state_dict(state)
    assert count(early) == ATTENTION


def test_a_trainer_resumes_with_the_scope_that_it_began_with(folder, tmp_path):
    """Begun from random weights, resumed with a model from its checkpoint, and the reverse."""
    rows = [{"input_ids": list(range(i, i + 6)), "labels": i % 3} for i in range(16)]
    for first, second in ((made, loaded), (loaded, made)):
        out, moved = str(tmp_path / first.__name__), []
        for steps, make in ((2, first), (4, second)):
            model = make(folder) if make is loaded else make()
            args = tf.TrainingArguments(
                out, max_steps=steps, save_steps=2, optim="afopt", report_to=[], use_cpu=True,
                disable_tqdm=True, save_strategy="steps", learning_rate=1e-3,
            )  # fmt: skip
            trainer = tf.Trainer(model, args, train_dataset=rows)
            trainer.train(resume_from_checkpoint=steps == 4)
            moved.append(len(trainer.optimizer.optimizer.bound))
            assert trainer.optimizer.optimizer.config.scope == "auto"
        assert moved == ([13, 13] if first is made else [8, 8])

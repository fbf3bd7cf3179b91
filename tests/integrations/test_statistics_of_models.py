"""Layers of real models that are used otherwise than by calling them, or whose outputs change."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_precond.linalg.matrix_functions import unpack
from hf_precond.registry import create_optimizer

SOUND = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "conv_dim": (32, 32), "conv_stride": (4, 4), "conv_kernel": (8, 8), "layerdrop": 0.0,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "activation_dropout": 0.0,
    "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
}  # fmt: skip


def inputs_of(module, keep):
    """What a module is called with, from now on."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: keep.append({"args": args, **kwargs}), with_kwargs=True
    )
    return keep


def extended(rows):
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def sound(model_class, config_class, **options):
    torch.manual_seed(0)
    model = model_class(config_class(**SOUND, **options)).double().train()
    mask = torch.ones(2, 1024, dtype=torch.long)
    mask[1, 700:] = 0
    batch = {"input_values": torch.randn(2, 1024, dtype=torch.float64), "attention_mask": mask}
    return model, batch | {"labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("name", ["afopt", "nkfac"])
def test_wavlms_attention_gives_its_weights_to_a_function(name):
    classes = transformers.WavLMForSequenceClassification, transformers.WavLMConfig
    model, batch = sound(*classes, apply_spec_augment=False)
    optimizer = create_optimizer(model, name, stat_interval=1)
    attention = model.wavlm.encoder.layers[1].attention
    seen = inputs_of(attention, [])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no statistics")
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            if optimizer.steps == 1:
                states = {weight: copy.deepcopy(held) for weight, held in optimizer.state.items()}
    hidden = seen[0]["args"][0] if seen[0]["args"] else seen[0]["hidden_states"]
    kept = seen[0].get("attention_mask", seen[0]["args"][1] if len(seen[0]["args"]) > 1 else None)
    assert kept is not None and not kept.bool().all()
    rows = extended(hidden[kept.bool()].detach())
    if name == "nkfac":
        moment, state = rows.mT @ rows, states[attention.q_proj.weight]
        torch.testing.assert_close(unpack(state["input_factor"]), moment / moment.norm())
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        for layer in projections:
            held = optimizer.state[layer.weight]
            assert held["output_updates"] == held["input_updates"] == 3
    else:
        (block,) = [b for b in optimizer.structure.attention if b.module is attention]
        moment = optimizer.plan.moments_of[block]["x"].read(states)
        torch.testing.assert_close(moment, rows.mT @ rows / len(rows))
    routes = [r for r in optimizer.routing if ".attention." in r.name and "_proj.weight" in r.name]
    assert len(routes) == 8 and {route.treatment for route in routes} == {"preconditioned"}
    optimizer.close()


def test_wav2vec2_masks_its_projected_features_in_place():
    options = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2,
               "mask_time_min_masks": 2}  # fmt: skip
    classes = transformers.Wav2Vec2ForSequenceClassification, transformers.Wav2Vec2Config
    model, batch = sound(*classes, **options)
    twin, gradients = copy.deepcopy(model), []

    def noted(module, args, output):
        output = output.clone()
        output.register_hook(gradients.append)
        return output

    twin.wav2vec2.feature_projection.projection.register_forward_hook(noted)
    np.random.seed(0)
    twin(**batch).loss.backward()
    optimizer = create_optimizer(model, "nkfac", stat_interval=1)
    np.random.seed(0)
    model(**batch).loss.backward()
    projection = model.wav2vec2.feature_projection.projection
    torch.testing.assert_close(
        projection.weight.grad, twin.wav2vec2.feature_projection.projection.weight.grad
    )
    optimizer.step()
    rows = gradients[0].flatten(0, 1)
    assert (rows == 0).all(1).any(), "some frames are masked"
    moment = rows.mT @ rows
    found = unpack(optimizer.state[projection.weight]["output_factor"])
    torch.testing.assert_close(found, moment / moment.norm())
    optimizer.close()


def test_mamba2s_convolution_is_given_to_a_function():
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8,
        n_groups=1, expand=2, chunk_size=4, conv_kernel=3,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).double().train()
    optimizer = create_optimizer(model, "nkfac", stat_interval=1)
    mixer, out = model.backbone.layers[0].mixer, []
    mixer.in_proj.register_forward_hook(lambda _, args, output: out.append(output.detach()))
    tokens = torch.randint(50, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    inputs = out[0].split(sizes, -1)[1].mT
    windows = F.pad(inputs, (2, 2)).unfold(-1, 3, 1)  # [B, channels, places, kernel]
    rows = extended(windows.flatten(0, 2))
    moment = rows.mT @ rows
    found = unpack(optimizer.state[mixer.conv1d.weight]["input_factor"])
    torch.testing.assert_close(found, moment / moment.norm())
    optimizer.close()


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_experts_are_said_to_have_no_statistics(tmp_path):
    """PEFT multiplies their weights into the experts' without calling them."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts)
    model = get_peft_model(transformers.MixtralForCausalLM(config), lora)
    data = [{"input_ids": t, "labels": t} for t in torch.randint(3, 50, (64, 8))]
    arguments = TrainingArguments(
        tmp_path, optim="nkfac", optim_args="stat_interval=1,inverse_interval=1", max_steps=6,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=6,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "no statistics" in str(w.message)]
    assert 1 <= len(told) <= 2, told  # A has no gradient at the first step
    assert "experts" in told[0] and "adamw steps them" in told[0]
    routing = trainer.optimizer.optimizer.routing
    trained = {r.name: r.treatment for r in routing if r.treatment != "frozen"}
    assert len(trained) == 6
    for name, treatment in trained.items():
        assert treatment == ("adamw" if "experts" in name else "preconditioned"), name
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["optim_unobserved_matrices"] == 4


def test_an_output_head_is_read_where_its_weight_is_multiplied_outside():
    """As losses do that take the hidden states."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().train()
    optimizer = create_optimizer(model, "nkfac", stat_interval=1)
    tokens = torch.randint(50, (2, 8))
    hidden = model.model(input_ids=tokens).last_hidden_state
    logits = hidden @ model.lm_head.weight.T
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    rows = hidden.detach().flatten(0, 1)
    moment = rows.mT @ rows
    found = unpack(optimizer.state[model.lm_head.weight]["input_factor"])
    torch.testing.assert_close(found, moment / moment.norm())
    assert isinstance(model.lm_head, nn.Linear)
    optimizer.close()

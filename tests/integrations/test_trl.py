"""TRL's trainers with every optimizer: they train, and what is preconditioned has statistics."""

import ast
import math
import re

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import hf_precond
from hf_precond.integrations.arguments import own_optimizer

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = [" ".join(f"w{(i * j) % 40}" for j in range(1, 7)) for i in range(1, 33)]
PAIRS = {
    "prompt": TEXT,
    "chosen": [text.split()[0] + " w1 w2 w3" for text in TEXT],
    "rejected": [text.split()[0] + " w9 w8 w7" for text in TEXT],
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def tokens():
    special = {"[PAD]": 0, "<s>": 1, "</s>": 2, "[UNK]": 3}
    words = {f"w{number}": number + 4 for number in range(40)}
    made = Tokenizer(models.WordLevel(special | words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>",
        eos_token="</s>", model_max_length=64,
    )  # fmt: skip


def llama(kind=LlamaForCausalLM, width=16):
    torch.manual_seed(0)
    return kind(
        LlamaConfig(
            vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=2 * width, num_labels=1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def quantised(folder):
    """A Llama whose layers hold 4 bits a weight."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama(width=64).save_pretrained(folder / "dense")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder / "dense", quantization_config=four)


def lora(**fields):
    # float32: B begins at zero, and a tiny adapter in bfloat16 learns nothing in a few steps.
    return LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM", **fields)


def settings(config, optim, folder, **fields):
    short = {
        "optim": optim, "max_steps": 6, "per_device_train_batch_size": 4, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True, "logging_steps": 1, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return config(str(folder), **short | fields)


def sft(optim, folder, model=None, peft_config=None, **fields):
    return trl.SFTTrainer(
        model or llama(),
        settings(trl.SFTConfig, optim, folder, max_length=32, **fields),
        train_dataset=Dataset.from_dict({"text": TEXT}),
        processing_class=tokens(),
        peft_config=peft_config,
    )


def norms_for(optim):
    """SGD-PH needs norms that train."""
    return {"modules_to_save": NORMS} if optim == "sgdph" else {}


def sft_lora(optim, folder):
    return sft(optim, folder, peft_config=lora(**norms_for(optim)))


def sft_qlora(optim, folder):
    # All rows in each batch: what a new adapter gains in a few steps is less than batches differ.
    config = lora(**norms_for(optim))
    return sft(optim, folder, quantised(folder), config, per_device_train_batch_size=32)


def dpo(optim, folder):
    return trl.DPOTrainer(
        llama(),
        ref_model=llama(),
        args=settings(trl.DPOConfig, optim, folder),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokens(),
    )


def kto(optim, folder):
    columns = {
        "prompt": TEXT + TEXT,
        "completion": PAIRS["chosen"] + PAIRS["rejected"],
        "label": [True] * 32 + [False] * 32,
    }
    return trl.KTOTrainer(
        llama(),
        ref_model=llama(),
        args=settings(trl.KTOConfig, optim, folder),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokens(),
    )


def grpo(optim, folder):
    def reward(completions, **_):
        return [float(len(set(completion.split()))) for completion in completions]

    fields = {"num_generations": 2, "max_completion_length": 8}
    return trl.GRPOTrainer(
        llama(),
        reward_funcs=reward,
        args=settings(trl.GRPOConfig, optim, folder, **fields),
        train_dataset=Dataset.from_dict({"prompt": TEXT}),
        processing_class=tokens(),
    )


def reward(optim, folder):
    return trl.RewardTrainer(
        llama(LlamaForSequenceClassification),
        args=settings(trl.RewardConfig, optim, folder),
        train_dataset=Dataset.from_dict({key: PAIRS[key] for key in ("chosen", "rejected")}),
        processing_class=tokens(),
    )


def packed(optim, folder):
    return sft(optim, folder, packing=True)


def checkpointed(optim, folder):
    return sft(optim, folder, bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optim", hf_precond.list_optimizers())
@pytest.mark.parametrize(
    "make", [sft, packed, checkpointed, sft_lora, sft_qlora, dpo, kto, grpo, reward],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_every_trainer_with_every_optimizer(make, optim, tmp_path):
    trainer = make(optim, tmp_path)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    if make not in (grpo, kto):  # whose losses do not fall as the policy gets better
        assert losses[-1] < losses[0]
    assert not [name for name, p in trained.items() if torch.equal(p, start[name])]
    own = own_optimizer(trainer.optimizer)
    routes = [route for route in own.routing.routes if route.treatment == "preconditioned"]
    assert routes
    diagnostics = own.diagnostics()
    assert not any(value for key, value in diagnostics.items() if "dropped" in key)
    if optim == "sgdph":
        assert diagnostics["probes"] == 1
        for norm in own.structure.norms:
            curvature = own.state[norm.parameter]["curvature"]
            assert torch.isfinite(curvature).all() and curvature.any(), norm.name


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_counted_once(tmp_path):
    """The tokens and averages that TRL logs, with the passes that are made again and without."""
    logs = []
    for optim in ("adamw_torch", "sgdph"):
        trainer = sft(optim, tmp_path, learning_rate=0.0)
        trainer.train()
        kept = ("loss", "num_tokens", "entropy", "mean_token_accuracy")
        logs.append([[e[key] for key in kept] for e in trainer.state.log_history if "loss" in e])
    assert logs[0] == logs[1]


@pytest.mark.filterwarnings("ignore")
def test_lora_without_a_norm_is_refused_by_sgdph_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="modules_to_save=") as refused:
        sft("sgdph", tmp_path, peft_config=lora()).train()
    names = ast.literal_eval(re.search(r"modules_to_save=(\[.*?\])", str(refused.value))[1])
    sft("sgdph", tmp_path, peft_config=lora(modules_to_save=names)).train()

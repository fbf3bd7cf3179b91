"""Tiny real models, one batch maker each, for tests that every optimizer shares."""

import contextlib

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


NO_STATISTICS: frozenset[str] = frozenset({"muon"})
"""Optimizers that keep no statistics and no factors, which tests of these leave out."""


def bert():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3, **NO_DROPOUT,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_channels=1, num_labels=3, **NO_DROPOUT,
    )  # fmt: skip
    return ViTForImageClassification(config)


def gpt2():
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama}


def make(name, seed=0, dtype=torch.float32):
    """A model in train mode, its initial weights fixed by ``seed``."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype).train()


def batch(name, seed=0, size=6, dtype=torch.float32):
    """A mini-batch with labels, padded where the model takes a mask."""
    generator = torch.Generator().manual_seed(100 + seed)
    if name == "vit":
        pixels = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        return {"pixel_values": pixels, "labels": torch.randint(3, (size,), generator=generator)}
    tokens = torch.randint(50, (size, 8), generator=generator)
    mask = torch.ones_like(tokens)
    mask[::2, 5:] = 0
    labels = torch.randint(3, (size,), generator=generator)
    if name != "bert":
        labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def train_step(model, optimizer, inputs, scale=1.0):
    """Forward, probe where the optimizer takes one, backward, step. Returns the loss."""
    optimizer.zero_grad()
    loss = backward(model, optimizer, inputs, scale)
    optimizer.step()
    return loss


def backward(model, optimizer, inputs, scale=1.0):
    """Forward, probe where the optimizer takes one, backward."""
    context = getattr(optimizer, "curvature_context", contextlib.nullcontext)
    with context():
        loss = model(**inputs).loss * scale
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        loss.backward()
    return loss.item()


def train(name, model, optimizer, steps, start=0):
    """Losses of ``steps`` steps, step ``s`` on batch ``s``."""
    dtype = next(model.parameters()).dtype
    return [
        train_step(model, optimizer, batch(name, s, dtype=dtype))
        for s in range(start, start + steps)
    ]


def weights(model):
    """A copy of every parameter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}

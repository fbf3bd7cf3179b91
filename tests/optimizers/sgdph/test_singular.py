"""Norms whose curvature is without bound at the first step move all the same.

The queries of a new BLIP-2 are zero, and some channels of a new MobileViT hardly vary: the norms
over them divide by almost nothing, and the Hessian there holds for no step.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    MobileViTConfig,
    MobileViTForImageClassification,
    OPTConfig,
)

from hf_precond.registry import create_optimizer
from tests.optimizers.test_every_architecture import example
from tests.tiny_batches import loss_of


class Queries(nn.Module):
    """Learned queries, zero at first, that are normed, mixed with an input and normed again."""

    def __init__(self, width=8):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(4, width))
        self.first, self.second, self.third = (nn.LayerNorm(width, eps=1e-12) for _ in range(3))
        self.mix, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, 3)

    def forward(self, x):
        hidden = self.second(self.mix(self.first(self.queries)))
        return self.head(self.third(hidden + 1e-4 * x).mean(1))


def queries():
    model = Queries()
    x, labels = torch.randn(6, 4, 8), torch.arange(6) % 3
    return model, lambda: nn.functional.cross_entropy(model(x), labels)


def blip2():
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=small | {"hidden_size": 16, "image_size": 16, "patch_size": 8},
            qformer_config=small
            | {
                "vocab_size": 50, "hidden_size": 16, "encoder_hidden_size": 16,
                "cross_attention_frequency": 1, "max_position_embeddings": 32,
            },
            text_config=OPTConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=1,
            ).to_dict(),
            num_query_tokens=4,
            image_token_index=49,
        )
    )  # fmt: skip
    tokens = torch.randint(2, 48, (2, 10))
    tokens[:, :4] = 49
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16), "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens), "labels": tokens.masked_fill(tokens == 49, -100),
    }  # fmt: skip
    return model, lambda: model(**inputs).loss


def mobilevit():
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8] * 6 + [16], "num_labels": 3}
    config = MobileViTConfig(image_size=64, num_attention_heads=2, **sizes)
    model = MobileViTForImageClassification(config)
    pixels, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    return model, lambda: model(pixel_values=pixels, labels=labels).loss


@pytest.mark.parametrize(
    "make",
    [queries, blip2, pytest.param(mobilevit, marks=pytest.mark.slow)],
    ids=lambda m: m.__name__,
)
def test_every_norm_with_a_gradient_moves(make):
    torch.manual_seed(0)
    model, loss_function = make()
    optimizer = create_optimizer(model.train(), "sgdph", lr=1e-3, weight_decay=0.0)
    norms = optimizer.structure.norms
    start = [norm.parameter.detach().clone() for norm in norms]
    reached, curvatures = [False] * len(norms), []
    for step in range(25):
        optimizer.zero_grad()
        with optimizer.curvature_context():
            loss = loss_function()
            optimizer.probe(loss)
            loss.backward()
        gradients = [norm.parameter.grad for norm in norms]
        reached = [
            r or (g is not None and bool(g.any())) for r, g in zip(reached, gradients, strict=True)
        ]
        optimizer.step()
        if step % 20 == 0:
            curvatures.append(optimizer.diagnostics()["norm_curvature_rms"])
        if step == 4:
            for norm, begun, has in zip(norms, start, reached, strict=True):
                assert not (has and torch.equal(norm.parameter, begun)), norm.name
    # The point is singular, and forgotten once it is left.
    assert curvatures[0] > 1e6
    assert curvatures[1] < 1e-4 * curvatures[0]
    assert optimizer.diagnostics()["norm_update_over_adamw"] > 0.1
    optimizer.close()


MODELS = [
    "mobilevit", "mobilevitv2", "resnet", "regnet", "convnext", "convnextv2", "mobilenet_v2",
    "poolformer", "segformer", "swin", "swinv2", "cvt", "bit", "focalnet", "beit", "dinov2",
    "upernet", "textnet", "hgnet_v2", "detr", "deimv2", "cohere_asr", "wav2vec2", "hubert", "wavlm",
    "whisper", "speech_to_text", "parakeet_ctc", "bart", "t5", "mbart", "marian", "clip", "bert",
    "gpt2", "llama", "gemma2",
]  # fmt: skip


def moved(model, batch, optimizer):
    """The rms by which six steps move every parameter, and which have had a gradient."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    reached = set()
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        if hasattr(optimizer, "probe"):
            with optimizer.curvature_context():
                loss = loss_of(model, batch)
                optimizer.probe(loss)
                loss.backward()
        else:
            loss_of(model, batch).backward()
        named = model.named_parameters()
        reached |= {name for name, p in named if p.grad is not None and p.grad.any()}
        optimizer.step()
    moves = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    return {name: move.square().mean().sqrt().item() for name, move in moves.items()}, reached


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_norms_of_many_families_move_from_the_first_step(name):
    """With the default interval, so by the probe of the initial weights alone."""
    model, batch, _ = example(name)
    plain = copy.deepcopy(model)
    # Its eps leaves out what is only rounding.
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-5)
    theirs, _ = moved(plain, batch, adamw)
    optimizer = create_optimizer(model, "sgdph", lr=1e-3, weight_decay=0.0)
    ours, reached = moved(model, batch, optimizer)
    norms = [norm.name for norm in optimizer.structure.norms if norm.name in reached]
    optimizer.close()
    assert norms
    assert not [n for n in norms if theirs[n] > 1e-4 and ours[n] < 0.02 * theirs[n]]

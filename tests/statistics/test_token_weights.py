"""Which rows count as tokens: the mask of the right model, sequence and pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as tf
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from hf_precond.architectures import tables
from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import find_matrices
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest
from tests.architectures.families import PAIRS, TEXT, build, loss_of, text

OPEN: list[MomentCollector] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def counting(model: nn.Module) -> MomentCollector:
    """A collector of the inputs of every q, and of k where it has its own."""
    requests = []
    for block in find_attention(model):
        requests.append(MomentRequest(f"{block.name}.q", "input", block.q, block))
        if block.cross:
            requests.append(MomentRequest(f"{block.name}.k", "input", block.k, block))
    OPEN.append(MomentCollector(model, requests))
    OPEN[-1].enable(True, 0)
    return OPEN[-1]


def counts(collector: MomentCollector) -> dict[str, float]:
    return {key: found.count.item() for key, found in collector.take().items()}


def masks(*lengths: int, width: int = 7) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def test_positional_masks_are_read() -> None:
    model = build("bert")
    collector = counting(model)
    batch = text()
    model(batch["input_ids"], masks(7, 3, 2), labels=batch["labels"]).loss.backward()
    assert set(counts(collector).values()) == {12}


def test_the_body_alone_has_its_own_mask() -> None:
    class Classifier(nn.Module):
        """Not a model of transformers, and its mask goes by another name."""

        def __init__(self) -> None:
            super().__init__()
            self.body = tf.BertModel(tf.BertConfig(**TEXT))
            self.head = nn.Linear(16, 2)

        def forward(self, ids: Tensor, real: Tensor) -> Tensor:
            return self.head(self.body(input_ids=ids, attention_mask=real).pooler_output)

    model = Classifier()
    collector = counting(model)
    model(text()["input_ids"], masks(4, 4, 4)).sum().backward()
    assert set(counts(collector).values()) == {12}


@pytest.mark.parametrize("named", [False, True])
def test_a_mask_of_another_name_needs_one_row(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(tf.BertForSequenceClassification):
        def forward(self, input_ids: Tensor, token_mask: Tensor, labels: Tensor) -> Tensor:
            # Of four dimensions, so that nothing below reads it as a mask of tokens.
            mask = token_mask[:, None, None, :].bool().expand(-1, 1, token_mask.shape[1], -1)
            return super().forward(input_ids, attention_mask=mask, labels=labels).loss

    monkeypatch.setitem(tables.MASKS, "token_mask", "attention_mask")
    batch, mask = text(), masks(7, 3, 2)
    model = Renamed(tf.BertConfig(**TEXT))
    collector = counting(model)
    args, kwargs = ((), {"token_mask": mask}) if named else ((mask,), {})
    model(batch["input_ids"], *args, labels=batch["labels"], **kwargs).backward()
    assert set(counts(collector).values()) == {12}


def test_a_mask_of_four_dimensions_is_no_mask_of_tokens() -> None:
    model = build("bert")
    collector = counting(model)
    full = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    model(text()["input_ids"], attention_mask=full, labels=text()["labels"]).loss.backward()
    assert set(counts(collector).values()) == {21}


def checkpointed(reentrant: bool | None) -> nn.Module:
    """A BERT, with one of the two forms of activation checkpointing or without."""
    model = build("bert")
    if reentrant is not None:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    return model


def test_vectors_of_one_token_weigh_alike() -> None:
    """A layer on ``[B, T, streams, d]``, as of DeepSeek V4's streams or of heads."""

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5, bias=False).double()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x).square().sum()

    model, mask = Streams(), masks(7, 3, 2)
    (matrix,) = find_matrices(model)
    kinds = ("input", "output_grad")
    OPEN.append(MomentCollector(model, [MomentRequest(kind, kind, matrix) for kind in kinds]))  # type: ignore[arg-type]
    OPEN[-1].enable(True, 0)
    x = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    model(x, attention_mask=mask).backward()
    found, real = OPEN[-1].take(), x[mask.bool()].flatten(0, 1)
    assert found["input"].count == found["output_grad"].count == 24
    torch.testing.assert_close(found["input"].sum, real.mT @ real)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_two_forwards_before_a_backward_keep_their_masks(reentrant: bool | None) -> None:
    """A query and a passage, as contrastive training has them."""
    model = checkpointed(reentrant)
    collector = counting(model)
    ids = text()["input_ids"]
    first = model(input_ids=ids, attention_mask=masks(2, 3, 1)).logits
    second = model(input_ids=ids[:, :5], attention_mask=masks(5, 5, 4, width=5)).logits
    (first * second).sum().backward()
    taken = collector.take()
    assert {found.count.item() for found in taken.values()} == {20}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_an_evaluation_between_forward_and_backward_gives_no_masks(reentrant: bool | None) -> None:
    """What the backward pass of checkpointing recomputes is no part of the evaluation."""
    model = checkpointed(reentrant)
    collector = counting(model)
    batch = text()
    loss = loss_of(model, {**batch, "attention_mask": masks(7, 3, 2)})
    with torch.no_grad():
        loss_of(model, {**batch, "attention_mask": masks(7, 7, 7)})
        loss_of(model.eval(), {**batch, "attention_mask": masks(7, 7, 6)})
    model.train()
    loss.backward()
    assert set(counts(collector).values()) == {12}


def test_a_pass_without_a_mask_has_none_of_an_earlier_pass() -> None:
    model = build("bert")
    collector = counting(model)
    ids = text()["input_ids"]
    first = model(input_ids=ids, attention_mask=masks(2, 3, 1)).logits
    (first * model(input_ids=ids).logits).sum().backward()
    assert set(counts(collector).values()) == {6 + 21}


def test_a_mask_that_numbers_packed_sequences_counts_every_token_once() -> None:
    model = build("bert")
    collector = counting(model)
    numbered = masks(7, 5, 3) + masks(4, 2, 0)
    model(input_ids=text()["input_ids"], attention_mask=numbered).logits.sum().backward()
    assert set(counts(collector).values()) == {15}


@pytest.mark.parametrize("stable", [False, True])
def test_padded_frames_of_sound_are_no_tokens(stable: bool) -> None:
    config = tf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(4, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
        feat_extract_norm="layer", do_stable_layer_norm=stable, layerdrop=0.0,
        apply_spec_augment=False,
    )  # fmt: skip
    model = tf.Wav2Vec2ForSequenceClassification(config).train()
    collector = counting(model)
    lengths = torch.tensor([160, 80, 120])
    samples = masks(*lengths.tolist(), width=160)
    model(input_values=torch.randn(3, 160), attention_mask=samples).logits.sum().backward()
    frames = model._get_feat_extract_output_lengths(lengths)
    assert set(counts(collector).values()) == {frames.sum().item()}


def test_prompt_tokens_count_as_tokens() -> None:
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = get_peft_model(build("bert", torch.float32), config)
    collector = counting(model)
    loss_of(model, text()).backward()
    assert set(counts(collector).values()) == {text()["attention_mask"].sum().item() + 12}


def test_an_encoder_decoder_of_two_models() -> None:
    encoder = tf.BertConfig(**TEXT)
    decoder = tf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = tf.EncoderDecoderModel(config=config)
    collector = counting(model)
    ids = text()["input_ids"]
    model(
        input_ids=ids,
        attention_mask=masks(7, 3, 2),
        decoder_input_ids=ids,
        decoder_attention_mask=masks(5, 1, 1),
        labels=ids,
    ).loss.backward()
    for key, count in counts(collector).items():
        reads_source = key.startswith("encoder") or key.endswith(".k")
        assert count == (12 if reads_source else 7), key


def test_masks_are_let_go_of() -> None:
    model = build("bert")
    collector = counting(model)
    loss_of(model, text()).backward()
    assert any(model.masks for model in collector.tokens.models)
    collector.take()
    assert not any(model.masks for model in collector.tokens.models)
    loss_of(model, text()).backward()
    collector.enable(False, 1)
    assert not any(model.masks for model in collector.tokens.models)
    loss_of(model, text()).backward()
    assert not any(model.masks for model in collector.tokens.models)


def _sparse(name: str) -> nn.Module:
    small = {**TEXT, "num_hidden_layers": 1, "max_position_embeddings": 80}
    torch.manual_seed(0)
    if name == "longformer":
        config = tf.LongformerConfig(**{**small, "pad_token_id": 1}, attention_window=4)
        return tf.LongformerForSequenceClassification(config).train()
    if name == "big_bird":
        config = tf.BigBirdConfig(**small, block_size=4, num_random_blocks=1)
        return tf.BigBirdForSequenceClassification(config).train()
    config = tf.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=40,
        tgt_vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=80,
    )
    return tf.FSMTForConditionalGeneration(config).train()


@pytest.mark.parametrize(
    ("name", "lengths", "width"),
    [
        ("longformer", (7, 3, 2), 7),  # lengthened to 8
        ("longformer", (8, 3, 5, 8, 8, 1, 2, 4), 8),  # as many sequences as positions
        ("big_bird", (50, 20, 51), 51),
        ("fsmt", (7, 3, 2), 7),
        ("fsmt", (3, 1, 2), 3),
    ],
)
def test_lengthened_sequences_and_time_first_layers(
    name: str, lengths: tuple[int, ...], width: int
) -> None:
    model = _sparse(name)
    block = find_attention(model)[0]
    collector = MomentCollector(model, [MomentRequest("q", "input", block.q, block)])
    OPEN.append(collector)
    collector.enable(True, 0)
    seen: list[Tensor] = []
    block.q.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ids = torch.randint(3, 40, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    labels = ids if name == "fsmt" else torch.arange(len(lengths)) % 2
    model(input_ids=ids, attention_mask=masks(*lengths, width=width), labels=labels).loss.backward()
    found = collector.take()["q"]
    rows = seen[0] if name == "big_bird" else seen[0].transpose(0, 1)
    real = torch.cat([rows[i, :length] for i, length in enumerate(lengths)])
    real = torch.cat([real, torch.ones(len(real), 1)], 1)
    assert found.count.item() == sum(lengths)
    torch.testing.assert_close(found.sum, real.mT @ real)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_without_labels_knows_its_padding(name: str) -> None:
    """Label smoothing takes the labels away, and the tokens made of them are given."""
    model = build(name, torch.float32)
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(masks(6, 2, 4, width=6) == 0, -100)
    tokens = model.prepare_decoder_input_ids_from_labels(labels=labels)
    batch = {"input_ids": ids, "attention_mask": masks(6, 5, 3, width=6)}
    taken = []
    for given in ({"labels": labels}, {"decoder_input_ids": tokens}):
        collector = counting(model)
        model(**batch, **given).logits.logsumexp(-1).sum().backward()
        taken.append(counts(collector))
    assert taken[0] == taken[1]
    assert set(taken[1].values()) == {12, 14}


def test_a_decoder_of_a_classifier_knows_its_padding() -> None:
    config = tf.BartConfig(**PAIRS, num_labels=2)
    model = tf.BartForSequenceClassification(config).train()
    collector = counting(model)
    mask = masks(7, 5, 3)
    ids = torch.randint(3, 40, (3, 7)) * mask
    ids[torch.arange(3), mask.sum(1) - 1] = 2
    model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert set(counts(collector).values()) == {15}


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("width", [6, 5])
def test_an_output_head_of_its_own_reads_what_the_decoder_made(width: int, smoothed: bool) -> None:
    """T5 1.1, whose head is not tied: neither the source's mask is its nor none."""
    model = build("t5", torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    matrix = next(m for m in find_matrices(model) if m.name == "lm_head")
    kinds = ("input", "output_grad")
    collector = MomentCollector(model, [MomentRequest(kind, kind, matrix) for kind in kinds])
    OPEN.append(collector)
    collector.enable(True, 0)
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    labels = ids[:, :width].masked_fill(masks(2, width, 3, width=width) == 0, -100)
    tokens = model.prepare_decoder_input_ids_from_labels(labels=labels)
    given = {"decoder_input_ids": tokens} if smoothed else {"labels": labels}
    logits = model(input_ids=ids, attention_mask=masks(6, 2, 3, width=6), **given).logits
    (logits.logsumexp(-1) * (labels != -100)).sum().backward()
    assert counts(collector) == {"input": 5 + width, "output_grad": 5 + width}

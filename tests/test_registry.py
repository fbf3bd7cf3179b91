"""``create_optimizer``'s first argument, and how optimizers get their names."""

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from torch import nn

from hf_precond import AFOptConfig, create_optimizer, list_optimizers, registry
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.registry import get_info, register_optimizer


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda model: model.parameters(), "a generator"),
        (lambda model: list(model.parameters()), "a list"),
        (lambda model: "adamr", "a str"),
    ],
    ids=["generator", "list", "name"],
)
def test_what_is_no_model_is_refused_with_the_right_call(given, said):
    with pytest.raises(TypeError, match=rf"first argument is {said}.*create_optimizer\(model, "):
        create_optimizer(given(nn.Linear(2, 2)), "adamr")


@pytest.mark.parametrize("name", ["afop", 3, None, ["afopt"], {"optimizer": "afopt"}, AFOptConfig])
def test_what_is_no_name_is_refused_with_the_names(name):
    with pytest.raises(ValueError, match=r"is unknown.* The names are adamr, afopt, muon, n"):
        create_optimizer(nn.Linear(2, 2), name)


MODULE = """
from dataclasses import dataclass
from typing import ClassVar
from hf_precond import OptimizerConfig, register_optimizer
from hf_precond.optimizers.base.optimizer import PrecondOptimizer

@dataclass(frozen=True)
class MineConfig(OptimizerConfig):
    name: ClassVar[str] = "{registers}"

@register_optimizer("{registers}", config=MineConfig, select=None, description="of {package}")
class Mine(PrecondOptimizer):
    pass
"""


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Makes packages known, each with a module and an entry point."""
    points = []
    get_info("afopt")  # its module registers it when it is imported first, and not again
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.syspath_prepend(tmp_path)
    registry._entry_points.cache_clear()

    def install(package, name, registers=None):
        (tmp_path / f"{package}.py").write_text(
            MODULE.format(package=package, registers=registers or name)
        )
        point = EntryPoint(name, package, registry.GROUP)
        vars(point)["dist"] = SimpleNamespace(name=package)
        points.append(point)

    yield install
    registry._entry_points.cache_clear()
    for point in points:
        sys.modules.pop(point.value, None)


def test_a_package_is_listed_and_imported_when_it_is_used(install):
    install("package_a", "mine")
    assert list_optimizers() == ["adamr", "afopt", "mine", "muon", "nkfac", "sgdph"]
    assert "package_a" not in sys.modules
    info = get_info("mine")
    assert (info.title, info.package, info.description) == ("Mine", "package_a", "of package_a")


def test_two_packages_with_one_name_are_refused_by_their_names(install):
    install("package_b", "mine")
    install("package_c", "mine")
    assert "mine" in list_optimizers()
    said = "'mine': the packages package_b and package_c both have this name"
    with pytest.raises(ValueError, match=said):
        get_info("mine")


def test_a_built_in_wins_with_a_warning_that_names_both_packages(install, monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_precond.optimizers.afopt.optimizer")
    install("package_d", "afopt")
    with pytest.warns(RuntimeWarning, match="packages hf_precond and package_d both.*own is used"):
        assert get_info("afopt").optimizer_cls.__name__ == "AFOpt"
    assert "package_d" not in sys.modules


def test_an_entry_point_that_registers_another_name_is_refused(install):
    install("package_e", "mine", registers="yours")
    with pytest.raises(ValueError, match=r"package package_e \(package_e\) does not register it"):
        get_info("mine")


def test_a_class_that_takes_the_name_of_another_is_refused(install):
    install("package_f", "mine")
    get_info("mine")
    config = get_info("mine").config_cls
    decorate = register_optimizer("mine", config=config, select=None, description="")

    class Mine(PrecondOptimizer):
        pass

    with pytest.raises(ValueError, match=r"test_registry.*Mine and package_f\.Mine both take this"):
        decorate(Mine)
    decorate(get_info("mine").optimizer_cls)  # a module that is read again


def test_a_config_of_another_name_is_refused():
    with pytest.raises(ValueError, match=r"AFOptConfig\.name is 'afopt'; set it to 'mine'"):
        register_optimizer("mine", config=AFOptConfig, select=None, description="")

"""The optimizers by name, and :func:`create_optimizer`.

Every optimizer registers itself with the decorator :func:`register_optimizer`.
The names are known without importing the optimizers or torch: those of this
package are the folders of ``hf_precond/optimizers`` that hold an
``optimizer.py``; other packages list theirs in the entry-point group
``hf_precond.optimizers``. An optimizer is imported when it is first used.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from hf_precond.architectures.structure import ModelStructure
    from hf_precond.config.base import OptimizerConfig
    from hf_precond.optimizers.base.optimizer import PrecondOptimizer

GROUP = "hf_precond.optimizers"

ClassT = TypeVar("ClassT", bound="type[PrecondOptimizer]")


@dataclass(frozen=True)
class OptimizerInfo:
    """A registered optimizer.

    Args:
        name: what ``--optim`` and :func:`create_optimizer` take.
        title: the name in prose.
        config_cls: the config class.
        optimizer_cls: built as ``optimizer_cls(params, attach_to=model, config=config)``.
        select: ``select(model, config)`` returns which parameters of a model
            are preconditioned.
        description: a line for ``hf-precond list``.
        memory: the numbers kept for a matrix ``[m, n]``, a line.
        start: the learning rate that trainings from scratch start from.
    """

    name: str
    title: str
    config_cls: type[OptimizerConfig]
    optimizer_cls: type[PrecondOptimizer]
    select: Callable[[nn.Module, Any], ModelStructure]
    description: str
    memory: str
    start: str

    @property
    def rate(self) -> str:
        """The learning rate to start from, a line; empty where ``start`` is."""
        if not self.start:
            return ""
        return f"learning rate: {self.start} from scratch; leave it unset to fine-tune"

    @property
    def package(self) -> str:
        """The top-level package of the class."""
        return self.optimizer_cls.__module__.partition(".")[0]


_registered: dict[str, OptimizerInfo] = {}


def register_optimizer(
    name: str,
    *,
    config: type[OptimizerConfig],
    select: Callable[[nn.Module, Any], ModelStructure],
    description: str,
    memory: str = "",
    start: str = "",
    title: str | None = None,
) -> Callable[[ClassT], ClassT]:
    """Register an optimizer class under a name; used as a decorator.

    A package lists the module of the class as an entry point of that name.
    Wherever the package is installed, ``--optim toy`` then works::

        [project.entry-points."hf_precond.optimizers"]
        toy = "toy_optimizer"

    For a class in a script, which has no entry point, call
    ``hf_precond.register()`` afterwards: ``--optim`` then takes its name too.

    Args:
        name: what ``--optim`` and :func:`create_optimizer` take; the same as
            ``config.name``.
        config: the config class, a frozen dataclass derived from
            ``OptimizerConfig``.
        select: ``select(model, config)`` returns a ``ModelStructure``, which
            says which parameters are preconditioned.
        description: a line for ``hf-precond list``.
        memory: the numbers kept for a matrix ``[m, n]``, a line for
            ``hf-precond explain``.
        start: the learning rate that trainings from scratch start from, for
            ``hf-precond list NAME`` and ``explain``.
        title: the name in prose; the name of the class by default.

    Returns:
        The decorator, which returns the class as it is.

    Raises:
        ValueError: ``config.name`` differs from ``name``, or another class is
            registered under ``name``.
    """
    if config.name != name:
        raise ValueError(
            f"register_optimizer({name!r}): {config.__name__}.name is {config.name!r}; set it to "
            f"{name!r}."
        )

    def register(cls: ClassT) -> ClassT:
        known = _registered.get(name)
        if known is not None and _path_of(known.optimizer_cls) != _path_of(cls):
            raise ValueError(
                f"register_optimizer({name!r}): {_path_of(cls)} and "
                f"{_path_of(known.optimizer_cls)} both take this name; rename one of them."
            )
        _registered[name] = OptimizerInfo(
            name, title or cls.__name__, config, cls, select, description, memory, start
        )
        cls.registered_name = name
        return cls

    return register


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _entry_points() -> dict[str, list[EntryPoint]]:
    """Name to the entry points of that name, the one of this package first."""
    modules = sorted(Path(__file__).parent.glob("optimizers/*/optimizer.py"))
    names = [module.parent.name for module in modules if module.parent.name != "base"]
    points = {
        name: [EntryPoint(name, f"hf_precond.optimizers.{name}.optimizer", GROUP)] for name in names
    }
    for point in entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    return points


def list_optimizers() -> list[str]:
    """The names that ``--optim`` and :func:`create_optimizer` take.

    Returns:
        The names in alphabetical order. No optimizer is imported.
    """
    return sorted({*_entry_points(), *_registered})


def get_info(name: str) -> OptimizerInfo:
    """The registered optimizer of a name; imports it on first use.

    Args:
        name: one of :func:`list_optimizers`.

    Returns:
        The class with everything that was registered along with it.

    Raises:
        ValueError: the name is unknown (the message has the nearest known
            name), two packages have an optimizer of this name, or its package
            does not register it.
    """
    if not isinstance(name, str) or name not in list_optimizers():
        near = difflib.get_close_matches(str(name).lower(), list_optimizers(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"optimizer {name!r} is unknown{hint} The names are {', '.join(list_optimizers())}."
        )
    if name not in _registered:
        _load(name)
    return _registered[name]


def _load(name: str) -> None:
    """Import the module that registers ``name``."""
    point, *others = _entry_points()[name]
    packages = [other.dist.name if other.dist else "hf_precond" for other in (point, *others)]
    clash = f"optimizer {name!r}: the packages {' and '.join(packages)} both have this name"
    if others and point.dist is not None:
        raise ValueError(f"{clash}; uninstall one of them.")
    if others:
        warnings.warn(f"{clash}; hf_precond's own is used.", RuntimeWarning, stacklevel=3)
    point.load()
    if name not in _registered:
        raise ValueError(
            f"optimizer {name!r}: the entry point of package {packages[0]} ({point.value}) "
            f"does not register it; @register_optimizer({name!r}, …) is missing there."
        )


def make_config(name_or_config: str | OptimizerConfig, **values: Any) -> OptimizerConfig:
    """A validated config from a name and fields, or a config with some fields changed.

    Args:
        name_or_config: one of :func:`list_optimizers`, or a config.
        **values: fields.

    Returns:
        The config.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    from hf_precond.config.base import OptimizerConfig

    if isinstance(name_or_config, OptimizerConfig):
        return name_or_config.replace(**values)
    return get_info(name_or_config).config_cls.create(**values)


def create_optimizer(
    model: nn.Module,
    name_or_config: str | OptimizerConfig,
    params: Iterable[Any] | None = None,
    **values: Any,
) -> PrecondOptimizer:
    """Build an optimizer for a model.

    Without ``params`` weight decay applies by the Trainer's rule: not to biases
    and norms. With ``head_lr_scale`` other than 1 the newly initialised head
    has groups of its own, with ``layer_lr_decay`` every layer. The routing
    table (``print(optimizer.routing)``) shows how every parameter that trains
    is updated.

    Groups of your own are taken as they are::

        groups = [
            {"params": model.bert.parameters(), "lr": 1e-5},
            {"params": model.classifier.parameters(), "lr": 1e-3, "weight_decay": 0.0},
        ]
        create_optimizer(model, "afopt", params=groups, weight_decay=0.01)

    A matrix is preconditioned whichever groups hold it and its bias. Parameters
    outside ``model`` (of a loss, say) are stepped by the fallback optimizer.
    Parameters of ``model`` in no group are not stepped; a warning names them
    when they get gradients.

    Args:
        model: any ``nn.Module``; attention is found in the model families of
            transformers, or declared with :func:`hf_precond.declare_attention`.
        name_or_config: one of :func:`list_optimizers`, such as ``"afopt"``, or
            a config, such as ``AFOptConfig(lr=1e-3)``.
        params: what torch's optimizers take: parameters, ``named_parameters()``,
            or dictionaries with ``params`` and, where they differ from the
            config's, ``lr``, ``weight_decay``, ``betas``, ``eps`` and
            ``momentum``. ``head_lr_scale`` and ``layer_lr_decay`` scale the
            rates of groups without an ``lr`` of their own. By default, every
            parameter that trains.
        **values: fields of the config.

    Returns:
        The optimizer, a ``torch.optim.Optimizer``. Its hooks collect statistics
        from ``model`` until ``optimizer.close()``.

    Raises:
        TypeError: ``model`` is no module (parameters alone do not show in which
            layers they are), or ``params`` are not what torch's optimizers take.
        ValueError: an unknown name or field, a value out of range, complex
            parameters, a parameter given twice, a model in which nothing would
            be preconditioned, or a training under DeepSpeed, FSDP1, Megatron-LM
            or tensor parallelism.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"create_optimizer: the first argument is a {type(model).__name__} and must be the "
            "model (an nn.Module), not its name or parameters: create_optimizer(model, 'afopt')."
        )
    config = make_config(name_or_config, **values)
    return get_info(config.name).optimizer_cls(params, attach_to=model, config=config)


def read_model(
    model: nn.Module, config: OptimizerConfig, decided: Mapping[str, Any] | None = None
) -> ModelStructure:
    """Read which parameters of a model an optimizer preconditions.

    Args:
        model: the model.
        config: the optimizer's config.
        decided: what the model made of fields that are ``auto`` when it was read before.

    Returns:
        The matrices and norm parameters, and the routing table.

    Raises:
        ValueError: nothing would be preconditioned, or the optimizer does not
            support what runs the training.
    """
    from hf_precond.distributed.strategies import unsupported_strategy

    refused = unsupported_strategy(model, config.name)
    if refused is not None:
        raise ValueError(refused)
    select = get_info(config.name).select
    try:
        structure = select(model, config.replace(**(decided or {})))
        structure.decided = dict(decided or structure.decided)
    except ValueError:  # what trained when that was decided is frozen now
        if not decided:
            raise
        structure = select(model, config)
    structure.reread = functools.partial(read_model, config=config, decided=structure.decided)
    return structure

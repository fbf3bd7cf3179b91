"""How deep a parameter lies in its model, for learning rates that decay from the head down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from hf_precond.architectures.modules import EMBEDDINGS
from hf_precond.architectures.parameters import output_embedding
from hf_precond.architectures.tables import (
    ABOVE_LAYERS,
    EMBEDDED,
    HEAD_CHILDREN,
    PARALLEL_TOWERS,
)

NO_LAYERS = (
    "layer_lr_decay: this model has no stack of layers (an nn.ModuleList or nn.Sequential of "
    "blocks) from which depths could be read; leave it at 1, or pass groups with the learning "
    "rates you want."
)


@dataclass(eq=False)
class _Tower:
    """Stacks of layers that follow each other: those of an encoder, of a decoder.

    Args:
        path: of the module around them.
        first: position of the first of its blocks among all modules.
        blocks: path of each block, in order.
        offset: number of layers below them.
    """

    path: str
    first: int
    blocks: list[str] = field(default_factory=list)
    offset: int = 0


def layer_depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of every parameter, as BEiT and ELECTRA are fine-tuned.

    With L layers, embeddings and what stands before the first layer have depth
    0, layer i (from 0) has i + 1, and the rest has L + 1: final norms, poolers,
    heads, relative position biases that the layers share. A stage of layers
    (Swin, ConvNeXt) counts its layers one by one; what joins two stages belongs
    to the layer before it. A decoder lies above its encoder, a language model
    above its vision tower; each has its embeddings right below its first layer
    and its final norm right above its last. The towers of a dual encoder (CLIP)
    end at the same depth.

    Args:
        model: the model, wrapped or not.

    Returns:
        Name to depth, and L + 1.

    Raises:
        ValueError: when the model has no stack of layers.
    """
    towers = _towers(model)
    if not towers:
        raise ValueError(NO_LAYERS)
    top = _stack(towers) + 1
    order = {path: number for number, path in enumerate(_paths(model))}
    vocabulary = output_embedding(model)
    depths: dict[str, int] = {}
    for path, module in model.named_modules():
        embedding = isinstance(module, EMBEDDINGS) and module is not vocabulary
        for name, _ in module.named_parameters(path, recurse=False):
            depths.setdefault(name, _depth(name, embedding, order[path], towers, order, top))
    return {name: depths[name] for name, _ in model.named_parameters()}, top


def _paths(model: nn.Module) -> Iterator[str]:
    """Paths of all modules, in model order."""
    return (path for path, _ in model.named_modules())


def _depth(
    name: str, embedding: bool, place: int, towers: list[_Tower], order: dict[str, int], top: int
) -> int:
    """Depth of one parameter; ``place`` is the position of its module."""
    around = [tower for tower in towers if _inside(name, tower.path)]
    tower = max(around, key=lambda tower: len(tower.path)) if around else None
    for other in towers:
        for number, block in enumerate(other.blocks):
            if _inside(name, block):
                return other.offset + number + 1
    below = embedding or EMBEDDED.search(name)
    if tower is None:
        return 0 if embedding or (below and place < towers[-1].first) else top
    inner = name[len(tower.path) :].lstrip(".")
    if ABOVE_LAYERS.search(name) or inner.split(".")[0] in HEAD_CHILDREN:
        return tower.offset + len(tower.blocks) + 1
    if below or place < tower.first:
        return tower.offset
    passed = sum(order[block] < place for block in tower.blocks)
    return tower.offset + passed + (passed == len(tower.blocks))


def _inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _towers(model: nn.Module) -> list[_Tower]:
    """The towers of a model, in model order."""
    towers: dict[str, _Tower] = {}
    roots = {path for path, module in model.named_modules() if hasattr(module, "base_model_prefix")}
    found: list[str] = []
    for place, (path, module) in enumerate(model.named_modules()):
        if any(_inside(path, outer) for outer in found) or EMBEDDED.search(path):
            continue
        blocks = list(_blocks(path, module)) if _is_stack(module) else []
        if blocks:
            found.append(path)
            around = [root for root in roots if _inside(path, root)]
            root = max(around, key=len, default="")
            tower = towers.setdefault(root, _Tower(root, place))
            tower.blocks += blocks
    return list(towers.values())


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of blocks, each of which has modules in it."""
    children = _trained(module)
    if not children or not all(any(True for _ in c.children()) for c in children.values()):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    alike = len({type(child) for child in children.values()}) == 1
    return isinstance(module, nn.Sequential) and alike and len(children) > 1


def _trained(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have parameters."""
    return {name: c for name, c in module.named_children() if any(True for _ in c.parameters())}


def _blocks(path: str, stack: nn.Module) -> Iterator[str]:
    """Paths of the blocks of a stack, those of its stages one by one."""
    for name, child in _trained(stack).items():
        inner = f"{path}.{name}".lstrip(".")
        staged = isinstance(child, nn.ModuleList | nn.Sequential) or "Stage" in type(child).__name__
        lists = [(f"{inner}.{n}", c) for n, c in _trained(child).items() if _is_stack(c)]
        if staged and _is_stack(child):
            yield from _blocks(inner, child)
        elif staged and lists:
            for each, found in lists:
                yield from _blocks(each, found)
        else:
            yield inner


def _stack(towers: list[_Tower]) -> int:
    """Set the towers' offsets; returns the number of layers from the lowest to the highest."""
    below = 0
    done: set[str] = set()
    for tower in towers:
        if tower.path in done:
            continue
        parent, _, name = tower.path.rpartition(".")
        beside = [tower]
        if name in PARALLEL_TOWERS:
            names = {f"{parent}.{other}".lstrip(".") for other in PARALLEL_TOWERS}
            beside = [other for other in towers if other.path in names]
        height = max(len(other.blocks) for other in beside)
        for other in beside:
            other.offset = below + height - len(other.blocks)
            done.add(other.path)
        below += height
    return below

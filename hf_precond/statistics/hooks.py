"""Hook objects that stay with their model: copies and pickles of them do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def inert(*args: Any, **kwargs: Any) -> None:
    """What a copied or unpickled hook is: it observes nothing and changes nothing."""


class Hook:
    """A module hook that is inert in a deep copy or a pickle of the model.

    ``copy.deepcopy(model)`` copies hooks too; without this the copy's passes
    would be counted into the original's statistics.

    Args:
        call: the hook.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __copy__(self) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


def _make_inert() -> Callable[..., None]:
    return inert

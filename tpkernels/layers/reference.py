"""A reference from an object on a module to a module."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Ref(Generic[T]):
    """Holds an object of which torch.nn.Module makes no child, as it would of a module that is an attribute."""

    def __init__(self, target: T) -> None:
        self.target = target

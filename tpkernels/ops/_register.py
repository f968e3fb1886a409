"""The registrations of an op that are made in Python, under the op's short name, and typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._library.effects import EffectType

from tpkernels import _C as _C  # importing it defines the ops

Function = TypeVar("Function", bound=Callable[..., Any])


def fake(name: str) -> Callable[[Function], Function]:
    """Register the decorated function as what op `name` does to tensors without data: shapes and dtypes only."""
    register: Callable[[Function], Function] = torch.library.register_fake(f"tpkernels::{name}")
    return register


def gradient(name: str, backward: Callable[..., Any], context: Callable[..., None]) -> None:
    """Register `backward` as the gradient of op `name`; `context` keeps in the forward what it needs."""
    torch.library.register_autograd(f"tpkernels::{name}", backward, setup_context=context)


def communicates(*ops: str) -> None:
    """Register that ops meet other ranks: compilers keep every call of them, and their order, as the program has them.

    Without it a call whose result a rank does not use is dropped there, and calls that do not depend on each other
    change places, both on each rank in another way: the calls that then meet pair up silently.
    An op that writes to its arguments cannot have it: see `all_reduce_`.
    """
    for name in ops:
        torch.library._register_effectful_op(f"tpkernels::{name}", EffectType.ORDERED)

"""The two registrations of an op that are made in Python, under the op's short name, and typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tpkernels._native import _C as _C  # importing it defines the ops

Function = TypeVar("Function", bound=Callable[..., Any])


def fake(name: str) -> Callable[[Function], Function]:
    """Register the decorated function as what op `name` does to tensors without data: shapes and dtypes only."""
    register: Callable[[Function], Function] = torch.library.register_fake(f"tpkernels::{name}")
    return register


def gradient(name: str, backward: Callable[..., Any], context: Callable[..., None]) -> None:
    """Register `backward` as the gradient of op `name`; `context` keeps in the forward what it needs."""
    torch.library.register_autograd(f"tpkernels::{name}", backward, setup_context=context)

"""The short way into an op: when nothing between Python and the kernel has anything to do, skip it.

A call through the dispatcher of an op whose autograd is registered in Python costs about 22 us even when no gradient
is needed; straight to the CPU kernel it costs about 4 us. An all_reduce of a few KiB takes 1 us, so this matters.

The short way is right only for plain tensors: no gradient to record, no tracing, no mode, no transform, no profiler
(which would not see the op). csrc/python/fast_path.cpp asks all of that in a quarter of a microsecond, and runs
collectives on small contiguous tensors by their pointers; whoever is not plain takes the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._C._autograd
import torch._C._functorch
import torch.autograd.forward_ad
from torch import Tensor, is_grad_enabled, strided
from torch.compiler import is_compiling

from tpkernels._native import _C

_TYPES = frozenset((Tensor, torch.nn.Parameter))

_C.set_short_way(
    {
        "tensor_type": Tensor,
        "parameter_type": torch.nn.Parameter,
        "is_grad_enabled": is_grad_enabled,
        "len_dispatch_modes": torch._C._len_torch_dispatch_stack,
        "is_function_mode_enabled": torch._C._is_torch_function_mode_enabled,
        "peek_transforms": torch._C._functorch.peek_interpreter_stack,
        "is_profiler_enabled": torch._C._autograd._profiler_enabled,
        "tracing_state": torch._C._get_tracing_state,
        "forward_ad": torch.autograd.forward_ad,
        "increment_version": torch._C._increment_version,
    },
    Tensor.__dlpack_c_exchange_api__,
)


def direct(op: Any) -> Callable[..., Any]:
    """Return the CPU kernel of an op overload, callable with the op's positional arguments; plain tensors only."""
    return partial(op._handle.redispatch_boxed, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))


def shortcut(op: Any) -> Callable[..., Any]:
    """Return a call of an op overload that takes the short way when its tensor arguments are plain.

    For calls whose arguments are known to be right: backwards, which call ops on the gradients they get.
    """
    kernel = direct(op)

    def call(*args: Any) -> Any:
        return (kernel if are_plain(*(a for a in args if isinstance(a, Tensor))) else op)(*args)

    return call


def is_plain(x: Any) -> bool:
    """Return whether a call with x alone may go straight to the CPU kernel (complex x: if it is no conjugate view)."""
    return not is_compiling() and _C.is_plain(x)  # is_compiling first: it makes the rest vanish from a traced graph


def are_plain(x: Any, *others: Any) -> bool:
    """Return whether a call with all of these may go straight to the CPU kernel; None counts as plain."""
    if not is_plain(x):
        return False
    grad = is_grad_enabled()
    return all(other is None or _is_plain_beside(other, grad) for other in others)


def _is_plain_beside(other: Any, grad: bool) -> bool:
    """What is_plain asks of the tensor itself; the modes have been asked for."""
    return (
        type(other) in _TYPES
        and not (grad and other.requires_grad)
        and other.is_cpu
        and other.layout is strided
        and not other.is_neg()
        and not other._is_zerotensor()
    )

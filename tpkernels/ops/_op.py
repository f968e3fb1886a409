"""The ways into an op, and its registrations with torch, in one object for each op.

A call through the dispatcher of an op whose autograd is registered in Python costs about 22 us even when no gradient is
needed; straight to the CPU kernel it costs about 4 us, and a small collective from C, by pointers, about 1 us. For
plain tensors nothing between Python and the kernel has work to do, so that all ways give the same bits.

Plain means: no gradient to record, no tracing, no mode, no transform, no profiler (which would not see the op).
csrc/python/fast_path.cpp finds out in a quarter of a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch._C._autograd
import torch._C._functorch
import torch.autograd.forward_ad
from torch import Tensor, is_grad_enabled, strided
from torch.compiler import is_compiling

from tpkernels._native import _C

from ._order import keep_in_order

Function = TypeVar("Function", bound=Callable[..., Any])

_TYPES = frozenset((Tensor, torch.nn.Parameter))
_is_plain = _C.is_plain  # bound once: an attribute takes 25 ns

_C.set_fast_path(
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
        "linear": torch._C._nn.linear,
    },
    Tensor.__dlpack_c_exchange_api__,
)


class Op:
    """An op of torch.ops.tpkernels, whose schema and kernels are those of csrc/torch_side/schemas.cpp.

    Calling the object takes the kernel for plain tensors, else the dispatcher: for calls whose arguments are right by
    construction, as those of backwards. The public functions check first, and take one of the two themselves.

    Args:
        name: of the op, without the namespace.
        communicates: the op exchanges data with other ranks; torch.compile then keeps every call, in order. Not for an
            op that writes to its arguments (see `all_reduce_`).

    Attributes:
        dispatch: the op through torch's dispatcher, right for every tensor.
        kernel: its CPU kernel, right for plain tensors.
    """

    def __init__(self, name: str, *, communicates: bool = False) -> None:
        self._qualified = f"tpkernels::{name}"
        self.dispatch: Any = getattr(torch.ops.tpkernels, name)
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        self.kernel: Callable[..., Any] = partial(self.dispatch.default._handle.redispatch_boxed, cpu)
        if communicates:
            keep_in_order(self._qualified)

    def __call__(self, *args: Any) -> Any:
        plain = are_plain(*(a for a in args if isinstance(a, Tensor)))
        return (self.kernel if plain else self.dispatch)(*args)

    def fake(self, function: Function) -> Function:
        """Register the decorated function for tensors without data: shapes and dtypes only."""
        register: Callable[[Function], Function] = torch.library.register_fake(self._qualified)
        return register(function)

    def gradient(self, backward: Callable[..., Any], context: Callable[..., None]) -> None:
        """Register `backward` as the gradient; `context` saves in the forward what it needs."""
        torch.library.register_autograd(self._qualified, backward, setup_context=context)


def are_plain(first: Any, *others: Any) -> bool:
    """Return whether a call with all of these tensors on a CPU group may go straight to the kernel.

    Args:
        first, others: arguments of the op; what is no Tensor is not plain.
    """
    # is_compiling is a constant in a traced graph, where the rest vanishes.
    if is_compiling() or not _is_plain(first):
        return False
    if others:
        grad = is_grad_enabled()  # the modes that _is_plain has read hold for all tensors of a call
        for x in others:
            if (
                type(x) not in _TYPES
                or (grad and x.requires_grad)
                or not x.is_cpu
                or x.layout is not strided
                or x.is_neg()
                or x._is_zerotensor()
            ):
                return False
    return True

"""The ways into an op, and its registrations with torch, in one object for each op.

A call through the dispatcher of an op whose autograd is registered in Python costs about 22 us even when no gradient is
needed; straight to the CPU kernel it costs 1 to 2 us, and a small collective from C, by pointers, about 1 us. For plain
tensors nothing between Python and the kernel has work to do, so that all ways give the same bits.

Plain means: no gradient to record, no tracing, no mode, no transform, no profiler (which would not see the op). Where
autograd records the call and nothing else observes it, one autograd.Function takes the place of the three that torch
puts around a gradient registered in Python. csrc/python/fast_path.cpp finds out in a quarter of a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch._C._aoti
import torch._C._autograd
import torch._C._functorch
import torch.autograd.forward_ad
from torch import Tensor
from torch.compiler import is_compiling

from tpkernels._native import _C
from tpkernels.comm.group import Group

from ._order import keep_in_order

Function = TypeVar("Function", bound=Callable[..., Any])

_plainness = _C.plainness  # bound once: an attribute takes 25 ns

_C.set_fast_path(
    {
        "tensor_type": Tensor,
        "parameter_type": torch.nn.Parameter,
        "is_grad_enabled": torch.is_grad_enabled,
        "len_dispatch_modes": torch._C._len_torch_dispatch_stack,
        "is_function_mode_enabled": torch._C._is_torch_function_mode_enabled,
        "peek_transforms": torch._C._functorch.peek_interpreter_stack,
        "is_profiler_enabled": torch._C._autograd._profiler_enabled,
        "tracing_state": torch._C._get_tracing_state,
        "forward_ad": torch.autograd.forward_ad,
        "increment_version": torch._C._increment_version,
        "handle_of_tensor": torch._C._aoti.unsafe_alloc_void_ptr_from_tensor,
        "tensors_of_handles": torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs,
        "linear": torch._C._nn.linear,
        "mm": torch.mm,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
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
        recorded: the same where autograd records the call and nothing else observes it.
        kernel: its CPU kernel, right for plain tensors.
    """

    def __init__(self, name: str, *, communicates: bool = False) -> None:
        self._qualified = f"tpkernels::{name}"
        self.dispatch: Any = getattr(torch.ops.tpkernels, name)
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        redispatch = partial(self.dispatch.default._handle.redispatch_boxed, cpu)
        self.kernel: Callable[..., Any] = getattr(_C, f"kernel_{name}", redispatch)
        self.recorded: Callable[..., Any] = self.dispatch
        self._ways = (self.dispatch, self.recorded, self.kernel)
        if communicates:
            keep_in_order(self._qualified)

    def __call__(self, *args: Any) -> Any:
        return self._way(*(a for a in args if isinstance(a, Tensor)))(*args)

    def way(self, group: Group, *tensors: Any) -> Callable[..., Any]:
        """Return the quickest of the three that is right for a call on these tensors.

        Args:
            group: where the op works.
            tensors: arguments of the op that are not left out. What is no Tensor goes to the dispatcher.
        """
        return self._way(*tensors) if group.is_cpu else self.dispatch

    def _way(self, *tensors: Any) -> Callable[..., Any]:
        # is_compiling is a constant in a traced graph, where the rest vanishes.
        return self.dispatch if is_compiling() else self._ways[_plainness(*tensors)]

    def fake(self, function: Function) -> Function:
        """Register the decorated function for tensors without data: shapes and dtypes only."""
        register: Callable[[Function], Function] = torch.library.register_fake(self._qualified)
        return register(function)

    def gradient(self, backward: Callable[..., Any], context: Callable[..., None]) -> None:
        """Register `backward` as the gradient; `context` saves in the forward what it needs."""
        torch.library.register_autograd(self._qualified, backward, setup_context=context)
        kernel = self.kernel

        def forward(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            context(ctx, args, output)
            return output

        self.recorded = recorder(self._qualified, forward, backward)
        self._ways = (self.dispatch, self.recorded, self.kernel)


def recorder(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `apply` of an autograd.Function, for calls that nothing but autograd observes.

    Args:
        name: of the Function.
        forward: (ctx, *arguments) -> the outputs.
        backward: (ctx, *gradients of the outputs) -> those of the arguments.
    """
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name.replace("::", "_"), (torch.autograd.Function,), methods)
    # Not torch's own, which looks the backward up in Python: 1 to 2 us a call.
    function._backward_cls.apply = _C.method(backward)
    # Not Function.apply, which looks for transforms of torch.func.
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return]

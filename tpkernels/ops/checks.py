"""Argument checks of the public ops, before anything is sent. Texts name op, argument, expected and got.

They run in every call but those of the fast path. `plain`: the tensors are plain (ops/_op.py), which implies all that
`check_tensor` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._C._functorch as functorch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from tpkernels.comm.devices import load_cuda
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS, DTYPES, FLOATS, PACKABLE, REDUCTIONS, WIRES


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Return dtypes as people write them: float32, bfloat16."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a floating `dtype` are added."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, x: Any, group: Group | None, *, by_function: bool = False) -> None:
    """Raise TypeError unless x is a Tensor, ValueError unless it is dense and on the group's device (or on meta).

    NotImplementedError when x carries a forward-mode tangent, which the dispatcher would drop without an error, or is
    differentiated by torch.func, which cannot differentiate an op whose gradient is registered in Python.

    Args:
        op: the public function, for the text.
        name: of the argument, for the text.
        x: the argument.
        group: the ranks; None for an op without ranks, which has kernels for the CPU and CUDA.
        by_function: the call goes through an autograd.Function that torch.func can differentiate.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    # Dynamo, which traces dense tensors only, cannot trace the layout in an autograd.Function.
    if not is_dynamo_compiling() and (x.layout != torch.strided or x.is_nested or x.is_quantized):
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else None
        found = f"layout {x.layout}" if kind is None else f"a {kind} tensor"
        raise ValueError(f"{op}: {name} must be a dense (strided) tensor, got {found}")
    if x.device.type != "meta":
        _check_device(op, name, x, group)
    if is_compiling():
        return
    if hasattr(x, "to_local"):
        raise TypeError(f"{op}: {name} must be this rank's tensor, got a {type(x).__name__}: pass {name}.to_local()")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            f"{op}: {name} must not carry a forward-mode tangent (torch.func.jvp, jacfwd, hessian): only backward is "
            "defined (use torch.autograd.grad)"
        )
    if group is not None and not by_function and is_transforming() and _is_differentiated(x):
        raise NotImplementedError(
            f"{op}: {name} must not be differentiated by torch.func (grad, vjp, jacrev, hessian): "
            "use torch.autograd.grad or backward, which work with torch.func.functional_call and around vmap, too"
        )


def is_transforming() -> bool:
    """Return whether a transform of torch.func is active."""
    return functorch.peek_interpreter_stack() is not None


def is_recorded(x: Tensor) -> bool:
    """Return whether autograd may record operations on x: vmap hides whether the tensor that it maps requires grad."""
    hidden = not x.requires_grad and x.is_floating_point() and not is_compiling() and is_transforming()
    return torch.is_grad_enabled() and (x.requires_grad or hidden)


def _is_differentiated(x: Tensor) -> bool:
    """Whether torch.func, at any level, records operations on x."""
    if not torch.is_grad_enabled():
        return False
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_writable(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError where an op could not write to x: it has no memory of its own."""
    if not is_compiling() and x._is_zerotensor():
        raise ValueError(f"{op}: {name} must have memory to write to, got a ZeroTensor; pass {name}.clone()")


def _check_device(op: str, name: str, x: Tensor, group: Group | None) -> None:
    device = x.device
    if group is None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"{op}: {name} must be on the cpu or on cuda, got device {device}")
        has_data = type(x) in (Tensor, torch.nn.Parameter) and not is_compiling()
        if device.type == "cuda" and has_data and (obstacle := load_cuda()[1]) is not None:
            raise RuntimeError(f"{op}: cannot use {device}: {obstacle}")
    elif device != group.device:
        hint = "" if device.type == group.device.type else f" (Group.open(device={device.type!r}) works there)"
        raise ValueError(
            f"{op}: {name} must be on {group.device}, where group {group.label!r} works, got device {device}{hint}"
        )


def check_codec(op: str, codec: Any, dtype: torch.dtype | None, name: str = "codec") -> None:
    """Raise ValueError unless the codec exists and can pack values of this dtype.

    Args:
        op: the public function, for the text.
        codec: the codec.
        dtype: of the values; None checks the name of the codec alone.
        name: of the argument, for the text.
    """
    if codec not in CODECS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
    if codec != "none" and dtype is not None and dtype not in PACKABLE:
        raise ValueError(f"{op}: {name} {codec!r} needs a dtype of {names(PACKABLE)}, got {names([dtype])}")


def check_reduction(name: str, x: Any, op: Any, codec: Any, group: Group, *, plain: bool) -> None:
    """Raise unless x can be reduced by `op` over the ranks, packed by `codec`.

    Args:
        name: the public function, for the text.
        x: the tensor.
        op: of the reduction.
        codec: the codec.
        group: over which it is reduced.
        plain: x is known to be a tensor on the group's device.

    Raises:
        TypeError, ValueError: x, op or codec do not fit.
    """
    if not plain:
        check_tensor(name, "x", x, group)
    if op not in REDUCTIONS:
        raise ValueError(f"{name}: op must be one of {', '.join(map(repr, REDUCTIONS))}, got {op!r}")
    if codec not in CODECS:
        check_codec(name, codec, None)
    if (x.dtype, op, codec) in WIRES:
        return
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: x must have a dtype of {names(DTYPES)}, got {names([x.dtype])}")
    if (x.dtype, op, "none") not in WIRES:
        allowed = [dtype for dtype in DTYPES if (dtype, op, "none") in WIRES]
        raise ValueError(f"{name}: op {op!r} needs a dtype of {names(allowed)} (use 'sum'), got {names([x.dtype])}")
    check_codec(name, codec, x.dtype)
    raise ValueError(f"{name}: op must be 'sum' or 'avg' with codec {codec!r}, got {op!r}")


def check_dim(op: str, x: Tensor, dim: Any, *, tokens: bool = False) -> int:
    """Return dim counted from the front.

    Args:
        op: the public function, for the text.
        x: the tensor that has the dimension.
        dim: from the front, or negative from the back.
        tokens: the last dimension, over which a GEMM sums, is not allowed.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    ndim = x.dim()
    found = dim + ndim if dim < 0 else dim
    if not 0 <= found < ndim:
        raise ValueError(f"{op}: dim must be in [{-ndim}, {ndim}) for shape {list(x.shape)}, got {dim}")
    if tokens and found == ndim - 1:
        raise ValueError(f"{op}: dim must be a token dimension, not the last one of shape {list(x.shape)}, got {dim}")
    return found


def check_size(op: str, name: str, size: Any) -> None:
    """Raise unless size is None or a whole number of 0 or more, of 63 bits."""
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int or None, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{op}: {name} must not be negative, got {size}")
    if isinstance(size, int) and size >= 1 << 63:
        raise ValueError(f"{op}: {name} must be less than 2^63, got {size}")


def check_linear(
    op: str, x: Any, w: Any, bias: Any, codec: Any, group: Group, x_name: str = "x_shard", *, plain: bool
) -> None:
    """Raise unless y = x[..., K] @ w[N, K].T + bias[N] has a meaning, and its sum can be packed by `codec`.

    Args:
        op: the public function, for the text.
        x: [..., K].
        w: [N, K].
        bias: [N] or None.
        codec: of the sum.
        group: the ranks.
        x_name: the name of the argument x, for the text.
        plain: x, w and bias are plain tensors.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    if not plain:
        check_tensor(op, x_name, x, group)
        check_tensor(op, "w_shard", w, group)
    dtype, shape = x.dtype, w.shape
    if dtype not in FLOATS:
        raise ValueError(f"{op}: {x_name} must have a dtype of {names(FLOATS)}, got {names([dtype])}")
    if w.dtype != dtype:
        raise ValueError(
            f"{op}: {x_name} and w_shard must have the same dtype, got {names([dtype])} and {names([w.dtype])}"
        )
    if x.dim() < 2:
        raise ValueError(f"{op}: {x_name} must have 2 dims or more, got {x.dim()} (shape {list(x.shape)})")
    if len(shape) != 2:
        raise ValueError(f"{op}: w_shard must have 2 dims [N, K], got {len(shape)} (shape {list(shape)})")
    if x.shape[-1] != shape[1]:
        raise ValueError(
            f"{op}: {x_name} and w_shard must have the same K (last dim), got {x.shape[-1]} and {shape[1]}"
        )
    if bias is not None:
        if not plain:
            check_tensor(op, "bias", bias, group)
        if bias.dtype != dtype:
            raise ValueError(f"{op}: bias must have the dtype of {x_name}, {names([dtype])}, got {names([bias.dtype])}")
        if bias.dim() != 1 or bias.shape[0] != shape[0]:
            raise ValueError(f"{op}: bias must have shape [{shape[0]}], got {list(bias.shape)}")
    if not plain:
        check_one_device(op, x, w, bias)
    check_codec(op, codec, dtype)


def check_one_device(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all are on one device: a tensor on meta is where every group works."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")

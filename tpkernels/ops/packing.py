"""Packing of tensors outside collectives: to bytes, back, and with error feedback; and sums of packed tensors.

Gradient aggregation uses it. With error feedback, R ranks, and an average:

    wire = compress_with_feedback(gradient, residual, codec, scale=1 / R)
    mean = all_reduce_packed(wire, gradient.shape, gradient.dtype, codec=codec)

Every function: the public name, the fake kernel (what torch.compile sees). None has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _increment_version
from torch.compiler import is_compiling, is_dynamo_compiling

from tpkernels._native import _C
from tpkernels.comm.group import Group, resolve
from tpkernels.compress import PACKABLE, WIRES, block_values, wire_bytes
from tpkernels.shard import part_sizes

from ._op import Op
from .checks import check_codec, check_size, check_tensor, check_writable, names
from .sizes import even_part

COMPRESS = Op("compress")
DECOMPRESS = Op("decompress")
COMPRESS_WITH_FEEDBACK = Op("compress_with_feedback")
ALL_REDUCE_PACKED = Op("all_reduce_packed", communicates=True)
REDUCE_SCATTER_PACKED = Op("reduce_scatter_packed", communicates=True)


def _op_alone(*_: Any) -> None:
    """Take the place of a fast path in a module that has none, that of the emulated devices."""


# They pack plain dense tensors of the CPU, and return None for other calls.
_fast_compress: Callable[..., Any] = getattr(_C, "fast_compress", _op_alone)
_fast_decompress: Callable[..., Any] = getattr(_C, "fast_decompress", _op_alone)
_fast_compress_with_feedback: Callable[..., Any] = getattr(_C, "fast_compress_with_feedback", _op_alone)


def compress(x: Tensor, codec: str) -> Tensor:
    """Pack values as a collective with this codec sends them.

    Args:
        x: any shape and strides; fp32 | bf16 | fp16, with codec "none" any dtype.
        codec: a name in `tpkernels.compress.CODECS`. "none" gives the bytes of x.

    Returns:
        the wire, uint8 [wire_bytes(codec, x.numel(), x.itemsize)]: the same bytes on every backend.

    Raises:
        TypeError, ValueError: x or codec do not fit (says which, expected, got).
    """
    if not is_dynamo_compiling() and (wire := _fast_compress(x, codec)) is not None:
        return wire  # type: ignore[no-any-return]
    check_tensor("compress", "x", x, None)
    check_codec("compress", codec, x.dtype)
    return COMPRESS.dispatch(x.detach(), codec)  # type: ignore[no-any-return]


@COMPRESS.fake
def _compress_fake(x: Tensor, codec: str) -> Tensor:
    return x.new_empty([wire_bytes(codec, x.numel(), x.itemsize)], dtype=torch.uint8)


def decompress(wire: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> Tensor:
    """Unpack what `compress` packed.

    Args:
        wire: uint8, one dim.
        shape: of the result.
        dtype: of the result; it may be another one than was packed, unless codec is "none".
        codec: the one it was packed with.

    Returns:
        the values, contiguous. A block that held a NaN or an infinity holds no finite number.

    Raises:
        TypeError, ValueError: wire has not the bytes of such a tensor, or dtype or codec do not fit.
    """
    if not is_dynamo_compiling() and (x := _fast_decompress(wire, shape, dtype, codec)) is not None:
        return x  # type: ignore[no-any-return]
    check_tensor("decompress", "wire", wire, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"decompress: dtype must be a torch.dtype, got {type(dtype).__name__}")
    check_codec("decompress", codec, dtype)
    sizes = _check_shape("decompress", shape)
    _check_bytes("decompress", wire, wire_bytes(codec, math.prod(sizes), dtype.itemsize), sizes)
    return DECOMPRESS.dispatch(wire, sizes, dtype, codec)  # type: ignore[no-any-return]


@DECOMPRESS.fake
def _decompress_fake(wire: Tensor, shape: list[int], dtype: torch.dtype, codec: str) -> Tensor:
    return wire.new_empty(shape, dtype=dtype)


def compress_with_feedback(x: Tensor, residual: Tensor, codec: str, scale: float = 1.0) -> Tensor:
    """Pack a gradient together with what earlier messages could not carry of theirs, and keep what this one cannot.

    Equal to, in one pass over memory:

        v = scale * x + residual                         # fp32
        wire = compress(v, codec)
        residual = v - decompress(wire)                  # in place, exact: residual + decompress(wire) is v

    Args:
        x: any shape and strides, fp32 | bf16 | fp16. With codec "none" v is rounded to the dtype of x.
        residual: fp32, contiguous, the shape of x, zero before the first message. It is overwritten. Where v cannot be
            packed (a NaN or an infinity in its block) it stays as it was, so that the message after is whole again.
        codec: a name in `tpkernels.compress.CODECS`.
        scale: by which x is multiplied first, for an average 1 / R.

    Returns:
        the wire, uint8, as `compress` gives it for v.

    Raises:
        TypeError, ValueError: x, residual, codec or scale do not fit (says which, expected, got).

    Source: error feedback of Seide et al. 2014 (1-bit SGD) and Karimireddy et al. 2019 (arXiv:1901.09847).
    """
    op = "compress_with_feedback"
    if not is_dynamo_compiling() and (found := _fast_compress_with_feedback(x, residual, codec, scale)) is not None:
        return found  # type: ignore[no-any-return]
    check_tensor(op, "x", x, None)
    check_tensor(op, "residual", residual, None)
    check_codec(op, codec, x.dtype)
    if x.dtype not in PACKABLE:
        raise ValueError(f"{op}: x must have a dtype of {names(PACKABLE)}, got {names([x.dtype])}")
    _check_residual(op, x, residual)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__}")
    wire: Tensor = COMPRESS_WITH_FEEDBACK.dispatch(x.detach(), residual, codec, float(scale))
    if not (is_compiling() or residual.is_inference()):
        _increment_version((residual,))
    return wire


def _check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    check_writable(op, "residual", residual)
    if not is_compiling() and residual.is_neg():
        raise ValueError(f"{op}: residual must not be a negated view; pass residual.resolve_neg() and keep it")
    if residual.dtype != torch.float32 or not residual.is_contiguous() or residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must be float32, contiguous and of the shape of x, {list(x.shape)}, got "
            f"{names([residual.dtype])} of shape {list(residual.shape)} with strides {list(residual.stride())}"
        )
    if residual.device != x.device:
        raise ValueError(f"{op}: residual must be on the device of x, {x.device}, got {residual.device}")
    if residual.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: residual must not require a gradient, got requires_grad=True")


@COMPRESS_WITH_FEEDBACK.fake
def _compress_with_feedback_fake(x: Tensor, residual: Tensor, codec: str, scale: float) -> Tensor:
    return x.new_empty([wire_bytes(codec, x.numel(), x.itemsize)], dtype=torch.uint8)


def all_reduce_packed(
    wire: Tensor, shape: Sequence[int], dtype: torch.dtype, *, group: Group | None = None, op: str = "sum", codec: str
) -> Tensor:
    """Reduce over the ranks what every rank has packed already; every rank gets the full result.

    Equal to, bit for bit and on more than one rank, without packing a second time:

        wire = compress(x, codec)
        y = all_reduce(x, op=op, codec=codec)            # on one rank, where nothing is sent: decompress(wire)

    It is that very call: a rank may bring a wire where another brings values, and the counters are those of all_reduce.

    Args:
        wire: uint8, one dim, what `compress` or `compress_with_feedback` gave for values of this shape.
        shape: of the result, the same on every rank.
        dtype: of the result; it may be another one than was packed, unless codec is "none".
        group: the ranks; None means all ranks of the default process group.
        op: "sum" | "avg"; with codec "none" whatever all_reduce takes.
        codec: the one the wire was packed with.

    Returns:
        y, contiguous. No gradient: a wire is bytes.

    Raises:
        TypeError, ValueError: wire has not the bytes of such a tensor, or dtype, op or codec do not fit.
        RankMismatchError, TimeoutError, PeerLostError: as in `all_reduce`.
    """
    name, group = "all_reduce_packed", resolve(group)
    _check_packed(name, wire, dtype, op, codec, group)
    sizes = _check_shape(name, shape)
    _check_bytes(name, wire, wire_bytes(codec, math.prod(sizes), dtype.itemsize), sizes)
    return ALL_REDUCE_PACKED.dispatch(wire, sizes, dtype, group.name, group.world_size, op, codec)  # type: ignore[no-any-return]


@ALL_REDUCE_PACKED.fake
def _all_reduce_packed_fake(
    wire: Tensor, shape: list[int], dtype: torch.dtype, group: str, world_size: int, op: str, codec: str
) -> Tensor:
    return wire.new_empty(shape, dtype=dtype)


def reduce_scatter_packed(
    wire: Tensor, numel: int, dtype: torch.dtype, *, group: Group | None = None, op: str = "sum", codec: str
) -> Tensor:
    """Reduce over the ranks what every rank has packed already; every rank gets its even part of the flat result.

    Equal to, bit for bit and on more than one rank, without packing a second time:

        wire = compress_parts(x, codec)
        y = reduce_scatter(x.flatten(), op=op, codec=codec)       # on one rank: decompress(wire)

    It is that very call, as `all_reduce_packed` is.

    Args:
        wire: uint8, one dim: the even parts of all ranks, packed one by one and put behind one another, as
            `compress_parts` does.
        numel: values of the full tensor; the first numel % R ranks get one more.
        dtype: of the result; it may be another one than was packed, unless codec is "none".
        group: the ranks; None means all ranks of the default process group.
        op: "sum" | "avg"; with codec "none" whatever reduce_scatter takes.
        codec: the one the wire was packed with.

    Returns:
        this rank's part, one dim. No gradient: a wire is bytes.

    Raises:
        TypeError, ValueError: wire has not the bytes of such parts, or numel, dtype, op or codec do not fit.
        RankMismatchError, TimeoutError, PeerLostError: as in `reduce_scatter`.
    """
    name, group = "reduce_scatter_packed", resolve(group)
    _check_packed(name, wire, dtype, op, codec, group)
    if numel is None:
        raise TypeError(f"{name}: numel must be an int, got None")
    check_size(name, "numel", numel)
    parts = [even_part(numel, group.world_size, r) for r in range(group.world_size)]
    expected = sum(wire_bytes(codec, part, dtype.itemsize) for part in parts)
    _check_bytes(name, wire, expected, parts, in_parts=True)
    call = (group.name, group.world_size, group.rank, op, codec)
    return REDUCE_SCATTER_PACKED.dispatch(wire, numel, dtype, *call)  # type: ignore[no-any-return]


@REDUCE_SCATTER_PACKED.fake
def _reduce_scatter_packed_fake(
    wire: Tensor, numel: int, dtype: torch.dtype, group: str, world_size: int, rank: int, op: str, codec: str
) -> Tensor:
    return wire.new_empty([even_part(numel, world_size, rank)], dtype=dtype)


def compress_parts(
    x: Tensor, codec: str, *, group: Group | None = None, residual: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Pack the even parts of a flat tensor one by one: what `reduce_scatter_packed` takes.

    Equal to:

        parts = split(x.flatten(), R)
        return cat([compress(part, codec) for part in parts])     # with a residual: compress_with_feedback of each

    Args:
        x: any shape; fp32 | bf16 | fp16, with codec "none" any dtype.
        codec: a name in `tpkernels.compress.CODECS`.
        group: the ranks, whose number R is; None means all ranks of the default process group. Nothing is sent.
        residual: None, or as in `compress_with_feedback`; it is overwritten.
        scale: with a residual as in `compress_with_feedback`; without one it must be 1.

    Returns:
        the wire, uint8.

    Raises:
        TypeError, ValueError: x, codec, residual or scale do not fit.
    """
    name, group = "compress_parts", resolve(group)
    check_tensor(name, "x", x, group)
    check_codec(name, codec, x.dtype)
    if residual is None and scale != 1.0:
        raise ValueError(f"{name}: scale must be 1 without a residual, got {scale}")
    if residual is not None:
        check_tensor(name, "residual", residual, group)
        _check_residual(name, x, residual)
    sizes = part_sizes(x.numel(), group.world_size)
    if all(size % block_values(codec) == 0 for size in sizes[:-1]):
        sizes = [x.numel()]  # blocks end where parts do: the same bytes by one call, and no copy by cat
    parts = torch.split(x.reshape(-1), sizes)
    if residual is None:
        wires = [compress(part, codec) for part in parts]
    else:
        kept = torch.split(residual.view(-1), sizes)
        wires = [compress_with_feedback(part, left, codec, scale) for part, left in zip(parts, kept, strict=True)]
    return wires[0] if len(wires) == 1 else torch.cat(wires)


def _check_packed(name: str, wire: Tensor, dtype: torch.dtype, op: str, codec: str, group: Group) -> None:
    check_tensor(name, "wire", wire, group)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: dtype must be a torch.dtype, got {type(dtype).__name__}")
    check_codec(name, codec, dtype)
    if (dtype, op, codec) not in WIRES:
        allowed = "'sum' or 'avg' with a codec" if codec != "none" else "one that all_reduce takes for that dtype"
        raise ValueError(f"{name}: op must be {allowed}, got {op!r} for {names([dtype])} with codec {codec!r}")


def _check_shape(name: str, shape: Sequence[int]) -> list[int]:
    sizes = list(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"{name}: shape must not be negative, got {sizes}")
    return sizes


def _check_bytes(name: str, wire: Tensor, expected: int, sizes: list[int], *, in_parts: bool = False) -> None:
    """Raise ValueError unless a wire has the bytes of values of that shape, or of packed parts of these many values."""
    if wire.dtype != torch.uint8 or wire.dim() != 1:
        raise ValueError(
            f"{name}: wire must be uint8 with one dim, got {names([wire.dtype])} of shape {list(wire.shape)}"
        )
    if wire.numel() != expected:
        values = f"{sum(sizes)} values in {len(sizes)} packed parts" if in_parts else f"shape {sizes}"
        raise ValueError(f"{name}: wire must have {expected} bytes for {values}, got {wire.numel()}")

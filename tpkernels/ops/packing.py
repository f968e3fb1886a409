"""Packing of tensors outside collectives: to bytes, back, and with error feedback. Gradient aggregation is made of it.

Every function: the public name, the fake kernel (what torch.compile sees). None has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _increment_version
from torch.compiler import is_compiling

from tpkernels.compress import wire_bytes

from ._check import PACKABLE, check_codec, check_tensor, names
from ._register import fake

Call = torch.ops.tpkernels


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
    check_tensor("compress", "x", x, None)
    check_codec("compress", codec, x.dtype)
    return Call.compress(x.detach(), codec)  # type: ignore[no-any-return]


@fake("compress")
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
    check_tensor("decompress", "wire", wire, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"decompress: dtype must be a torch.dtype, got {type(dtype).__name__}")
    check_codec("decompress", codec, dtype)
    if wire.dtype != torch.uint8 or wire.dim() != 1:
        raise ValueError(
            f"decompress: wire must be uint8 with one dim, got {names([wire.dtype])} of shape {list(wire.shape)}"
        )
    sizes = list(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"decompress: shape must not be negative, got {sizes}")
    expected = wire_bytes(codec, math.prod(sizes), dtype.itemsize)
    if wire.numel() != expected:
        raise ValueError(f"decompress: wire must have {expected} bytes for shape {sizes}, got {wire.numel()}")
    return Call.decompress(wire, sizes, dtype, codec)  # type: ignore[no-any-return]


@fake("decompress")
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
    check_tensor(op, "x", x, None)
    check_tensor(op, "residual", residual, None)
    check_codec(op, codec, x.dtype)
    if x.dtype not in PACKABLE:
        raise ValueError(f"{op}: x must have a dtype of {names(PACKABLE)}, got {names([x.dtype])}")
    _check_residual(op, x, residual)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__}")
    wire: Tensor = Call.compress_with_feedback(x.detach(), residual, codec, float(scale))
    if not (is_compiling() or residual.is_inference()):
        _increment_version((residual,))
    return wire


def _check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    if residual.dtype != torch.float32 or not residual.is_contiguous() or residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must be float32, contiguous and of the shape of x, {list(x.shape)}, got "
            f"{names([residual.dtype])} of shape {list(residual.shape)} with strides {list(residual.stride())}"
        )
    if residual.device != x.device:
        raise ValueError(f"{op}: residual must be on the device of x, {x.device}, got {residual.device}")
    if residual.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: residual must not require a gradient, got requires_grad=True")


@fake("compress_with_feedback")
def _compress_with_feedback_fake(x: Tensor, residual: Tensor, codec: str, scale: float) -> Tensor:
    return x.new_empty([wire_bytes(codec, x.numel(), x.itemsize)], dtype=torch.uint8)

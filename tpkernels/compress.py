"""The codecs, which pack values on the wire, and the reductions that exist. Both lists are those of C++.

csrc/core/codec/codec.h has the codecs, csrc/core/wire.cpp decides which dtype, reduction and codec go together.

When one pays: packing costs a core 0.3 to 0.7 ns a value of an all_reduce (1 MiB between two ranks, all of it: bf16
0.30, int8 0.47, fp16 0.59, fp8 0.70 ns) and saves 2 to 3 of 4 bytes each way. Where ranks share memory no codec wins
much: an fp32 all_reduce takes 0.95 to 1.6 times as long with one (AVX2; DESIGN.md, section 4). Over links an average by
itself is quicker with each of them, up to 10 Gbit, the fastest link that was measured; a whole training step need not
be. Rows: bench/results/codecs.jsonl, codec_moves.jsonl, study/.
"""

from __future__ import annotations

import torch

from tpkernels._native import _C

_BLOCKS: dict[str, tuple[int, int]] = {name: (values, nbytes) for name, values, nbytes in _C.codecs()}

CODECS: tuple[str, ...] = ("none", *_BLOCKS)
"""Every name that an op's `codec` argument takes."""

_ROWS = [(getattr(torch, dtype), op, codec) for dtype, op, codec in _C.wires()]

WIRES: frozenset[tuple[torch.dtype, str, str]] = frozenset(_ROWS)
"""(dtype, op, codec) of every reduction that exists."""

REDUCTIONS: tuple[str, ...] = tuple(dict.fromkeys(op for _, op, _ in _ROWS))
"""Every name that an op's `op` argument takes."""

DTYPES: tuple[torch.dtype, ...] = tuple(dict.fromkeys(dtype for dtype, _, _ in _ROWS))
"""The dtypes that are summed."""

FLOATS: tuple[torch.dtype, ...] = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)

PACKABLE: tuple[torch.dtype, ...] = tuple(dict.fromkeys(dtype for dtype, _, codec in _ROWS if codec != "none"))
"""The dtypes that codecs pack."""


def block_values(codec: str) -> int:
    """Values that are packed together: a wire may be cut, or put behind another, at multiples of them.

    Raises:
        ValueError: no such codec.
    """
    if codec == "none":
        return 1
    if codec not in _BLOCKS:
        raise ValueError(f"block_values: codec must be one of {CODECS}, got {codec!r}")
    return _BLOCKS[codec][0]


def bytes_per_value(codec: str, itemsize: int = 4) -> float:
    """Bytes that one value takes on the wire in a long message.

    Args:
        codec: a name in CODECS.
        itemsize: bytes of the tensor's dtype, which is what "none" sends.

    Raises:
        ValueError: no such codec.
    """
    if codec == "none":
        return float(itemsize)
    if codec not in _BLOCKS:
        raise ValueError(f"bytes_per_value: codec must be one of {CODECS}, got {codec!r}")
    values, nbytes = _BLOCKS[codec]
    return nbytes / values


def wire_bytes(codec: str, numel: int, itemsize: int = 4) -> int:
    """Bytes of a message: the payload of every value, and a header for each block, the last one short.

    Args:
        codec: a name in CODECS.
        numel: values in the message; may be symbolic.
        itemsize: bytes of the tensor's dtype, which is what "none" sends.

    Raises:
        ValueError: no such codec.
    """
    if codec == "none":
        return numel * itemsize
    if codec not in _BLOCKS:
        raise ValueError(f"wire_bytes: codec must be one of {CODECS}, got {codec!r}")
    values, nbytes = _BLOCKS[codec]
    payload = nbytes // values
    return (numel + values - 1) // values * (nbytes - values * payload) + numel * payload

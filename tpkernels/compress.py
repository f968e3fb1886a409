"""The codecs: how values are packed on the wire. Names and sizes come from the C++ list (csrc/core/codec/codec.h).

When one pays: packing costs a core 0.3 to 0.7 ns a value of an all_reduce (1 MiB between two ranks, all of it: bf16
0.30, int8 0.47, fp16 0.59, fp8 0.70 ns) and saves 2 to 3 of 4 bytes each way. Where ranks share memory every codec
loses: an fp32 all_reduce takes 1.4 to 4 times as long with one. Over links an average by itself is quicker with each of
them, up to 10 Gbit, the fastest link that was measured; a whole training step need not be. Rows:
bench/results/codecs.jsonl, codec_moves.jsonl, study/.
"""

from __future__ import annotations

from tpkernels._native import _C

_BLOCKS: dict[str, tuple[int, int]] = {name: (values, nbytes) for name, values, nbytes in _C.codecs()}

CODECS: tuple[str, ...] = ("none", *_BLOCKS)
"""Every name that an op's `codec` argument takes."""


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

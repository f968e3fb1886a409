"""The codecs: how values are packed on the wire. Names and sizes come from the C++ list (csrc/codec/codec.h)."""

from __future__ import annotations

from tpkernels import _C

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

"""The average of a message over the ranks with error feedback: rounding errors are added to the next message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.compress import wire_bytes
from tpkernels.shard import part_sizes

_stream: Callable[..., Any] = getattr(_C, "average_with_feedback", lambda *_: None)
"""The same over connections, in one stream of pieces with the same bits: packing and sums overlap with the link. None
for other groups of the CPU; the module knows none of those on GPUs."""


def average_with_feedback(flat: Tensor, residual: Tensor, codec: str, group: Group) -> Tensor:
    """Average over the ranks, packed on the way out and on the way back; a collective.

        v_r = x_r / R + residual_r;  wire_r = pack(v_r);  residual_r = v_r - unpack(wire_r)
        sum = sum_r unpack(wire_r);  mean = unpack(pack(sum));  residual_owner += sum - mean     # part by part

    The owner of a part packs its sum again for the others. The error of that could be all of a value that only some
    ranks have: half a step of the sum rounds to nothing. So the owner adds it to its own residual. After any number of
    steps the averages and the residuals of all ranks are together the sum of the true averages, but for rounding to
    fp32.

    Args:
        flat: one dim; fp32 | bf16 | fp16.
        residual: fp32, contiguous, of the size of flat, in units of the average; it is overwritten. Where a value is
            not finite its block is unchanged.
        codec: a name in `tpkernels.compress.CODECS`.
        group: the ranks.

    Returns:
        the average, of the dtype of flat, the same bits on all ranks. Sends as many bytes as a packed all_reduce.

    Source: error feedback on both sides, Tang et al. 2019 (DoubleSqueeze, arXiv:1905.05957).
    """
    R, rank = group.world_size, group.rank
    if group.is_cpu and (average := _stream(flat, residual, codec, group.name)) is not None:
        return average  # type: ignore[no-any-return]
    wire = ops.compress_parts(flat, codec, group=group, residual=residual, scale=1.0 / R)
    if R == 1:
        return ops.decompress(wire, flat.shape, flat.dtype, codec)
    part = ops.reduce_scatter_packed(wire, flat.numel(), torch.float32, group=group, codec=codec)
    lost = torch.zeros_like(part)
    mine = ops.compress_with_feedback(part, lost, codec)
    sizes = part_sizes(flat.numel(), R)
    torch.split(residual, sizes)[rank].add_(lost)
    longest = wire_bytes(codec, sizes[0])
    padded = torch.cat([mine, mine.new_zeros(longest - mine.numel())]) if mine.numel() < longest else mine
    wires = ops.all_gather(padded, group=group, dim_size=R * longest)
    parts = [
        ops.decompress(found[: wire_bytes(codec, size)], (size,), flat.dtype, codec)
        for found, size in zip(torch.split(wires, longest) if longest else [wires] * R, sizes, strict=True)
    ]
    return torch.cat(parts)

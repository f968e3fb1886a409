"""Averages of which each rank gets its part, and parameters of which each rank has updated its part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group

from .buckets import Bucket
from .dense import DenseAverage, State
from .flat import stepped
from .lane import Lane


class ScatteredAverage(DenseAverage):
    """This rank's part of mean = (x_0 + ... + x_{R-1}) / R, every contribution packed by a codec.

    The sum of a part stays with its owner and is not packed again. With codec "none" the bits are those of
    DenseAverage, and with error feedback the residual is that of this rank's contribution alone. Arguments are its.
    """

    def average(self, bucket: Bucket, flat: Tensor, state: State, step: int, group: Group) -> Tensor:
        """This rank's even part of the average; a collective. Arguments and errors are those of DenseAverage.

        Where a value of any rank is not finite, the part that has it is not, on its owner only.
        """
        if not self.kinds:
            return ops.reduce_scatter(flat, group=group, op="avg", codec=self.codec)
        scale = 1.0 / group.world_size
        wire = ops.compress_parts(flat, self.codec, group=group, residual=state["residual"], scale=scale)
        return ops.reduce_scatter_packed(wire, flat.numel(), flat.dtype, group=group, codec=self.codec)

    def part(self, bucket: Bucket, mean: Tensor, position: int, group: Group) -> Tensor:
        """The values of one member in this rank's part, one dim: a view."""
        return bucket.piece(mean, position, group.world_size, group.rank)


@torch.no_grad()
def gather_parameters(lane: Lane, buckets: Sequence[Bucket]) -> None:
    """Put the parts of all ranks into the parameters, one message for each bucket; a collective over the lane."""
    sent, R, rank = [], lane.group.world_size, lane.group.rank
    for bucket in buckets:
        mine = torch.zeros(bucket.numel // R, dtype=bucket.members[0].parameter.dtype, device=bucket.device)
        for i, member in enumerate(bucket.members):
            bucket.piece(mine, i, R, rank).copy_(stepped(member.parameter).detach())
        job = partial(ops.all_gather, mine, group=lane.group, dim_size=bucket.numel)
        sent.append((bucket, mine, lane.submit(job)))  # on a GPU the lane's stream reads `mine` later
    for bucket, _, future in sent:
        whole = future.wait()
        for i, member in enumerate(bucket.members):
            member.parameter.detach().copy_(bucket.part(whole, i))

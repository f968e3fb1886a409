"""The weights of the replicas in an average: equal, or such as the number of tokens of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.futures import Future

from tpkernels import ops

from .lane import Lane

REDUCTIONS = ("mean", "sum")


class Weights:
    """The factor of this rank's gradients, by which they are multiplied before an average over R ranks.

        mean:  sum_r w_r g_r / sum_r w_r = (1 / R) sum_r scale_r g_r        scale_r = R w_r / sum_r w_r
        sum:   sum_r w_r g_r             = R (1 / R) sum_r scale_r g_r      scale_r = w_r

    The sum of the weights is sent ahead of the gradients, so that messages and residuals are in units of the average.

    Args:
        who: the public function, for messages.
        reduce: "mean" or "sum".

    Raises:
        ValueError: another reduction.
    """

    def __init__(self, who: str, reduce: str) -> None:
        if reduce not in REDUCTIONS:
            raise ValueError(f"{who}: reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
        self._who, self.reduce = who, reduce
        self._weight, self._scale = 1.0, 1.0
        self._sum: Future[Tensor] | None = None

    def factor(self, world_size: int) -> float:
        """The factor of an average when it has arrived."""
        return float(world_size) if self.reduce == "sum" else 1.0

    @property
    def is_zero(self) -> bool:
        """Whether the weight of this rank is 0."""
        return self._weight == 0.0

    def set(self, weight: float | Tensor, lane: Lane) -> None:
        """Use this weight from now on; with "mean" a collective over the lane, which is not waited for.

        Raises:
            ValueError: the weight is negative or not finite.
        """
        weight = float(weight)
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{self._who}: weight must be finite and 0 or more, got {weight}")
        self._weight = self._scale = weight
        if self.reduce == "mean":
            mine = torch.tensor([weight], dtype=torch.float64, device=lane.group.device)
            self._sum = lane.submit(lambda: ops.all_reduce(mine, group=lane.group))

    def scale(self, world_size: int) -> float:
        """The factor of this rank's gradients; waits for the sum of the weights where that is in flight.

        Raises:
            ValueError: the weights of all ranks are 0, on all of them.
        """
        if self._sum is not None:
            total, self._sum = float(self._sum.wait()), None
            if total == 0.0:
                raise ValueError(f"{self._who}: one rank's weight must be above 0, got 0 on all {world_size} ranks")
            self._scale = self._weight * world_size / total
        return self._scale


def ranks_with(has: bool, lane: Lane) -> int:
    """The number of ranks of a lane on which `has` is true; a collective."""
    mine = torch.tensor([int(has)], device=lane.group.device)
    return int(lane.submit(lambda: ops.all_reduce(mine, group=lane.group)).wait())

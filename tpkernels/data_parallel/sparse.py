"""Codec "topk", for gradients and the differences of mode "local": sends the largest values, and keeps the others.

A message has a fixed size, so that one all_gather carries it: k indices (int32), then k values packed as fp16 with one
exponent for each block. All ranks add the messages up in rank order and hold the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import wire_bytes

from .buckets import Bucket
from .dense import State

INDEX = torch.int32
VALUES = "fp16"  # the codec of the values
SAMPLE = 1 << 14  # magnitudes from which a threshold is estimated
FIRST_RATIO = 0.25  # of the warm-up


@dataclass(frozen=True)
class TopK:
    """Settings of codec "topk".

    Attributes:
        ratio: the share of each bucket that is sent in a message, in (0, 1]. Mode "local" has a message every
            `local_steps` steps only.
        momentum: momentum correction, in [0, 1): momentum is applied to a gradient before the largest are chosen, and
            set to 0 where one was sent (factor masking). It replaces the momentum of the optimizer: with SGD set the
            optimizer's to 0; with Adam, which has its own, and in mode "local" leave 0 here.
        warmup_steps: messages over which the share falls exponentially from a quarter to ratio.

    Adam divides by the size of recent gradients. A value that is sent seldom, as the sum of many steps, moves a
    parameter by a length that does not grow with that sum. With Adam take mode "local", in which each rank's optimizer
    gets every gradient of its own, and the largest changes of parameters are sent (docs/compression_study.md has both).

    Source: Lin et al. 2018, Deep Gradient Compression (arXiv:1712.01887).
    """

    ratio: float = 0.01
    momentum: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"TopK: ratio must be in (0, 1], got {self.ratio}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"TopK: momentum must be in [0, 1), got {self.momentum}")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"TopK: warmup_steps must be a whole number, 0 or more, got {self.warmup_steps!r}")

    def count(self, numel: int, step: int) -> int:
        """The number of values that are sent in this step, of numel; the same on all ranks, one at least."""
        ratio = self.ratio
        if step < self.warmup_steps and ratio < FIRST_RATIO:
            ratio = FIRST_RATIO * (ratio / FIRST_RATIO) ** (step / self.warmup_steps)
        return min(numel, max(1, math.ceil(ratio * numel)))

    def message_bytes(self, numel: int, step: int) -> int:
        """Bytes of one rank's message for a bucket of numel values; it goes to each of the R - 1 others."""
        return _Message.of(self.count(numel, step)).bytes


class _Message(NamedTuple):
    """How a message of k values is laid out: indices [0, indices), values [indices, end), filled up to `bytes`."""

    indices: int
    end: int
    bytes: int

    @classmethod
    def of(cls, k: int) -> _Message:
        indices = INDEX.itemsize * k
        end = indices + wire_bytes(VALUES, k)
        return cls(indices, end, -(-end // INDEX.itemsize) * INDEX.itemsize)  # the next message's indices are aligned


class TopKAverage:
    """The average over the ranks of the k largest values of each; a rank keeps the values that it does not send.

        u_r = momentum * u_r + x_r / R              # kept only with momentum
        v_r = v_r + u_r                             # "residual", in units of the average
        mean = sum_r (v_r at the k largest |v_r|, rounded to fp16);  there v_r keeps the rounding error, and u_r = 0

    Attributes:
        kinds: of its state, for each bucket.
    """

    def __init__(self, settings: TopK) -> None:
        self.settings = settings
        self.kinds: tuple[str, ...] = ("residual", "velocity") if settings.momentum else ("residual",)

    def average(self, bucket: Bucket, flat: Tensor, state: State, step: int, group: Group) -> Tensor:
        """The average over the group, the same bits on all ranks. A collective.

        Where a value of this rank is not finite, its state is unchanged, and it sends NaN to all ranks.

        Args:
            bucket: of the message.
            flat: [bucket.numel], the dtype of the bucket.
            state: of the bucket: "residual" and, with momentum, "velocity", fp32 [bucket.numel]; updated in place.
            step: of the warm-up.
            group: the ranks.

        Returns:
            [bucket.numel], the dtype of the bucket.

        Raises:
            TimeoutError, PeerLostError, RankMismatchError: a rank was late, died, or sent another message.
        """
        k = self.settings.count(bucket.numel, step)
        message = self._pack(flat, state, k, group.world_size)
        gathered = ops.all_gather(message, group=group, dim_size=group.world_size * message.numel())
        return _add_up(gathered.view(group.world_size, -1), k, bucket).to(bucket.dtype)

    def part(self, bucket: Bucket, mean: Tensor, position: int, group: Group) -> Tensor:
        """The average of one member, in its shape: a view."""
        return bucket.part(mean, position)

    def _pack(self, flat: Tensor, state: State, k: int, world_size: int) -> Tensor:
        residual, velocity = state["residual"], state.get("velocity")
        update = flat.float() / world_size
        if bool(update.isfinite().all()):
            if velocity is not None:
                update = velocity.mul_(self.settings.momentum).add_(update)
            residual.add_(update)
            index = largest(residual, k)
            values = residual[index]
            wire = ops.compress(values, VALUES)
            residual[index] = values - ops.decompress(wire, (k,), torch.float32, VALUES)
            if velocity is not None:
                velocity[index] = 0.0
        else:
            index = torch.arange(k, device=flat.device)
            wire = ops.compress(torch.full((k,), math.nan, device=flat.device), VALUES)
        at = _Message.of(k)
        message = torch.zeros(at.bytes, dtype=torch.uint8, device=flat.device)
        message[: at.indices].view(INDEX).copy_(index)
        message[at.indices : at.end] = wire
        return message


def _add_up(messages: Tensor, k: int, bucket: Bucket) -> Tensor:
    """The sum of the messages, one a row, in rank order."""
    total, at = bucket.zeros(torch.float32), _Message.of(k)
    for message in messages:
        index, wire = message[: at.indices].view(INDEX), message[at.indices : at.end]
        # An index occurs once in a message, so that no order of additions matters but that of the ranks.
        total.index_add_(0, index, ops.decompress(wire, (k,), torch.float32, VALUES))
    return total


def largest(values: Tensor, k: int) -> Tensor:
    """The indices of the k largest magnitudes of a flat tensor, exactly k and exactly the largest, in any order.

    A threshold estimated from a sample throws most values out in one pass; the exact choice is made among the rest.
    """
    magnitudes = values.abs()
    n = values.numel()
    if n <= 4 * SAMPLE or 8 * k >= n:
        return torch.topk(magnitudes, k, sorted=False).indices
    sample = magnitudes[:: n // SAMPLE]
    expected = k * sample.numel() / n
    # Four standard deviations more than expected: the threshold is too high once in ten thousand times.
    rank = min(sample.numel(), math.ceil(expected + 4.0 * math.sqrt(expected) + 4.0))
    threshold = torch.topk(sample, rank, sorted=False).values.min()
    candidates = torch.nonzero(magnitudes >= threshold).view(-1)
    if candidates.numel() < k:
        return torch.topk(magnitudes, k, sorted=False).indices
    return candidates[torch.topk(magnitudes[candidates], k, sorted=False).indices]

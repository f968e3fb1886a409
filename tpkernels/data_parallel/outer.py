"""The outer optimizer of mode "local": makes the parameters of all ranks equal again after steps of each rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpkernels import ops

from .buckets import Bucket
from .rounds import Traffic


@dataclass(frozen=True)
class OuterSGD:
    """The outer optimizer of mode "local": SGD on the difference that the local steps made.

        delta = mean over the ranks of (anchor - parameter)
        m = momentum * m + delta
        anchor = anchor - lr * (delta + momentum * m if nesterov else m);  parameter = anchor

    Attributes:
        lr: 1 with momentum 0 makes the anchor the mean of the parameters: post-local SGD.
        momentum: in [0, 1).
        nesterov: look ahead by the momentum.

    Source: DiLoCo (arXiv:2311.08105: lr 0.7, momentum 0.9, Nesterov); post-local SGD (arXiv:1808.07217).
    """

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        if not self.lr > 0.0:
            raise ValueError(f"OuterSGD: lr must be above 0, got {self.lr}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"OuterSGD: momentum must be in [0, 1), got {self.momentum}")


class OuterLoop:
    """The anchor that all ranks share, in fp32 (fp64 for fp64 parameters), and the steps taken from it.

    Attributes:
        steps: local steps since the parameters were equal.
        rounds: averages so far.
        state: for each bucket the flat tensors "anchor" and, with momentum, "outer_momentum": the same on all ranks.
    """

    def __init__(self, traffic: Traffic, settings: OuterSGD) -> None:
        self._traffic, self._settings = traffic, settings
        self.steps = self.rounds = 0
        self.state: list[dict[str, Tensor]] = []
        for bucket in traffic.buckets:
            anchor = bucket.empty()
            for i, member in enumerate(bucket.members):
                bucket.part(anchor, i).copy_(member.parameter.detach())
            kept = {"anchor": anchor}
            if settings.momentum:
                kept["outer_momentum"] = torch.zeros_like(anchor)
            self.state.append(kept)

    @torch.no_grad()
    def step(self) -> None:
        """Average the parameters; a collective over the group.

        Raises:
            RuntimeError: a parameter is not finite on some rank; says which and where, on all ranks. Nothing changes.
            TimeoutError, PeerLostError: a rank was late, or died.
        """
        self._check_finite()
        traffic, futures = self._traffic, []
        for k, (bucket, kept) in enumerate(zip(traffic.buckets, self.state, strict=True)):
            delta = traffic.flat(self.rounds, k)
            for i, member in enumerate(bucket.members):
                torch.sub(bucket.part(kept["anchor"], i), member.parameter, out=bucket.part(delta, i))
            traffic.note("launch", k)
            futures.append(traffic.lane.submit(traffic.job(self.rounds, k)))
        deltas = [traffic.wait(future) for future in futures]  # all of them, before anything is changed
        for bucket, kept, mean in zip(traffic.buckets, self.state, deltas, strict=True):
            self._apply(bucket, kept, mean)
        self.steps = 0
        self.rounds += 1

    def restore_parameters(self) -> None:
        """Set the parameters to the anchor. The steps still count: all ranks average after as many."""
        for bucket, kept in zip(self._traffic.buckets, self.state, strict=True):
            for i, member in enumerate(bucket.members):
                member.parameter.detach().copy_(bucket.part(kept["anchor"], i))

    def _apply(self, bucket: Bucket, kept: dict[str, Tensor], delta: Tensor) -> None:
        settings = self._settings
        if settings.momentum:
            momentum = kept["outer_momentum"].mul_(settings.momentum).add_(delta)
            delta = delta.add(momentum, alpha=settings.momentum) if settings.nesterov else momentum
        kept["anchor"].sub_(delta, alpha=settings.lr)
        for i, member in enumerate(bucket.members):
            member.parameter.detach().copy_(bucket.part(kept["anchor"], i))

    def _check_finite(self) -> None:
        members = [member for bucket in self._traffic.buckets for member in bucket.members]
        bad = next((m.index for m in members if not bool(m.parameter.detach().isfinite().all())), -1)
        lane = self._traffic.lane
        mine = torch.tensor([bad], device=lane.group.device)
        asked = lane.submit(lambda: ops.all_gather(mine, group=lane.group, dim_size=lane.group.world_size))
        every = self._traffic.wait(asked).tolist()
        if any(index >= 0 for index in every):
            names = {member.index: member.name for member in members}
            found = "; ".join(f"rank {rank}: {names[i]!r}" for rank, i in enumerate(every) if i >= 0)
            raise RuntimeError(
                f"GradAggregator: a parameter is not finite after {self.steps} local steps ({found}), and averaging "
                f"would spread it; nothing was changed: go back to a checkpoint, or to the last average by "
                f"restore_parameters()"
            )

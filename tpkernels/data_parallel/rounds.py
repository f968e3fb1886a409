"""A round: the gradients of one step on their way over the ranks, from the first that is ready to the averages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.futures import Future

from tpkernels import ops
from tpkernels.comm.group import Group

from .buckets import Bucket
from .dense import State
from .lane import Lane
from .weights import Weights

Averages = dict[int, Tensor | None]
"""The average of each parameter by its index; None where no rank had a gradient."""


class Average(Protocol):
    """How a bucket is averaged; see DenseAverage and TopKAverage."""

    kinds: tuple[str, ...]

    def average(self, bucket: Bucket, flat: Tensor, state: State, step: int, group: Group) -> Tensor:
        """The average of flat over the group; a collective."""
        ...


class Traffic:
    """What rounds share: the buckets, their memory, the lane, and what is counted.

    Attributes:
        buckets: in the order in which their messages go out.
        flats: what is filled and sent, a set for each round that can be under way at once.
        state: what the average keeps, for each bucket.
        weights: how much this rank's gradients count.
        exposed_s: seconds that the training thread has waited for averages.
        events: when it is a list, ("ready", parameter index) and ("launch", bucket) are written down as they happen.
    """

    def __init__(self, lane: Lane, average: Average, sets: int, weights: Weights) -> None:
        self.lane, self.average, self._sets, self.weights = lane, average, sets, weights
        self.buckets: list[Bucket] = []
        self.state: list[State] = []
        self.exposed_s = 0.0
        self.events: list[tuple[str, int]] | None = None
        self.place: dict[int, tuple[int, int]] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the average keeps for each bucket."""
        return self.average.kinds

    def lay_out(self, buckets: Sequence[Bucket], state: list[State]) -> None:
        """Take these buckets from now on; no round may be under way."""
        self.buckets, self.state = list(buckets), state
        self.flats = [[bucket.empty() for bucket in buckets] for _ in range(self._sets)]
        self.place = {m.index: (k, i) for k, bucket in enumerate(buckets) for i, m in enumerate(bucket.members)}

    def wait(self, future: Future[Tensor]) -> Tensor:
        """What a job on the lane gives, in the training thread."""
        start = time.perf_counter()
        try:
            return future.wait()
        finally:
            self.exposed_s += time.perf_counter() - start

    def note(self, what: str, number: int) -> None:
        """Write an event down, if somebody wants to know."""
        if self.events is not None:
            self.events.append((what, number))


class Round:
    """One step: `ready` for each gradient, `complete` when no more will come, `finish` for the averages.

    The messages of all buckets go out in their order, each as soon as it is full and those before it are gone, so that
    all ranks send the same whatever the order in which their gradients come. A last small message says which
    parameters have a gradient on any rank; where only some ranks have one, the others add zeros.
    """

    def __init__(self, traffic: Traffic, step: int) -> None:
        traffic.lane.check()
        self._traffic, self.step = traffic, step
        self._scale = traffic.weights.scale(traffic.lane.group.world_size)
        self._buckets, self._flats = traffic.buckets, traffic.flats[step % len(traffic.flats)]
        self._missing = [len(bucket.members) for bucket in self._buckets]
        self._came: dict[int, None] = {}  # in the order in which they came
        self._futures: list[Future[Tensor]] = []
        self._control: Future[Tensor] | None = None
        self._has: Tensor | None = None
        self._averages: Averages | None = None

    @property
    def order(self) -> list[int]:
        """The indices of all parameters in the order in which their gradients came; those without one last."""
        return [*self._came, *(i for i in self._traffic.place if i not in self._came)]

    @property
    def is_complete(self) -> bool:
        """Whether everything has been sent off."""
        return self._control is not None

    def has(self, index: int) -> bool:
        """Whether the gradient of this parameter has come."""
        return index in self._came

    def ready(self, index: int, gradient: Tensor) -> None:
        """The gradient of a parameter is there; it is copied. Sends what has become full."""
        self._came[index] = None
        self._traffic.note("ready", index)
        self._put(index, gradient)

    def complete(self, gradients: Callable[[int], Tensor | None]) -> None:
        """No more gradients will come by themselves: take what there is of the missing ones, else zeros; send all.

        Args:
            gradients: the gradient that a parameter has by now, by its index.
        """
        if self.is_complete:
            return
        for index in [i for i in self._traffic.place if i not in self._came]:
            gradient = gradients(index)
            if gradient is not None:
                self._came[index] = None
            self._put(index, gradient)
        has = torch.zeros(len(self._traffic.place), dtype=torch.uint8)
        has[list(self._came)] = 1
        lane = self._traffic.lane
        # Kept until the answer is there: on a GPU the lane's stream reads it later, and torch does not know of that.
        self._has = has = has.to(lane.group.device)
        self._control = lane.submit(lambda: ops.all_reduce(has, group=lane.group, op="max"))

    def finish(self) -> Averages:
        """Wait for the averages; views of memory that nobody else uses.

        Raises:
            TimeoutError, PeerLostError, RankMismatchError: a rank did not come, died, or sent something else.
        """
        if self._averages is None:
            assert self._control is not None
            means = [self._traffic.wait(future) for future in self._futures]
            has = self._traffic.wait(self._control).tolist()
            self._has = None
            self._averages = {
                member.index: bucket.part(mean, i) if has[member.index] else None
                for bucket, mean in zip(self._buckets, means, strict=True)
                for i, member in enumerate(bucket.members)
            }
            self._futures.clear()
        return self._averages

    def _put(self, index: int, gradient: Tensor | None) -> None:
        k, position = self._traffic.place[index]
        part = self._buckets[k].part(self._flats[k], position)
        if gradient is None:
            part.zero_()
        else:
            part.copy_(gradient)
            if self._scale != 1.0:
                part.mul_(self._scale)
        self._missing[k] -= 1
        while len(self._futures) < len(self._buckets) and self._missing[len(self._futures)] == 0:
            self._launch(len(self._futures))

    def _launch(self, k: int) -> None:
        traffic = self._traffic
        traffic.note("launch", k)
        average, state = traffic.average.average, traffic.state[k]
        job = partial(average, self._buckets[k], self._flats[k], state, self.step, traffic.lane.group)
        self._futures.append(traffic.lane.submit(job))

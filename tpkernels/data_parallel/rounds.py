"""A round: the messages of one step, from the first gradient that is ready to the averages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

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
        """The average over the group; a collective.

        Args:
            bucket: of the message.
            flat: [bucket.numel], the dtype of the bucket: the values of this rank.
            state: of the bucket: fp32 tensors [bucket.numel] by kind, which are updated in place.
            step: number of the round.
            group: the ranks.

        Returns:
            [bucket.numel], the dtype of the bucket, the same bits on all ranks; or this rank's even part of it.
        """
        ...

    def part(self, bucket: Bucket, mean: Tensor, position: int, group: Group) -> Tensor:
        """The values of one member in what `average` has returned: a view."""
        ...


class Traffic:
    """The state that all rounds share: the buckets, their memory, the lane, counters.

    Args:
        lane: sends the messages.
        average: of a bucket.
        sets: rounds that can be in flight at once.
        weights: of this rank's gradients.
        drop: free each gradient once it is in its message, and each message once it has arrived.

    Attributes:
        buckets: in the order of their messages.
        state: of the average, for each bucket.
        exposed_s: seconds that the training thread has waited for averages.
        events: when it is a list, ("ready", parameter index) and ("launch", bucket) are appended as they happen.
        place: of each parameter by index: (bucket, position in it).
    """

    def __init__(self, lane: Lane, average: Average, sets: int, weights: Weights, *, drop: bool = False) -> None:
        self.lane, self.average, self._sets, self.weights, self.drop = lane, average, sets, weights, drop
        self.buckets: list[Bucket] = []
        self.state: list[State] = []
        self.exposed_s = 0.0
        self.events: list[tuple[str, int]] | None = None
        self.place: dict[int, tuple[int, int]] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of state of the average."""
        return self.average.kinds

    def lay_out(self, buckets: Sequence[Bucket], state: list[State]) -> None:
        """Use these buckets, with their state, from now on; no round may be in flight."""
        self.buckets, self.state = list(buckets), state
        self._flats: list[dict[int, Tensor]] = [{} for _ in range(self._sets)]
        self.place = {m.index: (k, i) for k, bucket in enumerate(buckets) for i, m in enumerate(bucket.members)}

    def flat(self, step: int, k: int) -> Tensor:
        """The memory of the message of bucket k in a round, made when it is first needed."""
        flats = self._flats[step % self._sets]
        if k not in flats:
            flats[k] = self.buckets[k].empty()
        return flats[k]

    def job(self, step: int, k: int) -> Callable[[], Tensor]:
        """The average of a message, for the lane."""
        average, bucket, state, group = self.average.average, self.buckets[k], self.state[k], self.lane.group
        flat = self.flat(step, k)
        if not self.drop:
            return partial(average, bucket, flat, state, step, group)
        del self._flats[step % self._sets][k]
        return partial(_freed_later, average, bucket, flat, state, step, group)

    def wait(self, future: Future[Tensor]) -> Tensor:
        """The result of a job on the lane, for the training thread; its wait is counted."""
        start = time.perf_counter()
        try:
            return future.wait()
        finally:
            self.exposed_s += time.perf_counter() - start

    def note(self, what: str, number: int) -> None:
        """Append an event, if `events` is a list."""
        if self.events is not None:
            self.events.append((what, number))


class Round:
    """One step: `ready` for each gradient, `complete` after the last one, `finish` for the averages.

    The messages are sent in the order of the buckets, each as soon as it is full and those before it are sent, so that
    all ranks send the same in any order of their gradients. A last small message carries which parameters have a
    gradient on any rank; where only some ranks have one, the others add zeros.
    """

    def __init__(self, traffic: Traffic, step: int) -> None:
        traffic.lane.check()
        self._traffic, self.step = traffic, step
        self._scale = traffic.weights.scale(traffic.lane.group.world_size)
        self._buckets = traffic.buckets
        self._missing = [len(bucket.members) for bucket in self._buckets]
        self._reported: dict[int, None] = {}  # indices of the gradients, in their order
        self._futures: list[Future[Tensor]] = []
        self._control: Future[Tensor] | None = None
        self._has: Tensor | None = None
        self._averages: Averages | None = None

    @property
    def order(self) -> list[int]:
        """The indices of all parameters in the order of their gradients; those without one last."""
        return [*self._reported, *(i for i in self._traffic.place if i not in self._reported)]

    @property
    def is_complete(self) -> bool:
        """Whether everything has been sent off."""
        return self._control is not None

    def has(self, index: int) -> bool:
        """Whether there was a gradient of this parameter."""
        return index in self._reported

    def ready(self, index: int, gradient: Tensor) -> None:
        """Copy the gradient of a parameter into its bucket, and send the buckets that are full."""
        self._reported[index] = None
        self._traffic.note("ready", index)
        self._put(index, gradient)

    def complete(self, gradients: Callable[[int], Tensor | None]) -> None:
        """End the backward pass: take the gradients that the hooks did not report, else zeros, and send all buckets.

        Args:
            gradients: the present gradient of a parameter, by its index.
        """
        if self.is_complete:
            return
        for index in [i for i in self._traffic.place if i not in self._reported]:
            gradient = gradients(index)
            if gradient is not None:
                self._reported[index] = None
            self._put(index, gradient)
        has = torch.zeros(len(self._traffic.place), dtype=torch.uint8)
        has[list(self._reported)] = 1
        lane = self._traffic.lane
        # Kept until the result is there: on a GPU the lane's stream reads it later, and torch could free it before.
        self._has = has = has.to(lane.group.device)
        self._control = lane.submit(lambda: ops.all_reduce(has, group=lane.group, op="max"))

    def finish(self) -> Averages:
        """Wait for the averages; views of memory that no later round uses.

        Raises:
            TimeoutError, PeerLostError, RankMismatchError: a rank was late, died, or sent another message.
        """
        if self._averages is None:
            assert self._control is not None
            means = [self._traffic.wait(future) for future in self._futures]
            has = self._traffic.wait(self._control).tolist()
            self._has = None
            average, group = self._traffic.average, self._traffic.lane.group
            self._averages = {
                member.index: average.part(bucket, mean, i, group) if has[member.index] else None
                for bucket, mean in zip(self._buckets, means, strict=True)
                for i, member in enumerate(bucket.members)
            }
            self._futures.clear()
        return self._averages

    def _put(self, index: int, gradient: Tensor | None) -> None:
        k, position = self._traffic.place[index]
        part = self._buckets[k].part(self._traffic.flat(self.step, k), position)
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
        self._futures.append(traffic.lane.submit(traffic.job(self.step, k)))


def _freed_later(average: Callable[..., Tensor], bucket: Bucket, flat: Tensor, *rest: Any) -> Tensor:
    """Average a message that nothing else refers to: its memory is free when the lane's stream has read it."""
    if flat.is_cuda:
        flat.record_stream(torch.cuda.current_stream(flat.device))
    return average(bucket, flat, *rest)

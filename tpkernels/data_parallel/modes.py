"""The modes of a GradAggregator: which average a step applies, and when.

Synchronous applies the average of the step itself, Delayed that of the step before, Local averages parameters after
several steps of each rank. All send through one Sender; what is sent (dense or the largest values) is an Average.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tpkernels.comm.group import Group

from .buckets import fill_state, state_by_name
from .checks import WHO, set_gradient_dtype
from .flat import stepped
from .outer import OuterLoop, OuterSGD
from .rounds import Averages, Round
from .sender import Sender
from .state import AggregatorState


class Mode(Protocol):
    """A training loop as the aggregator drives it; `GradAggregator` has the contract of each call."""

    name: str

    def wait(self) -> bool:
        """Put averages into p.grad; whether there is something to apply."""

    def after_step(self) -> bool:
        """Count a step of the optimizer; whether parameters were averaged."""

    def drain(self) -> bool:
        """End what is in flight; whether p.grad holds an average to apply."""

    def weigh(self, weight: float | Tensor) -> None:
        """Set the weight of this rank's gradients."""

    def weigh_batches(self, batches: int) -> None:
        """Set it to the number of batches that this rank has in a turn of `join`."""

    def rescale(self, factor: float) -> None:
        """Bring everything that is in units of the gradients to a new loss scale."""

    def restore_parameters(self) -> None:
        """Undo the local steps since the last average."""

    def kept(self) -> dict[str, Tensor]:
        """The tensors that every state has, as "<kind>.<parameter>": views."""

    def in_flight(self) -> dict[str, Tensor] | None:
        """The averages that no step has applied yet, as "average.<parameter>"; None when none is in flight."""

    def numbers(self) -> dict[str, Any]:
        """The numbers of the state that depend on the mode."""

    def load(self, state: AggregatorState) -> None:
        """Continue from a state that was checked."""


class Synchronous:
    """Mode "sync": each step applies its own average.

    Args:
        group: the ranks, for messages.
        sender: of the model's gradients; begins to take them.
    """

    name = "sync"

    def __init__(self, group: Group, sender: Sender) -> None:
        self._group, self._sender, self._traffic = group, sender, sender.traffic
        set_gradient_dtype(sender.members)
        sender.listen()

    def wait(self) -> bool:
        """Put the averages of this step into p.grad."""
        self._deliver(self._sent().finish())
        return True

    def after_step(self) -> bool:
        """Do nothing: the replicas are equal after each step."""
        return False

    def drain(self) -> bool:
        """Do nothing: nothing is in flight between steps."""
        return False

    def weigh(self, weight: float | Tensor) -> None:
        """See Weights.set."""
        self._traffic.weights.set(weight, self._traffic.lane)

    def weigh_batches(self, batches: int) -> None:
        """The average is over the ranks that have a batch."""
        self.weigh(batches)

    def rescale(self, factor: float) -> None:
        """Scale the residuals, which are in units of the gradients."""
        for kept in self._traffic.state:
            for flat in kept.values():
                flat.mul_(factor)

    def restore_parameters(self) -> None:
        """Raise RuntimeError: there are no local steps."""
        raise RuntimeError(f"{WHO}.restore_parameters: mode must be 'local', got {self.name!r}")

    def kept(self) -> dict[str, Tensor]:
        """What the average keeps: residuals, velocities."""
        return state_by_name(self._traffic.buckets, self._traffic.state)

    def in_flight(self) -> dict[str, Tensor] | None:
        """None: each step applies its own average."""
        return None

    def numbers(self) -> dict[str, Any]:
        """Counters; no local steps."""
        return {"local_step": 0, "rounds": self._sender.step}

    def load(self, state: AggregatorState) -> None:
        """Take the residuals."""
        self._sender.load(state)

    def _sent(self) -> Round:
        """The round of this step, all of it sent."""
        current = self._sender.complete()
        if current is None:
            raise RuntimeError(
                f"{WHO}.wait: rank {self._group.rank} of group {self._group.label!r} has had no gradient since the "
                f"last wait(): call it once after each backward pass"
            )
        return current

    def _deliver(self, averages: Averages) -> None:
        factor = self._traffic.weights.factor(self._group.world_size)
        for member in self._sender.members:
            average, target = averages.get(member.index), stepped(member.parameter)
            if average is not None and factor != 1.0:
                average.mul_(factor)
            if average is not None and average.stride() != target.stride():
                # Fused optimizers take the strides of a parameter for those of its gradient, too.
                average = torch.empty_like(target, dtype=average.dtype).copy_(average)
            member.parameter.grad = None  # where it is not stepped itself, this rank's own gradient would be left
            target.grad = average


class Delayed(Synchronous):
    """Mode "delayed": each step applies the average of the step before, and its own is in flight meanwhile.

    Args:
        warmup_steps: first steps that apply their own average.
    """

    name = "delayed"

    def __init__(self, group: Group, sender: Sender, warmup_steps: int) -> None:
        super().__init__(group, sender)
        self._warmup_steps = warmup_steps
        self._last: Round | _Loaded | None = None  # whose averages no step has applied yet

    def wait(self) -> bool:
        """Put the averages of the step before into p.grad; in the first delayed step there are none."""
        late = self._sender.step >= self._warmup_steps
        current: Round | _Loaded | None = self._sent()
        if late:
            current, self._last = self._last, current
        self._deliver({} if current is None else current.finish())
        return current is not None

    def drain(self) -> bool:
        """Put the averages in flight into p.grad."""
        if self._last is None:
            return False
        averages, self._last = self._last.finish(), None
        self._deliver(averages)
        return True

    def rescale(self, factor: float) -> None:
        """Scale the averages in flight, too."""
        for average in self._averages().values():
            if average is not None:
                average.mul_(factor)
        super().rescale(factor)

    def in_flight(self) -> dict[str, Tensor] | None:
        """The averages in flight, once they have arrived; None when none is in flight."""
        if self._last is None:
            return None
        names = {member.index: member.name for member in self._sender.members}
        return {f"average.{names[i]}": average for i, average in self._averages().items() if average is not None}

    def load(self, state: AggregatorState) -> None:
        """Take the averages in flight, too."""
        self._averages()  # no round may be under way when the buckets change
        super().load(state)
        self._last = None
        if state["numbers"]["in_flight"]:
            found = {m.index: state["tensors"].get(f"average.{m.name}") for m in self._sender.members}
            self._last = _Loaded({i: None if average is None else average.clone() for i, average in found.items()})

    def _averages(self) -> Averages:
        return {} if self._last is None else self._last.finish()


class _Loaded:
    """The averages of a round that another aggregator sent."""

    def __init__(self, averages: Averages) -> None:
        self._averages = averages

    def finish(self) -> Averages:
        """They have arrived."""
        return self._averages


class Local:
    """Mode "local": every rank makes steps of its own, then an outer optimizer makes the parameters equal again.

    Args:
        sender: of the model's gradients, of which it takes none; lays out the messages.
        steps: of the optimizer, between two averages.
        outer: the outer optimizer.
    """

    name = "local"

    def __init__(self, sender: Sender, steps: int, outer: OuterSGD) -> None:
        self._sender, self._traffic = sender, sender.traffic
        self._steps, self._settings = steps, outer
        self._outer = OuterLoop(self._traffic, outer)

    def wait(self) -> bool:
        """Leave the gradients of this rank as they are."""
        return True

    def after_step(self) -> bool:
        """Count the step, and average when it is the last one before an average."""
        self._outer.steps += 1
        if self._outer.steps < self._steps:
            return False
        self._outer.step()
        return True

    def drain(self) -> bool:
        """Average the parameters if there were steps since they were equal; no gradient is left to apply."""
        if self._outer.steps > 0:
            self._outer.step()
        return False

    def weigh(self, weight: float | Tensor) -> None:
        """Raise RuntimeError: gradients are not averaged."""
        raise RuntimeError(f"{WHO}.weigh: mode must be 'sync' or 'delayed', got {self.name!r}")

    def weigh_batches(self, batches: int) -> None:
        """Do nothing: a rank without a batch makes no step of its own."""

    def rescale(self, factor: float) -> None:
        """Do nothing: residuals are in units of the parameters."""

    def restore_parameters(self) -> None:
        """Set the parameters to the last average."""
        self._outer.restore_parameters()

    def kept(self) -> dict[str, Tensor]:
        """Residuals of the messages, and the anchor and momentum of the outer optimizer."""
        traffic = self._traffic
        return state_by_name(traffic.buckets, traffic.state) | state_by_name(traffic.buckets, self._outer.state)

    def in_flight(self) -> dict[str, Tensor] | None:
        """None: `after_step` waits for the average."""
        return None

    def numbers(self) -> dict[str, Any]:
        """Local steps since the last average, and the number of averages."""
        return {"local_step": self._outer.steps, "rounds": self._outer.rounds}

    def load(self, state: AggregatorState) -> None:
        """Take residuals, anchor, momentum and counters; the parameters are loaded with the model."""
        self._sender.load(state)
        self._outer = OuterLoop(self._traffic, self._settings)
        self._outer.steps, self._outer.rounds = state["numbers"]["local_step"], state["numbers"]["rounds"]
        fill_state(self._traffic.buckets, self._outer.state, state["tensors"])

"""Forward passes of several flights of sequences through the stages of a model, for generation."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

from tpkernels.comm.group import Group
from tpkernels.pipeline.messages import Messages
from tpkernels.pipeline.stages import HeldStages

T = TypeVar("T")


class Flights:
    """Runs the stages of a model forward; while one stage computes a flight, the others compute the next ones.

    A flight is a batch of sequences that pass the stages together. Every rank makes the same calls in the same order,
    and what the last stage draws goes to all others:

        for step in range(steps):
            for flight in range(flights.count):
                if step > 0:
                    tokens = flights.receive_tokens(flight, rows)
                logits = flights.run(flight, (rows, length), lambda: model(...))     # None on all but the last stage
                if logits is not None:
                    flights.send_tokens(flight, draw(logits))

    Args:
        stages: of the model; this rank holds one, that of its number. None: the whole model.
        group: the ranks of the pipeline, on the CPU; None with the whole model.
        count: flights. As many as stages keep all of them busy; one alone passes through one stage at a time.

    Raises:
        ValueError: this rank holds other stages, or the group is on GPUs.
    """

    def __init__(self, stages: HeldStages | None, group: Group | None, count: int) -> None:
        self.count, self._stages = count, stages
        self._stage, self._last = 0, 0
        self._messages: list[Messages] = []
        self._tokens: list[Tensor | None] = [None] * count
        if stages is None or group is None:
            return
        if not group.is_cpu or stages.held != (group.rank,) or len(stages.split.stages) != group.world_size:
            raise ValueError(
                f"Flights: rank {group.rank} of {group.world_size} on the CPU must hold stage {group.rank} of "
                f"{group.world_size}, got stages {list(stages.held)} of {len(stages.split.stages)} on {group.device}"
            )
        self._stage, self._last = group.rank, group.world_size - 1
        self._messages = [Messages(group, "none", "none") for _ in range(count)]

    def run(self, flight: int, signature: Hashable, forward: Callable[[], T]) -> T | None:
        """Run this rank's stage for a flight.

        Args:
            signature: the same for all passes of a flight whose hidden states have the same shapes.
            forward: calls the whole model.

        Returns:
            what `forward` returns, on the last stage; None on the others.

        Raises:
            TimeoutError, PeerLostError: another stage is late or lost; names it.
        """
        if self._stages is None:
            return forward()
        messages, stage = self._messages[flight], self._stage
        received = messages.receive(stage, flight, signature) if stage > 0 else None
        messages.flush()  # those of the pass before, which have been taken when this one begins
        output: Any = self._stages.call(stage, received, forward)
        if stage == self._last:
            return output  # type: ignore[no-any-return]
        messages.send(stage + 1, flight, output, signature)
        return None

    def send_tokens(self, flight: int, tokens: Tensor) -> None:
        """On the last stage: send the tokens of a flight, int64 [rows], to all others."""
        self._tokens[flight] = tokens
        if self._messages:
            self._messages[flight].send_to_all(flight, tokens)

    def receive_tokens(self, flight: int, count: int) -> Tensor:
        """The tokens of a flight that the last stage has sent, int64 [count]; on the last stage, those that it sent.

        Args:
            count: rows of the flight.
        """
        mine = self._tokens[flight]
        return mine if mine is not None else self._messages[flight].receive_from_last(flight, count)

    def end(self) -> None:
        """Wait until the others have taken what this rank has sent."""
        for messages in self._messages:
            messages.flush()

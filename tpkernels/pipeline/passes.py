"""The passes of one step on one rank: forward, backward, and a backward pass in two halves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tpkernels.pipeline.batches import Batch, signature_of
from tpkernels.pipeline.messages import Kind, Messages
from tpkernels.pipeline.orders import BACKWARD, INPUT, Action
from tpkernels.pipeline.stages import HeldStages


class Aggregator(Protocol):
    """The part of a GradAggregator that a pipeline needs."""

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """A context in which gradients are accumulated and not sent."""

    def accumulated(self) -> None:
        """Gradients were added to p.grad, of which no backward pass has told."""


class Running(Protocol):
    """The part of a Pipeline that the passes of a step need."""

    model: nn.Module
    stages: HeldStages
    aggregator: Aggregator | None
    _messages: Messages
    _count: int
    _forward: Callable[..., Tensor]


class Passes:
    """The passes of one step on one rank."""

    def __init__(self, pipe: Running, micros: list[Batch], shares: list[float], scale: float) -> None:
        self._pipe, self._micros, self._shares, self._scale = pipe, micros, shares, scale
        self._messages, self._last = pipe._messages, pipe._count - 1
        self._signatures = [signature_of(micro) for micro in micros]
        self._received: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._kinds: dict[tuple[int, int], Kind] = {}
        self._halves: dict[tuple[int, int], Any] = {}
        self.loss = torch.zeros(1, dtype=torch.float64)
        self.busy_s = 0.0

    def expect(self, action: Action) -> None:
        """Let the input of an action arrive."""
        _, stage, micro = action
        if action.forward and stage > 0:
            if (stage, micro) not in self._received:
                self._messages.expect(stage, micro, self._signatures[micro])
        elif action.kind in (BACKWARD, INPUT) and (stage, micro) in self._kinds:
            self._messages.expect_gradient(stage, micro, self._kinds[stage, micro])

    def forward(self, action: Action) -> None:
        """The forward pass of an action; its output is on its way to the next stage."""
        _, stage, micro = action
        pipe = self._pipe
        received = self._messages.receive(stage, micro, self._signatures[micro]) if stage > 0 else None
        begin = time.perf_counter()
        output = pipe.stages.call(stage, received, lambda: pipe._forward(pipe.model, **self._micros[micro]))
        if stage == self._last:
            output = self._weighted(output, self._shares[micro])
        self.busy_s += time.perf_counter() - begin
        if stage < self._last:
            self._kinds[stage, micro] = Kind.of(output)
            self._messages.send(stage + 1, micro, output, self._signatures[micro])
        if torch.is_grad_enabled():
            self._received[stage, micro], self._outputs[stage, micro] = received, output

    def _weighted(self, loss: Any, share: float) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"Pipeline: forward must return a loss, a tensor of one value, got {got}")
        if share == 0.0:  # no label counts: a mean over nothing is NaN, and has no part in the loss
            return torch.zeros(())
        self.loss += loss.detach().double().cpu().reshape(1) * share
        return loss * (share * self._scale)

    def backward(self, action: Action, *, last: bool) -> None:
        """The backward pass of an action; the gradient of its input is on its way to the stage before.

        Args:
            last: of this rank in the step: gradients are then sent to the replicas.
        """
        _, stage, micro = action
        received, output = self._received.pop((stage, micro)), self._outputs.pop((stage, micro))
        gradient = self._gradient(stage, micro, output)
        self._accumulate(output, gradient, send=last)
        self._send_back(stage, micro, received)

    def backward_of_input(self, action: Action) -> None:
        """The gradient of the input of a stage alone, on its way to the stage before; `backward_of_weights` follows.

        The first stage, which has no input, and one whose input needs no gradient leave all to that.
        """
        from torch.distributed.pipelining._backward import stage_backward_input

        _, stage, micro = action
        received, output = self._received.pop((stage, micro)), self._outputs.pop((stage, micro))
        gradient = self._gradient(stage, micro, output)
        if received is None or not received.requires_grad or not output.requires_grad:
            self._halves[stage, micro] = (output, gradient)
            self._send_back(stage, micro, received)
            return
        begin = time.perf_counter()
        output = output.clone() if output._is_view() else output  # it is detached in place
        gradients = None if gradient is None else [gradient]
        _, self._halves[stage, micro] = stage_backward_input([output], gradients, [received], self._weights(stage))
        self.busy_s += time.perf_counter() - begin
        self._send_back(stage, micro, received)

    def backward_of_weights(self, action: Action) -> None:
        """The gradients of the weights, from what `backward_of_input` has left."""
        from torch.distributed.pipelining._backward import stage_backward_weight

        _, stage, micro = action
        half = self._halves.pop((stage, micro))
        if isinstance(half, tuple):
            self._accumulate(*half, send=False)
            return
        begin = time.perf_counter()
        stage_backward_weight(self._weights(stage), half)
        self.busy_s += time.perf_counter() - begin

    def _weights(self, stage: int) -> Iterator[nn.Parameter]:
        return (p for p in self._pipe.stages.parameters_of(stage).values() if p.requires_grad)

    def _gradient(self, stage: int, micro: int, output: Tensor) -> Tensor | None:
        """That of the output of a stage, from the stage behind it; None of the loss, and where there is none."""
        if stage == self._last or not output.requires_grad:
            return None
        return self._messages.receive_gradient(stage, micro, self._kinds[stage, micro])

    def _accumulate(self, output: Tensor, gradient: Tensor | None, *, send: bool) -> None:
        aggregator = self._pipe.aggregator
        begin = time.perf_counter()
        with contextlib.nullcontext() if send or aggregator is None else aggregator.no_sync():
            if output.requires_grad:
                torch.autograd.backward(output, gradient)
        self.busy_s += time.perf_counter() - begin

    def _send_back(self, stage: int, micro: int, received: Tensor | None) -> None:
        if received is not None and received.requires_grad:
            found = received.grad
            self._messages.send_gradient(stage - 1, micro, torch.zeros_like(received) if found is None else found)

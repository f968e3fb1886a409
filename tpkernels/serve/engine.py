"""The engine of rank 0: a queue of requests, and a thread that generates one token of all active sequences a step.

A waiting request takes a slot as soon as one is free, between two steps of the others, which wait for MOST_TOKENS of
prompts at most, or for one prompt. Short prompts are computed together where that changes no bit of them
(SlotDecoder.fill), else each by itself, without padding, so that its answer does not depend on other requests.
"""

from __future__ import annotations

import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpkernels.comm.group import Group
from tpkernels.errors import PeerLostError, RankMismatchError
from tpkernels.generate import Sampling
from tpkernels.generate.continuation import Continuation, ends_of
from tpkernels.generate.sampling import NOT_A_NUMBER, Sampler

from .channel import Channel, Step, carry_out
from .metrics import Metrics

_log = logging.getLogger("tpkernels")
STOPPING = "the server is stopping"
NAN = "the model's logits hold NaN"
MOST_TOKENS = 256  # of prompts that begin in one step
HEARTBEAT_S = 0.5  # between empty steps; a dead rank is noticed at the next one


class Refusal(Exception):
    """A request that is not, or no longer, served; `status` is that of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Event:
    """A change of a request: new text, its end, or its failure."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    failure: Refusal | None = None

    @property
    def last(self) -> bool:
        """Whether this is the last event of its request."""
        return self.finish is not None or self.failure is not None


@dataclass(eq=False)
class SequenceRequest:
    """A sequence to be generated.

    Attributes:
        prompt: token ids.
        deliver: called with every Event, in the engine's thread; it must not block.
    """

    prompt: list[int]
    sampling: Sampling
    deliver: Callable[[Event], None]
    cancelled: bool = False
    came: float = field(default_factory=time.monotonic)
    slot: int = -1
    token: int = -1
    running: Any = None
    sampler: Any = None


class Engine:
    """Serves requests with a decoder that all ranks step together; the others run `channel.follow`.

    Args:
        decoder: a SlotDecoder.
        tokenizer: of the model.
        group: the ranks; this must be rank 0.
        most_waiting: requests that may wait for a slot.
        metrics: updated at each step.

    Attributes:
        passes, last_pass: how many forward passes were made, and when the last one ended (time.monotonic()).
        last_step: when the last step ended, which may have had nothing to do.
        sick: what was wrong with the logits of the last probe; None while they are numbers.
    """

    def __init__(self, decoder: Any, tokenizer: Any, group: Group, most_waiting: int, metrics: Metrics) -> None:
        self.tokenizer, self.metrics = tokenizer, metrics
        self.max_length: int = decoder.max_length
        self.vocab_size: int = decoder.vocab_size
        self._decoder, self._group, self._most_waiting = decoder, group, most_waiting
        self._ends = ends_of(decoder.model, tokenizer)
        self._channel = Channel(group, decoder.slots)
        self._waiting: deque[SequenceRequest] = deque()
        self._active: dict[int, SequenceRequest] = {}
        self._free = list(range(decoder.slots))
        self._changed = threading.Condition()
        self._draining = self._stopping = self._probing = False
        self._failure: str | None = None
        self._heartbeat = min(HEARTBEAT_S, group.timeout_s / 4)
        self.passes, self.last_pass, self.last_step = 0, -math.inf, time.monotonic()
        self.sick: str | None = None
        self.error: BaseException | None = (
            None  # the exception that ended the thread; None while it runs and after `stop`
        )
        self._thread = threading.Thread(target=self._run, name="tpkernels-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why nothing is served any more; None while requests are served."""
        return self._failure

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is about to stop."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        with self._changed:
            return not self._waiting and not self._active

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Queue all of them or none.

        Raises:
            Refusal: 503 when a rank is gone or the server stops, 429 when too many wait, 400 when they would be too
                many for an idle server.
        """
        most = self._most_waiting + self._decoder.slots
        if len(requests) > most:
            raise Refusal(400, f"a request may have {most} sequences (prompts times n), got {len(requests)}")
        with self._changed:
            if self._failure is not None:
                raise Refusal(503, f"the model is not available: {self._failure}")
            if self._draining or self._stopping:
                raise Refusal(503, STOPPING)
            if len(self._waiting) + len(requests) > self._most_waiting + len(self._free):
                raise Refusal(429, f"{len(self._waiting)} requests are waiting, and {self._most_waiting} may")
            self._waiting.extend(requests)
            self._count()
            self._changed.notify()

    def cancel(self, request: SequenceRequest) -> None:
        """Drop a request: no more events are delivered, and its slot is free before the next step."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def probe(self) -> None:
        """Schedule a forward pass of one token on all ranks; active sequences make one anyway."""
        with self._changed:
            self._probing = True
            self._changed.notify()

    def drain(self) -> None:
        """Refuse new requests; those that wait or run go on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """Fail all requests, stop the other ranks, and wait for the thread to end its step."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(self._group.timeout_s)

    def _run(self) -> None:
        why = STOPPING
        try:
            while not self._stopping:
                self._step()
            self._channel.send(Step(stop=True))
        except (TimeoutError, PeerLostError, RankMismatchError) as error:
            self.error, why = error, f"{type(error).__name__}: {error}"
        except BaseException as error:
            self.error, why = error, f"the engine failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._fail_all(why)
            if not self._stopping:
                self._group.close()  # so that the other ranks need not wait for their deadline

    def _step(self) -> None:
        """Admit requests and generate one token of each sequence; without any, wait for a heartbeat."""
        with self._changed:
            if not self._waiting and not self._active and not self._stopping and not self._probing:
                self._changed.wait(self._heartbeat)
            begin = self._admit()
            going_on = {slot: r.token for slot, r in self._active.items() if slot not in begin}
            probe = self._probing and not self._active
        prompts = {0: [0]} if probe else {slot: r.prompt for slot, r in begin.items()}
        step = Step(going_on, prompts, together=self._decoder.fills_together)
        self._channel.send(step)
        found = carry_out(self._decoder, step)
        if probe:
            self.sick = NAN if Sampler(Sampling()).draw(found.pop(0)) == NOT_A_NUMBER else None
        self.last_step = time.monotonic()
        if step.tokens or step.begin:
            self._probing, self.last_pass = False, self.last_step
            self.passes += 1
        for slot, logits in found.items():
            request = self._active[slot]
            if not request.cancelled:
                self._take(request, logits)

    def _admit(self) -> dict[int, SequenceRequest]:
        """Free the slots of cancelled requests, and give free slots to waiting ones."""
        for request in [r for r in self._active.values() if r.cancelled]:
            self._release(request)
        begin, tokens = dict[int, SequenceRequest](), 0
        while self._waiting and self._free:
            tokens += len(self._waiting[0].prompt)
            if begin and tokens > MOST_TOKENS:
                break
            request = self._waiting.popleft()
            if request.cancelled:
                tokens -= len(request.prompt)
                continue
            slot = request.slot = heapq.heappop(self._free)  # the lowest: the fewer rows, the faster the step
            request.running = Continuation(request.prompt, request.sampling, self.tokenizer, self._ends)
            request.sampler = Sampler(request.sampling)
            self._active[slot] = begin[slot] = request
        self._count()
        return begin

    def _count(self) -> None:
        self.metrics.queue.set(len(self._waiting))
        self.metrics.running.set(len(self._active))

    def _take(self, request: SequenceRequest, logits: Tensor) -> None:
        """Draw and deliver the next token of a request; what fails in that ends this request alone."""
        first = request.token < 0
        try:
            token = request.sampler.draw(logits)
            text = request.running.push(token)
        except FloatingPointError as error:
            self._end(request, Event(failure=Refusal(500, str(error))))
            return
        except Exception as error:
            _log.exception("serve: a token could not be drawn or become text")
            self._end(request, Event(failure=Refusal(500, f"the server failed: {type(error).__name__}: {error}")))
            return
        request.token = token
        self.metrics.generated(len(request.prompt) if first else 0, time.monotonic() - request.came if first else None)
        event = Event(text, request.running.tokens, request.running.finish)
        if event.last:
            self._end(request, event)
        else:
            request.deliver(event)

    def _end(self, request: SequenceRequest, event: Event) -> None:
        with self._changed:
            self._release(request)
        request.deliver(event)

    def _release(self, request: SequenceRequest) -> None:
        del self._active[request.slot]
        heapq.heappush(self._free, request.slot)
        self._count()

    def _fail_all(self, why: str) -> None:
        with self._changed:
            self._failure = why
            left = [*self._active.values(), *self._waiting]
            self._active.clear()
            self._waiting.clear()
            self._count()
        for request in left:
            if not request.cancelled:
                request.deliver(Event(failure=Refusal(503, f"the model is not available: {why}")))

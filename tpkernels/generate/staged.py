"""Generation through pipeline stages: each computes a flight of sequences while the others do the next ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from tpkernels.comm.group import Group
from tpkernels.pipeline import Flights

from .continuation import Continuation, Piece, ends_of
from .decoders import DynamicDecoder
from .sampling import Sampler, Sampling, draw
from .text import Tokenizer


class StageDecoder(DynamicDecoder):
    """Generation of one flight of sequences through pipeline stages; start and step return None but on the last one.

    Args:
        model: of which this rank has one stage.
        flights: over the stages. flight: the number of this one.
    """

    def __init__(self, model: nn.Module, flights: Flights, flight: int) -> None:
        super().__init__(model)
        self._flights, self._flight = flights, flight

    def _forward(self, ids: Any, mask: Any, positions: Tensor, cache: Cache, embedded: Tensor | None = None) -> Any:
        forward = super()._forward
        return self._flights.run(self._flight, tuple(ids.shape), lambda: forward(ids, mask, positions, cache, embedded))

    def _new_cache(self) -> DynamicCache:
        """Masks are made by the number of tokens in layers of other stages, too: those stand for layers of this one."""
        cache, stages = super()._new_cache(), self.model.tpk_stages
        here = stages.split.stages[stages.held[0]].layers
        own = [cache.layers[i] for i in here]
        for i, layer in enumerate(cache.layers):
            if i not in here:
                cache.layers[i] = next((mine for mine in own if type(mine) is type(layer)), layer)
        return cache


class _Flight:
    """Continuations that pass through the stages of a pipeline together.

    Attributes:
        rows: the numbers of their prompts.
    """

    def __init__(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        every: Sequence[Sampling],
        tokenizer: Tokenizer,
        ends: frozenset[int],
    ) -> None:
        self.rows = rows
        self._running = {i: (Continuation(prompts[i], every[i], tokenizer, ends), Sampler(every[i])) for i in rows}

    def samplers(self) -> list[Sampler | None]:
        """Of each row; None where it has ended."""
        return [self._running[i][1] if i in self._running else None for i in self.rows]

    def push(self, drawn: list[int]) -> Iterator[Piece]:
        """Add a token of each row; the pieces of those that go on or end now."""
        for i, token in zip(self.rows, drawn, strict=True):
            if i not in self._running:
                continue
            sequence = self._running[i][0]
            text = sequence.push(token)
            if sequence.finish:
                del self._running[i]
            yield Piece(i, token, text, sequence.finish)

    def tokens(self, drawn: list[int]) -> dict[int, int]:
        """What the next step appends: {row of the flight: token}; empty when all have ended."""
        return {row: drawn[row] for row, i in enumerate(self.rows) if i in self._running}


def staged_pieces(
    model: nn.Module,
    tokenizer: Tokenizer,
    group: Group,
    pipeline: Group,
    count: int,
    prompts: Sequence[Sequence[int]],
    every: Sequence[Sampling],
) -> Iterator[Piece]:
    """Continue all prompts, in `count` flights; the pieces of each step of each flight.

    Args:
        model: of which this rank has one stage.
        group: the ranks that it is sharded over. pipeline: those of the stages.
        prompts: of one token or more each. every: the sampling of each.
    """
    over = Flights(cast(Any, model).tpk_stages, pipeline, count)
    decoders = [StageDecoder(model, over, number) for number in range(count)]
    ends = ends_of(model, tokenizer)
    flights = [_Flight(range(number, len(prompts), count), prompts, every, tokenizer, ends) for number in range(count)]

    def send(number: int, logits: Tensor | None) -> None:
        if logits is not None:
            over.send_tokens(number, torch.tensor(draw(flights[number].samplers(), logits, group)))

    for number, flight in enumerate(flights):
        send(number, decoders[number].start([prompts[i] for i in flight.rows]))
    under_way = list(range(count))
    try:
        while under_way:
            number = under_way.pop(0)
            flight = flights[number]
            drawn = over.receive_tokens(number, len(flight.rows)).tolist()
            yield from flight.push(drawn)
            if tokens := flight.tokens(drawn):
                send(number, decoders[number].step(tokens))
                under_way.append(number)
    except (GeneratorExit, FloatingPointError):  # on all ranks; nothing may be left for a later call to read
        for number in under_way:
            over.receive_tokens(number, len(flights[number].rows))
        over.end()
        raise
    over.end()

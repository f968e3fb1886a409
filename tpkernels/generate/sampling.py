"""Draws the next token, the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group

NOT_A_NUMBER = -1  # in place of a token whose logits hold NaN
LEAST = torch.finfo(torch.float32).tiny  # of a temperature
FIRST_TRY = 1024  # the nucleus is searched among so many likeliest tokens before all are sorted


@dataclass(frozen=True)
class Sampling:
    """The settings of one continuation.

    Attributes:
        max_tokens: at most so many new tokens.
        temperature: 0 takes the likeliest token; else logits are divided by it before one is drawn.
        top_p: draw from the smallest set of tokens whose probability reaches this; 1 for all.
        top_k: draw from the so many likeliest tokens; 0 for all.
        seed: of the draws; None takes one from the system.
        stop: strings at whose first occurrence the text ends, without them.
        stop_token_ids: tokens that end the text, beside the ends of the tokenizer and of the generation config.
        ignore_eos: go on past those ends.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise ValueError for a value out of range (names it, expected and got)."""
        if self.max_tokens < 1:
            raise ValueError(f"sampling: max_tokens must be 1 or more, got {self.max_tokens}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"sampling: temperature must be 0 or more and finite, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling: top_p must be over 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling: top_k must be 0 (all) or more, got {self.top_k}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"sampling: seed must fit 64 bits, got {self.seed}")
        if any(not text for text in self.stop):
            raise ValueError("sampling: stop must not hold an empty string")


class Sampler:
    """Draws the tokens of one sequence, from a generator of its own, so that they do not depend on the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """Return the next token for logits [V], or NOT_A_NUMBER."""
        how = self._sampling
        if how.temperature == 0.0:
            best = int(logits.argmax())  # which finds NaN first
            return NOT_A_NUMBER if math.isnan(logits[best].item()) else best
        wide = logits.float()
        temperature = max(how.temperature, LEAST)  # what is 0 in fp32 would divide 0 by 0
        probabilities = torch.softmax((wide - wide.max()) / temperature, dim=-1)  # no quotient overflows
        if math.isnan(probabilities[0].item()):  # one NaN makes all of them NaN
            return NOT_A_NUMBER
        kept, ids = _likeliest(probabilities, how)
        drawn = int(torch.multinomial(kept, 1, generator=self._generator))
        return drawn if ids is None else int(ids[drawn])


def _likeliest(probabilities: Tensor, how: Sampling) -> tuple[Tensor, Tensor | None]:
    """The probabilities of the tokens to draw from, and their ids; None for all tokens in order."""
    size = probabilities.numel()
    top_k = min(how.top_k or size, size)
    if how.top_p == 1.0:
        if top_k == size:
            return probabilities, None
        kept, ids = probabilities.topk(top_k)
        return kept, ids
    kept, ids = probabilities.topk(min(top_k, FIRST_TRY))
    total = probabilities.sum() if top_k == size else probabilities.topk(top_k).values.sum()
    if kept.numel() < top_k and kept.sum() < how.top_p * total:
        kept, ids = probabilities.topk(top_k)
    before = kept.cumsum(0) - kept  # of the tokens that are likelier
    nucleus = torch.where(before < how.top_p * total, kept, 0.0)
    nucleus[0] = kept[0]  # the likeliest, also where top_p is 0 in fp32
    return nucleus, ids


def share(tokens: Sequence[int], group: Group) -> list[int]:
    """Return rank 0's tokens on every rank; others may pass anything of the same length. Collective."""
    if group.world_size == 1:
        return list(tokens)
    mine = torch.tensor(tokens if group.rank == 0 else [0] * len(tokens), dtype=torch.int64)
    found: list[int] = ops.all_reduce(mine, group=group).tolist()
    return found


def draw(samplers: Sequence[Sampler | None], logits: Tensor, group: Group) -> list[int]:
    """Draw a token for the rows of logits [B, V]; rank 0 draws, so all ranks have the same. Collective.

    Args:
        samplers: one for each row, or for the first rows; None where nothing is wanted (the token is 0).
        logits: the same on all ranks.
        group: the ranks.
    """
    mine = [0] * len(samplers)
    if group.rank == 0:
        mine = [0 if s is None else s.draw(row) for s, row in zip(samplers, logits, strict=False)]
    return share(mine, group)

"""Texts in progress: what a step adds to each, and where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .sampling import NOT_A_NUMBER, Sampling
from .text import TextStream, Tokenizer


@dataclass(frozen=True)
class Piece:
    """The addition of one step to the continuation of one prompt.

    Attributes:
        index: which prompt.
        token: the new token.
        text: that this token completes; may be empty, and belong to earlier tokens.
        finish: None, or why this is the last piece: "stop" (end token, stop string) or "length".
    """

    index: int
    token: int
    text: str
    finish: str | None


@dataclass(frozen=True)
class Completion:
    """All pieces of one prompt: its text, its tokens (the end token among them), why it ended."""

    text: str
    tokens: list[int]
    finish: str


def ends_of(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation config, which may be several.

    A chat model ends its answers with another token than the tokenizer's end: Gemma with <end_of_turn>.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = found if isinstance(found, list | tuple) else [found]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *several) if token is not None)


class Continuation:
    """A continuation in progress: its text and its ends.

    Args:
        prompt, sampling, tokenizer: of the text.
        ends: from `ends_of`.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, tokenizer: Tokenizer, ends: frozenset[int]) -> None:
        self.tokens = 0
        self.finish: str | None = None
        self._sampling = sampling
        self._ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)}
        self._text = TextStream(tokenizer, prompt, sampling.stop)

    def push(self, token: int) -> str:
        """Add the next token; the text that it completes. Sets `finish` when it is the last.

        Raises:
            FloatingPointError: the logits were not numbers.
        """
        if token == NOT_A_NUMBER:
            raise FloatingPointError("generate: the model's logits hold NaN")
        self.tokens += 1
        if token in self._ends:
            self.finish = "stop"
            return self._text.flush()
        text = self._text.push(token)
        if self._text.stopped:
            self.finish = "stop"
        elif self.tokens == self._sampling.max_tokens:
            text += self._text.flush()
            self.finish = "stop" if self._text.stopped else "length"
        return text

"""Texts in progress: what a step adds to each, and where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


class Continuation:
    """A continuation in progress: its text and its ends."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self.finish: str | None = None
        self._sampling = sampling
        self._ends = set(sampling.stop_token_ids)
        if tokenizer.eos_token_id is not None and not sampling.ignore_eos:
            self._ends.add(tokenizer.eos_token_id)
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

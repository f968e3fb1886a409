"""Turns a stream of tokens into text: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

HALF = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are not a whole character yet
CONTEXT = 4  # tokens of the prompt that are decoded along: some tokenizers drop a space at the start of a text


class Tokenizer(Protocol):
    """The methods of a tokenizer that generation calls; those of transformers have them."""

    eos_token_id: int | None

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the ids of a text; with add_special_tokens=False without those that begin or end one."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """Return the text of ids."""


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation up to where the answer begins, by the tokenizer's chat template.

    Raises:
        ValueError: there is no template, or it refuses the conversation (the text has the reason).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise any class for roles that they refuse
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    return list(tokenizer.encode(text, add_special_tokens=False))


class TextStream:
    """The text of one sequence of tokens.

    What `push` returned is final: text that may yet turn out to begin a stop string, or bytes that are no whole
    character yet, are held back.

    Args:
        tokenizer: whose decode is called.
        prompt: the tokens before.
        stop: strings at whose first occurrence the text ends, without them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._ids)  # of the tokens that are decoded, and of those not yet in the text
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain by now and was not before."""
        self._ids.append(token)
        return self._release(self._decoded(final=False), final=False)

    def flush(self) -> str:
        """Return what was held back; no token follows."""
        return self._release(self._decoded(final=True), final=True)

    def _decoded(self, *, final: bool) -> str:
        before = self._text(self._ids[self._start : self._read])
        whole = self._text(self._ids[self._start :])
        if len(whole) <= len(before) or (whole.endswith(HALF) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - (0 if final else self._beginning()))

    def _take(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text

    def _beginning(self) -> int:
        """How many characters at the end may begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)

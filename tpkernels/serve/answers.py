"""Answers in OpenAI's form, built from events."""

from __future__ import annotations

import time
import uuid
from typing import Any

from .engine import Event


class _Answer:
    """The choices of one request. Subclasses define the form of a choice."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, choices: int) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts = [""] * choices
        self._finish: list[str | None] = [None] * choices
        self._tokens = [0] * choices

    def add(self, index: int, event: Event) -> None:
        """Add an event to choice `index`."""
        self._texts[index] += event.text
        self._tokens[index] = event.tokens
        self._finish[index] = event.finish

    def whole(self, prompt_tokens: int) -> dict[str, Any]:
        """The answer to a request without a stream."""
        choices = [
            {"index": i, **self._content(text), "finish_reason": finish, "logprobs": None}
            for i, (text, finish) in enumerate(zip(self._texts, self._finish, strict=True))
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage(prompt_tokens)}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        return []

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """One event of a stream."""
        return self._chunk(index, self._delta(event.text), event.finish)

    def usage_chunk(self, prompt_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream with stream_options.include_usage."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage(prompt_tokens)}

    def _chunk(self, index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": finish, "logprobs": None}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def _usage(self, prompt_tokens: int) -> dict[str, int]:
        made = sum(self._tokens)
        return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(_Answer):
    """The answer of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content


class ChatAnswer(_Answer):
    """The answer of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """The role of every choice."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, role, None) for index in range(len(self._texts))]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

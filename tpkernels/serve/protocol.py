"""Requests as OpenAI's interface has them, and errors in its form. What is not served is refused, never ignored."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tpkernels.generate import Sampling

from .engine import Refused

MOST_STOPS = 4
MOST_CHOICES = 16
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
# Fields of OpenAI's that change the answer and are not served, with the values that ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False), "top_logprobs": (None, 0), "echo": (None, False), "best_of": (None, 1),
    "suffix": (None, ""), "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "tools": (None, []), "functions": (None, []), "tool_choice": (None, "none", "auto"), "modalities": (None, ["text"]),
    "response_format": (None, {"type": "text"}), "audio": (None,), "prediction": (None,),
}  # fmt: skip


class Invalid(Refused):
    """A request that cannot be served as it is; `param` is the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="allow")  # what clients add beyond, such as `user`; NOT_SERVED is looked for

    model: str
    temperature: float = Field(1.0, ge=0.0, le=100.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("temperature", "top_p", "n", "top_k", "stream", "ignore_eos", "stop_token_ids", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > MOST_STOPS or any(not text for text in texts):
            raise ValueError(f"must be at most {MOST_STOPS} strings, none of them empty")
        return value

    def sampling(self, max_tokens: int, choice: int) -> Sampling:
        """For one of the n choices."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63),
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)

    def prompts(self) -> list[str | list[int]]:
        """One or several.

        Raises:
            Invalid: there is none.
        """
        if not self.prompt:
            raise Invalid("prompt must be one text or token at least, got none", "prompt")
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(cast("list[str | list[int]]", self.prompt))


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def parse(kind: type[Asked], body: bytes) -> Any:
    """A request from its JSON text.

    Raises:
        Invalid: it is none; names the field, what was expected, and what came.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
        got = "" if first["type"] in ("missing", "json_invalid") else f" (got {str(first['input'])[:100]!r})"
        raise Invalid(f"{where or 'body'}: {first['msg']}{got}", where) from None
    for name, value in (asked.model_extra or {}).items():
        if name in NOT_SERVED and value not in NOT_SERVED[name]:
            raise Invalid(f"{name}: is not served, got {str(value)[:100]}", name)
    return asked


def _is_branch(part: int | str) -> bool:
    """Pydantic names the member of a union in the location of an error, as it names no field."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def error_body(refused: Refused) -> dict[str, Any]:
    """In OpenAI's form."""
    kind = TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "service_unavailable_error")
    param, code = getattr(refused, "param", None), getattr(refused, "code", None)
    return {"error": {"message": str(refused), "type": kind, "param": param, "code": code}}

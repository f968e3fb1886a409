"""Requests as OpenAI's interface has them, and errors in its form. What is not served is refused, never ignored.

Every field that a request may hold is one of these:

    served       a field of the classes here
    NOT_SERVED   OpenAI's or vLLM's, would change the answer: a 400 that names it, unless its value is the default
    IGNORED      OpenAI's or vLLM's, changes nothing in the answer
    any other    a 400 that names it, as OpenAI does, so that max_token for max_tokens is an error
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tpkernels.generate import Sampling

from .engine import Refusal

MOST_STOPS = 4
MOST_CHOICES = 16
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
# Defaults: accepted and ignored, because clients send them. best_of is checked separately.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False), "top_logprobs": (None, 0), "echo": (None, False), "suffix": (None, ""),
    "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none", "auto"), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,), "web_search_options": (None,),
    "reasoning_effort": (None, "none"), "verbosity": (None, "medium"), "store": (None, False),
    # vLLM's
    "repetition_penalty": (None, 1), "min_p": (None, 0), "min_tokens": (None, 0), "length_penalty": (None, 1),
    "use_beam_search": (None, False), "early_stopping": (None, False), "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True), "spaces_between_special_tokens": (None, True), "detokenize": (None, True),
    "prompt_logprobs": (None,), "truncate_prompt_tokens": (None,), "bad_words": (None, []),
    "allowed_token_ids": (None,), "logits_processors": (None, []), "thinking_token_budget": (None,),
    "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,), "guided_grammar": (None,),
    "guided_decoding_backend": (None,), "guided_whitespace_pattern": (None,), "structured_outputs": (None, {}),
    "add_generation_prompt": (None, True), "continue_final_message": (None, False), "documents": (None, []),
    "chat_template": (None,), "chat_template_kwargs": (None, {}), "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False), "mm_processor_kwargs": (None, {}), "kv_transfer_params": (None,),
}  # fmt: skip
IGNORED = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "parallel_tool_calls", "priority", "request_id", "cache_salt", "include_reasoning",
}  # fmt: skip


class InvalidRequest(Refusal):
    """A request that cannot be served as it is; `param` is the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="allow")
    not_served: ClassVar = {"continuous_usage_stats": (None, False), "include_obfuscation": (None, False)}
    ignored: ClassVar[set[str]] = set()

    include_usage: bool = False


class ApiRequest(BaseModel):
    """The fields of both kinds of request."""

    model_config = ConfigDict(extra="allow")  # checked one by one in `parse`
    not_served: ClassVar[dict[str, tuple[Any, ...]]] = NOT_SERVED
    ignored: ClassVar = IGNORED | {"best_of"}

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
        """The sampling of one of the n choices.

        Args:
            max_tokens: at most so many new tokens.
            choice: its number, added to the seed.
        """
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


class CompletionRequest(ApiRequest):
    """POST /v1/completions."""

    not_served: ClassVar = NOT_SERVED | {"add_special_tokens": (None, True)}

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)

    def prompts(self) -> list[str | list[int]]:
        """The prompts: texts or token ids.

        Raises:
            InvalidRequest: there is none.
        """
        if not self.prompt:
            raise InvalidRequest("prompt must be one text or token at least, got none", "prompt")
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(cast("list[str | list[int]]", self.prompt))


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation. Clients send answers back, null fields included."""

    model_config = ConfigDict(extra="allow")
    not_served: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": (None, []), "tool_call_id": (None,), "function_call": (None,), "audio": (None,),
        "refusal": (None, ""), "annotations": (None, []), "reasoning_content": (None, ""), "reasoning": (None, ""),
    }  # fmt: skip
    ignored: ClassVar = {"name"}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """The message in the form of chat templates."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(ApiRequest):
    """POST /v1/chat/completions."""

    not_served: ClassVar = NOT_SERVED | {"add_special_tokens": (None, False)}  # the template has them

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def parse(kind: type[ApiRequest], body: bytes) -> Any:
    """A request from its JSON text.

    Args:
        kind: the class of the request.
        body: UTF-8.

    Raises:
        InvalidRequest: the text is not such a request, or a field is not served; names the field, expected and got.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
        got = "" if first["type"] in ("missing", "json_invalid") else f" (got {str(first['input'])[:100]!r})"
        raise InvalidRequest(f"{where or 'body'}: {first['msg']}{got}", where) from None
    _check_others(request)
    best_of = (request.model_extra or {}).get("best_of")
    if best_of is not None and best_of != request.n:
        raise InvalidRequest(
            f"best_of: is not served unless it equals n, got {str(best_of)[:100]} and n {request.n}", "best_of"
        )
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequest("stream_options: needs stream true", "stream_options")
        _check_others(request.stream_options, "stream_options.")
    for index, message in enumerate(getattr(request, "messages", [])):
        _check_others(message, f"messages.{index}.")
    return request


def _check_others(request: ApiRequest | Message | StreamOptions, where: str = "") -> None:
    """Refuse fields that are not served, unless they have their default or change nothing."""
    for name, value in (request.model_extra or {}).items():
        path = where + name
        if name in request.not_served:
            if not any(_equal(value, neutral) for neutral in request.not_served[name]):
                raise InvalidRequest(f"{path}: is not served, got {str(value)[:100]}", path)
        elif name not in request.ignored:
            raise InvalidRequest(f"{path}: is not a known field", path)


def _equal(value: Any, neutral: Any) -> bool:
    """Whether they are the same; Python takes false for 0, which `logprobs` does not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's location is the member of a union, which pydantic adds, and not a field."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def error_body(refused: Refusal) -> dict[str, Any]:
    """The body of an error, in OpenAI's form."""
    kind = TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "service_unavailable_error")
    param, code = getattr(refused, "param", None), getattr(refused, "code", None)
    return {"error": {"message": str(refused), "type": kind, "param": param, "code": code}}

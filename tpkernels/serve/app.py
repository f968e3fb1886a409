"""The HTTP side of the server: routes, the token, answers whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpkernels.generate.text import chat_ids

from .answers import ChatAnswer, CompletionAnswer
from .engine import Engine, Event, Refusal, SequenceRequest
from .metrics import Metrics
from .protocol import ApiRequest, ChatRequest, CompletionRequest, InvalidRequest, error_body, parse

MOST_BODY = 16 << 20  # bytes
FRESH_S = 1.0  # /health makes no forward pass when one has ended within so many seconds
POLL_S = 0.01


class Job:
    """The sequences of one HTTP request, and the events that the engine's thread delivers.

    Args:
        engine: generates the sequences.
        params: of the request.
        prompts: token ids.
        most: at most so many new tokens of each; None for the room that its prompt leaves.

    Raises:
        InvalidRequest: a prompt has no tokens, or prompt and answer do not fit into max_length.
    """

    def __init__(self, engine: Engine, params: ApiRequest, prompts: Sequence[list[int]], most: int | None) -> None:
        self._engine = engine
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.prompt_tokens = sum(map(len, prompts))
        self.start = time.monotonic()
        self.requests: list[SequenceRequest] = []
        for prompt in prompts:
            room = engine.max_length - len(prompt)
            if not prompt:
                raise InvalidRequest("the prompt must have one token at least, got none", "prompt")
            if room < (most or 1):
                raise InvalidRequest(
                    f"prompt and answer may have {engine.max_length} tokens together, got {len(prompt)} and "
                    f"max_tokens {most or 1}", "max_tokens", code="context_length_exceeded",
                )  # fmt: skip
            for choice in range(params.n):
                index = len(self.requests)
                how = params.sampling(most or room, choice)
                self.requests.append(SequenceRequest(prompt, how, self._deliver(index)))

    def _deliver(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, with no reader
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return deliver

    def leave(self) -> None:
        """End `events` at once, because the client has disconnected."""
        self._events.put_nowait((0, Event(failure=Refusal(499, "the client has disconnected"))))

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield (index of the sequence, event) until all have ended; closing it early cancels those that run.

        Raises:
            Refusal: a sequence failed.
        """
        left = len(self.requests)
        try:
            while left:
                index, event = await self._events.get()
                if event.failure is not None:
                    raise event.failure
                left -= event.last
                yield index, event
            self._engine.metrics.whole.observe(time.monotonic() - self.start)
        finally:
            if left:
                for request in self.requests:
                    self._engine.cancel(request)


class Guard:
    """Middleware that checks the token and counts answers. Plain ASGI, so that streams are not buffered."""

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None) -> None:
        self._app, self._metrics, self._token = app, metrics, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request without the token, pass on the others."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        answered = False

        def count(status: int) -> None:
            nonlocal answered
            answered = True
            path = getattr(scope.get("route"), "path", "other")  # the route's: labels by URL would be unbounded
            self._metrics.requests.labels(path, str(status)).inc()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        if self._token is not None and scope["path"].startswith("/v1") and not _has_token(scope, self._token):
            answer = _refusal(InvalidRequest("a valid bearer token is needed", status=401, code="invalid_api_key"))
            answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, counted)
            return
        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not answered:  # the outer middleware answers then
                count(500)
            raise


def create_app(engine: Engine, name: str, token: str | None = None, health_s: float = 20.0) -> FastAPI:
    """The application.

    Args:
        engine: started.
        name: of the model, in answers and in the `model` of requests.
        token: the bearer token that /v1 requires; None for none.
        health_s: how long a forward pass may take before /health answers 503.
    """
    app = FastAPI(title="tpkernels", docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    card = {"id": name, "object": "model", "created": created, "owned_by": "tpkernels"}

    app.add_middleware(Guard, metrics=engine.metrics, token=token)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return _refusal(error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _refusal(Refusal(500, f"the server failed: {type(error).__name__}"))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Any) -> Response:
        return _refusal(InvalidRequest(f"no such path: {request.method} {request.url.path}", status=error.status_code))

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is None and engine.draining:
            return JSONResponse({"status": "stopping"}, 503)
        if (why := await _why_unhealthy(engine, health_s)) is not None:
            return JSONResponse({"status": "unhealthy", "reason": why}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        stuck = time.monotonic() - engine.last_step > health_s
        engine.metrics.healthy.set(engine.failure is None and engine.sick is None and not stuck)
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        params: CompletionRequest = parse(CompletionRequest, await _body(request))
        _check_model(params.model, name)
        prompts = [await _encoded(engine, prompt) for prompt in params.prompts()]
        job = Job(engine, params, prompts, params.max_tokens)
        return await _answered(request, engine, job, params, CompletionAnswer(name, len(job.requests)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        params: ChatRequest = parse(ChatRequest, await _body(request))
        _check_model(params.model, name)
        prompt = await asyncio.to_thread(_conversation, engine, params)
        job = Job(engine, params, [prompt], params.max_completion_tokens or params.max_tokens)
        return await _answered(request, engine, job, params, ChatAnswer(name, len(job.requests)))

    return app


async def _answered(request: Request, engine: Engine, job: Job, params: ApiRequest, answer: Any) -> Response:
    engine.submit(job.requests)
    leaving = asyncio.ensure_future(_left(request))
    leaving.add_done_callback(lambda task: None if task.cancelled() else job.leave())
    if params.stream:
        usage = bool(params.stream_options and params.stream_options.include_usage)
        return StreamingResponse(_stream(job, answer, usage, leaving), media_type="text/event-stream")
    try:
        return JSONResponse(await _collect(job, answer))
    finally:
        leaving.cancel()


async def _collect(job: Job, answer: Any) -> dict[str, Any]:
    async with contextlib.aclosing(job.events()) as events:
        async for index, event in events:
            answer.add(index, event)
    whole: dict[str, Any] = answer.whole(job.prompt_tokens)
    return whole


async def _stream(job: Job, answer: Any, usage: bool, leaving: asyncio.Future[None]) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(job.events()) as events:
            for chunk in answer.opening():
                yield _sse(chunk)
            async for index, event in events:
                answer.add(index, event)
                if event.text or event.last:
                    yield _sse(answer.chunk(index, event))
        if usage:
            yield _sse(answer.usage_chunk(job.prompt_tokens))
    except Refusal as error:
        yield _sse(error_body(error))
    finally:
        leaving.cancel()
    yield "data: [DONE]\n\n"


async def _why_unhealthy(engine: Engine, health_s: float) -> str | None:
    """Why the ranks cannot make a token; None where they have just made one."""
    start, before = time.monotonic(), engine.passes
    if engine.failure is None and start - engine.last_pass > FRESH_S:
        engine.probe()
        while engine.failure is None and engine.passes == before:
            if (waited := time.monotonic() - start) > health_s:
                return f"the model has made no token in {waited:.0f} s"
            await asyncio.sleep(POLL_S)
    return engine.failure or engine.sick


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _left(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY:
            raise InvalidRequest(f"the body may have {MOST_BODY} bytes, got more", status=413)
    return bytes(body)


async def _encoded(engine: Engine, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return list(await asyncio.to_thread(engine.tokenizer.encode, prompt))
    size = engine.vocab_size
    if any(not 0 <= token < size for token in prompt):
        raise InvalidRequest(f"prompt: tokens must be 0 to {size - 1}", "prompt")
    return prompt


def _conversation(engine: Engine, params: ChatRequest) -> list[int]:
    try:
        return chat_ids(engine.tokenizer, [message.plain() for message in params.messages])
    except ValueError as error:
        raise InvalidRequest(f"messages: {error}", "messages") from None


def _has_token(scope: Scope, token: str) -> bool:
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _check_model(given: str, name: str) -> None:
    if given != name:
        raise InvalidRequest(f"model {given!r} is not served here, {name!r} is", "model", 404, "model_not_found")


def _refusal(error: Refusal) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error_body(error), error.status, headers)

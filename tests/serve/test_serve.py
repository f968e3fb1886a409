from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

NEEDED = ("transformers", "fastapi", "uvicorn", "prometheus_client", "httpx")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)

import httpx  # noqa: E402

from tests.harness.generation import byte_tokenizer, save_tiny, tiny_llama  # noqa: E402
from tests.harness.serving import MAX_LENGTH, QUEUE, SLOTS, Served, events, serve_ranks, streamed  # noqa: E402
from tpkernels import Group  # noqa: E402
from tpkernels.generate import Generator, Sampling  # noqa: E402
from tpkernels.testing import run_ranks  # noqa: E402
from tpkernels.testing.spawn import run_ranks_outcomes  # noqa: E402

CLIENTS = 64


def prompt_of(client: int) -> str:
    return "".join(chr(97 + (client * (7 + i)) % 26) for i in range(1 + client % 11))


def tokens_of(client: int) -> int:
    return 3 + client % 14


def alone(prompts: list[str], sampling: list[Sampling]) -> list[tuple[str, str]]:
    """The texts of the unsharded model, each prompt by itself."""
    with Group.open() as group:
        generator = Generator(tiny_llama(), byte_tokenizer(), group)
        found = [generator.generate([prompt], how)[0] for prompt, how in zip(prompts, sampling, strict=True)]
    return [(c.text, c.finish) for c in found]


async def sixty_four_clients(served: Served) -> list[tuple[str, str]]:
    """Every other one takes a stream."""

    async def one(client: int) -> tuple[str, str]:
        stream = bool(client % 2)
        answer = await served.complete(prompt_of(client), max_tokens=tokens_of(client), stream=stream)
        assert answer.status_code == 200, answer.text
        if stream:
            return streamed(answer.text)
        (choice,) = answer.json()["choices"]
        assert answer.json()["usage"] == {
            "prompt_tokens": 1 + client % 11,
            "completion_tokens": tokens_of(client),
            "total_tokens": 1 + client % 11 + tokens_of(client),
        }
        return choice["text"], choice["finish_reason"]

    return await asyncio.gather(*(one(client) for client in range(CLIENTS)))


async def too_many_are_refused(served: Served) -> None:
    with served.gate.shut():
        running = asyncio.ensure_future(served.complete("ab", max_tokens=4))
        await served.until(served.gate.waiting.is_set)
        most = QUEUE + SLOTS - 1  # the slots that are free are no queue
        waiting = [asyncio.ensure_future(served.complete("ab", max_tokens=4)) for _ in range(most)]
        await served.until(lambda: served.waiting() == most or any(task.done() for task in waiting))
        assert not [task.result().text for task in waiting if task.done()]
        refused = await served.complete("ab")
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
    answers = await asyncio.gather(running, *waiting)
    assert {(a.status_code, a.json()["choices"][0]["text"]) for a in answers} == {
        (200, answers[0].json()["choices"][0]["text"])
    }, "none of those that were taken is lost"


async def who_leaves_is_forgotten(served: Served) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 90, "ignore_eos": True}
    made = served.value("tpkernels_tokens_total", kind="generated")
    submitted, cancelled = served.calls("submit"), served.calls("cancel")
    async with served.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.aiter_lines()
        assert json.loads((await anext(lines)).removeprefix("data: "))["choices"]
        served.gate.open.clear()  # so that it cannot end by itself
    await served.until(lambda: len(cancelled) == 1)
    leaving = asyncio.ensure_future(served.client.post("/v1/completions", json=body))
    await served.until(lambda: len(submitted) == 2)
    leaving.cancel()
    await served.until(lambda: len(cancelled) == 2)
    assert [request for (request,) in cancelled] == [request for (requests,) in submitted for request in requests]
    served.gate.open.set()
    await served.until(lambda: served.engine.idle)
    assert served.value("tpkernels_tokens_total", kind="generated") - made < 2 * 90


async def sampling_is_each_requests_own(served: Served) -> None:
    how = {"temperature": 1.2, "top_p": 0.9, "max_tokens": 12}
    changes = [{"seed": 5}, {"seed": 6}, {"seed": 5}, {"temperature": 0}, {"seed": 5, "n": 2}]
    answers = [a.json() for a in await asyncio.gather(*(served.complete("xyz", **{**how, **a}) for a in changes))]
    texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[2] != texts[1] != texts[3]
    assert texts[4] == [*texts[0], *texts[1]], "choice i draws with seed + i"
    several = await served.client.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": ["ab", "cd"], "temperature": 0, "max_tokens": 5, "ignore_eos": True},
    )
    singles = [(await served.complete(p, max_tokens=5)).json()["choices"][0]["text"] for p in ("ab", "cd")]
    assert [c["text"] for c in several.json()["choices"]] == singles
    tokens = await served.complete([97, 98], max_tokens=5)  # type: ignore[arg-type]
    assert tokens.status_code == 200
    whole = (await served.complete("ab", max_tokens=20)).json()["choices"][0]["text"]
    stop = whole[6:8]
    cut = (await served.complete("ab", max_tokens=20, stop=stop)).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")


async def chat_is_the_template_and_streams_deltas(served: Served) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 9, "ignore_eos": True}
    whole = (await served.client.post("/v1/chat/completions", json=body)).json()
    plain = (await served.complete("<system>s\n<user>hi\n<assistant>", max_tokens=9)).json()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await served.client.post("/v1/chat/completions", json={**body, **options})).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


async def what_is_wrong_is_named(served: Served) -> None:
    async def answer_of(
        path: str = "completions", raw: bytes | None = None, **body: Any
    ) -> tuple[int, str | None, str]:
        body = {"model": "tiny", **({"prompt": "a"} if path == "completions" else {}), **body}
        answer = await served.client.post(f"/v1/{path}", content=raw if raw is not None else json.dumps(body).encode())
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error["param"], error["message"]

    for change, param in [
        ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n"), ({"stop": ["a", "b", "c", "d", "e"]}, "stop"), ({"stop": [""]}, "stop"),
        ({"prompt": [300]}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"),
        ({"logprobs": 3}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"), ({"max_tokens": MAX_LENGTH}, "max_tokens"),
        ({"prompt": "a" * MAX_LENGTH, "max_tokens": 1}, "max_tokens"), ({"temperature": "warm"}, "temperature"),
    ]:  # fmt: skip
        status, where, message = await answer_of(**change)
        assert (status, where) == (400, param), message
        assert where in message or where == "prompt", message
    nulls = dict.fromkeys(("stream", "top_k", "ignore_eos", "stop_token_ids", "temperature"))
    answer = await served.client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1} | nulls)
    assert answer.status_code == 200, answer.text
    assert (await answer_of(raw=b"{not json"))[0] == 400
    assert (await answer_of(raw=b"x" * (17 << 20)))[0] == 413
    assert (await answer_of(model="other"))[:2] == (404, "model")
    assert (await answer_of("chat/completions", messages=[]))[:2] == (400, "messages")
    assert (await answer_of("chat/completions", messages=[{"role": "user", "content": "a"}], tools=[{}]))[1] == "tools"
    assert (await answer_of("nowhere"))[0] == 404
    assert (await served.client.get("/v1/completions")).status_code == 405
    assert (await served.complete("ab", logprobs=None, presence_penalty=0, user="me", max_tokens=1)).status_code == 200


async def what_is_not_served_is_named_and_what_asks_for_nothing_passes(served: Served) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    plain = {"model": "tiny", "prompt": "a", "max_tokens": 1}

    async def answer_of(body: dict[str, Any]) -> tuple[int, str | None]:
        answer = await served.client.post(f"/v1/{'chat/' if 'messages' in body else ''}completions", json=body)
        return answer.status_code, answer.json().get("error", {}).get("param")

    refused: dict[str, Any] = {
        "repetition_penalty": 1.1, "min_p": 0.1, "function_call": {"name": "f"}, "functions": [{}], "tools": [{}],
        "tool_choice": "required", "response_format": {"type": "json_object"}, "logit_bias": {"5": 1}, "best_of": 2,
        "suffix": "x", "echo": True, "min_tokens": 3, "guided_json": {}, "length_penalty": 0, "bad_words": ["x"],
        "skip_special_tokens": False, "use_beam_search": True, "logprobs": 0, "prompt_logprobs": 0, "max_token": 3,
        "stream_options": {"include_usage": True}, "truncate_prompt_tokens": 5, "frequency_penalty": True,
    }  # fmt: skip
    neutral: dict[str, Any] = {
        "repetition_penalty": 1.0, "min_p": 0.0, "function_call": "none", "functions": [], "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1, "suffix": "",
        "echo": False, "min_tokens": 0, "guided_json": None, "length_penalty": 1, "bad_words": [], "logprobs": False,
        "skip_special_tokens": True, "stream_options": None, "metadata": {"a": "b"}, "service_tier": "auto",
    }  # fmt: skip
    for body in (plain, chat):
        for name, value in refused.items():
            assert await answer_of({**body, name: value}) == (400, name), (body, name)
        assert await answer_of(body | neutral) == (200, None)
    assert await answer_of(plain | {"add_special_tokens": True}) == await answer_of(
        chat | {"add_special_tokens": False}
    )
    assert await answer_of(chat | {"add_special_tokens": True}) == (400, "add_special_tokens")
    assert await answer_of(plain | {"best_of": 2, "n": 2}) == (200, None)
    for options in ("continuous_usage_stats", "include_obfuscation", "usage"):
        body = plain | {"stream": True, "stream_options": {options: True}}
        assert await answer_of(body) == (400, f"stream_options.{options}")
    earlier = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}
    assert await answer_of(chat | {"messages": [*chat["messages"], earlier]}) == (200, None)  # type: ignore[misc]
    called = {"role": "assistant", "content": "b", "tool_calls": [{}]}
    assert await answer_of(chat | {"messages": [called]}) == (400, "messages.0.tool_calls")
    parts = [{"type": "text", "text": "a", "cache_control": {}}]
    assert (await answer_of(chat | {"messages": [{"role": "user", "content": parts}]}))[0] == 400


async def the_token_is_asked_for(served: Served) -> None:
    for wrong in ("", "Bearer no", "Bearer \N{SNOWMAN}", "Basic secret"):
        answer = await served.client.get("/v1/models", headers={"Authorization": wrong.encode()})
        assert answer.status_code == 401, wrong
        assert answer.json()["error"]["code"] == "invalid_api_key"
    models = (await served.client.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["tiny"]
    assert (await served.client.get("/v1/models/tiny")).json() == models["data"][0]
    assert (await served.client.get("/health", headers={"Authorization": ""})).json() == {"status": "ok"}


async def the_numbers_are_right(served: Served) -> None:
    before = {kind: served.value("tpkernels_tokens_total", kind=kind) for kind in ("prompt", "generated")}
    await served.complete("abcd", max_tokens=7)
    assert served.value("tpkernels_tokens_total", kind="prompt") - before["prompt"] == 4
    assert served.value("tpkernels_tokens_total", kind="generated") - before["generated"] == 7
    text = (await served.client.get("/metrics")).text
    for name in ("queue_length", "running", "healthy", "first_token_seconds_bucket", "request_seconds_count"):
        assert f"tpkernels_{name}" in text
    assert re.search(r'tpkernels_requests_total\{path="/v1/completions",status="429"\} 1\.0', text)
    assert re.search(r'tpkernels_requests_total\{path="other",status="404"\} 1\.0', text)


async def stopping_lets_running_requests_end(served: Served) -> None:
    with served.gate.shut():
        running = asyncio.ensure_future(served.complete("ab", max_tokens=6))
        await served.until(lambda: served.value("tpkernels_running") == 1)
        served.server.handle_exit(signal.SIGTERM, None)
        refused = await served.complete("ab")
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is stopping")
        health = await served.client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
    answer = await running
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 6


async def everything(served: Served) -> list[tuple[str, str]]:
    found = await sixty_four_clients(served)
    for check in (
        too_many_are_refused, who_leaves_is_forgotten, sampling_is_each_requests_own, what_is_wrong_is_named,
        what_is_not_served_is_named_and_what_asks_for_nothing_passes, chat_is_the_template_and_streams_deltas,
        the_token_is_asked_for, the_numbers_are_right, stopping_lets_running_requests_end,
    ):  # fmt: skip
        try:
            await asyncio.wait_for(check(served), 25)
        except BaseException as error:
            raise AssertionError(f"{check.__name__}: {type(error).__name__}: {error}") from error
    return found


def check_everything() -> Any:
    return serve_ranks(everything, "secret", timeout_s=60.0)


def test_a_server_of_two_ranks_serves_sixty_four_clients_and_refuses_what_it_must() -> None:
    found, _ = run_ranks(check_everything, 2)
    clients = range(CLIENTS)
    how = [Sampling(max_tokens=tokens_of(c), ignore_eos=True) for c in clients]
    assert found == alone([prompt_of(c) for c in clients], how)


async def a_rank_dies(served: Served) -> dict[str, Any]:
    """Kills rank 1 while one request runs and others wait."""
    assert (await served.client.get("/health")).status_code == 200
    with served.gate.shut():
        pending = [asyncio.ensure_future(served.complete("ab", max_tokens=50))]
        await served.until(served.gate.waiting.is_set)
        pending += [asyncio.ensure_future(served.complete("ab", max_tokens=50)) for _ in range(SLOTS + 3)]
        await served.until(lambda: served.waiting() == SLOTS + 3)
        os.kill(served.engine.metrics.other_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    start = time.monotonic()
    answers = await asyncio.gather(*pending)
    health = await served.client.get("/health")
    late = await served.complete("ab")
    return {
        "statuses": sorted({a.status_code for a in answers} | {late.status_code}),
        "message": answers[0].json()["error"]["message"],
        "health": (health.status_code, health.json()["status"], health.json()["reason"]),
        "seconds": time.monotonic() - start,
    }


def check_dead_rank(folder: str) -> Any:
    Path(folder, str(torch.distributed.get_rank())).write_text(str(os.getpid()))
    torch.distributed.barrier()

    async def check(served: Served) -> Any:
        served.engine.metrics.other_pid = int(Path(folder, "1").read_text())  # type: ignore[attr-defined]
        return await a_rank_dies(served)

    return serve_ranks(check, timeout_s=20.0)


def test_a_dead_rank_fails_what_is_pending_with_503_and_shows_in_health(tmp_path: Path) -> None:
    first, second = run_ranks_outcomes(check_dead_rank, 2, str(tmp_path), timeout=100)
    assert first.finished, first.error
    assert second.exitcode == -signal.SIGKILL
    found = first.value
    assert found["statuses"] == [503]
    assert "PeerLostError" in found["message"]
    assert found["health"][:2] == (503, "unhealthy")
    assert "rank 1 died" in found["health"][2]
    assert found["seconds"] < 20.0, "bounded by the group's timeout"


def test_the_command_serves_and_ends_what_runs_when_it_is_told_to_stop(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    options = ["--port", "0", "--tp", "2", "--max-length", "400", "--slots", "2", "--token", "secret"]
    command = [sys.executable, "-m", "tpkernels", "serve", str(folder), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "serving tiny over 2 ranks at" in line)
        address = re.search(r"http://\S+", line)
        assert address is not None
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 380, "stream": True, "ignore_eos": True}
        headers = {"Authorization": "Bearer secret"}
        url = f"{address[0]}/completions"
        assert httpx.post(url, json=body).status_code == 401
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        assert rest.rstrip().endswith("data: [DONE]")
        assert '"finish_reason": "length"' in rest
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


async def what_runs_is_ended(served: Served) -> None:
    with served.gate.shut():
        running = asyncio.ensure_future(served.complete("ab", max_tokens=90))
        await served.until(served.gate.waiting.is_set)
        stopped = served.calls("stop")
        served.server.handle_exit(signal.SIGTERM, None)
        await served.until(lambda: bool(stopped))
    answer = await running
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "service_unavailable_error")
    assert answer.json()["error"]["message"].endswith("the server is stopping")


def test_drain_0_ends_what_runs_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tpkernels import cli
    from tpkernels.serve import command
    from tpkernels.serve.arguments import ServeArguments

    calls = list[ServeArguments]()
    monkeypatch.setattr(command, "work", calls.append)
    folder = save_tiny(tmp_path / "tiny")
    found = CliRunner().invoke(cli.app, ["serve", str(folder), "--drain", "0"])
    assert (found.exit_code, [a.drain_s for a in calls]) == (0, [0.0]), found.output
    serve_ranks(what_runs_is_ended, drain_s=calls[0].drain_s)


def test_a_port_that_is_taken_and_a_missing_package_are_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from tpkernels.errors import UserError
    from tpkernels.generate.find import require
    from tpkernels.serve.command import listen

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"this needs nothing_like_it: pip install 'tpkernels\[serve\]'"):
        require("serve", "json", "nothing_like_it")

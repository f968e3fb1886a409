"""Throughput and latency of `tpkernels serve smollm2` with so many clients at once: `python -m bench.serve`.

Every client sends one request after another (16 tokens of prompt, 32 of answer, no stream) to a server of its own on
loopback. Latency is that of a request, seen from the client; throughput counts tokens of answers. Verified: every
answer came, with as many tokens as were asked for. How many answers to equal prompts differ is written down beside
it: the number of sequences in a step decides how a GEMM rounds, and a near tie can fall either way.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from bench.rows import FIELDS, RESULTS, Row, circumstances, number, save, times
from bench.timing import summary

PROMPT_TOKENS, ANSWER_TOKENS = 16, 32
PROMPTS = 16  # different ones


def start(ranks: int, slots: int, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server and its address."""
    asked = ["--tp", str(ranks), "--slots", str(slots), "--port", "0", "--max-length", "128", *options]
    command = [sys.executable, "-m", "tpkernels", "serve", "smollm2", *asked]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://\S+", line):
            return server, found[0]
        print(line, end="", file=sys.stderr)
    raise RuntimeError("the server did not start")


async def load(url: str, clients: int, requests: int) -> tuple[list[float], float, list[tuple[int, str, int]]]:
    """Seconds of every request, seconds in all, and (prompt, answer, tokens) of each."""
    seconds, answers, left = list[float](), list[tuple[int, str, int]](), iter(range(requests))

    async def one(client: httpx.AsyncClient) -> None:
        for index in left:
            which = index % PROMPTS
            prompt = [1000 + (which * 37 + i) % 20000 for i in range(PROMPT_TOKENS)]
            body = {"model": "smollm2", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            begin = time.perf_counter()
            answer = await client.post(f"{url}/completions", json={**body, "ignore_eos": True})
            seconds.append(time.perf_counter() - begin)
            answer.raise_for_status()
            found: Any = answer.json()
            answers.append((which, found["choices"][0]["text"], found["usage"]["completion_tokens"]))

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return seconds, time.perf_counter() - begin, answers


def row_of(ranks: int, clients: int, found: tuple[list[float], float, list[tuple[int, str, int]]], where: Row) -> Row:
    seconds, whole, answers = found
    texts = {which: {text for other, text, _ in answers if other == which} for which, _, _ in answers}
    right = all(tokens == ANSWER_TOKENS for _, _, tokens in answers) and len(answers) == len(seconds)
    of, p95 = summary(seconds), sorted(seconds)[max(0, -(-95 * len(seconds) // 100) - 1)]
    known = {
        "op": "serve_smollm2", "variant": "tpkernels", "codec": "none", "dtype": "fp32", "M": clients, "R": ranks,
        **times(of), "ratios": {}, "by_placement": {}, "transport": "shm", "rounds": 1, "calls": len(seconds),
        "verified": right, "error": 0.0,
    }  # fmt: skip
    return {
        **{field: {**known, **where}.get(field) for field in FIELDS},
        "p95_us": number(1e6 * p95),
        "tokens_per_s": number(len(seconds) * ANSWER_TOKENS / whole),
        "answers_that_differ": sum(len(t) - 1 for t in texts.values()),
    }


def main(
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "1,8,64",
    slots: Annotated[int, typer.Option(min=1)] = 8,
    compile: Annotated[bool, typer.Option("--compile")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON lines to add the rows to.")] = RESULTS / "serve.jsonl",
) -> None:
    """Measure the server."""
    server, url = start(ranks, slots, ["--compile"] if compile else [])
    rows = []
    try:
        for count in map(int, clients.split(",")):
            asyncio.run(load(url, count, count))  # warm
            found = asyncio.run(load(url, count, max(8, 2 * count)))
            row = row_of(ranks, count, found, circumstances(pinned=False))
            row["variant"] = "tpkernels_compiled" if compile else "tpkernels"
            rows.append(row)
            p50, p95 = row["median_us"] / 1e6, row["p95_us"] / 1e6
            print(f"{count} clients: {row['tokens_per_s']} tokens/s, p50 {p50:.2f} s, p95 {p95:.2f} s, "
                  f"verified {row['verified']}, {row['answers_that_differ']} answers differ")  # fmt: skip
    finally:
        server.terminate()
        server.wait(60)
    if out is not None:
        save(out, rows)


if __name__ == "__main__":
    typer.run(main)

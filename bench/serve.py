"""Throughput and latency of `tpkernels serve smollm2` with so many clients at once: `python -m bench.serve`.

Every client sends one request after another (16 tokens of prompt, 32 of answer, no stream) to a server of its own on
loopback. Latency is that of a request, seen from the client; throughput counts tokens of answers. Verified: every
answer has max_tokens tokens, and is that of the unsharded model, or differs from it at near ties only: the
number of sequences in a step decides how a GEMM rounds, and a tie can fall either way. How many answers to equal
prompts differ is written down beside it. Rows of a run that is not verified are not kept.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer

from bench.rows import FIELDS, KEEP_HELP, Row, circumstances, destination, number, save, times
from bench.timing import summary

PROMPT_TOKENS, ANSWER_TOKENS = 16, 32
PROMPTS = 16  # different ones
ROUNDING = 2e-4  # of the largest logit in fp32; 30 layers, each rounding several times


@dataclass(frozen=True)
class Answer:
    """What came back for one of the prompts."""

    prompt: int
    text: str
    tokens: int


def prompt_of(which: int) -> list[int]:
    return [1000 + (which * 37 + i) % 20000 for i in range(PROMPT_TOKENS)]


def start(model: str, ranks: int, slots: int, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server and its address. Its output is passed on until it ends: a full pipe would stop it."""
    arguments = ["--tp", str(ranks), "--slots", str(slots), "--port", "0", "--max-length", "128", *options]
    command = [sys.executable, "-m", "tpkernels", "serve", model, *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    output = server.stderr
    assert output is not None
    for line in output:
        if found := re.search(r"http://\S+", line):
            threading.Thread(target=sys.stderr.writelines, args=(output,), daemon=True).start()
            return server, found[0]
        print(line, end="", file=sys.stderr)
    raise RuntimeError(f"the server did not start: it ended with {server.wait()}")


class Reference:
    """The unsharded model in this process, which checks answers. Made once the server has ended."""

    def __init__(self, model: str) -> None:
        from tpkernels import Group
        from tpkernels.generate import Generator, Sampling
        from tpkernels.generate.load import load_whole, quiet_transformers

        quiet_transformers()
        self._model, self._tokenizer = load_whole(model)
        self._how = Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        with Group.open() as group:
            generator = Generator(self._model, self._tokenizer, group)
            self._says = [c.text for c in generator.generate(list(map(prompt_of, range(PROMPTS))), self._how)]

    def may_be(self, answer: Answer) -> bool:
        """Whether rounding explains all in which an answer differs from the model's own."""
        if answer.tokens != ANSWER_TOKENS:
            return False
        return answer.text == self._says[answer.prompt] or self._leads_to(answer.text, prompt_of(answer.prompt), [])

    def _leads_to(self, text: str, prompt: list[int], tokens: list[int]) -> bool:
        """Whether these tokens, followed by likeliest ones, all ties tried, become the text."""
        from tpkernels.generate.continuation import Continuation

        running = Continuation(prompt, self._how, self._tokenizer, frozenset())
        so_far = "".join(map(running.push, tokens))
        if running.finish or not text.startswith(so_far):
            return so_far == text
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + tokens]), use_cache=False, logits_to_keep=1).logits[0, -1]
        near = logits >= logits.max() - 2 * ROUNDING * logits.abs().max()
        return any(self._leads_to(text, prompt, [*tokens, token]) for token in near.nonzero()[:, 0].tolist())


async def load(url: str, model: str, clients: int, requests: int) -> tuple[list[float], float, list[Answer]]:
    """Seconds of every request, seconds in all, and the answers."""
    seconds, answers, left = list[float](), list[Answer](), iter(range(requests))

    async def one(client: httpx.AsyncClient) -> None:
        for index in left:
            which = index % PROMPTS
            body = {"model": model, "prompt": prompt_of(which), "max_tokens": ANSWER_TOKENS, "temperature": 0}
            begin = time.perf_counter()
            answer = await client.post(f"{url}/completions", json={**body, "ignore_eos": True})
            seconds.append(time.perf_counter() - begin)
            answer.raise_for_status()
            found: Any = answer.json()
            answers.append(Answer(which, found["choices"][0]["text"], found["usage"]["completion_tokens"]))

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return seconds, time.perf_counter() - begin, answers


def row_of(
    ranks: int, slots: int, clients: int, compiled: bool, found: tuple[list[float], float, list[Answer]], where: Row
) -> Row:
    """Verified is for the caller to say."""
    seconds, whole, answers = found
    texts = {a.prompt: {b.text for b in answers if b.prompt == a.prompt} for a in answers}
    of, p95 = summary(seconds), sorted(seconds)[max(0, -(-95 * len(seconds) // 100) - 1)]
    known = {
        "op": "serve_smollm2", "variant": "tpkernels_compiled" if compiled else "tpkernels", "codec": "none",
        "dtype": "fp32", "R": ranks, **times(of), "ratios": {}, "by_placement": {},
        "transport": "shm" if ranks > 1 else None, "rounds": 1, "calls": len(seconds), "verified": False,
    }  # fmt: skip
    return {
        **{field: {**known, **where}.get(field) for field in FIELDS},
        "slots": slots,
        "clients": clients,
        "p95_us": number(1e6 * p95),
        "tokens_per_s": number(sum(a.tokens for a in answers) / whole),
        "answers_that_differ": sum(len(t) - 1 for t in texts.values()),
    }


def verify(rows: list[Row], answers: list[list[Answer]], reference: Reference) -> None:
    """Say in every row whether its answers are right: the error is how many are not."""
    known = {answer: reference.may_be(answer) for answer in sorted({a for of in answers for a in of}, key=str)}
    for row, of in zip(rows, answers, strict=True):
        wrong = [answer for answer in of if not known[answer]]
        row["verified"], row["error"] = bool(of) and not wrong and len(of) == row["calls"], float(len(wrong))
        for answer in wrong[:3]:
            print(f"wrong with {row['clients']} clients: {answer}")


def main(
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "1,8,64",
    slots: Annotated[int, typer.Option(min=1)] = 8,
    compile: Annotated[bool, typer.Option("--compile")] = False,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to add the rows to; default runs/bench/serve.jsonl.")
    ] = None,
) -> None:
    """Measure the server."""
    model, rows, answers = "smollm2", list[Row](), list[list[Answer]]()
    server, url = start(model, ranks, slots, ["--compile"] if compile else [])
    try:
        for count in map(int, clients.split(",")):
            asyncio.run(load(url, model, count, count))  # warm
            found = asyncio.run(load(url, model, count, max(8, 2 * count)))
            rows.append(row_of(ranks, slots, count, compile, found, circumstances(pinned=False)))
            answers.append(found[2])
    finally:
        server.terminate()
        server.wait(60)
    verify(rows, answers, Reference(model))
    for row in rows:
        p50, p95 = row["median_us"] / 1e6, row["p95_us"] / 1e6
        print(f"{row['slots']} slots, {row['clients']} clients: {row['tokens_per_s']} tokens/s, p50 {p50:.2f} s, "
              f"p95 {p95:.2f} s, verified {row['verified']}, {row['answers_that_differ']} answers differ")  # fmt: skip
    right = [row for row in rows if row["verified"]]
    save(destination("serve.jsonl", keep, out), right)
    if len(right) < len(rows):
        print(f"wrong and not kept: {len(rows) - len(right)} of {len(rows)} rows")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

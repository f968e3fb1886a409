"""What each rank of `tpkernels generate` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from tpkernels import launch
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.errors import UserError

from .generator import Generator
from .load import load
from .sampling import Sampling
from .text import chat_ids


@dataclass(frozen=True)
class GenerateArguments:
    """The command's arguments: a model, prompts, how to go on from them, and how to run.

    Attributes:
        model, dtype: as for `load`.
        prompts: texts; with chat, messages of a user, each answered by itself.
        system: with chat, the message before; None for the template's own.
        cache, compile: as for Generator.
        timeout_s, arena_mib: as for `launch.all_ranks`.
    """

    model: str
    prompts: Sequence[str]
    sampling: Sampling
    chat: bool = False
    system: str | None = None
    dtype: str = "auto"
    cache: str = "static"
    compile: bool = False
    timeout_s: float = 120.0
    arena_mib: int = 16


def work(asked: GenerateArguments) -> None:
    """Load, continue every prompt, write the texts to stdout (rank 0), and how fast it was to stderr."""
    with launch.all_ranks(asked.timeout_s, asked.arena_mib, tp=launch.world_size()) as layout:
        group = layout.tp
        model, tokenizer = load(asked.model, group, asked.dtype)
        gather(None, group)  # a rank may have a slow disk: from here on waits have a short deadline
        try:
            generator = Generator(model, tokenizer, group, cache=asked.cache, compile=asked.compile)
            chat = [chat_ids(tokenizer, _messages(asked, text)) for text in asked.prompts] if asked.chat else None
            prompts = asked.prompts if chat is None else chat
            _write(generator, prompts, asked, group)
        except ValueError as error:
            raise UserError(str(error)) from None


def _messages(asked: GenerateArguments, text: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": asked.system}] if asked.system is not None else []
    return [*system, {"role": "user", "content": text}]


def _write(generator: Generator, prompts: Sequence[Any], asked: GenerateArguments, group: Group) -> None:
    one, texts = len(prompts) == 1, [""] * len(prompts)
    tokens, start, first = 0, time.perf_counter(), 0.0
    for piece in generator.stream(prompts, asked.sampling):
        first = first or time.perf_counter()
        tokens += 1
        texts[piece.index] += piece.text
        if group.rank == 0 and one:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if group.rank == 0:
        end = time.perf_counter()
        for prompt, text in zip(asked.prompts, texts, strict=True):
            typer.echo("" if one else f"--- {prompt}\n{text}")
        rest = (tokens - len(prompts)) / max(end - first, 1e-9)
        typer.echo(
            f"{tokens} tokens over {group.world_size} ranks: {first - start:.2f} s to the first, "
            f"then {rest:.1f} tokens/s",
            err=True,
        )

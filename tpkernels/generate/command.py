"""The work of each rank of `tpkernels generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import typer

from tpkernels.comm import torchrun
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.errors import UserError
from tpkernels.layers.engines import engines_line

from .arguments import GenerateArguments
from .generator import Generator
from .load import load, quiet_transformers
from .text import chat_ids


def work(args: GenerateArguments) -> None:
    """Load, continue every prompt, write the texts to stdout (rank 0) and the speed to stderr.

    Raises:
        UserError: there is no such model, or the arguments do not fit it.
    """
    quiet_transformers()
    with torchrun.open_ranks(args.timeout_s, args.arena_mib, tp=torchrun.world_size()) as layout:
        group = layout.tp
        model, tokenizer = load(args.model, group, args.dtype)
        gather(None, group)  # the ranks may read from slow disks; the waits after this have a short deadline
        try:
            generator = Generator(model, tokenizer, group, cache=args.cache, compile=args.compile)
            if group.rank == 0 and (engines := engines_line(model, len(args.prompts))):
                typer.echo(engines, err=True)
            chat = [chat_ids(tokenizer, _messages(args, text)) for text in args.prompts] if args.chat else None
            prompts = args.prompts if chat is None else chat
            _write(generator, prompts, args, group)
        except ValueError as error:
            raise UserError(str(error)) from None


def _messages(args: GenerateArguments, text: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [*system, {"role": "user", "content": text}]


def _write(generator: Generator, prompts: Sequence[Any], args: GenerateArguments, group: Group) -> None:
    one, texts = len(prompts) == 1, [""] * len(prompts)
    tokens, start, first = 0, time.perf_counter(), 0.0
    for piece in generator.stream(prompts, args.sampling):
        first = first or time.perf_counter()
        tokens += 1
        texts[piece.index] += piece.text
        if group.rank == 0 and one:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if group.rank == 0:
        end = time.perf_counter()
        for prompt, text in zip(args.prompts, texts, strict=True):
            typer.echo("" if one else f"--- {prompt}\n{text}")
        rest = (tokens - len(prompts)) / max(end - first, 1e-9)
        typer.echo(
            f"{tokens} tokens over {group.world_size} ranks: {first - start:.2f} s to the first, "
            f"then {rest:.1f} tokens/s",
            err=True,
        )

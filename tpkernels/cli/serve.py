"""The command line's `tpkernels generate` and `tpkernels serve`."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from tpkernels.cli.errors import plain_errors
from tpkernels.cli.options import options_of
from tpkernels.cli.ranks import start_ranks
from tpkernels.comm import torchrun
from tpkernels.errors import UserError
from tpkernels.generate.arguments import GenerateArguments, ModelArguments
from tpkernels.generate.command import work
from tpkernels.generate.find import find, require
from tpkernels.launch import STOPPED
from tpkernels.serve.arguments import TOKEN_VARIABLE, ServeArguments


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(generate)
    app.command()(serve)


@options_of(GenerateArguments)
def generate(**given: Any) -> None:
    """Continue prompts with a language model cut over several ranks of this machine; the text streams to stdout.

    Starts the ranks by itself. Under torchrun it is one of them: torchrun --nproc-per-node 2 -m tpkernels generate
    """
    with plain_errors():
        arguments = GenerateArguments(**given)
        arguments.check()
        _become_ranks(arguments)
        work(arguments)


@options_of(ServeArguments)
def serve(**given: Any) -> None:
    """Serve a language model cut over several ranks by OpenAI's HTTP interface: completions, chat, models.

    Starts the ranks by itself. Under torchrun it is one of them: torchrun --nproc-per-node 2 -m tpkernels serve
    """
    with plain_errors():
        arguments = ServeArguments(**given)
        require("serve", "fastapi", "uvicorn", "prometheus_client")
        if arguments.token is not None:  # inherited by the ranks; a command line is visible to other users
            os.environ[TOKEN_VARIABLE] = arguments.token
        _become_ranks(arguments, hide="--token", stopped=0)  # a signal is how a server ends
        from tpkernels.serve.command import work

        work(arguments)


def _become_ranks(arguments: ModelArguments, *, hide: str | None = None, stopped: int = STOPPED) -> None:
    """Check what can be checked in this process; then, unless it is a rank, run the command on its ranks, and exit.

    Args:
        arguments: `model` must exist; `tp` is the number of ranks.
        hide: an option that is not passed to the ranks.
        stopped: the exit code when a signal ended them.

    Raises:
        UserError: there is no such model, a package is missing, or this system cannot start ranks.
        typer.Exit: the ranks have ended.
    """
    require("hf", "transformers", "accelerate")
    find(arguments.model)
    if torchrun.is_rank():
        return
    if arguments.tp > 1:
        if not hasattr(os, "sched_getaffinity"):
            raise UserError("several ranks need Linux: take --tp 1.")
        code = start_ranks(arguments.tp, sys.argv[1:] if hide is None else _without(sys.argv[1:], hide))
        raise typer.Exit(stopped if code == STOPPED else code)


def _without(arguments: list[str], option: str) -> list[str]:
    """The arguments but for an option and its value."""
    kept, skip = list[str](), False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = argument == option and not skip
    return kept

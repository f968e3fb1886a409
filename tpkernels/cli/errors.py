"""The messages and exit codes of commands that fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from tpkernels.errors import CheckpointError, PeerLostError, RankMismatchError, UserError


@contextmanager
def plain_errors(hint: str = "") -> Iterator[None]:
    """Print one sentence instead of a stack trace: exit code 2 for errors of the user, 1 for those of a rank.

    Args:
        hint: printed after a rank was lost, or the command was stopped.
    """
    first = os.environ.get("RANK") in (None, "0")
    try:
        yield
    except (UserError, CheckpointError) as error:
        if first:
            typer.secho(f"tpkernels: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
    except (TimeoutError, PeerLostError, RankMismatchError, FloatingPointError) as error:
        typer.secho(f"tpkernels: {type(error).__name__}: {error} {hint}".rstrip(), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if first and hint:
            typer.secho(f"tpkernels: stopped. {hint}", err=True)
        raise typer.Exit(130) from None

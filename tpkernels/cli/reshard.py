"""The command line's `tpkernels reshard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from tpkernels import checkpoint
from tpkernels.checkpoint.files import MANIFEST
from tpkernels.cli.errors import plain_errors


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(reshard)


def reshard(
    src: Annotated[Path, Argument(help="A checkpoint, or a folder of checkpoints (then its last one).")],
    dst: Annotated[Path, Argument(help="The new checkpoint's folder.")],
    tp: Annotated[int | None, Option(min=1, help="Ranks to cut each replica over.", show_default="as it is")] = None,
    dp: Annotated[int | None, Option(min=1, help="Replicas.", show_default="as it is")] = None,
    pp: Annotated[int | None, Option(min=1, help="1 joins pipeline stages.", show_default="as it is")] = None,
) -> None:
    """Write a checkpoint anew for another number of ranks, bit for bit, with two tensors in memory.

    checkpoint.load needs none of it: it reads the checkpoint of any number of ranks.
    """
    if not (src / MANIFEST).exists():
        src = checkpoint.latest(src) or src
    with plain_errors():
        checkpoint.reshard(src, dst, tp=tp, dp=dp, pp=pp)
    layout = checkpoint.peek(dst)["layout"]
    typer.echo(f"{dst}: {src} for {layout['tp']} ranks of {layout['dp']} replicas")

"""The command line: the app, its commands, and `tpkernels info`."""

from __future__ import annotations

import typer

from tpkernels.cli import plan, reshard, serve, train, tune
from tpkernels.cli.info import render

app = typer.Typer(
    name="tpkernels",
    help="Tensor-parallel kernels for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Tensor-parallel kernels for PyTorch."""


@app.command()
def info() -> None:
    """Say what was built, what this machine can run, and why something is off."""
    typer.echo(render())


for command in (train, serve, reshard, plan, tune):
    command.register(app)

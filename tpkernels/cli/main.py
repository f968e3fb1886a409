"""The command line: `tpkernels train`, `tpkernels info`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from tpkernels import launch
from tpkernels.cli import plan, reshard, serve
from tpkernels.cli.errors import plain_errors
from tpkernels.cli.info import render
from tpkernels.errors import UserError
from tpkernels.train import settings as settings_file
from tpkernels.train.command import work
from tpkernels.train.data import check_size, open_corpus
from tpkernels.train.settings import Settings

app = typer.Typer(
    name="tpkernels",
    help="Tensor-parallel kernels for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
serve.register(app)
reshard.register(app)
plan.register(app)
GO_ON = "The run can go on from its last checkpoint with --resume."
MODEL, TRAINING, PARALLEL, FOLDER = "Model", "Training", "Parallel", "Run folder"


@app.callback()
def main() -> None:
    """Tensor-parallel kernels for PyTorch."""


@app.command()
def info() -> None:
    """Say what was built, what this machine can run, and why something is off."""

    typer.echo(render())


@app.command()
def train(
    context: typer.Context,
    tp: Annotated[int, Option(help="Ranks to cut the model over.", rich_help_panel=PARALLEL)] = Settings.tp,
    dp: Annotated[
        int, Option(help="Replicas of the cut model; each learns from its part of the batch.", rich_help_panel=PARALLEL)
    ] = Settings.dp,
    sequence_parallel: Annotated[
        bool, Option("--sequence-parallel", help="Cut activations over the tokens, too.", rich_help_panel=PARALLEL)
    ] = Settings.sequence_parallel,
    codec: Annotated[str, Option(help="How sums travel: none, fp16, bf16.", rich_help_panel=PARALLEL)] = Settings.codec,
    grad_codec: Annotated[
        str,
        Option(help="How gradients travel between replicas: a codec, or topk.", rich_help_panel=PARALLEL),
    ] = Settings.grad_codec,
    grad_mode: Annotated[
        str,
        Option(
            help="When replicas average: sync (each step), delayed (a step late), local (every --local-steps).",
            rich_help_panel=PARALLEL,
        ),
    ] = Settings.grad_mode,
    local_steps: Annotated[
        int, Option(help="Steps between averages, with --grad-mode local.", rich_help_panel=PARALLEL)
    ] = Settings.local_steps,
    check_replicas: Annotated[
        int, Option(help="Steps between checks that replicas are the same; 0 for none.", rich_help_panel=PARALLEL)
    ] = Settings.check_replicas,
    timeout: Annotated[
        float, Option(min=1.0, help="Seconds to wait for a rank before giving it up.", rich_help_panel=PARALLEL)
    ] = 60.0,
    arena_mib: Annotated[int, Option(min=1, help="Shared memory of each rank, in MiB.", rich_help_panel=PARALLEL)] = 16,
    layers: Annotated[int, Option(help="Transformer blocks.", rich_help_panel=MODEL)] = Settings.layers,
    d_model: Annotated[int, Option(help="Width of the model.", rich_help_panel=MODEL)] = Settings.d_model,
    heads: Annotated[int, Option(help="Attention heads.", rich_help_panel=MODEL)] = Settings.heads,
    context_: Annotated[
        int, Option("--context", help="Bytes that the model looks back on.", rich_help_panel=MODEL)
    ] = Settings.context,
    dtype: Annotated[str, Option(help="fp32, or bf16 for autocast.", rich_help_panel=MODEL)] = Settings.dtype,
    data: Annotated[
        str | None,
        Option(
            help="Folder or file to learn from.", show_default="Python's standard library", rich_help_panel=TRAINING
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        Option(help="Wall time to stay within.", show_default="2 without --steps", rich_help_panel=TRAINING),
    ] = None,
    steps: Annotated[
        int | None, Option(help="Length of the schedule.", show_default="what fits", rich_help_panel=TRAINING)
    ] = None,
    stop_at: Annotated[
        int | None, Option(help="Stop after this step; --resume goes on.", rich_help_panel=TRAINING)
    ] = None,
    batch: Annotated[int, Option(help="Sequences per step.", rich_help_panel=TRAINING)] = Settings.batch,
    lr: Annotated[float, Option(help="Highest learning rate.", rich_help_panel=TRAINING)] = Settings.lr,
    warmup: Annotated[int, Option(help="Steps to get there.", rich_help_panel=TRAINING)] = Settings.warmup,
    weight_decay: Annotated[float, Option(help="For matrices.", rich_help_panel=TRAINING)] = Settings.weight_decay,
    clip: Annotated[float, Option(help="Largest gradient norm.", rich_help_panel=TRAINING)] = Settings.clip,
    seed: Annotated[int, Option(help="For weights, batches, sample.", rich_help_panel=TRAINING)] = Settings.seed,
    eval_every: Annotated[
        int, Option(help="Steps between validations.", rich_help_panel=TRAINING)
    ] = Settings.eval_every,
    folder: Annotated[  # not --run: torchrun would take that for its own --run-path
        Path | None, Option(help="Its path.", show_default="runs/<date and time>", rich_help_panel=FOLDER)
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from its last checkpoint.", rich_help_panel=FOLDER)] = False,
    checkpoint_every: Annotated[
        int, Option(help="Steps between checkpoints.", rich_help_panel=FOLDER)
    ] = Settings.checkpoint_every,
    keep: Annotated[int, Option(help="Checkpoints to keep.", rich_help_panel=FOLDER)] = Settings.keep,
    sample_bytes: Annotated[
        int, Option(help="Bytes to generate at the end.", rich_help_panel=FOLDER)
    ] = Settings.sample_bytes,
    parity_steps: Annotated[
        int, Option(help="Steps to repeat uncut in one process at the end; 0 for none.", rich_help_panel=FOLDER)
    ] = Settings.parity_steps,
) -> None:
    """Train a byte-level GPT cut over several ranks of this machine.

    Starts the ranks by itself. Under torchrun it is one of them: torchrun --nproc-per-node 2 -m tpkernels train
    """
    with plain_errors(GO_ON):
        asked = _asked(context)

        if launch.under_torchrun() and not resume:
            _take_all_ranks(asked, launch.world_size())
        settings, path = _resolve(asked, folder, resume)
        if launch.under_torchrun():
            _check_ranks(settings, launch.world_size(), resume)
        elif settings.ranks > 1:
            arguments = sys.argv[1:] if folder is not None else [*sys.argv[1:], "--folder", str(path)]
            raise typer.Exit(launch.launch(settings.ranks, arguments, GO_ON))

        work(settings, path, resume=resume, timeout_s=timeout, arena_mib=arena_mib)


def _asked(context: typer.Context) -> dict[str, Any]:
    """The options of Settings that the user gave in so many words."""
    known = {f.name for f in fields(Settings)}
    names = {("context_" if name == "context" else name): name for name in known}
    source = context.get_parameter_source
    return {
        names[key]: value
        for key, value in context.params.items()
        if key in names and getattr(source(key), "name", "DEFAULT") != "DEFAULT"
    }


def _take_all_ranks(asked: dict[str, Any], ranks: int) -> None:
    """Without --tp, cut each replica over all ranks that torchrun started for it."""

    dp = asked.get("dp", 1)
    if dp < 1 or "tp" in asked:
        return
    if ranks % dp:
        raise UserError(
            f"torchrun started {ranks} ranks, which --dp {dp} does not divide: start a multiple of {dp}, or take "
            f"another --dp."
        )
    asked["tp"] = ranks // dp


def _check_ranks(settings: Settings, ranks: int, resume: bool) -> None:

    if settings.ranks == ranks:
        return
    if resume:
        raise UserError(
            f"torchrun started {ranks} ranks and the run has --tp {settings.tp} --dp {settings.dp}: "
            f"continue it with torchrun --nproc-per-node {settings.ranks}, or start anew without --resume."
        )
    each = "" if settings.dp == 1 else f" for each of --dp {settings.dp}"
    raise UserError(
        f"torchrun started {ranks} ranks and --tp is {settings.tp}{each}: leave --tp out, or make them equal."
    )


def _resolve(asked: dict[str, Any], folder: Path | None, resume: bool) -> tuple[Settings, Path]:
    """Settings and folder of the run; everything that can be checked before ranks are started is checked."""

    if resume:
        folder = folder or _newest_run(Path("runs"))
        settings = settings_file.resume(folder, asked)
    else:
        folder = folder or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
        settings = Settings(**asked)
    settings_file.check(settings)
    if settings.ranks > 1 and not hasattr(os, "sched_getaffinity"):
        raise UserError("several ranks need Linux: take --tp 1 and --dp 1.")
    check_size(open_corpus(settings.data), settings.context)
    return settings, folder


def _newest_run(parent: Path) -> Path:

    found = sorted(path.parent for path in parent.glob("*/settings.json"))
    if not found:
        raise UserError(
            f"there is no run to resume in {parent.absolute()}: name its folder with --folder, or leave out --resume."
        )
    return found[-1]

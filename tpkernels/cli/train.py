"""The command line's `tpkernels train`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from tpkernels import checkpoint
from tpkernels.cli.errors import plain_errors
from tpkernels.cli.options import PARALLEL, Arena, Timeout, given, options_of
from tpkernels.cli.ranks import start_ranks
from tpkernels.comm import torchrun
from tpkernels.errors import UserError
from tpkernels.planner.hardware import cores
from tpkernels.train import settings as settings_file
from tpkernels.train.command import work
from tpkernels.train.data import check_size, open_corpus
from tpkernels.train.planned import cut_of, line_of, plan_run
from tpkernels.train.settings import FOLDER, Settings

GO_ON = "The run can go on from its last checkpoint with --resume."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


@options_of(Settings)
def train(
    ctx: typer.Context,
    timeout: Timeout = 60.0,
    arena_mib: Arena = 16,
    plan: Annotated[
        str | None,
        Option(help="auto: the cut that tpkernels plan ranks first, with what is given.", rich_help_panel=PARALLEL),
    ] = None,
    folder: Annotated[  # not --run: torchrun would take that for its own --run-path
        Path | None, Option(help="Its path.", show_default="runs/<date and time>", rich_help_panel=FOLDER)
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from its last checkpoint.", rich_help_panel=FOLDER)] = False,
    resume_or_start: Annotated[
        bool,
        Option(
            "--resume-or-start",
            help="--resume where it has a checkpoint, else start: for launchers that restart.",
            rich_help_panel=FOLDER,
        ),
    ] = False,
    **_: Any,
) -> None:
    """Train a byte-level GPT cut over several ranks of this machine.

    Starts the ranks by itself. Under torchrun it is one of them: torchrun --nproc-per-node 2 -m tpkernels train
    """
    with plain_errors(GO_ON):
        options = given(ctx, Settings)
        if resume_or_start:
            resume = resume or _has_checkpoint(folder)
        planned = ""
        if plan is not None and not (resume and resume_or_start):
            planned = _plan(plan, options, resume, arena_mib)
        if torchrun.is_rank() and not resume:
            use_all_ranks(options, torchrun.world_size())
        settings, path = _resolve(options, folder, resume)
        if torchrun.is_rank():
            _check_ranks(settings, torchrun.world_size(), resume)
        elif settings.ranks > 1:
            arguments = sys.argv[1:] if folder is not None else [*sys.argv[1:], "--folder", str(path)]
            raise typer.Exit(start_ranks(settings.ranks, arguments, GO_ON))
        work(
            settings, path, resume=resume, anew=resume_or_start, timeout_s=timeout, arena_mib=arena_mib,
            planned=planned,
        )  # fmt: skip


def _has_checkpoint(folder: Path | None) -> bool:
    if folder is None:
        raise UserError("--resume-or-start needs the folder of the run, the same at each start: give --folder.")
    return checkpoint.latest(folder / "checkpoints") is not None


def _plan(plan: str, options: dict[str, Any], resume: bool, arena_mib: int) -> str:
    """Add the planner's cut to the options; the line that says which and why."""
    if plan != "auto":
        raise UserError(f"--plan is auto, got {plan!r}.")
    if resume:
        raise UserError(
            "--plan auto chooses the cut of a new run: leave it out with --resume, or give --tp, --dp, --pp."
        )
    if torchrun.local_size() != torchrun.world_size():
        raise UserError("--plan auto is for the ranks of one machine: give --tp, --dp and --pp (see tpkernels plan).")
    settings = Settings(**options)
    settings_file.check_values(settings)
    ranks = torchrun.world_size() if torchrun.is_rank() else cores()
    report = plan_run(settings, options.keys(), ranks, arena_mib)
    options |= cut_of(report)
    return line_of(report)


def use_all_ranks(options: dict[str, Any], ranks: int) -> None:
    """Without --tp, cut each replica over all ranks that torchrun started for it."""
    dp, pp = options.get("dp", 1), options.get("pp", 1)
    if dp < 1 or pp < 1 or "tp" in options:
        return
    if ranks % (dp * pp):
        given = f"--dp {dp}" + (f" times --pp {pp}" if pp > 1 else "")
        raise UserError(
            f"torchrun started {ranks} ranks, which {given} does not divide: start a multiple of {dp * pp}, or take "
            f"another --dp."
        )
    options["tp"] = ranks // (dp * pp)


def _check_ranks(settings: Settings, ranks: int, resume: bool) -> None:
    if settings.ranks == ranks:
        return
    if resume:
        raise UserError(
            f"torchrun started {ranks} ranks and the run has {_sizes(settings)}: "
            f"continue it with torchrun --nproc-per-node {settings.ranks}, or with other --tp, --dp and --pp."
        )
    each = "" if settings.dp == 1 else f" for each of --dp {settings.dp}"
    each += "" if settings.pp == 1 else f"{' and' if each else ' for each of'} --pp {settings.pp}"
    raise UserError(
        f"torchrun started {ranks} ranks and --tp is {settings.tp}{each}: leave --tp out, or make them equal."
    )


def _sizes(settings: Settings) -> str:
    return f"--tp {settings.tp} --dp {settings.dp}" + (f" --pp {settings.pp}" if settings.pp > 1 else "")


def _resolve(options: dict[str, Any], folder: Path | None, resume: bool) -> tuple[Settings, Path]:
    """Settings and folder of the run; everything that can be checked before ranks are started is checked."""
    if resume:
        folder = folder or _newest_run(Path("runs"))
        settings = settings_file.resume(folder, options)
    else:
        folder = folder or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
        settings = Settings(**options)
    settings_file.check(settings)
    if settings.ranks > 1 and not hasattr(os, "sched_getaffinity"):
        raise UserError("several ranks need Linux: take --tp 1, --dp 1 and --pp 1.")
    check_size(open_corpus(settings.data), settings.context)
    return settings, folder


def _newest_run(parent: Path) -> Path:
    found = sorted(path.parent for path in parent.glob("*/settings.json"))
    if not found:
        raise UserError(
            f"there is no run to resume in {parent.absolute()}: name its folder with --folder, or leave out --resume."
        )
    return found[-1]

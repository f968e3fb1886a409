"""The work of each rank of `tpkernels train`, from the first message to the last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from rich.panel import Panel
from rich.text import Text

from tpkernels.comm import torchrun
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.layers.engines import engines_line
from tpkernels.train import parity, report
from tpkernels.train.gpt import generate
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Run, open_run

PROMPT = b"def "


def work(
    settings: Settings,
    folder: Path,
    *,
    resume: bool,
    anew: bool,
    timeout_s: float,
    arena_mib: int,
    planned: str = "",
) -> None:
    """Train, then report.

    Args:
        folder: of the run; that of rank 0 counts.
        planned: a line about how the cut was chosen, shown first.
        resume, anew: as for `open_run`.
        timeout_s, arena_mib: as for `torchrun.open_ranks`.

    Raises:
        UserError: see `open_run`.
        typer.Exit: with 3, when the run is not equal to one of one process up to rounding.
    """
    with torchrun.open_ranks(timeout_s, arena_mib, tp=settings.tp, dp=settings.dp, pp=settings.pp) as layout:
        folder = gather(folder, layout.world)[0]  # the default name has the time in it, which may differ by a second
        with open_run(settings, folder, layout, resume=resume, anew=anew) as run:
            if planned:
                run.screen.line(planned)
            _greet(run)
            run.loop()
        held = _conclude(run)
    if not held:
        raise typer.Exit(3)


def _greet(run: Run) -> None:
    s, corpus, layout = run.settings, run.trainer.corpus, run.layout
    whole = report.whole_parameters(run)
    start = f"going on from step {run.step:,} in" if run.step else "run folder"
    over = f"{s.tp} rank{'' if s.tp == 1 else 's'} ({layout.tp.transport})"
    if layout.dp is not None:
        over = f"{s.dp} replicas ({layout.dp.transport}, gradients {s.grad_codec}, {s.grad_mode}) of {over}"
    if layout.pp is not None:
        over = f"{s.pp} stages ({s.schedule}, {s.micro_batches} micro-batches, {s.stage_codec}) of {over}"
    run.screen.line(
        f"{whole / 1e6:.2f} M parameters over {over}, {s.dtype}\n"
        f"{s.tokens:,} bytes a step of {corpus.name} ({corpus.size / 1e6:.1f} MB)"
    )
    if engines := engines_line(run.trainer.model, s.batch // s.dp * s.context):
        run.screen.line(engines)
    run.screen.line(f"{start} {run.folder}")


def _conclude(run: Run) -> bool:
    """Sample, compare with one process, print and draw; whether the comparison held (the same on all ranks)."""
    found = report.collect(run)
    sample = b""
    if run.settings.sample_bytes:
        pipeline = None if run.trainer.pipe is None else run.trainer.pipe.group
        length, seed = run.settings.sample_bytes, run.settings.seed
        (sample,) = generate(run.trainer.model, [PROMPT], length, seed=seed, pipeline=pipeline)
    if run.group.rank == 0:
        compared = _compare(run)
        found = replace(found, parity=compared)
        _show(run, found, sample)
    _wait_for_rank_0(run.group)
    return gather(found.parity is None or found.parity.holds, run.group)[0]


def _compare(run: Run) -> parity.Parity | None:
    if not run.settings.parity_steps:
        return None
    if (reason := parity.not_the_same_program(run.settings)) is not None:
        run.screen.line(f"no comparison with one process: {reason}")
        return None
    run.screen.line(f"repeating {run.settings.parity_steps} steps uncut in one process ...")
    before = torch.get_num_threads()
    torch.set_num_threads(torchrun.threads(1))  # the other ranks only wait
    try:
        return parity.compare(run.trainer, run.log.records, run.total)
    finally:
        torch.set_num_threads(before)


def _wait_for_rank_0(group: Group) -> None:
    if group.world_size > 1:
        dist.barrier(group.process_group)  # as long as it takes: the group's own waits have a short deadline


def _show(run: Run, found: report.Report, sample: bytes) -> None:
    console = run.screen.console
    if sample:
        text = Text(sample.decode("utf-8", errors="replace").replace("\r", ""))
        console.print(Panel(text, title=f"sample after {run.step:,} steps", title_align="left"))
    report.show(found, console)
    console.print()
    written = [report.write_summary(found, run.folder), run.folder / "log.jsonl"]
    size, ranks = found.whole_parameters / 1e6, len(found.ranks)
    title = f"byte-level GPT, {size:.2f} M parameters over {ranks} ranks, {found.tokens_per_s:,.0f} tokens/s"
    picture = report.draw(run.log.records, run.folder, title) if run.log.records else None
    if picture is None:
        run.screen.line("no picture: matplotlib is not installed (pip install 'tpkernels[bench]')")
    else:
        written.append(picture)
    run.screen.line("written: " + ", ".join(str(path) for path in written))
    if run.stopped_early():
        run.screen.line(f"the schedule has steps left; to go on: tpkernels train --resume --folder {run.folder}")

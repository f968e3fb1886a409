"""`--plan auto`: the cut of a run by the planner, for the ranks that there are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tpkernels.errors import UserError
from tpkernels.planner import Choices, Job, Report, Shape, this_machine
from tpkernels.planner.hardware import cores, crowded
from tpkernels.planner.recipe import WIRE_BYTES, whole_heads
from tpkernels.planner.search import Search
from tpkernels.train.settings import Settings
from tpkernels.train.stages import config_of


def job_of(settings: Settings) -> Job:
    """The job of a run as the planner knows it."""
    c = config_of(settings)
    shape = Shape.gpt(c.layers, c.d_model, c.heads, c.vocab, "byte-level GPT")
    return Job(replace(shape, tied=False), settings.context, settings.batch)


def plan_run(settings: Settings, given: Collection[str], ranks: int, arena_mib: int) -> Report:
    """Rank the ways in which so many ranks of this machine can make a run; its codecs stay.

    Args:
        settings: of the run. given: names of those that are on the command line, which stay as well.
        ranks: all of this machine.
        arena_mib: shared memory of a rank.

    Raises:
        UserError: no cut can run with what is given; says why.
    """
    s = settings

    def allowed(name: str, free: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        return (getattr(s, name),) if name in given else free

    averages = s.grad_mode == "sync" and s.grad_codec in WIRE_BYTES  # what ZeRO needs
    choices = Choices(
        sequence_parallel=allowed("sequence_parallel", (False, True)),
        zero=allowed("zero", (0, 1, 2) if averages else (0,)),
        virtual=(1,),
        recompute=("none",),
        codecs=(s.codec,),
        grad_codecs=(s.grad_codec if averages else "none",),
        tp=allowed("tp"),
        pp=allowed("pp"),
        dp=allowed("dp"),
        micro_batches=allowed("micro_batches"),
        accumulate=False,
    )
    machine, job = crowded(this_machine(ranks), cores()), job_of(s)
    report = Report(machine, job, Search(machine, job, whole_heads(job.shape), choices, arena_mib << 20).run())
    try:
        _ = report.recipe
    except UserError as error:
        raise UserError(f"--plan auto: {error}") from None
    return report


def cut_of(report: Report) -> dict[str, Any]:
    """The settings that the best recipe of a report has, by name."""
    r = report.recipe
    found = {"tp": r.tp, "dp": r.dp, "pp": r.pp, "sequence_parallel": r.sequence_parallel, "zero": r.zero}
    return found | ({"micro_batches": r.micro_batches(report.job)} if r.pp > 1 else {})


def line_of(report: Report) -> str:
    """What was planned and why, in a line."""
    error, best, second = report.error[0], report.candidates[0], report.runnable[1:2]
    sure = "error unknown" if error is None else f"error {error:.0f} % on this class of machine"
    line = f"planned: {report.recipe.text()}, {1e3 * best.seconds:,.1f} ms a step ({sure})"
    for c in second:
        line += f"; tp {c.tp}, pp {c.pp}, dp {c.dp} {c.why}"
    return line

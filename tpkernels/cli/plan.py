"""`tpkernels plan`: which cut of a model to take on a machine. `tpkernels plan-model`: how it would be cut."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from typer import Argument, Option

from tpkernels.cli.errors import plain_errors
from tpkernels.cli.ranks import start_ranks
from tpkernels.comm import torchrun
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError, UserError
from tpkernels.plan.rules import Plan
from tpkernels.plan.table import plan_table
from tpkernels.planner import Report, Serving, cluster, plan_serving, predict
from tpkernels.planner import plan as plan_training
from tpkernels.planner.api import count
from tpkernels.planner.calibrate import calibrate as calibrate_machine
from tpkernels.planner.hardware import Cluster, calibrated_file, cores, this_machine
from tpkernels.planner.models import model_without_weights
from tpkernels.planner.picture import html, png
from tpkernels.planner.serving import as_dict

MACHINE, JOB, OUTPUT, ROWS = "Machine", "Job", "Output", "Rows"  # panels of the help
MODEL = "A folder with config.json, a config file, or a model type such as llama."


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(plan)
    app.command(name="plan-model")(plan_model)


def plan(
    model: Annotated[str | None, Argument(help=MODEL)] = None,
    gpus: Annotated[int | None, Option(min=1, help="How many GPUs.", rich_help_panel=MACHINE)] = None,
    gpu: Annotated[
        str, Option(help="Their type: a100, h100, h200, or a .toml file.", rich_help_panel=MACHINE)
    ] = "h200",
    cpu: Annotated[bool, Option("--cpu", help="CPU ranks, of one core each.", rich_help_panel=MACHINE)] = False,
    ranks: Annotated[int, Option(min=1, help="How many, with --cpu.", rich_help_panel=MACHINE)] = 2,
    hosts: Annotated[int, Option(min=1, help="That share them, with --cpu.", rich_help_panel=MACHINE)] = 1,
    link: Annotated[
        str, Option(help="Between nodes, or INSIDE,BETWEEN: nvlink,ib400; 1gbit.", rich_help_panel=MACHINE)
    ] = "",
    tokens: Annotated[str, Option(help="Of one step: 512K, 8M (of 1024).", rich_help_panel=JOB)] = "",
    context: Annotated[
        int | None, Option(help="Tokens of a sequence.", show_default="4096 at most", rich_help_panel=JOB)
    ] = None,
    codecs: Annotated[
        str, Option(help="How messages may be packed: none, fp16, bf16, int8, fp8.", rich_help_panel=JOB)
    ] = "none,bf16,int8",
    arena_mib: Annotated[int, Option(min=1, help="Shared memory of each rank, in MiB.", rich_help_panel=JOB)] = 16,
    serve: Annotated[bool, Option("--serve", help="Plan for generating, not training.", rich_help_panel=JOB)] = False,
    batch: Annotated[int, Option(help="Sequences of one copy, with --serve.", rich_help_panel=JOB)] = 8,
    rows: Annotated[int, Option(min=1, help="Of the table that is printed.", rich_help_panel=OUTPUT)] = 10,
    as_json: Annotated[bool, Option("--json", help="Print all of it as JSON.", rich_help_panel=OUTPUT)] = False,
    picture: Annotated[Path | None, Option("--png", help="Draw it into a file.", rich_help_panel=OUTPUT)] = None,
    page: Annotated[Path | None, Option("--html", help="Write it as a page.", rich_help_panel=OUTPUT)] = None,
    calibrate: Annotated[
        bool,
        Option(
            "--calibrate", help="Measure this machine's --ranks, for later --cpu; no MODEL.", rich_help_panel=MACHINE
        ),
    ] = False,
    predict_rows: Annotated[
        Path | None, Option("--predict", help="A CSV of recipes; no MODEL.", rich_help_panel=ROWS)
    ] = None,
    hardware: Annotated[str, Option(help="The machine class of --predict.", rich_help_panel=ROWS)] = "a100-dgx",
    out: Annotated[Path | None, Option(help="The CSV with predicted_ms.", rich_help_panel=ROWS)] = None,
) -> None:
    """Rank the ways to cut a model over a machine: whether they fit, the time of a step, and how sure that is."""
    with plain_errors():
        if predict_rows is not None:
            if model is not None or out is None:
                raise UserError("plan: --predict takes no MODEL, and needs --out")
            typer.echo(f"{predict(predict_rows, hardware, out)} rows are in {out}")
            return
        if calibrate:
            if model is not None or ranks > cores():
                raise UserError(f"plan: --calibrate takes no MODEL, and --ranks of 1 to {cores()}, one a core")
            _calibrate(ranks)
            return
        if model is None or out is not None:
            raise UserError("plan: expected a MODEL, or --predict ROWS.csv with --out OUT.csv")
        if cpu == (gpus is not None):
            raise UserError("plan: expected --gpus N, or --cpu")
        machine = this_machine(ranks, link, hosts) if cpu else cluster(gpu, gpus or 1, link)
        if serve:
            _serve(plan_serving(model, machine, batch=batch, context=context), machine, as_json)
            return
        if not tokens:
            raise UserError("plan: --tokens: expected those of one step, such as 512K or 8M")
        names = tuple(name.strip() for name in codecs.split(",") if name.strip())
        report = plan_training(
            model,
            machine,
            tokens=count(tokens, "--tokens"),
            sequence=context,
            codecs=names,
            arena_bytes=arena_mib << 20,
        )
        for file, draw in ((picture, png), (page, html)):
            if file is not None:
                draw(report, file)
        if as_json:
            typer.echo(report.json(), nl=False)
        else:
            _print(report, rows)
        if report.best is None:
            raise UserError("plan: nothing can run; the reasons are above")


def _calibrate(ranks: int) -> None:
    if ranks > 1 and not torchrun.is_rank():
        raise typer.Exit(start_ranks(ranks, sys.argv[1:]))
    with ExitStack() as opened:
        layout = opened.enter_context(torchrun.open_ranks(60.0, 16, tp=ranks))
        alone = layout.tp if ranks == 1 else opened.enter_context(Group.open(dist.new_subgroups(1)[0]))  # type: ignore[no-untyped-call]
        found = calibrate_machine(layout.tp, alone)
        if layout.tp.rank:
            return
    d, shm = found.cluster.device, found.cluster.inside
    codecs = ", ".join(f"{name} {passes:.1f}" for name, passes in d.codec_passes.items())
    typer.echo(
        f"{ranks} ranks, each: {d.flops / 1e9:,.0f} GFLOP/s at most, {d.gemm_rate:.0%} of it in products; "
        f"{d.memory_bandwidth / 1e9:.1f} GB/s of memory; {1e6 * d.host_layer_s:,.0f} us a layer\n"
        f"shared memory: {1e6 * shm.latency(ranks):.1f} us, {shm.rate * shm.bandwidth / 1e9:.1f} GB/s; "
        f"codecs, passes of memory: {codecs or 'not measured'}\n"
        f"layers are {found.fitted:.1f} % off, those of sizes left out {found.left_out:.1f} %\n"
        f"written: {calibrated_file('cpu')}"
    )


def _console() -> Any:
    """One in which a row of a table is one line also where the output is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 150))


def _print(report: Report, rows: int) -> None:
    from rich.table import Table

    job, machine = report.job, report.cluster
    title = (
        f"{job.shape.name}, {job.shape.parameters / 1e9:,.2f} G parameters, {job.batch:,} sequences of "
        f"{job.sequence:,} tokens, on {machine.ranks:,} x {machine.device.name}"
    )
    shown = Table(title=title, title_justify="left")
    for column in ("cut", "ms a step", "compute", "exposed", "bubble", "tokens/s", "MFU", "GiB a rank"):
        shown.add_column(column, justify="left" if column == "cut" else "right", overflow="fold")
    shown.add_column("why not the best", overflow="fold")
    for c in report.runnable[:rows]:
        assert c.recipe and c.time and c.memory
        shown.add_row(
            c.recipe.text(), f"{1e3 * c.seconds:,.1f}", f"{1e3 * (c.time.compute + c.time.optimizer):,.1f}",
            f"{1e3 * c.time.communication:,.1f}", f"{1e3 * c.time.bubble:,.1f}", f"{report.tokens_per_s(c):,.0f}",
            f"{report.mfu(c):.1%}", f"{c.memory.total / 2**30:.1f}", c.why or "it is the best",
        )  # fmt: skip
    console = _console()
    console.print(shown)
    if report.best and (m := report.best.memory):
        parts = {"parameters": m.parameters, "gradients": m.gradients, "optimizer": m.optimizer,
                 "activations": m.activations, "arena": m.arena}  # fmt: skip
        text = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        console.print(f"Memory of the best, GiB on a rank: {text}.", highlight=False)
    for line in report.texts():
        console.print(line, highlight=False)
    refused = [c for c in report.candidates if c.recipe is None]
    console.print(
        f"{len(report.runnable)} cuts can run, {len(refused)} cannot{':' if refused else '.'}", highlight=False
    )
    for c in refused[:rows]:
        console.print(f"  tp {c.tp}, pp {c.pp}, dp {c.dp}: {c.why}", highlight=False)
    if len(refused) > rows:
        console.print(f"  and {len(refused) - rows} more: --rows, --json", highlight=False)


def _serve(found: list[Serving], machine: Cluster, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        import json

        typer.echo(json.dumps([as_dict(s) for s in found], indent=1))
        return
    shown = Table(title=f"batch {found[0].batch} on {machine.ranks} x {machine.device.name}", title_justify="left")
    for column in ("tp", "copies", "first token ms", "next token ms", "tokens/s", "weights GiB", "cache GiB"):
        shown.add_column(column, justify="right")
    shown.add_column("why it cannot run", overflow="fold")
    for s in found:
        shown.add_row(
            str(s.tp), str(s.copies), f"{1e3 * s.first_s:,.1f}", f"{1e3 * s.next_s:,.2f}", f"{s.tokens_per_s:,.0f}",
            f"{s.weights / 2**30:.1f}", f"{s.cache / 2**30:.1f}", s.why,
        )  # fmt: skip
    console = _console()
    console.print(shown)
    console.print("Error: unknown; no serving time was held against this model of time.", highlight=False)


def plan_model(
    model: Annotated[str, Argument(help=MODEL)],
    tp: Annotated[int, Option(min=1, help="Ranks to cut it over.")] = 2,
) -> None:
    """Show how a model of transformers would be cut: each linear's style and parts, heads, parameters on a rank."""
    with plain_errors():
        whole = model_without_weights(model)
        try:
            table = plan_table(whole, Plan.resolve(whole), tp)
        except PlanError as error:
            raise UserError(str(error)) from None
    _print_model(table, type(whole).__name__, tp)


def _print_model(table: Any, model: str, tp: int) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{model} over {tp} ranks, by the plan of {table.source}", title_justify="left")
    for column in ("module", "", "style", "weight", "parts"):
        shown.add_column(column, justify="right" if column in ("", "weight") else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(row.name, f"{row.count}x", row.style, row.shape, row.parts)
    console = Console()
    console.print(shown)
    for how, count_ in table.heads.items():
        console.print(f"{count_} attention blocks: {how}", highlight=False)
    whole, mine = table.totals
    console.print(f"{whole:,} parameters, {mine:,} on the fullest rank ({mine / max(whole, 1):.1%})", highlight=False)

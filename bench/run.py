"""Measure one op against its baselines: `python -m bench.run all_reduce --ranks 2`.

The protocol is described in bench/timing.py. Rows go to the screen and, with --out, to a file of JSON lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import shapes, table
from bench.cell import CODEC_ROUNDING, DTYPES, Cell, Setting
from bench.ranks import RankTeam, cores, launch
from bench.rows import Row, circumstances, row_of, save
from bench.study import links
from bench.timing import measure, slowest

QUIET_S = 2.0  # without company, before a cell is measured


@dataclass(frozen=True)
class Bench:
    """One op: where its cells are made, how its sizes are written, which are taken by default.

    Args:
        only: the candidates without --only; empty: all.
    """

    where: str
    parse: Callable[[str], Any]
    sizes: tuple[Any, ...]
    only: tuple[str, ...] = ()

    def make(self, setting: Setting, size: Any) -> Cell:
        """The cell, from `where`, which is imported only now."""
        module, name = self.where.split(":")
        cell: Cell = getattr(import_module(module), name)(setting, size)
        return cell


BYTES, GEMMS, VOCABS = (tuple(s) for s in (shapes.COLLECTIVE_BYTES, shapes.GEMMS, shapes.VOCABS))

# One line each. The training step has a bench of its own, in processes of its own: `python -m bench.train_step`.
BENCHES = {
    "all_reduce": Bench("bench.collectives:all_reduce", shapes.parse_bytes, BYTES),
    "all_reduce_sym": Bench(
        "bench.collectives:all_reduce", shapes.parse_bytes, BYTES, ("gloo", "sym")
    ),  # rows of all_reduce
    "reduce_scatter": Bench("bench.collectives:reduce_scatter", shapes.parse_bytes, BYTES),
    "all_gather": Bench("bench.collectives:all_gather", shapes.parse_bytes, BYTES),
    "gemm_all_reduce": Bench("bench.gemms:gemm_all_reduce", shapes.parse_gemm, GEMMS),
    "gemm_reduce_scatter": Bench("bench.gemms:gemm_reduce_scatter", shapes.parse_gemm, GEMMS[1:]),  # M = 1 has no rows
    "all_gather_gemm": Bench("bench.gemms:all_gather_gemm", shapes.parse_gemm, GEMMS[1:]),
    "few_rows": Bench("bench.few_rows:few_rows", shapes.parse_gemm, tuple(shapes.FEW_ROWS)),
    "few_rows_cached": Bench("bench.few_rows:few_rows_cached", shapes.parse_gemm, tuple(shapes.FEW_ROWS)),
    "all_reduce_add_rms_norm": Bench("bench.norms:all_reduce_add_rms_norm", shapes.parse_rows, tuple(shapes.NORMS)),
    "vocab_embedding": Bench("bench.vocab:vocab_embedding", shapes.parse_vocab, VOCABS),
    "vocab_cross_entropy": Bench("bench.vocab:vocab_cross_entropy", shapes.parse_vocab, VOCABS),
    "codecs": Bench("bench.overheads:codecs", shapes.parse_bytes, BYTES),
    "codecs_group": Bench("bench.overheads:codecs_group", shapes.parse_bytes, BYTES),
    "codec_moves": Bench("bench.codecs:moves", shapes.parse_bytes, (256 << 10, 4 << 20, 64 << 20)),
    "overheads": Bench("bench.overheads:overheads", shapes.parse_gemm, tuple(shapes.SMALL_GEMMS)),
    "overheads_training": Bench("bench.overheads:overheads_training", shapes.parse_gemm, tuple(shapes.SMALL_GEMMS)),
    "ddp_step": Bench("bench.ddp_step:ddp_step", shapes.parse_bytes, (40 << 20, 160 << 20)),
    "dispatch": Bench("bench.overheads:dispatch", shapes.parse_bytes, (4,)),
}


@dataclass(frozen=True)
class Spec:
    """The jobs and options of every rank."""

    jobs: tuple[tuple[str, Any], ...]  # (op, size)
    setting: dict[str, Any]
    rounds: int
    block_s: float
    most_lost: float
    where: Row
    wait_s: float = 0.0
    benches: Mapping[str, Bench] = field(default_factory=lambda: BENCHES)


def measure_cell(cell: Cell, team: RankTeam, spec: Spec) -> list[Row]:
    """The rows of one cell."""
    probes: list[float] = []

    def probe() -> None:
        probes.append(team.flag_rtt_ns())

    timings = measure(
        cell.candidates, team, rounds=spec.rounds, block_s=spec.block_s, most_lost=spec.most_lost, each_round=probe
    )
    probe()
    by_name = {t.name: t for t in timings}
    return [row_of(cell, candidate, by_name, probes, spec.where) for candidate in cell.candidates]


def complete(rows: list[Row], rounds: int) -> bool:
    """Whether the cell had its cores in half of the rounds at least."""
    return all(2 * row["rounds"] >= rounds for row in rows if row["verified"])


def wait_until_quiet(team: RankTeam, most_lost: float, until: float) -> None:
    """Return when nothing else runs, or when it is late; all ranks at once."""
    while True:
        before, start = team.lost_s(), time.monotonic()
        time.sleep(QUIET_S)
        share = (team.lost_s() - before) / (time.monotonic() - start)
        late = float(time.monotonic() > until)
        if slowest(team, share) <= most_lost or slowest(team, late):
            return


def on_rank(team: RankTeam, spec: Spec, send: Callable[[Any], None]) -> None:
    """The work of a rank process."""
    setting = Setting(team.rank, team.world_size, **spec.setting)
    until = time.monotonic() + spec.wait_s
    for op, size in spec.jobs:
        try:
            cell = spec.benches[op].make(setting, size)
        except ValueError as error:  # the same on every rank
            if team.rank == 0:
                send(f"left out: {error}")
            continue
        if not cell.candidates:
            raise ValueError(f"{op}: there is no candidate called {' or '.join(setting.only)}")
        rows: list[Row] = []
        while not rows or not (complete(rows, spec.rounds) or slowest(team, float(time.monotonic() > until))):
            if spec.wait_s:
                wait_until_quiet(team, spec.most_lost, until)
            rows = measure_cell(cell, team, spec)
        if team.rank == 0:
            send(rows)
    setting.close()


def run(spec: Spec, ranks: int, *, pin: bool, link: str | None = None, hosts: int = 2) -> Iterator[list[Row] | str]:
    """Rows of each cell as it is finished, and messages; over a link, the ranks on so many hosts."""
    with links.opened(link or links.LOOPBACK, hosts, own_memory=ranks > hosts) as opened:
        places = [opened.hosts[rank * hosts // ranks] for rank in range(ranks)] if link else []
        yield from launch(ranks, on_rank, spec, pin=pin, hosts=places)


def overlaps(rows: Sequence[Row]) -> Iterator[str]:
    """Per size: the part of the communication that the fused op hides, of what it takes after the product."""
    for fused in (row for row in rows if row["variant"] == "tpkernels" and row["exposed_us"] is not None):
        apart = [r for r in rows if r["variant"] == "one_chunk" and table.size(r) == table.size(fused)]
        if apart and apart[0]["exposed_us"] and apart[0]["exposed_us"] > 0:
            exposed, whole = max(fused["exposed_us"], 0.0), apart[0]["exposed_us"]
            yield (
                f"{fused['op']} {table.size(fused)}, codec {fused['codec']}: exposed communication {exposed / 1e3:.1f} "
                f"ms of {whole / 1e3:.1f} ms, overlap efficiency {1 - exposed / whole:.2f}"
            )


def parse_sizes(bench: Bench, text: str | None) -> tuple[Any, ...]:
    """The sizes of --sizes, or the op's own."""
    if text is None:
        return bench.sizes
    if text == "models" and bench.parse is shapes.parse_gemm:
        return tuple(shapes.MODELS.values())
    return tuple(bench.parse(part) for part in text.split(","))


def arena_for(sizes: tuple[Any, ...], itemsize: int) -> int:
    """Bytes of arena in which the largest tensor has room, and the slots."""
    return (16 << 20) + max(3 * (s if isinstance(s, int) else s.M * s.N * itemsize) // 2 for s in sizes)


def named(value: str, known: Any, what: str) -> str:
    """The value, if it is known; otherwise a usage error that lists the known ones."""
    if value not in known:
        raise typer.BadParameter(f"{what} must be one of {', '.join(known)}; got {value!r}")
    return value


def main(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHES)}.")],
    ranks: Annotated[int, typer.Option(min=1, help="Rank processes, one thread each.")] = 2,
    sizes: Annotated[str | None, typer.Option(help="4KiB,1MiB | M | MxNxK | models | a model's name; commas.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    hosts: Annotated[int, typer.Option(min=1, max=8, help="Hosts (namespaces), with as many ranks each.")] = 1,
    link: Annotated[str, typer.Option(help="Between them: 1gbit, 300mbit, 1gbit+20ms; needs root, ip, tc.")] = "1gbit",
    codec: Annotated[str, typer.Option(help=f"Of our candidates: {', '.join(CODEC_ROUNDING)}.")] = "none",
    only: Annotated[str | None, typer.Option(help="Candidates to run, with commas; default all.")] = None,
    pin: Annotated[bool | None, typer.Option(help="A core for each rank; default: if there are as many.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 21,
    block_ms: Annotated[float, typer.Option(help="How long a candidate's block in a round should last.")] = 20.0,
    most_lost: Annotated[float, typer.Option(help="Part of a block that others may take; 1e9: any.")] = 0.05,
    wait: Annotated[float, typer.Option(help="Seconds to wait, in all, for a quiet machine; then keep nothing.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 7,
    out: Annotated[Path | None, typer.Option(help="Add the rows to this file of JSON lines.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rows into this PNG (bench.plot).")] = None,
) -> None:
    """Measure one op against its baselines and verify every candidate in the same run."""
    console, bench = Console(width=max(160, Console().width)), BENCHES[named(op, BENCHES, "OP")]
    if pin and ranks > len(cores()):
        raise typer.BadParameter(f"--pin gives every rank a core of its own; {ranks} ranks, {len(cores())} cores")
    pinned = ranks <= len(cores()) if pin is None else pin
    try:
        wanted = parse_sizes(bench, sizes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    setting = {"dtype_name": named(dtype, DTYPES, "--dtype"), "codec": named(codec, CODEC_ROUNDING, "--codec"),
               "only": tuple(only.split(",")) if only else bench.only, "seed": seed,
               "arena_bytes": arena_for(wanted, DTYPES[dtype].itemsize),
               "transport": "auto" if hosts == 1 else "group" if hosts == ranks else "hierarchical"}  # fmt: skip
    if ranks % hosts:
        raise typer.BadParameter(f"--hosts {hosts} have as many ranks each, got --ranks {ranks}")
    between = link if hosts > 1 else None
    jobs, where = tuple((op, size) for size in wanted), circumstances(pinned, between)
    spec = Spec(jobs, setting, rounds, block_ms / 1e3, most_lost, where, wait)
    rows: list[Row] = []
    keep: list[Row] = []
    for found in run(spec, ranks, pin=pinned, link=between, hosts=hosts):
        if isinstance(found, str):
            console.print(found)
            continue
        rows += found
        keep += found if complete(found, rounds) else []
        if console.is_terminal:
            console.print(f"{op} {table.size(found[0])}: done", style="dim")
    table.show(rows, console)
    for line in overlaps(rows):
        console.print(line)
    if out is not None:
        save(out, keep)
    if plot is not None:
        from bench.plot import exposed_figure, figure  # matplotlib takes a second

        (exposed_figure if between else figure)(rows, plot)
    if len(keep) < len(rows):
        console.print("something else had the cores: sizes without enough rounds were not kept", style="yellow")
    if not all(row["verified"] for row in rows):
        console.print("a result is wrong: see verified", style="bold red")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)

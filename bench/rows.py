"""A row is one candidate at one size, with every number needed to believe it; rows are kept as JSON lines."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import placement
from bench.cell import Cell
from bench.machine import machine
from bench.timing import Candidate, Summary, Timing, exposed, ratios, summary
from tpkernels import __version__

Row = dict[str, Any]
REAL_TIME = (os.SCHED_FIFO, os.SCHED_RR)
RESULTS = Path(__file__).parent / "results"  # the numbers of the documents
MINE = Path(__file__).parent.parent / "runs" / "bench"  # of runs without --keep; not in git
PICTURE = Path(__file__).parents[1] / "docs" / "bench.png"  # of README
KEEP_HELP = "Put the rows among those that the documents are made of, in bench/results."

STUDY = "study/compression_study.jsonl"  # the rows of bench/study
COMPOSITIONS = "study/compositions.jsonl"  # the rows of bench/compositions.py
BUBBLES = "study/bubble.jsonl"  # the rows of bench/bubble.py

# Two rows with the same identity, of one machine class, measure the same thing; the later one replaces the earlier.
IDENTITY = ("op", "variant", "codec", "dtype", "bytes", "M", "N", "K", "R", "threads", "pinned", "placement")
STUDY_IDENTITY = ("kind", "layout", "link", "method", "seed", "steps")  # of the rows that have a kind
FIELDS = (
    *IDENTITY,
    "path", "transport",
    "median_us", "p90_us", "min_us", "max_us",  # slowest rank, over rounds
    "gflops", "algbw_gbs", "busbw_gbs", "exposed_us",  # GFLOP/s of one rank; null where it means nothing
    "baseline", "ratio", "ratio_min", "ratio_max",  # times faster than the baseline, taken inside rounds
    "ratios",  # {other candidate: [median, min, max]}
    "by_placement",  # {near, far, mixed, crowded, unprobed: {rounds, median_us, ratio, ratio_min, ratio_max}}
    "verified", "error",  # error: over what rounding explains, so that more than 1 is wrong
    "flag_rtt_ns", "rounds", "calls", "repeated",  # rounds that gave a number; calls in a block; disturbed blocks
    "machine", "torch", "version", "commit", "date", "load",
    "scheduler",  # normal; real-time: others have a core only when no rank needs it
)  # fmt: skip


def commit() -> str | None:
    """Short commit of the tree, with a + if tracked files are changed; None outside git."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*here, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    others = [line for line in changed.stdout.splitlines() if "bench/results" not in line and "README" not in line]
    return head.stdout.strip() + ("+" if others else "")


def circumstances(pinned: bool, link: str | None = None) -> Row:
    """The fields that all rows of a run share: machine, versions, date, load, the link between hosts (or None)."""
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "version": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load": round(os.getloadavg()[0], 2),
        "scheduler": "real-time" if os.sched_getscheduler(0) in REAL_TIME else "normal",
        "threads": 1,
        "pinned": pinned,
        "link": link,
    }


def number(value: float) -> float | None:
    """For JSON: four digits, None for NaN and infinities."""
    return None if math.isnan(value) or math.isinf(value) else float(f"{value:.4g}")


def times(of: Summary) -> Row:
    """In microseconds."""
    return {name: number(1e6 * value) for name, value in zip(
        ("median_us", "p90_us", "min_us", "max_us"), (of.median, of.p90, of.least, of.most), strict=True)}  # fmt: skip


def three(values: Sequence[float]) -> list[float | None]:
    """Median, least, most."""
    found = summary(values)
    return [number(found.median), number(found.least), number(found.most)]


def per_placement(timing: Timing, baseline: Timing | None, rounds: Sequence[str]) -> Row:
    """Median and ratio over the rounds of each placement, for those that occurred."""
    found = {}
    for name in dict.fromkeys(rounds):
        mine = [i for i, r in enumerate(rounds) if r == name]
        ratio = [ratios(baseline, timing)[i] for i in mine] if baseline else []
        median, least, most = three(ratio)
        took = number(1e6 * summary([timing.seconds[i] for i in mine]).median)
        found[name] = {
            "rounds": sum(not math.isnan(timing.seconds[i]) for i in mine),
            "median_us": took,
            "ratio": median,
            "ratio_min": least,
            "ratio_max": most,
        }
    return found


def row_of(cell: Cell, candidate: Candidate, timings: dict[str, Timing], probes: Sequence[float], where: Row) -> Row:
    """The row of one candidate.

    Args:
        timings: of all candidates of the cell, by name.
        probes: flag round trips between rounds, one more than there are rounds.
        where: from `circumstances`.
    """
    timing = timings[candidate.name]
    timed = {name: t for name, t in timings.items() if t.seconds}
    crowded = cell.world_size > where["machine"]["cores"]
    rounds, baseline = placement.of_rounds(probes, crowded), timed.get(cell.baseline)
    of, runs = summary(timing.seconds), bool(timing.seconds)
    versus = {n: three(ratios(t, timing)) for n, t in timed.items() if runs and n != candidate.name}
    ratio = three(ratios(baseline, timing)) if runs and baseline else [None] * 3
    roofs = [timed[name] for name in cell.roofs if name in timed]
    beyond = summary(exposed(timing, roofs)).median if runs and roofs and candidate.name not in cell.roofs else math.nan
    nbytes = cell.sizes.get("bytes")
    algbw = nbytes / of.median / 1e9 if nbytes and cell.bus_factor else math.nan
    row = {
        "op": cell.op, "variant": candidate.name, "codec": candidate.label.get("codec") or "none",
        "dtype": cell.dtype, "bytes": nbytes, **{k: cell.sizes.get(k) for k in "MNK"}, "R": cell.world_size,
        "path": candidate.label.get("path"), "transport": candidate.label.get("transport"), **times(of),
        "gflops": number(cell.flops / of.median / 1e9) if cell.flops else None,
        "algbw_gbs": number(algbw), "busbw_gbs": number(algbw * cell.bus_factor), "exposed_us": number(1e6 * beyond),
        "baseline": cell.baseline, "ratio": ratio[0], "ratio_min": ratio[1], "ratio_max": ratio[2], "ratios": versus,
        "by_placement": per_placement(timing, baseline, rounds) if runs else {},
        "verified": timing.verified, "error": number(timing.error), "placement": placement.of_run(rounds),
        "flag_rtt_ns": number(summary(probes).median), "rounds": sum(not math.isnan(s) for s in timing.seconds),
        "calls": timing.calls, "repeated": timing.repeated,
    }  # fmt: skip
    link = {"link": where["link"]} if where.get("link") else {}  # only of runs on two hosts
    return {field: {**row, **where}[field] for field in FIELDS} | link


def over_roof(row: Row) -> float:
    """Exposed time over that of the faster GEMM alone; nan where there was none."""
    return math.nan if row["exposed_us"] is None else row["exposed_us"] / (row["median_us"] - row["exposed_us"])


def identity(row: Row) -> tuple[Any, ...]:
    """The measurement of a row."""
    if "kind" in row:
        return tuple(row.get(name) for name in STUDY_IDENTITY)
    # Of a server: slots, clients.
    more = (row.get("slots"), row.get("clients"), row.get("link"))
    return (row["machine"]["class"], *(row[name] for name in IDENTITY), *more)


def load(path: Path) -> list[Row]:
    """The latest row of each identity, in the order in which they were first measured.

    Args:
        path: a file, or a folder of which all files are read; there may be none. A last line without its end, which a
            crash cut off, is left out.

    Raises:
        ValueError: another line is no JSON.
        KeyError: a row lacks a field of its identity.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    found: dict[tuple[Any, ...], Row] = {}
    for line in (line for file in files for line in file.read_text().split("\n")[:-1]):
        row = json.loads(line)
        found[identity(row)] = row
    return list(found.values())


def classes(rows: Iterable[Row]) -> list[str]:
    """The machine classes that were measured, in order of appearance."""
    return list(dict.fromkeys(row["machine"]["class"] for row in rows))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def destination(name: str, keep: bool, out: Path | None = None) -> Path:
    """The file or folder of the rows of a run.

    Args:
        name: inside bench/results or runs/bench.
        keep: whether it is in bench/results.
        out: in place of both.
    """
    return out or (RESULTS if keep else MINE) / name


def save(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file; a row of the same identity is replaced."""
    kept = {identity(row): row for row in [*load(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    fresh.replace(path)


def append(path: Path, row: Row) -> None:
    """Append a row to a file, in place of a last line that a crash cut off; it is in the file when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")

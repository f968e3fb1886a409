"""The goals, as data, and whether the kept results reach them: `python -m bench.goals`.

A goal is a median ratio, taken inside rounds, and holds only if it holds wherever the cores were (near and far).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import codecs
from bench import rows as kept
from bench.rows import Row
from bench.shapes import format_bytes
from bench.table import digits
from tpkernels.compress import CODECS

KIB, MIB = 1 << 10, 1 << 20
GEMM_ALONE = "gemm alone"
EVEN = 0.98  # "not slower" is reached from here on: medians of two equal programs differ by as much


@dataclass(frozen=True)
class Goal:
    """`variant` of `op` at least `at_least` times as fast as `against`.

    Args:
        size: bytes of a collective, M of a GEMM with N = K = 4096, 0: any.
        against: a candidate of the same run, or GEMM_ALONE: the faster GEMM by itself.
        codec: of the row.
        link: between the hosts of the ranks; None: one host.
    """

    op: str
    variant: str
    size: int
    at_least: float
    against: str = "gloo"
    dtype: str = "fp32"
    R: int = 2
    codec: str = "none"
    link: str | None = None

    def fits(self, row: Row) -> bool:
        size = row["bytes"] if row["M"] is None else row["M"] if (row["N"], row["K"]) == (4096, 4096) else None
        row_of_goal = (self.op, self.variant, self.dtype, self.R, self.codec, self.link)
        found = (*(row[k] for k in ("op", "variant", "dtype", "R", "codec")), row.get("link"))
        return row_of_goal == found and self.size in (0, size)

    @property
    def title(self) -> str:
        if not self.size:
            return f"{self.op} {self.variant}"
        size = f"M = {self.size}" if "gemm" in self.op else format_bytes(self.size)
        over = f", codec {self.codec} over {self.link}" if self.link else ""
        return f"{self.op} {self.variant}, {size}{over}"


LINKS = {"300mbit": (1.2, 2.2, 3.6), "1gbit": (1.5, 1.9, 2.0), "10gbit": (1.05, 1.05, 1.05)}  # none, fp16, int8
PLAIN = {4 * KIB: 80, 64 * KIB: 30, MIB: 7, 16 * MIB: 3, 64 * MIB: 4}
GOALS = [
    *(Goal("all_reduce", "plain", size, ratio) for size, ratio in PLAIN.items()),
    Goal("all_reduce", "sym", MIB, 20),
    Goal("all_reduce", "sym", 16 * MIB, 5),
    Goal("all_reduce", "plain", 4 * KIB, 30, R=4),
    Goal("all_reduce", "plain", MIB, 10, R=4),
    *(Goal(op, "plain", size, 1.2 * r) for op in ("reduce_scatter", "all_gather") for size, r in PLAIN.items()),
    *(Goal("gemm_all_reduce", "tpkernels", m, r, "linear_gloo") for m, r in ((16, 1.4), (128, 1.4), (512, 1.3))),
    *(Goal("gemm_all_reduce", "tpkernels", m, 1 / 1.03, GEMM_ALONE) for m in (16, 128, 512)),
    *(Goal("gemm_all_reduce", "tpkernels", m, 1.0, "linear_tpk", "bf16") for m in (1, 16, 128, 512)),
    *(
        Goal(codecs.OP, f"{move}_{codec}", size, codecs.least_ratio(move, codec), "copy", R=1, codec=codec)
        for size in (256 * KIB, 4 * MIB, 64 * MIB)
        for move in codecs.MOVES
        for codec in CODECS
        if codec != "none"
    ),
    *(
        Goal("gemm_all_reduce", "tpkernels", 512, at_least, "linear_gloo", codec=codec, link=link)
        for link, ratios in LINKS.items()
        for codec, at_least in zip(("none", "fp16", "int8"), ratios, strict=True)
    ),
    Goal("train_step", "tpkernels", 0, 1.2),
    *(
        Goal("decode_smollm2", variant, 0, at_least, "transformers", dtype)
        for dtype in ("fp32", "bf16")
        for variant, at_least in (("tpkernels_static", 1.0), ("tpkernels_compiled", 1.3))
    ),
    Goal("decode_llama_8_heads", "tpkernels_static", 0, 1.0, "tp_plan_gloo"),
]


def word(reached: bool | None) -> str:
    """The word for a goal that is reached or missed; None: not measured."""
    return {True: "reached", False: "MISSED", None: "not measured"}[reached]


@dataclass(frozen=True)
class Verdict:
    """A goal and the ratio that one row has for it, in one placement."""

    goal: Goal
    placement: str
    found: tuple[float, float, float] | None  # median, least, most

    @property
    def word(self) -> str:
        if self.found is not None and EVEN <= self.found[0] < self.goal.at_least == 1.0:
            return "even"
        return word(None if self.found is None else self.found[0] >= self.goal.at_least)


def ratio_of(row: Row, goal: Goal, placement: str) -> tuple[float, float, float] | None:
    """Median, least and most of the rounds in this placement; the whole run's where only those are kept."""
    if not row["verified"]:
        return None
    if goal.against == GEMM_ALONE:
        return (1 / (1 + kept.over_roof(row)), math.nan, math.nan)
    if goal.against == row["baseline"]:
        at = row["by_placement"].get(placement)
        return None if at is None or at["ratio"] is None else (at["ratio"], at["ratio_min"], at["ratio_max"])
    found = row["ratios"].get(goal.against)
    return None if found is None else tuple(found)


def verdicts(goals: Sequence[Goal], rows: Sequence[Row]) -> Iterator[Verdict]:
    """For each goal one verdict for each placement that was measured; the run with most rounds there speaks."""
    for goal in goals:
        best: dict[str, Row] = {}
        for row in filter(goal.fits, rows):
            for placement, at in row["by_placement"].items():
                if placement not in best or at["rounds"] >= best[placement]["by_placement"][placement]["rounds"]:
                    best[placement] = row
        wanted: list[str] = [p for p in ("near", "far", "crowded") if p in best] or list(best)
        if not wanted:
            yield Verdict(goal, "-", None)
        for placement in wanted:
            yield Verdict(goal, placement, ratio_of(best[placement], goal, placement))


def main(
    results: Annotated[Path, typer.Argument(help="A file or a folder of JSON lines.")] = kept.RESULTS,
    strict: Annotated[bool, typer.Option(help="Exit 1 if a goal is missed or was not measured.")] = False,
) -> None:
    """Print which goals the kept results reach."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("goal", "dtype", "R", "against", "at least", "found", "where", ""):
        table.add_column(name)
    found = list(verdicts(GOALS, kept.load(results)))
    for v in found:
        values = "-" if v.found is None else f"{digits(v.found[0])}x"
        if v.found is not None and not math.isnan(v.found[1]):
            values += f" [{digits(v.found[1])}, {digits(v.found[2])}]"
        style = "bold red" if v.word == "MISSED" else "dim" if v.found is None else None
        at_least = f"{digits(v.goal.at_least)}x"
        table.add_row(v.goal.title, v.goal.dtype, str(v.goal.R), v.goal.against, at_least, values.replace("[", "\\["),
                      v.placement, v.word, style=style)  # fmt: skip
    Console(width=140).print(table)
    if strict and any(v.word in ("MISSED", "not measured") for v in found):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)

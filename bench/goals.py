"""The goals, as data, and whether the kept results reach them: `python -m bench.goals`.

A goal is a median ratio, taken inside rounds. A machine class reaches it only if it holds wherever the cores were (near
and far); each class that was measured has a verdict of its own.
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
from bench.table import digits, times_faster
from tpkernels.compress import CODECS

KIB, MIB = 1 << 10, 1 << 20
GEMM_ALONE = "gemm alone"
TOKENS = "tokens/s"
EVEN = 0.98  # "not slower" is reached from here on: medians of two equal programs differ by as much
ZEN_4 = "AMD Zen 4, AVX-512"


@dataclass(frozen=True)
class Goal:
    """`variant` of `op` at least `at_least` times as fast as `against`.

    Args:
        size: bytes of a collective, M of a GEMM with N = K = 4096, clients of a server; 0: any.
        against: a candidate of the same run; GEMM_ALONE: the faster GEMM by itself; TOKENS: `at_least` is no ratio but
            tokens a second.
        codec: of the row.
        link: between two hosts; None: one host.
        machine: the class for which an absolute number is set; empty: all classes.
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
    machine: str = ""

    def fits(self, row: Row) -> bool:
        size = row["bytes"] if row["M"] is None else row["M"] if (row["N"], row["K"]) == (4096, 4096) else None
        row_of_goal = (self.op, self.variant, self.dtype, self.R, self.codec)
        return (
            row_of_goal == tuple(row[k] for k in ("op", "variant", "dtype", "R", "codec"))
            and self.size in (0, row.get("clients", size))
            and row.get("link") == self.link
        )

    @property
    def title(self) -> str:
        if not self.size:
            return f"{self.op} {self.variant}"
        if self.against == TOKENS:
            size = f"{self.size} client{'s' * (self.size > 1)}"
        else:
            size = f"M = {self.size}" if "gemm" in self.op or self.op == "few_rows" else format_bytes(self.size)
        between = f", codec {self.codec} over {self.link}" if self.link else ""
        return f"{self.op} {self.variant}, {size}{between}"

    @property
    def unit(self) -> str:
        return f" {TOKENS}" if self.against == TOKENS else "x"


C10D = {4 * KIB: 30, 64 * KIB: 15, MIB: 5, 16 * MIB: 3}
C10D_CALLS = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
PLAIN = {4 * KIB: 80, 64 * KIB: 30, MIB: 7, 16 * MIB: 3, 64 * MIB: 4}
LINKS = {
    "300mbit": {"none": 1.2, "fp16": 2.2, "int8": 3.6},
    "1gbit": {"none": 1.5, "fp16": 1.9, "int8": 2.0},
    "10gbit": {"none": 1.05, "fp16": 1.05, "int8": 1.05},
}
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
        Goal("few_rows", "tpkernels", m, 0.85, "read", dtype, R=1)
        for dtype in ("fp32", "bf16", "fp16")
        for m in (1, 2, 4, 8)
    ),
    *(
        Goal("gemm_all_reduce", "tpkernels", 512, least, "linear_gloo", codec=codec, link=link)
        for link, ratios in LINKS.items()
        for codec, least in ratios.items()
    ),
    *(
        Goal("ddp_step", name, 40 * MIB, 1.1, codec=codec, link="10gbit")
        for codec in ("fp16", "int8")
        for name in (f"ddp_{codec}", f"no_feedback_{codec}", codec)
    ),
    Goal("train_step", "tpkernels", 0, 1.2),
    *(
        Goal("decode_smollm2", f"tpkernels_{cache}", 0, 1.0, against)
        for cache in ("static", "compiled")
        for against in ("transformers", "transformers_compiled")
    ),
    Goal("decode_smollm2", "tpkernels_static", 0, 1.6, "transformers", "bf16"),
    Goal("decode_smollm2", "tpkernels_compiled", 0, 2.0, "transformers", "bf16"),
    *(
        Goal("decode_smollm2", f"tpkernels_{cache}", 0, 1 / 0.65, f"fp32 tpkernels_{cache}", "bf16")
        for cache in ("static", "compiled")
    ),
    *(Goal("decode_smollm2", "tpkernels_compiled", 0, 1 / 1.3, "reading_weights", dtype) for dtype in ("fp32", "bf16")),
    Goal("decode_llama_8_heads", "tpkernels_static", 0, 1.0, "tp_plan_gloo"),
    *(
        Goal("serve_smollm2", "tpkernels", clients, least, TOKENS, machine=ZEN_4)
        for clients, least in ((1, 32), (8, 174))
    ),
    *(Goal(f"c10d_{call}", "tpk", size, ratio) for call in C10D_CALLS for size, ratio in C10D.items()),
    *(Goal(f"c10d_{call}", "tpk", size, 1.0, R=4) for call in C10D_CALLS for size in C10D),
    *(Goal("c10d_neighbour", "tpk", size, 1.0) for size in C10D),
    *(Goal(f"c10d_{program}", "tpk", 0, ratio) for program, ratio in (("ddp", 1.3), ("fsdp", 1.5), ("decode", 2.0))),
]


def word(reached: bool | None) -> str:
    """The word for a goal that is reached or missed; None: not measured."""
    return {True: "reached", False: "MISSED", None: "not measured"}[reached]


Found = tuple[float, float, float]  # median, least, most; the latter nan where only a median is kept


@dataclass(frozen=True)
class Verdict:
    """A goal and what one machine class reached, in each placement of its cores."""

    goal: Goal
    machine: str
    found: dict[str, Found]

    @property
    def word(self) -> str:
        least = min((of[0] for of in self.found.values()), default=math.nan)
        if EVEN <= least < self.goal.at_least == 1.0:
            return "even"
        return word(None if math.isnan(least) else least >= self.goal.at_least)

    @property
    def text(self) -> str:
        """Every number that was found, with the placement where there was one."""
        places = {name: "" if name == "unprobed" else f" {name}" for name in self.found}
        return ", ".join(f"{times_faster(of, self.goal.unit)}{places[name]}" for name, of in self.found.items()) or "-"


def found_in(row: Row, goal: Goal, placement: str) -> Found | None:
    """Median, least and most of the rounds in this placement; the whole run's where only those are kept."""
    if not row["verified"]:
        return None
    if goal.against == TOKENS:
        return (row["tokens_per_s"], math.nan, math.nan)
    if goal.against == GEMM_ALONE:
        return (1 / (1 + kept.over_roof(row)), math.nan, math.nan)
    if goal.against == row["baseline"]:
        at = row["by_placement"].get(placement)
        return None if at is None or at["ratio"] is None else (at["ratio"], at["ratio_min"], at["ratio_max"])
    found = row["ratios"].get(goal.against)
    return None if found is None else (found[0], found[1], found[2])


def verdict(goal: Goal, machine: str, rows: Sequence[Row]) -> Verdict:
    """Of the rows of one machine class. For each placement the run with most rounds counts."""
    best: dict[str, tuple[int, Row]] = {}
    for row in filter(goal.fits, rows):
        for placement, at in (row["by_placement"] or {"unprobed": row}).items():
            if placement not in best or at["rounds"] >= best[placement][0]:
                best[placement] = (at["rounds"], row)
    wanted: list[str] = [p for p in ("near", "far", "crowded") if p in best] or list(best)
    found = {placement: found_in(best[placement][1], goal, placement) for placement in wanted}
    return Verdict(goal, machine, {placement: of for placement, of in found.items() if of is not None})


def verdicts(goals: Sequence[Goal], rows: Sequence[Row]) -> Iterator[Verdict]:
    """For each goal one verdict of every machine class that was measured."""
    by_class = {machine: [row for row in rows if row["machine"]["class"] == machine] for machine in kept.classes(rows)}
    for goal in goals:
        for machine, mine in by_class.items():
            if goal.machine in ("", machine):
                yield verdict(goal, machine, mine)


def split(found: Sequence[Verdict]) -> list[Goal]:
    """The goals that one machine class reaches and another misses."""
    words: dict[Goal, set[str]] = {}
    for v in found:
        words.setdefault(v.goal, set()).add("reached" if v.word == "even" else v.word)
    return [goal for goal, of in words.items() if {"reached", "MISSED"} <= of]


def main(
    results: Annotated[Path, typer.Argument(help="A file or a folder of JSON lines.")] = kept.RESULTS,
    strict: Annotated[bool, typer.Option(help="Exit 1 if a goal is missed or was not measured.")] = False,
) -> None:
    """Print which goals the kept results reach."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("goal", "dtype", "R", "against", "at least", "machine", "found", ""):
        table.add_column(name)
    found = list(verdicts(GOALS, kept.load(results)))
    for v in found:
        style = "bold red" if v.word == "MISSED" else "dim" if not v.found else None
        at_least = f"{digits(v.goal.at_least)}{v.goal.unit}"
        table.add_row(v.goal.title, v.goal.dtype, str(v.goal.R), v.goal.against, at_least, v.machine,
                      v.text.replace("[", "\\["), v.word, style=style)  # fmt: skip
    console = Console(width=max(170, Console().width))
    console.print(table)
    for goal in split(found):
        console.print(f"reached on one machine class and missed on another: {goal.title}, {goal.dtype}")
    if strict and any(v.word in ("MISSED", "not measured") for v in found):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)

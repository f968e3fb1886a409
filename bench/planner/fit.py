"""The constants of the planner's model of time, fitted on measured rows, and the error on rows that were left out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tpkernels.planner.hardware import Cluster
from tpkernels.planner.predict import cluster_of, job_and_recipe
from tpkernels.planner.step import step_s

# Start, and centre of the prior: orders of magnitude known without the rows.
START = {
    "gemm_rate": 0.75, "memory_rate": 0.75, "unaligned_rate": 0.3, "host_layer_s": 3e-3, "host_call_s": 2e-4,
    "host_head_s": 2e-3, "skew_s": 2e-4, "send_s": 5e-5, "optimizer_bytes": 40.0, "between_rate": 0.7,
}  # fmt: skip
PRIOR = 0.02  # weight of (log constant - log start) ** 2; a row has 1
ROBUST = 0.15  # relative error from which a row counts less
Array = Any


class Row(Protocol):
    """A measured step."""

    @property
    def group(self) -> tuple[str, str]:
        """What it is left out with: its file or kind, and a name inside that."""

    @property
    def ms(self) -> float:
        """Measured."""

    def predicted(self, constants: dict[str, float]) -> float:
        """Milliseconds by these constants."""


def with_constants(machine: Cluster, constants: dict[str, float]) -> Cluster:
    """A cluster whose device, and link between nodes (names that begin with "between_"), have other constants."""
    links = {key.removeprefix("between_"): v for key, v in constants.items() if key.startswith("between_")}
    own = {key: value for key, value in constants.items() if not key.startswith("between_")}
    return replace(machine, device=replace(machine.device, **own), between=replace(machine.between, **links))


@dataclass(frozen=True)
class Iteration:
    """A row of vTrain's files: `values` as there, `group` its file and model size."""

    values: dict[str, str]
    group: tuple[str, str]

    @cached_property
    def made(self) -> tuple[Cluster, Any, Any]:
        machine = cluster_of("a100-dgx", int(self.values["gpus"]))
        return machine, *job_and_recipe(self.values, machine.per_node, "row")

    @cached_property
    def ms(self) -> float:
        return float(self.values["ms"])

    def predicted(self, constants: dict[str, float]) -> float:
        machine, job, recipe = self.made
        return 1e3 * step_s(with_constants(machine, constants), job, recipe).total


def read(folder: Path) -> list[Iteration]:
    """Read both files of rows."""
    found = []
    for name in ("one_node", "many_nodes"):
        with (folder / f"{name}_fit.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found += [Iteration(row, (name, f"{row['hidden']} x {row['layers']}")) for row in rows]
    return found


def predictions(rows: Sequence[Row], constants: dict[str, float]) -> Array:
    return np.array([row.predicted(constants) for row in rows])


def fit(rows: Sequence[Row], begin: dict[str, float] = START) -> dict[str, float]:
    """The constants whose predictions are nearest to the rows: Levenberg-Marquardt on logarithms, pseudo-Huber loss.

    The files of one node and of many have about the same weight.
    """
    start = np.log(list(begin.values()))
    measured = np.log([row.ms for row in rows])
    many = np.array([row.group[0] == "many_nodes" for row in rows])
    weight = np.where(many, 0.7 * max(1, (~many).sum()) / max(1, many.sum()), 1.0)

    def errors(x: Array) -> Array:
        return np.log(predictions(rows, dict(zip(begin, np.exp(x), strict=True)))) - measured

    def cost(x: Array, e: Array) -> float:
        loss = 2 * ROBUST**2 * (np.sqrt(1 + (e / ROBUST) ** 2) - 1)
        return float((weight * loss).sum() + PRIOR * ((x - start) ** 2).sum())

    x, damping = start.copy(), 1e-2
    e = errors(x)
    least = cost(x, e)
    for _ in range(40):
        slope = np.stack([(errors(x + 1e-3 * unit) - e) / 1e-3 for unit in np.eye(len(x))], 1)
        each = weight / np.sqrt(1 + (e / ROBUST) ** 2)
        normal = slope.T @ (each[:, None] * slope) + PRIOR * np.eye(len(x))
        gradient = slope.T @ (each * e) + PRIOR * (x - start)
        for _ in range(8):
            step = np.clip(np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient), -0.5, 0.5)
            tried = errors(x + step)
            if (now := cost(x + step, tried)) < least:
                break
            damping *= 4
        else:
            break
        done = least - now < 1e-6 * least
        x, e, least, damping = x + step, tried, now, max(damping / 3, 1e-6)
        if done:
            break
    return dict(zip(begin, map(float, np.exp(x)), strict=True))


def percentage_error(rows: Sequence[Row], predicted: Array) -> float:
    """The mean absolute one."""
    return float(100 * np.abs(predicted / np.array([row.ms for row in rows]) - 1).mean())


def rank_correlation(rows: Sequence[Row], predicted: Array) -> float:
    """Spearman's; no two rows of a model have the same time."""
    ranks = [np.argsort(np.argsort(values)) for values in ([row.ms for row in rows], predicted)]
    return float(np.corrcoef(*ranks)[0, 1])


def left_out(
    rows: Sequence[Any], is_out: Callable[[Any], bool], begin: dict[str, float] = START
) -> tuple[list[Any], Array]:
    """The rows that are left out, and what a fit on the others predicts for them."""
    out = [row for row in rows if is_out(row)]
    constants = fit([row for row in rows if not is_out(row)], begin)
    return out, predictions(out, constants)


def cross_validate(
    rows: Sequence[Any], begin: dict[str, float] = START
) -> dict[tuple[str, str], tuple[list[Any], Array]]:
    """{group: its rows, and what a fit without that group predicts}."""
    groups = sorted({row.group for row in rows})
    return {group: left_out(rows, lambda row, group=group: row.group == group, begin) for group in groups}


def extrapolations(rows: Sequence[Iteration]) -> dict[str, float]:
    """{what is left out: error of a fit on everything else}."""
    kinds: dict[str, Callable[[Iteration], bool]] = {
        "hidden 2048 in one node": lambda row: row.group[0] == "one_node" and row.values["hidden"] == "2048",
        "hidden 1024 in one node": lambda row: row.group[0] == "one_node" and row.values["hidden"] == "1024",
        "20 layers in one node": lambda row: row.group[0] == "one_node" and row.values["layers"] == "20",
        "8 GPUs in one node": lambda row: row.values["gpus"] == "8",
        "every row of many nodes": lambda row: row.group[0] == "many_nodes",
    }
    return {what: percentage_error(*left_out(rows, is_out)) for what, is_out in kinds.items()}

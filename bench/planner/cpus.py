"""The planner held against steps of the main job: CPU ranks on two hosts (docs/compression_study.md), and on one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.planner.fit import with_constants
from bench.study.links import RATES, burst_of
from tpkernels.planner.hardware import Cluster, cluster, crowded
from tpkernels.planner.recipe import WIRE_BYTES, Job, Recipe
from tpkernels.planner.shape import Shape
from tpkernels.planner.step import step_s

RESULTS = Path(__file__).parents[1] / "results" / "study" / "compression_study.jsonl"
STEPS = Path(__file__).with_name("steps.jsonl")  # written by measure.py
CUTS = {"dp2": (1, 2), "tp2": (2, 1), "tp2dp2": (2, 2)}
# The model of `make run`: 8 sequences of 128 bytes.
JOB = Job(replace(Shape.gpt(4, 256, 4, 256, "byte-level GPT"), tied=False), 128, 8)


START = {"gemm_rate": 0.8, "memory_rate": 1.0, "host_layer_s": 1e-3, "host_head_s": 1e-3, "between_rate": 0.9}


def shaped(machine: Cluster, link: str) -> Cluster:
    """A cluster whose link between hosts is a token bucket, as the links of the study are."""
    return replace(machine, between=replace(machine.between, burst=float(burst_of(RATES[link]))))


@dataclass(frozen=True)
class Measured:
    """A step of the main job: how it was cut, over which link, and its seconds."""

    layout: str
    link: str
    codec: str
    seconds: float

    @cached_property
    def cluster(self) -> Cluster:
        tp, dp = CUTS[self.layout]
        return shaped(cluster("cpu", tp * dp, self.link, tp * dp // 2), self.link)

    @cached_property
    def recipe(self) -> Recipe:
        """The study's codec packs gradients where there are replicas, sums otherwise; no micro-batches."""
        tp, dp = CUTS[self.layout]
        packed = {"grad_codec": self.codec} if dp > 1 else {"codec": self.codec}
        return Recipe(tp, 1, dp, JOB.batch // dp, **packed)  # type: ignore[arg-type]

    @property
    def group(self) -> tuple[str, str]:
        return "cpu", f"{self.layout} over {self.link}"

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds

    def predicted(self, constants: dict[str, float]) -> float:
        machine = with_constants(self.cluster, constants)
        return 1e3 * step_s(crowded(machine, 1), JOB, self.recipe).total


def read(file: Path = RESULTS) -> list[Measured]:
    """The last row of each cut, link and codec that is exact or a codec, not torch's own, local or delayed."""
    found: dict[tuple[str, str, str], Measured] = {}
    for line in file.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        key = (row["layout"], row["link"], row["method"])
        if row["kind"] == "speed" and row["method"] in WIRE_BYTES and row["layout"] in CUTS:
            found[key] = Measured(*key, row["step_seconds"])
    return list(found.values())


@dataclass(frozen=True)
class Step:
    """A row of measure.py, of more ranks than one: these have a core each."""

    row: dict[str, Any]

    @property
    def ms(self) -> float:
        return 1e3 * float(self.row["seconds"])

    @property
    def predicted(self) -> float:
        """Milliseconds, by constants fitted on the other file."""
        given = self.row["recipe"]
        shape = replace(Shape.gpt(given["layers"], given["d_model"], given["heads"], 256), tied=False)
        job = Job(shape, given["context"], given["batch"])
        recipe = Recipe(
            given["tp"], 1, given["dp"], given["batch"] // given["dp"], given.get("sequence_parallel", False),
            codec=given.get("codec", "none"), grad_codec=given.get("grad_codec", "none"),
        )  # fmt: skip
        return 1e3 * step_s(cluster("cpu", recipe.ranks), job, recipe).total

    @property
    def name(self) -> str:
        given = self.row["recipe"]
        size = f"{given['layers']} layers, {given['d_model']} wide, {given['batch']} x {given['context']}"
        kind = "".join(f", {key} {given[key]}" for key in ("codec", "grad_codec") if key in given)
        kind += ", sequence parallel" if "sequence_parallel" in given else ""
        return f"{size}: tp {given['tp']} dp {given['dp']}{kind}"


def read_steps() -> list[Step]:
    """The rows of measure.py."""
    rows = [json.loads(line) for line in STEPS.read_text().splitlines()]
    return [Step(row) for row in rows if row["recipe"]["tp"] * row["recipe"]["dp"] > 1]

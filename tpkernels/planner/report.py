"""Report: the ranked cuts of a job on a cluster, with everything that a reader, or a program, needs of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tpkernels.errors import UserError
from tpkernels.planner.hardware import Cluster
from tpkernels.planner.memory import most
from tpkernels.planner.recipe import Job, Recipe
from tpkernels.planner.search import Candidate

SHOWN = 4  # reasons of an error


@dataclass(frozen=True)
class Report:
    """What `planner.plan` found.

    Attributes:
        cluster, job: on what, and for what.
        candidates: the best recipe of every cut, fastest first; then the cuts that cannot run, with their reasons.
        exact: the best with every codec "none".
    """

    cluster: Cluster
    job: Job
    candidates: list[Candidate]
    exact: Candidate | None = None

    @property
    def best(self) -> Candidate | None:
        """The fastest, None if nothing can run."""
        return self.candidates[0] if self.candidates and self.candidates[0].recipe else None

    @property
    def recipe(self) -> Recipe:
        """That of the best, for `Mesh.open` and `parallelize`.

        Raises:
            UserError: nothing can run; says why.
        """
        if self.best is None or self.best.recipe is None:
            whys = "; ".join(f"tp {c.tp}, pp {c.pp}, dp {c.dp}: {c.why}" for c in self.candidates[:SHOWN])
            raise UserError(f"plan: no cut of {self.cluster.ranks} ranks can run: {whys or 'none was allowed'}")
        return self.best.recipe

    @property
    def runnable(self) -> list[Candidate]:
        """The candidates that fit and can run."""
        return [c for c in self.candidates if c.recipe]

    @property
    def error(self) -> tuple[float | None, str]:
        """The mean absolute percentage error known of this class of machine, None if nothing is, and what it is of."""
        return self.cluster.error

    def tokens_per_s(self, candidate: Candidate) -> float:
        """Of the whole cluster."""
        return self.job.tokens / candidate.seconds

    def mfu(self, candidate: Candidate) -> float:
        """Model flops utilisation: operations of the model, nothing recomputed, over those of the devices' peak."""
        flops = self.job.shape.flops(self.job.tokens, self.job.sequence)
        return flops / (candidate.seconds * self.cluster.ranks * self.cluster.device.flops)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as numbers, texts, lists and dicts; times in seconds, sizes in bytes."""
        error, of_what = self.error
        return {
            "model": asdict(self.job.shape) | {"parameters": self.job.shape.parameters},
            "job": {"sequence": self.job.sequence, "batch": self.job.batch, "tokens": self.job.tokens},
            "machine": {
                "device": self.cluster.device.name, "ranks": self.cluster.ranks, "per_node": self.cluster.per_node,
                "inside": self.cluster.inside.name, "between": self.cluster.between.name,
                "memory_to_plan_for": most(self.cluster),
            },
            "error_percent": error, "error_of": of_what,
            "candidates": [self._row(candidate) for candidate in self.candidates],
            "exact": None if self.exact is None else self._row(self.exact),
        }  # fmt: skip

    def _row(self, c: Candidate) -> dict[str, Any]:
        row: dict[str, Any] = {"tp": c.tp, "pp": c.pp, "dp": c.dp, "why": c.why}
        if c.recipe and c.time and c.memory:
            row |= {
                "recipe": asdict(c.recipe), "seconds": c.seconds, "tokens_per_s": self.tokens_per_s(c),
                "mfu": self.mfu(c), "time": asdict(c.time), "memory": asdict(c.memory) | {"total": c.memory.total},
            }  # fmt: skip
        return row

    def json(self) -> str:
        """Return `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def texts(self) -> list[str]:
        """Return the lines that go with the table: the error bar, and the best without a codec that rounds."""
        error, of_what = self.error
        lines = [f"Error: {error:.1f} % on average, {of_what}." if error is not None else f"Error: unknown; {of_what}."]
        best = self.best
        if best and best.recipe and self.exact and self.exact.recipe and self.exact.recipe != best.recipe:
            more = self.exact.seconds / best.seconds - 1
            lines.append(
                f"Without codecs that round: {self.exact.recipe.text()}; "
                f"{1e3 * self.exact.seconds:,.1f} ms ({more:+.1%})."
            )
        return lines

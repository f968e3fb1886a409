"""The search: every cut of the ranks, the best recipe of each, and why each other one loses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tpkernels.planner.hardware import Cluster
from tpkernels.planner.memory import Memory, memory_of, refuse_memory
from tpkernels.planner.recipe import RECOMPUTE, Cuts, Job, Recipe, refuse, refuse_cut
from tpkernels.planner.step import StepTime, assemble
from tpkernels.planner.terms import LayerTime, Slice, head_s, layer_s


@dataclass(frozen=True)
class Choices:
    """What the search may choose from besides tp, pp, dp and the micro-batch.

    Attributes:
        sequence_parallel, zero, virtual, recompute, codecs, grad_codecs: the values of Recipe's fields.
        tp, pp, dp: their values; empty for every divisor of the ranks.
        micro_batches: how many there may be where there are stages; empty for every number.
        accumulate: whether a replica without stages may divide its sequences into micro-batches.
    """

    sequence_parallel: tuple[bool, ...] = (False, True)
    zero: tuple[int, ...] = (0, 1, 2, 3)
    virtual: tuple[int, ...] = (1, 2, 4)
    recompute: tuple[str, ...] = RECOMPUTE
    codecs: tuple[str, ...] = ("none",)
    grad_codecs: tuple[str, ...] = ("none",)
    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    dp: tuple[int, ...] = ()
    micro_batches: tuple[int, ...] = ()
    accumulate: bool = True


@dataclass(frozen=True)
class Candidate:
    """The best recipe of one (tp, pp, dp) that fits and can run, or why there is none.

    Attributes:
        tp, pp, dp: the cut.
        recipe, time, memory: of the best; None where nothing can run.
        why: it loses against the best of all, or cannot run; "" for the best of all.
    """

    tp: int
    pp: int
    dp: int
    recipe: Recipe | None = None
    time: StepTime | None = None
    memory: Memory | None = None
    why: str = ""

    @property
    def seconds(self) -> float:
        """Of a step; infinite where nothing can run."""
        return self.time.total if self.time else math.inf


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


class Search:
    """Every recipe for a job on a cluster.

    Args:
        cluster, job: on what, and for what.
        cuts: of the model.
        choices: what may be chosen.
        arena_bytes: shared memory of a rank.
    """

    def __init__(self, cluster: Cluster, job: Job, cuts: Cuts, choices: Choices, arena_bytes: float) -> None:
        self.cluster, self.job, self.cuts, self.choices, self.arena_bytes = cluster, job, cuts, choices, arena_bytes
        self._layers: dict[Slice, tuple[LayerTime, LayerTime]] = {}

    def run(self) -> list[Candidate]:
        """Return the best recipe of every cut, fastest first, then the cuts that cannot run."""
        found = [self._best(tp, pp, dp) for tp, pp, dp in self._cuts_of_ranks()]
        found.sort(key=lambda c: (c.seconds, c.tp, c.pp))
        if not found or found[0].time is None:
            return found
        best = found[0]
        return [best, *(self._explained(c, best) for c in found[1:])]

    def _cuts_of_ranks(self) -> Iterator[tuple[int, int, int]]:
        ranks = self.cluster.ranks
        for tp in self.choices.tp or divisors(ranks):
            if ranks % tp == 0:
                for pp in self.choices.pp or divisors(ranks // tp):
                    dp = ranks // tp // pp
                    if (ranks // tp) % pp == 0 and (not self.choices.dp or dp in self.choices.dp):
                        yield tp, pp, dp

    def _best(self, tp: int, pp: int, dp: int) -> Candidate:
        """The fastest recipe of one cut; micro-batches grow until nothing fits, as memory grows with them."""
        why = refuse_cut(self.job, self.cluster, tp, pp, dp, self.cuts)
        if why:
            return Candidate(tp, pp, dp, why=why)
        best, least = Candidate(tp, pp, dp), math.inf
        for micro_batch in self._micro_batches(self.job.batch // dp, pp):
            fits = False
            for recipe in self._recipes(tp, pp, dp, micro_batch):
                if why := refuse(self.job, recipe):
                    if best.recipe is None and not best.why:
                        best = replace(best, why=why)
                    continue
                need = memory_of(self.cluster, self.job, recipe, self.arena_bytes)
                if why := refuse_memory(self.cluster, need):
                    if best.recipe is None and need.total < least:  # that of the least need says why
                        best, least = replace(best, why=why), need.total
                    continue
                fits = True
                time = self._time(recipe, best.seconds)
                if time is not None and time.total < best.seconds:
                    best = Candidate(tp, pp, dp, recipe, time, need)
            if not fits:
                break
        return best

    def _micro_batches(self, share: int, pp: int) -> list[int]:
        """Sequences of a micro-batch, ascending."""
        if pp == 1:
            return divisors(share) if self.choices.accumulate else [share]
        allowed = self.choices.micro_batches
        return [size for size in divisors(share) if not allowed or share // size in allowed]

    def _recipes(self, tp: int, pp: int, dp: int, micro_batch: int) -> Iterator[Recipe]:
        """Every choice that means something for a cut."""
        c = self.choices
        for sequence_parallel, zero, virtual, recompute, codec, grad_codec in itertools.product(
            [v for v in c.sequence_parallel if tp > 1 or not v] or [False],
            [v for v in c.zero if dp > 1 or not v] or [0],
            [v for v in c.virtual if pp > 1 or v == 1] or [1],
            [v for v in c.recompute if not (self.job.flash and v == "selective")],
            c.codecs if tp > 1 else ("none",),
            c.grad_codecs if dp > 1 else ("none",),
        ):
            yield Recipe(tp, pp, dp, micro_batch, sequence_parallel, zero, virtual, recompute, codec, grad_codec)

    def _time(self, recipe: Recipe, best: float) -> StepTime | None:
        """The time of a step; None where the layers alone take longer than the best so far."""
        part = recipe.slice(self.job, self.cluster.device.value_bytes)
        if part not in self._layers:
            shape = self.job.shape
            self._layers[part] = layer_s(self.cluster, shape, part), head_s(self.cluster, shape, part)
        layer, head = self._layers[part]
        n = recipe.micro_batches(self.job)
        stage = layer.total * -(-self.job.shape.layers // recipe.pp)
        if n * (stage + head.total) + (recipe.pp - 1) / recipe.virtual * stage > best:
            return None
        return assemble(self.cluster, self.job, recipe, layer, head)

    def _explained(self, candidate: Candidate, best: Candidate) -> Candidate:
        """A candidate with the two terms that it loses most by."""
        if candidate.time is None or best.time is None:
            return candidate
        names = {
            "compute": "computes longer", "tensor": "sums over tp", "pipeline": "sends between stages",
            "data": "exchanges gradients", "bubble": "waits in the pipeline", "optimizer": "updates parameters",
        }  # fmt: skip
        more = {text: getattr(candidate.time, key) - getattr(best.time, key) for key, text in names.items()}
        worst = sorted(more, key=lambda text: -more[text])[:2]
        why = " and ".join(f"{text} {1e3 * more[text]:+,.1f} ms" for text in worst if more[text] > 0)
        return replace(candidate, why=why or "as fast")

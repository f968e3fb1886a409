"""Is the engine that `gemm_all_reduce` takes the best one? `python -m bench.choices` (about four minutes on two cores).

Random shapes and those of published models, on two ranks, in inference. Each is measured with the choice of the group
(the machine's profile, which is measured first where there is none), with each engine forced, and as the two-line
program, F.linear and all_reduce_; of the rounds of each the least counts, at real-time priority where this user may, so
that other programs count little. Printed are the shares of shapes within 3 % and 10 % of the best, the worst, and each
shape that lost. The choice is measured twice, as two candidates: how often these two are as near to each other is what
a perfect choice would reach here, and a loss is confirmed where it is one against both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tpkernels as tpk
from bench.machine import machine
from bench.ranks import RankTeam, cores, launch
from bench.shapes import MODELS, Gemm
from bench.suite import real_time
from bench.timing import Candidate, measure
from tpkernels import ops
from tpkernels._native import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEAR, FAR = 1.03, 1.10
AGAIN = "chosen again"


@dataclass(frozen=True)
class Choice:
    """One shape: this rank's product, the engine taken, and each candidate's time as a multiple of the chosen one's."""

    dtype: str
    M: int
    N: int
    K: int
    engine: str
    us: float
    relative: dict[str, float]
    again: float  # the choice measured a second time, likewise

    @property
    def best(self) -> str:
        return min(self.relative, key=lambda name: self.relative[name])

    @property
    def loss(self) -> float:
        """Time of the choice over that of the best candidate."""
        return 1 / min(self.relative.values())

    @property
    def confirmed(self) -> float:
        """The loss against the better of the two measurements of the choice."""
        return self.loss * min(1.0, self.again)

    @property
    def noise(self) -> float:
        """How far two measurements of the choice are apart, as a factor."""
        return max(self.again, 1 / self.again)


def shapes(count: int, seed: int) -> Iterator[tuple[str, Gemm]]:
    """Yield the published shapes, then random ones: M to 1024, weights of up to 16 M values, uneven sizes too."""
    yield from ((dtype, gemm) for gemm in MODELS.values() for dtype in DTYPES)
    source = random.Random(seed)
    for _ in range(count):
        gemm = Gemm(*(int(2 ** source.uniform(low, high)) for low, high in ((0, 10.01), (6, 12), (6, 12))))
        yield source.choice(list(DTYPES)), gemm


def candidates(x: Tensor, w: Tensor, chosen: tpk.Group, forced: dict[str, tpk.Group]) -> Iterator[Candidate]:
    """Yield the choice, each engine, and the two-line program."""
    want = x.double() @ w.double().T
    dist.all_reduce(want)
    # Rounding of the dtype, and fp32 sums of K products of size K**-0.5, which walk at random: 8 standard deviations.
    allowed = 4 * torch.finfo(x.dtype).eps * float(want.abs().max()) + 8 * x.shape[1] ** 0.5 * 2.0**-24

    def error(y: Tensor) -> float:
        return float((y.double() - want).abs().max()) / allowed

    def two_lines() -> Tensor:
        y = F.linear(x, w)
        ops.all_reduce_(y, group=chosen)
        return y

    def by(group: tpk.Group) -> Callable[[], Tensor]:
        return lambda: ops.gemm_all_reduce(x, w, group=group)

    yield Candidate("chosen", by(chosen), error)
    yield Candidate("two lines", two_lines, error)
    yield from (Candidate(engine, by(group), error) for engine, group in forced.items())
    yield Candidate(AGAIN, by(chosen), error)


def on_rank(team: RankTeam, spec: tuple[int, int, int], send: Callable[[Any], None]) -> None:
    """Measure every shape; rank 0 sends a Choice of each."""
    count, seed, rounds = spec
    chosen = tpk.Group.open()
    groups = {engine: tpk.Group.open() for engine in ("aten", "onednn", "gemv")}
    with torch.no_grad():
        for dtype, (M, N, K) in shapes(count, seed):
            name = str(DTYPES[dtype]).removeprefix("torch.")
            x, w = torch.randn(M, K).to(DTYPES[dtype]), (torch.randn(N, K) / K**0.5).to(DTYPES[dtype])
            forced = {e: g for e, g in groups.items() if e in _C.engines_for(name, M, N, K)}
            for engine, group in forced.items():
                group._communicator.add_measured(name, M, N, K, {engine: 1.0})
            found = measure(list(candidates(x, w, chosen, forced)), team, rounds=rounds, block_s=0.004, most_lost=1e9)
            if not all(timing.verified for timing in found):
                raise ValueError(f"{dtype} {M}x{N}x{K}: wrong: {[t.name for t in found if not t.verified]}")
            base = min(found[0].seconds)
            relative = {t.name: min(t.seconds) / base for t in found[1:]}
            if team.rank == 0:
                engine = chosen.explain("gemm_all_reduce", M=M, N=N, K=K, dtype=DTYPES[dtype]).engine
                again = relative.pop(AGAIN)
                send(Choice(dtype, M, N, K, engine, base * 1e6, relative, again))
    if team.rank == 0:
        send(chosen.explain().profile)


def report(found: list[Choice], console: Console) -> None:
    """Print the shares, and the shapes that lost."""
    for dtype in DTYPES:
        mine = [choice for choice in found if choice.dtype == dtype]
        if mine:
            near, far = (sum(c.loss <= limit for c in mine) / len(mine) for limit in (NEAR, FAR))
            sure, surely = (sum(c.confirmed <= limit for c in mine) / len(mine) for limit in (NEAR, FAR))
            same, alike = (sum(c.noise <= limit for c in mine) / len(mine) for limit in (NEAR, FAR))
            slower = sum(c.relative["two lines"] < 1 / NEAR for c in mine)
            worst = max(mine, key=lambda c: c.loss)
            console.print(
                f"{dtype}: {len(mine)} shapes; within 3 % of the best {near:.0%}, within 10 % {far:.0%}, where "
                f"only confirmed losses count {sure:.0%} and {surely:.0%}; worst "
                f"{worst.loss:.2f}x at {worst.M}x{worst.N}x{worst.K} ({worst.us:.0f} us, best {worst.best}); slower "
                f"than the two lines by more than 3 %: {slower}; two measurements of the choice: within 3 % "
                f"of each other {same:.0%}, within 10 % {alike:.0%}",
                highlight=False,
            )
    table = Table(title="more than 3 % from the best", title_justify="left")
    for column in ("dtype", "M x N x K", "us", "engine", "best", "loss", "confirmed"):
        table.add_column(column, justify="left" if column in ("dtype", "engine", "best") else "right")
    for c in sorted(found, key=lambda choice: -choice.loss):
        if c.loss > NEAR:
            table.add_row(
                c.dtype, f"{c.M}x{c.N}x{c.K}", f"{c.us:.0f}", c.engine, c.best, f"{c.loss:.2f}x", f"{c.confirmed:.2f}x"
            )
    console.print(table)


def main(
    count: Annotated[int, typer.Option(min=0, help="Random shapes beside the published ones.")] = 200,
    seed: Annotated[int, typer.Option()] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    ranks: Annotated[int, typer.Option(min=1, help="Rank processes, one thread each.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Add a JSON line for each shape to this file.")] = None,
) -> None:
    """Measure, then report."""
    console, found = Console(width=max(120, Console().width)), []
    with real_time():
        for message in launch(ranks, on_rank, (count, seed, rounds), pin=ranks <= len(cores())):
            if isinstance(message, str):
                console.print(f"profile: {message or 'none, the rule of sizes'}", highlight=False)
            else:
                found.append(message)
    report(found, console)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(choice) | {"machine": machine()}) + "\n" for choice in found)


if __name__ == "__main__":
    typer.run(main)

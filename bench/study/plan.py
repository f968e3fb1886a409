"""The cells of the study, those that are missing, and their sessions of a few minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from bench import rows
from bench.study import links, session
from bench.study.methods import LAYOUTS, Method, methods
from tpkernels.train.settings import Settings

# Of the runs for the loss: a third of the parameters of `make run`, so that three seeds of everything take an hour.
SMALL = Settings(layers=3, d_model=160, heads=4, context=64, batch=8, warmup=40)
FULL = Settings(warmup=0)  # of the runs for speed: the model of `make run`, past all warm-ups
TINY = replace(SMALL, layers=1, d_model=32, heads=2, context=16, batch=4, warmup=2)
PER_SESSION = 6  # methods that share a start of the ranks
SESSION_S = 600.0  # after which a session is given up


@dataclass(frozen=True)
class Study:
    """The choice of cells.

    Attributes:
        only: patterns; a cell is taken when its name, "dp2/int8 delayed", fits one of them. Empty: all.
        alone: time computing and averaging apart, too.
        minutes: no session begins after so many; None: until all is done.
    """

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    links: tuple[str, ...] = (links.LOOPBACK, *links.RATES)
    only: tuple[str, ...] = ()
    seeds: int = 3
    steps: int = 300
    rounds: int = 3
    timed_steps: int = 4
    minutes: float | None = None
    alone: bool = True
    loss_settings: Settings = SMALL
    speed_settings: Settings = FULL

    def wanted(self, layout: str) -> list[Method]:
        """The chosen methods of a layout."""
        return [m for m in methods(layout) if not self.only or any(fnmatch(f"{layout}/{m.name}", p) for p in self.only)]


def smoke() -> Study:
    """Two methods, a few steps of a tiny model, no links."""
    return Study(
        layouts=("dp2",), links=(links.LOOPBACK,), only=("dp2/DDP fp16 hook", "dp2/fp16"), seeds=1, steps=4, rounds=1,
        timed_steps=1, alone=False, loss_settings=TINY, speed_settings=TINY,
    )  # fmt: skip


Job = tuple[dict[str, Any], dict[str, Any], str]
"""The job of the ranks, the fields that its rows share, and the link."""


def loss_jobs(study: Study, kept: Sequence[rows.Row]) -> Iterator[Job]:
    """Runs for the loss that are missing: seed by seed, so that every method soon has one."""
    for seed in range(study.seeds):
        for layout in study.layouts:
            done = {r["method"] for r in rows.select(kept, kind="loss", layout=layout, seed=seed, steps=study.steps)}
            missing = [m.name for m in study.wanted(layout) if m.name not in done]
            for i in range(0, len(missing), PER_SESSION):
                common = {"kind": "loss", "layout": layout, "link": "shared memory"}
                job = {"seeds": [seed], "steps": study.steps, "methods": missing[i : i + PER_SESSION],
                       "settings": study.loss_settings.__dict__, "transport": "auto"}  # fmt: skip
                yield common | job, common, links.LOOPBACK


def speed_jobs(study: Study, kept: Sequence[rows.Row]) -> Iterator[Job]:
    """Timings that are missing. All methods of a layout and link are taken in one session, in turn."""
    for link in study.links:
        for layout in study.layouts:
            wanted = [m.name for m in study.wanted(layout)]
            common = {"kind": "speed", "layout": layout, "link": link}
            job = {"methods": wanted, "rounds": study.rounds, "steps": study.timed_steps,
                   "settings": study.speed_settings.__dict__, "transport": "group"}  # fmt: skip
            done = {r["method"] for r in rows.select(kept, **common)}
            if wanted and set(wanted) - done:
                yield common | job, common, link
            alone = common | {"kind": "alone"}
            if study.alone and wanted and LAYOUTS[layout][1] > 1 and not rows.select(kept, **alone):
                yield job | alone, alone, link


def run(study: Study, path: Path, kinds: Sequence[str], say: Callable[[str], None]) -> None:
    """Measure the cells that are missing; append each row to the file when it is measured."""
    began = time.monotonic()
    why = links.obstacle() if "speed" in kinds and any(link != links.LOOPBACK for link in study.links) else None
    if why is not None:
        say(f"no shaped links on this machine ({why}): only the loopback is measured")
        study = replace(study, links=tuple(link for link in study.links if link == links.LOOPBACK))
    where = rows.circumstances(pinned=True)
    for make in [{"loss": loss_jobs, "speed": speed_jobs}[kind] for kind in kinds]:
        for job, common, link in make(study, rows.load(path)):
            if study.minutes is not None and time.monotonic() - began > 60 * study.minutes:
                say("time is up; the same command goes on from here")
                return
            say(f"{common['kind']} {common['layout']} {common['link']}: {', '.join(job['methods'])}")
            with links.opened(link) as opened:
                for row in session.run(job, opened, timeout_s=SESSION_S):
                    rows.append(path, common | row | {k: where[k] for k in ("machine", "torch", "commit", "date")})

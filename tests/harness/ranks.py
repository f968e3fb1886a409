"""Checks of an open group, each run on several numbers of ranks: processes, emulated devices, GPUs.

@on_ranks(1, 3, devices=(2,))
def check_sum(group: Group) -> None: ...

@on_processes(globals())
def test_collectives(run: Run) -> None:
    run()

@on_devices(globals())
def test_collectives_on_devices(run: Run) -> None:
    run()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest

from tests.harness.ops import run_at

Check = TypeVar("Check", bound=Callable[..., Any])
DEVICES = ("emu", "virtual", "real")
BOTH_TRANSPORTS = ("shm", "group")
AT_NIGHT = {("shm", 4): "group", ("group", 2): "shm"}
"""Runs that are part of `make test-all` alone, if the check has the same number of ranks over the other transport."""


def nightly(*cases: Any) -> list[Any]:
    """Cases of a parametrised test that are part of `make test-all`, not of `make test`."""
    return _marked(pytest.mark.nightly, cases)


def weekly(*cases: Any) -> list[Any]:
    """Cases of a parametrised test that are part of `make test-weekly` alone."""
    return _marked(pytest.mark.weekly, cases)


def _marked(mark: pytest.MarkDecorator, cases: Iterable[Any]) -> list[Any]:
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark) for case in cases]


@dataclass(frozen=True)
class Run:
    """One check on R ranks of a place.

    Attributes:
        check: called with the open group on every rank.
        place: "cpu" for processes, or one of DEVICES.
        R: how many ranks.
        transport: of the group; "auto": the default of the place.
    """

    check: Callable[..., Any]
    place: str
    R: int
    transport: str

    @property
    def id(self) -> str:
        """Of the parametrized test."""
        parts = [self.check.__name__.removeprefix("check_"), self.place, self.transport, str(self.R)]
        return "-".join(part for part in parts if part not in ("cpu", "auto"))

    @property
    def is_nightly(self) -> bool:
        """Whether a like run is part of every test."""
        other = AT_NIGHT.get((self.transport, self.R))
        return other is not None and replace(self, transport=other) in getattr(self.check, "runs", [])

    def __call__(self) -> None:
        opening = {} if self.transport == "auto" else {"transport": self.transport}
        run_at(self.place, self.check, self.R, **opening)


def on_ranks(
    *ranks: int,
    transports: Iterable[str] = ("auto",),
    devices: Iterable[int] = (),
    exchanging: Iterable[int] = (),
) -> Callable[[Check], Check]:
    """Register a check; `on_processes` and `on_devices` make tests of it.

    Args:
        ranks: numbers of processes.
        transports: of their groups. A single rank has one kind of group, therefore one run.
        devices: numbers of emulated devices and of GPUs that reach each other's memory.
        exchanging: numbers of devices that exchange through a process group.
    """

    def register(check: Check) -> Check:
        runs = [Run(check, "cpu", R, transport if R > 1 else "auto") for R in ranks for transport in transports]
        runs += [Run(check, place, R, "auto") for R in devices for place in DEVICES]
        runs += [Run(check, place, R, "group") for R in exchanging for place in ("emu", "real")]
        check.runs = list(dict.fromkeys(runs))  # type: ignore[attr-defined]
        return check

    return register


def on_processes(module: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the runs on processes of all checks that a module registers."""
    return _parametrized(run for run in _runs(module) if run.place == "cpu")


def on_devices(module: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the runs on devices of all checks that a module registers."""
    return _parametrized(run for run in _runs(module) if run.place != "cpu")


def _runs(module: dict[str, Any]) -> list[Run]:
    return [run for value in list(module.values()) for run in getattr(value, "runs", [])]


def _parametrized(runs: Iterable[Run]) -> pytest.MarkDecorator:
    cases = [pytest.param(run, id=run.id, marks=[pytest.mark.nightly] * run.is_nightly) for run in runs]
    return pytest.mark.parametrize("run", cases)

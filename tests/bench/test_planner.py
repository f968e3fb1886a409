"""The errors that the planner prints and docs/planner.md shows are those of its constants on the kept measurements."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest

from bench.planner import cpus, cuts, fit, memory, published
from bench.planner.__main__ import (
    PAGE,
    cuts_table,
    errors_of,
    memory_table,
    order_table,
    published_table,
    put,
    set_values,
    steps_table,
)  # fmt: skip
from bench.planner.scatter import scatter
from tpkernels.planner.hardware import DATA, device


def test_published_times_are_met_and_the_page_has_them() -> None:
    rows = list(published.rows())
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row.source, []).append(abs(row.predicted / row.seconds - 1))
    assert len(rows) == 22 and max(map(mean, errors.values())) < 0.06
    if PAGE.exists():
        assert published_table() in PAGE.read_text()


@pytest.mark.nightly
def test_the_error_of_cpu_ranks_over_links_is_that_of_fits_without_the_rows() -> None:
    steps = cpus.read()
    assert len(steps) == 39
    found = errors_of(fit.cross_validate(steps, cpus.START))["cpu"]
    assert device("cpu").errors["many_nodes"] == pytest.approx(found, abs=0.2)


def test_the_error_of_cpu_ranks_on_one_host_is_that_of_the_kept_steps() -> None:
    own = cpus.read_steps()
    assert len(own) == 16
    assert device("cpu").errors["one_node"] == pytest.approx(
        mean(100 * abs(s.predicted / s.ms - 1) for s in own), abs=0.2
    )
    if PAGE.exists():
        assert steps_table(own) in PAGE.read_text()


def test_kept_cuts_of_the_main_job_are_met_and_the_page_has_them() -> None:
    cases = cuts.read()
    assert len(cases) == 16
    assert median(abs(row.predicted / row.ms - 1) for rows in cases.values() for row in rows) < 0.15
    chosen = [(min(rows, key=lambda row: row.predicted), min(row.ms for row in rows)) for rows in cases.values()]
    assert sum(row.ms <= 1.03 * fastest for row, fastest in chosen) >= 14
    if PAGE.exists():
        assert cuts_table(cases) in PAGE.read_text()


def test_kept_peaks_of_memory_are_met_and_the_page_has_them() -> None:
    rows = memory.read()
    assert len(rows) == 12
    for row in rows:
        assert abs(row.predicted - row.mib) < max(100.0, 0.1 * row.mib), row.name
    if PAGE.exists():
        assert memory_table(rows) in PAGE.read_text()


@dataclass(frozen=True)
class Measured:
    """What a row of a table says."""

    name: str
    ms: float = 0.0
    predicted: float = 0.0
    mib: float = 0.0


def test_the_tables_of_cuts_and_memory_have_errors_and_what_the_choice_costs() -> None:
    fast, slow = Measured("tp 2", 100.0, 110.0), Measured("dp 2", 105.0, 100.8)
    text = cuts_table({"right": [fast, Measured("dp 2", 120.0, 120.0)], "wrong": [fast, slow]})
    assert text.splitlines()[2:] == [
        "| right | 2 | 5.0 % | tp 2 | tp 2 | 100 | +0.0% |",
        "| wrong | 2 | 7.0 % | dp 2 | tp 2 | 100 | +5.0% |",
        "| all; within 3 % of the fastest | 4 | 7.0 % |  |  |  | 1 of 2 |",
    ]
    assert memory_table([Measured("tp 2", mib=200.0, predicted=190.0)]).splitlines()[2:] == [
        "| tp 2 | 200 | 190 | -5% |"
    ]


def test_rows_that_scatter_cannot_be_ranked_better_than_they_scatter() -> None:
    def rows(of_others: float) -> list[fit.Iteration]:
        random = np.random.default_rng(1)
        found = []
        for tp, pp, m in product((4, 8), (2, 4, 8), (1, 2, 3, 4, 6)):
            n = 48 / m
            ms = 1000 * (1 + 0.1 * tp / pp + 0.2 / m) * (n + pp - 1) / n
            ms *= np.exp(of_others * random.normal()) if tp == 4 else 1.0
            size = {"global_batch": 48, "dp": 1, "micro_batch": m, "tp": tp, "pp": pp, "ms": ms}
            found.append(fit.Iteration({key: str(value) for key, value in size.items()}, ("many_nodes", "made")))
        return found

    clean, noisy = scatter(rows(0.0)), scatter(rows(0.2))
    assert clean.of_least < 0.02 and clean.of_others < 0.03 and clean.expected > 0.95 and clean.fitted > 0.98
    assert noisy.of_least == pytest.approx(clean.of_least, rel=0.01) and noisy.of_others == pytest.approx(0.2, rel=0.5)
    assert noisy.low < noisy.expected < noisy.high and noisy.expected < clean.expected
    assert f"| {noisy.of_others:.1%} |" in order_table(rows(0.2))


def test_a_fit_finds_the_constants_that_made_its_rows() -> None:
    steps = cpus.read()
    true = cpus.START | {"gemm_rate": 0.5, "host_layer_s": 3e-3, "between_rate": 0.7}
    made = [Made(step, step.predicted(true)) for step in steps]
    found = fit.fit(made, cpus.START)  # the prior holds what these rows tell little about
    assert fit.percentage_error(made, fit.predictions(made, found)) < 1.0
    assert found["between_rate"] == pytest.approx(0.7, rel=0.05)
    assert fit.percentage_error(made, fit.predictions(made, cpus.START)) > 10.0


class Made:
    """A step that took what a model of time says."""

    group = ("cpu", "made")

    def __init__(self, step: cpus.Measured, ms: float) -> None:
        self.ms, self.predicted = ms, step.predicted


def test_rank_correlation_is_of_order_alone() -> None:
    rows = [Made(cpus.read()[0], ms) for ms in (1.0, 2.0, 3.0, 4.0)]
    assert fit.rank_correlation(rows, np.array([1.0, 10.0, 11.0, 400.0])) == pytest.approx(1.0)
    assert fit.rank_correlation(rows, np.array([4.0, 3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_values_are_written_and_sources_stay(tmp_path: Path) -> None:
    file = tmp_path / "constants.toml"
    file.write_text((DATA / "constants.toml").read_text())
    before = tomllib.loads(file.read_text())
    set_values(file, {"skew_s": 0.125})
    after = tomllib.loads(file.read_text())
    assert after["skew_s"] == {"value": 0.125, "source": before["skew_s"]["source"]}
    assert {k: v for k, v in after.items() if k != "skew_s"} == {k: v for k, v in before.items() if k != "skew_s"}
    with pytest.raises(SystemExit, match="0 lines of skew"):
        set_values(file, {"skew": 1.0})
    with pytest.raises(SystemExit, match="0 places for none"):
        put("text", "none", "content")

"""The errors that the planner prints and docs/planner.md shows are those of its constants on the kept measurements."""

from __future__ import annotations

import tomllib
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from bench.planner import cpus, fit, published
from bench.planner.__main__ import PAGE, errors_of, published_table, put, set_values, steps_table
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

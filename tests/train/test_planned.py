"""`tpkernels train --plan auto`: the planner's cut with what is given, and the reasons where none can run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tpkernels.cli import app
from tpkernels.errors import UserError
from tpkernels.train import planned
from tpkernels.train.planned import cut_of, line_of, plan_run
from tpkernels.train.settings import Settings, check

MAIN = Settings()


@pytest.fixture(autouse=True)
def not_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine is one of the shipped class, with as many cores as there are ranks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(planned, "cores", lambda: 64)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_cut_is_the_fastest_and_a_run_can_take_it(ranks: int) -> None:
    report = plan_run(MAIN, (), ranks, 16)
    cut = cut_of(report)
    assert cut["tp"] * cut["dp"] * cut["pp"] == ranks
    check(Settings(**cut))
    seconds = [c.seconds for c in report.runnable]
    assert report.candidates[0].seconds == min(seconds)
    line = line_of(report)
    assert report.error[0] is not None
    error = f"ms a step (error {report.error[0]:.0f} % on this class of machine)"
    assert line.startswith(f"planned: {report.recipe.text()}, ") and error in line
    if len(seconds) > 1:
        assert report.candidates[1].why in line


def test_what_is_given_stays() -> None:
    def cut(**given: object) -> dict[str, object]:
        return cut_of(plan_run(Settings(**given), given.keys(), 4, 16))  # type: ignore[arg-type]

    assert (cut(tp=4)["tp"], cut(dp=4)["dp"], cut(pp=4)["pp"]) == (4, 4, 4)
    assert cut(pp=4, micro_batches=2)["micro_batches"] == 2
    assert cut(dp=4, zero=2)["zero"] == 2 and cut(dp=4, zero=0)["zero"] == 0
    assert cut(tp=4, sequence_parallel=True)["sequence_parallel"] is True
    assert cut(dp=4, grad_mode="delayed")["zero"] == 0  # ZeRO needs the average of each step
    assert cut(dp=4, grad_codec="topk")["zero"] == 0
    assert "micro_batches" not in cut(tp=4)


def test_where_no_cut_can_run_the_reasons_are_told() -> None:
    with pytest.raises(UserError, match=r"--plan auto: plan: no cut of 3 ranks can run: .*does not divide over 3"):
        plan_run(Settings(heads=2, layers=2), (), 3, 16)
    with pytest.raises(UserError, match="none was allowed"):
        plan_run(Settings(tp=3), ["tp"], 4, 16)
    with pytest.raises(UserError, match="GiB on a rank, which has"):
        plan_run(Settings(d_model=1 << 15, layers=64), (), 2, 16)


def train(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200"})


def test_a_run_says_what_was_planned(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpkernels.cli.train.cores", lambda: 1)
    sizes = ("--layers", "1", "--d-model", "24", "--heads", "3", "--context", "16", "--batch", "4", "--steps", "2")
    rest = ("--data", text, "--parity-steps", "0", "--sample-bytes", "0", "--folder", str(tmp_path / "run"))
    shown = train("--plan", "auto", *sizes, *rest)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("planned: tp 1, pp 1, dp 1, micro-batch 4, ")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["tp"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan", "best"], "--plan is auto, got 'best'"),
        (["--plan", "auto", "--resume"], "--plan auto chooses the cut of a new run"),
        (["--plan", "auto", "--heads", "0"], "--heads must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], says: str) -> None:
    found = train(*arguments)
    assert found.exit_code == 2 and says in " ".join(found.output.split()), found.output


def test_ranks_of_several_machines_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = train("--plan", "auto")
    assert found.exit_code == 2 and "--plan auto is for the ranks of one machine" in found.output.replace("\n", " ")


def test_a_core_that_ranks_share_makes_them_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = plan_run(MAIN, ("tp",), 2, 16).candidates[0].seconds
    monkeypatch.setattr(planned, "cores", lambda: 1)
    assert plan_run(MAIN, ("tp",), 2, 16).candidates[0].seconds > 1.7 * wide

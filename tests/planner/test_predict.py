"""`tpkernels plan --predict`: rows in, rows with a time out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tpkernels.cli import app

HEADER = "params_b,gpus,global_batch,micro_batch,hidden,heads,layers,seq,tp,dp,pp,note"
ROWS = (
    "39.1,512,1536,4,8192,64,48,2048,8,32,2,first",
    "3.6,64,512,4,3072,32,30,2048,2,32,1,second",
    ",8,64,2,2048,16,24,1024,2,2,2,third",
)


def predict(rows: Path, out: Path, hardware: str = "a100-dgx") -> Result:
    arguments = ["plan", "--predict", str(rows), "--hardware", hardware, "--out", str(out)]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def written(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def test_rows_keep_their_order_and_columns_and_get_a_time(tmp_path: Path) -> None:
    rows, out = written(tmp_path / "rows.csv", *ROWS), tmp_path / "out.csv"
    assert predict(rows, out).exit_code == 0
    given, found = (list(csv.DictReader(path.open())) for path in (rows, out))
    times = [float(row.pop("predicted_ms")) for row in found]
    assert found == given
    # Megatron-LM's published times of these two models are 14,450 and 3,700 ms (arXiv:2104.04473).
    assert times[0] == pytest.approx(14450, rel=0.15) and times[1] == pytest.approx(3700, rel=0.15)
    assert 0 < times[2] < 1000


def test_the_column_of_parameters_is_not_needed(tmp_path: Path) -> None:
    whole = written(tmp_path / "rows.csv", *ROWS)
    short = written(tmp_path / "short.csv", *(row.partition(",")[2] for row in ROWS), header=HEADER.partition(",")[2])
    for rows in (whole, short):
        assert predict(rows, rows).exit_code == 0  # the output may be the input
    whole_times, short_times = ([r["predicted_ms"] for r in csv.DictReader(p.open())] for p in (whole, short))
    assert whole_times == short_times


@pytest.mark.parametrize(
    ("row", "header", "text"),
    [
        (ROWS[0].replace("8192", "wide"), HEADER, "line 2: hidden: expected a positive integer, got 'wide'"),
        (ROWS[0].replace("8192", "-1"), HEADER, "hidden: expected a positive integer, got '-1'"),
        (ROWS[0].replace("512,1536", "511,1536"), HEADER, "tp 8 x pp 2 x dp 32 is 512 ranks, and there are 511"),
        (ROWS[0].replace(",4,8192", ",5,8192"), HEADER, "do not divide into micro-batches of 5"),
        (ROWS[0].replace("1536", "1537"), HEADER, "does not divide over 32 replicas"),
        (ROWS[0].replace("64,48", "60,48"), HEADER, "hidden 8192 does not divide into 60 heads"),
        (ROWS[0] + ",more", HEADER, "expected 12 values"),
        ("39.1,512", HEADER, "expected 12 values"),
        (ROWS[0], HEADER.replace("gpus", "chips"), "no column gpus"),
        (ROWS[0], HEADER.replace("note", "predicted_ms"), "none of predicted_ms"),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_written(tmp_path: Path, row: str, header: str, text: str) -> None:
    rows, out = written(tmp_path / "rows.csv", row, header=header), tmp_path / "out.csv"
    found = predict(rows, out)
    assert found.exit_code == 2 and text in found.output.replace("\n", ""), found.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]


def test_unknown_files_and_hardware_are_errors(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.csv", *ROWS)
    for found, text in (
        (predict(rows, tmp_path / "out.csv", "tpu"), "expected one of a100-dgx, got 'tpu'"),
        (predict(tmp_path / "none.csv", tmp_path / "out.csv"), "cannot be read"),
        (predict(rows, tmp_path / "no" / "out.csv"), "cannot be written"),
        (CliRunner().invoke(app, ["plan", "--predict", str(rows)]), "needs --out"),
        (CliRunner().invoke(app, ["plan", "gpt2", "--out", "x.csv"]), "expected a MODEL"),
    ):
        assert found.exit_code == 2 and text in found.output.replace("\n", ""), found.output

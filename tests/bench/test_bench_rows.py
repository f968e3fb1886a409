"""What becomes of timings: rows, goals, tables, README, plots. Nothing here is timed."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import goals, readme, rows, suite, table
from tests.harness.bench import gemm_rows, some_rows

ROOT = Path(__file__).parents[2]


def test_every_row_has_every_field_and_survives_json(tmp_path: Path) -> None:
    found = [*some_rows(), *gemm_rows()]
    for row in found:
        assert tuple(row) == rows.FIELDS
    rows.save(tmp_path / "a.jsonl", found)
    assert rows.load(tmp_path / "a.jsonl") == found
    assert rows.load(tmp_path) == found


def test_a_row_says_how_fast_how_sure_and_where() -> None:
    gloo, plain, bad = some_rows([100.0, 100.0, 500.0, 500.0])
    assert (plain["ratio"], plain["ratio_min"], plain["ratio_max"]) == pytest.approx((90.0, 90.0, 90.0))
    assert plain["median_us"] == pytest.approx(1e4) and gloo["ratios"]["plain"][0] == pytest.approx(1 / 90, rel=1e-3)
    assert {name: at["rounds"] for name, at in plain["by_placement"].items()} == {"near": 1, "mixed": 1, "far": 1}
    assert plain["placement"] == "mixed"
    assert bad["verified"] is False and bad["median_us"] is None and bad["ratio"] is None
    fused = next(row for row in gemm_rows() if row["variant"] == "tpkernels")
    assert fused["exposed_us"] == pytest.approx(1e4) and rows.over_roof(fused) == pytest.approx(0.025)


def test_a_newer_row_replaces_the_one_that_measured_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows.save(path, some_rows())
    again = [{**row, "date": "2026-02-02T00:00:00Z"} for row in some_rows()]
    rows.save(path, again)
    assert rows.load(path) == again
    rows.save(path, some_rows([500.0] * 4))
    assert len(rows.load(path)) == 2 * len(again), "near and far are kept side by side"
    path, one = tmp_path / "b.jsonl", some_rows()[0]
    served = [{**one, "slots": slots, "clients": clients} for slots in (1, 8) for clients in (1, 64)]
    rows.save(path, served[:2])
    rows.save(path, [*served[1:], one])
    assert rows.load(path) == [*served, one], "other slots or clients are kept side by side"


def test_a_goal_counts_in_every_placement_that_was_measured() -> None:
    goal = goals.Goal("all_reduce", "plain", 4096, 80)
    (both,) = goals.verdicts([goal], [*some_rows(), *some_rows([500.0] * 3)])
    assert (list(both.found), both.word) == (["near", "far"], "reached")
    (far,) = goals.verdicts([goal], [*some_rows(), *some_rows([500.0] * 3, gloo=0.5)])
    assert (far.word, far.text) == ("MISSED", "90x [90, 90] near, 50x [50, 50] far")
    (missed,) = goals.verdicts([replace(goal, at_least=91)], some_rows())
    assert missed.word == "MISSED"
    (absent,) = goals.verdicts([replace(goal, size=8192)], some_rows())
    assert absent.word == "not measured"


def test_every_machine_class_has_a_verdict_and_the_documents_show_all_of_them() -> None:
    other = "Intel, AMX"
    data = [*some_rows(), *some_rows(kind=other, gloo=0.5), *gemm_rows()]
    goal = goals.Goal("all_reduce", "plain", 4096, 80)
    found = list(goals.verdicts([goal], data))
    assert [(v.machine, v.word) for v in found] == [("AMD Zen 4, AVX-512", "reached"), (other, "MISSED")]
    assert goals.split(found) == [goal] and goals.split(found[:1]) == []
    absolute = replace(goal, machine=other)
    assert [v.machine for v in goals.verdicts([absolute], data)] == [other], "a number for one class"
    text = readme.table("summary", data)
    assert "| at least | AMD Zen 4, AVX-512 | Intel, AMX |" in text
    assert "| 80x | reached: 90x [90, 90] near | MISSED: 50x [50, 50] near |" in text
    assert "| 1.4x | MISSED: 1.22x [1.22, 1.22] far | not measured: - |" in text, "the same goals for every class"
    assert "Reached on one machine class and missed on another: 1." in text
    by_name = "missed on another: all_reduce plain, 4 KiB (fp32, against gloo)."
    assert by_name in readme.table("goals", data)
    tables = readme.table("all_reduce", data)
    assert tables.count("| size |") == 2 and "AMD Zen 4, AVX-512 (C)" in tables and "Intel, AMX (C)" in tables


def test_rows_of_another_machine_class_are_kept_beside_these(tmp_path: Path) -> None:
    rows.save(tmp_path / "a.jsonl", some_rows())
    rows.save(tmp_path / "a.jsonl", some_rows(kind="Intel, AMX"))
    assert rows.load(tmp_path / "a.jsonl") == [*some_rows(), *some_rows(kind="Intel, AMX")]


def test_a_server_has_a_goal_in_tokens_a_second() -> None:
    one = {**some_rows()[0], "op": "serve_smollm2", "variant": "tpkernels", "bytes": None, "by_placement": {}}
    data = [{**one, "clients": clients, "tokens_per_s": speed} for clients, speed in ((1, 40.0), (8, 100.0))]
    served = [goal for goal in goals.GOALS if goal.op == "serve_smollm2"]
    assert [(v.text, v.word) for v in goals.verdicts(served, data)] == [
        ("40 tokens/s", "reached"),
        ("100 tokens/s", "MISSED"),
    ]
    assert [goal.title for goal in served] == [
        "serve_smollm2 tpkernels, 1 client",
        "serve_smollm2 tpkernels, 8 clients",
    ]


def test_a_goal_between_hosts_looks_at_rows_of_its_link_and_codec_only() -> None:
    goal = goals.Goal("gemm_all_reduce", "tpkernels", 16, 1.2, "linear_gloo", link="1gbit", codec="fp16")
    (reached,) = goals.verdicts([goal], [*gemm_rows(), *gemm_rows("1gbit", "fp16")])
    assert reached.word == "reached"
    for other in (replace(goal, link="10gbit"), replace(goal, codec="int8"), replace(goal, link=None)):
        (absent,) = goals.verdicts([other], gemm_rows("1gbit", "fp16"))
        assert absent.word == "not measured"
    assert "1gbit" not in readme.table("gemm", gemm_rows("1gbit", "fp16"))
    (line,) = [li for li in readme.table("links", gemm_rows("1gbit", "fp16")).splitlines() if "| fp16 |" in li]
    assert "| 410 | 10 | 40 | 1.22x [1.22, 1.22] |" in line


def test_a_goal_against_the_gemm_alone_reads_the_exposed_time() -> None:
    goal = goals.Goal("gemm_all_reduce", "tpkernels", 16, 1 / 1.03, goals.GEMM_ALONE)
    (verdict,) = goals.verdicts([goal], gemm_rows())
    assert verdict.word == "reached"
    (verdict,) = goals.verdicts([replace(goal, at_least=0.99)], gemm_rows())
    assert verdict.word == "MISSED"


def test_never_slower_is_even_within_noise_and_missed_beyond() -> None:
    goal = goals.Goal("gemm_all_reduce", "tpkernels", 16, 1.0, "gemm_onednn")
    (verdict,) = goals.verdicts([goal], gemm_rows())
    assert verdict.found["far"][0] == pytest.approx(0.9756, rel=1e-3)
    assert verdict.word == "MISSED"
    (verdict,) = goals.verdicts([replace(goal, against="tpkernels", variant="tpkernels")], gemm_rows())
    assert verdict.word == "not measured"
    (verdict,) = goals.verdicts([replace(goal, against="gemm_aten", variant="linear_tpk")], gemm_rows())
    assert verdict.word == "reached"


def test_a_table_shows_every_column_that_has_something_to_say() -> None:
    shown = table.columns(gemm_rows())
    for name in ("op", "size", "R", "dtype", "median us", "p90", "GFLOP/s", "exposed us", "vs linear_gloo", "verified"):
        assert name in shown
    assert "busbw GB/s" not in shown


def test_the_readme_tables_are_written_between_the_markers_and_nowhere_else() -> None:
    text = "# Top\n<!-- bench:all_reduce -->\nold\n<!-- /bench -->\nmiddle\n<!-- bench:gemm -->\n<!-- /bench -->\nend\n"
    data = [*some_rows(), *gemm_rows()]
    after = readme.filled(text, data)
    assert after.startswith("# Top\n<!-- bench:all_reduce -->\n| size |") and after.endswith("<!-- /bench -->\nend\n")
    assert "old" not in after and "| 4 KiB | plain |" in after and "90x [90, 90]" in after
    assert "\nmiddle\n" in after and "| gemm_all_reduce | 16x4096x4096 |" in after
    assert readme.filled(after, data) == after
    assert all(isinstance(readme.table(name, []), str) for name in readme.TABLES), "also without rows"
    with pytest.raises(ValueError, match="no table is called"):
        readme.filled("<!-- bench:nonsense -->\n<!-- /bench -->", data)


@pytest.mark.parametrize("name", readme.DOCUMENTS)
def test_documents_say_what_the_kept_results_say(name: str) -> None:
    path = ROOT / name
    assert readme.filled(path.read_text(), rows.load(rows.RESULTS)) == path.read_text(), "run python -m bench.readme"


def test_rows_are_kept_only_with_keep_and_the_others_are_not_in_git(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    drawn: list[Path] = []

    def ended(command: list[str], seconds: float, first: bool) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(suite, "ended", ended)
    monkeypatch.setattr(suite, "draw", lambda results, path: drawn.append(path))
    for keep in (False, True):
        suite.main(["all_reduce", "train_step"], everything=False, keep=keep, minutes=1.0, wait=0.0)
    folders = [Path(command[command.index("--out") + 1]).parent for command in commands]
    half = len(folders) // 2
    assert half and folders == [rows.MINE] * half + [rows.RESULTS] * half
    assert drawn == [rows.MINE / "bench.png", ROOT / "docs" / "bench.png"]
    assert rows.destination("a.jsonl", keep=True) == rows.RESULTS / "a.jsonl"
    assert rows.destination("a.jsonl", keep=False) == rows.MINE / "a.jsonl"
    assert rows.destination("a.jsonl", True, Path("b")) == Path("b")
    assert f"{rows.MINE.parent.relative_to(ROOT)}/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("module", ["generate", "serve", "suite", "train_hosts", "train_step"])
def test_a_bench_adds_to_the_kept_results_only_with_keep(module: str) -> None:
    options = inspect.signature(pytest.importorskip(f"bench.{module}").main).parameters
    assert options["keep"].default is False
    assert "out" not in options or options["out"].default is None


def test_the_kept_results_are_verified_and_complete() -> None:
    for row in rows.load(rows.RESULTS):
        if "variant" in row:
            assert set(rows.FIELDS) <= set(row)
            assert row["verified"] and row["median_us"] > 0


def test_the_suite_ends_in_time_with_all_processes_and_names_what_it_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert suite.ended([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == 3
    lock = tmp_path / "lock"
    assert suite.ended(["sh", "-c", f"flock {lock} sleep 600; true"], 1.0) is None
    deadline, free = time.monotonic() + 10, False
    with lock.open("a") as file:
        while not free and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
    assert free, "a process of the run still holds the file"
    before = os.sched_getscheduler(0)
    with suite.real_time():
        assert os.sched_getscheduler(0) in (os.SCHED_RR, before), "where this user may"
    assert os.sched_getscheduler(0) == before
    assert list(suite.made(["all_reduce", "codecs"], tmp_path, 0.0, -math.inf)) == ["all_reduce", "codecs"]
    assert capsys.readouterr().out == ""


def test_the_picture_has_a_row_of_panels_for_each_machine_class(tmp_path: Path) -> None:
    picture = pytest.importorskip("bench.picture", reason="matplotlib is not installed")
    data = [row for of in ((4096, "AMD Zen 4"), (65536, "AMD Zen 4"), (4096, "Intel, AMX"))
            for row in some_rows(size=of[0], kind=of[1])]  # fmt: skip
    sizes = {}
    for name, more in (("without a link", []), ("with a link", gemm_rows("1gbit"))):
        rows.save(tmp_path / name / "a.jsonl", [*data, *more])
        assert picture.draw(tmp_path / name, tmp_path / f"{name}.png")
        head = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        sizes[name] = (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
    assert sizes["with a link"][0] == 2 * sizes["without a link"][0]
    assert not picture.draw(tmp_path / "nothing", tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    plot = pytest.importorskip("bench.plot", reason="matplotlib is not installed")
    plot.figure([*some_rows(), *some_rows(size=65536)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no verified row"):
        plot.figure([], tmp_path / "b.png")

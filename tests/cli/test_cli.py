"""The command line as a user meets it: help, errors of one sentence, a whole run from one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.harness.examples import in_ranks
from tpkernels import checkpoint
from tpkernels.cli import app
from tpkernels.cli.train import use_all_ranks
from tpkernels.comm import torchrun
from tpkernels.errors import UserError
from tpkernels.train.settings import Settings

TINY = {
    "--layers": 1, "--d-model": 16, "--heads": 2, "--context": 16, "--batch": 2, "--steps": 4, "--eval-every": 2,
    "--checkpoint-every": 2, "--parity-steps": 2, "--sample-bytes": 10,
}  # fmt: skip


def call(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "120", **env})


def tiny(**changes: object) -> list[str]:
    return [str(part) for option in (TINY | changes).items() for part in option]


def command(*arguments: str, cwd: Path, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, under torchrun where ranks are given."""
    torchrun = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = [sys.executable, *torchrun, "-m", "tpkernels", "train", *arguments]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=180, check=False, env=env)


def test_help_lists_the_commands_and_every_option_says_what_it_does() -> None:
    runner = CliRunner()
    top = runner.invoke(app, ["--help"])
    assert top.exit_code == 0
    assert {"train", "info"} <= set(top.output.split())
    text = runner.invoke(app, ["train", "--help"], env={"COLUMNS": "120"}).output
    for name in asdict(Settings()):
        assert "--" + name.replace("_", "-") in text, name
    assert "[default: 2]" in text


def test_no_arguments_show_the_help() -> None:
    assert "Commands" in CliRunner().invoke(app, []).output


def test_info_says_what_was_built() -> None:
    shown = CliRunner().invoke(app, ["info"])
    assert shown.exit_code == 0
    assert "tpkernels" in shown.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--tp 3 --heads 2", "2 heads cannot be cut over 3 ranks, because each rank needs a whole head: take --tp 2"),
        ("--d-model 100 --heads 8", "--d-model 100 does not divide into 8 heads: make --d-model a multiple of 8, or"),
        ("--d-model 12 --heads 4", "rotary positions need an even number: take --d-model 8"),
        ("--dtype fp8", "--dtype is one of fp32, bf16, got fp8"),
        ("--codec zip", "--codec is one of none, "),
        ("--tp 0", "--tp must be 1 or more, got 0"),
        ("--dp 0", "--dp must be 1 or more, got 0"),
        (
            "--dp 2 --batch 1",
            "a batch of 1 cannot be cut over 2 replicas, because each needs a sequence: take",
        ),
        ("--dp 2 --grad-codec zip", "--grad-codec is one of none, "),
        ("--dp 2 --grad-mode never", "--grad-mode is one of sync, delayed, local, got never"),
        ("--grad-codec fp16", "--grad-codec needs several replicas: take --dp 2 or more, or leave it out"),
        ("--check-replicas 5", "--check-replicas needs several replicas"),
        ("--dp 2 --grad-mode local --check-replicas 3", "make --check-replicas a multiple of it, got 3"),
        ("--lr 0", "--lr must be more than 0, got 0.0"),
        ("--minutes -1", "--minutes must be more than 0"),
        ("--data nowhere", "there is no file or folder nowhere: give --data a folder of text, or leave it out"),
        ("--context 10000000", "needs 200,000,040 or more (5 % are for validation): give --data more text"),
        ("--resume --folder nowhere", "there is no run to resume in nowhere: name its folder with --folder"),
        ("--resume", "there is no run to resume in"),
    ],
)
def test_a_bad_choice_is_one_sentence_that_says_what_to_change(
    arguments: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments.split())
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is started or written"


def saved_run(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(asdict(replace(Settings(), **changes))))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--heads 8", "has --heads 4, which a continuation cannot change to 8: leave --heads out"),
        ("--d-model 512", "has --d-model 256, which a continuation cannot change to 512: leave --d-model out"),
        ("--seed 1", "has --seed 0, which a continuation cannot change to 1"),
    ],
)
def test_a_continuation_refuses_what_would_be_another_run(tmp_path: Path, arguments: str, says: str) -> None:
    saved_run(tmp_path / "run")
    done = call("--resume", "--folder", str(tmp_path / "run"), *arguments.split())
    assert done.exit_code == 2
    assert says in done.stderr


def test_torchrun_with_another_number_of_ranks_than_tp_is_told() -> None:
    done = call("--tp", "2", RANK="0", WORLD_SIZE="3")
    assert done.exit_code == 2
    assert "torchrun started 3 ranks and --tp is 2: leave --tp out, or make them equal" in done.stderr


def test_torchrun_ranks_are_shared_out_over_replicas() -> None:
    done = call("--tp", "2", "--dp", "2", RANK="0", WORLD_SIZE="3")
    assert "torchrun started 3 ranks and --tp is 2 for each of --dp 2: leave --tp out" in done.stderr
    done = call("--dp", "3", RANK="0", WORLD_SIZE="4")
    assert "torchrun started 4 ranks, which --dp 3 does not divide: start a multiple of 3" in done.stderr
    options: dict[str, Any] = {"dp": 2}
    use_all_ranks(options, 4)
    assert options == {"dp": 2, "tp": 2}


@pytest.mark.nightly
def test_one_command_trains_two_replicas_and_other_ranks_go_on_with_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = tiny(**{"--tp": 1, "--dp": 2, "--grad-codec": "fp16", "--check-replicas": 1})
    first = command(*options, "--stop-at", "2", "--folder", str(run), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "no comparison with one process: --grad-codec fp16 changes gradients by more than rounding" in first.stdout
    second = in_ranks(2, "tpkernels", "train", "--resume", "--folder", str(run), "--stop-at", "4")
    for words in ("2 replicas (shm, gradients fp16, sync) of 1 rank", "going on from step 2", "sent to other replicas"):
        assert words in second, words
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_too_little_shared_memory_says_how_to_get_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(torchrun.Group, "open", full)
    with (
        pytest.raises(UserError, match=r"/dev/shm has .* MiB free: enlarge it \(docker: --shm-size\)"),
        torchrun.open_ranks(1.0, 16, tp=1),
    ):
        pass


def test_one_command_trains_over_two_ranks_reports_and_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = command(*tiny(), "--stop-at", "2", "--folder", str(run), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "the schedule has steps left; to go on: tpkernels train --resume --folder" in first.stdout
    second = command("--resume", "--folder", str(run), "--stop-at", "4", cwd=tmp_path, ranks=2)
    assert second.returncode == 0, second.stderr
    for words in ("going on from step 2", "sample after 4 steps", "peak memory", "communication", "within rounding"):
        assert words in second.stdout, words
    assert "Traceback" not in first.stderr + second.stderr
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert json.loads((run / "summary.json").read_text())["parity"]["steps"] == 2
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_an_error_of_the_ranks_is_said_once_and_without_a_stack_trace(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", **{k[2:].replace("-", "_"): v for k, v in TINY.items()})
    done = command("--resume", "--folder", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("has no checkpoint to resume from: start anew with another --folder") == 1
    assert "Traceback" not in done.stderr


def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = {"--steps": 10**6, "--checkpoint-every": 20, "--eval-every": 10**6}
    program = [sys.executable, "-m", "tpkernels", "train", *tiny(**often), "--folder", str(run)]
    started = subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.1)  # between two looks for the first checkpoint, which another process writes
    assert list(run.glob("checkpoints/step-*/manifest.json")), "no checkpoint within 120 s"
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"--folder" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 1
    assert "rank 1 was ended by SIGKILL. The run can go on from its last checkpoint with --resume." in errors
    # The other rank says what it saw, unless torchrun, which ends it a tenth of a second later, was quicker.
    assert all("PeerLostError" in line for line in errors.splitlines() if "SIGKILL" not in line)
    assert "Traceback" not in errors
    assert checkpoint.latest(run / "checkpoints") is not None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = call(*tiny(**{"--tp": 1}), "--folder", str(tmp_path / "file" / "run"))
    assert done.exit_code == 2
    assert "name another folder with --folder" in done.stderr
    assert "Traceback" not in done.stderr

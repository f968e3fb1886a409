"""Jobs of which a rank dies: torchrun starts them again, or fewer ranks go on, from the last checkpoint."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import nightly, weekly
from tpkernels.train.runlog import read

PROGRAM = Path(__file__).parents[1] / "harness" / "dying.py"
NEVER = "0:0"
STEPS = 6
TINY = {
    "--layers": 2, "--d-model": 24, "--heads": 2, "--context": 16, "--batch": 4, "--steps": STEPS, "--lr": 0.01,
    "--checkpoint-every": 2, "--eval-every": STEPS, "--sample-bytes": 0, "--parity-steps": 0, "--timeout": 20,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tp": {"--tp": 2, "--dp": 1},
    "dp": {"--tp": 1, "--dp": 2, "--grad-codec": "fp16"},
    "pp": {"--tp": 1, "--pp": 2, "--micro-batches": 2},
    "zero": {"--tp": 1, "--dp": 2, "--zero": 1},
    "tp and dp": {"--tp": 2, "--dp": 2},
    "tp and pp": {"--tp": 2, "--pp": 2, "--micro-batches": 2},
    "dp and pp": {"--tp": 1, "--dp": 2, "--pp": 2, "--micro-batches": 2},
}


def ranks_of(shape: dict[str, Any]) -> int:
    return math.prod(shape.get(name, 1) for name in ("--tp", "--dp", "--pp"))


def job(folder: Path, options: dict[str, Any], dies: str, restarts: int) -> subprocess.CompletedProcess[str]:
    """The training job under torchrun; dies: which rank in which step, and where in it (dying.py)."""
    torchrun = ["--standalone", "--nproc-per-node", str(ranks_of(options)), "--max-restarts", str(restarts)]
    words = [str(word) for option in (TINY | options).items() for word in option]
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, str(PROGRAM), "train"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"DIES": dies}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/hosts.md says why
    return subprocess.run(
        [*command, "--folder", str(folder), "--resume-or-start", *words],
        capture_output=True, text=True, timeout=300, check=False, env=env,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read(folder / "log.jsonl")]


@pytest.mark.parametrize(
    ("shape", "step"),
    weekly(*itertools.product(SHAPES, (1, 4))),
)
def test_a_job_that_is_restarted_ends_as_the_undisturbed_one(tmp_path: Path, text: str, shape: str, step: int) -> None:
    """The last rank is killed in step 1, before the first checkpoint, or in step 4, before the second."""
    check_restarted(tmp_path, SHAPES[shape] | {"--data": text}, step, "clip")


@pytest.mark.nightly
def test_a_job_is_restarted_whose_rank_dies_between_its_update_and_the_others_parameters(
    tmp_path: Path, text: str
) -> None:
    """The other replica has a part of the parameters of the step already, and waits for that of the dead one."""
    check_restarted(tmp_path, SHAPES["zero"] | {"--data": text}, 4, "gather")


def check_restarted(folder: Path, options: dict[str, Any], step: int, where: str) -> None:
    whole = job(folder / "whole", options, NEVER, restarts=0)
    assert whole.returncode == 0, whole.stderr
    killed = job(folder / "run", options, f"{ranks_of(options) - 1}:{step}:{where}", restarts=1)
    assert killed.returncode == 0, killed.stderr
    assert ("going on from step 2" in killed.stdout) == (step == 4), killed.stdout
    assert losses(folder / "run") == losses(folder / "whole")
    assert len(losses(folder / "run")) == STEPS


@pytest.mark.parametrize(
    ("shape", "smaller"),
    [
        *nightly(("tp and dp", {"--tp": 2, "--dp": 1})),
        *weekly(
            ("tp", {"--tp": 1, "--dp": 1}),
            ("tp and dp", {"--tp": 1, "--dp": 2}),
            ("tp and pp", {"--tp": 1, "--pp": 2}),
            ("dp and pp", {"--tp": 1, "--dp": 2, "--pp": 1}),
        ),
    ],
)
def test_fewer_ranks_go_on_with_the_job(tmp_path: Path, text: str, shape: str, smaller: dict[str, Any]) -> None:
    whole = SHAPES[shape] | {"--data": text}
    assert job(tmp_path / "whole", whole, NEVER, restarts=0).returncode == 0
    killed = job(tmp_path / "run", whole, "1:4", restarts=0)
    assert killed.returncode != 0 and len(losses(tmp_path / "run")) < STEPS
    rest = job(tmp_path / "run", smaller | {"--data": text}, NEVER, restarts=0)
    assert rest.returncode == 0, rest.stderr
    assert f"going on from step 2 in {tmp_path / 'run'}" in rest.stdout.replace("\n", " ")
    found, want = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert len(found) == STEPS and found[:2] == want[:2]
    assert found == pytest.approx(want, rel=1e-4), "the same numbers but for the order of sums"

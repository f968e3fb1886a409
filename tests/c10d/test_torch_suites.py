"""torch's own distributed tests, as the installed wheel has them: tpk fails none that gloo passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.backends import needs_backend

ROOT = Path(__file__).resolve().parents[2]
# One of every kind: collectives, dtypes, groups, point to point, objects, timeouts, DDP.
CHOICE = (
    "test_all_reduce_full_group_product", "test_all_reduce_sum_async", "test_all_reduce_complex_unsupported_ops",
    "test_all_gather_coalesced_complex", "test_all_gather_object_default_pg", "test_broadcast_full_group",
    "test_gather_checks", "test_scatter_complex", "test_reduce_min", "test_send_recv_any_source_torch_profiler",
    "test_batch_isend_irecv_gloo_tags", "test_get_future", "test_sparse_all_reduce_sum", "test_all_reduce_max",
    "test_DistributedDataParallelCPU_grad_is_view", "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
)  # fmt: skip


def compare(*arguments: str, timeout: float) -> tuple[int, str]:
    """Exit code and output of scripts/torch_suites.py."""
    done = subprocess.run(
        [sys.executable, "scripts/torch_suites.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, f"{done.stdout}\n{done.stderr}"


@needs_backend
def test_a_choice_of_them(tmp_path: Path) -> None:
    filters = [word for name in CHOICE for word in ("-k", name)]
    passes = ("--passes", str(len(CHOICE)), "--out", str(tmp_path))
    code, output = compare("--columns", "tpk-as-gloo", *filters, *passes, timeout=200)
    assert code == 0, output


def test_a_back_end_that_does_nothing_is_told_from_gloo(tmp_path: Path) -> None:
    code, output = compare("--columns", "fake", "-k", "test_gather_checks", "--out", str(tmp_path), timeout=200)
    assert code == 1, output
    assert "gloo passes, fake fails: test_gather_checks" in output


@needs_backend
@pytest.mark.nightly
@pytest.mark.parametrize("ranks, passes", [(2, 60), (3, 60)])
def test_all_of_them(ranks: int, passes: int, tmp_path: Path) -> None:
    code, output = compare("-R", str(ranks), "--passes", str(passes), "--out", str(tmp_path), timeout=600)
    assert code == 0, output

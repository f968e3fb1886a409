"""torch's own distributed tests, as the installed wheel has them: tpk fails none that gloo passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.backends import needs_backend
from tests.harness.ranks import weekly

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


@pytest.mark.nightly
def test_a_back_end_that_does_nothing_is_told_from_gloo(tmp_path: Path) -> None:
    code, output = compare("--columns", "fake", "-k", "test_gather_checks", "--out", str(tmp_path), timeout=200)
    assert code == 1, output
    assert "gloo passes, fake fails: test_gather_checks" in output


# As the files of torch's repository are: on the base classes that the wheel has.
SUITE = """
import unittest, torch, torch.distributed as dist
from torch.distributed.tensor import distribute_tensor, Shard, Replicate
from torch.testing._internal.common_distributed import MultiProcessTestCase
from torch.testing._internal.distributed._tensor.common_dtensor import DTensorTestBase, with_comms

class Plain(MultiProcessTestCase):
    world_size = 2
    def setUp(self):
        super().setUp()
        self._spawn_processes()
    def test_sum(self):
        store = dist.FileStore(self.file_name, self.world_size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        x = torch.tensor([self.rank + 1])
        dist.all_reduce(x)
        self.assertEqual(x.item(), 3)
        name = dist.group.WORLD._get_backend(torch.device("cpu")).name()
        with open(FILE, "a") as file:
            print(dist.get_backend(), name, file=file)
        dist.monitored_barrier()
    def test_not_here(self):
        self.skipTest("for a reason")

class Tensors(DTensorTestBase):
    @with_comms
    def test_matmul(self):
        mesh, x = self.build_device_mesh(), torch.arange(64.0).view(8, 8)
        a, b = (distribute_tensor(x, mesh, [Shard(d)]) for d in (1, 0))
        self.assertEqual((a @ b).redistribute(mesh, [Replicate()]).to_local(), x @ x)
"""


@needs_backend
@pytest.mark.nightly
def test_files_of_torch_find_it_in_the_place_of_gloo(tmp_path: Path) -> None:
    names, file = tmp_path / "names", tmp_path / "test_suite.py"
    file.write_text(SUITE.replace("FILE", repr(str(names))))
    code, output = compare("--file", str(file), "--passes", "2", "--out", str(tmp_path), timeout=200)
    assert code == 0, output
    assert re.search(r"^tpk-as-gloo +2 +0 +1 ", output, re.MULTILINE), output
    assert names.read_text().splitlines() == ["gloo gloo"] * 2 + ["gloo tpk"] * 2


@needs_backend
@pytest.mark.parametrize("ranks, passes", weekly((2, 60), (3, 60)))
def test_all_of_them(ranks: int, passes: int, tmp_path: Path) -> None:
    code, output = compare("-R", str(ranks), "--passes", str(passes), "--out", str(tmp_path), timeout=600)
    assert code == 0, output

"""Two processes on one GPU: the real rendezvous of symmetric memory, over gloo, at the pace of time slices.

torch allows it for tests when TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES is 1.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.harness.ops import check_forward
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks
from tpkernels.testing.case import Sizes
from tpkernels.testing.cases import COLLECTIVES, GEMM_ALL_REDUCE

OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"

pytestmark = pytest.mark.skipif(os.environ.get(OVERLAPPING) != "1", reason=f"needs {OVERLAPPING}=1")


def check_ops() -> None:
    torch.cuda.set_device(0)
    with Group.open(device="cuda", transport="peer", arena_bytes=8 << 20) as group:
        assert group.transport == "peer"
        for case in (*COLLECTIVES, GEMM_ALL_REDUCE):
            check_forward(case, Sizes(R=group.world_size, M=9, N=40, K=24), group)
        x = group.empty(1000)
        x.fill_(group.rank + 1.0)
        ops.all_reduce_(x, group=group)
        assert x.tolist() == [3.0] * 1000
        group.barrier()
        group.check()


def test_processes_map_each_others_memory() -> None:
    run_ranks(check_ops, 2, timeout=50.0)


def check_two_groups() -> None:
    torch.cuda.set_device(0)
    with (
        Group.open(device="cuda", arena_bytes=4 << 20) as first,
        Group.open(device="cuda", arena_bytes=4 << 20) as second,
    ):
        for group in (first, second, first):
            assert ops.all_reduce(torch.ones(3, device="cuda"), group=group).tolist() == [2.0] * 3


def test_two_groups_have_arenas_of_their_own() -> None:
    run_ranks(check_two_groups, 2, timeout=50.0)

"""Groups of back end tpk: meshes of several dimensions, groups that are split off, back ends beside it, no memory."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.harness.backends import BACKEND, needs_backend, on_backend
from tests.harness.ops import raised

pytestmark = [needs_backend, pytest.mark.usefixtures("nothing_is_left_in_shared_memory")]
ROOT = Path(__file__).resolve().parents[2]


def backend_of(group: dist.ProcessGroup) -> Any:
    return group._get_backend(torch.device("cpu"))


def assert_sums(group: dist.ProcessGroup, members: list[int]) -> None:
    """The group has these ranks, and its collectives and messages are theirs alone."""
    assert backend_of(group).name() == "tpk" and dist.get_process_group_ranks(group) == members
    x = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(x, group=group)
    assert x.item() == sum(2.0**r for r in members)
    here, R = members.index(dist.get_rank()), len(members)
    if R > 1:
        sent, got = torch.tensor([dist.get_rank()]), torch.tensor([-1])
        after = dist.P2POp(dist.isend, sent, members[(here + 1) % R], group)
        before = dist.P2POp(dist.irecv, got, members[(here - 1) % R], group)
        for work in dist.batch_isend_irecv([after, before]):
            work.wait()
        assert got.item() == members[(here - 1) % R]


def check_meshes() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row, column = rank // 2, rank % 2
    assert_sums(mesh.get_group("dp"), [column, 2 + column])
    assert_sums(mesh.get_group("tp"), [2 * row, 2 * row + 1])
    assert_sums(mesh["tp"].get_group(), [2 * row, 2 * row + 1])
    assert_sums(mesh._flatten("all").get_group(), [0, 1, 2, 3])
    deep = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    assert_sums(deep.get_group("pp"), [column, 2 + column])
    assert_sums(deep.get_group("dp"), [rank])
    assert_sums(deep["pp", "tp"]._flatten("both").get_group(), [0, 1, 2, 3])
    alone = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("a", "b"))
    assert_sums(alone.get_group("b"), [rank % 2, rank % 2 + 2])
    for group in (mesh.get_group("dp"), deep.get_group("tp")):
        dist.destroy_process_group(group)
    assert_sums(alone.get_group("a"), [0, 1] if rank in (0, 1) else [2, 3])


def check_a_mesh_over_gloo() -> None:
    """One dimension has tpk."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"), backend_override={"tp": "tpk"})
    assert backend_of(mesh.get_group("dp")).name() == "gloo"
    assert_sums(mesh.get_group("tp"), [rank // 2 * 2, rank // 2 * 2 + 1])


def test_meshes_of_several_dimensions() -> None:
    on_backend(BACKEND, check_meshes, 4)
    on_backend("gloo", check_a_mesh_over_gloo, 4)


@contextmanager
def an_accelerator() -> Iterator[None]:
    """dist.split_group asks the back end of the accelerator: here that of the CPU."""
    world = dist.distributed_c10d._get_default_group()
    world.bound_device_id = torch.device("cpu", 0)
    with (
        mock.patch("torch.accelerator.is_available", lambda: True),
        mock.patch("torch.accelerator.current_accelerator", lambda: torch.device("cpu")),
    ):
        yield
    world.bound_device_id = None


def sums_of(group: Any, value: float) -> float:
    """By the methods of the group itself: torch's functions do not know those that it has made."""
    x = torch.tensor([value])
    group.allreduce([x]).wait()
    return float(x.item())


def check_splits() -> None:
    rank, world = dist.get_rank(), dist.distributed_c10d._get_default_group()
    half = [0, 1] if rank < 2 else [2, 3]
    # Both halves by one name, as ranks that only call "split" may give them.
    one = world.split_group(half, timeout=timedelta(seconds=20), group_name="half", group_desc="a half")
    assert (one.rank(), one.size(), one.group_desc) == (rank % 2, 2, "a half")
    assert backend_of(one).name() == "tpk"
    assert sums_of(one, 2.0**rank) == sum(2.0**r for r in half)
    single = one.split_group([rank % 2], group_name=f"alone {rank}")
    assert sums_of(single, 5.0) == 5.0
    # Only some take part.
    outer = world.split_group([0, 3], group_name="outer") if rank in (0, 3) else None
    assert outer is None or sums_of(outer, 2.0**rank) == 9.0
    with an_accelerator():
        options = dist.ProcessGroupGloo._Options()  # of the accelerator's back end on other machines
        known = dist.split_group(split_ranks=[[0, 2], [1, 3]], pg_options=options)
        assert known is not None
        assert_sums(known, [rank % 2, rank % 2 + 2])
    hurried = world.split_group(half, timeout=timedelta(seconds=0.3), group_name="hurried")
    if rank % 2 == 0:
        assert "within 0.3 s" in raised(lambda: sums_of(hurried, 1.0), RuntimeError)
    dist.barrier()
    one.abort()  # the groups of others go on
    assert "was destroyed" in raised(lambda: sums_of(one, 1.0), RuntimeError)
    assert sums_of(single, 5.0) == 5.0
    assert_sums(known, [rank % 2, rank % 2 + 2])


def test_groups_that_are_split_off() -> None:
    on_backend(BACKEND, check_splits, 4)


def check_names_of_back_ends() -> None:
    rank, R = dist.get_rank(), dist.get_world_size()
    for name in ("cpu:tpk", "cpu:tpk,cuda:gloo", "cuda:gloo,cpu:tpk"):
        group = dist.new_group(backend=name)
        assert_sums(group, list(range(R)))
        if "cuda" in name:
            assert group._get_backend(torch.device("cuda")).name() == "gloo"
    found: list[Any] = [None] * R
    dist.all_gather_object(found, rank, group=group)
    assert found == list(range(R))
    if not dist.is_nccl_available():  # the words of torch, as with cpu:gloo
        assert "NCCL" in raised(lambda: dist.new_group(backend="cpu:tpk,cuda:nccl"), RuntimeError)


def check_the_default_group() -> None:
    assert backend_of(dist.group.WORLD).name() == "tpk"
    assert_sums(dist.group.WORLD, [0, 1])


@pytest.mark.parametrize("name", ["tpk", "cpu:tpk", "cpu:tpk,cuda:gloo"])
def test_back_ends_beside_it(name: str) -> None:
    on_backend(name, check_the_default_group, 2)


def test_names_of_back_ends_of_new_groups() -> None:
    on_backend("gloo", check_names_of_back_ends, 2)


# --- without shared memory


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def check_full_memory() -> list[str]:
    heard = Heard()
    logging.getLogger("tpkernels").addHandler(heard)
    assert_sums(dist.new_group(backend="tpk"), [0, 1])
    return heard.lines


def print_what_ranks_log() -> None:
    """Of a process whose /dev/shm is full."""
    for lines in on_backend("gloo", check_full_memory, 2):
        print(len(lines), *lines)


def in_a_small_memory(body: Callable[[], None], size: str) -> subprocess.CompletedProcess[str]:
    """Run a function of this file in a process for which /dev/shm has that size."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    call = f"import {__name__} as tests; tests.{body.__name__}()"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", call],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def nothing() -> None:
    """Whether a process may have a /dev/shm of its own."""


def test_full_shared_memory_falls_back_to_connections_with_one_line() -> None:
    if shutil.which("unshare") is None or in_a_small_memory(nothing, "1m").returncode != 0:
        pytest.skip("needs a user namespace of its own (unshare), to mount a small /dev/shm")
    done = in_a_small_memory(print_what_ranks_log, "1m")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("1 group") and "does without shared memory: the arenas of 2 ranks need" in first, first
    assert "(No space left on device)" in first and "docker: --shm-size" in first, first
    assert second == "0"

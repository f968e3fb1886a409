"""Ranks of a machine that has GPUs, as they would meet there: kernels and hardware are stood in for, ranks are real."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness.devices import GOOD
from tests.harness.ops import raised
from tpkernels.comm import host, open, peer
from tpkernels.comm.devices import obstacle_to_cuda
from tpkernels.comm.group import Group
from tpkernels.comm.host import Gpu
from tpkernels.testing import run_ranks

pytestmark = pytest.mark.usefixtures("cuda_is_looked_for_anew")


@dataclass
class FakeCommunicator:
    """What Group takes from a communicator on a GPU."""

    name: str
    label: str
    rank: int
    world_size: int
    transport: str
    address: int = 0
    closed: bool = False
    measured: list[tuple[Any, ...]] = field(default_factory=list)

    def exchange(self, mine: int) -> list[int]:
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def add_measured_path(self, *call: Any) -> None:
        self.measured.append(call)

    def reset_stats(self) -> None:
        pass

    def close(self, why: str = "") -> None:
        self.closed = True


class FakeKernels:
    """The part of _C_cuda that opens groups."""

    max_peers = 8

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def limits(self) -> dict[str, int]:
        return {"max_peers": self.max_peers, "signal_bytes": 1 << 16}

    def open_peer(self, name: str, label: str, rank: int, world_size: int, *rest: Any) -> FakeCommunicator:
        self.calls.append(rest)
        return FakeCommunicator(name, label, rank, world_size, "peer")

    def open_group(self, name: str, label: str, rank: int, world_size: int, *rest: Any) -> FakeCommunicator:
        self.calls.append(rest)
        return FakeCommunicator(name, label, rank, world_size, "group")

    def open_local(self, name: str, label: str, device: int) -> FakeCommunicator:
        return FakeCommunicator(name, label, 0, 1, "local")


def fake_map(arena: torch.Tensor, process_group: dist.ProcessGroup) -> peer.PeerArenas:
    assert arena.sum() > 0, "not used yet"
    pointers: list[Any] = [None] * process_group.size()
    dist.all_gather_object(pointers, arena.data_ptr(), group=process_group)
    return peer.PeerArenas(pointers, 0, (arena,))


@contextmanager
def gpus(**changes: Any) -> Iterator[FakeKernels]:
    """Every rank of this machine has a GPU of its own, until the block ends; `changes` say what is different."""
    rank, kernels = dist.get_rank(), FakeKernels()
    place: dict[tuple[object, str], Any] = {
        (open, "load_cuda"): lambda: (kernels, None),
        (open, "DeviceExchange"): lambda *args: args,
        (open, "ARENA_BYTES"): {"cuda": 1 << 20},
        (open, "gpu_name"): lambda device: "X100",
        (open, "Gpu"): type("Gpu", (), {"of": lambda device: Gpu(f"uuid-{rank}", f"GPU {rank} (X100)", rank)}),
        (peer, "_unreachable"): lambda ranks, rank: None,
        (peer, "_allocate"): lambda nbytes, device: torch.ones(nbytes, dtype=torch.uint8),
        (peer, "_map"): fake_map,
        (torch.cuda, "synchronize"): lambda device: None,
        (torch.cuda, "device_count"): lambda: dist.get_world_size(),
        (torch.cuda, "current_device"): lambda: rank,
    }
    place |= {key: value for key in place if (value := changes.get(key[1])) is not None}
    place |= {(open, "backend_of"): backend} if (backend := changes.get("backend_of")) else {}
    before = {(where, name): getattr(where, name) for where, name in place}
    for (where, name), value in place.items():
        setattr(where, name, value)
    try:
        yield kernels
    finally:
        for (where, name), value in before.items():
            setattr(where, name, value)


def nccl(process_group: dist.ProcessGroup, device_type: str) -> str:
    return "nccl"


class Heard(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    handler, log = Heard(), logging.getLogger("tpkernels")
    log.addHandler(handler)
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)


def check_peers_open() -> None:
    rank, R = dist.get_rank(), dist.get_world_size()
    with gpus() as kernels, heard() as lines, Group.open(device="cuda", timeout_s=3.0, arena_bytes=1 << 18) as group:
        assert (group.transport, group.rank, group.world_size) == ("peer", rank, R)
        assert group.device == torch.device("cuda", rank)
        timeout_s, device, pointers, multicast, arena_bytes, (arena,) = kernels.calls[0]
        assert (timeout_s, device, len(pointers), multicast, arena_bytes) == (3.0, rank, R, 0, 1 << 18)
        assert pointers[rank] == arena.data_ptr()
        assert not arena[: 1 << 16].any(), "signals are zero when the group opens"
        assert arena[1 << 16 :].all(), "and nothing else is touched"
        assert group.explain().path == "peer"
        assert "cuda" in repr(group)
        assert lines == []


def check_times_of_paths_are_read_where_all_ranks_have_the_same() -> None:
    rank = dist.get_rank()
    row = ["gemm_all_reduce", "bfloat16", "none", 8, 16, 8, False, 1.5]
    with tempfile.TemporaryDirectory() as folder, gpus():
        file = Path(folder, "paths.json")
        os.environ["TPKERNELS_PROFILE"] = str(file)  # a file for each rank
        for text, wanted in (
            ({"paths": [[*row, 2.0]]}, [(*row, 2.0)]),
            ({"paths": [[*row, 2.0 + (rank == 2)]]}, []),
            ({"paths": [[*row, 0.0]]}, []),
            ({"points": [], "shapes": []}, []),
        ):
            file.write_text(json.dumps(text))
            with Group.open(device="cuda", timeout_s=3.0, arena_bytes=1 << 18) as group:
                assert group._communicator.measured == wanted, text
                assert group.explain().profile == (str(file) if wanted else "")
        os.environ["TPKERNELS_PROFILE"] = "off"


def check_without_p2p_it_goes_through_nccl() -> None:
    rank = dist.get_rank()
    why = "the GPU of rank 1 (X100) cannot access the memory of that of rank 0 (no P2P)"
    no_p2p = {"_unreachable": lambda ranks, rank: why if rank == 1 else None}
    with gpus(**no_p2p, backend_of=nccl), heard() as lines, Group.open(device="cuda") as group:
        assert group.transport == "group"
        assert why in group.explain().reason
        assert lines == ([f"group 'world' of 3 ranks on cuda goes through NCCL, because {why}"] if rank == 0 else [])
    with gpus(**no_p2p, backend_of=nccl):
        text = raised(lambda: Group.open(device="cuda", transport="peer"), ValueError)
        assert text == f"Group.open: transport 'peer' cannot be used: {why}"
    with gpus(**no_p2p):
        text = raised(lambda: Group.open(device="cuda"), ValueError)
        assert "need peer memory or a process group with NCCL" in text, text
        assert why in text
        assert "init_process_group('cpu:gloo,cuda:nccl')" in text


def check_multicast_is_taken_when_asked_for_and_only_then() -> None:
    def with_switch(arena: torch.Tensor, process_group: dist.ProcessGroup) -> peer.PeerArenas:
        return replace(fake_map(arena, process_group), multicast=1 << 40)

    for asked, address in ((False, 0), (True, 1 << 40)):
        with gpus(_map=with_switch) as kernels, Group.open(device="cuda", multicast=asked) as group:
            timeout_s, _, _, multicast, *_ = kernels.calls[0]
            assert (timeout_s, multicast) == (600.0, address)
            assert ("switch" in group.explain().reason) == asked
    with gpus(backend_of=nccl):
        text = raised(lambda: Group.open(device="cuda", multicast=True), ValueError)
        assert "multicast cannot be used: rank 0 could not map the GPU memory of the others: the switch" in text, text


def check_ranks_that_have_exchanged_memory_a_different_number_of_times() -> None:
    peer._rendezvous.count += dist.get_rank() == 1  # as after a group of ranks that this one was not in
    try:
        with gpus(backend_of=nccl), Group.open(device="cuda") as group:
            assert group.transport == "group"
            assert "exchanged GPU memory a different number of times" in group.explain().reason
    finally:
        peer._rendezvous.count -= dist.get_rank() == 1


def check_asked_for_the_group() -> None:
    with gpus(backend_of=nccl), heard() as lines, Group.open(device="cuda", transport="group") as group:
        assert group.transport == "group"
        assert "asked for" in group.explain().reason
        assert lines == []


def check_too_many_ranks() -> None:
    FakeKernels.max_peers = 2
    with gpus(backend_of=nccl), heard() as lines, Group.open(device="cuda") as group:
        assert group.transport == "group"
        assert "3 ranks, and at most 2 can reach each other" in group.explain().reason
        assert len(lines) == (dist.get_rank() == 0)
    FakeKernels.max_peers = 8


def check_several_hosts() -> None:
    identity = host._host_identity
    host._host_identity = lambda: f"host {dist.get_rank() // 2}"
    try:
        with gpus(backend_of=nccl), heard() as lines, Group.open(device="cuda") as group:
            assert group.transport == "group"
            assert "2 hosts" in group.explain().reason
            assert len(lines) == (dist.get_rank() == 0)
    finally:
        host._host_identity = identity


def check_one_gpu_for_two_ranks() -> None:
    same = type("Gpu", (), {"of": lambda device: Gpu("uuid", "GPU 0 (X100)", 0)})
    with gpus(Gpu=same, current_device=lambda: 0):
        text = raised(lambda: Group.open(device="cuda"), ValueError)
        assert "ranks [0, 1, 2] all work on GPU 0 (X100): call torch.cuda.set_device(local_rank) first" in text, text


def check_one_rank_without_cuda() -> None:
    why = obstacle_to_cuda(replace(GOOD, driver=None))
    load = (lambda: (None, why)) if dist.get_rank() == 2 else None
    with gpus(load_cuda=load):
        text = raised(lambda: Group.open(device="cuda"), RuntimeError)
        assert text == f"Group.open: rank 2 cannot use cuda: {why}", text


def check_no_room_for_an_arena() -> None:
    def full(nbytes: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA driver error: out of memory")

    with gpus(_allocate=full if dist.get_rank() == 1 else None):
        text = raised(lambda: Group.open(device="cuda", arena_bytes=1 << 30), OSError)
        assert "rank 1 could not allocate 1073741824 bytes" in text, text
        assert "Pass a smaller arena_bytes" in text


def check_mapping_fails_on_one_rank() -> None:
    def fails(arena: torch.Tensor, process_group: dist.ProcessGroup) -> peer.PeerArenas:
        fake_map(arena, process_group)
        raise RuntimeError("CUDA driver error: invalid device ordinal\nmore lines")

    with gpus(_map=fails if dist.get_rank() == 0 else None, backend_of=nccl), Group.open(device="cuda") as group:
        assert group.transport == "group"
        assert "rank 0 could not map the GPU memory of the others: CUDA driver error: invalid" in group.explain().reason


def check_ranks_ask_for_different_devices() -> None:
    with gpus():
        text = raised(lambda: Group.open(device="cuda" if dist.get_rank() else "cpu"), ValueError)
        assert "disagree" in text
        assert "device='cpu'" in text


@pytest.mark.parametrize(
    "check",
    [
        check_peers_open,
        check_times_of_paths_are_read_where_all_ranks_have_the_same,
        check_without_p2p_it_goes_through_nccl,
        check_multicast_is_taken_when_asked_for_and_only_then,
        check_ranks_that_have_exchanged_memory_a_different_number_of_times,
        check_asked_for_the_group,
        check_too_many_ranks,
        check_several_hosts,
        check_one_gpu_for_two_ranks,
        check_one_rank_without_cuda,
        check_no_room_for_an_arena,
        check_mapping_fails_on_one_rank,
        check_ranks_ask_for_different_devices,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_ranks_on_gpus_find_out_together_how_they_reach_each_other(check: Callable[[], None]) -> None:
    run_ranks(check, 3)

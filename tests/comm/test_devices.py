"""Groups on a GPU, as far as a machine without one can tell: what is in the way, who says so, and what is done then.

The facts of a machine with GPUs are put in place of this one's; the group is opened over real ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness.devices import GOOD
from tests.harness.ops import raised
from tpkernels.cli import info
from tpkernels.comm import devices
from tpkernels.comm.device_exchange import DeviceExchange
from tpkernels.comm.devices import device_of, load_cuda, obstacle_to_cuda
from tpkernels.comm.group import Group
from tpkernels.comm.watch import Watch
from tpkernels.errors import PeerLostError
from tpkernels.testing import run_ranks

pytestmark = pytest.mark.usefixtures("cuda_is_looked_for_anew")
OBSTACLES = {
    "CPU torch": (
        replace(GOOD, torch="2.13.0+cpu", torch_cuda=None),
        r"torch 2.13.0\+cpu is built without CUDA: install a torch with CUDA and build tpkernels again, or .*'cpu'",
    ),
    "no kernels": (
        replace(GOOD, built=False, built_reason="nvcc is neither on PATH nor in CUDA_HOME"),
        "no CUDA kernels, because nvcc is neither on PATH nor in CUDA_HOME: put that right .* TPKERNELS_CUDA=1",
    ),
    "no driver": (replace(GOOD, driver=None, gpus=0), "no NVIDIA driver is installed: install one"),
    "old driver": (
        replace(GOOD, driver=(12, 4), gpus=0),
        "driver is too old, it supports CUDA up to 12.4 and torch 2.13.0.cu130 needs 13.0: update the driver",
    ),
    "no GPU": (replace(GOOD, gpus=0), "this process sees no GPU: run it where there is one"),
    "hidden": (replace(GOOD, gpus=0, visible=""), r"sees no GPU \(CUDA_VISIBLE_DEVICES is ''\)"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_in_the_way_of_cuda_is_one_sentence_that_says_what_to_do(name: str) -> None:
    facts, text = OBSTACLES[name]
    found = obstacle_to_cuda(facts)
    assert found is not None
    assert re.search(text, found), found
    assert "\n" not in found


def test_nothing_is_in_the_way_where_everything_is_there() -> None:
    assert obstacle_to_cuda(GOOD) is None
    assert obstacle_to_cuda(replace(GOOD, driver=(13, 2), torch_cuda="13.0")) is None, "a newer driver runs older CUDA"
    assert obstacle_to_cuda(replace(GOOD, driver=(12, 2), torch_cuda="12.8")) is None, "so does one of the same major"


def test_info_says_what_there_is_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (facts, text) in OBSTACLES.items():
        for module in (info, devices):
            monkeypatch.setattr(module, "cuda_facts", lambda facts=facts: replace(facts, gpus=0))
        load_cuda.cache_clear()
        shown = info.render()
        assert re.search(f"usable +no: .*{text}", shown), (name, shown)
        assert re.search("driver +none" if facts.driver is None else "driver +supports CUDA up to 1[23]", shown), name


def test_info_shows_who_reaches_whom() -> None:
    assert info.peer_access(1, lambda i, j: False) == "one GPU"
    assert info.peer_access(3, lambda i, j: True) == "every GPU reaches every other one"
    assert info.peer_access(3, lambda i, j: i + j == 1) == "0 reaches 1; 1 reaches 0; 2 reaches none"


def test_a_cuda_module_that_cannot_be_loaded_keeps_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(name: str) -> None:
        tried.append(name)
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(devices, "cuda_facts", lambda: GOOD)
    monkeypatch.setattr(devices.importlib, "import_module", broken)
    for _ in range(2):
        module, why = load_cuda()
        assert module is None
        assert why is not None
        assert "cannot be loaded (libcudart.so.13: cannot open shared object file): build tpkernels again" in why
    assert tried == ["tpkernels._C_cuda"], "once in a process"


def test_a_group_on_cuda_says_what_this_machine_lacks() -> None:
    if obstacle_to_cuda(devices.cuda_facts()) is None:
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(RuntimeError, match=r"Group.open: cannot use cuda:\d+: .*: .* or .*device='cpu'"):
        Group.open(device="cuda")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("tpu", "device must be 'cpu' or 'cuda', got 'tpu'"),
        ("meta", "device must be 'cpu' or 'cuda', got 'meta'"),
        (2.5, "device must be 'cpu' or 'cuda', got 2.5"),
        ("cuda:4", "device must be one of the 4 GPUs of this process, got 'cuda:4'"),
    ],
)
def test_bad_devices_of_a_group(asked: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=f"Group.open: {text}"):
        device_of(None, asked)


def test_the_device_follows_the_backend_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for config, want in (
        ("cpu:gloo,cuda:nccl", "cuda:2"),
        ("cuda:nccl", "cuda:2"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo", "cpu"),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        some: Any = object()
        assert device_of(some, None) == torch.device(want), config
        assert device_of(some, "cuda") == torch.device("cuda:2")
        assert device_of(some, "cuda:1") == torch.device("cuda:1")
        assert device_of(some, "cpu") == torch.device("cpu")
    assert device_of(None, None) == torch.device("cpu")


@pytest.mark.parametrize(
    ("transport", "device", "text"),
    [
        ("peer", "cpu", "transport must be 'auto', 'shm', 'hierarchical', 'group' on cpu, got 'peer'"),
        ("shm", "cuda", "transport must be 'auto', 'peer', 'group' on cuda, got 'shm'"),
    ],
)
def test_a_transport_of_the_other_device_is_an_error(transport: str, device: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"Group.open: {text}"):
        Group.open(transport=transport, device=device)


@pytest.mark.parametrize("options", [{}, {"device": "cuda", "transport": "group"}])
def test_multicast_is_for_peers_on_gpus(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"Group.open: multicast needs device 'cuda' and transport 'peer', got"):
        Group.open(multicast=True, **options)


# --- transport `group` on a GPU


class FakeEvent:
    """Of a stream that never gets on."""

    def query(self) -> bool:
        return False


class FakeStream:
    def record_event(self) -> FakeEvent:
        return FakeEvent()


def device_exchange(label: str, timeout_s: float) -> DeviceExchange:
    pids: list[int | None] = [None] * dist.get_world_size()
    world: Any = dist.group.WORLD
    return DeviceExchange(world, Watch(world, label, timeout_s, pids), 64, torch.device("cpu"))


def check_agreeing_over_the_hosts() -> None:
    rank, R = dist.get_rank(), dist.get_world_size()
    exchange = device_exchange("agreeing", 5.0)
    for call in range(3):
        assert exchange.agree([call, rank]) == [[call, r] for r in range(R)]


def check_a_late_rank_is_named() -> None:
    rank = dist.get_rank()
    exchange = device_exchange("late", 0.5)
    if rank == 1:
        dist.barrier()
    else:
        text = raised(lambda: exchange.agree([rank]), TimeoutError)
        dist.barrier()
        late = "ranks [1] did not come"
        told = f"gave up at call 1, because {late}" in text  # by the rank that gave up first
        assert told or f"{late} within 0.5 s. If they are only slow, raise Group.open(timeout_s=...)" in text, text


def check_a_stream_that_waits_for_a_rank_that_left() -> None:
    rank = dist.get_rank()
    exchange = device_exchange("left", 20.0)
    if rank == 1:
        exchange.close(4)
        dist.barrier()
    else:
        before, torch.cuda.current_stream = torch.cuda.current_stream, lambda device: FakeStream()
        try:
            text = raised(lambda: exchange.synchronise(5), PeerLostError)
        finally:
            torch.cuda.current_stream = before
        dist.barrier()
        closed = "rank 1 closed the group; it was last seen at call 4"
        assert closed in text or text.endswith("because ranks [1] were lost"), text


@pytest.mark.parametrize(
    "check",
    [check_agreeing_over_the_hosts, check_a_late_rank_is_named, check_a_stream_that_waits_for_a_rank_that_left],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_ranks_that_exchange_through_nccl_never_wait_for_ever(check: Callable[[], None]) -> None:
    run_ranks(check, 3)

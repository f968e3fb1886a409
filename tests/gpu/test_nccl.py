"""What goes through NCCL, as far as one GPU shows it: a world of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tpkernels import ops
from tpkernels.comm.device_exchange import DeviceExchange
from tpkernels.comm.devices import load_cuda
from tpkernels.comm.group import Group
from tpkernels.comm.watch import Watch
from tpkernels.testing.spawn import RankError, call_ranks, report


def run_one(body: object) -> None:
    """Call body() in a process whose group has NCCL."""
    outcomes = call_ranks(body, 1, (), 40.0, False, "cpu:gloo,cuda:nccl")
    if not outcomes[0].finished:
        raise RankError(report(body, outcomes), outcomes)


def check_the_exchange() -> None:
    torch.cuda.set_device(0)
    world, device = dist.group.WORLD, torch.device("cuda", 0)
    assert world is not None
    exchange = DeviceExchange(world, Watch(world, "exchange", 20.0, [os.getpid()]), 1 << 16, device)
    for turn in range(3):
        exchange._send.fill_(turn + 1)
        exchange._receive.zero_()
        exchange.start([40_000], [40_000])
        exchange.wait(turn)
        exchange.synchronise(turn)
        assert exchange._receive[:40_000].eq(turn + 1).all()
        assert not exchange._receive[40_000:].any()
        assert exchange.agree([turn, 7]) == [[turn, 7]]
    exchange.close(2)


def test_bytes_go_through_nccl_and_come_back() -> None:
    run_one(check_the_exchange)


def check_the_default_device() -> None:
    torch.cuda.set_device(0)
    with Group.open() as group:
        assert group.device == torch.device("cuda", 0)
        x = torch.arange(5.0, device="cuda")
        assert torch.equal(ops.all_reduce(x, group=group), x)
        assert torch.equal(ops.all_gather(x, group=group), x)
        group.barrier()
        assert group.all_gather_ints(3) == [3]


def test_a_process_group_with_nccl_means_the_gpu() -> None:
    run_one(check_the_default_device)


class Slow(DeviceExchange):
    """An exchange behind which the stream sleeps, as if a rank were missing."""

    cycles = 0

    def wait(self, call: int) -> None:
        super().wait(call)
        if self.cycles:
            torch.cuda._sleep(self.cycles)


def group_of_one(timeout_s: float) -> tuple[Group, Slow]:
    """A group whose only rank exchanges with itself through NCCL."""
    torch.cuda.set_device(0)
    world, device = dist.group.WORLD, torch.device("cuda", 0)
    exchange = Slow(world, Watch(world, "alone", timeout_s, [os.getpid()]), 1 << 17, device)
    kernels: Any = load_cuda()[0]
    made = kernels.open_group("alone", "alone", 0, 1, timeout_s, 0, exchange)
    return Group(made, world, timeout_s, "a test", device), exchange


def check_the_stream_is_watched() -> None:
    group, exchange = group_of_one(timeout_s=0.5)
    with group, torch.cuda.stream(torch.cuda.Stream()):
        x = torch.arange(5000.0, device="cuda")
        for _ in range(3):
            assert torch.equal(ops.all_reduce(x, group=group), x)
        torch.cuda._sleep(int(4e9))  # what runs before an exchange may take its time: nobody waits for a rank
        ops.all_reduce(x, group=group)
        group.check()
        assert exchange._marks.tolist() == [8, 8, 0, 4, 0], "an all_reduce is two exchanges"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            y = ops.all_reduce(x, group=group)
        for turn in range(3):
            x.fill_(turn)
            graph.replay()
            assert y.eq(turn).all()
        assert exchange._marks.tolist() == [14, 14, 0, 5, 0], "launches of a graph are watched, too"
        del graph


def test_a_stream_is_watched_also_in_graphs_and_slow_kernels_are_not_blamed() -> None:
    run_one(check_the_stream_is_watched)


def stuck(store: str) -> None:
    """The program of a process whose exchange does not end in time; what comes after that is torch's affair."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    group, exchange = group_of_one(timeout_s=0.5)
    x = torch.ones(100, device="cuda")
    ops.all_reduce(x, group=group)
    group.check()
    exchange.cycles = int(4e9)
    ops.all_reduce(x, group=group)
    try:
        group.check()
    except TimeoutError as error:
        print("told:", error, flush=True)
    try:
        ops.all_reduce(x, group=group)
    except RuntimeError as error:
        print("later:", error, flush=True)
    os._exit(0)


def test_an_exchange_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {here!r}); import test_nccl; test_nccl.stuck(sys.argv[1])"
    environment = {**os.environ, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=35, check=False)
    said = done.stdout + done.stderr
    assert "told: the exchange of all_reduce, call 2, was given up: ranks [] did not come within 0.5 s" in said, said
    assert "later: " in said, said
    assert "broken" in said, said

"""What goes through NCCL, as far as one GPU shows it: a world of one rank."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tpkernels import ops
from tpkernels.device_exchange import DeviceExchange
from tpkernels.group import Group
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
    exchange = DeviceExchange(world, "exchange", 20.0, 1 << 16, [os.getpid()], device)
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
        assert group.exchange_sizes(3) == [3]


def test_a_process_group_with_nccl_means_the_gpu() -> None:
    run_one(check_the_default_device)

"""What aggregators and hooks hold while they live, give back when they are dropped, and take part in meanwhile."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.harness.ops import raised
from tpkernels.comm import group as groups
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, comm_hook
from tpkernels.testing import run_ranks

DEADLINE_S = 60.0


def held() -> tuple[int, int, int]:
    """Descriptors, arenas that are mapped, groups that are open, once the threads of lanes that end have ended."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("tpkernels-lane"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "the lane has ended"
    with open("/proc/self/maps") as file:
        arenas = sum("/dev/shm" in line for line in file)
    return len(os.listdir("/proc/self/fd")), arenas, len(groups._open_groups)


def aggregated(group: Group) -> None:
    model = nn.Linear(3, 3)
    aggregator = GradAggregator(model, group=group, sync_parameters=True, mode="delayed", warmup_steps=1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        aggregator.wait()
        model.zero_grad()


def hooked(group: Group) -> None:
    ddp = DistributedDataParallel(nn.Linear(3, 3))
    comm_hook("fp16", group=group).register(ddp)
    ddp(torch.ones(1, 3)).sum().backward()


def nothing_is_left_of_what_is_dropped(transport: str) -> None:
    with Group.open(transport=transport) as group:
        for use in (aggregated, hooked):
            use(group)
            before = held()
            use(group)
            assert held() == before, use.__name__


def one_that_is_dropped_with_messages_under_way_waits_for_nobody() -> None:
    with Group.open(timeout_s=1.0) as group:
        model = nn.Linear(3, 3)
        aggregator = GradAggregator(model, group=group, sync_parameters=True)
        before = len(groups._open_groups)
        gone = weakref.ref(aggregator)
        if group.rank == 0:
            model(torch.ones(1, 3)).sum().backward()
        del aggregator
        gc.collect()
        assert gone() is None
        assert held()[2] == before - 1, "the group of the lane is closed, though nobody answered"


class Blocks(nn.Module):
    """Blocks that are recomputed in backward, one after the other, and one that is not used."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.unused, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, torch.tanh(x), use_reentrant=self.reentrant)
        return x


def data(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()


def recomputed_blocks_are_averaged(reentrant: bool) -> None:
    with Group.open() as group:
        for options in ({}, {"bucket_bytes": 1}, {"mode": "delayed", "warmup_steps": 1}):
            model: Any = Blocks(reentrant)
            with GradAggregator(model, group=group, codec="none", **options) as aggregator:
                for step in range(4):
                    model.zero_grad()
                    with aggregator.no_sync():
                        model(data(7, group.rank)).sum().backward()
                    model(data(step, group.rank)).sum().backward()
                    if not aggregator.wait():
                        continue
                    late = 1 if "mode" in options and step > 0 else 0
                    whole: Any = Blocks(False)
                    for rank in range(group.world_size):
                        for which in (7, step - late):
                            (whole(data(which, rank)).sum() / group.world_size).backward()
                    for p, q in zip(model.blocks.parameters(), whole.blocks.parameters(), strict=True):
                        torch.testing.assert_close(p.grad, q.grad)
                    assert model.unused.weight.grad is None


CHANGES: dict[str, Callable[[Any], Any]] = {
    " on cpu when it was made, and is bfloat16 [3": lambda model: model.to(torch.bfloat16),
    "and is float64 [3": lambda model: model.double(),
    "and is float32 [4": lambda model: setattr(model.weight, "data", torch.ones(4, 3)),
    "have changed since it was made: new ['weight', 'bias']": lambda model: model.to("meta"),
    "have changed since it was made: new ['bias']": lambda model: setattr(model, "bias", nn.Parameter(torch.ones(3))),
}


def a_model_that_changes_under_an_aggregator_is_named() -> None:
    with Group.open() as group:
        for mode in ("sync", "delayed", "local"):
            for text, change in CHANGES.items():
                torch.manual_seed(0)
                model: Any = nn.Linear(3, 3)
                with GradAggregator(model, group=group, mode=mode, warmup_steps=0) as aggregator:
                    change(model)
                    model.bias.data = model.bias.data.new_ones(len(model.weight))

                    def step(model: Any = model, aggregator: GradAggregator = aggregator) -> None:
                        model(torch.ones_like(model.weight[:1])).sum().backward()
                        aggregator.wait()

                    assert text in raised(step, RuntimeError), mode


def what_cannot_be_copied_says_what_to_copy() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Linear(3, 3))
        hook = comm_hook("fp16", group=group)
        ddp.register_comm_hook(hook.state, hook)
        aggregator = GradAggregator(nn.Linear(3, 3), group=group, sync_parameters=True)
        for copied in (ddp, hook, aggregator):
            for way in (copy.deepcopy, lambda what: torch.save(what, io.BytesIO())):
                text = raised(lambda way=way, copied=copied: way(copied), TypeError)
                assert "copy or save the model itself (of DistributedDataParallel: its .module)" in text
        copy.deepcopy(ddp.module)(torch.ones(1, 3))
        aggregator.close()


@pytest.mark.parametrize(
    "check",
    [
        a_model_that_changes_under_an_aggregator_is_named,
        what_cannot_be_copied_says_what_to_copy,
    ],
)
def test_what_does_not_go_together_is_an_error_that_helps(check: Callable[[], None]) -> None:
    run_ranks(check, 2)


@pytest.mark.parametrize("transport", ["auto", "group"])
def test_nothing_is_left_of_what_is_dropped(transport: str) -> None:
    run_ranks(nothing_is_left_of_what_is_dropped, 2, transport)


def test_one_that_is_dropped_with_messages_under_way_waits_for_nobody() -> None:
    run_ranks(one_that_is_dropped_with_messages_under_way_waits_for_nobody, 2, fresh=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_are_recomputed_are_averaged(reentrant: bool) -> None:
    run_ranks(recomputed_blocks_are_averaged, 2, reentrant)

"""Memory: a call leaves nothing behind, so that the millionth call of a process needs no more than the first."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.layers import leaf
from tests.harness.memory import bytes_in_use, needs_mallinfo2
from tests.harness.op_calls import op_calls, sizes
from tests.harness.training import run
from tpkernels import layers, ops
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, clip_grad_norm_
from tpkernels.testing import run_ranks
from tpkernels.testing.cases import CASES
from tpkernels.train.settings import Settings

WARM_UP, CALLS = 20, 300
PER_CALL = 16  # bytes: 300 of these and APART are less than 300 of the smallest block of malloc (32 with its header)
APART = 4096  # bytes that are not lost: tables that grew, blocks that a thread keeps for itself

Use = Callable[[], Any]
pytestmark = needs_mallinfo2


def lost(use: Use) -> int:
    """By how much CALLS calls raise the bytes in use."""
    for _ in range(WARM_UP):
        use()
    gc.collect()
    before = bytes_in_use()
    for _ in range(CALLS):
        use()
    gc.collect()
    return bytes_in_use() - before


def assert_nothing_is_lost(uses: dict[str, Use]) -> None:
    limit = CALLS * PER_CALL + APART
    gc.collect()
    gc.freeze()  # so that each collection looks at new objects only
    found = {}
    for name, use in uses.items():
        found[name] = [lost(use)]
        if most_of_all_ranks(found[name][0]) > limit:
            found[name].append(lost(use))
    gc.unfreeze()
    grown = {name: times for name, times in found.items() if min(times) > limit}
    assert not grown, f"bytes that {CALLS} calls left behind, measured twice: {grown}"


def most_of_all_ranks(count: int) -> int:
    most = torch.tensor(count)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def differentiated(fn: Callable[..., Any], *arguments: Any) -> Use:
    """Forward and, where the result has a gradient, backward."""

    def use() -> None:
        result = fn(*(leaf(a) if isinstance(a, Tensor) and a.requires_grad else a for a in arguments))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor) and first.requires_grad:
            first.sum().backward()

    return use


def check_ops(transport: str) -> None:
    """Every registered op; and every public function, which takes a shorter way than the dispatcher's."""
    with Group.open(transport=transport) as group:
        uses = {f"{i}: {op}": differentiated(op, *arguments) for i, (op, arguments) in enumerate(op_calls(group))}
        for case in CASES:
            s = sizes(group, M=16)  # rows enough for every engine
            arguments = case.arguments(s, group.rank)
            for x in arguments:
                if x is not None and x.is_floating_point():
                    x.requires_grad_()
            uses[case.name] = differentiated(lambda *xs, case=case, s=s: case.call(s, list(xs), group), *arguments)
        x = torch.ones(8)
        uses["all_reduce without gradient"] = lambda: ops.all_reduce(x, group=group)
        if transport == "shm":
            uses["all_reduce_ of a tensor of the group"] = lambda: ops.all_reduce_(
                group.empty((64,)).zero_(), group=group
            )
        uses["all_gather_ints"] = lambda: group.all_gather_ints(3)
        assert_nothing_is_lost(uses)


def of_any_length(*features: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """In turn a few rows and so many that outputs come from the pool."""
    turns = itertools.cycle([leaf(torch.ones(rows, *features, dtype=dtype)) for rows in (2, 30, 2100, 4, 6)])
    return lambda: next(turns)


def learning(module: nn.Module, make_input: Callable[[], Tensor]) -> Use:
    def use() -> None:
        module(make_input()).float().sum().backward()
        module.zero_grad()

    return use


def linears(group: Group, **options: Any) -> nn.Sequential:
    column = layers.ColumnParallelLinear(64, 64, group=group, **options)
    return nn.Sequential(column, nn.GELU(), layers.RowParallelLinear(64, 64, group=group, **options))


def check_layers(transport: str) -> None:
    with Group.open(transport=transport) as group:
        rows, half_rows = of_any_length(64), of_any_length(64, dtype=torch.bfloat16)
        norm = layers.LayerNorm(64, group=group, sequence_parallel=True)
        embedding, ids = layers.VocabParallelEmbedding(50, 64, group=group), torch.arange(50)
        uses = {
            "linears": learning(linears(group), rows),
            "linears, packed": learning(linears(group, codec="fp16", grad_codec="int8"), rows),
            "linears, sequence parallel": learning(linears(group, sequence_parallel=True).append(norm), rows),
            "linears, bf16": learning(linears(group, dtype=torch.bfloat16), half_rows),
            "embedding": learning(embedding, lambda: ids),
        }
        assert_nothing_is_lost(uses)


def check_steps(mode: str, codec: str) -> None:
    """Aggregation and clipping, as a training step calls them."""
    with Group.open() as group:
        model = nn.Linear(8, 8)  # messages on their way are not lost, and small beside the limit
        aggregator = GradAggregator(model, group=group, mode=mode, codec=codec, local_steps=2, sync_parameters=True)
        x = torch.ones(4, 8)

        def step() -> None:
            model(x).sum().backward()
            if aggregator.wait():
                clip_grad_norm_(model, 1.0, groups=group)
            aggregator.after_step()
            model.zero_grad()

        assert_nothing_is_lost({f"{mode} {codec}": step})
        aggregator.close()


def check_training(folder: str, settings: Settings) -> None:
    with run(settings, folder) as opened:
        turns = itertools.count()
        assert_nothing_is_lost({"step": lambda: opened.trainer.step(next(turns), settings.steps)})


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_no_op_leaves_memory_behind(transport: str) -> None:
    run_ranks(check_ops, 2, transport)


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_no_layer_leaves_memory_behind_whatever_the_length_of_its_input(transport: str) -> None:
    run_ranks(check_layers, 2, transport)


@pytest.mark.parametrize(("mode", "codec"), [("sync", "fp16"), ("delayed", "none"), ("local", "topk")])
def test_no_step_of_an_aggregator_leaves_memory_behind(mode: str, codec: str) -> None:
    run_ranks(check_steps, 2, mode, codec)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_step_of_a_training_run_leaves_memory_behind(tmp_path: Path, text: str, sequence_parallel: bool) -> None:
    settings = Settings(
        layers=1, d_model=24, heads=3, context=16, batch=4, steps=1000, data=text, sequence_parallel=sequence_parallel
    )
    run_ranks(check_training, 2, str(tmp_path / "run"), settings)

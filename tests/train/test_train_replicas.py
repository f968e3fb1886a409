"""Training with several replicas: the numbers of one process, exact resume, and replicas that stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.harness.ranks import nightly
from tests.harness.training import finished, run
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator
from tpkernels.errors import RankMismatchError
from tpkernels.testing import run_ranks
from tpkernels.train import parity, report
from tpkernels.train.gpt import GPT, whole_parts
from tpkernels.train.runlog import read
from tpkernels.train.settings import Settings
from tpkernels.train.stages import config_of

TINY = Settings(
    tp=1, dp=2, layers=1, d_model=24, heads=3, context=16, batch=4,
    steps=8, warmup=2, lr=0.01, checkpoint_every=4, eval_every=4, local_steps=3, parity_steps=8,
)  # fmt: skip


def check_parity(folder: str, settings: Settings) -> None:
    """The plain case, with an uneven batch, and with one gradient of one replica a thousandth off."""
    for name, batch, wrong in (("even", 4, False), ("uneven", 5, False), ("wrong", 4, True)):
        with run(replace(settings, batch=batch, check_replicas=2), f"{folder}/{name}") as opened:
            if wrong and opened.layout.replica == 1:
                opened.trainer.model.blocks[0].down.bias.register_hook(lambda g: g * 1.001)
            opened.loop()
            found = report.collect(opened)
            assert found.ranks[0].replica_bytes > 4 * sum(p.numel() for p in opened.trainer.model.parameters())
            if opened.group.rank == 0:
                compared = parity.compare(opened.trainer, opened.log.records, opened.total)
                assert compared.holds != wrong, (name, compared)


def check_resume(folder: str, settings: Settings) -> None:
    """Eight steps; five and three: between two averages of mode local, with an average in flight in mode delayed."""
    for mode, codec in (("sync", "fp16"), ("delayed", "fp16"), ("local", "topk"), ("sync", "topk")):
        s, where = replace(settings, grad_mode=mode, grad_codec=codec, checkpoint_every=5), f"{folder}/{mode}-{codec}"
        whole, losses = finished(s, f"{where}/whole")
        finished(replace(s, stop_at=5), f"{where}/parts")
        parts, late = finished(s, f"{where}/parts", resume=True)
        assert len(whole) == len(parts)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True)), (mode, codec)
        assert late[-3:] == losses[-3:]
        if torch.distributed.get_rank() == 0:
            assert [r["loss"] for r in read(Path(where, "parts", "log.jsonl"))] == losses


@pytest.mark.parametrize("tp", [1, 2])
def test_replicas_train_as_one_process_would_within_rounding(tmp_path: Path, text: str, tp: int) -> None:
    run_ranks(check_parity, 2 * tp, str(tmp_path), replace(TINY, tp=tp, data=text))


@pytest.mark.parametrize("tp", [2, *nightly(1)])
def test_a_resumed_run_with_replicas_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, text: str, tp: int) -> None:
    run_ranks(check_resume, 2 * tp, str(tmp_path), replace(TINY, tp=tp, data=text))


def check_zero(folder: str, settings: Settings) -> None:
    """The losses and parameters of a run that is not cut over the replicas, interrupted or not."""
    count = 2 * len(list(GPT(config_of(settings), whole_parts()).parameters()))
    whole, losses = finished(settings, f"{folder}/0")
    for zero in (1, 2):
        s = replace(settings, zero=zero, checkpoint_every=5)
        finished(replace(s, stop_at=5), f"{folder}/{zero}")
        parts, late = finished(s, f"{folder}/{zero}", resume=True)
        assert late[-3:] == losses[-3:]
        for a, b in zip(whole[: count // 2], parts[: count // 2], strict=True):
            assert torch.equal(a, b)
        assert sum(t.numel() for t in parts) < 0.7 * sum(t.numel() for t in whole)
    packed = replace(settings, zero=1, grad_codec="fp16", checkpoint_every=5)
    uninterrupted = finished(packed, f"{folder}/packed")
    finished(replace(packed, stop_at=5), f"{folder}/parts")
    parts, late = finished(packed, f"{folder}/parts", resume=True)
    assert late[-3:] == uninterrupted[1][-3:]
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted[0], parts, strict=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_zero_gives_the_bits_of_a_whole_optimizer(tmp_path: Path, text: str, tp: int) -> None:
    run_ranks(check_zero, 2 * tp, str(tmp_path), replace(TINY, tp=tp, data=text))


def check_a_difference_stops_the_run(folder: str, settings: Settings) -> None:
    """One bit of one parameter of one replica."""
    with run(replace(settings, check_replicas=2), folder) as opened:
        if opened.layout.replica == 1 and opened.layout.tp.rank == 0:
            bits = opened.trainer.model.blocks[0].up.weight.data.view(torch.int32)
            bits[0, 0] ^= 1
        with pytest.raises(RankMismatchError, match=r"after step 2: .*blocks\.0\.up\.weight"):
            opened.loop()
        assert opened.step == 2


def test_a_bit_that_differs_between_replicas_stops_the_run_on_all_ranks_and_is_named(tmp_path: Path, text: str) -> None:
    run_ranks(check_a_difference_stops_the_run, 4, str(tmp_path / "run"), replace(TINY, tp=2, data=text))


def check_aggregators_follow_each_other() -> None:
    """Over a process group, where each needs one of its own: torch must not be made to reuse a name.

    The second kind is asked for its counters while a message is under way.
    """
    with Group.open(transport="group") as group:
        for _ in range(3):
            big = torch.nn.Linear(2048, 2048, bias=False)
            with GradAggregator(big, group=group, mode="delayed", warmup_steps=0, sync_parameters=True) as second:
                big(torch.ones(1, 2048)).sum().backward()
                second.wait()
                assert second.stats()["wire_bytes"] >= 2 * 2048 * 2048
        for turn in range(4):
            model = torch.nn.Linear(2, 1, bias=False)
            torch.nn.init.ones_(model.weight)
            with GradAggregator(model, group=group, codec="none") as first:
                model(torch.full((1, 2), float(group.rank))).sum().backward()
                assert first.wait()
                assert model.weight.grad.tolist() == [[0.5, 0.5]], turn


def test_an_aggregator_over_a_process_group_can_follow_one_that_was_closed() -> None:
    run_ranks(check_aggregators_follow_each_other, 2, timeout=60.0)

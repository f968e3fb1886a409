"""Pipeline: gradients and losses of the whole model for every schedule; ranks that disagree or are lost."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining
from torch import nn

from tests.harness.parallelize import close, ids, tiny
from tests.harness.pipelines import tiny_llama
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.errors import PeerLostError, PlanError, RankMismatchError
from tpkernels.pipeline import Pipeline, split_by_layer, take_stages
from tpkernels.pipeline.batches import labels_that_count, split_batch
from tpkernels.pipeline.orders import BACKWARD, FORWARD, INPUT, WEIGHT, bubble_of, order_of, rank_of, stages_on
from tpkernels.testing import run_ranks
from tpkernels.testing.spawn import run_ranks_outcomes

GPT2 = {"n_embd": 36, "n_head": 9, "n_positions": 64, "num_hidden_layers": 6}


def pipeline(model: nn.Module, group: Group, each: int = 1, schedule: str = "1f1b", **options: Any) -> Pipeline:
    split = split_by_layer(model, each * group.world_size)
    own = stages_on(schedule, group.rank, group.world_size, len(split.stages))
    return Pipeline(take_stages(model, split, *own), group=group, schedule=schedule, **options)


def check_training(group: Group, schedule: str, each: int, micro_batches: int) -> None:
    """Rows that micro-batches do not divide, other lengths each step, rows without a label, tied embeddings."""
    whole = tiny("gpt2", **GPT2)
    model = copy.deepcopy(whole)
    pipe = pipeline(model, group, each, schedule=schedule, micro_batches=micro_batches)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
    others = dict(whole.named_parameters(remove_duplicate=False))
    few = 2 * group.world_size  # as few micro-batches as "dualpipev" takes
    for rows, length in ((7, 5), (4, 8), (7, 5)) if schedule in ("gpipe", "1f1b") else ((8, 5), (few, 7)):
        x = ids(rows, length)
        y = x.clone()
        y[0], y[1, :2] = -100, -100
        loss = whole(input_ids=x, labels=y).loss
        loss.backward()
        close(pipe.step(input_ids=x, labels=y), loss.double(), "loss")
        pipe.sum_tied()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            close(parameter.grad, others[name].grad, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pipe.check_tied()
        close(pipe.evaluate(input_ids=x, labels=y), whole(input_ids=x, labels=y).loss.double(), "evaluation")
    assert 0.0 <= pipe.bubble() < 1.0
    assert pipe.expected_bubble == bubble_of(group.world_size, each, micro_batches, schedule)


def check_two_ranks() -> None:
    with Group.open() as group:
        check_training(group, "gpipe", 1, 3)
        check_training(group, "1f1b", 1, 3)
        check_training(group, "interleaved", 2, 4)
        check_training(group, "zb1p", 1, 4)
        check_training(group, "zb1p", 2, 4)
        check_training(group, "dualpipev", 2, 4)
        check_training(group, "dualpipev", 2, 7)
        check_v(group)
        check_disagreement(group)
        check_codecs(group)
        check_frozen_layers(group)


def check_disagreement(group: Group) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="must be the same on all ranks"):
        pipeline(copy.deepcopy(model), group, micro_batches=1 + group.rank)
    with pytest.raises(ValueError, match=r"must hold stages \[\d\] of a multiple of 2"):
        split = split_by_layer(model, 2)
        Pipeline(take_stages(copy.deepcopy(model), split, 1), group=group)
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.get_input_embeddings().weight[3, 4] += group.rank
    with pytest.raises(RankMismatchError, match=r"copies of model\.embed_tokens\.weight must hold the same values"):
        pipeline(odd, group)
    pipe = pipeline(model, group, micro_batches=2)
    with pytest.raises(RankMismatchError, match="all ranks must give the same batch"):
        pipe.step(input_ids=ids(2, 5) + group.rank, labels=ids(2, 5))
    with pytest.raises(PlanError, match="add a loss of the routers of all layers"):
        pipe.step(input_ids=ids(), labels=ids(), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(PlanError, match="add a loss of the routers of all layers"):
        pipe.evaluate(input_ids=ids(), labels=ids())
    model.config.output_router_logits = False
    with pytest.raises(ValueError, match="no label that counts"):
        pipe.step(input_ids=ids(), labels=torch.full_like(ids(), -100))
    assert math.isfinite(float(pipe.step(input_ids=ids(), labels=ids())))  # refused calls have sent nothing
    model.zero_grad()


def check_v(group: Group) -> None:
    """Stages in the shape of a V: codecs, what is refused, and ranks that keep other stages."""
    model = tiny_llama()
    split = split_by_layer(model, 4)
    with pytest.raises(ValueError, match=r"must hold stages \[0, 3\] of a multiple of 2, got \[0, 2\] of 4"):
        stages = take_stages(copy.deepcopy(model), split, group.rank, group.rank + 2)
        Pipeline(stages, group=group, schedule="dualpipev", micro_batches=4)
    with pytest.raises(ValueError, match="'dualpipev' has two stages on each of 2 ranks, got 2"):
        Pipeline(take_stages(copy.deepcopy(model), split_by_layer(model, 2), group.rank), group=group,
                 schedule="dualpipev", micro_batches=4)  # fmt: skip
    with pytest.raises(ValueError, match="torch's ScheduleDualPipeV: DualPipeV requires at least as many"):
        pipeline(copy.deepcopy(model), group, 2, "dualpipev", micro_batches=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.distributed.pipelining, "ScheduleDualPipeV")
        with pytest.raises(ValueError, match=r"torch .* has no ScheduleDualPipeV, of which 'dualpipev' is the order"):
            pipeline(copy.deepcopy(model), group, 2, "dualpipev", micro_batches=4)
    grads = {}
    for codec in ("none", "fp16"):
        own = copy.deepcopy(model)
        pipe = pipeline(own, group, 2, "dualpipev", micro_batches=4, codec=codec)
        assert pipe.tied_copies == [], "the first and the last stage are on one rank"
        with pytest.raises(ValueError, match="requires at least as many"):
            pipe.step(input_ids=ids(3, 9), labels=ids(3, 9))
        pipe.step(input_ids=ids(4, 9), labels=ids(4, 9))
        grads[codec] = {name: p.grad for name, p in own.named_parameters()}
    for name, gradient in grads["none"].items():
        assert gradient is not None
        error, scale = float((grads["fp16"][name] - gradient).abs().max()), float(gradient.abs().max())
        assert 0 < error <= 2.0**-6 * scale, name  # a few packings of 2^-11, through four layers


def check_codecs(group: Group) -> None:
    """Messages in fp16 have about half the bytes; gradients differ by what packing rounds."""
    sent, grads = {}, {}
    for codec in ("none", "fp16"):
        model = tiny_llama(2)
        pipe = pipeline(model, group, micro_batches=2, codec=codec)
        pipe.step(input_ids=ids(4, 9), labels=ids(4, 9))
        before = pipe.bytes_sent
        model.zero_grad()
        pipe.step(input_ids=ids(4, 9), labels=ids(4, 9))
        sent[codec] = pipe.bytes_sent - before
        grads[codec] = {name: p.grad for name, p in model.named_parameters()}
    assert sent["none"] == 4 * 4 * 9 * 36
    assert sent["fp16"] < 0.52 * sent["none"]
    worst = 0.0
    for name, gradient in grads["none"].items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        error = float((grads["fp16"][name] - gradient).abs().max())
        assert error <= 2.0**-7 * scale, name  # a few packings of 2^-11, through two layers
        worst = max(worst, error / scale)
    assert worst > 0.0


def check_frozen_layers(group: Group) -> None:
    """Where nothing of the first stage is trained, no gradient is sent to it."""
    model = tiny_llama(2, tied=False)
    split = split_by_layer(model, 2)
    for parameter in (*model.model.layers[0].parameters(), *model.model.embed_tokens.parameters()):
        parameter.requires_grad_(False)
    pipe = Pipeline(take_stages(model, split, group.rank), group=group, micro_batches=2)
    pipe.step(input_ids=ids(), labels=ids())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert (pipe.bytes_sent == 0) == (group.rank == 1)


def test_every_schedule_gives_the_gradients_of_the_whole_model() -> None:
    run_ranks(check_two_ranks, 2)


def check_three_ranks() -> None:
    with Group.open() as group:
        check_training(group, "1f1b", 1, 4)
        check_training(group, "dualpipev", 2, 8)


def test_three_stages_share_tied_embeddings_between_the_first_and_the_last() -> None:
    run_ranks(check_three_ranks, 3)


class Place:
    """The part of a Group that an order depends on."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_an_order_has_every_pass_once_and_never_waits_for_itself(schedule: str) -> None:
    for ranks, micro_batches in itertools.product((1, 2, 3, 5), (1, 2, 3, 8)):
        orders = [order_of(schedule, Place(r, ranks), ranks, micro_batches) for r in range(ranks)]  # type: ignore[arg-type]
        done: set[tuple[bool, int, int]] = set()
        at = [0] * ranks
        while any(at[r] < len(orders[r]) for r in range(ranks)):
            before = list(at)
            for r in range(ranks):
                while at[r] < len(orders[r]):
                    kind, stage, micro = orders[r][at[r]]
                    forward = kind == FORWARD
                    source = stage - 1 if forward else stage + 1
                    if 0 <= source < ranks and (forward, source, micro) not in done:
                        break
                    assert forward or (True, stage, micro) in done
                    done.add((forward, stage, micro))
                    at[r] += 1
            assert at != before, f"{schedule} over {ranks} ranks with {micro_batches} micro-batches waits for ever"
        assert len(done) == sum(map(len, orders)) == 2 * ranks * micro_batches
        if schedule == "1f1b":  # a rank never holds more than its distance from the end
            for r in range(ranks):
                held = list(itertools.accumulate(1 if action.forward else -1 for action in orders[r]))
                assert max(held) == min(micro_batches, ranks - r)


def check_waiting(schedule: str, each: int, micro_batches: int) -> None:
    """Where every half pass takes a moment, the ranks wait as long as the formula says."""
    with Group.open() as group:
        R, count = group.world_size, each * group.world_size
        mine = order_of(schedule, group, count, micro_batches)
        orders = gather(mine, group)
    ends: dict[tuple[str, int, int], int] = {}
    at, clock = [0] * R, [0] * R
    while any(at[r] < len(orders[r]) for r in range(R)):
        before = list(at)
        for r in range(R):
            while at[r] < len(orders[r]):
                kind, stage, micro = orders[r][at[r]]
                source = {FORWARD: (FORWARD, stage - 1, micro), WEIGHT: (INPUT, stage, micro)}.get(
                    kind, (INPUT, stage + 1, micro)
                )
                if 0 <= source[1] < count and source not in ends:
                    break
                clock[r] = max(clock[r], ends.get(source, 0)) + (2 if kind == BACKWARD else 1)
                ends[INPUT if kind == BACKWARD else kind, stage, micro] = clock[r]
                assert rank_of(schedule, stage, R) == r
                at[r] += 1
        assert at != before, "waits for ever"
    assert len(ends) >= 2 * count * micro_batches
    busy = 3 * each * micro_batches
    assert 1 - busy / max(clock) == pytest.approx(bubble_of(R, each, micro_batches, schedule), rel=0.01)


@pytest.mark.parametrize(("schedule", "each"), [("zb1p", 1), ("dualpipev", 2)])
def test_orders_of_halves_wait_as_long_as_the_formula_says(schedule: str, each: int) -> None:
    run_ranks(check_waiting, 3, schedule, each, 8)


def test_batches_are_split_along_rows_and_weighted_by_labels() -> None:
    x = torch.arange(15).view(5, 3)
    parts = split_batch({"input_ids": x, "position_ids": torch.arange(3)[None], "flag": True}, 3)
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), x)
    assert all(part["position_ids"].shape == (1, 3) and part["flag"] is True for part in parts)
    assert len(split_batch({"input_ids": x[:2]}, 4)) == 2
    with pytest.raises(ValueError, match=r"must have 5 rows or one.*labels \[4, 3\]"):
        split_batch({"input_ids": x, "labels": x[:4]}, 2)
    with pytest.raises(ValueError, match="must have a tensor with rows"):
        split_batch({"flag": True}, 2)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    model = nn.Linear(1, 1)
    assert labels_that_count(model, {"labels": labels}) == 1.0  # the next tokens
    model.loss_type = "ForMaskedLM"  # type: ignore[assignment]
    assert labels_that_count(model, {"labels": labels}) == 3.0
    assert labels_that_count(model, {"labels": labels[:, 0]}) == 2.0


def check_a_lost_stage(victim: int) -> str:
    group = Group.open(timeout_s=60.0)
    pipe = pipeline(tiny_llama(2), group, micro_batches=2)
    pipe.step(input_ids=ids(), labels=ids())
    dist.barrier()
    if group.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        pipe.step(input_ids=ids(), labels=ids())
    with pytest.raises(RuntimeError, match="a step has failed"):
        pipe.step(input_ids=ids(), labels=ids())
    return str(caught.value)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_loss_of_a_stage_is_an_error_that_names_it(victim: int) -> None:
    outcomes = run_ranks_outcomes(check_a_lost_stage, 2, victim)
    text = outcomes[1 - victim].value
    assert f"(rank {victim})" in text, outcomes

"""Embedding and cross entropy over a cut vocabulary against the unsharded ones, on real ranks."""

from __future__ import annotations

import resource
from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.harness.ops import (
    FLOATS,
    Drawn,
    assert_same_on_all_ranks,
    check_forward,
    check_gradient,
    is_device,
    raised,
)
from tests.harness.ranks import BOTH_TRANSPORTS, Run, on_devices, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.shard import part
from tpkernels.testing import run_ranks
from tpkernels.testing.case import Sizes
from tpkernels.testing.cases import VOCAB, VOCAB_CROSS_ENTROPY

SHAPES = {  # M, K, V, batch
    "even": (6, 8, 24, ()),
    "uneven": (9, 5, 17, ()),
    "batch": (3, 4, 10, (2, 2)),
    "fewer ids than ranks": (5, 3, 2, ()),
    "one": (1, 1, 1, ()),
    "no tokens": (0, 4, 9, ()),
    "long rows": (3, 300, 1201, ()),
}


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 3))
def check_every_shape_and_dtype(group: Group) -> None:
    for M, K, V, batch in SHAPES.values():
        for dtype in FLOATS:
            for smoothing in (0.0, 0.1, 1.0):
                s = Sizes(R=group.world_size, M=M, K=K, V=V, batch=batch, dtype=dtype, smoothing=smoothing)
                for case in VOCAB:
                    y = check_forward(case, s, group)
                    assert_same_on_all_ranks(group, f"{case.name} {s}", y)
                    check_gradient(case, s, group)


@on_ranks(1, devices=(1,))
def check_the_backward_refuses_other_sums(group: Group) -> None:
    """Of another dtype, or too few: the values behind them would be read."""
    logits, target = torch.ones(3, 4, device=group.device), torch.zeros(3, dtype=torch.int64, device=group.device)
    sums = torch.ones(3, dtype=torch.float64, device=group.device)
    call = torch.ops.tpkernels.vocab_cross_entropy_backward
    for dloss, lse, named in (
        (sums.float(), sums.float(), "lse"),
        (sums.float(), sums[:2], "lse"),
        (sums, sums, "dloss"),
    ):
        text = raised(lambda dloss=dloss, lse=lse: call(dloss, logits, target, lse, 0, 4, -100, 0.0), ValueError)
        assert f"vocab_cross_entropy_backward: {named} must be float" in text, text


@on_ranks(1, 3, devices=(1, 3), exchanging=(3,))
def check_any_cut(group: Group) -> None:
    """Not the cut of the rule: the last rank holds most, the first one or nothing."""
    R, rank = group.world_size, group.rank
    counts = [2 * r + (R == 1) for r in range(R)]
    V, start = sum(counts), sum(counts[:rank])
    drawn = Drawn(group)
    table = drawn.randn(V, 5)
    ids = drawn.randint(V, 4, 3, dtype=torch.int32)
    mine = table[start : start + counts[rank]].clone().requires_grad_()
    y = ops.vocab_embedding(ids, mine, group=group)
    assert torch.equal(y, table[ids])
    y.sum().backward()
    want = torch.zeros(V, 5).index_add(0, ids.flatten().long(), torch.ones(12, 5))
    assert torch.equal(mine.grad, want[start : start + counts[rank]])
    logits, target = drawn.randn(7, V), drawn.randint(V, 7, dtype=torch.int32)
    cut = logits[:, start : start + counts[rank]].clone().requires_grad_()
    loss = ops.vocab_cross_entropy(cut, target, group=group, label_smoothing=0.2)
    whole = logits.clone().requires_grad_()
    want_loss = F.cross_entropy(whole, target.long(), reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(loss, want_loss)
    loss.sum().backward()
    want_loss.sum().backward()
    torch.testing.assert_close(cut.grad, whole.grad[:, start : start + counts[rank]])


@on_ranks(1, 3, devices=(3,))
def check_ignored_tokens(group: Group) -> None:
    R, rank = group.world_size, group.rank
    logits = Drawn(group).randn(6, 11)
    for ignore_index in (-100, -1, 3):
        target = torch.tensor([0, 3, 10, ignore_index, 5, ignore_index])
        for smoothing in (0.0, 0.3):
            mine = part(logits, 1, R, rank).clone().requires_grad_()
            options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
            loss = ops.vocab_cross_entropy(mine, target, group=group, **options)
            want = F.cross_entropy(logits, target, reduction="none", **options)
            torch.testing.assert_close(loss, want)
            assert torch.equal(loss == 0, target == ignore_index)
            loss.sum().backward()
            assert torch.equal(mine.grad.abs().sum(-1) == 0, target == ignore_index)
    everything = torch.full((6,), -100)
    assert torch.equal(ops.vocab_cross_entropy(part(logits, 1, R, rank), everything, group=group), torch.zeros(6))


@on_ranks(1, 3, devices=(3,))
def check_extreme_logits(group: Group) -> None:
    R, rank = group.world_size, group.rank
    logits = torch.zeros(4, 12)
    logits[0] += 1e4  # overflows without the maximum taken off
    logits[1] -= 1e4
    logits[2, :-1] = float("-inf")  # on all ranks but the last nothing but -inf
    logits[3, 5] = float("nan")
    target = torch.tensor([1, 2, 11, 0])
    mine = part(logits, 1, R, rank).clone().requires_grad_()
    loss = ops.vocab_cross_entropy(mine, target, group=group)
    log12 = torch.log(torch.tensor(12.0)).item()
    torch.testing.assert_close(loss[:2], torch.full((2,), log12), atol=2e-3, rtol=0)
    assert loss[2] == 0.0
    assert loss[3].isnan(), "a NaN on one rank is seen by all"
    loss[:3].sum().backward()
    assert mine.grad[:3].isfinite().all()


@on_ranks(1, 3, devices=(3,))
def check_a_large_common_offset_costs_no_digits(group: Group) -> None:
    """Only differences of logits count; they are exact here, so that what is left is the rounding of the sums."""
    R, rank, V = group.world_size, group.rank, 31
    drawn = Drawn(group)
    steps, target = drawn.randint(9, 6, V).cpu(), drawn.randint(V, 6).cpu()
    for offset in (-1e4, 1e6, 2.0**24):
        for smoothing in (0.0, 0.1):
            full = (2.0 * steps + offset).double().requires_grad_()
            loss = F.cross_entropy(full, target, reduction="none", label_smoothing=smoothing)
            loss.sum().backward()
            mine = part(full.detach().float(), 1, R, rank).to(group.device).requires_grad_()
            got = ops.vocab_cross_entropy(
                mine, target.to(group.device), group=group, vocab_size=V, label_smoothing=smoothing
            )
            got.sum().backward()
            # With smoothing the mean of the logits has the offset's own rounding.
            unit = 2.0**-24
            bound = (V + 32) * unit * (16 + 2 * smoothing * abs(offset))
            assert (got.cpu() - loss).abs().max() <= bound, (offset, smoothing, got, loss)
            assert mine.grad is not None and full.grad is not None
            error = (mine.grad.cpu() - part(full.grad, 1, R, rank)).abs().max()
            assert error <= (V + 32) * unit, (offset, smoothing, error)


@on_ranks(1, 3, devices=(1, 3))
def check_wrong_ids_are_named(group: Group) -> None:
    R, rank = group.world_size, group.rank
    table, logits = torch.randn(3, 4), torch.randn(2, 3)
    for wrong in (-1, 3 * R, 1 << 40):
        ids = torch.tensor([0, wrong])
        for call in (
            lambda ids=ids: ops.vocab_embedding(ids, table, group=group),
            lambda ids=ids: ops.vocab_embedding(ids, table.clone().requires_grad_(), group=group, vocab_size=3 * R),
            lambda ids=ids: ops.vocab_cross_entropy(logits, ids, group=group),
        ):
            text = raised(lambda call=call: (call(), group.check()), ValueError)
            assert str(wrong) in text or is_device(group), text  # a device counts them
            assert f"{3 * R}" in text, text
    assert ops.all_gather(torch.tensor([rank]), group=group).tolist() == list(range(R)), "the group still works"


def measure_memory() -> None:
    with Group.open() as group:
        s = Sizes(R=group.world_size, M=256, V=32768, smoothing=0.1)
        logits, target = torch.randn(s.M, s.V // s.R, requires_grad=True), torch.randint(s.V, (s.M,))
        ops.vocab_cross_entropy(logits[:4], target[:4], group=group).sum().backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss = ops.vocab_cross_entropy(logits, target, group=group, label_smoothing=0.1)
        forward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        loss.sum().backward()
        both = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        part_kib, whole_kib = s.M * s.V // s.R * 4 // 1024, s.M * s.V * 4 // 1024
        assert forward < part_kib / 2, f"the forward took {forward} KiB, logits_shard has {part_kib}"
        assert both < whole_kib * 3 / 4, f"forward and backward took {both} KiB, full logits have {whole_kib}"
        group.reset_stats()
        ops.vocab_cross_entropy(logits, target, group=group, vocab_size=s.V)
        sent = group.stats()["wire_bytes"]
        assert sent <= 16 * s.M * (s.R - 1) + 4096, f"{sent} bytes sent for {s.M} tokens"


def test_no_rank_ever_holds_or_sends_logits_of_the_whole_vocabulary() -> None:
    run_ranks(measure_memory, 4, fresh=True)


@on_ranks(2, devices=(2,))
def check_bf16_logits_are_summed_in_fp32(group: Group) -> None:
    s = Sizes(R=group.world_size, M=4, V=4001, dtype=torch.bfloat16)
    loss = check_forward(VOCAB_CROSS_ENTROPY, s, group)
    assert loss.dtype == torch.float32
    again = check_forward(VOCAB_CROSS_ENTROPY, replace(s, dtype=torch.float64), group)
    assert again.dtype == torch.float64


@on_processes(globals())
def test_a_sharded_vocabulary_equals_the_full_one(run: Run) -> None:
    run()


@on_devices(globals())
def test_a_vocabulary_sharded_over_devices_equals_the_full_one(run: Run) -> None:
    run()

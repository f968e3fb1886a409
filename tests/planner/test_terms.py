"""The terms of the model of time against sums done by hand, and what must hold between them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tpkernels.planner import Cluster, Job, Recipe, Shape, cluster
from tpkernels.planner.hardware import Link, device
from tpkernels.planner.memory import memory_of, parameters_of_rank
from tpkernels.planner.step import StepTime, step_s
from tpkernels.planner.terms import (
    Slice,
    all_reduce_s,
    attention_s,
    codec_s,
    exposed_s,
    gemm_s,
    head_s,
    layer_s,
    memory_s,
    optimizer_s,
    send_s,
    together,
)  # fmt: skip

GPT = Shape.gpt(layers=8, hidden=4096, heads=32, vocab=51200)
# Whole numbers: 1 TFLOP/s, 1 GB/s of memory, no waste, no launches.
PLAIN = replace(
    device("a100"), flops=1e12, memory_bandwidth=1e9, memory=1e12, reserved=0.0, processors=0.0, gemm_rate=1.0,
    memory_rate=1.0, unaligned_rate=0.5, launch_norm=1.0, host_layer_s=0.0, host_call_s=0.0, host_head_s=0.0,
    skew_s=0.0, send_s=0.0,
)  # fmt: skip
LINK = Link("link", "link", bandwidth=1e9, of_node=False, rate=1.0, latency_s=1.0, hop_s=0.5)


def machine(ranks: int, per_node: int) -> Cluster:
    return Cluster(PLAIN, ranks, per_node, LINK, replace(LINK, bandwidth=1e8, latency_s=0.0, hop_s=0.0))


def test_a_product_takes_its_operations_and_the_ramp_of_its_tiles() -> None:
    assert gemm_s(PLAIN, 100, 200, 936) == pytest.approx(2 * 100 * 200 * 1000 / 1e12)
    busy = replace(PLAIN, processors=2.0)  # half a wave: one tile of 128 x 128
    assert gemm_s(busy, 100, 200, 936) == pytest.approx(2 * (100 * 200 + 128 * 128) * 1000 / 1e12)


def test_an_all_reduce_inside_a_node_is_a_ring_and_its_latency() -> None:
    four = machine(4, 4)
    assert all_reduce_s(four, 4e9, 1) == 0.0
    assert all_reduce_s(four, 4e9, 4) == pytest.approx(1.0 + 3 * 0.5 + 2 * 3 / 4 * 4)


def test_groups_of_a_node_share_its_links_to_others() -> None:
    # 4 nodes of 2. Ranks 2 apart: one of each group in a node, so 2 groups share a node's 2 x 0.1 GB/s.
    eight = machine(8, 2)
    assert eight.spread(4, 2) == (1, 4) and eight.spread(8, 1) == (2, 4)
    assert all_reduce_s(eight, 1e9, 4, 2) == pytest.approx(2 * 3 / 4 * 1e9 * 2 / 2e8)
    assert all_reduce_s(eight, 1e9, 8, 1) == pytest.approx(1.0 + 0.5 + 2 * 3 / 4 * 1e9 / 2e8)


def test_a_bucket_lets_bytes_pass_at_once_after_a_pause() -> None:
    pair = machine(2, 1)
    bucket = replace(pair, between=replace(pair.between, burst=4e7))
    plain = all_reduce_s(pair, 1e8, 2)
    assert plain == all_reduce_s(bucket, 1e8, 2) == pytest.approx(1.0)
    assert all_reduce_s(bucket, 1e8, 2, pause=9.0) == pytest.approx(0.6)
    assert all_reduce_s(bucket, 1e8, 2, pause=0.1) == pytest.approx(0.9)  # the bucket is filled at the link's rate
    assert all_reduce_s(bucket, 1e7, 2, pause=9.0) == 0.0


def test_a_message_between_stages_goes_over_the_link_that_connects_them() -> None:
    assert send_s(machine(4, 4), 1e9, stride=2, pp=2) == pytest.approx(1.0)
    assert send_s(machine(8, 4), 1e9, stride=4, pp=2) == pytest.approx(10.0)


def test_a_sum_in_chunks_hides_all_but_a_chunk_of_the_shorter() -> None:
    assert exposed_s(3.0, 5.0, 1) == 3.0
    assert exposed_s(3.0, 5.0, 3) == pytest.approx(1.0)
    assert exposed_s(5.0, 3.0, 3) == pytest.approx(3.0)


def test_launches_add_on_a_cpu_and_hide_beside_a_gpu() -> None:
    assert together(PLAIN, 3.0, 4.0) == pytest.approx(7.0)
    beside = replace(PLAIN, launch_norm=3.0)
    assert 4.0 < together(beside, 3.0, 4.0) < 7.0
    assert together(beside, 100.0, 1.0) == pytest.approx(100.0, rel=1e-5)


def test_one_attention_kernel_moves_no_scores() -> None:
    part = Slice(batch=2, sequence=1024, tp=1)
    several, one = attention_s(PLAIN, GPT, part), attention_s(PLAIN, GPT, replace(part, flash=True))
    scores = 2 * 32 * 1024**2
    assert several > 27 * scores / 1e9 > one  # 9 bytes a score forward, 18 backward, at 1 GB/s
    assert one == pytest.approx(7 * scores * 128 / (PLAIN.flash_rate * 1e12))


def test_a_vocabulary_that_is_not_padded_slows_the_head_until_it_is_cut() -> None:
    odd, even = replace(GPT, vocab=50257), replace(GPT, vocab=50256)
    one, two = Slice(1, 1024, 1), Slice(1, 1024, 2)
    pair = machine(2, 2)
    assert head_s(pair, odd, one).compute > 1.5 * head_s(pair, even, one).compute
    assert head_s(pair, odd, two).compute == pytest.approx(head_s(pair, even, two).compute, rel=1e-3)
    assert head_s(pair, even, one).communication == 0.0 < head_s(pair, even, two).communication


def test_recomputation_costs_a_forward_pass() -> None:
    eight = cluster("a100", 8)
    part = Slice(4, 2048, 8)
    none, selective, full = (
        layer_s(eight, GPT, replace(part, recompute=kind)).total for kind in ("none", "selective", "full")
    )
    assert none < selective < full < 1.5 * none


def test_a_codec_shortens_a_slow_sum_and_lengthens_a_fast_one() -> None:
    slow = replace(machine(2, 1), device=replace(PLAIN, memory_bandwidth=1e12))
    wide, packed = (layer_s(slow, GPT, Slice(1, 64, 2, wire_bytes=b)).communication for b in (2.0, 1.06))
    assert packed < 0.6 * wide
    dear = replace(slow, device=replace(slow.device, codec_passes={"int8": 40.0}))
    by_passes = [codec_s(dear.device, name, 3e12) for name in ("fp8", "int8")]  # 4 passes, as of any codec, and 40
    assert by_passes == pytest.approx([12.0, 120.0])
    fast = machine(2, 2)
    wide, packed = (layer_s(fast, GPT, Slice(1, 64, 2, wire_bytes=b)).total for b in (2.0, 1.06))
    assert packed > wide


def step(**recipe: int | str | bool) -> StepTime:
    """A step of 16 sequences on 8 GPUs in one node."""
    chosen = Recipe(**({"tp": 1, "pp": 1, "dp": 1, "micro_batch": 1} | recipe))  # type: ignore[arg-type]
    return step_s(cluster("a100", chosen.ranks), Job(GPT, 1024, 16), chosen)


def test_the_bubble_is_the_stages_before_and_shrinks_with_their_pieces() -> None:
    plain, pieces = step(pp=4), step(pp=4, virtual=2)
    stage = (plain.compute / 16 - (step().compute - 4 * (step().compute - plain.compute) / 3) / 16) * 3
    assert plain.bubble == pytest.approx(stage + 3 * plain.pipeline / 16, rel=1e-6)
    assert pieces.pipeline == pytest.approx(2 * plain.pipeline)
    assert pieces.bubble < 0.6 * plain.bubble
    assert step().bubble == step(dp=2).bubble == 0.0


def test_gradients_hide_behind_the_last_backward_only_if_they_may() -> None:
    machine_ = cluster("a100", 2)
    recipe = Recipe(1, 1, 2, 1)
    shown = step_s(machine_, Job(GPT, 1024, 16, overlap=False), recipe).data
    hidden = step_s(machine_, Job(GPT, 1024, 16), recipe).data
    assert shown > hidden > 0.0
    # What a rank does itself is never hidden.
    codec = replace(recipe, grad_codec="int8")
    dear = replace(machine_, device=replace(machine_.device, grad_codec_passes={"int8": 40.0}))
    more = step_s(dear, Job(GPT, 1024, 16), codec).data - step_s(machine_, Job(GPT, 1024, 16), codec).data
    assert more == pytest.approx(36 * memory_s(dear.device, 2 * parameters_of_rank(GPT, recipe)))


def test_zero_cuts_the_state_of_the_optimizer_and_its_time() -> None:
    needs = [memory_of(cluster("a100", 8), Job(GPT, 1024, 16), Recipe(1, 1, 8, 1, zero=z), 0) for z in range(4)]
    assert needs[0].optimizer == 8 * needs[1].optimizer
    assert needs[1].gradients == 8 * needs[2].gradients
    assert needs[2].parameters == 8 * needs[3].parameters
    copied = replace(cluster("a100", 8), device=replace(device("a100"), average_bytes=8.0))
    more = [memory_of(copied, Job(GPT, 1024, 16), Recipe(1, 1, 8, 1, zero=z), 0).gradients for z in (1, 2)]
    assert more == [3 * needs[1].gradients, needs[2].gradients + needs[1].gradients]
    assert step(dp=8, zero=1).optimizer == pytest.approx(step(dp=8).optimizer / 8)
    # Gradients hide behind the backward, parameters behind the forward, but for those of one of eight layers.
    exchange = all_reduce_s(cluster("a100", 8), 2 * parameters_of_rank(GPT, Recipe(1, 1, 8, 1)), 8)
    for zero in range(3):
        assert step(dp=8, zero=zero).data == pytest.approx(exchange / 8)
    assert optimizer_s(PLAIN, 1e9) == pytest.approx(PLAIN.optimizer_bytes)


def test_activations_are_those_that_korthikanti_et_al_count() -> None:
    # Table 2 of arXiv:2205.05198, bytes of a layer with s, b, h, a and t: s b h (10 + 24 / t + 5 a s / (h t)).
    s, b, h, a, t = 1024, 2, 4096, 32, 4
    job = Job(replace(GPT, layers=1, vocab=0), s, b, flash=False)
    four = cluster("a100", t)

    def kept(**recipe: str | bool) -> float:
        return memory_of(four, job, Recipe(t, 1, 1, b, **recipe), 0).activations  # type: ignore[arg-type]

    assert kept() == pytest.approx(s * b * h * (10 + 24 / t + 5 * a * s / (h * t)))
    assert kept(sequence_parallel=True) == pytest.approx(s * b * h / t * (34 + 5 * a * s / h))
    assert kept(sequence_parallel=True, recompute="selective") == pytest.approx(34 * s * b * h / t)

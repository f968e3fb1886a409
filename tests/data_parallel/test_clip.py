"""Clipping by the norm of a model that is partly cut, partly replicated, against torch on the unsharded one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.layers import F64, assert_close, assert_equal
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.data_parallel import clip_grad_norm_
from tpkernels.shard import ShardInfo, mark_shard, shard_info
from tpkernels.testing import run_ranks

RANKS = pytest.mark.parametrize("R", [1, 2, 3, 4])
CUTS: dict[str, int | None] = {"column": 0, "row": 1, "few": 0, "norm": None, "bias": None}
SHAPES = {"column": (7, 5), "row": (5, 8), "few": (1, 3), "norm": (5,), "bias": (6,)}


def model(group: Group | None, dtype: torch.dtype = F64) -> dict[str, nn.Parameter]:
    """The same parameters with gradients, whole (group None) or this rank's parts of them."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        gradient = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        dim = CUTS[name]
        if group is not None and dim is not None:
            info = ShardInfo(dim, shape[dim], group.world_size, group.rank, group.name, group.label)
            gradient = info.part(gradient).clone()
            made[name] = nn.Parameter(torch.zeros_like(gradient))
            mark_shard(made[name], info)
        else:
            made[name] = nn.Parameter(torch.zeros_like(gradient))
        made[name].grad = gradient
    return made


def assert_same_on_all_ranks(value: Tensor, group: Group) -> None:
    bits = value.reshape(1).view(torch.uint8).to(torch.int64)
    top, bottom = ops.all_reduce(bits, group=group, op="max"), ops.all_reduce(bits, group=group, op="min")
    assert torch.equal(top, bottom), "the norm must have the same bits on all ranks"


def check_norm_and_gradients_equal_the_unsharded_ones() -> None:
    group = Group.open()
    for norm_type, max_norm in itertools.product((1.0, 2.0, 3.0, math.inf), (0.5, 1000.0, 0.0)):
        whole, parts = model(None), model(group)
        want = nn.utils.clip_grad_norm_(whole.values(), max_norm, norm_type)
        got = clip_grad_norm_(parts.values(), max_norm, groups=group, norm_type=norm_type)
        assert_close(got, want, "norm", terms=64)
        assert_same_on_all_ranks(got, group)
        for name, parameter in parts.items():
            full = whole[name].grad
            assert full is not None
            info = shard_info(parameter)
            assert_close(parameter.grad, full if info is None else info.part(full), name, terms=64)


def check_a_module_a_tensor_and_tied_weights_count_once() -> None:
    group = Group.open()
    parts = model(group)
    module = nn.Module()
    for name, parameter in parts.items():
        module.register_parameter(name, parameter)
    module.register_parameter("tied", parts["column"])
    whole = model(None)
    want = nn.utils.get_total_norm([p.grad for p in whole.values() if p.grad is not None])
    assert_close(clip_grad_norm_(module, 1e9, groups=group), want, "module", 64)
    twice = [*parts.values(), parts["column"], parts["norm"]]
    assert_close(clip_grad_norm_(twice, 1e9, groups=[group, group]), want, "list", 64)
    one = whole["row"].grad
    assert one is not None
    assert_close(clip_grad_norm_(parts["row"], 1e9, groups=group), one.norm(), "one parameter", 64)


def check_low_precision_gradients_are_summed_in_fp64() -> None:
    group = Group.open()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        parts, whole = model(group, dtype), model(None, dtype)
        want = nn.utils.get_total_norm([p.grad.double() for p in whole.values() if p.grad is not None])
        got = clip_grad_norm_(parts.values(), 1e9, groups=group)
        assert got.dtype == torch.float32
        assert_equal(got, want.float(), "norm")
        assert parts["row"].grad is not None
        assert parts["row"].grad.dtype == dtype
    large = nn.Parameter(torch.zeros(3))
    large.grad = torch.full((3,), 3e38)
    assert clip_grad_norm_(large, 1.0, groups=group).isinf(), "too large for fp32, and shown"
    assert large.grad.abs().max() == 0


def check_large_gradients_keep_their_digits_and_their_range() -> None:
    group = Group.open()
    generator = torch.Generator().manual_seed(0)
    for dtype, size, scale in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (3_000_001, 2048), (1.0, 1e30, 1e-30, 0.0)
    ):
        if dtype == torch.float16 and scale not in (0.0, 1.0):
            continue
        gradient = (torch.randn(size, generator=generator) * scale).to(dtype)
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        want = gradient.double().norm()
        got = clip_grad_norm_(parameter, math.inf, groups=group)
        assert abs(float(got) - float(want)) <= 2e-7 * float(want)
        assert_equal(parameter.grad, gradient, "nothing to clip")


def check_what_is_not_finite_is_seen_on_all_ranks() -> None:
    group = Group.open()
    last = group.world_size - 1
    for value, name, norm_type in itertools.product((math.nan, math.inf), ("column", "bias"), (1.0, 2.0, math.inf)):
        parts = model(group)
        gradient = parts[name].grad
        assert gradient is not None
        if group.rank == last:  # for "bias", which is replicated, a fault of the model: it must show all the same
            gradient.view(-1)[-1] = value
        with pytest.raises(RuntimeError, match=r"the norm \(norm_type=.*\) of all gradients is (nan|inf)"):
            clip_grad_norm_(parts.values(), 1.0, groups=group, norm_type=norm_type, error_if_nonfinite=True)
        assert parts["norm"].grad is not None
        assert bool(parts["norm"].grad.any()), "the error comes before anything is scaled"
        norm = clip_grad_norm_(parts.values(), 1.0, groups=group, norm_type=norm_type)
        assert bool(norm.isnan()) if math.isnan(value) else bool(norm.isinf())
        if math.isnan(value):
            assert bool(parts["norm"].grad.isnan().all()), "NaN reaches all gradients, as in torch"


def check_parameters_without_gradients_do_not_count() -> None:
    group = Group.open()
    parts = model(group)
    for name in ("column", "bias"):
        parts[name].grad = None
    whole = model(None)
    kept = [whole[name].grad for name in ("row", "few", "norm")]
    want = nn.utils.get_total_norm([g for g in kept if g is not None])
    assert_close(clip_grad_norm_(parts.values(), 1e9, groups=group), want, "norm", 64)
    for parameter in parts.values():
        parameter.grad = None
    for norm_type in (2.0, math.inf):
        none = clip_grad_norm_(parts.values(), 1.0, groups=group, norm_type=norm_type)
        assert (float(none), none.dim()) == (0.0, 0)
    assert float(clip_grad_norm_([], 1.0, groups=None)) == 0.0


def check_parameters_cut_over_two_groups() -> None:
    first, second = Group.open(), Group.open()
    for norm_type in (2.0, math.inf):
        parts, others, whole = model(first), model(second), model(None)
        parts["row"] = others["row"]
        want = nn.utils.clip_grad_norm_(whole.values(), 0.5, norm_type)
        got = clip_grad_norm_(parts.values(), 0.5, groups=[first, second], norm_type=norm_type)
        assert_close(got, want, "norm", terms=64)
        assert_same_on_all_ranks(got, first)


def check_one_small_collective_for_each_group() -> None:
    group = Group.open()
    before = group.stats()["by_op"].get("all_reduce", {"calls": 0})["calls"]
    clip_grad_norm_(model(group).values(), 1.0, groups=group)
    assert group.stats()["by_op"]["all_reduce"]["calls"] - before == 1


def open_layout() -> tuple[Group, Group]:
    """The groups of this rank in a layout of 2 x 2: its row (tensor parallel), its column."""
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return Group.open(rows[rank // 2]), Group.open(columns[rank % 2])


NORMS = (1.0, 2.0, 3.0, math.inf)


def stage_parameters(whole: dict[str, nn.Parameter], parts: dict[str, nn.Parameter], stage: int) -> list[list[Tensor]]:
    """What a stage holds, whole and this rank's parts: the first one column and norm, the second one the others and a
    copy of column, which comes last."""
    names = (["column", "norm"], ["row", "few", "bias", "column"])[stage]
    return [[found[name] for name in names] for found in (whole, parts)]


def check_stages_count_once_each_and_tied_ones_on_one_of_them() -> None:
    tp, pp = open_layout()
    for norm_type, max_norm in itertools.product(NORMS, (0.5, 1000.0)):
        whole, parts = model(None), model(tp)
        mine, held = stage_parameters(whole, parts, pp.rank)
        want = nn.utils.clip_grad_norm_(whole.values(), max_norm, norm_type)
        tied = held[-1:] if pp.rank == 1 else []
        got = clip_grad_norm_(held, max_norm, groups=tp, norm_type=norm_type, pipeline=pp, tied=tied)
        assert_close(got, want, "norm", terms=64)
        assert_same_on_all_ranks(got, Group.open())
        for full, part in zip(mine, held, strict=True):
            info = shard_info(part)
            assert full.grad is not None
            assert_close(part.grad, full.grad if info is None else info.part(full.grad), "gradient", terms=64)
    for value, culprit, norm_type in itertools.product((math.nan, math.inf), range(4), (1.0, 2.0, math.inf)):
        _, held = stage_parameters(model(None), model(tp), pp.rank)
        spoiled = held[-1].grad  # the copy on stage 1, which counts elsewhere; on stage 0 the norm
        assert spoiled is not None
        if dist.get_rank() == culprit:
            spoiled.view(-1)[-1] = value
        tied = held[-1:] if pp.rank == 1 else []
        norm = clip_grad_norm_(held, 1.0, groups=tp, norm_type=norm_type, pipeline=pp, tied=tied)
        assert bool(norm.isnan()) if math.isnan(value) else bool(norm.isinf()), (value, culprit, norm_type, norm)
        others = held[0].grad
        assert others is not None
        assert bool(others.isnan().all()) if math.isnan(value) else not bool(others.any())
    # A stage alone has fp64 gradients, and one has none at all: the norm has one dtype, and the others count.
    lonely = nn.Parameter(torch.zeros(3, dtype=F64))
    lonely.grad = torch.full((3,), 2.0, dtype=F64)
    norm = clip_grad_norm_([lonely] if pp.rank == 0 else [], 1.0, groups=None, pipeline=pp)
    assert norm.dtype == F64
    assert_close(norm, torch.tensor(12.0, dtype=F64).sqrt(), "norm of one stage", 4)


def check_averaged_gradients_count_once_over_replicas() -> None:
    tp, dp = open_layout()
    for norm_type, order in itertools.product(NORMS, (1, -1)):
        whole, parts = model(None), model(tp)
        want = nn.utils.clip_grad_norm_(whole.values(), 0.5, norm_type)
        got = clip_grad_norm_(parts.values(), 0.5, groups=[tp, dp][::order], norm_type=norm_type)
        assert_close(got, want, "norm", terms=64)
        assert_same_on_all_ranks(got, Group.open())
        for name, parameter in parts.items():
            info, full = shard_info(parameter), whole[name].grad
            assert full is not None
            assert_close(parameter.grad, full if info is None else info.part(full), name, terms=64)
    for value, culprit in itertools.product((math.nan, math.inf), range(4)):
        parts = model(tp)
        spoiled = parts["column"].grad
        assert spoiled is not None
        if dist.get_rank() == culprit:  # a fault, as replicas hold the same: all ranks must see it
            spoiled.view(-1)[0] = value
        norm = clip_grad_norm_(parts.values(), 1.0, groups=[tp, dp])
        assert bool(norm.isnan()) if math.isnan(value) else bool(norm.isinf()), (value, culprit)


def check_layouts_of_four_ranks() -> None:
    check_stages_count_once_each_and_tied_ones_on_one_of_them()
    check_averaged_gradients_count_once_over_replicas()


def test_clipping_over_tensor_data_and_pipeline_parallel_ranks() -> None:
    run_ranks(check_layouts_of_four_ranks, 4)


@RANKS
@pytest.mark.parametrize(
    "check",
    [
        check_norm_and_gradients_equal_the_unsharded_ones,
        check_a_module_a_tensor_and_tied_weights_count_once,
        check_low_precision_gradients_are_summed_in_fp64,
        check_large_gradients_keep_their_digits_and_their_range,
        check_what_is_not_finite_is_seen_on_all_ranks,
        check_parameters_without_gradients_do_not_count,
        check_parameters_cut_over_two_groups,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_clipping_over_the_ranks(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


def test_clipping_makes_one_small_collective_for_each_group() -> None:
    run_ranks(check_one_small_collective_for_each_group, 2)


def test_bad_arguments_say_what_came() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must be 0 or more, got"):
            clip_grad_norm_(parameter, max_norm, groups=None)
    for norm_type in (0.0, -2.0, math.nan):
        with pytest.raises(ValueError, match="norm_type must be above 0"):
            clip_grad_norm_(parameter, 1.0, groups=None, norm_type=norm_type)
    mark_shard(parameter, ShardInfo(0, 6, 2, 0, "no such group", "tp"))
    with pytest.raises(ValueError, match=r"one is cut over 'tp' of 2 ranks, got \['"):
        clip_grad_norm_(parameter, 1.0, groups=None)
    with pytest.raises(ValueError, match="needs a pipeline, got None"):
        clip_grad_norm_([parameter], 1.0, groups=(), tied=[parameter])
    stages = Group.open()
    with pytest.raises(ValueError, match="tied must be among the parameters, got 1 that"):
        clip_grad_norm_([], 1.0, groups=(), pipeline=stages, tied=[parameter])
    with pytest.raises(ValueError, match="pipeline must not be one of groups, got 'local' in both"):
        clip_grad_norm_([], 1.0, groups=stages, pipeline=stages)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"must be dense, got one of layout torch\.sparse_coo"):
        clip_grad_norm_(table, 1.0, groups=None)

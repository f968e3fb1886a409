"""The sharded GEMMs with their collective against F.linear on unsharded tensors, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.gemms import SHAPES, sizes
from tests.harness.ops import FLOATS, assert_same_on_all_ranks, check_forward, check_gradient
from tests.harness.ranks import BOTH_TRANSPORTS, Run, on_devices, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.shard import part
from tpkernels.testing.case import Sizes
from tpkernels.testing.cases import ALL_GATHER_GEMM, GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, GEMMS


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 2, 4))
def check_forward_of_every_shape(group: Group) -> None:
    for shape in SHAPES:
        for dtype in FLOATS:
            for bias in (True, False):
                for integers in (True, False):
                    s = replace(sizes(group.world_size, shape), dtype=dtype, bias=bias, integers=integers)
                    for case in GEMMS:
                        check_forward(case, s, group)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 3))
def check_gradients_of_every_shape(group: Group) -> None:
    for shape in SHAPES:
        for dtype in FLOATS:
            for bias in (True, False):
                for case in GEMMS:
                    check_gradient(case, replace(sizes(group.world_size, shape), dtype=dtype, bias=bias), group)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2, 3), exchanging=(3,))
def check_codecs(group: Group) -> None:
    for shape in ("even", "uneven", "batch, cut tokens", "large", "no tokens"):
        for codec in ("fp16", "bf16"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                s = replace(sizes(group.world_size, shape), dtype=dtype, codec=codec)
                for case in GEMMS:
                    check_forward(case, s, group)
                    check_gradient(case, s, group)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2, 3))
def check_the_three_gemms_agree_bit_for_bit(group: Group) -> None:
    R, rank = group.world_size, group.rank
    for dtype in FLOATS:
        for shape in ("uneven", "batch, cut sequence", "large"):
            s = replace(sizes(R, shape), dtype=dtype)
            whole = GEMM_ALL_REDUCE.call(s, GEMM_ALL_REDUCE.arguments(s, rank), group)
            assert_same_on_all_ranks(group, f"{s}", whole)
            mine = GEMM_REDUCE_SCATTER.call(s, GEMM_REDUCE_SCATTER.arguments(s, rank), group)
            assert torch.equal(mine, part(whole, s.dim, R, rank)), s
            gathered = ALL_GATHER_GEMM.call(s, ALL_GATHER_GEMM.arguments(s, rank), group)
            x, w, bias = ALL_GATHER_GEMM.inputs(s).values()
            again = ops.replicated_gemm(
                x.to(dtype), *(part(t.to(dtype), 0, R, rank).clone() for t in (w, bias)), group=group
            )
            assert torch.equal(gathered, again), s


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 3))
def check_any_strides(group: Group) -> None:
    R = group.world_size
    for dtype in FLOATS:
        x = (torch.arange(6 * 8).reshape(6, 8) % 7 - 3).to(dtype)
        w = (torch.arange(5 * 8).reshape(5, 8) % 5 - 2).to(dtype)
        layouts: dict[str, Callable[[Tensor], Tensor]] = {
            "transposed": lambda t: t.t().contiguous().t(),
            "every second": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
            "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
            "one row": lambda t: t[:1].expand(t.shape),
        }
        for name, layout in layouts.items():
            a, b, bias = layout(x), layout(w), layout(w)[:, 0]
            plain = F.linear(a.double(), b.double())
            want = (R * plain + bias.double()).to(dtype)
            assert torch.equal(ops.gemm_all_reduce(a, b, bias, group=group), want), name
            assert torch.equal(ops.replicated_gemm(a, b, bias, group=group), (plain + bias.double()).to(dtype))
            gathered = ops.all_gather_gemm(a, b, bias, group=group)
            assert torch.equal(gathered, (plain + bias.double()).to(dtype).repeat(R, 1)), name
            assert torch.equal(ops.gemm_reduce_scatter(a, b, bias, group=group), part(want, 0, R, group.rank)), name


@on_ranks(3, devices=(3,))
def check_only_wanted_gradients(group: Group) -> None:
    for case in GEMMS:
        s = Sizes(R=group.world_size, M=7, N=5, K=11)
        dy, wanted, _ = case.gradients(s, group.rank)
        for wants in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
            arguments = case.arguments(s, group.rank)
            for x, want in zip(arguments, wants, strict=True):
                assert x is not None
                x.requires_grad_(want)
            case.call(s, arguments, group).backward(dy)
            for x, want, expected in zip(arguments, wants, wanted, strict=True):
                assert x is not None
                assert expected is not None
                assert (x.grad is not None) == want, (case.name, wants)
                if x.grad is not None:
                    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


@on_ranks(3, devices=(2,))
def check_what_is_kept_for_the_backward(group: Group) -> None:
    """A frozen weight needs x no more; a frozen input needs w no more."""
    kept: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    x, w = torch.randn(6, 4), torch.randn(5, 4)
    for op in (ops.gemm_all_reduce, ops.gemm_reduce_scatter, ops.all_gather_gemm, ops.replicated_gemm):
        for x_wants, w_wants, expected in ((True, False, [(5, 4)]), (False, True, [(6, 4)])):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                op(x.clone().requires_grad_(x_wants), w.clone().requires_grad_(w_wants), group=group)
            assert kept == expected, (op.__name__, kept)


@on_ranks(3, devices=(2,))
def check_autocast(group: Group) -> None:
    x, w, bias = torch.randn(6, 8), torch.randn(4, 8), torch.randn(4)
    for op in (ops.gemm_all_reduce, ops.gemm_reduce_scatter, ops.all_gather_gemm, ops.replicated_gemm):
        for dtype in (torch.bfloat16, torch.float16):
            want = op(x.to(dtype), w.to(dtype), bias.to(dtype), group=group)
            leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
            with torch.autocast(group.device.type, dtype=dtype):
                plain, y = op(x, w, bias, group=group), op(*leaves, group=group)
                double = op(x.double(), w.double(), group=group)
            assert torch.equal(plain, want)
            assert torch.equal(y, want)
            assert double.dtype == torch.float64
            y.sum().backward()
            assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)
        with torch.autocast(group.device.type, enabled=False):
            assert op(x, w, group=group).dtype == torch.float32
    with torch.autocast(group.device.type, dtype=torch.bfloat16):
        assert ops.all_reduce(x, group=group).dtype == torch.float32, "collectives are not cast"


@on_ranks(3)
def check_wire_bytes(group: Group) -> None:
    s = Sizes(R=group.world_size, M=256, N=512, K=64)
    for case in GEMMS:
        for codec in ("none", "fp16"):
            group.reset_stats()
            check_forward(case, replace(s, codec=codec), group)
            found, least = group.stats()["wire_bytes"], case.wire_bytes(replace(s, codec=codec))
            assert 0.99 * least <= found <= 1.05 * least + 256, (case.name, codec, found, least)


@on_ranks(2, 4, devices=(2, 4))
def check_explicit_sizes(group: Group) -> None:
    """An uneven gather asks the ranks for their sizes, or takes the one that is given."""
    R, rank = group.world_size, group.rank
    x = torch.arange(7 * 4.0).reshape(7, 4)
    w = torch.eye(4)
    mine = part(x, 0, R, rank)
    for dim_size in (None, 7):
        assert torch.equal(ops.all_gather_gemm(mine, w, group=group, dim_size=dim_size), x)
        leaf = mine.clone().requires_grad_()
        ops.all_gather_gemm(leaf, w, group=group, dim_size=dim_size).sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(mine, R))


@on_processes(globals())
def test_sharded_gemms_equal_f_linear(run: Run) -> None:
    run()


@on_devices(globals())
def test_sharded_gemms_of_devices_equal_f_linear(run: Run) -> None:
    run()

"""What ops and layers return may be modified in place, as what nn.Linear returns: values and gradients of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpkernels import layers, ops, parallelize
from tpkernels.comm.group import Group
from tpkernels.shard import part, shard_info
from tpkernels.testing import run_ranks

WIDE = torch.float64


def multiply(x: Tensor) -> Tensor:
    x *= 2
    return x


def add(x: Tensor) -> Tensor:
    x += x.detach().cos()
    return x


def mask(x: Tensor) -> Tensor:
    return x.masked_fill_(x < 0, 0.5)


def write_a_part(x: Tensor) -> Tensor:
    x[:1] = 3.0
    return x


IN_PLACE: list[Callable[[Tensor], Tensor]] = [
    multiply,
    add,
    mask,
    write_a_part,
    nn.ReLU(inplace=True),
    nn.SiLU(inplace=True),
    nn.LeakyReLU(inplace=True),
]


class Model(nn.Module):
    """Embedding, column and row, each modified in place, in all shapes."""

    def __init__(self, change: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=WIDE, padding_idx=1)
        self.up, self.down = nn.Linear(6, 8, bias, dtype=WIDE), nn.Linear(8, 6, bias, dtype=WIDE)
        self.head = nn.Linear(6, 11, bias, dtype=WIDE)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        x = self.change(self.embed(ids))
        y = self.down(self.change(self.up(x)))
        y += x
        return self.change(self.head(y))


PLAN = {"embed": "vocab", "up": "column", "down": "row", "head": "column_gather"}


def gradients(model: nn.Module, ids: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
    model.zero_grad()
    y = run(ids)
    (y * torch.linspace(-1, 1, y.numel(), dtype=WIDE).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def own_parts(cut: nn.Module, whole: list[Tensor]) -> list[Tensor]:
    found = [shard_info(p) for p in cut.parameters()]
    return whole[:1] + [g if info is None else info.part(g) for g, info in zip(whole[1:], found, strict=True)]


def check_models() -> None:
    with Group.open() as group:
        for change in IN_PLACE:
            for bias in (True, False):
                torch.manual_seed(0)
                whole = Model(change, bias)
                cut = parallelize(copy.deepcopy(whole), group=group, plan=PLAN)
                for shape in ((5,), (2, 3), (1, 4), (2, 1, 2), (1, 1)):
                    ids = torch.arange(torch.Size(shape).numel()).view(shape)
                    want = own_parts(cut, gradients(whole, ids, whole))
                    for run in (cut, lambda ids, cut=cut: checkpoint(cut, ids, use_reentrant=False)):
                        torch.testing.assert_close(gradients(cut, ids, run), want, rtol=1e-10, atol=1e-10)


def check_a_compiled_model() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        whole = Model(multiply, True)
        cut = parallelize(copy.deepcopy(whole), group=group, plan=PLAN)
        ids = torch.arange(6).view(2, 3)
        want = own_parts(cut, gradients(whole, ids, whole))
        got = gradients(cut, ids, torch.compile(cut, backend="aot_eager", fullgraph=True))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def results(group: Group, x: Tensor, w: Tensor, bias: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """What public ops give for x[..., 6], which all ranks hold, and what torch gives."""
    R, rank, K = group.world_size, group.rank, x.shape[-1]
    y = x @ w.T if bias is None else x @ w.T + bias
    x_shard, w_shard = part(x, -1, R, rank), part(w, 1, R, rank)
    found = {
        "all_reduce": (ops.all_reduce(x, group=group), x * R),
        "replicated_gemm": (ops.replicated_gemm(x, w, bias, group=group), y),
        "gemm_all_reduce": (ops.gemm_all_reduce(x_shard, w_shard, bias, group=group), y),
        "take_shard": (layers.take_shard(x, -1, group=group), x_shard),
        "norm": (ops.all_reduce_add_rms_norm(x, x, w[0, :K], group=group)[0], norm(x * (R + 1), w[0, :K])),
    }
    for dim in range(x.dim()):
        size = x.shape[dim]
        cut = part(x, dim, R, rank)
        found[f"all_gather {dim}"] = (ops.all_gather(cut, dim, group=group, dim_size=size), x)
        found[f"all_gather alike {dim}"] = (ops.all_gather(cut, dim, group=group, dim_size=size, grad="split"), x)
        found[f"reduce_scatter {dim}"] = (ops.reduce_scatter(x, dim, group=group), cut * R)
        if dim < x.dim() - 1:
            tokens: dict[str, Any] = {"group": group, "dim": dim}
            found[f"all_gather_gemm {dim}"] = (ops.all_gather_gemm(cut, w, bias, dim_size=size, **tokens), y)
            found[f"scatter {dim}"] = (ops.gemm_reduce_scatter(x_shard, w_shard, bias, **tokens), part(y, dim, R, rank))
    return found


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight)


def check_ops() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        w, bias = torch.randn(7, 6, dtype=WIDE), torch.randn(7, dtype=WIDE)
        for shape in ((4, 6), (1, 6), (3, 2, 6), (1, 4, 6), (3, 1, 6), (2, 1, 3, 6), (0, 2, 6), (2, 0, 6)):
            for b in (bias, None):
                x, u = torch.randn(shape, dtype=WIDE).requires_grad_(), w.clone().requires_grad_()
                for name, (y, want) in results(group, x, u, b).items():
                    about = f"{name} of {list(shape)}, bias {b is not None}"
                    assert not y._is_view(), about
                    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9, msg=lambda m, a=about: f"{a}: {m}")
                    before = x.detach().clone()
                    changed = multiply(y)
                    changed.sum().backward()  # never the error that a view is modified
                    assert torch.equal(x.detach(), before), about
                with torch.no_grad():
                    kept = [y for y, _ in results(group, x, u, b).values()]
                scale = torch.ones((), dtype=WIDE, requires_grad=True)
                for y in kept:
                    y *= scale  # with a gradient after all


def check_engines() -> None:
    """Every GEMM engine, where the rule might not take it."""
    engines = {torch.float32: ("aten", "onednn"), torch.bfloat16: ("aten", "gemv"), torch.float64: ("aten",)}
    with Group.open() as group:
        for dtype, names in engines.items():
            for engine in names:
                if dtype != torch.float64:
                    group._communicator.add_measured(str(dtype).removeprefix("torch."), 4, 16, 16, {engine: 1.0})
                x = torch.randn(2, 2, 16, dtype=dtype).requires_grad_()
                w, bias = torch.randn(16, 16, dtype=dtype), torch.randn(16, dtype=dtype)
                for b in (bias, None):
                    y = ops.replicated_gemm(x, w, b, group=group)
                    torch.testing.assert_close(y, nn.functional.linear(x, w, b), rtol=2e-2, atol=2e-2)
                    assert not y._is_view(), (engine, dtype)
                    multiply(y).sum().backward()


def check_a_saved_input_that_is_modified_later() -> None:
    with Group.open() as group:
        x, w = torch.randn(3, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
        for op in (ops.replicated_gemm, ops.gemm_all_reduce, ops.gemm_reduce_scatter, ops.all_gather_gemm):
            h = x * 1
            y = op(h, w, group=group)
            h += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        y = ops.all_reduce(x * 1, group=group, op="max")
        y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Between(nn.Module):
    """Two column layers that are handed one tensor, which is modified between them; nothing keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.down = (nn.Linear(6, 6, False, dtype=WIDE).requires_grad_(False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        x *= 3
        return self.down(first + self.b(x))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Between()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * 1)


def check_an_input_modified_between_two_layers() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        whole = Around()
        cut = parallelize(
            copy.deepcopy(whole),
            group=group,
            plan={"block.a": "column", "block.b": "column", "block.down": "row"},
        )
        found = []
        for model in (whole, cut):
            x = torch.linspace(-1, 1, 12, dtype=WIDE).view(2, 6).requires_grad_()
            y = model(x)
            y.square().sum().backward()
            found.append([y.detach(), x.grad])
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("R", [1, 2, 3])
def test_outputs_of_cut_layers_may_be_modified_in_place(R: int) -> None:
    run_ranks(check_models, R)


@pytest.mark.parametrize("R", [1, 2, 3])
def test_no_op_returns_a_view_or_its_input(R: int) -> None:
    run_ranks(check_ops, R)


def test_a_compiled_model_modifies_outputs_in_place() -> None:
    run_ranks(check_a_compiled_model, 2)


def test_no_gemm_engine_returns_a_view() -> None:
    run_ranks(check_engines, 1)


def test_a_backward_notices_that_what_it_kept_was_modified() -> None:
    run_ranks(check_a_saved_input_that_is_modified_later, 2)


def test_layers_share_an_input_only_while_it_is_not_modified() -> None:
    run_ranks(check_an_input_modified_between_two_layers, 2)

"""Column layers that take one tensor sum its gradient once; what else uses that tensor is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpkernels as tpk
from tests.harness.layers import F64, assert_close, integers, leaf, make_integer
from tpkernels.comm.group import Group
from tpkernels.layers.convert import ConvertedModule
from tpkernels.testing import run_ranks

PLAN = {"*.q": "column", "*.k": "column", "*.v": "column", "*.out": "row", "*.gate": "replicate"}


class Block(nn.Module):
    """Two of its layers take x, one takes something else, a whole layer and the sum at the end use x, too."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, dtype=F64) for _ in range(4))
        self.gate = nn.Linear(width, width, dtype=F64)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        y = self.q(x) * self.k(x) + self.v(x + 1)
        if fail:
            raise KeyError("in the middle")
        return self.out(y) + self.gate(x) + x


def check(group: Group) -> None:
    whole = nn.Sequential(make_integer(Block(), 1), make_integer(Block(), 2))
    cut = tpk.parallelize(copy.deepcopy(whole), group=group, plan=PLAN)
    for model in (cut, copy.deepcopy(cut)):
        x, y = leaf(integers(4, 6, seed=3)), leaf(integers(4, 6, seed=3))
        model(x.detach())  # the first forward in training compares the ranks' inputs
        group.reset_stats()
        model(x).sum().backward()
        counted = group.stats()["by_op"]
        assert counted["all_reduce"]["calls"] == 4, "x of q and k, and x + 1 of v, in two blocks"
        assert "replicated_gemm_backward" not in counted
        whole.zero_grad()
        whole(y).sum().backward()
        compare(model, whole, x, y)
    check_that_nothing_is_kept(cut)
    check_without_grad(cut, whole)


def compare(cut: nn.Module, whole: nn.Module, x: Tensor, y: Tensor) -> None:
    assert_close(x.grad, y.grad, "gradient of x")
    wanted = dict(whole.named_parameters())
    for name, parameter in cut.named_parameters():
        info, full = tpk.shard.shard_info(parameter), wanted[name].grad
        assert_close(parameter.grad, full if info is None else info.part(full), name)


def check_that_nothing_is_kept(cut: Any) -> None:
    with pytest.raises(KeyError, match="in the middle"):
        cut[0](leaf(integers(4, 6, seed=3)), fail=True)
    assert all(m.shared._seen is None for m in cut.modules() if getattr(m, "shared", None) is not None)
    assert cut[0].q.shared is cut[0].k.shared
    assert cut[0].q.shared is not cut[1].q.shared


def check_without_grad(cut: nn.Module, whole: nn.Module) -> None:
    x = integers(4, 6, seed=5)
    with torch.no_grad():
        assert_close(cut(x), whole(x), "without gradients")


def check_that_another_group_can_take_over() -> None:
    """The layers' group is closed after they were given another; what they share among them follows."""
    first, second = Group.open(), Group.open()
    whole = nn.Sequential(make_integer(Block(), 1))
    cut = tpk.parallelize(copy.deepcopy(whole), group=first, plan=PLAN)
    for module in cut.modules():
        if isinstance(module, ConvertedModule):
            module.set_group(second)
    first.close()
    cut(integers(4, 6, seed=3))  # the first forward in training compares the ranks' inputs
    second.reset_stats()
    x, y = leaf(integers(4, 6, seed=3)), leaf(integers(4, 6, seed=3))
    cut(x).sum().backward()
    assert second.stats()["by_op"]["all_reduce"]["calls"] == 2
    whole(y).sum().backward()
    compare(cut, whole, x, y)


def run() -> None:
    with Group.open() as group:
        check(group)
    check_that_another_group_can_take_over()


@pytest.mark.parametrize("R", [2, 3])
def test_layers_that_take_one_tensor_sum_its_gradient_once(R: int) -> None:
    run_ranks(run, R)

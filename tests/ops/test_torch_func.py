"""torch.func over ops and cut models: functional_call and vmap are right, what cannot be differentiated says so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from tpkernels import layers, ops, parallelize
from tpkernels.comm.group import Group
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return y


def check_functional_call() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        whole, ids = Model().double(), torch.arange(10).view(2, 5)
        cut = parallelize(copy.deepcopy(whole), group=group, plan={"embed": "vocab", "up": "column", "down": "row"})
        found = []
        for model in (whole, cut):
            other = {name: (p.detach() * 2).requires_grad_() for name, p in model.named_parameters()}
            y = functional_call(model, other, (ids,))
            gradients = torch.autograd.grad(y.square().sum(), list(other.values()))
            assert all(p.grad is None for p in model.parameters())
            found.append([y.detach(), *gradients])
        infos = [None, *(shard_info(p) for p in cut.parameters())]
        want = [g if info is None else info.part(g) for g, info in zip(found[0], infos, strict=True)]
        torch.testing.assert_close(found[1], want)


def calls(group: Group) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ops of one tensor [2 R, 6], which all ranks hold."""
    R = group.world_size
    torch.manual_seed(1)
    w, ids = torch.randn(6, 6), torch.arange(2 * R)
    return {
        "all_reduce": lambda x: ops.all_reduce(x, group=group),
        "all_reduce max": lambda x: ops.all_reduce(x, group=group, op="max"),
        "reduce_scatter": lambda x: ops.reduce_scatter(x, group=group),
        "all_gather": lambda x: ops.all_gather(x, group=group, dim_size=2 * R * R),
        "gemm_all_reduce": lambda x: ops.gemm_all_reduce(x, w, group=group),
        "gemm_reduce_scatter": lambda x: ops.gemm_reduce_scatter(x, w, group=group),
        "all_gather_gemm": lambda x: ops.all_gather_gemm(x, w, group=group, dim_size=2 * R * R),
        "replicated_gemm": lambda x: ops.replicated_gemm(x, w, group=group),
        "all_reduce_add_rms_norm": lambda x: ops.all_reduce_add_rms_norm(x, x, w[0], group=group)[0],
        "vocab_cross_entropy": lambda x: ops.vocab_cross_entropy(x, ids, group=group, vocab_size=6 * R),
        "vocab_embedding": lambda x: ops.vocab_embedding(ids, x, group=group, vocab_size=2 * R * R),
    }


def check_vmap() -> None:
    with Group.open() as group:
        xs = torch.randn(3, 2 * group.world_size, 6, requires_grad=True)
        for name, call in calls(group).items():
            want, got = torch.stack([call(x) for x in xs]), vmap(call)(xs)
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")
            gradients = [torch.autograd.grad(y.square().sum(), xs)[0] for y in (got, want)]
            torch.testing.assert_close(*gradients, msg=lambda m, n=name: f"{n}: {m}")
        shared: list[Callable[[Tensor], Tensor]] = [
            lambda x: layers.sum_gradient(x, group=group)[0],
            lambda x: layers.take_shard(x, 0, group=group),
            lambda x: ops.all_gather(x, group=group, dim_size=2 * group.world_size**2, grad="split"),
        ]
        for call in shared:
            found = [torch.stack([call(x) for x in xs]), vmap(call)(xs)]
            torch.testing.assert_close(found[1], found[0])
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), xs)[0] for y in found))
        x = torch.randn(3, 4)
        assert torch.equal(vmap(lambda t: ops.all_reduce_(t.clone(), group=group))(x), x * group.world_size)


def check_what_is_refused() -> None:
    with Group.open() as group:
        x = torch.randn(2 * group.world_size, 6)
        for name, call in calls(group).items():
            transforms: list[Callable[[], object]] = [
                lambda call=call: grad(lambda t: call(t).sum())(x),
                lambda call=call: vjp(call, x),
                lambda call=call: jacrev(call)(x),
                lambda call=call: vmap(grad(lambda t: call(t).sum()))(x[None]),
                lambda call=call: grad(lambda t: vmap(call)(t).sum())(x[None]),
                lambda call=call: jvp(call, (x,), (x,)),
            ]
            for transform in transforms:
                with pytest.raises(NotImplementedError, match=rf"^{name.split()[0]}\b"):
                    transform()
        call = calls(group)["all_reduce"]
        assert torch.equal(grad(lambda t: (t * call(x)).sum())(x), call(x)), "x is no variable here"
        shard = grad(lambda t: layers.take_shard(t, 0, group=group).sum())(x)
        assert torch.equal(shard, torch.ones_like(x))


def test_functional_call_of_a_cut_model_gives_the_gradients_of_the_whole() -> None:
    run_ranks(check_functional_call, 2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_calls_an_op_for_each_sample() -> None:
    run_ranks(check_vmap, 2)


def test_what_torch_func_cannot_differentiate_is_refused_with_what_to_do() -> None:
    run_ranks(check_what_is_refused, 2)

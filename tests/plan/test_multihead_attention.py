"""torch's own attention, cut by heads: the module by itself, with every argument."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.multihead import CAUSAL, E, L, N, S, made, normal
from tests.harness.parallelize import close, compare_steps, part_of
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.plan.styles import attention
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks


class Alone(nn.Module):
    """A model that is nothing but attention."""

    def __init__(self, heads: int = 3, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(E, heads, **options)
        with torch.no_grad():  # biases start as zeros
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = self.attention(*args, **kwargs)
        return found


def some(*shape: int) -> Tensor:
    """A bool mask that hides some keys from a query, and never all."""
    mask = normal(*shape, seed=9) > 0.5
    mask[..., 0] = False
    return mask


# options of the module, shapes of the inputs (one shape: self-attention; two: keys are the values), arguments
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, ...]], dict[str, Any]]] = {
    "self": ({"batch_first": True, "heads": 4}, [(N, L, E)], {"need_weights": False}),
    "weights of all heads": ({}, [(L, N, E)], {"average_attn_weights": False, "key_padding_mask": some(N, L)}),
    "cross": (
        {"batch_first": True}, [(N, L, E), (N, S, E)],
        {"key_padding_mask": some(N, S), "attn_mask": normal(L, S, seed=5)},
    ),
    "three inputs": ({"bias": False}, [(L, N, E), (S, N, E), (S, N, E)], {"attn_mask": some(L, S)}),
    "other widths": (
        {"kdim": 7, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True}, [(L, N, E), (S, N, 7), (S, N, 5)],
        {"key_padding_mask": normal(N, S, seed=6), "attn_mask": normal(N * 3, L, S, seed=5)},
    ),
    "keys of another width": ({"kdim": 7, "vdim": 7}, [(L, N, E), (S, N, 7)], {"need_weights": False}),
    "a bool mask of each head": (
        {"batch_first": True, "add_bias_kv": True}, [(N, L, E)],
        {"attn_mask": some(N * 3, L, L), "key_padding_mask": some(N, L), "need_weights": False},
    ),
    "causal": ({"batch_first": True}, [(N, L, E)], {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "causal and padded": (
        {"add_zero_attn": True}, [(L, N, E)],
        {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": some(N, L)},
    ),
    "no batch": ({"batch_first": True}, [(L, E), (S, E)], {"attn_mask": normal(3, L, S, seed=5)}),
    "no batch, all heads": (
        {"heads": 6}, [(L, E)], {"average_attn_weights": False, "key_padding_mask": some(L), "attn_mask": some(L, L)},
    ),
}  # fmt: skip


def inputs_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs that differ, and query, key and value made of them."""
    found = [normal(*shape, seed=20 + i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    return found, [*found, *[found[-1]] * (3 - len(found))]


def results(model: nn.Module, shapes: list[tuple[int, ...]], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """Outputs, and the gradients of a sum of them: of the parameters, the inputs and the masks that are learned."""
    model.zero_grad()
    leaves, args = inputs_of(shapes, dtype)
    floats = {k: v.clone().to(dtype).requires_grad_() for k, v in kwargs.items() if is_float(v)}
    y, weights = model(*args, **(kwargs | floats))
    loss = (y * normal(*y.shape, seed=3).to(dtype)).sum()
    if weights is not None:
        loss = loss + (weights * normal(*weights.shape, seed=4).to(dtype)).sum()
    loss.backward()
    return y, weights, [*(x.grad for x in leaves), *(m.grad for m in floats.values())]


def check_case(group: Group, label: str, dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    options, shapes, kwargs = CASES[label]
    whole = Alone(**options).double()
    cut = parallelize(copy.deepcopy(whole).to(dtype), group=group, plan={"attention": "multihead_attention"})
    assert isinstance(cut.attention, nn.MultiheadAttention) and list(cut.state_dict()) == list(whole.state_dict())
    want, got = (results(m, shapes, kwargs, t) for m, t in ((whole, torch.float64), (cut, dtype)))
    close(got[0], want[0], f"{label}: output", tolerance)
    assert (got[1] is None) == (want[1] is None), label
    if want[1] is not None:
        close(got[1], want[1], f"{label}: weights", tolerance)
    for i, (a, b) in enumerate(zip(got[2], want[2], strict=True)):
        close(a, b, f"{label}: gradient of input {i}", tolerance)
    others = dict(whole.named_parameters())
    for name, p in cut.named_parameters():
        close(p.grad, part_of(p, others[name].grad), f"{label}: gradient of {name}", tolerance)
        assert (shard_info(p) is None) == (name == "attention.out_proj.bias"), name
    with torch.no_grad():  # where the uncut one takes a kernel of its own
        args = inputs_of(shapes, torch.float64)[1]
        y, weights = whole.eval()(*args, **kwargs)
        args = inputs_of(shapes, dtype)[1]
        again = cut.eval()(*args, **{k: v.to(dtype) if is_float(v) else v for k, v in kwargs.items()})
        close(again[0], y, f"{label}: inference", tolerance)
        if weights is not None:
            close(again[1], weights, f"{label}: weights in inference", tolerance)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check_autocast(group: Group, label: str) -> None:
    options, shapes, kwargs = CASES[label]
    whole = Alone(**options)
    cut = parallelize(copy.deepcopy(whole), group=group, plan={"attention": "multihead_attention"})
    found = []
    for model in (whole, cut):
        with torch.autocast("cpu", torch.bfloat16):
            y, _, gradients = results(model, shapes, kwargs, torch.float32)
        found.append([y, *gradients])
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype, label
        close(got.float(), want.float(), f"{label}: autocast", 16 * torch.finfo(torch.bfloat16).eps)


def dropout_is_the_ranks_own(group: Group) -> None:
    torch.manual_seed(7)
    cut = parallelize(Alone(4, dropout=0.5).train(), group=group, plan={"attention": "multihead_attention"})
    x = normal(L, N, E).float()
    y, weights = cut(x, x, x, average_attn_weights=False)
    drawn = torch.rand(())
    for value in (y.sum(), weights.sum(), drawn):
        assert len(set(group.all_gather_ints(int(abs(float(value.detach())) * 2**30)))) == 1, "the ranks drifted apart"
    dropped = weights == 0
    assert 0.3 < float(dropped.float().mean()) < 0.7
    assert not any(torch.equal(dropped[:, a], dropped[:, b]) for a in range(4) for b in range(a))
    y, _ = cut(x, x, x, need_weights=False)
    y.sum().backward()
    assert bool(cut.attention.in_proj_weight.grad.isfinite().all())


def faults_are_noticed(group: Group) -> None:
    with pytest.MonkeyPatch.context() as patch:  # every rank takes the masks of the first heads
        patch.setattr(attention, "part_start", lambda *args: 0)
        with pytest.raises(AssertionError, match="a bool mask of each head: output: off by"):
            check_case(group, "a bool mask of each head")
    with pytest.MonkeyPatch.context() as patch:  # the gradient of the input stays partial
        patch.setattr(attention, "sum_gradient", lambda *tensors, **_: tensors)
        with pytest.raises(AssertionError, match="gradient of input"):
            check_case(group, "cross")


class OneInput(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y, _ = super().forward(x, x, x, need_weights=False)
        return y * 2


def a_forward_around_that_of_the_class_stays(group: Group) -> None:
    whole = made(lambda: nn.Sequential(OneInput(E, 3), nn.Linear(E, E)))
    cut = parallelize(copy.deepcopy(whole), group=group, plan={"0": "multihead_attention", "1": "replicate"})
    outputs = [m(normal(L, N, E)) for m in (whole, cut)]
    close(outputs[1], outputs[0], "a subclass", 1e-12)
    compare_steps(cut, whole, [y.square().mean() for y in outputs], "a subclass")


def what_does_not_fit_is_refused(group: Group) -> None:
    plan = {"attention": "multihead_attention"}
    cut = parallelize(Alone().double(), group=group, plan=plan)
    x = normal(L, N, E)
    for match, kwargs in (
        (r"attn_mask must have shape \[6, 5, 5\], got \[2, 5, 5\]", {"attn_mask": some(N, L, L)}),
        (r"key_padding_mask must have shape \[2, 5\], got \[5, 2\]", {"key_padding_mask": some(L, N)}),
        ("is_causal needs attn_mask", {"is_causal": True}),
    ):
        with pytest.raises(ValueError, match=match):
            cut(x, x, x, **kwargs)
    with pytest.raises(TypeError, match=r"attn_mask must be bool or floating point, got torch.int64"):
        cut(x, x, x, attn_mask=CAUSAL.long())
    with pytest.raises(ValueError, match=r"one batch size and \(12, 12, 12\) features"):
        cut(x, x[:, :1], x[:, :1])


def every_argument_gives_what_the_uncut_module_gives() -> None:
    with Group.open() as group:
        for label in CASES:
            check_case(group, label)
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if group.world_size == 2 else ():
            tolerance = 60 * torch.finfo(dtype).eps
            for label in ("self", "cross"):
                check_case(group, label, dtype, tolerance)
        for label in ("self", "cross", "other widths") if group.world_size == 2 else ():
            check_autocast(group, label)
        if group.world_size == 2:
            more_of_the_module(group)


def more_of_the_module(group: Group) -> None:
    dropout_is_the_ranks_own(group)
    faults_are_noticed(group)
    a_forward_around_that_of_the_class_stays(group)
    what_does_not_fit_is_refused(group)


@pytest.mark.parametrize("R", [1, 2, 3])
def test_every_argument_gives_what_the_uncut_module_gives(R: int) -> None:
    run_ranks(every_argument_gives_what_the_uncut_module_gives, R)

"""torch's own attention, cut by heads: the module by itself, and models of torch that a derived plan cuts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parallelize_tools import close, part_of
from torch import Tensor, nn

from tpkernels.group import Group
from tpkernels.plan import parallelize
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

N, L, S, E = 2, 5, 4, 12


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


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(*shape: int) -> Tensor:
    """A bool mask that hides some keys from a query, and never all."""
    mask = normal(*shape, seed=9) > 0.5
    mask[..., 0] = False
    return mask


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
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


def every_argument_gives_what_the_uncut_module_gives() -> None:
    with Group.open() as group:
        for label in CASES:
            check_case(group, label)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tolerance = 60 * torch.finfo(dtype).eps
            for label in ("self", "cross"):
                check_case(group, label, dtype, tolerance)


@pytest.mark.parametrize("R", [1, 2, 3])
def test_every_argument_gives_what_the_uncut_module_gives(R: int) -> None:
    run_ranks(every_argument_gives_what_the_uncut_module_gives, R)

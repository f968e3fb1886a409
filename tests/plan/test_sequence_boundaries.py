"""Sequence parallel where linears are children of the layer, where norms lie beside them, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness.parallelize import check_training, close, compare_steps, ids, tiny
from tests.harness.ranks import nightly
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.plan.api import parallelize
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")

RIGHT: dict[str, dict[str, Any]] = {
    "biogpt": {},
    "ctrl": {"n_embd": 36, "n_layer": 2, "n_head": 9, "dff": 50, "n_positions": 64},
    "bert": {"is_decoder": True},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({"ffn_dim": 50, "word_embed_proj_dim": 36}, r"in model.decoder.layers.0: it gets \[12, 36\]"),
}


class Attention(nn.Module):
    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 9
        self.q, self.k, self.v, self.o = (nn.Linear(36, 36) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return y


class Layer(nn.Module):
    """The two linears of the MLP are children of the layer; `odd` names what does not go token by token."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.attn, self.odd = Attention(), odd
        self.ln1, self.ln2, self.fc1, self.fc2 = (
            nn.LayerNorm(36),
            nn.LayerNorm(36),
            nn.Linear(36, 50),
            nn.Linear(50, 36),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        if self.odd == "sums":
            x = x + 0.1 * x.cumsum(1)
        elif self.odd == "places":
            x = x + torch.arange(x.size(1), dtype=x.dtype)[:, None] / 100
        elif self.odd == "counts":
            x = x * float(x.size(1))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.ln2(x))))
        return y


class Decoder(nn.Module):
    def __init__(self, odd: str = "") -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(67, 36), nn.ModuleList(Layer(odd) for _ in range(2))
        self.head = nn.Linear(36, 67)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def check_boundaries() -> None:
    with Group.open() as group:
        for name, changes in RIGHT.items():
            check_training(tiny(name, **changes), group, f"{name} with cut tokens", sequence_parallel=True)
        torch.manual_seed(0)
        whole = Decoder().double()
        torch.manual_seed(0)
        cut = parallelize(Decoder().double(), group=group, sequence_parallel=True)
        y, want = cut(ids()), whole(ids())
        close(y, want, "a decoder of one's own", 1e-10)
        compare_steps(cut, whole, [t.square().mean() for t in (want, y)], "a decoder of one's own")
        for name, (changes, says) in REFUSED.items():
            model = tiny(name, **changes)
            with pytest.raises(PlanError, match=says):
                parallelize(model, group=group, sequence_parallel=True)
            assert not hasattr(model, "tpk_plan")
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)
        for odd, says in (
            ("sums", "tokens do not stay apart"),
            ("places", "not stay apart"),
            ("counts", "other steps"),
        ):
            with pytest.raises(PlanError, match=says):
                parallelize(Decoder(odd), group=group, sequence_parallel=True)


@pytest.mark.parametrize("R", [3, *nightly(2)])
def test_layers_are_right_with_cut_tokens_or_refused_before_the_cut(R: int) -> None:
    run_ranks(check_boundaries, R)

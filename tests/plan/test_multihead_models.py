"""Models of torch's own attention: encoders, decoders, vision transformers, cut by the plan derived for them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tests.harness.multihead import CAUSAL, E, L, N, S, made, normal
from tests.harness.parallelize import close, compare_steps, part_of
from tpkernels import checkpoint, parallelize
from tpkernels.comm.group import Group
from tpkernels.data_parallel import clip_grad_norm_
from tpkernels.errors import PlanError
from tpkernels.plan.adapters.apply import cut_adapters
from tpkernels.plan.rules import Plan
from tpkernels.plan.state_dict import full_state_dict
from tpkernels.plan.table import plan_table
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks


class Pictures(nn.Module):
    """A vision transformer as torchvision and open_clip build it: patches, a token of its own, torch's attention."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, E, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, E))
        self.blocks = nn.ModuleList(PictureBlock(heads) for _ in range(2))
        self.head = nn.Linear(E, 7)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x[:, 0])
        return y


class PictureBlock(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.before, self.behind = nn.LayerNorm(E), nn.LayerNorm(E)
        self.attention = nn.MultiheadAttention(E, heads, batch_first=True)
        self.up, self.down = nn.Linear(E, 17), nn.Linear(17, E)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.down(self.up(self.behind(x)).relu())


def encoder(heads: int = 3, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, heads, 17, **({"dropout": 0.0, "batch_first": True} | options))
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E), enable_nested_tensor=heads % 2 == 0)


def decoder() -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 3, 17, dropout=0.0, norm_first=True), 2)


PADDED = torch.tensor([[False] * L, [False] * 3 + [True] * (L - 3)])
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "encoder": (encoder, lambda m: m(normal(N, L, E), src_key_padding_mask=PADDED)),
    "decoder": (
        decoder,
        lambda m: m(
            normal(L, N, E), normal(S, N, E, seed=2), tgt_mask=CAUSAL, tgt_is_causal=True,
            memory_key_padding_mask=PADDED[:, :S],
        ),
    ),
    "pictures": (Pictures, lambda m: m(normal(N, 3, 8, 8))),
}  # fmt: skip


def pair(group: Group, make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    whole = made(make)
    return whole, parallelize(copy.deepcopy(whole), group=group, **options)


def models_are_trained_as_the_uncut_ones(group: Group) -> None:
    for label, (make, call) in MODELS.items():
        whole, cut = pair(group, make)
        attention = [m for m in cut.modules() if isinstance(m, nn.MultiheadAttention)]
        assert str(cut.tpk_plan).count(f"{len(attention)} attention blocks 3 heads over {group.world_size} ranks as")
        assert not [name for name in cut.tpk_plan.whole if name != "head"], cut.tpk_plan
        if group.world_size > 1:
            assert sum(p.numel() for p in cut.parameters()) < 0.9 * sum(p.numel() for p in whole.parameters())
        outputs = [call(m) for m in (whole, cut)]
        close(outputs[1], outputs[0], f"{label}: output", 1e-12)
        compare_steps(cut, whole, [y.square().mean() for y in outputs], label)
        outputs = [call(m) for m in (whole, cut)]
        norms = []
        for model, y in zip((whole, cut), outputs, strict=True):
            model.zero_grad()
            y.square().mean().backward()
            norms.append(
                clip_grad_norm_(model, 0.1, groups=group) if model is cut
                else nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            )  # fmt: skip
        close(norms[1], norms[0], f"{label}: norm", 1e-10)


def inference_never_hands_parts_to_kernels_for_whole_weights(group: Group) -> None:
    taken: list[int] = []
    kernel = torch._transformer_encoder_layer_fwd

    def watched(*args: Any) -> Tensor:
        taken.append(1)
        y: Tensor = kernel(*args)
        return y

    x = normal(N, L, E)
    for make, given, seen in (
        (lambda: encoder(4), x, ~PADDED),
        (lambda: encoder(4, batch_first=False), x.transpose(0, 1), ~PADDED.T),
    ):
        whole, cut = (m.eval() for m in pair(group, make))
        taken.clear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "_transformer_encoder_layer_fwd", watched)
            want, padded = whole(given), whole(given, src_key_padding_mask=PADDED)
            assert bool(taken) == (given is x), "the uncut encoder takes its kernel, or this shows nothing"
            taken.clear()
            close(cut(given), want, "inference", 1e-12)
            got = cut(given, src_key_padding_mask=PADDED)
            assert not taken
        close(got[seen], padded[seen], "inference with padding", 1e-12)  # torch's kernel makes the padded tokens zeros
    rules = {"*.linear1": "column", "*.linear2": "row", "*.out_proj": "replicate"}  # the attention stays whole
    whole, cut = (m.eval() for m in pair(group, lambda: encoder(4), plan=rules))
    with torch.no_grad():
        close(cut(x), whole(x), "inference, hidden units cut", 1e-12)
    _, cut = pair(group, encoder)
    nested = torch.nested.nested_tensor([x[0], x[1]])
    with pytest.raises(ValueError, match="must be padded tensors, got a nested one"):
        cut.layers[0].self_attn(nested, nested, nested)


def a_copy_a_pickle_a_recomputation_and_a_compiled_one_give_the_same(group: Group) -> None:
    for label in ("decoder", "pictures"):
        make, call = MODELS[label]
        whole, cut = pair(group, make)
        compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
        compare_steps(cut, whole, [call(whole).mean(), call(compiled).mean()], f"{label}: compiled")
    want = call(cut)
    for again in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        close(call(again), want, "copy", 0.0)
        assert all((shard_info(p) is None) == (shard_info(q) is None) for p, q in both(again, cut))
    for model in (whole, cut):
        model.zero_grad()
    losses = [call(whole).mean(), recomputed(call, cut, use_reentrant=False).mean()]
    compare_steps(cut, whole, losses, "recomputed")


def both(a: nn.Module, b: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    return zip(a.parameters(), b.parameters(), strict=True)


def uses(folder: str) -> None:
    with Group.open() as group:
        models_are_trained_as_the_uncut_ones(group)
        inference_never_hands_parts_to_kernels_for_whole_weights(group)
        if group.world_size == 2:
            a_copy_a_pickle_a_recomputation_and_a_compiled_one_give_the_same(group)
            with pytest.raises(PlanError, match="sequence_parallel does not apply"):
                parallelize(encoder(), group=group, sequence_parallel=True)
            _, cut = pair(group, encoder)
            checkpoint.save(cut, folder, group=group)
        else:  # what two ranks have saved
            whole, cut = pair(group, encoder)
            with torch.no_grad():
                for parameter in cut.parameters():
                    parameter.zero_()
            checkpoint.load(cut, folder, group=group)
            for p, q in both(cut, whole):
                assert torch.equal(p, part_of(p, q))
            state, want = full_state_dict(cut, group), whole.state_dict()
            assert list(state) == (list(want) if group.rank == 0 else [])
            assert all(torch.equal(value, want[name]) for name, value in state.items())


@pytest.mark.nightly
def test_models_of_torch_are_trained_used_and_saved_like_the_uncut_ones(tmp_path: Path) -> None:
    for R in (2, 3, 1):
        run_ranks(uses, R, str(tmp_path / "saved"))


def test_a_plan_says_how_heads_are_cut_before_any_rank_is_there() -> None:
    model = encoder(4)
    plan = Plan.resolve(model)
    table = plan_table(model, plan, 3)
    assert table.heads == {"4 heads over 3 ranks as 2+1+1": 2}
    rows = {row.name: (row.style, row.shape, row.parts) for row in table.rows}
    assert rows["layers.*.self_attn"] == ("multihead_attention", "36 x 12", "out 18+9+9")
    assert rows["layers.*.self_attn.out_proj"] == ("row", "12 x 12", "in 6+3+3")
    with pytest.raises(PlanError, match=r"layers.0.self_attn has 4 heads, which leaves some of 5 ranks with none"):
        plan_table(model, plan, 5)


class OwnForward(nn.MultiheadAttention):
    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return query @ self.in_proj_weight[:E]


def test_what_is_no_attention_of_torch_cannot_have_the_style() -> None:
    model = encoder()
    with pytest.raises(PlanError, match="Plan: 0 cannot be cut as 'multihead_attention': it is a Linear"):
        Plan({"*": "multihead_attention"}, strict=False).styles(nn.Sequential(model.layers[0].linear1))
    model.layers[0].self_attn.__class__ = OwnForward
    rules = {"*.self_attn": "multihead_attention", "*.linear?": "replicate"}
    with pytest.raises(PlanError, match="OwnForward with a forward of its own"):
        Plan(rules).styles(model)
    with pytest.raises(PlanError, match="out_proj is sharded with its heads, as 'row'; got 'column'"):
        Plan(rules | {"*.out_proj": "column"}).styles(encoder())
    with pytest.raises(PlanError, match="as 'row'; got 'row:units=8'"):
        Plan(rules | {"*.out_proj": "row:units=8"}).styles(encoder())
    assert Plan(rules | {"*.out_proj": "row"}).styles(encoder()).keys() == Plan(rules).styles(encoder()).keys()


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("attention", r"blocks\.0\.attention must adapt a column or row layer, .* got a ByHeadsMultiheadAttention"),
        ("out_proj", r"blocks\.0\.attention\.out_proj must be a layer whose forward is called; .* adapt other layers"),
    ],
)
def test_adapters_of_attention_that_is_cut_as_one_module_are_refused(target: str, why: str) -> None:
    peft = pytest.importorskip("peft")
    with Group.open() as group:
        cut = parallelize(Pictures(), group=group)
        with pytest.raises(PlanError, match=why):
            cut_adapters(peft.get_peft_model(cut, peft.LoraConfig(r=2, target_modules=[target, "up"])))
        beside = parallelize(Pictures(), group=group)
        cut_adapters(peft.get_peft_model(beside, peft.LoraConfig(r=2, target_modules=["up", "down"])))
        assert beside(normal(1, 3, 8, 8).float()).shape == (1, 7)

"""torch's own attention, cut by heads: the module by itself, and models of torch that a derived plan cuts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parallelize_tools import close, compare_steps, part_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tpkernels import checkpoint, parallelize, plan_attention
from tpkernels.data_parallel import clip_grad_norm_
from tpkernels.group import Group
from tpkernels.plan import Plan, PlanError
from tpkernels.plan_save import full_state_dict
from tpkernels.plan_table import plan_table
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


@pytest.mark.parametrize("R", [1, 2, 3])
def test_every_argument_gives_what_the_uncut_module_gives(R: int) -> None:
    run_ranks(every_argument_gives_what_the_uncut_module_gives, R)


# ---- models --------------------------------------------------------------------------------------------------------


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
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E))


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


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


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


def dropout_is_the_ranks_own(group: Group) -> None:
    torch.manual_seed(7)
    cut = parallelize(Alone(4, dropout=0.5).train(), group=group, plan={"attention": "multihead_attention"})
    x = normal(L, N, E).float()
    y, weights = cut(x, x, x, average_attn_weights=False)
    drawn = torch.rand(())
    for value in (y.sum(), weights.sum(), drawn):
        assert len(set(group.exchange_sizes(int(abs(float(value.detach())) * 2**30)))) == 1, "the ranks drifted apart"
    dropped = weights == 0
    assert 0.3 < float(dropped.float().mean()) < 0.7
    assert not any(torch.equal(dropped[:, a], dropped[:, b]) for a in range(4) for b in range(a))
    y, _ = cut(x, x, x, need_weights=False)
    y.sum().backward()
    assert bool(cut.attention.in_proj_weight.grad.isfinite().all())


def faults_are_noticed(group: Group) -> None:
    with pytest.MonkeyPatch.context() as patch:  # every rank takes the masks of the first heads
        patch.setattr(plan_attention, "part_start", lambda *args: 0)
        with pytest.raises(AssertionError, match="a bool mask of each head: output: off by"):
            check_case(group, "a bool mask of each head")
    with pytest.MonkeyPatch.context() as patch:  # the gradient of the input stays partial
        patch.setattr(plan_attention, "sum_gradient", lambda *tensors, **_: tensors)
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
    with pytest.raises(PlanError, match="sequence_parallel does not apply"):
        parallelize(made(encoder), group=group, sequence_parallel=True)


def uses(folder: str) -> None:
    with Group.open() as group:
        models_are_trained_as_the_uncut_ones(group)
        inference_never_hands_parts_to_kernels_for_whole_weights(group)
        if group.world_size == 2:
            a_copy_a_pickle_a_recomputation_and_a_compiled_one_give_the_same(group)
            dropout_is_the_ranks_own(group)
            faults_are_noticed(group)
            a_forward_around_that_of_the_class_stays(group)
            what_does_not_fit_is_refused(group)
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


def test_models_of_torch_are_trained_used_and_saved_like_the_uncut_ones(tmp_path: Path) -> None:
    for R in (2, 3):
        run_ranks(uses, R, str(tmp_path / "saved"))


# ---- plans ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(PlanError, match="out_proj is cut with its heads, as 'row'; its rule says 'column'"):
        Plan(rules | {"*.out_proj": "column"}).styles(encoder())
    assert Plan(rules | {"*.out_proj": "row"}).styles(encoder()).keys() == Plan(rules).styles(encoder()).keys()

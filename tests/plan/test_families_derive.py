"""Plans derived from one run of a model: what is cut, in which units, and what stays whole and why. No ranks needed."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from tests.harness.families import HomeMade, ScalesByWidth, TalkingHeads, UsedTwice, UsesWeightDirectly, build
from tests.harness.memory import PeakMemory, needs_mallinfo2
from tpkernels.errors import DeriveError
from tpkernels.plan.derive.groups import segments
from tpkernels.plan.derive.names import generalise, resolve
from tpkernels.plan.derive.search import derive, derive_plan


def cut(model: nn.Module) -> dict[str, str]:
    """The derived plan without what stays whole."""
    return {glob: style for glob, style in derive_plan(model).items() if style != "replicate"}


def heads(where: str, *names: str, units: int = 6) -> dict[str, str]:
    """Rules of an attention block: the last name is the layer that takes the heads."""
    *columns, row = [f"{where}.{name}" for name in names]
    return dict.fromkeys(columns, f"column:units={units}") | {row: f"row:units={units}"}


def hidden(where: str, *names: str) -> dict[str, str]:
    *columns, row = [f"{where}.{name}" for name in names]
    return dict.fromkeys(columns, "column") | {row: "row"}


def bart_like(where: str, attention: str = "self_attn") -> dict[str, str]:
    return heads(f"{where}.{attention}", "k_proj", "v_proj", "q_proj", "out_proj")


T5 = "block.*.layer.*"
LLAMA = heads("L.self_attn", "q_proj", "k_proj", "v_proj", "o_proj", units=3)
LLAMA |= hidden("L.mlp", "gate_proj", "up_proj", "down_proj")
EXPECTED = {
    "bert": {"bert.embeddings.word_embeddings": "vocab", "cls.predictions.decoder": "vocab_head"}
    | heads("bert.encoder.layer.*.attention", "self.query", "self.key", "self.value", "output.dense")
    | hidden("bert.encoder.layer.*", "intermediate.dense", "output.dense"),
    "distilbert": {"distilbert.embeddings.word_embeddings": "vocab", "vocab_projector": "vocab_head"}
    | heads("distilbert.transformer.layer.*.attention", "q_lin", "k_lin", "v_lin", "out_lin")
    | hidden("distilbert.transformer.layer.*.ffn", "lin1", "lin2"),
    "t5": {"shared": "vocab", "encoder.embed_tokens": "vocab", "decoder.embed_tokens": "vocab", "lm_head": "vocab_head"}
    | heads(f"encoder.{T5}.SelfAttention", "q", "k", "v", "o")
    | heads(f"decoder.{T5}.SelfAttention", "q", "k", "v", "o")
    | heads(f"decoder.{T5}.EncDecAttention", "q", "k", "v", "o")
    | {f"{side}.{T5}.SelfAttention.relative_attention_bias": "column" for side in ("encoder", "decoder")}
    | hidden(f"encoder.{T5}.DenseReluDense", "wi", "wo")
    | hidden(f"decoder.{T5}.DenseReluDense", "wi", "wo"),
    "vit": heads("vit.layers.*.attention", "q_proj", "k_proj", "v_proj", "o_proj")
    | hidden("vit.layers.*.mlp", "fc1", "fc2"),
    "clip": {"text_model.embeddings.token_embedding": "vocab"}
    | bart_like("text_model.encoder.layers.*") | hidden("text_model.encoder.layers.*.mlp", "fc1", "fc2")
    | bart_like("vision_model.encoder.layers.*") | hidden("vision_model.encoder.layers.*.mlp", "fc1", "fc2"),
    "llava": {"model.language_model.embed_tokens": "vocab", "lm_head": "vocab_head"}
    | {k.replace("L.", "model.language_model.layers.*."): v for k, v in LLAMA.items()}
    | bart_like("model.vision_tower.encoder.layers.*")
    | hidden("model.vision_tower.encoder.layers.*.mlp", "fc1", "fc2"),
    "whisper": {"model.decoder.embed_tokens": "vocab", "proj_out": "vocab_head"}
    | bart_like("model.encoder.layers.*") | hidden("model.encoder.layers.*", "fc1", "fc2")
    | bart_like("model.decoder.layers.*") | bart_like("model.decoder.layers.*", "encoder_attn")
    | hidden("model.decoder.layers.*", "fc1", "fc2"),
    "gpt2": {"transformer.wte": "vocab", "lm_head": "vocab_head"}
    | {"transformer.h.*.attn.c_attn": "packed_column:3:units=6", "transformer.h.*.attn.c_proj": "row:units=6"}
    | hidden("transformer.h.*.mlp", "c_fc", "c_proj"),
    "phi3": {"model.embed_tokens": "vocab", "lm_head": "vocab_head"}
    | {"model.layers.*.self_attn.qkv_proj": "packed_column:24,12,12:units=3"}
    | {"model.layers.*.self_attn.o_proj": "row:units=3", "model.layers.*.mlp.gate_up_proj": "packed_column:2"}
    | {"model.layers.*.mlp.down_proj": "row"},
    "qwen3": {"model.embed_tokens": "vocab", "lm_head": "vocab_head"}
    | {k.replace("L.", "model.layers.*."): v for k, v in LLAMA.items()}
    | dict.fromkeys(("model.layers.*.self_attn.q_norm", "model.layers.*.self_attn.k_norm"), "sum_grad"),
    # The fused projections of GPT-NeoX lie head by head, so that they are cut like a plain one.
    "gpt_neox": {"gpt_neox.embed_in": "vocab", "lm_head": "vocab_head"}
    | heads("gpt_neox.layers.*.attention", "query_key_value", "dense")
    | hidden("gpt_neox.layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    # Attention adds a constant for each head of all (ALiBi), which a rank with some of the heads would have to cut.
    "bloom": {"transformer.word_embeddings": "vocab", "lm_head": "vocab_head"}
    | hidden("transformer.h.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    # Its relative bias is a parameter of its own and no embedding.
    "swin": hidden("swin.encoder.layers.*.blocks.*.mlp", "fc1", "fc2"),
    "home_made": {"glossary": "vocab", "spell": "vocab_head"}
    | {"stack.*.mix.abc": "packed_column:3:units=6", "stack.*.mix.back": "row:units=6"}
    | {"stack.*.mix": "counts:lanes,span:units=6", "stack.*.mix.gain": "sum_grad"}
    | hidden("stack.*", "wide", "gate", "narrow"),
    "interleaved": {"glossary": "vocab", "spell": "vocab_head"}
    | {"stack.*.mix.abc": "column:units=6", "stack.*.mix.back": "row:units=6"}
    | {"stack.*.mix": "counts:lanes,span:units=6", "stack.*.mix.gain": "sum_grad"}
    | hidden("stack.*", "wide", "gate", "narrow"),
}  # fmt: skip


def same_styles(model: nn.Module, plan: dict[str, str], expected: dict[str, str]) -> None:
    """Module by module, because exceptions may be said in several ways."""
    for name, _ in model.named_modules():
        got = resolve(plan, name) or "replicate"
        assert got == (resolve(expected, name) or "replicate"), name


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_cut_in_a_family_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = build(family)
    expected = EXPECTED[family]
    order = sorted(expected, key=lambda glob: "attention.output" in glob)  # the longer glob of two counts
    same_styles(model, cut(model), {glob: expected[glob] for glob in order})


def test_a_real_model_gets_the_plan_of_its_meta_twin_and_is_left_as_it_was() -> None:
    model = build("bert").train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        twin = build("bert")
    assert derive_plan(model) == derive_plan(twin)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 24


def test_the_plan_covers_every_linear_and_every_embedding() -> None:
    for family in ("clip", "llava", "home_made"):
        with torch.device("meta"):
            model = build(family)
        plan = derive_plan(model)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                assert resolve(plan, name) is not None, name


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (UsedTwice, r"up, down: they meet in native_layer_norm in norm"),
        (UsesWeightDirectly, "down: its weight is used outside of its forward"),
        (ScalesByWidth, r"up: cut, it would go wrong in the model: div with .* instead of div with"),
        (TalkingHeads, "q, k, v: they meet in bmm in the model"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), "0: they meet in native_layer_norm in 1"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "0: it leaves the model"),
    ],
    ids=["used_twice", "weight_used_directly", "scales_by_width", "talking_heads", "norm", "one_linear"],
)
def test_what_cannot_be_cut_is_refused_with_the_module_and_the_reason(model: type[nn.Module], why: str) -> None:
    with pytest.raises(DeriveError, match=r"nothing in .* can be cut") as error:
        derive_plan(model())
    assert re.search(why, str(error.value)), error.value


def test_a_block_that_is_half_understood_stays_whole_and_its_neighbour_is_cut() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.up, self.down = UsedTwice(), nn.Linear(8, 20), nn.Linear(20, 8)
            self.idle = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(self.bad(x)).relu())

    found = derive(Both())
    whole = dict.fromkeys(("bad.up", "bad.down", "idle"), "replicate")
    assert found.plan == whole | {"up": "column", "down": "row"}
    assert found.whole[-1] == (["idle"], "the run did not reach them")
    assert {names[0]: why for names, why in found.whole}["bad.up"] == "they meet in native_layer_norm in bad.norm"


class Around(nn.Module):
    """torch's own encoder layer, and linears behind it."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, heads, 16, batch_first=True)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.inner(x)).relu())


class LeavesItOut(Around):
    """The attention is there and not used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x + self.inner._ff_block(x)).relu())


class ReadsAttention(Around):
    """The weights of the attention are used past its forward, where a part of them would be taken for the whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.inner.self_attn.in_proj_weight.mean())


def test_torchs_own_attention_is_cut_by_heads_and_its_encoder_layer_around_it() -> None:
    hidden_layers = {"inner.linear1": "column", "inner.linear2": "row", "up": "column", "down": "row"}
    assert derive_plan(Around()) == {"inner.self_attn": "multihead_attention"} | hidden_layers
    for model, why in (
        (Around(heads=1), "it has one head"),
        (ReadsAttention(), "its in_proj_weight is used outside of its forward"),
        (LeavesItOut(), "the run did not reach it"),
    ):
        found = derive(model)
        assert found.plan == {"inner.self_attn.out_proj": "replicate"} | hidden_layers
        assert {names[0]: reason for names, reason in found.whole}["inner.self_attn"] == why


class ImagesAndTexts(nn.Module):
    """Takes either or both, images of one size and texts of one length, as open_clip's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.context_length, self.image_size = 9, (24, 16)
        self.table, self.places = nn.Embedding(61, 8), nn.Parameter(torch.zeros(9, 8))
        self.patch, self.patches = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.zeros(6, 8))
        self.read, self.look = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, image: torch.Tensor | None = None, text: torch.Tensor | None = None) -> list[torch.Tensor]:
        found = []
        if image is not None:
            found.append(self.look(self.patch(image).flatten(2).transpose(1, 2) + self.patches))
        if text is not None:
            found.append(self.read(self.table(text) + self.places))
        return found


def test_sample_inputs_of_images_and_texts_come_in_the_size_the_length_and_the_dtype_of_the_model() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = derive(ImagesAndTexts().to(dtype))
        assert not any("reach" in why for _, why in found.whole), found.whole
        assert found.plan == {"table": "vocab"} | {
            f"{side}.{name}": style
            for side in ("read", "look")
            for name, style in (("self_attn", "multihead_attention"), ("linear1", "column"), ("linear2", "row"))
        }


def test_a_feature_that_becomes_a_number_is_needed_on_every_rank() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.up(x).relu()
            return self.down(hidden) * float(hidden[0, 0, 3])

    with pytest.raises(DeriveError, match="up, down: they meet in _local_scalar_dense in the model"):
        derive_plan(Branches(), inputs=((torch.zeros(1, 2, 8),), {}))


def test_a_parameter_inside_the_cut_that_is_also_used_outside_of_it_keeps_its_block_whole() -> None:
    class Shared(nn.Module):
        def __init__(self, outside: bool) -> None:
            super().__init__()
            self.up, self.down, self.gain = nn.Linear(8, 20), nn.Linear(20, 8), nn.Parameter(torch.ones(1))
            self.outside = outside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(self.up(x).relu() * self.gain)
            return y * self.gain if self.outside else y

    inside = derive_plan(nn.Sequential(Shared(outside=False)))
    assert {name: resolve(inside, name) for name in ("0", "0.up", "0.down")} == {
        "0": "sum_grad", "0.up": "column", "0.down": "row",
    }  # fmt: skip
    with pytest.raises(DeriveError, match=r"0\.gain also meets features that stay whole"):
        derive_plan(nn.Sequential(Shared(outside=True)))
    with pytest.raises(DeriveError, match="gain meets them, and no rule can name the model itself"):
        derive_plan(Shared(outside=False))


def test_dropout_between_modules_in_which_no_rank_can_draw_its_own_numbers_keeps_them_whole() -> None:
    class Up(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.lift, self.drop = nn.Linear(8, 20), nn.Dropout(rate)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.lift(x).relu())

    def model(rate: float) -> nn.Module:
        return nn.Sequential(Up(rate), nn.Sequential(nn.Linear(20, 8)))

    assert set(derive_plan(model(0.0)).values()) == {"column", "row"}
    with pytest.raises(DeriveError, match=r"0\.drop drops what is cut"):
        derive_plan(model(0.1))
    for rate, second in ((0.0, "column"), (0.1, "replicate")):
        stretches = nn.Sequential(*(nn.Linear(8, 8) if i % 2 == 0 else nn.Dropout(rate) for i in range(7)))
        assert [derive_plan(stretches)[name] for name in ("0", "4")] == ["column", second]


def test_of_a_chain_of_linears_every_second_pair_is_cut() -> None:
    chain = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.ReLU())))
    assert [derive_plan(chain).get(str(2 * i)) for i in range(5)] == ["column", "row", "column", "row", "replicate"]


def test_a_model_that_cannot_be_called_is_refused_and_runs_with_inputs_that_are_given() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.down(self.up(batch["x"]).relu())

    with pytest.raises(DeriveError, match=r"Asks could not be run on sample inputs \(.*give inputs="):
        derive_plan(Asks())
    plan = derive_plan(Asks(), inputs=(({"x": torch.zeros(3, 8)},), {}))
    assert plan == {"up": "column", "down": "row"}


def test_a_model_that_looks_at_values_runs_on_real_tensors() -> None:
    class Looks(HomeMade):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(ids)
            return logits if logits.sum().item() < 1e9 else -logits

    assert derive_plan(Looks()) == derive_plan(HomeMade())
    with torch.device("meta"), pytest.raises(DeriveError, match="could not be run"):
        derive_plan(Looks())


def test_layers_that_differ_from_the_others_keep_their_names() -> None:
    styles = {f"h.{i}.a": "column" for i in range(4)} | {"h.2.a": "replicate", "h.0.b.a": "row"}
    plan = generalise(styles, [*styles, "h.1.c"])
    assert all(resolve(plan, name) == style for name, style in styles.items())
    assert plan["h.*.a"] == "column"
    assert plan["h.2.a"] == "replicate"
    assert resolve(plan, "h.1.c") is None


def test_segments_are_whole_runs_of_all_units_in_order() -> None:
    import numpy as np

    assert segments(np.array([7, 7, 9, 9]), [7, 9]) == [4]
    assert segments(np.array([7, 7, 9, 9, 7, 9]), [7, 9]) == [4, 2]
    assert segments(np.array([7, 9, 9, 7]), [7, 9]) is None
    assert segments(np.array([7, 7, 9]), [7, 9]) is None
    assert segments(np.array([9, 7]), [7, 9]) is None


class LongAttention(nn.Module):
    """Two heads over as many tokens as an image of 1024 x 1024 has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y(x).unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)).flatten(0, 1)
        v = torch.cat([x.new_zeros(0), v], -2)  # as an empty cache and the first values
        weights = torch.cat([scores, scores[..., :1]], -1).softmax(-1)[..., :-1].unflatten(0, (len(x), -1))
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@needs_mallinfo2
def test_labels_of_scores_take_no_memory_for_each_pair_of_tokens() -> None:
    tokens = 2048
    with torch.device("meta"):
        model = LongAttention()
    derive_plan(model, inputs=((torch.zeros(1, 6, 8),), {}))  # so that nothing is imported for the first time below
    with PeakMemory() as peak:
        plan = derive_plan(model, inputs=((torch.zeros(1, tokens, 8),), {}))
    assert plan == dict.fromkeys("kvq", "column:units=2") | {"o": "row:units=2"}
    assert peak.bytes < 2 * tokens**2, "less than 1 byte a score, where a label has 8"


class ByExperts(nn.Module):
    """A product of groups of rows, each with the matrix of an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.experts = nn.Parameter(torch.zeros(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.down(self.up(x).relu()).flatten(0, 1)
        ends = torch.tensor([2, 5, rows.size(0)], dtype=torch.int32)
        return torch.nn.functional.grouped_mm(rows, self.experts, offs=ends)


def test_grouped_products_are_followed_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        with torch.device("meta"):
            model = ByExperts().to(dtype)
        assert cut(model) == {"up": "column", "down": "row"}, dtype

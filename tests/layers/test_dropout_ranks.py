"""Random numbers of cut models: after steps with every dropout on, all ranks hold the same replicated parameters."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.harness.parallelize import ids
from tpkernels import layers
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers.block_random import NOW
from tpkernels.plan.api import parallelize
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 67, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 9}
TEXT = SIZES | {"intermediate_size": 50, "max_position_embeddings": 40, "pad_token_id": 0}
HIDDEN = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
BART = {
    "vocab_size": 67, "d_model": 36, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 9,
    "decoder_attention_heads": 9, "encoder_ffn_dim": 50, "decoder_ffn_dim": 50, "dropout": 0.2, "pad_token_id": 0,
    "attention_dropout": 0.2, "activation_dropout": 0.2, "max_position_embeddings": 40, "decoder_start_token_id": 1,
}  # fmt: skip
OPT = {
    "vocab_size": 67, "hidden_size": 36, "ffn_dim": 50, "num_hidden_layers": 2, "num_attention_heads": 9,
    "max_position_embeddings": 40, "dropout": 0.2, "attention_dropout": 0.2, "pad_token_id": 0,
}  # fmt: skip
DEBERTA = TEXT | HIDDEN | {
    "type_vocab_size": 0, "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
}  # fmt: skip
GPT2 = {
    "vocab_size": 67, "n_embd": 36, "n_layer": 2, "n_head": 9, "n_positions": 40, "attn_pdrop": 0.2,
    "resid_pdrop": 0.2, "embd_pdrop": 0.2,
}  # fmt: skip


def build(name: str, attention: str = "eager") -> nn.Module:
    """A tiny model of a family, all of whose dropouts drop."""
    import transformers as hf

    def of(cls: Any, config: Any) -> nn.Module:
        config._attn_implementation = attention
        return cls(config)

    torch.manual_seed(0)
    t5 = {"vocab_size": 67, "d_model": 36, "d_kv": 4, "d_ff": 50, "num_layers": 2, "num_heads": 9, "dropout_rate": 0.2}
    mpt = {"vocab_size": 67, "d_model": 36, "n_layers": 2, "n_heads": 9, "max_seq_len": 40, "resid_pdrop": 0.2}
    wav = {
        "vocab_size": 32,
        "num_feat_extract_layers": 1,
        "conv_dim": (8,),
        "conv_stride": (200,),
        "conv_kernel": (200,),
    }
    wav |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}
    makers: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: of(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT, num_key_value_heads=3, attention_dropout=0.2)),
        "gpt2": lambda: of(hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
        "bert": lambda: of(hf.BertForSequenceClassification, hf.BertConfig(**TEXT, **HIDDEN, classifier_dropout=0.2)),
        "deberta": lambda: of(hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config(**DEBERTA)),
        "deberta-shared": lambda: of(
            hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config(**DEBERTA, share_att_key=True)
        ),
        "opt": lambda: of(hf.OPTForCausalLM, hf.OPTConfig(**OPT, word_embed_proj_dim=36)),
        "opt-350m": lambda: of(
            hf.OPTForCausalLM, hf.OPTConfig(**OPT, word_embed_proj_dim=20, do_layer_norm_before=False)
        ),
        "t5": lambda: of(hf.T5ForConditionalGeneration, hf.T5Config(**t5, decoder_start_token_id=0)),
        "bart": lambda: of(hf.BartForConditionalGeneration, hf.BartConfig(**BART)),
        "whisper": lambda: of(
            hf.WhisperForConditionalGeneration,
            hf.WhisperConfig(
                **{k: v for k, v in BART.items() if k != "max_position_embeddings"}, num_mel_bins=8,
                max_source_positions=10, max_target_positions=16, bos_token_id=1, eos_token_id=2,
            ),
        ),
        "vit": lambda: of(
            hf.ViTForImageClassification,
            hf.ViTConfig(
                **{k: v for k, v in TEXT.items() if k in SIZES and k != "vocab_size"}, **HIDDEN, intermediate_size=50,
                image_size=8, patch_size=4, num_labels=3,
            ),
        ),
        "wav2vec2": lambda: of(
            hf.Wav2Vec2ForSequenceClassification,
            hf.Wav2Vec2Config(
                **wav, hidden_size=36, num_hidden_layers=2, num_attention_heads=9, intermediate_size=50,
                hidden_dropout=0.2, attention_dropout=0.2, activation_dropout=0.2, feat_proj_dropout=0.2,
                classifier_proj_size=12, num_labels=3,
            ),
        ),
        "mpt": lambda: of(hf.MptForCausalLM, hf.MptConfig(**mpt)),
        "falcon": lambda: of(
            hf.FalconForCausalLM,
            hf.FalconConfig(**SIZES, hidden_dropout=0.2, attention_dropout=0.2, new_decoder_architecture=False),
        ),
        "biogpt": lambda: of(hf.BioGptForCausalLM, hf.BioGptConfig(**TEXT, **HIDDEN, activation_dropout=0.2)),
        "mixtral": lambda: of(
            hf.MixtralForCausalLM,
            hf.MixtralConfig(
                **TEXT | {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48},
                num_key_value_heads=2, num_local_experts=4, attention_dropout=0.2,
            ),
        ),
    }  # fmt: skip
    model = makers[name]().train()
    for module in model.modules():
        if hasattr(module, "attn_dropout_p"):  # of MPT, whose config takes whole numbers only
            module.attn_dropout_p = 0.2  # type: ignore[assignment]
    return model


FAMILIES = [
    "llama", "gpt2", "bert", "deberta", "deberta-shared", "opt", "opt-350m", "t5", "bart", "whisper", "vit", "wav2vec2",
    "mpt", "falcon", "biogpt", "mixtral",
]  # fmt: skip
SDPA = ["llama", "gpt2", "bert", "bart", "vit", "falcon"]


def loss_of(model: nn.Module) -> Tensor:
    """A loss of a call with the inputs that the family takes."""
    g = torch.Generator().manual_seed(3)
    kind = type(model).__name__
    if "Wav2Vec2" in kind:
        y = model(input_values=torch.randn(2, 2000, generator=g)).logits
    elif "ViT" in kind:
        y = model(pixel_values=torch.randn(2, 3, 8, 8, generator=g)).logits
    elif "Whisper" in kind:
        y = model(input_features=torch.randn(2, 8, 20, generator=g), decoder_input_ids=ids(vocab=60)).logits
    elif "T5" in kind or "Bart" in kind:
        y = model(input_ids=ids(vocab=60), decoder_input_ids=ids(vocab=60, length=5)).logits
    else:
        y = model(input_ids=ids(vocab=60)).logits
    loss: Tensor = y.float().square().mean() + y.float().mean()
    return loss


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def check_alike(model: nn.Module, group: Group, label: str, loss: Callable[[nn.Module], Tensor] = loss_of) -> None:
    """After steps all replicated parameters, losses and generators are the same bits on all ranks."""
    torch.manual_seed(5)
    with torch.no_grad():
        assert float(loss(model)) != float(loss(model)), f"{label}: nothing drops"
    step = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        step.zero_grad()
        losses.append(loss(model))
        layers.check_same_rng(group)
        losses[-1].backward()
        layers.check_same_rng(group)
        step.step()
    assert float(losses[0].detach()) != float(losses[1].detach())
    whole = {name: p for name, p in model.named_parameters() if shard_info(p) is None}
    mine = digest(whole | {f"loss {i}": loss for i, loss in enumerate(losses)})
    every: list[Any] = [None] * group.world_size
    dist.all_gather_object(every, mine)
    apart = [name for name in mine if any(other[name] != mine[name] for other in every)]
    assert not apart, f"{label}: the ranks differ in {apart[:5]}, {len(apart)} in all"
    assert NOW.common is None, label


def families_stay_alike(names: list[str], attention: str, how: str) -> None:
    with Group.open() as group:
        for name in names:
            cut: Any = parallelize(build(name, attention), group=group, sequence_parallel=how == "cut tokens")
            if how.startswith("checkpoint"):
                options = {"use_reentrant": how == "checkpoint, reentrant"}
                cut.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            check_alike(cut, group, f"{name}, {attention}, {how}")


@pytest.mark.parametrize("R", [2, 3])
def test_ranks_stay_alike_with_every_dropout_on(R: int) -> None:
    run_ranks(families_stay_alike, R, FAMILIES if R == 2 else ["deberta-shared", "opt-350m", "bart"], "eager", "plain")


def test_ranks_stay_alike_with_the_kernel_of_attention() -> None:
    run_ranks(families_stay_alike, 2, SDPA, "sdpa", "plain")


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint, reentrant"])
def test_ranks_stay_alike_with_activation_checkpoints(how: str) -> None:
    # The reentrant kind of torch does not take the positions that DeBERTa hands to all layers, cut or not.
    families = ["llama", "gpt2", "opt", "biogpt"] + ["deberta-shared"] * (how == "checkpoint")
    run_ranks(families_stay_alike, 2, families, "eager", how)


def test_ranks_stay_alike_with_cut_tokens() -> None:
    run_ranks(families_stay_alike, 2, ["llama", "gpt2", "biogpt", "mixtral"], "eager", "cut tokens")


class Twice(nn.Module):
    """A block that calls its column layer twice, drops by a rate that nobody can see, and may fail in between."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.up, self.calm, self.down = nn.Linear(8, 12), nn.Dropout(0.5), nn.Linear(12, 8)
        self.scale, self.replay, self.fails = nn.Parameter(torch.ones(3, 8)), "", False
        self.hidden = (rate,)  # no number of the module's own

    def mix(self, x: Tensor) -> Tensor:
        y = F.dropout(self.up(x), *self.hidden)
        y = y + self.up(self.calm(self.scale)).mean(0)
        if self.fails:
            raise ValueError("it fails")
        return self.down(F.dropout(y, *self.hidden))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.mix, x, use_reentrant=self.replay == "old") if self.replay else self.mix(x)
        return F.dropout(x + y, 0.1)


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


PLAN = {"first": "replicate", "*.up": "column", "*.calm": "common", "*.down": "row"}


def square(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.ones(4, 8)).square().mean()
    return loss


def blocks_out_of_the_ordinary_stay_alike() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        whole = Blocks(Twice(), Twice()).train()
        seen: dict[str, list[Tensor]] = {}
        for replay in ("", "old", "new"):
            cut: Any = parallelize(copy.deepcopy(whole), group=group, plan=PLAN)
            for block in cut.blocks:
                block.replay = replay
            check_alike(cut, group, f"called twice, {replay}", square)
            seen[replay] = [p.detach().clone() for p in cut.parameters()]
        for replay in ("old", "new"):  # the masks of the forward were drawn again
            for got, want in zip(seen[replay], seen[""], strict=True):
                assert torch.allclose(got, want, atol=1e-6), replay
        cut.blocks[1].fails = True
        with pytest.raises(ValueError, match="it fails"):
            square(cut)
        layers.check_same_rng(group)
        cut.blocks[1].fails = False
        check_alike(cut, group, "after an error", square)


def test_a_column_layer_called_twice_an_error_and_a_recomputed_part_leave_the_generators_alike() -> None:
    run_ranks(blocks_out_of_the_ordinary_stay_alike, 3)


def a_rate_that_nobody_sees_leaves_the_generators_alike() -> None:
    with Group.open() as group:
        torch.manual_seed(0)
        whole = Blocks(Twice(), Twice()).train()
        for block in whole.blocks:
            block.calm.p = 0.0  # type: ignore[union-attr]
        cut = parallelize(whole, group=group, plan=PLAN)
        check_alike(cut, group, "unseen rates", square)


def test_dropouts_with_rates_that_no_module_tells_leave_the_generators_alike() -> None:
    run_ranks(a_rate_that_nobody_sees_leaves_the_generators_alike, 3)


class Mixed(nn.Module):
    """A dropout, as a function, of something whole while hidden units are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        whole = F.dropout(self.scale, 0.3, self.training)
        return self.down(hidden) * whole


def refusals_and_styles() -> None:
    with Group.open() as group:
        with pytest.raises(PlanError, match="drops, by a function, what is on all ranks"):
            parallelize(Mixed(), group=group, inputs=((torch.ones(4, 8),), {}))
        with pytest.raises(PlanError, match=r"style 'common' of 0\.up needs a dropout"):
            parallelize(nn.ModuleList([Mixed()]), group=group, plan={"0.up": "common", "0.down": "replicate"})
        with pytest.raises(ValueError, match=r"inputs must be \(args, kwargs\)"):
            parallelize(Mixed(), group=group, inputs=torch.ones(4, 8))  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=r"could not be run on .*; give inputs=\(args, kwargs\) or a plan"):
            parallelize(Mixed(), group=group, inputs=((), {}))


def test_what_cannot_be_drawn_right_is_left_whole_or_refused() -> None:
    run_ranks(refusals_and_styles, 2)


class Beside(nn.Module):
    """A replicated layer that is called between a column layer and its row layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.beside, self.b = nn.Linear(8, 12), nn.Linear(8, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        y: Tensor = self.beside(x) + self.b(hidden.relu())
        return y


def adapters_drop_alike() -> None:
    import peft

    from tpkernels import cut_adapters

    with Group.open() as group:
        torch.manual_seed(0)
        plan = {"0.a": "column", "0.beside": "replicate", "0.b": "row"}
        x = torch.randn(4, 8)
        cases: list[tuple[Any, list[str], Callable[[Any], Tensor]]] = [
            (
                parallelize(build("llama"), group=group),
                ["q_proj", "v_proj", "down_proj"],
                lambda m: m(input_ids=ids(vocab=60)).logits.square().mean(),
            ),
            (
                parallelize(nn.Sequential(Beside()), group=group, plan=plan),
                ["a", "beside", "b"],
                lambda m: m(x).square().mean(),
            ),
        ]
        for cut, targets, loss in cases:
            model: Any = peft.get_peft_model(cut, peft.LoraConfig(r=3, lora_dropout=0.3, target_modules=targets))
            cut_adapters(model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(0.1)
            model.train()
            check_alike(model, group, f"adapters of {targets}", loss)


def test_dropouts_of_adapters_keep_what_is_whole_of_them_alike() -> None:
    pytest.importorskip("peft")
    run_ranks(adapters_drop_alike, 2)


def test_a_new_thread_has_all_attributes_of_the_state() -> None:
    """A graph is guarded by which attributes there are: one that appears while it is traced fails its own guards."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: dict(vars(NOW))).result() == {"common": None, "depth": 0}

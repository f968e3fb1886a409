"""What the tests of families share: tiny models with random weights, and modules that nobody wrote a plan for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 37,
}  # fmt: skip
TEXT = SIZES | {"max_position_embeddings": 16}
IMAGES = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
ENCODER_DECODER = {
    "vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(family: str) -> nn.Module:
    """A tiny model of a family, with weights of the default device."""
    import transformers as hf

    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, **TOKENS)),
        "distilbert": lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=61, dim=24, n_layers=2, n_heads=6, hidden_dim=37, max_position_embeddings=16)
        ),
        "deberta": lambda: hf.DebertaV2ForMaskedLM(
            hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)
        ),
        "modernbert": lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(**TEXT, **TOKENS, cls_token_id=1, sep_token_id=2)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=61, d_model=24, d_kv=4, num_layers=2, num_heads=6, d_ff=37, decoder_start_token_id=0,
                dropout_rate=0.0,
            )
        ),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**ENCODER_DECODER, max_position_embeddings=16)),
        "whisper": lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=10, max_target_positions=16)
        ),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGES, num_labels=5)),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=TEXT | TOKENS, vision_config=IMAGES, projection_dim=12)
        ),
        "llava": lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                text_config=hf.LlamaConfig(**TEXT, **TOKENS, num_key_value_heads=3),
                vision_config=hf.CLIPVisionConfig(**IMAGES), image_token_index=60,
            )
        ),
        "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(
                text_config=TEXT | TOKENS | {
                    "num_key_value_heads": 3,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4},
                },
                vision_config={
                    "depth": 2, "embed_dim": 24, "num_heads": 6, "hidden_size": 24, "mlp_ratio": 2, "patch_size": 4,
                    "spatial_merge_size": 1, "temporal_patch_size": 1,
                },
                image_token_id=60, vision_start_token_id=59,
            )
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=6, n_positions=16, **TOKENS)
        ),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, **TOKENS, num_key_value_heads=3, head_dim=4)),
        "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT, **TOKENS, num_key_value_heads=3)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, **TOKENS)),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=6, **TOKENS)
        ),
        "swin": lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=2)
        ),
        "home_made": HomeMade,
        "odd_heads": lambda: HomeMade(heads=3, size=5),
        "interleaved": lambda: HomeMade(interleaved=True),
    }  # fmt: skip
    return makers[family]()


class Mixer(nn.Module):
    """Attention with names of its own: one fused projection in front, sizes written out where code needs them."""

    def __init__(self, width: int, heads: int, size: int, interleaved: bool) -> None:
        super().__init__()
        self.lanes, self.span, self.interleaved = heads, heads * size, interleaved
        self.abc = nn.Linear(width, 3 * self.span)
        self.back = nn.Linear(self.span, width, bias=False)
        self.gain = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        if self.interleaved:  # [heads, 3, size]: the three of a head lie together
            a, b, c = self.abc(x).view(B, S, self.lanes, 3, -1).unbind(3)
        else:
            a, b, c = self.abc(x).view(B, S, 3, self.lanes, -1).unbind(2)
        a, b, c = (t.transpose(1, 2) for t in (self.gain(a), b, c))
        scores = (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1)
        return self.back((scores @ c).transpose(1, 2).reshape(B, S, self.span))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, size: int, interleaved: bool) -> None:
        super().__init__()
        self.mix = Mixer(width, heads, size, interleaved)
        self.calm = nn.LayerNorm(width)
        self.wide, self.gate, self.narrow = nn.Linear(width, 37), nn.Linear(width, 37), nn.Linear(37, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.calm(x))
        return x + self.narrow(self.wide(x).tanh() * self.gate(x).sigmoid())


class HomeMade(nn.Module):
    """A language model with other names than those of transformers."""

    def __init__(self, width: int = 24, heads: int = 6, size: int = 4, *, interleaved: bool = False) -> None:
        super().__init__()
        self.glossary = nn.Embedding(61, width)
        self.stack = nn.ModuleList(Layer(width, heads, size, interleaved) for _ in range(2))
        self.spell = nn.Linear(width, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.glossary(ids)
        for layer in self.stack:
            x = layer(x)
        return self.spell(x)


class UsedTwice(nn.Module):
    """The hidden units go to the next linear and, whole, into a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden) + self.norm(hidden).mean()


class UsesWeightDirectly(nn.Module):
    """The weight of `down` is also multiplied past its forward, where a part of it would be taken for the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + F.linear(self.up.bias, self.down.weight).sum()


class ScalesByWidth(nn.Module):
    """Right sizes on every rank and wrong numbers: the width of a cut tensor is a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden / hidden.shape[-1] ** 0.5)


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed before the softmax: no head can be alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.talk = nn.Parameter(torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.einsum("gh,bhst->bgst", self.talk, q @ k.transpose(-1, -2))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def tokens(length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(3, 59, (2, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def inputs(family: str) -> dict[str, Any]:
    """What the family is called with, labels included where it makes a loss of them."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    images = {"pixel_values": noise(2, 3, 8, 8)}
    picture = torch.cat((tokens(2), torch.full((2, 4), 60), tokens(3)), dim=1)
    special: dict[str, dict[str, Any]] = {
        "roberta": {"input_ids": tokens(), "attention_mask": mask, "labels": torch.tensor([0, 1])},
        "t5": {"input_ids": tokens(), "attention_mask": mask, "labels": tokens(5, seed=3)},
        "bart": {"input_ids": tokens(), "attention_mask": mask, "labels": tokens(5, seed=3)},
        "whisper": {"input_features": noise(2, 8, 20), "labels": tokens(5)},
        "vit": images | {"labels": torch.tensor([3, 1])},
        "clip": images | {"input_ids": tokens(), "attention_mask": mask, "return_loss": True},
        "llava": images | {"input_ids": picture, "labels": picture},
        "qwen2_vl": {
            "input_ids": picture, "labels": picture, "pixel_values": noise(8, 48),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * 2), "mm_token_type_ids": (picture == 60).int(),
        },
    }  # fmt: skip
    return special.get(family, {"input_ids": tokens(), "attention_mask": mask, "labels": tokens()})

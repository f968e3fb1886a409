"""Encoders, encoder-decoders, models of images, of sound and of several of these, for the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.zoo import TINY, Animal, noise, tokens

IMAGE = {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 9, "intermediate_size": 50, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 67, "d_model": 36, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 9,
    "decoder_attention_heads": 9, "encoder_ffn_dim": 50, "decoder_ffn_dim": 50, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 67, "d_model": 36, "d_kv": 4, "d_ff": 50, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 9,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0,
}  # fmt: skip
WAVE = {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 9, "intermediate_size": 50, "vocab_size": 32,
    "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "do_stable_layer_norm": False, "feat_extract_norm": "group",
}  # fmt: skip
TEXT = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}


def masked(attention: str = "", **changes: Any) -> Animal:
    return Animal(changes, "AutoModelForMaskedLM", attention=attention)


def pictures(count: int = 2, size: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": noise(count, 3, size, size), "labels": torch.tensor([1, 0])}


def picture_model(attention: str = "", **changes: Any) -> Animal:
    return Animal(IMAGE | changes, "AutoModelForImageClassification", pictures(), attention=attention, plain=True)


def translation() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens(length=5, seed=3)}


def seq2seq(base: dict[str, Any], attention: str = "", refused: str = "", **changes: Any) -> Animal:
    kind: dict[str, Any] = {"auto": "AutoModelForSeq2SeqLM", "inputs": translation, "plain": True}
    return Animal(base | changes, generates={}, attention=attention, refused=refused, **kind)


def waves() -> dict[str, Any]:
    return {"input_values": noise(2, 400), "labels": torch.tensor([1, 0])}


def sound(attention: str = "", **changes: Any) -> Animal:
    return Animal(WAVE | changes, "AutoModelForAudioClassification", waves, attention=attention, plain=True)


def beside(count: int, token: int) -> Tensor:
    """Token ids with a picture of so many places in them."""
    return torch.cat((tokens(length=2), torch.full((2, count), token), tokens(length=3, seed=4)), dim=1)


def seen(count: int, token: int = 60, **more: Any) -> Callable[[], dict[str, Any]]:
    ids = beside(count, token)
    return lambda: {"input_ids": ids, "labels": ids, "pixel_values": noise(2, 3, 8, 8)} | more


def both() -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": noise(2, 3, 8, 8), "return_loss": True}


def of(config: str, model: str, **parts: Any) -> Callable[[str], nn.Module]:
    """A model by the names of its classes."""

    def build(attention: str) -> nn.Module:
        import transformers as hf

        made = getattr(hf, config)(**parts)
        return getattr(hf, model)._from_config(made, attn_implementation=attention)

    return build


GROUNDED = {
    "depth": 2, "embed_dim": 36, "num_heads": 9, "hidden_size": 36, "mlp_ratio": 2, "patch_size": 4,
    "spatial_merge_size": 1, "temporal_patch_size": 1, "in_channels": 3,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}, "head_dim": 4}


def grid(count: int = 4, width: int = 48) -> Callable[[], dict[str, Any]]:
    ids = beside(count, 60)
    return lambda: {
        "input_ids": ids, "labels": ids, "pixel_values": noise(2 * count, width),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2), "mm_token_type_ids": (ids == 60).int(),
    }  # fmt: skip


ANIMALS: dict[str, Animal] = {
    # encoders
    "albert": masked(embedding_size=12),
    "electra": masked(embedding_size=12),
    "mpnet": masked("eager"),
    "roformer": masked("eager"),
    "esm": masked(position_embedding_type="rotary", mask_token_id=3),
    "xlm-roberta": masked(),
    "camembert": masked(),
    "data2vec-text": masked(),
    "ernie": masked(),
    "layoutlm": masked("eager"),
    "megatron-bert": masked("eager"),
    "mobilebert": masked(
        "eager", embedding_size=12, intra_bottleneck_size=36, true_hidden_size=36, num_feedforward_networks=2
    ),
    "nystromformer": masked("eager", segment_means_seq_len=7, num_landmarks=7),
    "rembert": masked("eager", input_embedding_size=12, output_embedding_size=14),
    "squeezebert": masked("eager", embedding_size=36, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1,
                          intermediate_groups=1, output_groups=1),
    "xlm": masked("eager", emb_dim=36, n_layers=2, n_heads=9, n_words=67),
    "fnet": masked("eager", tpu_short_seq_length=7),
    "convbert": masked("eager", embedding_size=12, head_ratio=1, conv_kernel_size=3),
    "ibert": Animal({}, "AutoModelForMaskedLM", attention="eager", refused="nothing in IBertForMaskedLM can be cut"),
    # transformers' plan for it has none for the parameters of heads in a module between column and row layers
    "neomme": Animal(
        {"vocab_size": 67, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 3, "head_dim": 16, "embedding_rank": 12, "sliding_window": 4, "layer_types":
         ["sliding_attention", "full_attention"]},
        "AutoModelForMaskedLM", plain=True,
    ),
    "funnel": Animal(
        {"vocab_size": 67, "d_model": 36, "d_head": 4, "n_head": 9, "d_inner": 50, "block_sizes": [1, 1]},
        "AutoModelForMaskedLM", attention="eager", plain=True,
    ),
    # encoder-decoders
    "mbart": seq2seq(SEQ2SEQ),
    "pegasus": seq2seq(SEQ2SEQ),
    "marian": seq2seq(SEQ2SEQ),
    "blenderbot": seq2seq(SEQ2SEQ),
    "m2m_100": seq2seq(SEQ2SEQ),
    "plbart": seq2seq(SEQ2SEQ),
    "led": seq2seq(
        SEQ2SEQ, "eager", "no plan for LEDForConditionalGeneration, and none can be derived", attention_window=4,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
    ),
    "prophetnet": seq2seq(
        {k: v for k, v in SEQ2SEQ.items() if k not in ("d_model", "encoder_layers", "decoder_layers")}, "eager",
        "ProphetNetForConditionalGeneration could not be run on sample inputs", hidden_size=36, num_encoder_layers=2,
        num_decoder_layers=2, num_encoder_attention_heads=9, num_decoder_attention_heads=9,
    ),
    "mt5": seq2seq(T5),
    "umt5": seq2seq(T5),
    "longt5": seq2seq(T5, "eager", local_radius=3),
    "switch_transformers": seq2seq(
        T5, "eager", num_experts=5, expert_capacity=9, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    ),
    # images
    "deit": Animal(of("DeiTConfig", "DeiTForImageClassification", **IMAGE), inputs=pictures()),
    "beit": picture_model(num_labels=2),
    "dinov2": picture_model(mlp_ratio=2),
    "siglip": Animal(
        of("SiglipConfig", "SiglipModel", text_config=TEXT, vision_config=IMAGE), inputs=both
    ),
    "segformer": Animal(
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [12, 36],
            "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [3, 9], "mlp_ratios": [2, 2],
            "decoder_hidden_size": 12,
        },
        "AutoModelForImageClassification", pictures(), attention="eager", plain=True,
    ),
    "swinv2": Animal(  # an activation in place behind a linear that makes the biases of positions
        {"image_size": 16, "patch_size": 2, "embed_dim": 18, "depths": [2, 1], "num_heads": [3, 9], "window_size": 4},
        "AutoModelForImageClassification", pictures(size=16), attention="eager", plain=True,
    ),
    "vit_msn": picture_model(),
    "yolos": Animal(
        IMAGE | {"image_size": [8, 8], "num_detection_tokens": 3}, "AutoModelForObjectDetection",
        lambda: {"pixel_values": noise(2, 3, 8, 8)}, plain=True,
    ),
    "videomae": Animal(
        IMAGE | {"num_frames": 4, "tubelet_size": 2}, "AutoModelForVideoClassification",
        lambda: {"pixel_values": noise(2, 4, 3, 8, 8), "labels": torch.tensor([1, 0])}, plain=True,
    ),
    "vivit": Animal(
        IMAGE | {"num_frames": 4, "tubelet_size": [2, 4, 4]}, "AutoModelForVideoClassification",
        lambda: {"pixel_values": noise(2, 4, 3, 8, 8), "labels": torch.tensor([1, 0])}, plain=True,
    ),
    # sound
    "wav2vec2": sound(),
    "hubert": sound(),
    "wavlm": sound("eager"),
    "unispeech": sound(),
    "audio-spectrogram-transformer": Animal(
        {k: v for k, v in IMAGE.items() if k != "image_size"} | {
            "max_length": 16, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8, "patch_size": 8,
        },
        "AutoModelForAudioClassification",
        lambda: {"input_values": noise(2, 16, 16), "labels": torch.tensor([1, 0])}, plain=True,
    ),
    "speech_to_text": Animal(
        SEQ2SEQ | {"num_conv_layers": 1, "conv_kernel_sizes": [3], "conv_channels": 8, "input_feat_per_channel": 6,
                   "max_source_positions": 20, "max_target_positions": 20},
        "AutoModelForSpeechSeq2Seq", lambda: {"input_features": noise(2, 12, 6), "labels": tokens(length=5)},
        generates={}, attention="eager", plain=True,
    ),
    "gemma4_vision": Animal(  # whose class does not say which are its input embeddings
        IMAGE | {"head_dim": 4, "global_head_dim": 4, "num_key_value_heads": 9, "pooling_kernel_size": 1},
        "AutoModel", lambda: {
            "pixel_values": noise(2, 4, 48), "pixel_position_ids": torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]] * 2),
        }, plain=True,
    ),
    # several of these
    "blip": Animal(
        of("BlipConfig", "BlipModel", text_config=TEXT | {"encoder_hidden_size": 36, "is_decoder": False},
           vision_config=IMAGE, projection_dim=12), inputs=both, attention="eager",
    ),
    "vilt": Animal(
        {"image_size": 8, "patch_size": 4, "num_images": -1}, "AutoModel",
        lambda: {"input_ids": tokens(), "pixel_values": noise(2, 3, 8, 8)}, attention="eager",
    ),
    "chinese_clip": Animal(
        of("ChineseCLIPConfig", "ChineseCLIPModel", text_config=TEXT, vision_config=IMAGE, projection_dim=12),
        inputs=both,
    ),
    "paligemma": Animal(
        of("PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
           text_config=TINY | {"model_type": "gemma", "head_dim": 4},
           vision_config=IMAGE | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 36},
           image_token_index=60, projection_dim=36),
        inputs=seen(4, token_type_ids=(beside(4, 60) > 0).int()),
    ),
    "qwen2_5_vl": Animal(
        of("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", text_config=TINY | MROPE,
           vision_config=GROUNDED | {"out_hidden_size": 36, "intermediate_size": 50, "window_size": 8,
                                     "fullatt_block_indexes": [1]},
           image_token_id=60, vision_start_token_id=59), inputs=grid(),
    ),
    "qwen3_vl": Animal(
        of("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", text_config=TINY | MROPE,
           vision_config=GROUNDED | {"out_hidden_size": 36, "intermediate_size": 50, "deepstack_visual_indexes": [0],
                                     "num_position_embeddings": 16},
           image_token_id=60, vision_start_token_id=59), inputs=grid(),
    ),
    "idefics3": Animal(
        of("Idefics3Config", "Idefics3ForConditionalGeneration", text_config=TINY | {"model_type": "llama"},
           vision_config=IMAGE, image_token_id=60, scale_factor=1),
        inputs=lambda: {"input_ids": beside(4, 60), "labels": beside(4, 60), "pixel_values": noise(2, 1, 3, 8, 8)},
    ),
    "gemma3": Animal(
        of("Gemma3Config", "Gemma3ForConditionalGeneration",
           text_config=TINY | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4},
           vision_config=IMAGE | {"vision_use_head": False}, mm_tokens_per_image=4, image_token_index=60),
        inputs=seen(4, token_type_ids=(beside(4, 60) == 60).int()),
    ),
    "internvl": Animal(
        of("InternVLConfig", "InternVLForConditionalGeneration", text_config=TINY | {"model_type": "qwen2"},
           vision_config=IMAGE | {"image_size": [8, 8], "patch_size": [4, 4]}, image_token_id=60, downsample_ratio=1.0,
           image_seq_length=4),
        inputs=seen(4),
    ),
    # a decoder whose layers differ in their heads, which its config says layer by layer
    "gemma4_text": Animal(
        {"head_dim": 4, "global_head_dim": 8, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
         "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 67, "num_kv_shared_layers": 0,
         "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        generates={},
    ),
}  # fmt: skip

"""Decoders of the zoo: causal language models, state-space hybrids and mixtures of experts."""

from __future__ import annotations

from tests.harness.zoo import Animal

ONE_WIDTH = {"n_embd": 36, "n_head": 9, "n_layer": 2, "n_positions": 64}
MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": 9,
}  # fmt: skip
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
WIDE = {"intermediate_size": 52, "moe_intermediate_size": 16}  # grouped_mm needs rows of a multiple of 16 bytes
ROUTED = {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
GROUPED = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}


def decoder(attention: str = "", **changes: object) -> Animal:
    return Animal(changes, generates={}, attention=attention)


def packed(experts: str, **changes: object) -> Animal:
    """A mixture with another implementation of its experts than the slow one; it takes fp32 only."""
    return Animal(changes, generates={}, experts=experts, double=False, tolerance=1e-4)


ANIMALS: dict[str, Animal] = {
    "apertus": decoder(),
    "arcee": decoder(),
    "biogpt": decoder(),
    "bitnet": decoder(),
    "cohere": decoder(),
    "cohere2": decoder(),
    "ctrl": decoder(**ONE_WIDTH, dff=50),
    "cwm": decoder(),
    "diffllama": decoder(num_attention_heads=12, num_key_value_heads=6, head_dim=4),
    "doge": decoder(),
    "ernie4_5": decoder(head_dim=4),
    "exaone4": decoder(sliding_window=4),
    "falcon": decoder(new_decoder_architecture=True, num_kv_heads=3),
    "falcon:mqa": decoder(multi_query=True),
    "gemma": decoder(head_dim=4),
    "glm": decoder(head_dim=4),
    "glm4": decoder(head_dim=4),
    "gpt_neo": decoder("eager", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=9, window_size=4),
    "gptj": decoder(**ONE_WIDTH, rotary_dim=4),
    "gpt_neox_japanese": decoder("eager", intermediate_multiple_size=2),
    "granite": decoder(),
    "helium": decoder(head_dim=4),
    "hunyuan_v1_dense": decoder(head_dim=4),
    "ministral": decoder(head_dim=4),
    "mistral": decoder(sliding_window=4),
    "nanochat": decoder(),
    "nemotron": decoder(),
    "olmo": decoder(),
    "olmo3": decoder(sliding_window=4),
    "openai-gpt": decoder("eager", **ONE_WIDTH),
    "persimmon": decoder(),
    "phi": decoder(),
    "seed_oss": decoder(head_dim=4),
    "smollm3": decoder(),
    "stablelm": decoder(),
    "vaultgemma": decoder("eager", head_dim=4, query_pre_attn_scalar=4, sliding_window=4),
    "xglm": Animal(  # it adds the least number of its dtype as an fp32 one
        {"d_model": 36, "ffn_dim": 50, "num_layers": 2, "attention_heads": 9}, generates={}, attention="eager",
        double=False, tolerance=1e-4,
    ),
    "deepseek_v2": decoder(**MLA, **ROUTED, n_group=1, topk_group=1, first_k_dense_replace=1, topk_method="greedy"),
    "dots1": decoder(**ROUTED, **GROUPED, head_dim=4),
    "ernie4_5_moe": decoder(
        moe_num_experts=6, moe_k=2, moe_intermediate_size=14, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "flex_olmo": decoder(**MOE),
    "glm4_moe": decoder(**ROUTED, **GROUPED, head_dim=4),
    "granitemoe": decoder(**LOCAL),
    "hunyuan_v1_moe": decoder(num_experts=5, moe_topk=2, head_dim=4),
    "jetmoe": decoder(**LOCAL, kv_channels=4, num_key_value_heads=3),
    "minimax": decoder(**LOCAL, head_dim=4, layer_types=["full_attention", "linear_attention"], block_size=4),
    "olmoe": decoder(**MOE),
    "olmoe:grouped_mm": packed("grouped_mm", **MOE | WIDE),
    "olmoe:batched_mm": packed("batched_mm", **MOE),
    "dots1:grouped_mm": packed("grouped_mm", **ROUTED | WIDE, **GROUPED, head_dim=4),
    "granitemoe:batched_mm": packed("batched_mm", **LOCAL),
    "phimoe": decoder(**LOCAL),
    "qwen3_next": decoder(
        **MOE, head_dim=4, shared_expert_intermediate_size=14, linear_num_value_heads=6, linear_num_key_heads=3,
        linear_key_head_dim=4, linear_value_head_dim=4, layer_types=["linear_attention", "full_attention"],
    ),
    "bamba": decoder(**MAMBA2, mamba_expand=2, attn_layer_indices=[1]),
    "falcon_h1": decoder(**MAMBA2, mamba_d_ssm=72, head_dim=4),
    "falcon_mamba": decoder("eager", state_size=4, time_step_rank=3),
    "granitemoehybrid": decoder(
        **LOCAL, **MAMBA2, mamba_expand=2, shared_intermediate_size=14, layer_types=["mamba", "attention"]
    ),
    "jamba": decoder(
        num_experts=5, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=3, use_mamba_kernels=False,
    ),
    "lfm2": decoder(layer_types=["conv", "full_attention"]),
    "mamba": decoder("eager", state_size=4, time_step_rank=3),
    "mamba2": decoder(num_heads=6, head_dim=12, state_size=8, n_groups=1, expand=2),
    "nemotron_h": decoder(
        mamba_num_heads=6, mamba_head_dim=12, ssm_state_size=8, n_groups=1, head_dim=4,
        layers_block_type=["mamba", "attention"],
    ),
    "recurrent_gemma": decoder(lru_width=36, attention_window_size=8, head_dim=4, num_hidden_layers=3),
    "zamba2": decoder(
        num_key_value_heads=9, mamba_ngroups=1, mamba_d_state=8, n_mamba_heads=6, mamba_headdim=12,
        hybrid_layer_ids=[1],
        attention_head_dim=8, num_mem_blocks=1, layers_block_type=["mamba", "hybrid"], use_mem_rope=True,
    ),
}  # fmt: skip

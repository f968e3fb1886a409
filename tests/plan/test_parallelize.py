"""Unmodified models of transformers, cut over 1 to 4 ranks, against the unsharded ones in fp64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.parallelize import check_training, tiny
from tests.harness.ranks import nightly
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")

MOE = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
LATENT = {
    "num_key_value_heads": 9, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_inner": 50},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 6},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"head_dim": 6, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 22},
    "gemma2": {"head_dim": 4, "query_pre_attn_scalar": 4, "attention": "eager"},
    "gemma3_text": {"head_dim": 4, "query_pre_attn_scalar": 4},
    "phi3": {},
    "olmo2": {},
    "starcoder2": {},
    "gpt_neox": {},
    "deepseek_v3": MOE | LATENT,
    "gpt_oss": MOE | {"head_dim": 4, "attention": "eager"},
    "bloom": {"n_layer": 2, "n_head": 9, "attention": "eager"},
    "gpt_bigcode": {"n_inner": 50},
    "mpt": {"n_layers": 2, "n_heads": 9, "d_model": 36, "max_seq_len": 16, "attention": "eager"},
}
# The heads of olmo2 are not cut, see test_plan.py; the attention of bloom and mpt does not say that it is causal.
SEQUENCE = [name for name in FAMILIES if name not in ("olmo2", "bloom", "mpt")]
SHARED = ["llama", "qwen3", "mixtral", "phi3", "gpt_oss", "gpt2"]


def families_equal_the_unsharded_model(names: list[str], sequence_parallel: bool) -> list[str]:
    with Group.open() as group:
        reports = []
        for name in names:
            label = f"{name} over {group.world_size}" + (" with cut tokens" if sequence_parallel else "")
            cut = check_training(tiny(name, **FAMILIES[name]), group, label, sequence_parallel=sequence_parallel)
            reports.append(str(cut.tpk_plan))
        return reports


@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_families_give_the_unsharded_logits_loss_gradients_and_step(R: int) -> None:
    names = {1: ["llama", "gpt2", "mixtral"], 4: SHARED}.get(R, list(FAMILIES))
    for report in run_ranks(families_equal_the_unsharded_model, R, names, False):
        assert "cut 15 of 15 linears" in report[0]


@pytest.mark.parametrize("R", [3, *nightly(2, 4)])
def test_families_with_cut_tokens_give_the_same(R: int) -> None:
    names = {3: ["llama", "gpt2", "qwen2_moe"], 4: ["llama", "qwen3_moe", "gpt2"]}.get(R, SEQUENCE)
    reports = run_ranks(families_equal_the_unsharded_model, R, names, True)[0]
    assert len(reports) == len(names)
    assert all("tokens cut between the blocks" in report for report in reports)

"""Batches of unequal prompts with caches of other kinds than keys and values of every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.generation import byte_tokenizer
from tests.harness.zoo import TINY
from tpkernels import Group
from tpkernels.generate import Generator, Sampling

hf = pytest.importorskip("transformers")

SMALL = TINY | {"vocab_size": 258, "head_dim": 8, "num_attention_heads": 6}
LINEAR = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        "num_key_value_heads": 1, "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5, "o_groups": 3, "o_lora_rank": 8, "q_lora_rank": 8, "index_topk": 2,
        "index_n_heads": 3, "index_head_dim": 4, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "sliding_window": 4,
    },
    "qwen3_5_text": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "gemma4_text": {
        "num_global_key_value_heads": 3, "global_head_dim": 8, "hidden_size_per_layer_input": 4, "sliding_window": 4,
        "vocab_size_per_layer_input": 258, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
PROMPTS = [[5, 9, 11, 4, 3, 8, 20, 31], [7, 3, 9], [12, 30, 21, 17, 8]]
HOW = Sampling(max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_batch_go_on_as_alone_or_are_refused(family: str) -> None:
    if family not in hf.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip("needs a release of transformers that has this model")
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # so that no two logits are near each other
        parameter.data += torch.randn(parameter.shape) * 0.1
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    asked: Any = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = [model.generate(torch.tensor([p]), **asked)[0, len(p) :].tolist() for p in PROMPTS]
    with Group.open() as group:
        generator = Generator(model, byte_tokenizer(), group, cache="dynamic")
        assert [generator.generate([p], HOW)[0].tokens for p in PROMPTS] == want
        if family == "deepseek_v4":  # its compressed keys begin where the padding does
            with pytest.raises(
                ValueError, match=r"with a cache of DeepseekV4CSACache, .* prompts need one length, got \[3, 5, 8\]"
            ):
                generator.generate(PROMPTS, HOW)
            assert [c.tokens for c in generator.generate([PROMPTS[1]] * 2, HOW)] == [want[1]] * 2
        else:
            assert [c.tokens for c in generator.generate(PROMPTS, HOW)] == want

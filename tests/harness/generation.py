"""A tiny Llama with random weights and a tokenizer of bytes: real classes of transformers, in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same weights in every process; wide enough that no two logits are near each other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 256,
        "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def byte_tokenizer() -> Any:
    """Every byte is a token; 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>", clean_up_tokenization_spaces=False)
    made.chat_template = TEMPLATE
    return made


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A folder as save_pretrained writes it."""
    tiny_llama(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder

"""Shape: the sizes of a decoder-only transformer that decide its time and memory, from a config of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpkernels.errors import UserError

# The names that families of transformers give to one size.
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active": ("num_experts_per_tok",),
    "expert_ffn": ("moe_intermediate_size",),
    "shared": ("n_shared_experts",),
    "longest": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
# Families whose feed-forward block is two linears; in the others a third one is the gate.
UNGATED = {
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "phi", "starcoder2",
    "codegen", "xglm", "nemotron", "persimmon",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocab: as in a config of transformers.
        ffn: the inner width of the feed-forward block, of one expert if there are several.
        gated: whether the feed-forward block has a third linear, the gate.
        experts, active: of a mixture, all and those of one token; 1 and 1 otherwise.
        shared: experts that every token uses beside `active`.
        tied: whether the head is the table of the embedding.
        longest: the longest sequence the config allows, 0 if it says nothing.
        name: for people.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = False
    experts: int = 1
    active: int = 1
    shared: int = 0
    tied: bool = True
    longest: int = 0
    name: str = "model"

    @classmethod
    def gpt(cls, layers: int, hidden: int, heads: int, vocab: int, name: str = "gpt") -> Shape:
        """Return the shape of a GPT as Megatron-LM makes it: no gate, an inner width of 4 x hidden, a tied head."""
        return cls(layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab, name=name)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Return the shape that a config of transformers describes.

        Args:
            config: as a dict, with every default filled in.

        Raises:
            UserError: a size is missing, or the family is not a decoder-only transformer.
        """
        family = str(config.get("model_type", "model"))
        if config.get("is_encoder_decoder") or "kv_lora_rank" in config:
            raise UserError(
                f"plan: {family} is no decoder-only transformer with plain attention, and has no model of time"
            )
        size = {key: next((config[n] for n in names if config.get(n)), None) for key, names in NAMES.items()}
        missing = [key for key in ("hidden", "layers", "heads", "vocab") if not size[key]]
        if missing:
            raise UserError(f"plan: the config of {family} has no {' and no '.join(NAMES[key][0] for key in missing)}")
        hidden, heads = int(size["hidden"]), int(size["heads"])  # type: ignore[arg-type]
        experts = int(size["experts"] or 1)
        ffn = (size["expert_ffn"] if experts > 1 else None) or size["ffn"] or 4 * hidden
        kv_heads = 1 if config.get("multi_query") else int(size["kv_heads"] or heads)
        return cls(
            layers=int(size["layers"]), hidden=hidden, heads=heads, kv_heads=kv_heads,  # type: ignore[arg-type]
            head_dim=int(config.get("head_dim") or hidden // heads), ffn=int(ffn), vocab=int(size["vocab"]),  # type: ignore[arg-type]
            gated=family not in UNGATED, experts=experts, active=int(size["active"] or 1),
            shared=int(size["shared"] or 0), tied=bool(config.get("tie_word_embeddings", True)),
            longest=int(size["longest"] or 0), name=family,
        )  # fmt: skip

    @property
    def qkv(self) -> int:
        """Outputs of the linear, or linears, before attention."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def own_heads(self, tp: int) -> int:
        """Return the query heads of the fullest of `tp` ranks: whole groups of a kv head, unless there are too few."""
        if tp > self.kv_heads:
            return -(-self.heads // tp)
        return -(-self.kv_heads // tp) * (self.heads // self.kv_heads)

    def own_kv_heads(self, tp: int) -> int:
        """Return the kv heads of the fullest of `tp` ranks; several ranks have the same one if there are too few."""
        return -(-self.kv_heads // tp)

    def own_experts(self, tp: int) -> float:
        """Return the share of the experts on the fullest of `tp` ranks, which have whole experts; 1 / tp without."""
        return -(-self.experts // tp) / self.experts if self.experts > 1 else 1 / tp

    @property
    def up(self) -> int:
        """Outputs of the first linear, or linears, of a feed-forward block."""
        return (2 if self.gated else 1) * self.ffn

    @property
    def attention_parameters(self) -> int:
        """Weights of one attention block, without biases."""
        return self.hidden * (self.qkv + self.heads * self.head_dim)

    @property
    def expert_parameters(self) -> int:
        """Weights of one feed-forward block, or of one expert, without biases."""
        return self.hidden * (self.up + self.ffn)

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, without biases and norms."""
        return self.attention_parameters + (self.experts + self.shared) * self.expert_parameters

    @property
    def table_parameters(self) -> int:
        """Weights of the embedding, and of the head if it is another table."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights, without biases, norms and positions."""
        return self.layers * self.layer_parameters + self.table_parameters

    def flops(self, tokens: float, sequence: int) -> float:
        """Return the model's floating-point operations of a forward and backward pass, nothing recomputed.

        6 per weight that a token uses, and 12 x sequence x width of the heads a layer and token for attention, the
        count of Narayanan et al. 2021 (arXiv:2104.04473, equation 3, there with a second forward pass).
        """
        used = self.attention_parameters + (self.active + self.shared) * self.expert_parameters
        attention = 12 * sequence * self.heads * self.head_dim
        return tokens * (self.layers * (6 * used + attention) + 6 * self.vocab * self.hidden)

"""Mixtures of experts over the ranks, in each way in which transformers computes experts, while memory is dirty."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.examples import in_ranks
from tests.harness.generation import byte_tokenizer
from tests.harness.parallelize import TINY, close, ids, part_of
from tests.harness.ranks import nightly
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.plan.api import parallelize
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")

MOE = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "head_dim": 4,
    "first_k_dense_replace": 1,
}  # fmt: skip
# Plain ones, shared experts, groups of experts, biases and clamps, weights the other way round, no gate.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": MOE,
    "qwen3_moe": MOE | {"head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "olmoe": MOE,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": MOE | {"head_dim": 8},
    "granitemoe": MOE,
    "phimoe": MOE,
    "aria_text": {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 1},
    "nemotron_h": MOE | {"layers_block_type": ["attention", "moe"], "n_routed_experts": 5, "head_dim": 8},
    "jetmoe": MOE | {"kv_channels": 8},
}
SMALL = TINY | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
NEAR = 2e-4  # of the largest value: fp32 rounds at 6e-8, which two layers and the softmax of a router amplify


def mixture(family: str, experts: str | None, **changes: Any) -> nn.Module:
    """A causal language model whose experts are computed in one of transformers' ways; None: as they are by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family] | changes))
    options = {} if experts is None else {"experts_implementation": experts}
    model = AutoModelForCausalLM.from_config(config, **options).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.05))
    return model


def make_memory_dirty() -> None:
    """Leave NaN in memory of the sizes that are asked for next."""
    sizes = [n * width for n in (1, 2, 7, 14, 28) for width in (16, 32, 48, 64)]
    held = [torch.full((n,), float("nan")) for n in sizes for _ in range(10)]
    del held


def check(whole: nn.Module, cut: nn.Module, tokens: Tensor, label: str) -> None:
    """Logits, loss and every gradient are those of the whole model."""
    for model in (whole, cut):
        model.zero_grad()
    with torch.no_grad():
        want = whole(input_ids=tokens).logits
        for _ in range(3):
            make_memory_dirty()
            close(cut(input_ids=tokens).logits, want, f"{label}: logits", NEAR)
    losses = [m(input_ids=tokens, labels=tokens).loss for m in (whole, cut)]
    close(losses[1], losses[0], f"{label}: loss", NEAR)
    for loss in losses:
        make_memory_dirty()
        loss.backward()
    others = dict(whole.named_parameters())
    # A gradient that is zero (of a query whose token sees itself alone) is the rounding of a sum of others.
    least = 1e-3 * max(float(p.grad.abs().max()) for p in others.values() if p.grad is not None)
    for name, parameter in cut.named_parameters():
        want, got = others[name].grad, parameter.grad
        assert want is not None or got is None or not got.any(), f"{label}: a gradient of {name}"
        if want is not None:
            assert got is not None, f"{label}: no gradient of {name}"
            close(got, part_of(parameter, want), f"{label}: gradient of {name}", 10 * NEAR, least)


def mixtures_are_right(families: list[str]) -> list[str]:
    found = []
    with Group.open() as group:
        for family in families:
            for experts in (None, "eager", "batched_mm"):
                whole = mixture(family, experts)
                cut = parallelize(copy.deepcopy(whole), group=group)
                for tokens in (ids(), ids(1, 1)):  # single tokens leave most ranks without a choice
                    shape = list(tokens.shape)
                    if tokens.numel() > 1:
                        check(whole, cut, tokens, f"{family}, {experts}, {shape} over {group.world_size}")
                    else:
                        with torch.no_grad():
                            make_memory_dirty()
                            close(cut(input_ids=tokens).logits, whole(input_ids=tokens).logits, family, NEAR)
                found.append(f"{family} {cut.config._experts_implementation}: {cut.tpk_plan}")
    return found


@pytest.mark.parametrize("R", [2, *nightly(3)])
def test_mixtures_are_right_in_every_implementation_while_memory_is_dirty(R: int) -> None:
    families = list(FAMILIES) if R == 2 else ["qwen3_moe", "gpt_oss"]
    families = [f for f in families if f != "deepseek_v3" or R == 2]
    found = run_ranks(mixtures_are_right, R, families)[0]
    assert len(found) == 3 * len(families)
    assert any(line.startswith("qwen3_moe grouped_mm") and "2 mixtures of experts" in line for line in found)


def ranks_without_experts_or_tokens_are_right() -> None:
    with Group.open() as group:
        for experts in (None, "eager", "batched_mm"):
            # A third rank without an expert; then one choice for each of few tokens, so that ranks have no token.
            for count, tokens in ((2, ids()), (5, ids(1, 2))):
                whole = mixture("olmoe", experts, num_experts=count, num_experts_per_tok=1, num_attention_heads=8)
                cut = parallelize(copy.deepcopy(whole), group=group)
                check(whole, cut, tokens, f"{count} experts over {group.world_size}, {experts}")
            again = copy.deepcopy(cut)
            assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in cut.named_parameters()}


def test_ranks_without_an_expert_or_a_token_take_part() -> None:
    run_ranks(ranks_without_experts_or_tokens_are_right, 3)


def a_change_of_implementation_is_followed() -> None:
    with Group.open() as group:
        whole = mixture("qwen3_moe", None)
        cut = parallelize(copy.deepcopy(whole), group=group)
        for experts in ("batched_mm", "eager", "grouped_mm"):
            cut.set_experts_implementation(experts)
            whole.set_experts_implementation(experts)
            check(whole, cut, ids(), f"changed to {experts}")


def test_the_implementation_may_be_changed_after_the_cut() -> None:
    run_ranks(a_change_of_implementation_is_followed, 2)


def a_traced_mixture_is_right() -> None:
    with Group.open() as group:
        whole, tokens = mixture("qwen3_moe", "grouped_mm", num_hidden_layers=1), ids()
        cut = parallelize(copy.deepcopy(whole), group=group)
        traced = torch.compile(cut, backend="aot_eager", fullgraph=True, dynamic=False)
        losses = [m(input_ids=tokens, labels=tokens).loss for m in (whole, traced)]
        close(losses[1], losses[0], "compiled: loss", NEAR)
        for loss in losses:
            make_memory_dirty()
            loss.backward()
        others = dict(whole.named_parameters())
        for name, parameter in cut.named_parameters():
            assert parameter.grad is not None, name
            close(parameter.grad, part_of(parameter, others[name].grad), f"compiled: {name}", 10 * NEAR)


def test_a_compiled_mixture_has_fixed_shapes_and_gives_the_same() -> None:
    run_ranks(a_traced_mixture_is_right, 2)


class ScaledExperts(nn.Module):
    """Experts of one's own, with a norm of their results that all of them share, called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.randn(4, 12, 8) * 0.3)
        self.norm = nn.LayerNorm(12)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for e in router_indices.unique().tolist():
            token, place = (router_indices == e).nonzero(as_tuple=True)
            found = self.norm(hidden_states[token] @ self.up[e].T) @ self.up[e]
            y = y.index_add(0, token, found * routing_weights[token, place, None])
        return y


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(2)
        found: Tensor = self.experts(hidden_states=x, routing_weights=weights, router_indices=index)
        return found


class TakesMore(ScaledExperts):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor, bias: Tensor
    ) -> Tensor:
        return super().forward(hidden_states, router_indices, routing_weights) + bias


def experts_of_ones_own() -> None:
    torch.manual_seed(0)
    whole, x = Mixture(ScaledExperts()).double(), torch.randn(6, 8, dtype=torch.float64)
    plan = {"router": "replicate", "experts": "expert"}
    with Group.open() as group:
        cut = parallelize(copy.deepcopy(whole), group=group, plan=plan)
        for model in (whole, cut):
            model(x).square().sum().backward()
        close(cut(x), whole(x), "experts with a norm", 1e-12)
        for (name, got), want in zip(cut.named_parameters(), whole.parameters(), strict=True):
            assert got.grad is not None and want.grad is not None
            close(got.grad, part_of(got, want.grad), f"gradient of {name}", 1e-12)
        with pytest.raises(PlanError, match=r"needs a forward\(tokens, top_k_index, top_k_weights\)"):
            parallelize(Mixture(TakesMore()).double(), group=group, plan=plan)


def test_what_lies_inside_of_experts_gets_the_gradient_of_all_ranks() -> None:
    run_ranks(experts_of_ones_own, 2)


def test_a_folder_of_a_mixture_is_generated_from(tmp_path: Path) -> None:
    changes = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256}
    model: Any = mixture("qwen3_moe", None, **changes)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tokens = tokenizer.encode("hi")
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    want = tokenizer.decode(tokens[-12:])
    options = ["--prompt", "hi", "--max-tokens", "12", "--ignore-eos", "--tp", "2", "--dtype", "fp32"]
    assert in_ranks(2, "tpkernels", "generate", str(tmp_path), *options) == want + "\n"

"""What a user does next with a cut model: generate, train, checkpoint activations, compile, copy, adapt, save."""

from __future__ import annotations

import copy
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.parallelize import close, compare_steps, ids, part_of, tiny
from tests.harness.ranks import nightly
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.data_parallel import clip_grad_norm_
from tpkernels.errors import PlanError
from tpkernels.layers.convert import ConvertedModule
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.plan.adapters.apply import cut_adapters
from tpkernels.planner import Recipe
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")


def pair(group: Group, model_type: str = "llama", sequence_parallel: bool = False, **changes: Any) -> Any:
    whole = tiny(model_type, **changes)
    return whole, parallelize(copy.deepcopy(whole), group=group, sequence_parallel=sequence_parallel)


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=ids(), labels=ids()).loss
    return loss


def it_generates(group: Group) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids()), "pad_token_id": 0}
    for sequence_parallel in (False, True):
        whole, cut = pair(group, sequence_parallel=sequence_parallel)
        want = whole.generate(ids(), do_sample=False, **options)
        assert torch.equal(cut.generate(ids(), do_sample=False, **options), want)
        static = cut.generate(ids(), do_sample=False, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, want)
        torch.manual_seed(5)
        sampled = whole.generate(ids(), do_sample=True, **options)
        torch.manual_seed(5)
        assert torch.equal(cut.generate(ids(), do_sample=True, **options), sampled)
    for family in ("bloom", "mpt"):  # a bias for the heads of all ranks, longer with every token
        sizes = {"n_layers": 2, "n_heads": 9, "d_model": 36, "max_seq_len": 32} if family == "mpt" else {}
        whole, cut = pair(group, family, attention="eager", **sizes)
        want = whole.generate(ids(), do_sample=False, **options)
        assert torch.equal(cut.generate(ids(), do_sample=False, **options), want), family
    _, cut = pair(group)
    cache = cut(input_ids=ids(), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1] == cut.model.layers[0].self_attn.k_proj.out_features // 4


def gradient_checkpointing_gives_the_same(group: Group) -> None:
    for sequence_parallel in (False, True):
        whole, cut = pair(group, sequence_parallel=sequence_parallel)
        for model in (whole, cut):
            model.train()
        cut.gradient_checkpointing_enable()
        compare_steps(cut, whole, [loss_of(whole), loss_of(cut)], "gradient checkpointing")


def a_copy_and_a_pickle_compute_the_same(group: Group) -> None:
    for sequence_parallel in (False, True):
        _, cut = pair(group, "qwen3", sequence_parallel=sequence_parallel, head_dim=6)
        want = loss_of(cut)
        for again in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
            close(loss_of(again), want, "copy", 0.0)
            assert all((shard_info(p) is None) == (shard_info(q) is None) for p, q in both(again, cut))
    cut.load_state_dict(cut.state_dict(), assign=True)
    cut.double().requires_grad_(True)
    assert shard_info(cut.lm_head.weight).full_size == 67


def both(a: nn.Module, b: nn.Module) -> Any:
    return zip(a.parameters(), b.parameters(), strict=True)


def meta_models_are_cut_and_filled_by_their_shard_info(group: Group) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = tiny("phi3")
    with torch.device("meta"):
        config = AutoConfig.for_model(**whole.config.to_dict())
        cut = AutoModelForCausalLM.from_config(config).double().eval()
    parallelize(cut, group=group)
    others = dict(whole.named_parameters())
    state = {name: part_of(p, others[name].detach()).clone() for name, p in cut.named_parameters()}
    cut.load_state_dict(state, assign=True)
    cut.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)
    close(loss_of(cut), loss_of(whole), "meta")


def the_gradient_norm_counts_every_parameter_once(group: Group) -> None:
    whole, cut = pair(group)
    for model in (whole, cut):
        loss_of(model).backward()
    want = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    close(clip_grad_norm_(cut, 0.1, groups=group), want, "norm")


def logits_that_stay_cut_give_the_same_loss(group: Group) -> None:
    for tied in (False, True):
        whole = tiny("llama", tie_word_embeddings=tied)
        cut = parallelize(copy.deepcopy(whole), group=group, gather_logits=False)
        labels = ids().masked_fill(ids() % 5 == 0, -100)
        outputs = [m(input_ids=ids(), labels=labels) for m in (whole, cut)]
        assert outputs[1].logits.shape[-1] == cut.lm_head.weight.shape[0]
        compare_steps(cut, whole, [o.loss for o in outputs], "cut logits")


def codecs_pack_what_travels(group: Group) -> None:
    for sequence_parallel in (False, True):
        sent, losses = [], []
        for codec, grad_codec in (("none", None), ("fp16", "none"), ("fp16", "int8")):
            cut = parallelize(
                tiny("llama").float(),
                group=group, sequence_parallel=sequence_parallel, codec=codec, grad_codec=grad_codec,
            )  # fmt: skip
            group.reset_stats()
            loss = loss_of(cut)
            loss.backward()
            sent.append(group.stats()["wire_bytes"])
            losses.append(float(loss.detach()))
            assert all(bool(p.grad.isfinite().all()) for p in cut.parameters())
        assert sent[0] > sent[1] > sent[2], sent
        assert abs(losses[1] - losses[0]) < 1e-3 * losses[0]
        assert losses[1] == losses[2]
    with pytest.raises(ValueError, match="codecs must be among"):
        parallelize(tiny("llama"), group=group, codec="zip")


def lora_on_cut_layers_equals_lora_on_whole_ones(group: Group) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=["q_proj", "k_proj", "o_proj", "down_proj", "up_proj", "lm_head"])
    for sequence_parallel in (False, True):
        whole, cut = pair(group, sequence_parallel=sequence_parallel)
        adapted = [get_peft_model(model, config) for model in (whole, cut)]
        with pytest.raises(PlanError, match="cut_adapters"):
            loss_of(adapted[1])
        objects = [id(p) for p in cut.parameters()]
        cut_adapters(adapted[1])
        assert objects == [id(p) for p in cut.parameters()]
        others = dict(adapted[0].named_parameters())
        with torch.no_grad():
            for i, (name, p) in enumerate(adapted[1].named_parameters()):
                if "lora_" in name:
                    value = 0.1 * torch.randn(others[name].shape, generator=torch.Generator().manual_seed(i)).double()
                    others[name].copy_(value)
                    p.copy_(part_of(p, value))
        compare_steps(adapted[1], adapted[0], [loss_of(m) for m in adapted], f"lora {sequence_parallel}")
        merged = [m.merge_and_unload() for m in adapted]
        close(loss_of(merged[1]), loss_of(merged[0]), "merged")


def parameters_are_reached_by_their_names(group: Group) -> None:
    """Also those whose gradients are summed over the ranks, to freeze them or to give them to an optimizer."""
    for options in ({}, {"sequence_parallel": True}):
        whole, cut = pair(group, "qwen3", head_dim=4, **options)
        for name, parameter in cut.named_parameters():
            assert operator.attrgetter(name)(cut) is parameter, f"{options} {name}"
        for model in (whole, cut):
            model.model.layers[0].self_attn.q_norm.weight.requires_grad = False
            model.model.layers[1].input_layernorm.weight.requires_grad_(False)
        compare_steps(cut, whole, [loss_of(whole), loss_of(cut)], f"frozen norms, {options}")


def shrink_gradient(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.75)


def parameters_keep_what_they_had(group: Group) -> None:
    """Attributes, hooks and gradients from before the cut; an optimizer from before it would train nothing."""
    whole, cut = tiny("llama"), tiny("llama")
    for model in (whole, cut):
        for name, parameter in model.named_parameters():
            parameter.no_decay = "mlp" in name  # type: ignore[attr-defined]
            parameter.requires_grad_("k_proj" not in name)
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]
                parameter.register_post_accumulate_grad_hook(shrink_gradient)  # type: ignore[no-untyped-call]
        loss_of(model).backward()
    early = torch.optim.SGD(cut.parameters(), lr=0.1)
    parallelize(cut, group=group)
    assert all(p.no_decay == ("mlp" in name) for name, p in cut.named_parameters())  # type: ignore[attr-defined]
    for optimizer in (early, torch.optim.Adam(early.param_groups[0]["params"])):
        with pytest.raises(
            ValueError, match=r"16 of its 21 parameters are full .*: make the optimizer after parallelize"
        ):
            optimizer.step()
    compare_steps(cut, whole, [loss_of(whole), loss_of(cut)], "what parameters had before")


def all_of_it_follows_to_another_group(folder: str) -> None:
    """The group it was cut over is closed; nothing of the model may hold on to it, nor of a copy."""
    options: list[dict[str, Any]] = [{"sequence_parallel": True}, {"gather_logits": False}]
    for how in options:
        first, whole = Group.open(), tiny("llama")
        cut = parallelize(copy.deepcopy(whole), group=first, **how)
        with Group.open() as second:
            for module in cut.modules():
                if isinstance(module, ConvertedModule):
                    module.set_group(second)
            first.close()
            assert cut.tpk_plan.group is second
            again = copy.deepcopy(cut)
            assert again.tpk_plan.model.target is again
            close(loss_of(again), loss_of(whole), "a copy")
            compare_steps(cut, whole, [loss_of(whole), loss_of(cut)], f"another group, {how}")
            cut.save_pretrained(folder)
            back = type(whole).from_pretrained(folder, dtype=torch.float64).eval()
            close(loss_of(back), loss_of(whole), "saved over another group", 1e-6)


def dropout_is_the_ranks_own_inside_blocks_and_common_between_them(group: Group) -> None:
    rates = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "n_inner": 50}
    for sequence_parallel in (False, True):
        for attention in ("sdpa", "eager"):
            torch.manual_seed(3)
            _, cut = pair(group, "gpt2", sequence_parallel=sequence_parallel, attention=attention, **rates)
            cut.train()
            torch.manual_seed(3)
            losses = [loss_of(cut) for _ in range(2)]
            assert float(losses[0]) != float(losses[1])
            seen = torch.stack([*losses, torch.rand((), dtype=torch.float64)]).detach()
            sizes = [group.all_gather_ints(int(x * 2**50)) for x in seen.tolist()]
            assert all(len(set(s)) == 1 for s in sizes), f"the ranks drifted apart: {sizes}"
            drawn: list[float] = []
            inside = cut.transformer.h[0].attn.c_proj.register_forward_pre_hook(Draw(drawn))
            loss_of(cut).backward()
            inside.remove()
            own = group.all_gather_ints(int(drawn[0] * 2**50))
            assert len(set(own)) == group.world_size, "the ranks draw the same masks for different heads"


class Draw:
    """A hook that draws a random number."""

    def __init__(self, drawn: list[float]) -> None:
        self.drawn = drawn

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.drawn.append(float(torch.rand((), dtype=torch.float64)))


def save_pretrained_saves_the_whole_model(group: Group, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    whole, cut = pair(group)
    cut.save_pretrained(folder)
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    close(loss_of(back), loss_of(whole), "saved and loaded", 1e-12)


def compiled_models_give_the_same(group: Group) -> None:
    whole, cut = pair(group, "llama", num_hidden_layers=1)
    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
    compare_steps(cut, whole, [loss_of(whole), compiled(input_ids=ids(), labels=ids()).loss], "compiled")


def uses(folder: str) -> None:
    with Group.open() as group:
        it_generates(group)
        gradient_checkpointing_gives_the_same(group)
        a_copy_and_a_pickle_compute_the_same(group)
        the_gradient_norm_counts_every_parameter_once(group)
        logits_that_stay_cut_give_the_same_loss(group)
        lora_on_cut_layers_equals_lora_on_whole_ones(group)
        dropout_is_the_ranks_own_inside_blocks_and_common_between_them(group)
        meta_models_are_cut_and_filled_by_their_shard_info(group)
        save_pretrained_saves_the_whole_model(group, folder)
        parameters_are_reached_by_their_names(group)
        parameters_keep_what_they_had(group)
    all_of_it_follows_to_another_group(folder)


def slower_uses() -> None:
    with Group.open() as group:
        codecs_pack_what_travels(group)
        compiled_models_give_the_same(group)


@pytest.mark.parametrize("R", [2, *nightly(4)])
def test_a_cut_model_is_used_like_any_other(R: int, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_ranks(uses, R, str(tmp_path))


def test_a_cut_model_is_packed_and_compiled() -> None:
    run_ranks(slower_uses, 2)


def faults_are_noticed() -> None:
    with Group.open() as group:
        whole, cut = pair(group)
        mlp = cut.model.layers[0].mlp
        assert isinstance(mlp.down_proj, RowParallelLinear) and isinstance(mlp.down_proj, nn.Linear)
        assert isinstance(cut.lm_head, ColumnParallelLinear)
        mlp.down_proj.input_is_parallel = False  # shards what is sharded already
        with pytest.raises(ValueError, match="with input_is_parallel=False x must have the unsharded 50 features"):
            loss_of(cut)
        mlp.down_proj.input_is_parallel = True
        cut.lm_head.weight.data = cut.lm_head.weight.flip(0)  # rows in another order
        with pytest.raises(AssertionError, match="rows: off by"):
            close(loss_of(cut), loss_of(whole), "rows")
        cut.lm_head.weight.data = cut.lm_head.weight.flip(0)
        close(loss_of(cut), loss_of(whole), "put right")
        mlp.gate_proj.input_grad_summed = mlp.up_proj.input_grad_summed = True  # though no module sums it
        with pytest.raises(AssertionError, match=r"sum: gradient of model\.embed_tokens\.weight: off by"):
            compare_steps(cut, whole, [loss_of(whole), loss_of(cut)], "sum")
        with pytest.raises(PlanError, match="cut already"):
            parallelize(cut, group=group)


def test_a_planted_fault_is_noticed() -> None:
    run_ranks(faults_are_noticed, 2)


def follows_a_recipe() -> None:
    one, other = (tiny("llama").float() for _ in range(2))
    recipe = Recipe(tp=2, pp=1, dp=3, micro_batch=1, sequence_parallel=True, codec="bf16")
    with Group.open() as group:
        parallelize(one, group=group, recipe=recipe)
        parallelize(other, group=group, sequence_parallel=True, codec="bf16")
        assert one.tpk_plan.sequence_parallel and one.tpk_plan.options["codec"] == "bf16"
        assert torch.equal(loss_of(one), loss_of(other))


def test_a_recipe_of_the_planner_says_how_to_shard() -> None:
    run_ranks(follows_a_recipe, 2)


def test_a_recipe_that_does_not_fit_is_refused() -> None:
    model: Any = nn.Linear(4, 4)
    with Group.open() as alone:
        with pytest.raises(ValueError, match=r"recipe has tp 2, and group .* 1 ranks"):
            parallelize(model, group=alone, recipe=Recipe(2, 1, 1, 1))
        with pytest.raises(ValueError, match="got a recipe and True, 'none'"):
            parallelize(model, group=alone, recipe=Recipe(1, 1, 1, 1), sequence_parallel=True)
        with pytest.raises(TypeError, match=r"recipe must be one of the planner \(report.recipe\), got str"):
            parallelize(model, group=alone, recipe="tp 2")  # type: ignore[arg-type]

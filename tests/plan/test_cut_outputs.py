"""What callers ask of a cut model besides logits: attention weights, caches, methods that see the full weights."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.harness.families import build, inputs
from tests.harness.parallelize import close, compare_steps, ids, tiny
from tests.harness.ranks import nightly
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {"head_dim": 4}, "gpt2": {"n_head": 9, "n_embd": 36},
    "openai-gpt": {"n_head": 9, "n_embd": 36, "n_layer": 2},  # its attention returns a list
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},  # a derived plan tells it how many heads it has
}  # fmt: skip


def pair(group: Group, model_type: str = "llama", **changes: Any) -> Any:
    whole = tiny(model_type, **{"attention": "eager"} | changes)
    return whole, parallelize(copy.deepcopy(whole), group=group)


def family(name: str, group: Group) -> Any:
    torch.manual_seed(0)
    whole: Any = build(name).double().eval()
    whole.set_attn_implementation("eager")
    return whole, parallelize(copy.deepcopy(whole), group=group)


def alike(got: Any, want: Any, what: str) -> int:
    """Compare all tensors of two outputs; return how many there are."""
    leaves = [
        [x for x in tree_leaves(dict(o) if hasattr(o, "items") else o) if isinstance(x, Tensor)] for o in (got, want)
    ]
    assert len(leaves[0]) == len(leaves[1]), what
    for i, (a, b) in enumerate(zip(*leaves, strict=True)):
        close(a, b, f"{what}: tensor {i}")
    return len(leaves[0])


def attentions(output: Any) -> list[Tensor]:
    names = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions")
    return [x for name in names for x in output.get(name) or ()]


def hidden_states_of_sharded_tokens(group: Group) -> None:
    for model_type in ("llama", "gemma2", "gpt2"):
        more = FAMILIES[model_type] | dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
        whole, cut = (tiny(model_type, attention="eager", **more) for _ in range(2))
        parallelize(cut, group=group, sequence_parallel=True)
        for use_reentrant in (None, False, True):
            for model in (whole, cut):
                if use_reentrant is not None and model.supports_gradient_checkpointing:
                    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            for call in ({}, {"return_dict": False}):
                asked = {"output_hidden_states": True, "use_cache": False}
                outputs = [m(input_ids=ids(), **asked, **call) for m in (cut, whole)]
                assert alike(*outputs, f"{model_type} {use_reentrant}") > 2
            outputs = [m(input_ids=ids(), labels=ids(), output_hidden_states=True) for m in (whole, cut)]
            losses = [o.loss + sum(h.square().mean() for h in o.hidden_states) for o in outputs]
            close(losses[1], losses[0], "a loss of hidden states")
            compare_steps(cut, whole, losses, f"{model_type} {use_reentrant}")
            for model in (whole, cut):
                model.zero_grad()


def of_decoders(group: Group) -> None:
    for model_type, more in FAMILIES.items():
        whole, cut = pair(group, model_type, **more)
        for asked in ({"output_attentions": True}, {"output_attentions": True, "output_hidden_states": True}):
            for call in ({"use_cache": False}, {"use_cache": False, "return_dict": False}):
                outputs = [m(input_ids=ids(), **asked, **call) for m in (cut, whole)]
                assert alike(*outputs, f"{model_type} {asked}") > 2
        inner = [m.base_model(input_ids=ids(), output_attentions=True) for m in (cut, whole)]
        assert alike(inner[0].attentions, inner[1].attentions, "the model in it") == 2
        assert inner[0].attentions[0].size(1) == whole.config.num_attention_heads
        for output in (inner[0].attentions, inner[1].attentions):
            (output[0] * torch.arange(float(output[0].size(1))).double().view(-1, 1, 1)).square().sum().backward()
        for name in ("model.embed_tokens.weight",) if model_type == "llama" else ():
            grads = [m.get_parameter(name).grad for m in (cut, whole)]
            info = cut.get_parameter(name).tpk_shard
            close(grads[0], info.part(grads[1]), "gradient through the weights")
        hooks = [watch for m in cut.modules() for watch in m._forward_hooks.values()]
        kept = [watch._seen for watch in hooks if hasattr(watch, "_seen")]
        assert kept and not any(kept)
    if group.world_size < 4:
        _, cut = pair(group, "diffllama", num_attention_heads=12, num_key_value_heads=6, head_dim=4)
        with pytest.raises(PlanError, match=r"output_attentions: the plan of .* does not say which heads a rank has"):
            cut(input_ids=ids(), output_attentions=True)
    whole, cut = pair(group)
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    steps = [m.generate(ids(), **asked, **OPTIONS).attentions for m in (cut, whole)]
    assert alike(*steps, "generate") == 8
    for model in (whole, cut):
        model.config.output_attentions = True
    assert alike(cut(ids()).attentions, whole(ids()).attentions, "config") == 2


def of_other_families(group: Group) -> None:
    for name, count in (("bert", 2), ("t5", 6), ("bart", 6), ("whisper", 6), ("vit", 2), ("deberta", 2), ("swin", 2)):
        if name == "swin" and group.world_size > 2:
            continue
        whole, cut = family(name, group)
        given = {"pixel_values": torch.ones(2, 3, 16, 16).double()} if name == "swin" else inputs(name)
        outputs = [m(**given, output_attentions=True) for m in (cut, whole)]
        alike(attentions(outputs[0]), attentions(outputs[1]), name)
        assert len(attentions(outputs[0])) == count, name


def of_caches(group: Group) -> None:
    from transformers import DynamicCache, StaticCache

    whole, cut = pair(group)
    kv = cut.model.layers[0].self_attn.k_proj.out_features // 4
    for heads in (3, kv):
        cache = StaticCache(config=cut.config, max_cache_len=20)
        cache.early_initialization(2, heads, 4, torch.float64, torch.device("cpu"))
        if heads == kv:
            close(cut(input_ids=ids(), past_key_values=cache).logits, whole(input_ids=ids()).logits, "static")
            continue
        with pytest.raises(PlanError, match=rf"layer 0 of past_key_values has the 3 .* expected this rank's \[{kv}\]"):
            cut(input_ids=ids(), past_key_values=cache)
    made = whole(input_ids=ids(), past_key_values=DynamicCache(config=whole.config)).past_key_values
    with pytest.raises(PlanError, match="of the whole model"):
        cut(input_ids=ids(length=1), past_key_values=made)


def of_methods(group: Group, folder: str) -> None:
    from transformers.trainer_pt_utils import get_model_param_count

    whole, cut = pair(group, num_hidden_layers=1, tie_word_embeddings=True)
    for model in (cut, cut.model):
        with pytest.raises(PlanError, match=r"resize_token_embeddings: the model is cut.*resize before parallelize"):
            model.resize_token_embeddings(70)
    calls = {"set_input_embeddings": [nn.Embedding(67, 36)], "init_weights": [], "push_to_hub": ["x"]}
    calls |= {"generate_batch": [[[1, 2]]], "init_continuous_batching": []}
    for method, arguments in calls.items():
        with pytest.raises(PlanError, match=f"{method}: the model is cut"):
            getattr(cut, method)(*arguments)
    cut.model.norm.requires_grad_(False)
    whole.model.norm.requires_grad_(False)
    for flags in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert cut.num_parameters(**flags) == whole.num_parameters(**flags), flags
    assert get_model_param_count(cut, trainable_only=True) == get_model_param_count(whole, trainable_only=True)
    cut.tie_weights()
    assert cut.lm_head.weight is cut.model.embed_tokens.weight and hasattr(cut.lm_head.weight, "tpk_shard")
    cut.enable_input_require_grads()
    cut.gradient_checkpointing_enable()
    outputs = [m(input_ids=ids(), labels=ids()) for m in (cut.train(), whole.train())]
    outputs[0].loss.backward()
    close(outputs[0].loss, outputs[1].loss, "inputs that require gradients")
    assert cut.get_memory_footprint() < whole.get_memory_footprint()
    buffer = io.BytesIO()
    whole, cut = pair(group, num_hidden_layers=1)
    torch.save(cut, buffer)
    buffer.seek(0)
    close(torch.load(buffer, weights_only=False)(ids()).logits, whole(ids()).logits, "torch.save")
    cut.half()
    assert {str(p.dtype) for p in cut.parameters()} == {"torch.float16"}
    _, cut = pair(group, num_hidden_layers=1)
    cut.model.save_pretrained(folder)  # the model in it
    back = type(whole.model).from_pretrained(folder, dtype=torch.float64)
    close(back(ids())[0], cut.model(ids())[0], "the model in it, saved")


def of_generation(group: Group) -> None:
    whole, cut = pair(group, attention="sdpa")
    draft = tiny("llama", num_hidden_layers=1)
    x = ids(batch=1)
    for more in (
        {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
    ):  # fmt: skip
        assert torch.equal(cut.generate(x, **OPTIONS, **more), whole.generate(x, **OPTIONS, **more)), more
    for helper in (draft, parallelize(copy.deepcopy(draft), group=group)):
        got = cut.generate(x, **OPTIONS, assistant_model=helper)
        assert torch.equal(got, whole.generate(x, **OPTIONS, assistant_model=draft)), "assisted"
    scores = [m.generate(x, output_scores=True, return_dict_in_generate=True, **OPTIONS).scores for m in (cut, whole)]
    assert alike(*scores, "scores") == 4


def check(folder: str) -> None:
    with Group.open() as group:
        of_decoders(group)
        hidden_states_of_sharded_tokens(group)
        of_caches(group)
        of_other_families(group)
        of_methods(group, folder)
        of_generation(group)


@pytest.mark.parametrize("R", [2, *nightly(4)])
def test_attention_weights_caches_and_methods_are_those_of_the_whole_model_or_refused(R: int, tmp_path: Path) -> None:
    run_ranks(check, R, str(tmp_path))

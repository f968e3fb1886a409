"""Logits that stay cut (gather_logits=False): cut where a loss is computed from them, whole for everybody else."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.parallelize import close, ids, part_of, tiny
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.plan.adapters.apply import cut_adapters
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def pair(group: Group, model_type: str = "llama", **changes: Any) -> Any:
    whole = tiny(model_type, **changes)
    return whole, parallelize(copy.deepcopy(whole), group=group, gather_logits=False)


def generate_and_losses_of_others_see_whole_logits(group: Group) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    whole, cut = pair(group)
    assert inspect.signature(cut.forward) == inspect.signature(whole.forward)
    for more in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        x = ids()[:1]
        assert torch.equal(cut.generate(x, **OPTIONS, **more), whole.generate(x, **OPTIONS, **more)), more
    low = ids(vocab=67 // group.world_size)
    smooth = [LabelSmoother(0.2)(m(input_ids=low), low, shift_labels=True) for m in (whole, cut)]
    close(smooth[1], smooth[0], "label smoothing")
    own = [nn.functional.cross_entropy(m(ids()).logits.flatten(0, 1), ids().flatten()) for m in (whole, cut)]
    close(own[1], own[0], "a loss of the caller's own")
    cut.loss_function = whole.loss_function  # somebody's own function gets full logits, too
    close(cut(input_ids=ids(), labels=ids()).loss, whole(input_ids=ids(), labels=ids()).loss, "transformers' function")


def calls_with_labels_keep_them_cut(group: Group) -> None:
    whole, cut = pair(group)
    own = cut.lm_head.weight.shape[0]
    want = whole(input_ids=ids(), labels=ids())
    for again in (cut, copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        for output in (again(input_ids=ids(), labels=ids()), again(ids(), None, None, None, None, ids())):
            assert output.logits.shape[-1] == own
            close(output.loss, want.loss, "loss")
        assert again(ids(), None, None, None, None, None).logits.shape[-1] == 67
    close(cut.loss_function(want.logits, ids(), 67), want.loss, "the loss of full logits")
    with pytest.raises(PlanError, match="has 67 logits, and its loss is over 60"):
        cut.loss_function(cut(ids()).logits, ids(), 60)


def adapters_around_the_head_follow(group: Group) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj", "lm_head"])
    whole, cut = (get_peft_model(m, config) for m in pair(group))
    cut_adapters(cut)
    others = dict(whole.named_parameters())
    with torch.no_grad():
        for i, (name, p) in enumerate(cut.named_parameters()):
            if "lora_" in name:
                value = 0.1 * torch.randn(others[name].shape, generator=torch.Generator().manual_seed(i)).double()
                others[name].copy_(value)
                p.copy_(part_of(p, value))
    outputs = [m(input_ids=ids(), labels=ids()) for m in (whole, cut)]
    assert outputs[1].logits.shape[-1] < 67
    close(outputs[1].loss, outputs[0].loss, "loss with adapters")
    close(cut(input_ids=ids()).logits, whole(input_ids=ids()).logits, "logits with adapters")


def models_with_a_loss_of_their_own_are_refused(group: Group) -> None:
    for family in ("trocr", "bart"):
        sizes = {"d_model": 36, "decoder_layers": 1, "decoder_attention_heads": 9, "decoder_ffn_dim": 50}
        with pytest.raises(PlanError, match="ForCausalLM, which computes one of its own: leave the logits gathered"):
            pair(
                group,
                family,
                attention="eager",
                encoder_layers=1,
                encoder_attention_heads=9,
                encoder_ffn_dim=50,
                **sizes,
            )
    whole = tiny("llama", num_hidden_layers=1)
    model = copy.deepcopy(whole)
    model.__class__ = make_class(type(whole), _own_loss)
    with pytest.raises(PlanError, match=r"computes its loss by self\.loss_function"):
        parallelize(model, group=group, gather_logits=False)
    assert not hasattr(model, "tpk_plan") and model.lm_head.weight.shape[0] == 67
    model.__class__ = make_class(type(whole), _forgets)
    with pytest.raises(PlanError, match="was given labels and computed no loss"):
        parallelize(copy.deepcopy(model), group=group, gather_logits=False)(input_ids=ids(), labels=ids())
    model.__class__ = make_class(type(whole), None)
    cut = parallelize(model, group=group, gather_logits=False)
    close(cut(input_ids=ids(), labels=ids()).loss, whole(input_ids=ids(), labels=ids()).loss, "super()")


def make_class(base: type, own: Any) -> type:
    class OwnForCausalLM(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    if own is not None:
        OwnForCausalLM.forward = own
    return OwnForCausalLM


def _own_loss(self: Any, input_ids: Any = None, labels: Any = None) -> Any:
    output = self.lm_head(self.model(input_ids).last_hidden_state)
    return nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten())


def _forgets(self: Any, input_ids: Any = None, labels: Any = None) -> Any:
    return self.lm_head(self.model(input_ids).last_hidden_state), self.loss_function if labels is None else None


def check() -> None:
    with Group.open() as group:
        generate_and_losses_of_others_see_whole_logits(group)
        calls_with_labels_keep_them_cut(group)
        models_with_a_loss_of_their_own_are_refused(group)
        adapters_around_the_head_follow(group)


def check_compiled() -> None:
    with Group.open() as group:
        whole, cut = pair(group, num_hidden_layers=1)
        compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
        close(compiled(input_ids=ids(), labels=ids()).loss, whole(input_ids=ids(), labels=ids()).loss, "compiled loss")
        close(compiled(input_ids=ids()).logits, whole(input_ids=ids()).logits, "compiled logits")


@pytest.mark.parametrize("R", [2, 3])
def test_logits_are_cut_for_the_loss_and_whole_for_everybody_else(R: int) -> None:
    pytest.importorskip("peft")
    run_ranks(check, R)


def test_compiled_models_cut_and_gather_their_logits_alike() -> None:
    run_ranks(check_compiled, 2)

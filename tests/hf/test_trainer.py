"""The Trainer of transformers on a cut model: what it learns, evaluates, saves and resumes, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.parallelize import close, ids, part_of, tiny
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import CheckpointError, PlanError, RankMismatchError
from tpkernels.hf.trainer import TensorParallelMixin, fit_trainer, one_replica, trainer_class
from tpkernels.hf.trainer.state import load_scheduler, scheduler_state
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")


def accuracy(predicted: Any) -> dict[str, float]:
    """Of the next tokens."""
    logits, labels = torch.as_tensor(predicted.predictions), torch.as_tensor(predicted.label_ids)
    return {"hits": float((logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()), "width": float(logits.shape[-1])}


def trainer_of(
    model: Any, folder: str, groups: tuple[Group, Group | None] | None, kind: Any = None, **options: Any
) -> Any:
    """A Trainer of a whole model, or of a cut one among replicas: with the same global batches, of 8 sequences."""
    from transformers import Trainer, TrainingArguments

    kind = kind or Trainer
    replicas = 1 if groups is None or groups[1] is None else groups[1].world_size
    rows, labels = ids(24), ids(24).masked_fill(torch.arange(24)[:, None] % 5 > torch.arange(7), -100)
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    settings: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4 // replicas, "gradient_accumulation_steps": 2, "seed": 3,
        "optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-2, "max_grad_norm": 0.05,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    made_with_groups = groups is not None and issubclass(kind, TensorParallelMixin)
    with one_replica():
        trainer = kind(
            model=model, args=TrainingArguments(folder, **settings | options), train_dataset=data,
            eval_dataset=data[:7], compute_metrics=accuracy, **({"dp_group": groups[1]} if made_with_groups else {}),
        )  # fmt: skip
        return trainer if groups is None or made_with_groups else fit_trainer(trainer, groups[1])


def logged(trainer: Any) -> Tensor:
    """[steps, loss and norm of the gradients]"""
    rows = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    return torch.tensor(rows, dtype=torch.float64)


def the_trainer_trains_it(tp: Group, dp: Group | None, folder: str) -> Tensor:
    """Losses, norms and parameters are those of one process up to rounding; a resumed run has those of a whole one."""
    whole = tiny("llama").float()
    cut = [parallelize(copy.deepcopy(whole), group=tp) for _ in range(2)]
    rank = f"{tp.rank}-{0 if dp is None else dp.rank}"
    want = trainer_of(whole, f"{folder}/whole-{rank}", None)
    want.train()
    assert float(logged(want)[:, 1].min()) > 0.05, "the gradients are clipped"
    saving = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    got = trainer_of(cut[0], f"{folder}/cut", (tp, dp), **saving)
    got.train()
    for column, name in enumerate(("losses", "norms")):
        close(logged(got)[:, column], logged(want)[:, column], f"{name} of the trainer", 1e-5)
    for (name, parameter), (_, other) in zip(cut[0].named_parameters(), whole.named_parameters(), strict=True):
        close(parameter, part_of(parameter, other), name, 1e-5)
    for count in ("num_input_tokens_seen", "total_flos", "epoch"):
        assert getattr(got.state, count) == getattr(want.state, count) > 0, count
    evaluations_are_those_of_one_process(got, want)
    again = trainer_of(cut[1], f"{folder}/cut", (tp, dp), kind=trainer_class())
    assert sorted(path.name for path in Path(folder, "cut").iterdir()) == [f"checkpoint-0000000{n}" for n in (4, 6)]
    again.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-00000004")  # inside of the second epoch
    assert torch.equal(logged(again), logged(got)) and len(logged(got)) == 6
    assert all(torch.equal(p, q) for p, q in zip(cut[0].parameters(), cut[1].parameters(), strict=True))
    late = trainer_of(cut[1], f"{folder}/cut", (tp, dp), save_strategy="steps", save_steps=4)
    with pytest.raises(CheckpointError, match=r"checkpoint-00000004 exists already, and a run that is at step 0"):
        late.train()
    got.save_model(f"{folder}/plain")
    kind: Any = type(whole)
    back = kind.from_pretrained(f"{folder}/plain")
    for (name, parameter), (_, other) in zip(cut[0].named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(parameter, part_of(parameter, other)), name
    return logged(again)


def evaluations_are_those_of_one_process(got: Any, want: Any) -> None:
    """At the end (7 sequences in batches of 8, then of 3), and on the way, which changes nothing of the training."""
    for size in (8, 3):
        for trainer in (got, want):
            trainer.args.per_device_eval_batch_size = size
        mine, whole = got.evaluate(), want.evaluate()
        assert abs(mine["eval_loss"] - whole["eval_loss"]) <= 1e-5 * whole["eval_loss"], (mine, whole)
        assert (mine["eval_hits"], mine["eval_width"]) == (whole["eval_hits"], whole["eval_width"]) and mine[
            "eval_hits"
        ]
    rows = [row["step"] for row in got.state.log_history if "eval_loss" in row]
    assert rows == [3, 6, 6, 6]


def other_ranks_go_on(saved: Any, group: Group, folder: str) -> None:
    """What two replicas of two ranks saved, four ranks of one replica take up; another batch is refused."""
    cut = parallelize(tiny("llama").float(), group=group)
    again = trainer_of(cut, f"{folder}/cut", (group, None))
    again.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-00000004")
    close(logged(again), saved, "losses and norms after a resume on other ranks", 1e-5)
    smaller = trainer_of(cut, f"{folder}/cut", (group, None), gradient_accumulation_steps=1)
    with pytest.raises(CheckpointError, match=r"a step was of 8 sequences when it was saved, and is of 4 now"):
        smaller.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-00000004")


def a_loss_of_ones_own_counts_alike(tp: Group, dp: Group, folder: str) -> None:
    """Of replicas with as many tokens each: the mean over them is what one process computes."""
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(input_ids=inputs["input_ids"])
            loss = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
            )
            return (loss, output) if return_outputs else loss

    whole = tiny("llama").float()
    options = {"average_tokens_across_devices": False, "max_steps": 2, "kind": Own}
    cut = trainer_of(parallelize(copy.deepcopy(whole), group=tp), folder, (tp, dp), **options)
    alone = trainer_of(whole, f"{folder}/own-{tp.rank}-{dp.rank}", None, **options)
    for trainer in (cut, alone):
        trainer.train()
    close(logged(cut), logged(alone), "a loss of one's own", 1e-5)
    with pytest.raises(PlanError, match=r"a compute_loss of your own with replicas .* set that to False"):
        trainer_of(cut.model, folder, (tp, dp), kind=Own)


def a_loss_that_is_not_divided_by_tokens_is_a_mean_over_replicas(tp: Group, dp: Group, folder: str) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(5)
    whole = AutoModelForSequenceClassification.from_config(config).float()
    cut = parallelize(copy.deepcopy(whole), group=tp)
    trainers = (
        trainer_of(cut, folder, (tp, dp), max_steps=2),
        trainer_of(whole, f"{folder}/class-{tp.rank}-{dp.rank}", None, max_steps=2),
    )
    for trainer in trainers:
        trainer.train_dataset = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids(24))]
        trainer.train()
    close(logged(trainers[0]), logged(trainers[1]), "a loss of classes", 1e-5)


def the_best_model_is_loaded_at_the_end(tp: Group, dp: Group | None, folder: str) -> None:
    """Steps that are too large make the model worse after the second; early stopping ends the run."""
    from transformers import EarlyStoppingCallback

    for limit, strategy in ((1, "steps"), (2, "best")):
        whole = tiny("llama", num_hidden_layers=1).float()
        options = {
            "max_steps": 6, "save_strategy": strategy, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
            "load_best_model_at_end": True, "save_total_limit": limit, "optim": "sgd",
            "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "learning_rate": 30.0,
        }  # fmt: skip
        rank, where = f"{tp.rank}-{0 if dp is None else dp.rank}", f"{folder}/best-{limit}-{strategy}"
        cut = trainer_of(parallelize(copy.deepcopy(whole), group=tp), where, (tp, dp), **options)
        alone = trainer_of(whole, f"{where}-{rank}", None, **options)
        found = []
        for trainer in (cut, alone):
            trainer.add_callback(EarlyStoppingCallback(2))
            trainer.train()
            found.append((trainer.state.best_global_step, trainer.state.global_step))
        assert found[0] == found[1] and found[0][0] < found[0][1], found
        best = tiny("llama", num_hidden_layers=1).float()  # alone: the first rank alone has saved, and loaded
        options |= {"max_steps": found[0][0], "load_best_model_at_end": False, "save_strategy": "no"}
        trainer_of(best, f"{where}-{rank}", None, **options).train()
        for (name, parameter), other in zip(cut.model.named_parameters(), best.parameters(), strict=True):
            close(parameter, part_of(parameter, other), f"{name} of the best model", 1e-4)
        best_step = found[0][0]
        kept = [best_step] if limit == 1 else [best_step - 1, best_step]
        left = sorted(path.name for path in Path(where).iterdir())
        assert left == [f"checkpoint-{n:08d}" for n in kept], (left, found, limit, strategy)


def an_optimizer_of_whole_tensors_makes_their_steps(tp: Group, dp: Group, folder: str) -> None:
    whole = tiny("llama").float()
    cut = trainer_of(parallelize(copy.deepcopy(whole), group=tp), folder, (tp, dp), optim="adafactor", max_steps=2)
    alone = trainer_of(whole, f"{folder}/ada-{tp.rank}-{dp.rank}", None, optim="adafactor", max_steps=2)
    for trainer in (cut, alone):
        trainer.train()
    for (name, parameter), other in zip(cut.model.named_parameters(), whole.parameters(), strict=True):
        close(parameter, part_of(parameter, other), f"{name} by Adafactor", 1e-4)


def what_the_trainer_cannot_do_is_refused(tp: Group, dp: Group, folder: str) -> None:
    cut = parallelize(tiny("llama").float(), group=tp)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"save_only_model": True}, "save_model"),
        ({"auto_find_batch_size": True}, "give a size"),
        ({"optim": "adafactor", "save_strategy": "steps"}, "a checkpoint with Adafactor, .* set save_strategy='no'"),
        ({"train_sampling_strategy": "group_by_length"}, "take 'random'"),
        ({"accelerator_config": {"split_batches": True}}, "split"),
        ({"train_sampling_strategy": "batch_rebalance"}, "take 'random'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatched"),
        ({"accelerator_config": {"even_batches": False}}, "uneven"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "shuffle apart"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}, "once a step"),
    ]
    for options, why in refused:
        with pytest.raises(PlanError, match=why):
            trainer_of(cut, folder, (tp, dp), **options)
    made = trainer_of(cut, folder, None)
    made.model_init = lambda: cut
    with pytest.raises(PlanError, match=r"model_init with replicas .* make the model yourself"):
        fit_trainer(made, dp)
    with pytest.raises(PlanError, match="dp_group must join"):
        trainer_of(cut, folder, (tp, None))
    trainer = trainer_of(cut, folder, (tp, dp))
    trainer.train_dataset = [{"input_ids": row, "labels": row} for row in ids(24) // (1 + tp.rank)]  # a planted fault
    with pytest.raises(
        RankMismatchError, match=r"check_replicas .*batch\['input_ids'\].* is the first to differ, on ranks \["
    ):
        trainer.train()


def trained_by_the_trainer(folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with Group.open((mesh, "tp")) as tp, Group.open((mesh, "dp")) as dp:
        saved = the_trainer_trains_it(tp, dp, folder)
        with Group.open() as group:
            other_ranks_go_on(saved, group, folder)
        a_loss_of_ones_own_counts_alike(tp, dp, folder)
        a_loss_that_is_not_divided_by_tokens_is_a_mean_over_replicas(tp, dp, folder)
        an_optimizer_of_whole_tensors_makes_their_steps(tp, dp, folder)
        the_best_model_is_loaded_at_the_end(tp, dp, folder)
        what_the_trainer_cannot_do_is_refused(tp, dp, folder)


def test_replicas_of_a_cut_model_are_trained_by_the_trainer_as_one_process_trains_the_whole(tmp_path: Path) -> None:
    run_ranks(trained_by_the_trainer, 4, str(tmp_path))


def trained_alone(folder: str) -> None:
    with Group.open() as group:
        the_trainer_trains_it(group, None, folder)


def test_a_cut_model_is_trained_by_the_trainer_as_one_process_trains_the_whole(tmp_path: Path) -> None:
    run_ranks(trained_alone, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"fp16": True},
            "fp16=True does not work on a cut model; each rank would find a loss scale of its own: take bf16",
        ),
        ({"save_only_model": True}, r"save_only_model=True .* trainer\.save_model"),
        ({"push_to_hub": True}, r"push_to_hub=True .* push what trainer\.save_model wrote"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True .* give a size"),
    ],
)
def test_arguments_that_cannot_be_right_on_a_cut_model_are_refused(
    options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with Group.open() as group:
        trainer = trainer_of(parallelize(tiny("llama", num_hidden_layers=1), group=group), str(tmp_path), None)
        fit_trainer(trainer)
        for name, value in options.items():  # afterwards, as some of them want a GPU or the network at once
            setattr(trainer.args, name, value)
        with pytest.raises(PlanError, match=why):
            fit_trainer(trainer)


def test_models_and_trainers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="fit_trainer: the model of the trainer is not cut"):
        fit_trainer(SimpleNamespace(model=tiny("llama", num_hidden_layers=1)))
    with Group.open() as group:
        cut = parallelize(tiny("llama", num_hidden_layers=1), group=group, gather_logits=False)
        with pytest.raises(PlanError, match="make arguments and trainer inside `with one_replica"):
            fit_trainer(SimpleNamespace(model=cut, accelerator=SimpleNamespace(num_processes=2)))
        with pytest.raises(PlanError, match=r"compute_metrics .* gather_logits=False .* prediction_loss_only=True"):
            fit_trainer(trainer_of(cut, str(tmp_path), None))
        fit_trainer(trainer_of(cut, str(tmp_path), None, prediction_loss_only=True))
        smooth = {"prediction_loss_only": True, "label_smoothing_factor": 0.1}
        fit_trainer(trainer_of(cut, str(tmp_path), None, **smooth))  # calls the model without labels: logits are whole
        own = trainer_of(cut, str(tmp_path), None, prediction_loss_only=True)
        own.__class__ = type("OwnLoss", (type(own),), {"compute_loss": lambda self, *args, **kwargs: None})
        with pytest.raises(PlanError, match=r"compute_loss .* gather_logits=False .*: gather the logits"):
            fit_trainer(own)


def test_a_scheduler_with_milestones_goes_on_behind_a_checkpoint() -> None:
    def made() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4], gamma=0.5)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(scheduler.get_last_lr()[0])
        return found

    want = rates(*made(), 6)
    first, second = made(), made()
    begin = rates(*first, 3)
    load_scheduler(second[1], json.loads(json.dumps(scheduler_state(first[1]))))
    second[0].load_state_dict(first[0].state_dict())
    assert begin + rates(*second, 3) == want and want[-1] == 0.125
    assert sorted(second[1].milestones.elements()) == [2, 4, 4]

"""Files and copies of shards in other hands: known as shards, or an error where one rank's would be another's."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.ops import raised
from tests.harness.parallelize import close, ids, tiny
from tpkernels import one_replica, parallelize
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks


def even(seed: int = 0) -> nn.Module:
    """Every rank's shards have one shape, so that sizes give no mistake away."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()


def cut_over(group: Group, seed: int = 0) -> nn.Module:
    return parallelize(even(seed), group=group, plan={"0": "column", "2": "row"})


def x() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def state_dicts_are_loaded_by_the_rank_that_saved_them(folder: str) -> None:
    with Group.open(timeout_s=30) as group:
        cut, whole = cut_over(group), even()
        torch.save(cut.state_dict(), f"{folder}/{group.rank}.pt")
        torch.save(whole.state_dict(), f"{folder}/whole{group.rank}.pt")
        dist.barrier()
        again = cut_over(group, 1)
        before = copy.deepcopy(again.state_dict())
        for weights_only in (True, False):
            other = torch.load(f"{folder}/{1 - group.rank}.pt", weights_only=weights_only)
            for assign in (False, True):
                text = raised(partial(again.load_state_dict, other, assign=assign), RuntimeError)
                assert f"0.weight, 0.bias: the shards of rank {1 - group.rank} of 2, expected those of rank" in text
            for name, value in again.state_dict().items():
                assert name == "2.bias" or torch.equal(value, before[name]), name
        for path in (f"{folder}/{group.rank}.pt", f"{folder}/whole{group.rank}.pt"):
            again = cut_over(group, 1)
            again.load_state_dict(torch.load(path))
            close(again(x()), whole(x()), path)
            again = cut_over(group, 1)
            again[0].load_state_dict(cut[0].state_dict())
        mixed = torch.load(f"{folder}/{1 - group.rank}.pt")
        mixed.update(whole.state_dict())  # full tensors under the marks of shards
        again.load_state_dict(mixed)
        close(again(x()), whole(x()), "full tensors")


def states_of_optimizers_are_loaded_by_the_rank_that_saved_them(folder: str) -> None:
    with Group.open(timeout_s=30) as group:
        for kind in (torch.optim.Adam, OfFullTensors):
            models = [cut_over(group) for _ in range(2)]
            first, second = (kind(model.parameters(), lr=0.05) for model in models)
            for model, optimizer in zip(models, (first, second), strict=True):
                model(x()).square().sum().backward()
                optimizer.step()
            torch.save(first.state_dict(), f"{folder}/{group.rank}.pt")
            dist.barrier()
            before = copy.deepcopy(second.state_dict())
            other = torch.load(f"{folder}/{1 - group.rank}.pt")
            text = raised(partial(second.load_state_dict, other), ValueError)
            assert f"parameter 0 is that of the shard of rank {1 - group.rank} of 2" in text
            assert all(torch.equal(second.state_dict()["state"][0][k], v) for k, v in before["state"][0].items())
            third = kind(models[1].parameters(), lr=0.05)
            third.load_state_dict(torch.load(f"{folder}/{group.rank}.pt"))
            for optimizer in (first, third):
                optimizer.step()
            close(models[1](x()), models[0](x()), "a state of its own")
            dist.barrier()


class OfFullTensors(torch.optim.Adam):
    """A class that is not known to step on shards."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def accelerators_save_under_own_names(folder: str) -> None:
    from accelerate import Accelerator

    with Group.open(timeout_s=30) as group:
        model = cut_over(group)
        with one_replica():
            accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 0.1))
        model(x()).square().sum().backward()
        optimizer.step()
        want = model(x())
        text = raised(lambda: accelerator.save_state(folder), ValueError)
        assert "save parts of parameters that are cut over group" in text and "first '0.bias'" in text
        assert "Accelerator.save_model" in raised(lambda: accelerator.save_model(model, folder), ValueError)
        assert not os.listdir(folder)
        dist.barrier()
        accelerator.save_state(f"{folder}/{group.rank}")
        optimizer.step()
        accelerator.load_state(f"{folder}/{group.rank}")
        close(model(x()), want, "a folder of its own for each rank")


def trainers_that_nobody_fitted_save_no_optimizer(folder: str) -> None:
    import transformers

    rows = [{"input_ids": row, "labels": row} for row in ids(4)]
    options: Any = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    with Group.open(timeout_s=30) as group, one_replica():
        cut = parallelize(tiny("llama").float(), group=group)
        for saves in ({}, {"save_strategy": "no"}, {"save_only_model": True}):
            arguments = transformers.TrainingArguments(folder, **options, **saves)
            trainer = transformers.Trainer(model=cut, args=arguments, train_dataset=rows)
            if saves:
                trainer.train()
            else:
                assert "tpkernels.fit_trainer" in raised(trainer.train, ValueError)


def norms_of_copies_are_those_of_the_whole_model() -> None:
    """Masters in another dtype, whose gradients are set by hand: all parameters, or all that are trained."""
    with Group.open(timeout_s=30) as first:
        other = cut_over(first)  # of the same shapes, and alive below
    with Group.open(timeout_s=30) as group:
        assert other[0].weight.shape == cut_over(group)[0].weight.shape
        for frozen in ((), ("0.weight",)):
            norms = []
            for model in (even(), cut_over(group)):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name not in frozen)
                model(x()).square().sum().backward()
                trained = [p for p in model.parameters() if p.requires_grad]
                masters = [p.detach().clone().float() for p in trained]
                for master, parameter in zip(masters, trained, strict=True):
                    assert parameter.grad is not None
                    master.grad = parameter.grad.float()
                norms.append(torch.nn.utils.clip_grad_norm_(masters, 0.1))
            close(norms[1], norms[0], f"norm without {frozen}")
        uncut = even()  # of other shapes than the shards
        uncut(x()).square().sum().backward()
        if group.rank == 0:  # no collective
            torch.nn.utils.clip_grad_norm_(uncut.parameters(), 0.1)


def test_state_dicts_are_loaded_by_the_rank_that_saved_them(tmp_path: Any) -> None:
    run_ranks(state_dicts_are_loaded_by_the_rank_that_saved_them, 2, str(tmp_path))


def test_states_of_optimizers_are_loaded_by_the_rank_that_saved_them(tmp_path: Any) -> None:
    run_ranks(states_of_optimizers_are_loaded_by_the_rank_that_saved_them, 2, str(tmp_path))


def test_accelerators_save_under_own_names(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    run_ranks(accelerators_save_under_own_names, 2, str(tmp_path))


def test_trainers_that_nobody_fitted_save_no_optimizer(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    run_ranks(trainers_that_nobody_fitted_save_no_optimizer, 2, str(tmp_path))


def test_norms_of_copies_are_those_of_the_whole_model() -> None:
    run_ranks(norms_of_copies_are_those_of_the_whole_model, 2)

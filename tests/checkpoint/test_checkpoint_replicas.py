"""Checkpoints of replicas: parameters of their own between two averages, aggregators that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.checkpoints import adamw, assert_same, grid, learn, small_gpt
from tpkernels import checkpoint
from tpkernels.checkpoint.ranks import file_name
from tpkernels.data_parallel import GradAggregator
from tpkernels.errors import CheckpointError
from tpkernels.testing import run_ranks


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the parameters and of the optimizer's state."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}/{field}": value.clone() for field, value in optimizer.state[p].items()}
    return found


def local_steps(folder: str) -> None:
    with grid(2, 2) as (cut, replicas):
        both: dict[str, Any] = {"group": cut, "dp_group": replicas}
        model, other = small_gpt(cut), small_gpt(cut, seed=7)
        optimizer, its = adamw(model), adamw(other)
        mode: dict[str, Any] = {"group": replicas, "codec": "none", "mode": "local", "local_steps": 9}
        with GradAggregator(model, **mode) as aggregator, GradAggregator(other, **mode) as another:
            for step in range(2):
                learn(model, optimizer, range(step, step + 1), aggregator, replicas.rank)
                aggregator.after_step()
            want, state = tensors_of(model, optimizer), aggregator.state_dict()
            with pytest.raises(CheckpointError, match=r"2 local steps after .* or pass own_parameters=True"):
                checkpoint.save(model, Path(folder, "x"), optimizer=optimizer, aggregator=aggregator, **both)
            with pytest.raises(CheckpointError, match="own_parameters needs an aggregator, got None"):
                checkpoint.save(model, Path(folder, "x"), optimizer=optimizer, own_parameters=True, **both)
            more: dict[str, Any] = {"optimizer": optimizer, "aggregator": aggregator, "own_parameters": True}
            checkpoint.save_async(model, Path(folder, "x"), **more, **both).wait()
            checkpoint.load(other, Path(folder, "x"), optimizer=its, aggregator=another, **both)
            assert_same(tensors_of(other, its), want)
            assert_same(another.state_dict()["tensors"], state["tensors"])
            assert another.state_dict()["numbers"] == state["numbers"]
            checkpoint.load(other, Path(folder, "x"), **both)
            own = checkpoint.peek(Path(folder, "x"))["own"][file_name(cut.rank, 2, replicas.rank)]
            assert own["aggregator"]["own_parameters"] is True
            assert "aggregator/replica_exp_avg.norm.weight" in own["tensors"]


def test_replicas_between_two_averages_get_their_own_parameters_back(tmp_path: Path) -> None:
    run_ranks(local_steps, 4, str(tmp_path))


def an_aggregator_that_does_not_fit(folder: str) -> None:
    with grid(1, 3) as (cut, replicas):
        both: dict[str, Any] = {"group": cut, "dp_group": replicas}
        model = small_gpt(cut)
        optimizer = adamw(model)
        with GradAggregator(model, group=replicas, codec="int8") as aggregator:
            learn(model, optimizer, range(2), aggregator, replicas.rank)
            checkpoint.save(model, Path(folder, "x"), optimizer=optimizer, aggregator=aggregator, **both)
            learn(model, optimizer, range(2, 3), aggregator, replicas.rank)
            before, state = tensors_of(model, optimizer), aggregator.state_dict()
            if replicas.rank == 1:
                check = aggregator.check_state_dict
                aggregator.check_state_dict = lambda saved: check(  # type: ignore[method-assign]
                    {"tensors": saved["tensors"], "numbers": saved["numbers"] | {"mode": "delayed"}}
                )
            with pytest.raises(CheckpointError, match=r"rank 0 of replica 1: load_state_dict: mode must be 'sync'"):
                checkpoint.load(model, Path(folder, "x"), optimizer=optimizer, aggregator=aggregator, **both)
            assert_same(tensors_of(model, optimizer), before)
            after = aggregator.state_dict()
            assert_same(after["tensors"], state["tensors"])
            assert after["numbers"] == state["numbers"]


def test_an_aggregator_that_does_not_fit_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    run_ranks(an_aggregator_that_does_not_fit, 3, str(tmp_path))

"""check_replicas: what ranks that must have the same do not have the same is found and named, at one small message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.harness.ops import raised
from tpkernels import check_replicas
from tpkernels.comm.group import Group
from tpkernels.data_parallel import replicas_callback
from tpkernels.errors import RankMismatchError
from tpkernels.layers import ColumnParallelLinear
from tpkernels.testing import run_ranks


class Net(nn.Module):
    """A cut layer, a replicated one, a buffer."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cut = ColumnParallelLinear.from_linear(nn.Linear(4, 5), group=group)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.cut(x))
        return y


class Run:
    """What one rank trains with; the same on all ranks but for the parts."""

    def __init__(self, group: Group) -> None:
        self.group, self.model = group, Net(group)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW([{"params": parameters[:-1]}, {"params": parameters[-1:]}], lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.batch = {"ids": torch.arange(6).view(2, 3), "names": ["a", "b"]}
        torch.manual_seed(7)
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self.optimizer.step()

    def check(self, **options: Any) -> bool:
        """With everything that there is."""
        given = {"batch": self.batch, "optimizer": self.optimizer, "scaler": self.scaler, **options}
        return check_replicas(self.model, group=self.group, **given)


def scaled_down(run: Run) -> None:
    """As GradScaler does when one rank alone has met an overflow."""
    run.scaler.scale(torch.ones(()))
    run.scaler.update(512.0)


def other_momentum(run: Run) -> None:
    run.optimizer.state[run.model.norm.bias]["exp_avg"] += 1e-7


def moved_to_another_group(run: Run) -> None:
    first, second = run.optimizer.param_groups
    first["params"].append(second["params"].pop())


FAULTS: dict[str, Callable[[Run], Any]] = {
    "'norm.weight' is the first to differ": lambda run: run.model.norm.weight.data.add_(1e-6),
    "'table' is the first to differ": lambda run: run.model.table.neg_(),
    "\"batch['ids']\" is the first to differ": lambda run: run.batch["ids"].add_(1),  # type: ignore[attr-defined]
    "\"batch['names'][1]\" is the first to differ": lambda run: run.batch.update(names=["a", "c"]),
    "'random numbers of cpu' is the first to differ": lambda run: torch.rand(1),
    "'scaler scale' is the first to differ": scaled_down,
    "'optimizer option lr of group 0'": lambda run: run.optimizer.param_groups[0].update(lr=0.2),
    "'optimizer state exp_avg of norm.bias'": other_momentum,
    "'optimizer group of norm.bias' is the first to differ": moved_to_another_group,
    "'requires_grad of norm.bias' is the first to differ": lambda run: run.model.norm.bias.requires_grad_(False),
    "'training of norm' is the first to differ": lambda run: run.model.norm.eval(),
}


def each_fault_of_one_rank_is_named() -> None:
    with Group.open(timeout_s=30) as group:
        run = Run(group)
        run.scaler.scale(torch.ones(()))
        assert run.check(), "all is well, though the parts differ"
        group.reset_stats()
        assert run.check() and group.stats()["wire_bytes"] <= 8 * group.world_size * 2
        for text, plant in FAULTS.items():
            run = Run(group)
            run.scaler.scale(torch.ones(()))
            if group.rank == group.world_size - 1:
                plant(run)
            assert not run.check(step=3, every=2), "not yet"
            got = raised(lambda run=run: run.check(step=4, every=2), RankMismatchError)
            # Of two ranks none has a majority, and the lowest counts.
            assert text in got and f"on ranks [{group.world_size - 1}]: " in got, f"{text}: {got}"
            assert got.startswith("check_replicas on group"), got
        assert "every must be 1 or more, got 0" in raised(lambda: Run(group).check(every=0), ValueError)


def replicas_may_have_batches_and_random_numbers_of_their_own() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with Group.open((mesh, "tp")) as tp, Group.open((mesh, "dp")) as dp:
        run = Run(tp)
        torch.manual_seed(dp.rank)
        run.group = dp
        assert run.check()
        assert "'random numbers of cpu'" in raised(lambda: run.check(rng=True), RankMismatchError)
        if dp.rank == 1:
            run.model.cut.weight.data.add_(1.0)
        assert "'cut.weight' is the first to differ" in raised(run.check, RankMismatchError)
        run.group = tp
        assert run.check(), "over the group over which it is cut its parts are none of anybody's business"


def the_trainer_asks_every_few_steps(folder: str) -> None:
    import transformers

    from tests.harness.parallelize import ids, tiny
    from tpkernels import fit_trainer, one_replica, parallelize

    class Drifts(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2 and group.rank == 1:  # before the third step
                model.model.norm.weight.data.add_(0.5)

    group = Group.open(timeout_s=30)
    with one_replica():
        arguments = transformers.TrainingArguments(
            folder, max_steps=6, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        model = parallelize(tiny("llama", num_hidden_layers=1).float(), group=group)
        rows = [{"input_ids": row, "labels": row} for row in ids(8)]
        trainer = fit_trainer(transformers.Trainer(model=model, args=arguments, train_dataset=rows))
    trainer.add_callback(replicas_callback(2, group=group))
    trainer.add_callback(Drifts())
    assert "'model.norm.weight' is the first to differ" in raised(trainer.train, RankMismatchError)
    assert trainer.state.global_step == 4
    group.close()


@pytest.mark.parametrize("R", [2, 3])
def test_each_fault_of_one_rank_is_named(R: int) -> None:
    run_ranks(each_fault_of_one_rank_is_named, R)


def test_replicas_may_have_batches_and_random_numbers_of_their_own() -> None:
    run_ranks(replicas_may_have_batches_and_random_numbers_of_their_own, 4)


def test_the_trainer_asks_every_few_steps(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run_ranks(the_trainer_asks_every_few_steps, 2, str(tmp_path))

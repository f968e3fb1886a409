"""A cut model under functions of torch for full ones: an error that says what to do, or the right numbers."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import operator
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tests.harness.ops import raised
from tpkernels import one_replica, parallelize
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator
from tpkernels.guards import CHECKS
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
from tpkernels.testing import run_ranks


class Block(nn.Module):
    """Uneven cuts along rows and along columns, and a replicated norm."""

    def __init__(self, group: Group | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        up, down = nn.Linear(10, 8), nn.Linear(8, 10)
        self.norm: nn.Module = nn.BatchNorm1d(10)
        self.up: nn.Module = up if group is None else ColumnParallelLinear.from_linear(up, group=group)
        self.down: nn.Module = down if group is None else RowParallelLinear.from_linear(down, group=group)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


def data(seed: int = 0) -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))


def accelerator(model: nn.Module) -> Any:
    """As under torchrun. Without accelerate DDP alone is asked, which is what it would call."""
    if importlib.util.find_spec("accelerate") is None:
        return DistributedDataParallel(model)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first it made, of one process
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, value)
        try:
            return Accelerator(cpu=True).prepare(model)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def fully_sharded(model: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def old_fully_sharded(model: nn.Module) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def zero(model: nn.Module) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)


def local_sgd(model: nn.Module) -> Any:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    return PeriodicModelAverager(period=2, warmup_steps=0).average_parameters(model.parameters())


def stage(model: nn.Module) -> Any:
    from torch.distributed.pipelining import PipelineStage

    return PipelineStage(model, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def dcp_save(model: nn.Module) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict()}, checkpoint_id=tempfile.mkdtemp())


def dcp_save_of_the_model(model: nn.Module) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"app": {"model": get_model_state_dict(model)}}, checkpoint_id=tempfile.mkdtemp())


def dcp_async_save(model: nn.Module) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.async_save({"model": model}, checkpoint_id=tempfile.mkdtemp())


def dcp_load(model: nn.Module) -> None:
    import torch.distributed.checkpoint as dcp

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"model": Block().state_dict()}, checkpoint_id=folder[0])
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder[0])


def full_state(model: nn.Module) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def full_optimizer_state(model: nn.Module) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))


def state_of_rank_0(model: nn.Module) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    return set_model_state_dict(model, model.state_dict() if dist.get_rank() == 0 else {}, options=options)


def distributed_tensors(model: nn.Module) -> Any:
    from torch.distributed.tensor import distribute_module

    return distribute_module(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def cut_by_torch(model: nn.Module) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    with Group.open() as group:
        linears = parallelize(
            nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), group=group, plan={"0": "column", "1": "row"}
        )
        return parallelize_module(linears, init_device_mesh("cpu", (dist.get_world_size(),)), {"0": ColwiseParallel()})


REFUSED: list[tuple[Callable[[nn.Module], Any], str]] = [
    (DistributedDataParallel, "DistributedDataParallel: its ranks [0, 1] must hold the same parameters, but 3 are cut"),
    (accelerator, "DistributedDataParallel: its ranks [0, 1] must hold the same parameters"),
    (fully_sharded, "fully_shard: its ranks [0, 1] must hold the same parameters, but 3 are cut"),
    (old_fully_sharded, "FullyShardedDataParallel: its ranks [0, 1] must hold"),
    (zero, "ZeroRedundancyOptimizer: its ranks [0, 1] must hold"),
    (local_sgd, "average_parameters: its ranks [0, 1] must hold"),
    (stage, "PipelineStage: its ranks [0, 1] must hold"),
    (DataParallel, "DataParallel: module must be whole, but 3 of its parameters are cut (first 'up.weight')"),
    (
        lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
        "SyncBatchNorm.convert_sync_batchnorm: its ranks [0, 1]",
    ),
    (dcp_save, "save or load parts of parameters that are cut over group 'world' under the same names (here 3, first"),
    (dcp_save_of_the_model, "take tpkernels.checkpoint.save"),
    (dcp_async_save, "take tpkernels.checkpoint.save"),
    (dcp_load, "to load a whole one, load it into a state dict of full tensors for model.load_state_dict"),
    (full_state, "state_dict with full_state_dict=True: its ranks [0, 1] must hold the same parameters, but 3 are cut"),
    (full_optimizer_state, "take save_pretrained or tpkernels.checkpoint.save"),
    (state_of_rank_0, "take save_pretrained or tpkernels.checkpoint.save"),
    (distributed_tensors, "torch.distributed.tensor: its ranks [0, 1] must hold the same parameters"),
    (cut_by_torch, "torch.distributed.tensor: its ranks [0, 1] must hold the same parameters"),
    (lambda model: GradAggregator(model), "GradAggregator: parameter 'up.weight' is cut over group 'world'"),
]


def what_takes_parts_for_replicas_is_refused() -> None:
    with Group.open(timeout_s=30) as group:
        model = Block(group)
        model(data()).sum().backward()
        before = copy.deepcopy(model.state_dict())
        names = [type(module).__name__ for module in model.modules()]
        for hand, text in REFUSED:
            got = raised(lambda hand=hand: hand(model), ValueError)
            assert text in got, f"{hand}: {got}"
            assert "group" in got or "one_replica" in got or "device" in got, got
        assert [type(module).__name__ for module in model.modules()] == names
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def whole_models_and_saves_under_own_names_are_as_ever() -> None:
    import torch.distributed.checkpoint as dcp

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    with Group.open(timeout_s=30) as group:
        cut, whole = Block(group), Block()
        ddp = DistributedDataParallel(whole)
        ddp(data(dist.get_rank())).sum().backward()
        nn.SyncBatchNorm.convert_sync_batchnorm(Block())
        assert zero(whole) is not None
        dcp.save({"model": whole.state_dict()}, checkpoint_id=folder[0] + "/whole")
        dcp.save({f"rank{group.rank}": cut.state_dict()}, checkpoint_id=folder[0] + "/parts")
        back = {name: torch.zeros_like(value) for name, value in cut.state_dict().items()}
        dcp.load({f"rank{group.rank}": back}, checkpoint_id=folder[0] + "/parts")
        for name, value in cut.state_dict().items():
            assert torch.equal(back[name], value), name
        dist.barrier()
        assert "unexpected keyword" in raised(lambda: DistributedDataParallel(cut, wrong=1), TypeError)


def replicas_of_a_cut_model_work_as_ever() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with Group.open((mesh, "tp")) as tp, Group.open((mesh, "dp")) as dp:
        for options in ({"process_group": mesh.get_group("dp")}, {"device_mesh": mesh["dp"]}):
            ddp = DistributedDataParallel(Block(tp), **options)
            ddp(data(dp.rank)).square().sum().backward()
            whole = Block()
            for rank in range(2):
                whole(data(rank)).square().sum().div(2).backward()
            norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.1)
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1))
        from torch.distributed.optim import ZeroRedundancyOptimizer

        ZeroRedundancyOptimizer(Block(tp).parameters(), torch.optim.SGD, process_group=mesh.get_group("dp"), lr=0.1)
        GradAggregator(Block(tp), group=dp).close()
        assert "cut over group" in raised(lambda: GradAggregator(Block(tp)), ValueError)


def norms_are_those_of_the_whole_model() -> None:
    from torch.nn.utils import clip_grad_norm_  # bound before anything is cut

    with Group.open(timeout_s=30) as group:
        whole, cut = Block(), Block(group)
        for model in (whole, cut):
            model(data()).square().sum().backward()
        for norm_type in (1.0, 2.0, 3.0, float("inf")):
            want = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()], norm_type)
            got = torch.nn.utils.get_total_norm([p.grad for p in cut.parameters()], norm_type)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(
                torch.nn.utils.get_total_norm(cut.parameters(), norm_type),
                torch.nn.utils.get_total_norm(whole.parameters(), norm_type),
            )
            for made in (Tensor.detach, lambda t: t.data, lambda t: t.view_as(t)):
                norm = torch.nn.utils.get_total_norm([made(p.grad) for p in cut.parameters()], norm_type)
                torch.testing.assert_close(norm, want)
        for norm_type in (0.0, -1.0, -float("inf")):
            assert "must be above 0" in raised(
                lambda norm_type=norm_type: clip_grad_norm_(cut.parameters(), 1.0, norm_type), ValueError
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in cut.parameters()])
        torch.nn.utils.clip_grads_with_norm_(cut.parameters(), 0.5, norm)
        assert float(clip_grad_norm_(cut.parameters(), 0.1, foreach=True)) == pytest.approx(0.5, rel=1e-4)
        clip_grad_norm_(whole.parameters(), 0.1)
        for (name, p), q in zip(cut.named_parameters(), whole.parameters(), strict=True):
            part = q.grad if not hasattr(p, "tpk_shard") else p.tpk_shard.part(q.grad)
            torch.testing.assert_close(p.grad, part, msg=name)
        for p in cut.parameters():
            p.grad.fill_(float("nan") if group.rank == 0 else 1.0)
        text = raised(lambda: clip_grad_norm_(cut.parameters(), 1.0, error_if_nonfinite=True), RuntimeError)
        assert "of all gradients is nan" in text


class OfFullTensors(torch.optim.AdamW):
    """The same, but its steps run on gathered tensors, because it has a method of its own."""

    def second_step(self) -> None: ...


def optimizers_take_the_state_of_the_whole_model() -> None:
    with Group.open(timeout_s=30) as group:
        for kind in (torch.optim.AdamW, OfFullTensors):
            whole, cut = Block(), Block(group)
            first, second = (kind(model.parameters(), lr=0.05, eps=1e-3) for model in (whole, cut))
            for step in range(3):
                for model, optimizer in ((whole, first), (cut, second)):
                    optimizer.zero_grad()
                    model(data(step)).square().sum().backward()
                    optimizer.step()
                if step == 1:
                    second.load_state_dict(copy.deepcopy(first.state_dict()))
            for (name, p), q in zip(cut.named_parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(p, q if not hasattr(p, "tpk_shard") else p.tpk_shard.part(q), msg=name)


def a_scaler_skips_on_all_ranks_or_on_none() -> None:
    with Group.open(timeout_s=30) as group:
        for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon):
            for options in ({}, {"fused": True}) if kind is not torch.optim.Muon else ({},):
                model, scaler = Block(group), torch.amp.GradScaler("cpu", init_scale=4.0)
                optimizer = kind([p for p in model.parameters() if p.dim() == 2], lr=0.1, **options)
                for overflow in (False, True):
                    before = [p.detach().clone() for p in model.parameters()]
                    optimizer.zero_grad()
                    scaler.scale(model(data()).square().sum()).backward()
                    if overflow and group.rank == group.world_size - 1:
                        model.up.weight.grad[0, 0] = float("inf")
                    scaler.step(optimizer)
                    scaler.update()
                    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if p.dim() == 2]
                    assert same == [overflow] * 2, (kind, options, overflow, same)
                assert scaler.get_scale() == 2.0


def the_trainer_alone_is_refused_or_right(folder: str) -> None:
    import transformers

    from tests.harness.parallelize import ids, tiny

    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    options: dict[str, Any] = {
        "max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.01, "logging_steps": 1,
    }  # fmt: skip

    def trained(model: Any) -> list[float]:
        arguments = transformers.TrainingArguments(folder, **options)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]

    with Group.open(timeout_s=30) as group:
        whole = tiny("llama").float()
        cut = parallelize(copy.deepcopy(whole), group=group)
        with one_replica():
            want, got = trained(whole), trained(cut)
        assert got == pytest.approx(want, rel=1e-4), "without fit_trainer the norm is right all the same"


def a_module_that_is_loaded_late_is_watched() -> None:
    """Also after others have asked where it is, as packages do that look for optional parts of torch."""
    late = CHECKS.keys() - sys.modules.keys()
    assert late
    with Group.open() as group:
        Block(group)
    for name in CHECKS:
        assert name not in late or importlib.util.find_spec(name) is not None
    for name, checks in CHECKS.items():
        module = importlib.import_module(name)
        for path in checks:
            assert operator.attrgetter(path)(module).tpk_guard, f"{name}: {path}"
    again = importlib.reload(sys.modules["torch.distributed.algorithms.model_averaging.utils"])
    assert again.average_parameters.tpk_guard


@pytest.mark.parametrize(
    ("check", "R"),
    [
        (what_takes_parts_for_replicas_is_refused, 2),
        (whole_models_and_saves_under_own_names_are_as_ever, 2),
        (norms_are_those_of_the_whole_model, 2),
        (norms_are_those_of_the_whole_model, 3),
        (optimizers_take_the_state_of_the_whole_model, 3),
        (replicas_of_a_cut_model_work_as_ever, 4),
        (a_scaler_skips_on_all_ranks_or_on_none, 2),
    ],
)
def test_a_cut_model_in_foreign_hands(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


def test_a_module_that_is_loaded_late_is_watched() -> None:
    run_ranks(a_module_that_is_loaded_late_is_watched, 2, fresh=True)


def test_a_trainer_that_nobody_fitted_takes_the_norm_over_all_ranks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run_ranks(the_trainer_alone_is_refused_or_right, 2, str(tmp_path))


def test_importing_changes_nothing_in_torch() -> None:
    program = (
        "import torch, sys; from torch.nn.parallel import DistributedDataParallel as D; import torch.nn.utils as u\n"
        "before = D.__init__, u.get_total_norm, torch.optim.Optimizer.add_param_group, list(sys.meta_path)\n"
        "import tpkernels\n"
        "assert before == (D.__init__, u.get_total_norm, torch.optim.Optimizer.add_param_group, list(sys.meta_path))\n"
        "assert 'torch.distributed.fsdp' not in sys.modules and 'torch.distributed.pipelining' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

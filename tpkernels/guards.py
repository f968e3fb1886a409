"""Guards on functions for whole models, of torch and others: on cut ones corrected, or refused before anything changes.

DDP, FSDP and others expect the same parameters on all ranks that they work over. Over the ranks of a tensor-parallel
group they would overwrite the shards of all ranks with those of one, without an error. Once a parameter is cut over two
ranks or more, the entry points in CHECKS check whether their ranks hold shards of one tensor; over the ranks of a
data-parallel group all of them work as before. `import tpkernels` alone changes nothing in torch.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from tpkernels.comm.group import find
from tpkernels.comm.objects import is_cut_among
from tpkernels.data_parallel.in_torch import count_shards_in_norms, skip_together
from tpkernels.layers.base import marked_shards
from tpkernels.layers.embedding import VocabParallelEmbedding
from tpkernels.layers.initialisers import fill_shards
from tpkernels.shard import ShardInfo, at_first_mark, full_shape, shard_info

Arguments = dict[str, Any]

REPLICAS = (
    "to train one replica leave it out; with replicas give it the ranks that hold the same part of each (a "
    "data-parallel group). Make a Trainer or an Accelerator inside `with tpkernels.one_replica():`, and give the "
    "Trainer to tpkernels.fit_trainer"
)


def refuse_over_parts(who: str, named: Iterable[tuple[str, Tensor]], over: Any, instead: str) -> None:
    """Refuse an entry point of torch if its ranks hold shards of one parameter.

    Args:
        who: the entry point, for the text.
        named: its parameters.
        over: its ranks: a process group (None: the default one), a device mesh, or several of these.
        instead: the advice, for the text.

    Raises:
        ValueError: they do.
    """
    ranks = _ranks_of(over)
    cut = [(name, info) for name, p in named if (info := shard_info(p)) is not None and is_cut_among(info, ranks)]
    if cut:
        name, info = cut[0]
        raise ValueError(
            f"{who}: its ranks {ranks} must hold the same parameters, but {len(cut)} are cut over some of them (first "
            f"{name!r}, over group {info.group_label!r}), and parts would be taken for one another: {instead}"
        )


def _ranks_of(over: Any) -> list[int]:
    """The global ranks of a process group, a device mesh, or several of these."""
    if isinstance(over, Sequence):
        return sorted({rank for one in over for rank in _ranks_of(one)})
    if isinstance(over, DeviceMesh):
        mesh: list[int] = over.mesh.flatten().tolist()
        return mesh
    if not dist.is_initialized():
        return []
    return dist.get_process_group_ranks(over)


def _over(arguments: Arguments) -> Any:
    """The ranks of DDP and FSDP, from their arguments."""
    mesh = arguments.get("device_mesh")
    return mesh if mesh is not None else arguments.get("process_group")


def _named(parameters: Any) -> list[tuple[str, Tensor]]:
    """Parameters, or parameter groups of an optimizer, named by number."""
    flat = [p for one in parameters for p in (one["params"] if isinstance(one, Mapping) else [one])]
    return [(f"parameter {i}", p[1] if isinstance(p, tuple) else p) for i, p in enumerate(flat)]


def _ddp(a: Arguments) -> None:
    refuse_over_parts("DistributedDataParallel", a["module"].named_parameters(), _over(a), REPLICAS)


def _fsdp1(a: Arguments) -> None:
    refuse_over_parts("FullyShardedDataParallel", a["module"].named_parameters(), _over(a), REPLICAS)


def _fsdp2(a: Arguments) -> None:
    names = {id(p): name for module in a["modules"] for name, p in module.named_parameters()}
    named = [(names.get(id(p), f"parameter {i}"), p) for i, p in enumerate(a["params"])]
    refuse_over_parts("fully_shard", named, a["mesh_info"].mesh, REPLICAS)


def _data_parallel(a: Arguments) -> None:
    cut = [name for name, p in a["module"].named_parameters() if (i := shard_info(p)) and i.world_size > 1]
    if cut:
        raise ValueError(
            f"DataParallel: module must be whole, but {len(cut)} of its parameters are cut (first {cut[0]!r}), and "
            f"each rank has one device: let each process see one (CUDA_VISIBLE_DEVICES), and leave DataParallel out"
        )


def _sync_batch_norm(a: Arguments) -> None:
    instead = "ranks that share a batch need no common statistics; give process_group= the data-parallel ranks"
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in a["module"].modules())
    named = a["module"].named_parameters() if norms else []
    refuse_over_parts("SyncBatchNorm.convert_sync_batchnorm", named, a.get("process_group"), instead)


def _zero(a: Arguments) -> None:
    a["params"] = params = list(a["params"])
    instead = "give process_group= the ranks that hold the same part of each replica, or take the optimizer itself"
    refuse_over_parts("ZeroRedundancyOptimizer", _named(params), a.get("process_group"), instead)


def _averaging(a: Arguments) -> None:
    a["params"] = params = list(a["params"])
    instead = "give the averager the ranks that hold the same part of each replica"
    refuse_over_parts("average_parameters", _named(params), a.get("process_group"), instead)


def _stage(a: Arguments) -> None:
    instead = "give group= one rank of each stage"
    refuse_over_parts("PipelineStage", a["submodule"].named_parameters(), a.get("group"), instead)


def _dcp(a: Arguments) -> None:
    """Ranks that save shards under one name, or load them: torch takes one of them for the full tensor."""
    if a.get("no_dist") or not dist.is_initialized():
        return
    places = {p.untyped_storage().data_ptr(): shard_info(p) for p in marked_shards() if p.numel()}
    ranks, found = _ranks_of(a.get("process_group")), dict[str, ShardInfo]()
    for name, value in _entries(a["state_dict"]):
        info = places.get(value.untyped_storage().data_ptr())
        if info is not None and is_cut_among(info, ranks):
            found[name] = info
    _refuse_one_name(
        f"torch.distributed.checkpoint: ranks {ranks} save or load parts of parameters",
        found,
        "take tpkernels.checkpoint.save and load, or save_pretrained for a whole model; to load a whole one, load it "
        "into a state dict of full tensors for model.load_state_dict",
        repr(sorted(found)),
    )


def _refuse_one_name(what: str, found: Mapping[str, ShardInfo], instead: str, place: str) -> None:
    """Raise on all ranks where two of them save or load shards under one name. Collective over their groups.

    Args:
        what: what they do, for the text.
        found: the shards, by name.
        instead: the advice, for the text.
        place: where this rank saves them.
    """
    for group_name in dict.fromkeys(info.group_name for info in found.values()):  # one order on all ranks
        group = find(name=group_name)
        assert group is not None
        digests = group.all_gather_ints(zlib.crc32(place.encode()))
        if len(set(digests)) < len(digests):
            raise ValueError(
                f"{what} that are cut over group {group.label!r} under the same names (here {len(found)}, first "
                f"{min(found)!r}), and one rank's would be the whole in the file: {instead}"
            )


def _cut_in(named: Iterable[tuple[str, Tensor]]) -> dict[str, ShardInfo]:
    return {name: info for name, p in named if (info := shard_info(p)) is not None and info.world_size > 1}


def _accelerate_state(a: Arguments) -> None:
    """Under `one_replica` every rank writes, as the only process."""
    accelerator = a["self"]
    found = _cut_in(item for model in accelerator._models for item in model.named_parameters())
    for optimizer in accelerator._optimizers:
        found |= _cut_in(_named(optimizer.param_groups))
    folder = a.get("output_dir") or accelerator.project_dir
    instead = "take tpkernels.checkpoint.save and load, or give each rank a folder of its own"
    _refuse_one_name("Accelerator.save_state: ranks save parts of parameters", found, instead, _real(folder))


def _accelerate_model(a: Arguments) -> None:
    instead = "take tpkernels.checkpoint.save, or save_pretrained of a model of transformers, on all ranks"
    found = _cut_in(a["model"].named_parameters())
    _refuse_one_name(
        "Accelerator.save_model: ranks save parts of parameters", found, instead, _real(a["save_directory"])
    )


def _train(a: Arguments) -> None:
    """Of a Trainer that `fit_trainer` has not seen: its checkpoints would have the optimizer's state of one rank."""
    trainer = a["self"]
    saves = str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) != "no"
    if saves and not trainer.args.save_only_model and not hasattr(trainer, "tpk_group"):
        instead = "give the Trainer to tpkernels.fit_trainer, or set save_strategy='no' or save_only_model=True"
        found = _cut_in(trainer.model.named_parameters())
        _refuse_one_name("Trainer: ranks save the state of parameters", found, instead, _real(trainer.args.output_dir))


def _real(folder: Any) -> str:
    return os.path.realpath(folder) if folder is not None else ""


def _state_dict(a: Arguments) -> None:
    """For full state dicts torch gathers its own sharded tensors and takes all others as full."""
    if a["info"].full_state_dict or a["info"].broadcast_from_rank0:
        instead = "take save_pretrained or tpkernels.checkpoint.save, and tpkernels.checkpoint.load to load"
        who = "torch.distributed.checkpoint.state_dict with full_state_dict=True"
        refuse_over_parts(who, a["model"].named_parameters(), None, instead)


def _load_state_dict(a: Arguments) -> None:
    """Full values are right: the model takes its shards of them."""
    if a["info"].broadcast_from_rank0:
        _state_dict(a)


def _distribute(a: Arguments) -> None:
    """Of DTensor, which sends rank 0's values to the others."""
    named = a["module"].named_parameters() if "module" in a else [("tensor", a["tensor"])]
    over = a.get("device_mesh")
    refuse_over_parts("torch.distributed.tensor", named, over, "distribute the model before, or leave it to tpkernels")


class _FullSizeView:
    """A model whose parameters have the sizes of the full tensors, and no values."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        for name, p in self._model.named_parameters():
            yield name, torch.empty(full_shape(p), dtype=p.dtype, device="meta", requires_grad=p.requires_grad)

    def parameters(self) -> Iterable[Tensor]:
        return (p for _, p in self.named_parameters())


def _count_full_tensors(a: Arguments) -> None:
    """Of functions that count parameters: the model is replaced by one in which a shard counts as the full tensor."""
    (name,) = {"self", "model"} & a.keys()
    if any(shard_info(p) is not None for p in a[name].parameters()):
        a[name] = _FullSizeView(a[name])


def _name_tables(a: Arguments) -> None:
    """Of peft, which finds the table of the words by its rows, and starts prompts (CPT, TEXT) with some of them."""
    for module in a["self"].base_model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.weight.ds_shape = full_shape(module.weight)  # type: ignore[attr-defined]


def _entries(state: Any, path: str = "") -> Iterable[tuple[str, Tensor]]:
    """Every plain tensor of nested dicts and lists, or of objects with a state_dict, by its path."""
    if callable(getattr(state, "state_dict", None)):
        state = state.state_dict()
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _entries(value, f"{path}.{key}" if path else str(key))
        return
    for i, leaf in enumerate(tree_leaves(state)):
        if type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided and not leaf.is_meta:
            yield f"{path}.{i}" if isinstance(state, list | tuple) else path, leaf


CHECKS: dict[str, dict[str, Callable[[Arguments], None]]] = {
    "torch.nn.parallel.distributed": {"DistributedDataParallel.__init__": _ddp},
    "torch.nn.parallel.data_parallel": {"DataParallel.__init__": _data_parallel},
    "torch.nn.modules.batchnorm": {"SyncBatchNorm.convert_sync_batchnorm": _sync_batch_norm},
    "torch.distributed.fsdp.fully_sharded_data_parallel": {"FullyShardedDataParallel.__init__": _fsdp1},
    "torch.distributed.fsdp._fully_shard._fsdp_param_group": {"FSDPParamGroup.__init__": _fsdp2},
    "torch.distributed.optim.zero_redundancy_optimizer": {"ZeroRedundancyOptimizer.__init__": _zero},
    "torch.distributed.algorithms.model_averaging.utils": {"average_parameters": _averaging},
    "torch.distributed.pipelining.stage": {"_PipelineStageBase.__init__": _stage},
    "torch.distributed.checkpoint.state_dict_saver": {"_save_state_dict": _dcp, "async_save": _dcp},
    "torch.distributed.checkpoint": {"async_save": _dcp},
    "torch.distributed.checkpoint.state_dict_loader": {"_load_state_dict": _dcp},
    "torch.distributed.checkpoint.state_dict": {
        "_get_model_state_dict": _state_dict, "_get_optim_state_dict": _state_dict,
        "_load_model_state_dict": _load_state_dict, "_load_optim_state_dict": _state_dict,
    },
    **{
        f"torch.distributed.tensor{module}": {"distribute_tensor": _distribute, "distribute_module": _distribute}
        for module in ("", "._api", ".parallel.style")
    },
    "transformers.modeling_utils": {"PreTrainedModel.num_parameters": _count_full_tensors},
    "transformers.trainer_pt_utils": {"get_model_param_count": _count_full_tensors},
    "transformers.trainer": {
        "get_model_param_count": _count_full_tensors, "Trainer.train": _train,
    },
    "accelerate.accelerator": {
        "Accelerator.save_state": _accelerate_state, "Accelerator.save_model": _accelerate_model,
    },
    "peft.peft_model": {
        "PeftModel.get_nb_trainable_parameters": _count_full_tensors, "PeftModel._setup_prompt_encoder": _name_tables,
    },
}  # fmt: skip
"""By module: its functions, and the check before each call, which may also replace an argument."""


@at_first_mark
def install() -> None:
    """Check the entry points of modules that are loaded, and of others when they are loaded."""
    for name in CHECKS:
        if name in sys.modules:
            _install_checks(sys.modules[name])
    sys.meta_path.insert(0, _CheckWhenLoaded())
    count_shards_in_norms()
    skip_together()
    fill_shards()


def _install_checks(module: ModuleType) -> None:
    for path, check in CHECKS[module.__name__].items():
        *outer, name = path.split(".")
        owner: Any = getattr(module, outer[0], None) if outer else module
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, "tpk_guard"):  # torch may have moved what is private
            _check_before(owner, name, function, check)


def _check_before(owner: Any, name: str, function: Callable[..., Any], check: Callable[[Arguments], None]) -> None:
    is_method_of_class = isinstance(function, MethodType)
    inner = function.__func__ if isinstance(function, MethodType) else function
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return inner(*args, **kwargs)  # torch's own error is the best
        check(bound.arguments)
        return inner(*bound.args, **bound.kwargs)

    checked.tpk_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(checked) if is_method_of_class else checked)


class _CheckWhenLoaded(importlib.abc.MetaPathFinder):
    """Finds no module itself; installs the checks of a module once it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of the other finders, which also installs the checks when the module is executed."""
        if name not in CHECKS:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_check(module: ModuleType) -> None:
                execute(module)
                _install_checks(module)

            spec.loader.exec_module = execute_and_check  # type: ignore[method-assign]
        return spec

"""The full state dict of a sharded model, and save_pretrained of it and of adapters on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.checkpoint.export import full_shapes, gathered
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.comm.group import Group
from tpkernels.comm.objects import raise_together
from tpkernels.errors import CheckpointError, PlanError
from tpkernels.layers.base import mark_shards
from tpkernels.layers.convert import group_of
from tpkernels.layers.reference import Ref
from tpkernels.plan.derive.vocabulary import module_of
from tpkernels.shard import ShardInfo, shard_info


@torch.no_grad()
def full_state_dict(
    model: nn.Module, group: Group, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Return the state dict of the unsharded model, on the CPU, on rank 0; empty on the others. Collective.

    Args:
        model: sharded over `group`.
        group: of the ranks.
        wanted: whether to take a tensor, by its name.

    Raises:
        CheckpointError: rank 0 has no memory for a tensor (on all ranks).
        PeerLostError: a rank died.
    """
    mark_shards(model)
    ranks, found = CheckpointRanks(group), dict[str, Tensor]()
    done: dict[int, Tensor | None] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        if id(value) not in done:
            full = gathered(value, ranks)
            done[id(value)] = None if full is None else full.cpu()
        if (whole := done[id(value)]) is not None:
            found[name] = whole
    return found


def _shards(value: Tensor, info: ShardInfo, group: Group) -> tuple[Tensor, ...]:
    return torch.split(ops.all_gather(value, info.dim, group=group), info.sizes, info.dim)


class SavePretrained:
    """`save_pretrained` of a sharded model, and of adapters on one: rank 0 saves the unsharded one.

    Collective: every rank must call it.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group = Ref(model), group

    @property
    def group(self) -> Group:
        """The group of the model's layers."""
        return group_of(self._model.target, self._group)

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Gather, and save on rank 0.

        Args:
            save_directory: of rank 0.
            args, kwargs: as in transformers; `state_dict` must hold full tensors.

        Raises:
            ValueError: state_dict holds shards; an option that does not work on a sharded model.
            CheckpointError: rank 0 could not save; on all ranks.
        """
        model, group = self._model.target, self.group
        state = kwargs.pop("state_dict", None)
        if state is not None and _holds_shards(state, model):
            raise ValueError("save_pretrained: state_dict holds this rank's parts only; leave it out")
        if kwargs.get("path_initial_model_for_weight_conversion") is not None:
            raise ValueError(
                "save_pretrained: path_initial_model_for_weight_conversion does not work on a cut model: save as it "
                "is, load into an uncut model, and convert there"
            )
        group.barrier()  # a rank that calls alone waits here, before anything is gathered
        state = state or full_state_dict(model, group, _to_save(model))
        with raise_together(group, CheckpointError, f"save_pretrained {save_directory}"):
            if group.rank == 0:
                save: Any = type(model).save_pretrained  # type: ignore[attr-defined]
                with full_shapes(model):
                    save(model, save_directory, *args, state_dict=state, **kwargs)


def _to_save(model: nn.Module) -> Callable[[str], bool]:
    """A filter of the tensors to save by name: those of adapters, where the model has any."""
    if type(model).__module__.startswith("peft.") or getattr(model, "_hf_peft_config_loaded", False):
        return of_adapters(model)
    return lambda name: True


def of_adapters(model: nn.Module) -> Callable[[str], bool]:
    """Return a filter of the tensors that peft may save, by name: all but the weights of the layers below adapters.

    Biases may be trained beside adapters, and tables of ids are saved with adapters on them.
    """
    tables = [module_of(model, get) for get in ("get_input_embeddings", "get_output_embeddings")]
    base = {id(getattr(table, "base_layer", table)) for table in tables}
    own: dict[str, bool] = {}

    def visit(module: nn.Module, prefix: str, adapter: bool) -> None:
        saved = adapter or id(module) in base
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            own[prefix + name] = saved or (tensor is not None and tensor.dim() < 2)
        wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
        for name, child in module._modules.items():
            if child is not None:
                inner = wraps and name not in ("base_layer", "original_module")
                visit(child, f"{prefix}{name}.", (adapter or inner) and name != "base_layer")

    visit(model, "", False)
    return lambda name: own.get(name, True)


def _holds_shards(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether a state dict has shards in the place of full tensors."""
    cut = ((state.get(name), p, shard_info(p)) for name, p in model.named_parameters())
    return any(
        value is not None and info is not None and value.shape != info.full_shape(p) and value.shape == p.shape
        for value, p, info in cut
    )


def gather_for_peft(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of state_dict of a sharded model: gather the tensors of adapters where peft saves them. Collective.

    get_peft_model_state_dict calls a plain state_dict(), so that only its frame shows the caller. The same holds for
    hotswap, which would replace shards by full matrices.

    Args:
        module, state, prefix, metadata: as torch passes them; `state` is changed.

    Raises:
        PlanError: the caller is hotswap.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name == "state_dict":
        frame = frame.f_back
    if frame.f_code.co_name == "hotswap_adapter_from_state_dict":
        raise PlanError(
            "hotswap of an adapter does not work on a cut model, whose parts it would replace by full matrices: load "
            "it under another name, or put its values into this one by peft's set_peft_model_state_dict"
        )
    if frame.f_code.co_name != "get_peft_model_state_dict":
        return
    wanted = of_adapters(module)
    group: Group = module.tpk_plan.group  # type: ignore[union-attr, assignment]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        info = shard_info(parameter)
        if info is None or prefix + name not in state:
            continue
        if wanted(name):
            state[prefix + name] = info.assemble(_shards(parameter.detach(), info, group))
        else:
            del state[prefix + name]  # a shard must not be saved as the full tensor

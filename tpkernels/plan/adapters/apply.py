"""LoRA adapters of peft on parallel layers.

peft computes y + B(A(x)) around a linear and makes A and B of the layer's in_features and out_features, which are this
rank's. Here they become parallel layers, too: beside a column layer A is replicated and B is sharded along its outputs,
so that the gradient of A(x) is summed; beside a row layer A is sharded along its inputs, so that A(x) is summed, and B
is replicated. Beside a SumTail (the latent keys of MLA) B is one, too. Prompts in front of the sequence are replicated.
All else is refused (validate.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import init

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers import init_shard_
from tpkernels.layers.base import Cut, ParallelModule
from tpkernels.layers.convert import ConvertedModule, convert
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.random import rng_state, set_rng_state
from tpkernels.layers.reference import Ref
from tpkernels.plan.adapters.validate import WeightedAdapters, refuse_adapters, refuse_prompts
from tpkernels.plan.state_dict import SavePretrained
from tpkernels.plan.styles.modules import CommonDropout, RankDropout, Summed, SumTail

COLUMN_OPTIONS = ("gather_output", "input_grad_summed")
ROW_OPTIONS = ("input_is_parallel", "sequence_parallel", "sequence_dim")


def cut_adapters(model: nn.Module) -> nn.Module:
    """Shard the adapters that peft has added to a sharded model: call it after get_peft_model, add_adapter, loading.

    Collective. The ranks start with the same adapters: those that hold values (loaded, or blended of others) keep
    them, new ones are drawn as for the unsharded model, from rank 0's random numbers. All ranks get rank 0's random
    state, because peft has drawn other amounts on each. Parameters stay the same objects. `save_pretrained` of the
    model saves full adapters from now on, on rank 0; every rank must call it.

    Args:
        model: what peft returned, or the model it was added to.

    Returns:
        the model.

    Raises:
        PlanError: the model is not sharded, or on a parallel layer there is something else than plain LoRA,
            initialised as usual; names it and the layer. Nothing is changed then.
    """
    top = _top_of(model)
    if top is None:
        raise PlanError("cut_adapters: the model is not cut: parallelize it before peft wraps it")
    group: Group = top.tpk_plan.group  # type: ignore[union-attr, assignment]
    refuse_adapters(top)
    refuse_prompts(model)
    _share_rng(group)
    _tie_copies(top)
    for module, base, adapter in _adapters(top):
        if isinstance(base, (ColumnParallelLinear, RowParallelLinear)):
            if not _is_cut(module, adapter):
                _shard_adapter(module, base, adapter)
                _start_alike(module, base, adapter, top.peft_config[adapter])  # type: ignore[index]
        else:
            _keep_whole(module, base, adapter, group)
            _share_adapter(module, adapter, group)
    _mark_known(top, set(getattr(top, "peft_config", ())))
    top.__dict__.pop("tpk_apart", None)
    _complete(model, top, group)
    return model


def cut_loaded(top: nn.Module, names: set[str]) -> None:
    """Shard the new adapters on parallel layers whose values are about to be loaded: nothing is sent or drawn.

    Those of which everything is loaded are ready for use. Because peft has drawn other amounts of random numbers on
    each rank, the first forward shares rank 0's random state.

    Args:
        top: the sharded model.
        names: of the tensors that are about to be loaded, in `top`.

    Raises:
        PlanError: as cut_adapters.
    """
    news = {adapter for adapter in getattr(top, "peft_config", ()) if not _is_known(top, adapter)}
    if not news:
        return
    refuse_adapters(top)
    _tie_copies(top)
    of, partly = {module: name for name, module in top.named_modules()}, set[str]()
    for module, base, adapter in _adapters(top):
        own = {f"{of[module]}.{name}" for name, _ in _parameters_of(module, adapter)}
        if not own <= names:
            partly.add(adapter)
        elif not isinstance(base, (ColumnParallelLinear, RowParallelLinear)):
            _keep_whole(module, base, adapter, top.tpk_plan.group)  # type: ignore[union-attr, arg-type]
        elif not _is_cut(module, adapter):
            _shard_adapter(module, base, adapter)
    if news - partly:
        _mark_known(top, news - partly)
        top.tpk_apart = True  # type: ignore[assignment]


class AdapterGuard:
    """A pre-hook that refuses to run a sharded model with adapters that are not sharded: results would be wrong."""

    def __init__(self, model: nn.Module) -> None:
        self._model = Ref(model)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Check the adapters of the model.

        Raises:
            PlanError: there are new ones.
        """
        model = self._model.target
        adapters = getattr(model, "peft_config", None)
        if adapters and not all(_is_known(model, adapter) for adapter in adapters):
            raise PlanError("a cut model has new adapters of peft: call tpkernels.cut_adapters(model) once")
        if adapters and not is_compiling() and vars(model).pop("tpk_apart", False):
            _share_rng(model.tpk_plan.group)  # type: ignore[union-attr, arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterGuard:
        """A copy of the whole model has a guard of its own, a copy of a layer has the same one."""
        again = copy(self)
        again._model = Ref(memo.get(id(self._model.target), self._model.target))
        return again


def _top_of(model: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if "tpk_plan" in vars(m)), None)


def _adapters(top: nn.Module) -> Iterator[tuple[Any, nn.Module, str]]:
    """Each layer of peft, the layer that it adapts, and the name of each adapter in it."""
    for module in list(top.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            for adapter in sorted(getattr(top, "peft_config", ())):
                if not isinstance(base, (ColumnParallelLinear, RowParallelLinear)) or adapter in module.lora_A:  # type: ignore[operator]
                    yield module, base, adapter


def _tie_copies(top: nn.Module) -> None:
    """Make trained copies of sharded layers parallel layers where peft has made them linears (ensure_weight_tying)."""
    for module in list(top.modules()):
        original, copies = (getattr(module, name, None) for name in ("original_module", "modules_to_save"))
        if isinstance(original, ColumnParallelLinear) and isinstance(copies, nn.ModuleDict):
            for adapter, made in list(copies.items()):
                if not isinstance(made, ConvertedModule):
                    copies[adapter] = deepcopy(original)
                    copies[adapter].weight = made.weight


def _parameters_of(module: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if not name.startswith("base_layer.") and adapter in name.split("."):
            yield name, parameter


def _is_cut(module: Any, adapter: str) -> bool:
    return isinstance(module.lora_A[adapter], ConvertedModule) or isinstance(module.lora_B[adapter], ConvertedModule)


# A known adapter has a name and the place of one of its matrices, which is marked; later ones of that name are not.


def _mark_known(top: nn.Module, adapters: set[str]) -> None:
    known: dict[str, str] = {}
    for name, module in top.named_modules():
        matrices: Any = getattr(module, "lora_A", None)
        if isinstance(matrices, nn.ModuleDict):
            for adapter in adapters & set(matrices):
                matrices[adapter].tpk_known = True  # type: ignore[assignment]
                known.setdefault(adapter, f"{name}.lora_A.{adapter}")
    before = vars(top).get("tpk_adapters", {})
    top.tpk_adapters = before | {adapter: known.get(adapter, "") for adapter in adapters}


def _is_known(top: nn.Module, adapter: str) -> bool:
    where = vars(top).get("tpk_adapters", {}).get(adapter)
    if not where or is_compiling():
        return where is not None
    module: Any = top
    for part in where.split("."):
        module = module._modules.get(part)
        if module is None:
            return False
    return hasattr(module, "tpk_known")


def _complete(model: nn.Module, top: nn.Module, group: Group) -> None:
    """Replace methods and attributes of peft's objects around the sharded model that fit a full one only."""
    wrapper: Any = model
    if model is not top and hasattr(model, "save_pretrained"):
        wrapper.save_pretrained = SavePretrained(model, group)
    for module in model.modules():
        if hasattr(type(module), "add_weighted_adapter"):
            module.add_weighted_adapter = WeightedAdapters(module, top)  # type: ignore[assignment]
    prompts = getattr(model, "prompt_encoder", None)
    for parameter in prompts.parameters() if isinstance(prompts, nn.Module) else ():
        parameter.data.copy_(_of_rank_0(parameter.data, group))


def _keep_whole(module: Any, base: nn.Module, adapter: str, group: Group) -> None:
    """An adapter of a replicated layer, which may be called between a column layer and the row layer behind it."""
    _draw_alike(module, adapter, group)
    if isinstance(base, SumTail) and not isinstance(module.lora_B[adapter], ConvertedModule):
        convert(module.lora_B[adapter], SumTail, {}, group, tail=base.tail)


def _draw_alike(module: nn.Module, adapter: str, group: Group) -> None:
    """The dropout in front of an adapter of replicated features draws the ranks' common numbers."""
    dropouts: Any = getattr(module, "lora_dropout", {})
    dropout = dict(dropouts).get(adapter)
    if isinstance(dropout, nn.Dropout) and not isinstance(dropout, ConvertedModule):
        convert(dropout, CommonDropout, {}, group)


@torch.no_grad()
def _share_adapter(module: nn.Module, adapter: str, group: Group) -> None:
    """Copy rank 0's values of an adapter of a replicated layer to all ranks."""
    for _, parameter in _parameters_of(module, adapter):
        parameter.copy_(_of_rank_0(parameter, group))


def _share_rng(group: Group) -> None:
    """Set rank 0's random state on all ranks."""
    set_rng_state({device: _of_rank_0(value, group) for device, value in rng_state().items()})


def _of_rank_0(value: Tensor, group: Group) -> Tensor:
    sent = value if group.rank == 0 else torch.zeros_like(value)
    return ops.all_reduce(sent.to(group.device), group=group).to(value.device)


@torch.no_grad()
def _start_alike(module: Any, base: ColumnParallelLinear | RowParallelLinear, adapter: str, config: Any) -> None:
    """Equal or matching values on all ranks; A of a row layer is drawn anew where B is zero, as of a new adapter."""
    A, B, group = module.lora_A[adapter], module.lora_B[adapter], base.group
    if A.weight.is_meta:  # to be loaded
        return
    if isinstance(base, ColumnParallelLinear):
        A.weight.copy_(_of_rank_0(A.weight, group))
        return
    for parameter in B.parameters():
        parameter.copy_(_of_rank_0(parameter, group))
    if not B.weight.any():
        gaussian, r = config.init_lora_weights == "gaussian", module.r[adapter]
        init_shard_(
            A.weight,
            lambda w: init.normal_(w, std=1 / r) if gaussian else init.kaiming_uniform_(w, a=math.sqrt(5)),
            by_rows=True,
        )


@torch.no_grad()
def _shard_adapter(module: Any, base: ColumnParallelLinear | RowParallelLinear, adapter: str) -> None:
    A, B, group = module.lora_A[adapter], module.lora_B[adapter], base.group
    cut = base._cuts["weight"]
    wire: dict[str, Any] = {"codec": base.codec, "grad_codec": base.grad_codec}
    if isinstance(base, RowParallelLinear):
        cuts = {"weight": replace(cut, dim=1)}
        options = wire | {name: getattr(base, name) for name in ROW_OPTIONS}
        _take_part(A, cuts, base)
        convert(A, RowParallelLinear, cuts, group, **options)
        if base.sequence_parallel:
            convert(B, Summed, {}, group, summed=tuple(n for n, _ in B.named_parameters(recurse=False)))
        dropout = module.lora_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and base.input_is_parallel and not isinstance(dropout, ConvertedModule):
            convert(dropout, RankDropout, {}, group)
        return
    _draw_alike(module, adapter, group)
    cuts = {name: replace(cut, dim=0) for name, _ in B.named_parameters(recurse=False)}
    _take_part(B, cuts, base)
    options = wire | {name: getattr(base, name) for name in COLUMN_OPTIONS}
    convert(B, ColumnParallelLinear, cuts, group, **options)
    if base.input_grad_summed:
        convert(A, Summed, {}, group, summed=("weight",))


def _take_part(linear: nn.Module, cuts: dict[str, Cut], base: ParallelModule) -> None:
    """Take the shards of parameters that peft made for full tensors, which the layer takes or returns, in place."""
    for name, own in cuts.items():
        parameter = linear.get_parameter(name)
        info = base._info(own)
        if parameter.size(info.dim) != info.size:
            parameter.data = info.part(parameter.data).clone(memory_format=torch.contiguous_format)

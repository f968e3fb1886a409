"""LoRA adapters of peft on cut layers.

peft puts y + B(A(x)) around a linear and makes A and B of the sizes that the layer states, which on a cut layer are
this rank's. What is missing is done here: beside a column layer A is whole and B is cut along its outputs, so that the
gradient of A(x) is summed; beside a row layer A is cut along its inputs, so that A(x) is summed, and B is whole.
Prompts in front of the sequence are whole on every rank. validate.py says what else there is and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import init

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers import init_shard_
from tpkernels.layers.base import Cut
from tpkernels.layers.random import rng_state, set_rng_state
from tpkernels.plan.adapters.validate import WeightedAdapters, refuse_adapters, refuse_prompts
from tpkernels.plan.state_dict import SavePretrained
from tpkernels.plan.styles.modules import Column, CommonDropout, CutModule, RankDropout, Row, Summed, cut_module


def cut_adapters(model: nn.Module) -> nn.Module:
    """Make the adapters that peft has put on a cut model right: call it behind get_peft_model, add_adapter, loading.

    Collective. The ranks start with the same adapters: those that hold values (loaded, or blended of others) keep
    them, new ones are drawn as for the unsharded model, from rank 0's random numbers. All ranks get rank 0's random
    state, because peft has drawn other amounts on each. Parameters stay the same objects. `save_pretrained` of the
    model saves whole adapters from now on, on rank 0; every rank must call it.

    Args:
        model: what peft returned, or the model it was added to.

    Returns:
        the model.

    Raises:
        PlanError: the model is not cut, or on a cut layer there is something else than plain LoRA, initialised as
            usual; says what and where. Nothing is changed then.
    """
    top = _top_of(model)
    if top is None:
        raise PlanError("cut_adapters: the model is not cut: parallelize it before peft wraps it")
    group: Group = top.tpk_plan.group  # type: ignore[union-attr, assignment]
    refuse_adapters(top)
    refuse_prompts(model)
    _share_rng(group)
    for module, base, adapter in _adapters(top):
        if isinstance(base, (Column, Row)):
            if not _is_cut(module, adapter):
                _cut_one(module, base, adapter)
                _start_alike(module, base, adapter, top.peft_config[adapter])  # type: ignore[index]
        else:
            _share_adapter(module, adapter, group)
    _mark_known(top, set(getattr(top, "peft_config", ())))
    top.__dict__.pop("tpk_apart", None)
    _complete(model, top, group)
    return model


def cut_loaded(top: nn.Module, names: set[str]) -> None:
    """Cut those new adapters on cut layers whose values are about to be loaded: nothing is sent, nothing is drawn.

    Those of which everything is loaded are ready for use; that peft has drawn other amounts of random numbers on each
    rank is made good at the first forward.

    Args:
        top: the cut model.
        names: what is about to be loaded, as `top` calls it.

    Raises:
        PlanError: as cut_adapters.
    """
    news = {adapter for adapter in getattr(top, "peft_config", ()) if not _is_known(top, adapter)}
    if not news:
        return
    refuse_adapters(top)
    of, partly = {module: name for name, module in top.named_modules()}, set[str]()
    for module, base, adapter in _adapters(top):
        own = {f"{of[module]}.{name}" for name, _ in _parameters_of(module, adapter)}
        if not own <= names:
            partly.add(adapter)
        elif isinstance(base, (Column, Row)) and not _is_cut(module, adapter):
            _cut_one(module, base, adapter)
    if news - partly:
        _mark_known(top, news - partly)
        top.tpk_apart = True  # type: ignore[assignment]


class AdapterGuard:
    """A hook that refuses to run a cut model with adapters that nobody has cut: their results would be wrong."""

    def __init__(self, model: nn.Module) -> None:
        self._model = [model]

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Look at what peft has left on the model."""
        model = self._model[0]
        adapters = getattr(model, "peft_config", None)
        if adapters and not all(_is_known(model, adapter) for adapter in adapters):
            raise PlanError("a cut model has new adapters of peft: call tpkernels.cut_adapters(model) once")
        if adapters and not is_compiling() and vars(model).pop("tpk_apart", False):
            _share_rng(model.tpk_plan.group)  # type: ignore[union-attr, arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterGuard:
        """A copy of the whole model is watched by a guard of its own, a copy of a layer by the same one."""
        again = copy(self)
        again._model = [memo.get(id(self._model[0]), self._model[0])]
        return again


def _top_of(model: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if "tpk_plan" in vars(m)), None)


def _adapters(top: nn.Module) -> Iterator[tuple[Any, nn.Module, str]]:
    """Each layer of peft with what it is around, and each adapter in it."""
    for module in list(top.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            for adapter in sorted(getattr(top, "peft_config", ())):
                if not isinstance(base, (Column, Row)) or adapter in module.lora_A:  # type: ignore[operator]
                    yield module, base, adapter


def _parameters_of(module: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if not name.startswith("base_layer.") and adapter in name.split("."):
            yield name, parameter


def _is_cut(module: Any, adapter: str) -> bool:
    return isinstance(module.lora_A[adapter], CutModule) or isinstance(module.lora_B[adapter], CutModule)


# An adapter is known by its name and by where one of its matrices is, which bears a mark: another one that comes
# later under the same name does not.


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
    """What peft's own objects around the cut model are to do otherwise."""
    wrapper: Any = model
    if model is not top and hasattr(model, "save_pretrained"):
        wrapper.save_pretrained = SavePretrained(model, group)
    for module in model.modules():
        if hasattr(type(module), "add_weighted_adapter"):
            module.add_weighted_adapter = WeightedAdapters(module, top)  # type: ignore[assignment]
    if getattr(model, "word_embeddings", ...) is None and hasattr(top, "get_input_embeddings"):
        # peft looks for a table with as many rows as there are words
        wrapper.word_embeddings = top.get_input_embeddings()  # type: ignore[operator]
    prompts = getattr(model, "prompt_encoder", None)
    for parameter in prompts.parameters() if isinstance(prompts, nn.Module) else ():
        parameter.data.copy_(_of_rank_0(parameter.data, group))


@torch.no_grad()
def _share_adapter(module: nn.Module, adapter: str, group: Group) -> None:
    """Give an adapter of a layer that is whole on every rank rank 0's values."""
    for _, parameter in _parameters_of(module, adapter):
        parameter.copy_(_of_rank_0(parameter, group))


def _share_rng(group: Group) -> None:
    """Give all ranks rank 0's random state."""
    set_rng_state({device: _of_rank_0(value, group) for device, value in rng_state().items()})


def _of_rank_0(value: Tensor, group: Group) -> Tensor:
    sent = value if group.rank == 0 else torch.zeros_like(value)
    return ops.all_reduce(sent.to(group.device), group=group).to(value.device)


@torch.no_grad()
def _start_alike(module: Any, base: Column | Row, adapter: str, config: Any) -> None:
    """Values that belong together on the ranks; A of a row layer is drawn anew where B says that it was just made."""
    A, B, group = module.lora_A[adapter], module.lora_B[adapter], base.group
    if A.weight.is_meta:  # to be loaded
        return
    if isinstance(base, Column):
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
def _cut_one(module: Any, base: Column | Row, adapter: str) -> None:
    A, B, group = module.lora_A[adapter], module.lora_B[adapter], base.group
    whole = base._cuts["weight"]
    wire: dict[str, Any] = {"codec": base.codec, "grad_codec": base.grad_codec, "transposed": False, "random": None}
    if isinstance(base, Row):
        cuts = {"weight": Cut(1, whole.full_size, whole.unit, whole.runs)}
        here: dict[str, Any] = {"split_input": base.split_input, "sequence_parallel": base.sequence_parallel}
        _take_part(A, cuts, base)
        cut_module(A, Row, cuts, group, sequence_dim=base.sequence_dim, **here, **wire)
        if base.sequence_parallel:
            cut_module(B, Summed, {}, group, summed=tuple(n for n, _ in B.named_parameters(recurse=False)))
        dropout = module.lora_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and not base.split_input and not isinstance(dropout, CutModule):
            cut_module(dropout, RankDropout, {}, group)
        return
    dropout = module.lora_dropout[adapter]
    if isinstance(dropout, nn.Dropout) and not isinstance(dropout, CutModule):
        cut_module(dropout, CommonDropout, {}, group)
    cuts = {name: Cut(0, whole.full_size, whole.unit, whole.runs) for name, _ in B.named_parameters(recurse=False)}
    _take_part(B, cuts, base)
    cut_module(B, Column, cuts, group, gather_output=base.gather_output, entered=base.entered, **wire)
    if base.entered:
        cut_module(A, Summed, {}, group, summed=("weight",))


def _take_part(linear: nn.Module, cuts: dict[str, Cut], base: CutModule) -> None:
    """Shrink parameters that peft made whole, because the layer takes or gives whole tensors; the objects stay."""
    for name, cut in cuts.items():
        parameter = linear.get_parameter(name)
        info = base._info(cut)
        if parameter.size(info.dim) != info.size:
            parameter.data = info.part(parameter.data).clone(memory_format=torch.contiguous_format)

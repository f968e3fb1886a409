"""LoRA adapters of peft on cut layers.

peft puts y + B(A(x)) around a linear and makes A and B of the sizes that the layer states, which on a cut layer are
this rank's. What is missing is done here: beside a column layer A is whole and B is cut along its outputs, so that the
gradient of A(x) is summed; beside a row layer A is cut along its inputs, so that A(x) is summed, and B is whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from tpkernels import ops
from tpkernels.group import Group
from tpkernels.layers import init_shard_
from tpkernels.layers.base import Cut
from tpkernels.layers.random import rng_state, set_rng_state
from tpkernels.plan_layers import Column, CommonDropout, CutModule, RankDropout, Row, Summed, cut_module
from tpkernels.plan_styles import PlanError


def cut_adapters(model: nn.Module) -> nn.Module:
    """Make the LoRA adapters that peft has put on a cut model right; call it behind get_peft_model or add_adapter.

    Collective. The ranks start with the same adapters, those of the unsharded model with rank 0's random numbers, and
    with rank 0's random state: peft has drawn other amounts on each rank. Parameters stay the same objects.

    Args:
        model: what peft returned, or the model it was added to.

    Returns:
        the model.

    Raises:
        PlanError: the model is not cut, or an adapter is none that this knows: LoRA without DoRA, initialised as usual.
    """
    top = next((m for m in model.modules() if "tpk_plan" in vars(m)), None)
    if top is None:
        raise PlanError("cut_adapters: the model is not cut: parallelize it before peft wraps it")
    group: Group = top.tpk_plan.group  # type: ignore[union-attr, assignment]
    known: set[str] = vars(top).setdefault("tpk_adapters", set())
    adapters = set(getattr(top, "peft_config", {}))
    modules = dict(model.named_modules())
    for name, module in modules.items():
        base, above = getattr(module, "base_layer", None), modules.get(name.rpartition(".")[0])
        if base is not None and isinstance(above, CutModule) and isinstance(above, nn.MultiheadAttention):
            raise PlanError(
                f"cut_adapters: {name} must be a layer whose forward is called; attention of torch takes the weights "
                f"of its layers past them, so that an adapter would change nothing: adapt other layers"
            )
        if isinstance(base, (Column, Row)):
            _check(name, module, top, adapters - known)
        elif isinstance(base, CutModule):
            raise PlanError(
                f"cut_adapters: {name} must adapt a column or row layer, or one that is whole, got a "
                f"{type(base).__name__} with adapters {sorted(adapters - known)}"
            )
    _share_rng(group, top)
    for module in list(model.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, (Column, Row)):
            for adapter in sorted(adapters - known):
                if adapter in module.lora_A:  # type: ignore[operator]
                    _cut_one(module, base, adapter)
        elif base is not None:
            _share_adapters(module, adapters - known, group)
    known |= adapters
    return model


class AdapterGuard:
    """A hook that refuses to run a cut model with adapters that nobody has cut: their results would be wrong."""

    def __init__(self, model: nn.Module) -> None:
        self._model = [model]

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Look at what peft has left on the model."""
        model = self._model[0]
        adapters = getattr(model, "peft_config", None)
        if adapters and not set(adapters) <= vars(model).get("tpk_adapters", set()):
            raise PlanError("a cut model has new adapters of peft: call tpkernels.cut_adapters(model) once")


def _check(name: str, module: nn.Module, top: nn.Module, adapters: set[str]) -> None:
    if not (hasattr(module, "lora_A") and hasattr(module, "lora_B")):
        raise PlanError(f"cut_adapters: {name} is a {type(module).__name__}; on cut layers only LoRA is known")
    for adapter in adapters:
        config = top.peft_config[adapter]  # type: ignore[index]
        if getattr(config, "use_dora", False) or getattr(config, "init_lora_weights", True) is not True:
            raise PlanError(f"cut_adapters: adapter {adapter!r} must be LoRA without DoRA, initialised as usual")


@torch.no_grad()
def _share_adapters(module: nn.Module, adapters: set[str], group: Group) -> None:
    """Give the adapters of a layer that is whole on every rank rank 0's values."""
    for name, parameter in module.named_parameters():
        if not name.startswith("base_layer.") and adapters & set(name.split(".")):
            parameter.copy_(_of_rank_0(parameter, group))


def _share_rng(group: Group, top: nn.Module) -> None:
    """Give all ranks rank 0's random state."""
    state = {device: _of_rank_0(value, group) for device, value in rng_state().items()}
    set_rng_state(state)


def _of_rank_0(value: Tensor, group: Group) -> Tensor:
    sent = value if group.rank == 0 else torch.zeros_like(value)
    return ops.all_reduce(sent.to(group.device), group=group).to(value.device)


@torch.no_grad()
def _cut_one(module: Any, base: Column | Row, adapter: str) -> None:
    A, B, group = module.lora_A[adapter], module.lora_B[adapter], base.group
    whole = base._cuts["weight"]
    wire: dict[str, Any] = {"codec": base.codec, "grad_codec": base.grad_codec, "transposed": False, "random": None}
    if isinstance(base, Row):
        cuts = {"weight": Cut(1, whole.full_size, whole.unit, whole.runs)}
        here: dict[str, Any] = {"split_input": base.split_input, "sequence_parallel": base.sequence_parallel}
        _take_part(A, cuts, base, whole_now=base.split_input)
        cut_module(A, Row, cuts, group, sequence_dim=base.sequence_dim, **here, **wire)
        init_shard_(A.weight, lambda w: init.kaiming_uniform_(w, a=math.sqrt(5)), by_rows=True)
        if base.sequence_parallel:
            cut_module(B, Summed, {}, group, summed=tuple(n for n, _ in B.named_parameters(recurse=False)))
        dropout = module.lora_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and not base.split_input and not isinstance(dropout, CutModule):
            cut_module(dropout, RankDropout, {}, group)
        return
    dropout = module.lora_dropout[adapter]
    if isinstance(dropout, nn.Dropout) and not isinstance(dropout, CutModule):
        cut_module(dropout, CommonDropout, {}, group)
    A.weight.copy_(_of_rank_0(A.weight, group))
    cuts = {name: Cut(0, whole.full_size, whole.unit, whole.runs) for name, _ in B.named_parameters(recurse=False)}
    _take_part(B, cuts, base, whole_now=base.gather_output)
    cut_module(B, Column, cuts, group, gather_output=base.gather_output, entered=base.entered, **wire)
    if base.entered:
        cut_module(A, Summed, {}, group, summed=("weight",))


def _take_part(linear: nn.Module, cuts: dict[str, Cut], base: CutModule, *, whole_now: bool) -> None:
    """Shrink parameters that peft made whole, because the layer takes or gives whole tensors; the objects stay."""
    if whole_now:
        for name, cut in cuts.items():
            parameter = linear.get_parameter(name)
            parameter.data = base._info(cut).part(parameter.data).clone(memory_format=torch.contiguous_format)

"""Models and modules that cannot be sharded are refused before anything is changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tpkernels.errors import PlanError
from tpkernels.layers.base import ParallelModule
from tpkernels.plan.styles.base import Style

# The packages whose modules replace linears by packed weights of their own.
QUANTISERS = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "torchao", "quanto", "optimum", "hqq", "aqlm", "eetq")


def refuse(model: nn.Module) -> None:
    """Raise when a model cannot be sharded as it is.

    Raises:
        PlanError: it is cut already, wrapped (DDP, FSDP, peft), hooked by accelerate, compiled, scripted, quantised, or
            has lazy parameters or such of a tensor class of their own; the text has the module and what to do.
    """
    if getattr(model, "tpk_plan", None) is not None:
        raise PlanError(f"parallelize: the model is cut already: {model.tpk_plan}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise PlanError("parallelize: the model is quantised, and packed weights cannot be cut; load it unquantised")
    for name, module in model.named_modules():
        where = f"{type(module).__module__}.{type(module).__name__}"
        shown = name or "the model"
        if where.endswith(("DistributedDataParallel", "FullyShardedDataParallel")) or hasattr(
            module, "_get_fsdp_state"
        ):
            raise PlanError(f"parallelize: {shown} is wrapped in {where}: cut the model first, then wrap it")
        if where.startswith("peft."):
            raise PlanError(f"parallelize: {shown} is an adapter of peft ({where}): cut the model first, then add it")
        if where.startswith("torch._dynamo."):
            raise PlanError(f"parallelize: {shown} is compiled: cut the model first, then torch.compile it")
        if where.split(".")[0] in QUANTISERS or ".quantized." in where or "transformers.integrations.fp" in where:
            raise PlanError(f"parallelize: {shown} is quantised ({where}), and packed weights cannot be cut")
        if isinstance(module, ParallelModule):
            raise PlanError(f"parallelize: {shown} is cut already ({where})")
        if hasattr(module, "_hf_hook"):
            raise PlanError(
                f"parallelize: {shown} has a hook of accelerate ({type(module._hf_hook).__name__}: a device_map or "
                f"offloading), whose forward would run on a part of the weights: load without device_map, or call "
                f"accelerate.hooks.remove_hook_from_submodules(model) first"
            )
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            raise PlanError(f"parallelize: {shown} is scripted: cut the model before torch.jit.script")
        for key, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter):
                raise PlanError(f"parallelize: {name}.{key} has no size yet: run the model once before it is cut")
            if type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh"):
                raise PlanError(f"parallelize: {name}.{key} is a DTensor: cut an ordinary model instead")
            if type(parameter.data) not in (Tensor, FakeTensor):
                raise PlanError(
                    f"parallelize: {name}.{key} must hold a plain tensor, got {type(parameter.data).__name__} "
                    f"(quantised?): cut an ordinary model instead"
                )
            if not parameter.is_floating_point():
                raise PlanError(f"parallelize: {name}.{key} is {parameter.dtype}: quantised weights cannot be cut")


def refuse_patched(modules: dict[str, nn.Module], styles: dict[str, Style]) -> None:
    """Raise when a module that is to be sharded was changed on the instance: the change fits the full module only.

    Args:
        modules: all of the model.
        styles: of those that have one.

    Raises:
        PlanError: a module has a forward of its own instance, a parametrization, a weight that is computed (weight
            norm, pruning), or a hook that would get a shard in the place of full features; has its name and what to do.
    """
    for name, style in styles.items():
        if style.keeps_forward:
            continue
        for shown, module in [(name, modules[name]), (f"{name}.out_proj", getattr(modules[name], "out_proj", None))]:
            if module is not None:
                _refuse_patched(shown, module, style)


def _refuse_patched(name: str, module: nn.Module, style: Style) -> None:
    if has_own_forward(module):
        raise PlanError(
            f"parallelize: {name} ({type(module).__name__}) has a forward that was set on the instance (a hook of "
            f"accelerate, a patching library), which would run on a part of the weights: take it away (del "
            f"module.forward; accelerate.hooks.remove_hook_from_submodules(model)), or patch after the cut"
        )
    if is_parametrized(module):
        raise PlanError(
            f"parallelize: {name} has a parametrization of {list(module.parametrizations)}, which would compute with a "  # type: ignore[arg-type]
            f"part as if it were the whole: call torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    computed = [
        n for n in ("weight", "bias") if n not in module._parameters and isinstance(vars(module).get(n), Tensor)
    ]
    if computed:
        raise PlanError(
            f"parallelize: {computed} of {name} must be parameters, got tensors computed from "
            f"{[n for n, _ in module.named_parameters(recurse=False)]} (pruning, weight or spectral norm): make them "
            f"permanent first, by torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm"
        )
    sharded = {"column": module._forward_hooks, "row": module._forward_pre_hooks}.get(style.role, {})
    hooks = [*sharded.values(), *module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    if hooks:
        raise PlanError(
            f"parallelize: {name} has {len(hooks)} hooks ({getattr(hooks[0], '__name__', type(hooks[0]).__name__)}, "
            f"...) that would see this rank's part of its features: remove them, or register them after the cut"
        )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward other than that of the class is set on the instance."""
    forward = vars(module).get("forward")
    bound = getattr(forward, "__func__", None), getattr(forward, "__self__", None)
    return forward is not None and bound != (type(module).forward, module)


def patched_parents(modules: dict[str, nn.Module], styles: dict[str, Style]) -> list[str]:
    """Return the parents of modules with a style whose forward was set on the instance: it may read the weights."""
    parents = {name.rpartition(".")[0] for name, style in styles.items() if not style.keeps_forward}
    return [name for name in parents if name and has_own_forward(modules[name])]

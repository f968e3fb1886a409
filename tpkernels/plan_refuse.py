"""What cannot be cut, found before anything is changed."""

from __future__ import annotations

from torch import nn

from tpkernels.layers.base import ParallelModule
from tpkernels.plan_styles import PlanError

# Classes of modules that replace linears with packed weights of their own, by the package that they come from.
QUANTISERS = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "torchao", "quanto", "optimum", "hqq", "aqlm", "eetq")


def refuse(model: nn.Module) -> None:
    """Raise when a model cannot be cut as it is.

    Raises:
        PlanError: it is cut already, wrapped (DDP, FSDP, peft), compiled, quantised, or has DTensor parameters; the
            text says which module and what to do.
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
        for key, parameter in module.named_parameters(recurse=False):
            if type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh"):
                raise PlanError(f"parallelize: {name}.{key} is a DTensor: cut an ordinary model instead")
            if not parameter.is_floating_point():
                raise PlanError(f"parallelize: {name}.{key} is {parameter.dtype}: quantised weights cannot be cut")

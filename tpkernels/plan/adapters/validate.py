"""Adapters of peft that do not work on parallel layers are refused before anything is changed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from tpkernels.errors import PlanError
from tpkernels.layers.convert import ConvertedModule
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.reference import Ref
from tpkernels.plan.styles.modules import SumTail

# Prompts that are embeddings in front of the sequence, which every rank holds whole.
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
LINEARS = (ColumnParallelLinear, RowParallelLinear, SumTail)  # that LoRA may adapt
INITS = (True, "gaussian")  # of A; B begins as zeros
INSIDE = ("base_layer", "original_module", "token_adapter")  # names that peft puts between
BLENDS = ("linear", "cat")  # made of rows and columns one by one


def refuse_adapters(top: nn.Module) -> None:
    """Raise when a module of peft is on a parallel layer and is not plain LoRA.

    Raises:
        PlanError: names the layer, the module and the alternative.
    """
    modules = dict(top.named_modules())
    for name, module in modules.items():
        if isinstance(module, ConvertedModule):
            for prefix in (name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)):
                _refuse_around(prefix, modules[prefix], name, modules)
    for name, module in modules.items():
        base = getattr(module, "base_layer", None)
        if isinstance(base, LINEARS):
            for adapter in sorted(set(top.peft_config) & set(module.lora_A)):  # type: ignore[arg-type]
                _refuse_kind(name, module, adapter, top.peft_config[adapter])  # type: ignore[index]


def refuse_prompts(model: nn.Module) -> None:
    """Raise when peft's wrapper of a sharded model needs all its heads, or blends adapters token by token.

    Raises:
        PlanError: names the kind.
    """
    configs: Any = getattr(model, "peft_config", None) or {}
    for adapter, config in configs.items():
        kind = _text(config.peft_type)
        if (config.is_prompt_learning and kind not in PROMPTS) or kind == "XLORA":
            raise PlanError(
                f"cut_adapters: adapter {adapter!r} is {kind}, which does not work on a cut model: take LoRA, or a "
                f"prompt of the kinds {', '.join(PROMPTS)}"
            )


def _refuse_around(prefix: str, outer: nn.Module, name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse a module of peft around a parallel layer, except those that compute the same with shards."""
    if not type(outer).__module__.startswith("peft."):
        return
    from peft.tuners.lora import Linear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(outer, ModulesToSaveWrapper):  # copies of the layer, which are cut as it is
        return
    kind = f"{type(outer).__module__}.{type(outer).__name__}"
    layer = ".".join(part for part in name.split(".") if part not in INSIDE)
    instead = f"adapt other layers, or leave it whole with the rule {{{layer!r}: 'replicate'}}"
    base = getattr(outer, "base_layer", None)
    if type(outer) is Linear and isinstance(base, LINEARS):
        above = modules.get(prefix.rpartition(".")[0])
        if isinstance(above, ConvertedModule) and isinstance(above, nn.MultiheadAttention):
            raise PlanError(
                f"cut_adapters: {prefix} must be a layer whose forward is called; attention of torch takes the weights "
                f"of its layers past them, so that an adapter would change nothing: adapt other layers"
            )
        return
    if isinstance(base, ConvertedModule) and not isinstance(base, LINEARS):
        raise PlanError(
            f"cut_adapters: {layer} must adapt a column or row layer, or one that is whole, got a "
            f"{type(base).__name__} in a {kind}: {instead}"
        )
    raise PlanError(f"cut_adapters: {layer} is in a {kind}; on cut layers only LoRA is known: {instead}")


def _refuse_kind(name: str, module: Any, adapter: str, config: Any) -> None:
    """Refuse LoRA that reads the weights of the layer, or that computes something else than y + B(A(x))."""
    init, variant = getattr(config, "init_lora_weights", True), getattr(module, "lora_variant", {}).get(adapter)
    why = [
        f"is of type {_text(config.peft_type)}" * (_text(config.peft_type) != "LORA"),
        "uses DoRA" * bool(getattr(config, "use_dora", False)),
        f"is a {type(variant).__name__}" * (variant is not None),
        f"has init_lora_weights={init!r}" * (not any(init is known or init == known for known in INITS)),
        "has layer_replication" * bool(getattr(config, "layer_replication", None)),
    ]
    if any(why):
        raise PlanError(
            f"cut_adapters: adapter {adapter!r} of {name} must be LoRA without DoRA or other variants, initialised as "
            f"usual (init_lora_weights of {INITS}); it {next(filter(None, why))}"
        )


class WeightedAdapters:
    """add_weighted_adapter of a tuner on a sharded model: only blends that are the same for shards."""

    def __init__(self, tuner: nn.Module, top: nn.Module) -> None:
        self._tuner, self._top = Ref(tuner), Ref(top)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Blend.

        Raises:
            PlanError: the blend needs full matrices.
        """
        tuner: Any = self._tuner.target
        blend = type(tuner).add_weighted_adapter
        given = inspect.signature(blend).bind(tuner, *args, **kwargs)
        given.apply_defaults()
        kind = given.arguments.get("combination_type", "linear")
        if kind not in BLENDS and any(
            isinstance(getattr(module, "base_layer", None), ConvertedModule) for module in self._top.target.modules()
        ):
            raise PlanError(
                f"add_weighted_adapter: combination_type={kind!r} needs full matrices, and this model is cut: take "
                f"one of {BLENDS}, or blend on an uncut model, save, and load the result here"
            )
        whole = [(layer, vars(layer).copy()) for layer in self._top.target.modules() if _has_full_sizes(layer)]
        for layer, _ in whole:  # of which peft makes the new matrices
            base: Any = layer.base_layer
            size = base._info(base._cuts["weight"]).size
            setattr(layer, "out_features" if isinstance(base, ColumnParallelLinear) else "in_features", size)
        try:
            return blend(tuner, *args, **kwargs)
        finally:
            for layer, before in whole:
                layer.in_features, layer.out_features = before["in_features"], before["out_features"]


def _has_full_sizes(layer: nn.Module) -> bool:
    """Whether a layer of peft adapts a parallel one that takes or returns full tensors, and so has full sizes."""
    base = getattr(layer, "base_layer", None)
    if isinstance(base, ColumnParallelLinear):
        return base.gather_output
    return isinstance(base, RowParallelLinear) and not base.input_is_parallel


def _text(kind: Any) -> str:
    return str(getattr(kind, "value", kind))

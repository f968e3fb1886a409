"""What transformers ships with a model, for plans of ours that add to it."""

from __future__ import annotations

from torch import nn

from tpkernels.plan.styles.style import TRANSLATION

# An attention block whose forward only reshapes by the size of a head, as most of transformers do.
ATTENTION = {
    "*.self_attn.q_proj": "column",
    "*.self_attn.k_proj": "column",
    "*.self_attn.v_proj": "column",
    "*.self_attn.o_proj": "row",
}


def experts_of(model: nn.Module) -> dict[str, str]:
    """The rules of the shipped plan for mixtures of experts, for the bare model and for those with a head."""
    shipped = getattr(model.config, "base_model_tp_plan", None) or {}
    return {
        f"*{glob}": "expert"
        for glob, style in shipped.items()
        if TRANSLATION.get(style) == "expert" and any(name.endswith(glob.rpartition(".")[2]) for name in _names(model))
    }


def present(model: nn.Module, rules: dict[str, str]) -> dict[str, str]:
    """Those of the rules whose last name some module has: layers that a config can leave out."""
    last = {name.rpartition(".")[2] for name in _names(model)}
    return {glob: style for glob, style in rules.items() if glob.rpartition(".")[2] in last}


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]

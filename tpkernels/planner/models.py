"""Models by name: a model of transformers without weights, its Shape, and how many ranks it can be cut over."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tpkernels.errors import PlanError, UserError
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.rules import Plan
from tpkernels.planner.recipe import Cuts
from tpkernels.planner.shape import Shape

AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
KNOWN = 0.03  # of the parameters, by which biases, norms, positions and routers may exceed those that Shape counts


def model_without_weights(model: str) -> Any:
    """Return a model of transformers on the meta device.

    Args:
        model: a folder with config.json, a config file or a model type.

    Raises:
        UserError: there is no such model, or transformers is missing.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("a model needs transformers: pip install 'tpkernels[hf]'") from None
    import torch

    path = Path(model)
    try:
        if path.is_dir() or path.is_file():
            file = path / "config.json" if path.is_dir() else path
            values = json.loads(file.read_text())
            config = transformers.AutoConfig.for_model(**values)
        else:
            config = transformers.AutoConfig.for_model(model)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the model must be a folder with config.json, a config file or a model type, got {model!r}: "
            f"{str(error).partition('. ')[0]}"
        ) from None
    why = ""
    for name in AUTO:
        with torch.device("meta"):
            try:
                return getattr(transformers, name).from_config(config)
            except ValueError as error:  # no such head for this type, or a config that fits no model
                why = str(error).partition("\n")[0]
    raise UserError(f"transformers makes no model of type {config.model_type} from it: {why}")


def shape_and_cuts(model: str) -> tuple[Shape, Cuts]:
    """Return the sizes of a model, and the function that says why it cannot be cut over so many ranks.

    Args:
        model: a folder with config.json, a config file or a model type of transformers.

    Raises:
        UserError: there is no such model, it is no decoder-only transformer, or its parameters are not those that its
            sizes make, so that the model of time would be about another one.
    """
    whole = model_without_weights(model)
    shape = Shape.from_config(whole.config.to_dict())
    count = sum(parameter.numel() for parameter in whole.parameters())
    if not shape.parameters <= count * (1 + 1e-9) <= shape.parameters * (1 + KNOWN):
        raise UserError(
            f"plan: {shape.name} has {count:,} parameters, and a decoder of its sizes has {shape.parameters:,}: its "
            f"layers are of a kind that has no model of time"
        )
    try:
        styles = Plan.resolve(whole).styles(whole)
    except PlanError as error:
        reason = str(error)
        return shape, lambda tp: reason

    @cache
    def why_not(tp: int) -> str | None:
        if tp > shape.heads:  # before anything is resolved: it is quick, and by far the most frequent
            return f"{shape.heads} heads leave some of {tp} ranks with none"
        try:
            Resolved.of(whole, styles, tp)
        except PlanError as error:
            return str(error)
        return None

    return shape, why_not

"""`tpkernels plan-model`: how a model would be cut, without loading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from tpkernels.cli.errors import plain_errors
from tpkernels.errors import PlanError, UserError
from tpkernels.plan.rules import Plan
from tpkernels.plan.table import plan_table

AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="plan-model")(plan_model)


def plan_model(
    model: Annotated[str, Argument(help="A folder with config.json, a config file, or a model type such as llama.")],
    tp: Annotated[int, Option(min=1, help="Ranks to cut it over.")] = 2,
) -> None:
    """Show how a model of transformers would be cut: each linear's style and parts, heads, parameters on a rank."""
    with plain_errors():
        whole = model_without_weights(model)
        try:
            table = plan_table(whole, Plan.resolve(whole), tp)
        except PlanError as error:
            raise UserError(str(error)) from None
    _print(table, type(whole).__name__, tp)


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


def _print(table: Any, model: str, tp: int) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{model} over {tp} ranks, by the plan of {table.source}", title_justify="left")
    for column in ("module", "", "style", "weight", "parts"):
        shown.add_column(column, justify="right" if column in ("", "weight") else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(row.name, f"{row.count}x", row.style, row.shape, row.parts)
    console = Console()
    console.print(shown)
    for how, count in table.heads.items():
        console.print(f"{count} attention blocks: {how}", highlight=False)
    whole, mine = table.totals
    console.print(f"{whole:,} parameters, {mine:,} on the fullest rank ({mine / max(whole, 1):.1%})", highlight=False)

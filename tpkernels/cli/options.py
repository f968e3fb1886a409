"""Options of the command line from the fields of a dataclass, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer import Argument, Option

PARALLEL = "Parallel"
KEYWORD = Parameter.KEYWORD_ONLY
Timeout = Annotated[
    float, Option(min=1.0, help="Seconds to wait for a rank before giving it up.", rich_help_panel=PARALLEL)
]
Arena = Annotated[int, Option(min=1, help="Shared memory of each rank, in MiB.", rich_help_panel=PARALLEL)]
Command = TypeVar("Command", bound=Callable[..., None])


def options_of(kind: type[Any]) -> Callable[[Command], Command]:
    """Give a command an option for each field of a dataclass, before its own, and those of base classes last.

    Args:
        kind: its fields have as metadata `help` and `panel`, and may have `shown` (the default in the help), `name` (of
            the option) and `more` (what typer's Option takes beside these; with positional=True, typer's Argument).
    """

    def decorate(command: Command) -> Command:
        types = get_type_hints(kind)
        own_first = (f for base in kind.__mro__ for f in fields(kind) if f.name in inspect.get_annotations(base))
        made = [
            Parameter(
                f.name,
                KEYWORD,
                default=Parameter.empty if f.default is MISSING else f.default,
                annotation=Annotated[types[f.name], _option(f)],
            )
            for f in own_first
        ]
        own = inspect.signature(command, eval_str=True).parameters.values()
        named = [p.replace(kind=KEYWORD) for p in own if p.kind is not Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*made, *named])  # type: ignore[attr-defined]
        return command

    return decorate


def _option(field: Field[Any]) -> Any:
    metadata, more = field.metadata, dict(field.metadata.get("more", {}))
    if more.pop("positional", False):
        return Argument(help=metadata["help"], **more)
    names = [metadata["name"]] if metadata.get("name") else []
    if field.type == "bool":  # without a --no-... beside it
        names = names or ["--" + field.name.replace("_", "-")]
    shown = True if metadata.get("shown") is None else metadata["shown"]
    return Option(*names, help=metadata["help"], show_default=shown, rich_help_panel=metadata["panel"], **more)


def given(context: typer.Context, kind: type[Any]) -> dict[str, Any]:
    """The options of a dataclass that are on the command line, by field name."""
    source = context.get_parameter_source
    names = {f.name for f in fields(kind)} & context.params.keys()
    return {name: context.params[name] for name in names if getattr(source(name), "name", "DEFAULT") != "DEFAULT"}

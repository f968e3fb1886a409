"""The command line's `tpkernels tune`."""

from __future__ import annotations

import contextlib
import sys
from itertools import product
from typing import Annotated

import torch
import typer
from typer import Option

from tpkernels.cli.errors import plain_errors
from tpkernels.cli.options import Timeout
from tpkernels.cli.ranks import start_ranks
from tpkernels.comm import profile, torchrun
from tpkernels.comm.profile import Product, Profile
from tpkernels.errors import PlanError, UserError
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.rules import Plan
from tpkernels.plan.styles.base import is_linear, sizes_of
from tpkernels.planner.models import model_without_weights

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    model: Annotated[
        str | None, Option(help="Measure the shapes of this model: a folder with config.json, or a model type.")
    ] = None,
    tp: Annotated[int, Option(min=1, help="Ranks to cut it over.")] = 2,
    rows: Annotated[str, Option(help="Tokens of a call on a rank, with commas.")] = "1,8,64,512",
    dtype: Annotated[str, Option(help="fp32, bf16 or fp16, with commas.")] = "fp32,bf16",
    timeout: Timeout = 60.0,
) -> None:
    """Measure which engine multiplies fastest on this machine, and keep it for all later runs.

    Without --model the points of the machine's profile are measured anew, and up to which size each of so many ranks
    sums a whole message itself; with it, each shape of that model, too.
    """
    with plain_errors():
        tokens, dtypes = _numbers(rows), _dtypes(dtype)
        shapes = [] if model is None else products_of(model, tp, tokens, dtypes)
        if profile.mode() != "auto":
            raise UserError(f"TPKERNELS_PROFILE is {profile.mode()!r}, so that no profile is kept: unset it")
        if not torchrun.is_rank() and tp > 1:
            raise typer.Exit(start_ranks(tp, sys.argv[1:]))
        _measure(shapes, tp, timeout)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"--rows must be numbers of 1 or more with commas between them, got {text!r}")
    return found


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise UserError(f"--dtype is one or more of {', '.join(DTYPES)}, with commas between them, got {unknown[0]!r}")
    return [DTYPES[name] for name in names]


def products_of(model: str, tp: int, rows: list[int], dtypes: list[str]) -> list[Product]:
    """Return the products of a rank in the sharded linears of a model, forward and, of more than 8 rows, backward.

    Args:
        model: a folder with config.json, a config file or a model type of transformers.
        tp: ranks.
        rows: tokens of a call.
        dtypes: such as "float32".

    Raises:
        UserError: there is no such model, or it cannot be sharded over tp ranks.
    """
    whole = model_without_weights(model)
    try:
        resolved = Resolved.of(whole, Plan.resolve(whole).styles(whole), tp)
    except PlanError as error:
        raise UserError(str(error)) from None
    weights: set[tuple[int, ...]] = set()
    for name, cut in resolved.cuts.items():
        if is_linear(resolved.modules[name]):
            local = list(sizes_of(resolved.modules[name]))
            local[cut.dim] = max(cut.info(tp).sizes)
            weights.add(tuple(local))
    forward = {Product(d, m, n, k) for d, m, (n, k) in product(dtypes, rows, weights)}
    backward = {Product(p.dtype, p.M, p.K, p.N) for p in forward if p.M > 8}
    return sorted(p for p in forward | backward if profile.has_choice(p))


def _measure(shapes: list[Product], tp: int, timeout_s: float) -> None:
    with contextlib.ExitStack() as stack:
        with profile.switched_off():  # else the group of a new machine measures the points when it opens
            ranks = stack.enter_context(torchrun.open_ranks(timeout_s, 16, tp=tp)).tp
        points = list(profile.points())
        with typer.progressbar(length=len(points) + len(shapes), label="products", hidden=ranks.rank > 0) as bar:
            found = [ranks.measure_engines(products, lambda: bar.update(1)) for products in (points, shapes)]
        one_shot = ranks.measure_one_shot()
        if ranks.rank == 0:
            kept = profile.read(ranks.transport) or Profile()
            profile.write(Profile(found[0], kept.shapes | found[1], kept.one_shot | one_shot), ranks.transport)
            typer.echo(_report(shapes or points, found[0] | found[1], ranks.transport))


def _report(products: list[Product], times: dict[Product, dict[str, float]], transport: str) -> str:
    wins: dict[str, int] = {}
    for p in products:
        best = min(times[p], key=lambda engine: times[p][engine])
        wins[best] = wins.get(best, 0) + 1
    each = ", ".join(f"{engine} {count}" for engine, count in sorted(wins.items()))
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return (
        f"{len(products)} products on each rank, {threads}; fastest: {each}\nwritten: {profile.profile_file(transport)}"
    )

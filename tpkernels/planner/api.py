"""`plan` and `plan_serving`: from a model's name and a machine to a report."""

from __future__ import annotations

import re
from dataclasses import replace

from tpkernels.errors import UserError
from tpkernels.planner.hardware import Cluster
from tpkernels.planner.models import shape_and_cuts
from tpkernels.planner.recipe import WIRE_BYTES, Cuts, Job, whole_heads
from tpkernels.planner.report import Report
from tpkernels.planner.search import Choices, Search
from tpkernels.planner.serving import Serving, serve_options
from tpkernels.planner.shape import Shape

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LONGEST = 4096  # tokens of a sequence where nobody says how many


def count(text: str, what: str) -> int:
    """Return a number such as "8M"; K, M and G are powers of 1024, as batches are counted.

    Raises:
        UserError: it is none, or less than 1.
    """
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    if not found or int(found[1]) < 1:
        raise UserError(f"plan: {what}: expected a number such as 4096, 512K or 8M, got {text!r}")
    return int(found[1]) * UNITS[found[2]]


def known(model: str | Shape) -> tuple[Shape, Cuts]:
    """Return the sizes of a model, and the function that says why it cannot be cut over so many ranks."""
    return (model, whole_heads(model)) if isinstance(model, Shape) else shape_and_cuts(model)


def checked_sequence(shape: Shape, sequence: int | None) -> int:
    """Return the tokens of a sequence: those that are asked for, or what the model allows, 4096 at most.

    Raises:
        UserError: fewer than 1, or more than the model has positions for.
    """
    if sequence is None:
        return min(shape.longest or LONGEST, LONGEST)
    if sequence < 1 or 0 < shape.longest < sequence:
        raise UserError(
            f"plan: sequence (--context): expected 1 to {shape.longest or 'any number of'} tokens, got {sequence}"
        )
    return sequence


def checked_codecs(codecs: tuple[str, ...], cluster: Cluster) -> tuple[str, ...]:
    """Return the codecs that make a message smaller on this device, and "none".

    Raises:
        UserError: there is no such codec.
    """
    if unknown := [codec for codec in codecs if codec not in WIRE_BYTES]:
        raise UserError(f"plan: codecs: expected some of {', '.join(WIRE_BYTES)}, got {', '.join(unknown)}")
    smaller = [c for c in dict.fromkeys(codecs) if (WIRE_BYTES[c] or 99) < cluster.device.value_bytes]
    return (*(["none"] if "none" in codecs or not smaller else []), *smaller)


def plan(
    model: str | Shape,
    cluster: Cluster,
    *,
    tokens: int,
    sequence: int | None = None,
    codecs: tuple[str, ...] = ("none", "bf16", "int8"),
    choices: Choices | None = None,
    arena_bytes: float = 16 << 20,
) -> Report:
    """Rank the ways to train a model on a cluster by their time per step.

    Args:
        model: a folder with config.json, a config file or a model type of transformers, or sizes. It reads no weights.
        cluster: from `planner.cluster`.
        tokens: of one step, over all replicas; a multiple of `sequence`.
        sequence: tokens of a sequence; None takes what the model allows, 4096 at most.
        codecs: that sums over tp, and gradients over dp, may be packed by.
        choices: what else may be chosen; None for everything.
        arena_bytes: shared memory of a rank.

    Returns:
        every cut of the ranks into tp x pp x dp, with its best recipe or the reason why there is none.

    Raises:
        UserError: the model is unknown or has no model of time, or a number does not fit.

    Source: docs/planner.md has the formulas and their errors.
    """
    shape, cuts = known(model)
    length = checked_sequence(shape, sequence)
    if tokens < length or tokens % length:
        raise UserError(f"plan: tokens: expected a multiple of the {length} tokens of a sequence, got {tokens}")
    job = Job(shape, length, tokens // length)
    allowed = checked_codecs(codecs, cluster)
    free = replace(choices or Choices(), codecs=allowed, grad_codecs=allowed)
    found = Search(cluster, job, cuts, free, arena_bytes).run()
    exact = None
    if len(allowed) > 1 and "none" in allowed:
        exact = Search(cluster, job, cuts, replace(free, codecs=("none",), grad_codecs=("none",)), arena_bytes).run()[0]
    return Report(cluster, job, found, exact)


def plan_serving(model: str | Shape, cluster: Cluster, *, batch: int, context: int | None = None) -> list[Serving]:
    """Return how a cluster would serve a model, by the number of ranks that each copy of it is cut over.

    Args:
        model, cluster: as in `plan`.
        batch: sequences that one copy generates at a time.
        context: tokens of each sequence that are in the cache.

    Returns:
        one for each tp that divides the ranks; fastest per token first, then those that cannot run.

    Raises:
        UserError: as `plan`.
    """
    shape, cuts = known(model)
    if batch < 1:
        raise UserError(f"plan: batch: expected 1 or more, got {batch}")
    return serve_options(cluster, shape, cuts, batch, checked_sequence(shape, context))

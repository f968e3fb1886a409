"""Cells of the vocabulary-parallel ops: M tokens, N words, K hidden."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.cell import Cell, Setting, compare, rounding
from bench.shapes import Vocab
from bench.timing import Candidate
from tpkernels import ops


def words(setting: Setting, shape: Vocab) -> Tensor:
    """Random word numbers, the same on all ranks."""
    return torch.randint(shape.N, (shape.M,), generator=torch.Generator().manual_seed(setting.seed))


def my_words(setting: Setting, shape: Vocab) -> tuple[int, int]:
    """Start and count of this rank's words.

    Raises:
        ValueError: the ranks do not divide the vocabulary (the gathered baseline needs equal parts).
    """
    if shape.N % setting.world_size:
        raise ValueError(f"{'x'.join(map(str, shape))}: {shape.N} words do not divide by {setting.world_size} ranks")
    count = shape.N // setting.world_size
    return setting.rank * count, count


def vocab_embedding(setting: Setting, shape: Vocab) -> Cell:
    """Rows of a table cut over the ranks."""
    group, ids = setting.group(), words(setting, shape)
    table = setting.values(1, shape.N, shape.K)
    start, count = my_words(setting, shape)
    mine = table[start : start + count].clone()
    exact = compare(table[ids].double(), torch.zeros((), dtype=torch.float64))
    ours = setting.ours(codec="none")
    candidates = setting.pick(
        gloo=lambda: Candidate("gloo", call=lambda: baselines.embedding_gloo(ids, mine, start), error=exact),
        tpkernels=lambda: Candidate(
            "tpkernels",
            call=lambda: ops.vocab_embedding(ids, mine, group=group, vocab_size=shape.N),
            error=exact,
            label=ours,
        ),
    )
    sizes = {**shape._asdict(), "bytes": shape.M * shape.K * setting.itemsize}
    return Cell("vocab_embedding", setting.dtype_name, setting.world_size, sizes, candidates, "gloo")


def vocab_cross_entropy(setting: Setting, shape: Vocab) -> Cell:
    """Loss of each token from logits cut over the ranks; `gathered_gloo` gathers all logits and takes torch's loss."""
    group, target, world = setting.group(), words(setting, shape), setting.world_size
    logits = setting.values(1, shape.M, shape.N)
    start, count = my_words(setting, shape)
    source = logits[:, start : start + count].clone()
    own, parts = source.clone(), torch.empty(world, shape.M, count, dtype=setting.dtype)
    want = F.cross_entropy(logits.double(), target, reduction="none")
    # exp and log are good to some units in the last place; the sum of N terms walks; the naive way rounds logits too
    unit = max(rounding(torch.float32), 2.0**-53)
    close = compare(want, (want.abs() + 8) * (16 + shape.N**0.5) * unit)
    ours = setting.ours(codec="none")

    def candidate(name: str, run: Callable[[], Tensor], label: dict[str, str | None] | None = None) -> Candidate:
        return Candidate(name, call=run, error=close, load=lambda: own.copy_(source), label=label or {})

    candidates = setting.pick(
        gloo=lambda: candidate("gloo", lambda: baselines.cross_entropy_gloo(own, target, start)),
        gathered_gloo=lambda: candidate(
            "gathered_gloo", lambda: baselines.gathered_cross_entropy_gloo(parts, own, target)
        ),
        tpkernels=lambda: candidate(
            "tpkernels", lambda: ops.vocab_cross_entropy(own, target, group=group, vocab_size=shape.N), label=ours
        ),
    )
    sizes = {**shape._asdict(), "bytes": shape.M * shape.N * setting.itemsize}
    return Cell("vocab_cross_entropy", setting.dtype_name, world, sizes, candidates, "gloo")

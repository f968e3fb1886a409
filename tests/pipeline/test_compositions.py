"""A model divided by tensor, sequence, pipeline and data parallelism at once is the uncut model, step by step."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from tests.harness.pipelines import Shape, check_shape
from tpkernels.testing import run_ranks

# Each with the shape that reads its checkpoint and goes on, and what is called first where there are stages.
CHOICE = [
    (Shape(tp=2, pp=2), Shape(pp=2, dp=2), "take_stages"),
    (Shape(tp=2, sequence=True, pp=2, accumulate=2), Shape(pp=4, accumulate=2), "parallelize"),
    (Shape(pp=2, dp=2, codec="fp16", accumulate=2), Shape(tp=2, sequence=True, dp=2, accumulate=2), "parallelize"),
    (Shape(pp=4), Shape(tp=2, sequence=True, pp=2), "parallelize"),
]
EVERY = [
    Shape(tp, sequence, pp, dp, codec, accumulate)
    for (tp, sequence), pp, dp, codec, accumulate in product(
        [(1, False), (2, False), (2, True)], [1, 2], [1, 2], ["none", "fp16"], [1, 2]
    )
]


def other_of(shape: Shape) -> Shape:
    """Another shape of as many ranks, where there is one."""
    tp, pp, dp = shape.pp, shape.dp, shape.tp
    return Shape(tp, tp > 1 and not shape.sequence, pp, dp, shape.codec, shape.accumulate)


def check_choice(folder: str) -> None:
    torch.set_num_threads(1)
    for shape, other, first in CHOICE:
        check_shape(shape, other, folder, first=first)


def check_every(folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    for shape in (s for s in EVERY if s.ranks == ranks):
        check_shape(shape, other_of(shape), folder)


def test_a_choice_of_compositions_trains_as_the_uncut_model(tmp_path: Path) -> None:
    run_ranks(check_choice, 4, str(tmp_path))


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_composition_trains_as_the_uncut_model(tmp_path: Path, ranks: int) -> None:
    run_ranks(check_every, ranks, str(tmp_path), ranks, timeout=600)

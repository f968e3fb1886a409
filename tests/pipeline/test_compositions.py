"""A model divided by tensor, sequence, pipeline and data parallelism at once is the uncut model, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.pipelines import EVERY, Shape, check_shape, other_of
from tests.harness.ranks import nightly, weekly
from tpkernels.testing import run_ranks

# Each with the shape that reads its checkpoint and goes on, and what is called first where there are stages.
CHOICE = [
    (Shape(tp=2, pp=2), Shape(pp=2, dp=2), "take_stages"),
    (Shape(tp=2, sequence=True, pp=2, accumulate=2), Shape(pp=4, accumulate=2), "parallelize"),
    (Shape(pp=2, dp=2, codec="fp16", zero=1), Shape(tp=2, sequence=True, dp=2, zero=2), "parallelize"),
]


# Every composition of the table, accumulating or not by turns.
BY_TURNS = [shape for i, shape in enumerate(EVERY) if i % 2 == i // 4 % 2]


def check_choice(folder: str) -> None:
    torch.set_num_threads(1)
    for shape, other, first in CHOICE:
        check_shape(shape, other, folder, first=first)


def check_every(folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    for shape in (s for s in BY_TURNS if s.ranks == ranks):
        check_shape(shape, other_of(shape), folder)


def test_a_choice_of_compositions_trains_as_the_uncut_model(tmp_path: Path) -> None:
    run_ranks(check_choice, 4, str(tmp_path))


@pytest.mark.parametrize("ranks", [*nightly(1, 2), *weekly(4, 8)])
def test_every_composition_trains_as_the_uncut_model(tmp_path: Path, ranks: int) -> None:
    run_ranks(check_every, ranks, str(tmp_path), ranks, timeout=600)

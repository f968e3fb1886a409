"""Training over pipeline stages: the numbers of one process, exact resume, and settings that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.harness.ranks import nightly
from tests.harness.training import finished, run
from tpkernels.errors import UserError
from tpkernels.testing import run_ranks
from tpkernels.train import parity, report
from tpkernels.train.settings import Settings, check

TINY = Settings(
    tp=1, dp=1, pp=2, layers=3, d_model=24, heads=3, context=16, batch=6, micro_batches=4,
    steps=6, warmup=2, lr=0.01, checkpoint_every=3, eval_every=3, parity_steps=6,
)  # fmt: skip


def check_parity_and_resume(folder: str, settings: Settings) -> None:
    """Six steps against one process, with the gradient of the head a thousandth off, and three and three."""
    for wrong in (False, True):
        with run(settings, f"{folder}/{wrong}") as opened:
            if wrong and opened.layout.stage == 1:
                opened.trainer.model.head.weight.register_hook(lambda g: g * 1.001)
            opened.loop()
            found = report.collect(opened)
            assert found.bubble is not None
            assert 0.0 <= found.bubble[0] < 1.0
            assert found.bubble[1] == pytest.approx(0.2)
            assert all(rank.stage_bytes > 0 for rank in found.ranks)
            if opened.group.rank == 0:
                compared = parity.compare(opened.trainer, opened.log.records, opened.total)
                assert compared.holds != wrong, compared
    whole, losses = finished(settings, f"{folder}/whole")
    finished(replace(settings, stop_at=3), f"{folder}/parts")
    parts, late = finished(settings, f"{folder}/parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert late[-3:] == losses[-3:]


@pytest.mark.parametrize(("tp", "sequence"), [(1, False), *nightly((2, True))])
def test_stages_train_as_one_process_would_and_resume_exactly(
    tmp_path: Path, text: str, tp: int, sequence: bool
) -> None:
    settings = replace(TINY, tp=tp, sequence_parallel=sequence, data=text)
    run_ranks(check_parity_and_resume, settings.ranks, str(tmp_path), settings)


def check_halves_of_backward_passes(folder: str, settings: Settings) -> None:
    """Gradients of weights that no backward pass of autograd reports are sent to the replicas."""
    with run(settings, folder) as opened:
        opened.loop()
        if opened.group.rank == 0:
            compared = parity.compare(opened.trainer, opened.log.records, opened.total)
            assert compared.holds, compared


@pytest.mark.parametrize("schedule", ["zb1p", "dualpipev"])
def test_stages_of_replicas_with_halves_train_as_one_process_would(tmp_path: Path, text: str, schedule: str) -> None:
    settings = replace(TINY, dp=2, zero=1, layers=4, schedule=schedule, batch=8, check_replicas=3, data=text)
    run_ranks(check_halves_of_backward_passes, settings.ranks, str(tmp_path / "run"), settings)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pp": 4}, "3 layers cannot be divided over 4 stages"),
        ({"pp": 1}, "--micro-batches needs several stages"),
        ({"pp": 1, "micro_batches": 4, "stage_codec": "fp16"}, "--stage-codec needs several stages"),
        ({"schedule": "zigzag"}, "--schedule is one of 1f1b, gpipe, zb1p, dualpipev, got zigzag"),
        ({"schedule": "dualpipev"}, "3 layers cannot be divided over 4 stages: take --pp 1 or less"),
        ({"schedule": "dualpipev", "layers": 4, "micro_batches": 3}, "needs 4 micro-batches of a row or more, got"),
    ],
)
def test_stages_that_do_not_fit_are_named_before_anything_starts(changes: dict[str, object], text: str) -> None:
    settings = replace(replace(TINY, micro_batches=5), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=text):
        check(settings)

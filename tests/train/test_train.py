"""Training: the same numbers whatever is done in one go or in parts, cut or whole; and that it learns."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.harness.training import finished, run
from tpkernels import checkpoint
from tpkernels.errors import CheckpointError, UserError
from tpkernels.testing import run_ranks
from tpkernels.train import clock, parity, report, trainer
from tpkernels.train.data import check_size, open_corpus, train_batch, validation_batches
from tpkernels.train.gpt import whole_parts
from tpkernels.train.runlog import RunLog, read
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Run, Trainer
from tpkernels.train.update import learning_rate

TINY = Settings(
    tp=2, layers=1, d_model=24, heads=3, context=16, batch=4,
    steps=8, warmup=2, lr=0.01, checkpoint_every=4, eval_every=4,
)  # fmt: skip


def check_resume(folder: str, settings: Settings) -> None:
    """Eight steps; four and four; six, of which two are done again after a crash, and four."""
    whole, losses = finished(settings, f"{folder}/whole")
    finished(replace(settings, stop_at=4), f"{folder}/parts")
    parts, late_losses = finished(settings, f"{folder}/parts", resume=True)
    with run(replace(settings, stop_at=6), f"{folder}/crash") as opened:
        opened.save = lambda: None if opened.step == 6 else Run.save(opened)  # type: ignore[method-assign]
        opened.loop()
    again, _ = finished(settings, f"{folder}/crash", resume=True)
    for other in (parts, again):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert late_losses[-4:] == losses[-4:]
    if torch.distributed.get_rank() == 0:  # which keeps the log
        logs = [read(Path(folder, name, "log.jsonl")) for name in ("whole", "parts", "crash")]
        steps = [[(r["step"], r["loss"]) for r in log] for log in logs]
        assert steps[0] == steps[1] == steps[2] == list(enumerate(losses))


def check_parity(folder: str, settings: Settings) -> None:
    with run(settings, folder) as opened:
        opened.loop()
        if opened.group.rank == 0:
            found = parity.compare(opened.trainer, opened.log.records, opened.total)
            assert found.holds, found
            assert found.steps == settings.parity_steps


def check_one_bad_gradient_is_found(folder: str, settings: Settings) -> None:
    """A bias gradient that one rank has wrong by a thousandth must not pass as rounding."""
    with run(settings, folder) as opened:
        opened.trainer.model.blocks[0].down.bias.register_hook(lambda g: g * 1.001)
        opened.loop()
        if opened.group.rank == 0:
            assert not parity.compare(opened.trainer, opened.log.records, opened.total).holds


def check_other_data(folder: str, settings: Settings, other: str) -> None:
    finished(replace(settings, stop_at=4), folder)
    with pytest.raises(UserError, match=r"is not the data that the run in .* began with: give its --data"):
        finished(replace(settings, data=other), folder, resume=True)
    with pytest.raises(UserError, match=r"holds a run already: add --resume to continue it"):
        finished(settings, folder)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        Path(folder, "settings.json").unlink()
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match=r"step-00000004 exists already, and a run that is at step 0"):
        finished(settings, folder)
    assert not Path(folder, "settings.json").exists(), "nothing was changed, and nothing trained in vain"


class Ticking:
    """A clock that goes on by 5 ms whenever it is read, on a machine of any load."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.005
        return self.now


def check_time_limit(folder: str, settings: Settings) -> None:
    ticking = Ticking()
    with (
        patch.object(trainer, "time", ticking),
        patch.object(clock, "time", ticking),
        run(replace(settings, steps=None, minutes=0.02), folder) as opened,
    ):
        opened.loop()
        totals = [None] * opened.group.world_size
        torch.distributed.all_gather_object(totals, (opened.total, opened.step))
        assert len(set(totals)) == 1, "ranks must agree on the length of the run"
        assert opened.total is not None
        assert opened.step > 20


@pytest.mark.parametrize(
    "change",
    [{}, {"sequence_parallel": True}, {"dtype": "bf16", "codec": "bf16"}],
    ids=["plain", "sequence parallel", "bf16"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, text: str, change: dict[str, Any]) -> None:
    run_ranks(check_resume, 2, str(tmp_path), replace(TINY, data=text, **change))


@pytest.mark.parametrize("R", [1, 2, 3])
def test_the_cut_run_is_the_uncut_one_within_rounding(tmp_path: Path, text: str, R: int) -> None:
    run_ranks(check_parity, R, str(tmp_path / "run"), replace(TINY, tp=R, data=text, parity_steps=8))


@pytest.mark.parametrize("change", [{"codec": "fp16"}, {"dtype": "bf16"}])
def test_parity_allows_for_the_rounding_of_codec_and_dtype(tmp_path: Path, text: str, change: dict[str, Any]) -> None:
    run_ranks(check_parity, 2, str(tmp_path / "run"), replace(TINY, data=text, parity_steps=8, **change))


def test_parity_finds_one_bad_gradient(tmp_path: Path, text: str) -> None:
    run_ranks(check_one_bad_gradient_is_found, 2, str(tmp_path / "run"), replace(TINY, data=text))


def test_other_data_and_a_used_folder_are_refused(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.py"
    other.write_text(Path(text).read_text() + "\n")
    run_ranks(check_other_data, 2, str(tmp_path / "run"), replace(TINY, data=text), str(other))


def test_a_run_by_the_clock_settles_its_length_and_all_ranks_agree(tmp_path: Path, text: str) -> None:
    run_ranks(check_time_limit, 2, str(tmp_path / "run"), replace(TINY, data=text))


def test_parity_does_not_hold_for_nan_or_a_visible_difference(text: str) -> None:
    settings = replace(TINY, tp=1, data=text)
    trainer = Trainer.new(settings, open_corpus(text), whole_parts(), None)
    records = [trainer.step(step, 8) for step in range(4)]
    found = parity.compare(trainer, records, 8)
    assert found.holds
    assert found.loss_difference == 0
    assert 0 < found.loss_bound < 1e-4, "the bound that is shown is the one that was used"
    for key, factor in (("loss", math.nan), ("grad_norm", math.nan), ("loss", 1.01), ("grad_norm", 1.001)):
        bad = [dict(r) for r in records]
        bad[2][key] *= factor
        assert not parity.compare(trainer, bad, 8).holds, (key, factor)


def test_the_model_learns(text: str) -> None:
    settings = replace(TINY, tp=1, data=text, steps=60, d_model=32, heads=2)
    trainer = Trainer.new(settings, open_corpus(text), whole_parts(), None)
    before = trainer.evaluate()
    for step in range(60):
        trainer.step(step, 60)
    assert before > 5
    assert trainer.evaluate() < 2.5


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(replace(TINY, steps=100, warmup=10, lr=1.0), step, 100) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert abs(rates[100] - 0.1) < 1e-12
    unsettled = replace(TINY, steps=None, warmup=50, lr=1.0)
    for step in range(20):
        assert learning_rate(unsettled, step, None) == learning_rate(unsettled, step, 600)


def test_batches_depend_on_seed_and_step_alone_and_never_touch_validation(text: str) -> None:
    corpus = open_corpus(text)
    whole = Path(text).read_bytes()
    ids, target = train_batch(corpus, seed=1, step=5, batch=3, context=8)
    again, _ = train_batch(open_corpus(text), seed=1, step=5, batch=3, context=8)
    assert torch.equal(ids, again)
    assert torch.equal(ids[:, 1:], target[:, :-1])
    assert not torch.equal(ids, train_batch(corpus, seed=1, step=6, batch=3, context=8)[0])
    assert not torch.equal(ids, train_batch(corpus, seed=2, step=5, batch=3, context=8)[0])
    seen = [bytes([*i, t[-1]]) for i, t in zip(ids.tolist(), target.tolist(), strict=True)]
    assert all(window in whole[: corpus.train_size] for window in seen)
    for checks, after in validation_batches(corpus, batch=2, context=8):
        windows = [bytes([*i, t[-1]]) for i, t in zip(checks.tolist(), after.tolist(), strict=True)]
        assert all(window in whole[corpus.train_size :] for window in windows)


def test_windows_run_across_files_and_every_byte_can_be_reached(tmp_path: Path) -> None:
    for name, size in (("a", 5), ("b", 0), ("c", 40), ("d", 1)):
        (tmp_path / name).write_bytes(bytes([ord(name)]) * size)
    (tmp_path / ".hidden").write_bytes(b"no")
    corpus = open_corpus(str(tmp_path))
    whole = corpus.read(0, corpus.size)
    assert sorted(whole) == sorted(b"a" * 5 + b"c" * 40 + b"d")
    assert all(corpus.read(i, 7) == whole[i : i + 7] for i in range(corpus.size - 7))


def test_the_standard_library_is_found_without_tests_and_packages() -> None:
    corpus = open_corpus(None)
    assert corpus.size > 5e6
    assert "argparse.py" in corpus.files
    assert not [f for f in corpus.files if "site-packages" in f or "/test/" in f or not f.endswith(".py")]


def test_bad_data_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file or folder .*nowhere: give --data"):
        open_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no file with anything in it"):
        open_corpus(str(tmp_path))
    (tmp_path / "short").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"has 100 bytes and --context 16 needs 360 or more"):
        check_size(open_corpus(str(tmp_path / "short")), 16)
    check_size(open_corpus(str(tmp_path / "short")), 3)


def test_a_log_that_a_crash_cut_off_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.5}) + "\n" for s in range(5)) + '{"step": 5, "lo')
    log = RunLog(path, keep_below=3)
    log.add({"step": 3, "loss": 1.0})
    assert [r["step"] for r in log.records] == [r["step"] for r in read(path)] == [0, 1, 2, 3]


def test_the_picture_is_drawn_and_missing_matplotlib_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("forward", "backward", "optimizer", "data", "communication", "waiting", "seconds", "loss")
    records = [{"step": s, **dict.fromkeys(keys, 1.0)} for s in range(3)]
    records[2]["validation_loss"] = 1.0
    pytest.importorskip("matplotlib")
    picture = report.draw(records, tmp_path, "title")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.draw(records, tmp_path, "title") is None


def test_a_checkpoint_of_a_run_says_how_the_run_was_set(tmp_path: Path, text: str) -> None:
    run_ranks(finished_quietly, 1, replace(TINY, tp=1, data=text), str(tmp_path / "run"))
    manifest = checkpoint.peek(tmp_path / "run/checkpoints/step-00000008")
    assert manifest["extra"]["settings"]["d_model"] == 24
    assert manifest["extra"]["total"] == 8


def finished_quietly(settings: Settings, folder: str) -> None:
    finished(settings, folder)

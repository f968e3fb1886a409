"""The settings of a training run: one dataclass, from which the options of `tpkernels train` are made.

They are checked before anything is started.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tpkernels.compress import CODECS
from tpkernels.data_parallel import checks
from tpkernels.errors import UserError

GRAD_CODECS, GRAD_MODES = checks.GRAD_CODECS, checks.MODES
OF_STAGES = ("micro_batches", "schedule", "stage_codec")
OF_REPLICAS = ("grad_codec", "grad_mode", "zero", "check_replicas")
MODEL, TRAINING, PARALLEL, FOLDER = "Model", "Training", "Parallel", "Run folder"  # panels of the help


def _setting(
    default: Any,
    help: str,
    panel: str,
    *,
    least: float | None = None,
    above: float | None = None,
    choices: Sequence[Any] = (),
    changeable: bool = False,
    shown: str | None = None,
) -> Any:
    """A field of Settings.

    Args:
        help, panel: of its option.
        least, above: its range; numbers are finite, and None is in every range.
        choices: its values, where they are listed.
        changeable: whether it may differ between a run and its continuation; the others decide the numbers, of which
            a number of ranks changes no more than the rounding.
        shown: the default in the help; None shows `default`.
    """
    metadata = {
        "help": help, "panel": panel, "least": least, "above": above, "choices": choices, "changeable": changeable,
        "shown": shown,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Every choice of a run. The defaults are about two minutes on two slow cores."""

    tp: int = _setting(2, "Ranks to cut the model over.", PARALLEL, least=1, changeable=True)
    dp: int = _setting(
        1, "Replicas of the cut model; each learns from its part of the batch.", PARALLEL, least=1, changeable=True
    )
    pp: int = _setting(1, "Pipeline stages that the layers are divided over.", PARALLEL, least=1, changeable=True)
    micro_batches: int = _setting(4, "Parts of a replica's batch, one behind another in --pp.", PARALLEL, least=1)
    schedule: str = _setting(
        "1f1b", "Their order: 1f1b, gpipe, zb1p, dualpipev (two stages a rank).", PARALLEL,
        choices=("1f1b", "gpipe", "zb1p", "dualpipev"),
    )  # fmt: skip
    stage_codec: str = _setting(
        "none", "How activations and their gradients are packed between stages.", PARALLEL, choices=tuple(CODECS)
    )
    sequence_parallel: bool = _setting(False, "Cut activations over the tokens, too.", PARALLEL)
    codec: str = _setting("none", "How sums are packed: none, fp16, bf16, int8, fp8.", PARALLEL, choices=tuple(CODECS))
    grad_codec: str = _setting(
        "none", "How gradients are packed between replicas: a codec, or topk.", PARALLEL, choices=GRAD_CODECS
    )
    grad_mode: str = _setting(
        "sync",
        "When replicas average: sync (each step), delayed (a step late), local (every --local-steps).",
        PARALLEL,
        choices=GRAD_MODES,
    )
    zero: int = _setting(
        0, "Cut over replicas: 1 optimizer state and update, 2 gradients, too.", PARALLEL, choices=(0, 1, 2)
    )
    local_steps: int = _setting(8, "Steps between averages, with --grad-mode local.", PARALLEL, least=1)
    check_replicas: int = _setting(
        0, "Steps between checks that replicas are the same; 0 for none.", PARALLEL, least=0, changeable=True
    )
    layers: int = _setting(4, "Transformer blocks.", MODEL, least=1)
    d_model: int = _setting(256, "Width of the model.", MODEL, least=1)
    heads: int = _setting(4, "Attention heads.", MODEL, least=1)
    context: int = _setting(128, "Bytes that the model looks back on.", MODEL, least=1)
    dtype: str = _setting("fp32", "fp32, or bf16 for autocast.", MODEL, choices=("fp32", "bf16"))
    data: str | None = _setting(
        None, "Folder or file to learn from.", TRAINING, changeable=True, shown="Python's standard library"
    )
    minutes: float | None = _setting(
        None, "Wall time to stay within.", TRAINING, above=0, changeable=True, shown="2 without --steps"
    )
    steps: int | None = _setting(None, "Length of the schedule.", TRAINING, above=0, changeable=True, shown="what fits")
    stop_at: int | None = _setting(None, "Stop after this step; --resume goes on.", TRAINING, above=0, changeable=True)
    batch: int = _setting(8, "Sequences per step.", TRAINING, least=1)
    lr: float = _setting(2e-3, "Highest learning rate.", TRAINING, above=0)
    warmup: int = _setting(50, "Steps to get there.", TRAINING, least=0)
    weight_decay: float = _setting(0.1, "For matrices.", TRAINING, least=0)
    clip: float = _setting(1.0, "Largest gradient norm.", TRAINING, above=0)
    seed: int = _setting(0, "For weights, batches, sample.", TRAINING)
    eval_every: int = _setting(50, "Steps between validations.", TRAINING, least=1, changeable=True)
    checkpoint_every: int = _setting(100, "Steps between checkpoints.", FOLDER, least=1, changeable=True)
    keep: int = _setting(2, "Checkpoints to keep.", FOLDER, least=1, changeable=True)
    sample_bytes: int = _setting(400, "Bytes to generate at the end.", FOLDER, least=0, changeable=True)
    parity_steps: int = _setting(
        10, "Steps to repeat uncut in one process at the end; 0 for none.", FOLDER, least=0, changeable=True
    )

    @property
    def effective_warmup(self) -> int:
        """Steps until the full learning rate: `warmup`, or a quarter of a schedule that is shorter than four of it."""
        return self.warmup if self.steps is None else min(self.warmup, self.steps // 4)

    @property
    def ranks(self) -> int:
        """How many ranks the run needs."""
        return self.tp * self.dp * self.pp

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the model, one or two on each of --pp ranks."""
        return self.pp * (2 if self.schedule == "dualpipev" and self.pp > 1 else 1)

    @property
    def tokens(self) -> int:
        """Bytes that one step learns from."""
        return self.batch * self.context


def check(settings: Settings) -> None:
    """Raise a UserError for the first setting that cannot work."""
    check_values(settings)
    s = settings
    if s.d_model % s.heads:
        near = [h for h in range(1, s.d_model + 1) if s.d_model % h == 0 and s.d_model // h % 2 == 0]
        best = min(near, key=lambda h: abs(h - s.heads), default=1)
        raise UserError(
            f"--d-model {s.d_model} does not divide into {s.heads} heads: make --d-model a multiple of {s.heads}, "
            f"or take --heads {best}."
        )
    if s.d_model // s.heads % 2:
        raise UserError(
            f"a head has --d-model / --heads = {s.d_model // s.heads} values, and rotary positions need an even "
            f"number: take --d-model {2 * s.heads * max(1, s.d_model // s.heads // 2)} or other --heads."
        )
    if s.heads < s.tp:
        raise UserError(
            f"{s.heads} heads cannot be cut over {s.tp} ranks, because each rank needs a whole head: "
            f"take --tp {s.heads} or fewer ranks, or --heads {s.tp} or more."
        )
    if s.layers < s.num_stages:
        most = s.layers * s.pp // s.num_stages
        raise UserError(
            f"{s.layers} layers cannot be divided over {s.num_stages} stages: take --pp {most} or less, or more "
            f"--layers."
        )
    if s.num_stages > s.pp > 1 and min(s.micro_batches, s.batch // s.dp) < s.num_stages:
        raise UserError(
            f"--schedule {s.schedule} over {s.pp} ranks needs {s.num_stages} micro-batches of a row or more, got "
            f"--micro-batches {s.micro_batches} of {s.batch // s.dp} rows."
        )
    _check_replicas(s)
    alone = Settings()
    for name in OF_STAGES:
        if s.pp == 1 and getattr(s, name) != getattr(alone, name):
            raise UserError(f"{option(name)} needs several stages: take --pp 2 or more, or leave it out.")


def check_values(settings: Settings) -> None:
    """Raise a UserError for the first setting that is out of its range, whatever the others are."""
    for setting in fields(settings):
        _check_value(option(setting.name), getattr(settings, setting.name), **setting.metadata)


def _check_value(
    name: str, value: Any, *, least: float | None, above: float | None, choices: Sequence[Any], **_: Any
) -> None:
    """Check one setting against its range and its choices; NaN is in no range."""
    if choices and value not in choices:
        raise UserError(f"{name} is one of {', '.join(map(str, choices))}, got {value}.")
    if value is not None and least is not None and not least <= value < math.inf:
        raise UserError(f"{name} must be {least} or more, got {value}.")
    if value is not None and above is not None and not above < value < math.inf:
        raise UserError(f"{name} must be more than {above}, got {value}.")


def _check_replicas(s: Settings) -> None:
    if s.grad_mode == "local" and s.check_replicas % s.local_steps:
        raise UserError(
            f"replicas are the same after every --local-steps {s.local_steps} steps only: "
            f"make --check-replicas a multiple of it, got {s.check_replicas}."
        )
    if s.zero and (s.grad_mode != "sync" or s.grad_codec == "topk"):
        raise UserError(
            f"--zero {s.zero} needs the average of each step: take --grad-mode sync and a --grad-codec other than "
            f"topk, got {s.grad_mode} and {s.grad_codec}."
        )
    if s.batch < s.dp:
        raise UserError(
            f"a batch of {s.batch} cannot be cut over {s.dp} replicas, because each needs a sequence: "
            f"take --batch {s.dp} or more, or --dp {s.batch} or less."
        )
    alone = Settings()
    for name in OF_REPLICAS:
        if s.dp == 1 and getattr(s, name) != getattr(alone, name):
            raise UserError(f"{option(name)} needs several replicas: take --dp 2 or more, or leave it out.")


def option(name: str) -> str:
    """The option of a field, as on the command line."""
    return "--" + name.replace("_", "-")


def save(settings: Settings, folder: Path) -> None:
    """Write the settings to settings.json in `folder`, which `--resume` reads."""
    path = folder / "settings.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    os.replace(temporary, path)


def resume(folder: Path, given: dict[str, Any]) -> Settings:
    """Read the settings of the run in `folder`, with the options of its continuation.

    Args:
        given: the options on the command line, by field name.

    Raises:
        UserError: there is no run, or an option differs that a continuation cannot change.
    """
    path = folder / "settings.json"
    changeable = {f.name: bool(f.metadata["changeable"]) for f in fields(Settings)}
    try:
        saved = Settings(**{k: v for k, v in json.loads(path.read_text()).items() if k in changeable})
    except FileNotFoundError:
        raise UserError(
            f"there is no run to resume in {folder}: name its folder with --folder, or leave out --resume."
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or start anew without --resume.") from None
    for name, value in given.items():
        if not changeable[name] and value != getattr(saved, name):
            raise UserError(
                f"the run in {folder} has {option(name)} {getattr(saved, name)}, which a continuation cannot change "
                f"to {value}: leave {option(name)} out, or start anew without --resume."
            )
    changed = replace(saved, **{k: v for k, v in given.items() if changeable[k]})
    unused = (OF_STAGES if changed.pp == 1 else ()) + (OF_REPLICAS if changed.dp == 1 else ())
    return replace(changed, **{name: getattr(Settings(), name) for name in unused})

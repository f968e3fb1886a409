"""What a training run is asked to do, checked before anything is started."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tpkernels.compress import CODECS
from tpkernels.data_parallel import checks
from tpkernels.errors import UserError

DTYPES = ("fp32", "bf16")
GRAD_CODECS, GRAD_MODES = checks.GRAD_CODECS, checks.MODES
# What may differ between a run and its continuation; everything else decides the numbers and is fixed at the start.
CHANGEABLE = frozenset(
    {
        "steps", "minutes", "stop_at", "checkpoint_every", "keep", "eval_every", "sample_bytes", "parity_steps", "data",
        "check_replicas",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Every choice of a run. The defaults are about two minutes on two slow cores."""

    tp: int = 2
    dp: int = 1
    layers: int = 4
    d_model: int = 256
    heads: int = 4
    context: int = 128
    batch: int = 8
    steps: int | None = None
    minutes: float | None = None
    stop_at: int | None = None
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    data: str | None = None
    dtype: str = "fp32"
    sequence_parallel: bool = False
    codec: str = "none"
    grad_codec: str = "none"
    grad_mode: str = "sync"
    local_steps: int = 8
    check_replicas: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    eval_every: int = 50
    sample_bytes: int = 400
    parity_steps: int = 10

    @property
    def warm_up(self) -> int:
        """Steps until the full learning rate: a short schedule has a short one."""
        return self.warmup if self.steps is None else min(self.warmup, self.steps // 4)

    @property
    def ranks(self) -> int:
        """How many ranks the run needs."""
        return self.tp * self.dp

    @property
    def tokens(self) -> int:
        """Bytes that one step learns from."""
        return self.batch * self.context


def check(settings: Settings) -> None:
    """Raise a UserError for the first thing that cannot work."""
    _check_numbers(settings)
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
    if s.dtype not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, got {s.dtype}.")
    if s.codec not in CODECS:
        raise UserError(f"--codec is one of {', '.join(CODECS)}, got {s.codec}.")
    _check_replicas(s)


def _check_replicas(s: Settings) -> None:
    if s.grad_codec not in GRAD_CODECS:
        raise UserError(f"--grad-codec is one of {', '.join(GRAD_CODECS)}, got {s.grad_codec}.")
    if s.grad_mode not in GRAD_MODES:
        raise UserError(f"--grad-mode is one of {', '.join(GRAD_MODES)}, got {s.grad_mode}.")
    if s.grad_mode == "local" and s.check_replicas % s.local_steps:
        raise UserError(
            f"replicas are the same after every --local-steps {s.local_steps} steps only: "
            f"make --check-replicas a multiple of it, got {s.check_replicas}."
        )
    if s.batch < s.dp:
        raise UserError(
            f"a batch of {s.batch} cannot be cut over {s.dp} replicas, because each needs a sequence: "
            f"take --batch {s.dp} or more, or --dp {s.batch} or less."
        )
    alone = Settings()
    for name in ("grad_codec", "grad_mode", "check_replicas"):
        if s.dp == 1 and getattr(s, name) != getattr(alone, name):
            raise UserError(f"{option(name)} needs several replicas: take --dp 2 or more, or leave it out.")


def _check_numbers(s: Settings) -> None:
    least_one = (
        "tp", "dp", "layers", "d_model", "heads", "context", "batch", "local_steps", "checkpoint_every", "keep",
        "eval_every",
    )  # fmt: skip
    for name in least_one:
        if getattr(s, name) < 1:
            raise UserError(f"{option(name)} must be 1 or more, got {getattr(s, name)}.")
    for name in ("warmup", "sample_bytes", "parity_steps", "check_replicas"):
        if getattr(s, name) < 0:
            raise UserError(f"{option(name)} must be 0 or more, got {getattr(s, name)}.")
    for name in ("lr", "clip", "minutes", "steps", "stop_at"):
        value = getattr(s, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option(name)} must be more than 0, got {value}.")
    if not 0 <= s.weight_decay < float("inf"):
        raise UserError(f"--weight-decay must be 0 or more, got {s.weight_decay}.")


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def save(settings: Settings, folder: Path) -> None:
    """Write the settings where `--resume` finds them."""
    path = folder / "settings.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    os.replace(temporary, path)


def resume(folder: Path, asked: dict[str, Any]) -> Settings:
    """The settings of the run in `folder`, with what the user asked for anew.

    Args:
        asked: the options that the user gave in so many words, by field name.

    Raises:
        UserError: there is no run, or an option asks for something that a continuation cannot change.
    """
    path = folder / "settings.json"
    try:
        known = {f.name for f in fields(Settings)}
        saved = Settings(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})
    except FileNotFoundError:
        raise UserError(
            f"there is no run to resume in {folder}: name its folder with --folder, or leave out --resume."
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or start anew without --resume.") from None
    for name, value in asked.items():
        if name not in CHANGEABLE and value != getattr(saved, name):
            if name == "tp":
                raise UserError(
                    f"the run in {folder} was cut over {saved.tp} ranks and this is {value}: "
                    f"continue it with --tp {saved.tp} (torchrun --nproc-per-node {saved.ranks}), "
                    f"or start anew without --resume."
                )
            raise UserError(
                f"the run in {folder} has {option(name)} {getattr(saved, name)}, which a continuation cannot change "
                f"to {value}: leave {option(name)} out, or start anew without --resume."
            )
    return replace(saved, **{k: v for k, v in asked.items() if k in CHANGEABLE})

"""The program `tpkernels`, of which one rank is killed in a step: between its backward pass and its update.

torchrun ... dying.py train ...      DIES=<rank>:<step>; only when torchrun starts it for the first time
"""

from __future__ import annotations

import os
import signal

from torch import Tensor

from tpkernels.cli import app
from tpkernels.train.trainer import Trainer

RANK, STEP = (int(part) for part in os.environ["DIES"].split(":"))
clip = Trainer.clip
calls = 0


def clip_or_die(trainer: Trainer) -> Tensor:
    """The others are in this call of all ranks, or wait for it."""
    global calls
    calls += 1
    if calls == STEP and int(os.environ["RANK"]) == RANK and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(trainer)


Trainer.clip = clip_or_die  # type: ignore[method-assign]
app(prog_name="tpkernels")

"""The program `tpkernels`, of which one rank is killed in a step.

torchrun ... dying.py train ...      DIES=<rank>:<step>[:<where>]; only when torchrun starts it for the first time

where: "clip", between its backward pass and its update, or "gather", of an optimizer that is cut over replicas, when it
has updated its part of the parameters.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from tpkernels.cli import app
from tpkernels.data_parallel import GradAggregator
from tpkernels.train.trainer import Trainer

RANK, STEP, WHERE = (*os.environ["DIES"].split(":"), "clip")[:3]
PLACES = {"clip": (Trainer, "clip"), "gather": (GradAggregator, "gather_parameters")}


def dying(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, in which this rank is killed; the others are in this call of all ranks, or wait for it."""
    calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(STEP) and os.environ["RANK"] == RANK and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)

    return wrapped


owner, name = PLACES[WHERE]
setattr(owner, name, dying(getattr(owner, name)))
app(prog_name="tpkernels")

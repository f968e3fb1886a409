"""Models of transformers: loaded shard by shard, and trained by its Trainer.

`TensorParallelTrainer` is imported at its first use, and transformers with it.
"""

from __future__ import annotations

from typing import Any

from tpkernels.hf.load import load_pretrained
from tpkernels.hf.trainer import fit_trainer, one_replica, trainer_class

__all__ = ["TensorParallelTrainer", "fit_trainer", "load_pretrained", "one_replica"]


def __getattr__(name: str) -> Any:
    if name == "TensorParallelTrainer":
        return trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

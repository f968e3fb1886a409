"""The Trainer of transformers, and those of TRL, on a sharded model, for one replica or several."""

from __future__ import annotations

from tpkernels.hf.trainer.fit import TensorParallelMixin, fit_trainer, one_replica, trainer_class

__all__ = ["TensorParallelMixin", "fit_trainer", "one_replica", "trainer_class"]

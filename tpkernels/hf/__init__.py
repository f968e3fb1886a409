"""Models of transformers: loaded in parts, and trained by its Trainer."""

from __future__ import annotations

from tpkernels.hf.load import load_pretrained
from tpkernels.hf.trainer import fit_trainer, one_replica

__all__ = ["fit_trainer", "load_pretrained", "one_replica"]

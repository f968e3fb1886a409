"""The command `tpkernels`: train, generate, serve, plan-model, reshard, tune, info."""

from __future__ import annotations

from tpkernels.cli.main import app

__all__ = ["app"]

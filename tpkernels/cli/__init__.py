"""The command `tpkernels`: train, generate, serve, plan, reshard, info."""

from __future__ import annotations

from tpkernels.cli.main import app

__all__ = ["app"]

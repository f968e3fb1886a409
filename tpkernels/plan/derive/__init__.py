"""Derive a plan from a model's own computation: run it on labelled features and see which linears can be cut."""

from __future__ import annotations

from tpkernels.errors import DeriveError
from tpkernels.plan.derive.search import Derived, derive, derive_plan

__all__ = ["DeriveError", "Derived", "derive", "derive_plan"]

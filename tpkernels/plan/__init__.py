"""Shard an unmodified model over the ranks of a group: a plan has a style for each module; start reading in api.py."""

from __future__ import annotations

from tpkernels.errors import PlanError
from tpkernels.plan.adapters.apply import cut_adapters
from tpkernels.plan.api import PlanReport, parallelize
from tpkernels.plan.rules import Plan

__all__ = ["Plan", "PlanError", "PlanReport", "cut_adapters", "parallelize"]

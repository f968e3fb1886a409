"""Tensor-parallel kernels for PyTorch: sharded GEMMs fused with their collectives, as torch ops and parallel layers."""

from __future__ import annotations

from tpkernels import (
    c10d,
    checkpoint,
    compress,
    data_parallel,
    generate,
    guards,
    hf,
    layers,
    ops,
    optimizers,
    pipeline,
    plan,
    planner,
    shard,
)
from tpkernels._build import build_info
from tpkernels.comm.explain import Explanation
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.data_parallel import check_replicas
from tpkernels.errors import (
    CheckpointError,
    DeriveError,
    PeerLostError,
    PlanError,
    RankMismatchError,
    UnequalGroupsError,
    UserError,
)
from tpkernels.hf import fit_trainer, one_replica
from tpkernels.plan import Plan, PlanReport, cut_adapters, parallelize

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DeriveError",
    "Explanation",
    "Group",
    "Mesh",
    "PeerLostError",
    "Plan",
    "PlanError",
    "PlanReport",
    "RankMismatchError",
    "UnequalGroupsError",
    "UserError",
    "build_info",
    "c10d",
    "check_replicas",
    "checkpoint",
    "compress",
    "cut_adapters",
    "data_parallel",
    "fit_trainer",
    "generate",
    "guards",
    "hf",
    "layers",
    "one_replica",
    "ops",
    "optimizers",
    "parallelize",
    "pipeline",
    "plan",
    "planner",
    "shard",
]

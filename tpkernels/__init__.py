"""Tensor-parallel kernels for PyTorch: sharded GEMMs fused with their collectives, as torch ops and parallel layers."""

from __future__ import annotations

import torch as _torch  # the extension needs libtorch in the process

from tpkernels import _C as _C
from tpkernels.errors import PeerLostError, RankMismatchError

_C.set_error_types(RankMismatchError, PeerLostError)
_C.set_onednn_available(_torch._C._has_mkldnn)

from tpkernels import (  # noqa: E402
    checkpoint,
    compress,
    data_parallel,
    generate,
    guards,
    hf,
    layers,
    ops,
    optimizers,
    shard,
)
from tpkernels._build import build_info  # noqa: E402
from tpkernels.data_parallel import check_replicas  # noqa: E402
from tpkernels.group import Explanation, Group  # noqa: E402
from tpkernels.plan import Plan, parallelize  # noqa: E402
from tpkernels.plan_peft import cut_adapters  # noqa: E402
from tpkernels.plan_trainer import fit_trainer, one_replica  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Group",
    "PeerLostError",
    "Plan",
    "RankMismatchError",
    "build_info",
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
    "shard",
]

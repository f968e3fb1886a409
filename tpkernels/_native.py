"""The compiled module `_C`: the only place that imports it.

It needs libtorch in the process, so torch is imported first. It raises this package's errors for failed collectives,
and it asks oneDNN for products only where torch has it.
"""

from __future__ import annotations

import torch

from tpkernels import _C
from tpkernels.errors import PeerLostError, RankMismatchError

__all__ = ["_C"]

_C.set_error_types(RankMismatchError, PeerLostError)
_C.set_onednn_available(torch._C._has_mkldnn)

"""What the tests of devices share: a machine on which CUDA works."""

from __future__ import annotations

from tpkernels.comm.devices import CudaFacts

GOOD = CudaFacts(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    built=True,
    built_reason="nvcc is there",
    driver=(13, 0),
    gpus=4,
    visible=None,
)

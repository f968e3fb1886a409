"""CuPy arrays in the ops of tpkernels, without a copy: DLPack hands the memory over in both directions.

    python examples/cupy_exchange.py                                   # one process
    torchrun --nproc-per-node 2 examples/cupy_exchange.py              # a GPU for each

Needs a GPU, a tpkernels built with CUDA, and CuPy (pip install 'tpkernels[cuda13]'); says so where one is missing.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels.comm.devices import cuda_facts, obstacle_to_cuda


def missing() -> str | None:
    """The requirements of this example that are missing."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'tpkernels[cuda13]', or tpkernels[cuda12] beside a torch for CUDA 12"
    return obstacle_to_cuda(cuda_facts())


def main() -> None:
    obstacle = missing()
    if obstacle is not None:
        print(f"This example was left out: {obstacle}")
        return
    import cupy as cp

    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    device = torch.cuda.current_device()
    with tpk.Group.open(device=f"cuda:{device}") as group, cp.cuda.Device(device):
        stream = cp.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        with stream:  # CuPy and torch work on one stream: nobody has to wait for anybody
            array = cp.full((4, 1024), group.rank + 1, dtype=cp.float32)
            x = torch.from_dlpack(array)
            assert x.data_ptr() == array.data.ptr
            tpk.ops.all_reduce_(x, group=group)  # in place: the array holds the sum
            total = group.world_size * (group.world_size + 1) // 2
            assert bool((array == total).all())

            wire = cp.from_dlpack(tpk.ops.compress(x, "fp16"))
            back = tpk.ops.decompress(torch.from_dlpack(wire), x.shape, torch.float32, "fp16")
            assert bool((cp.from_dlpack(back) == array).all())
        group.check()
        if group.rank == 0:
            print(f"{group.world_size} ranks: sum {float(array[0, 0]):g}, {wire.nbytes} bytes on the wire instead of "
                  f"{array.nbytes}, nothing copied")  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

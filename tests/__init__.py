"""What all processes of the tests share: an environment, which those that they start inherit, and small arenas."""

import os

# Several tests run at a time, and threads of OpenMP spin while they wait. Freed memory stays in the process up to a
# limit: the kernel clears each page that it gives anew, a third of the time of ops on large tensors. For each empty
# cache inductor would compile six programs, 9 s of a core, to find which instruction sets the compiler has.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456",
}
ARENA_BYTES = 4 << 20  # each rank maps the arenas of all, 5 ms for every 16 MiB, and the tests open thousands of groups


def _prepare() -> int:
    """Set both; return the bytes of an arena before."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from tpkernels.comm import open as opening  # and with it torch, which reads the environment

    usual = opening.ARENA_BYTES["cpu"]
    opening.ARENA_BYTES["cpu"] = ARENA_BYTES
    return usual


USUAL_ARENA_BYTES = _prepare()

"""The environment of the processes of the tests; those that they start inherit it."""

import os

# Several tests run at a time, and threads of OpenMP spin while they wait. Freed memory stays in the process up to a
# limit: the kernel clears each page that it gives anew, a third of the time of ops on large tensors.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

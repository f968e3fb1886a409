"""One thread in each process of the tests: several run at a time, and the threads of OpenMP spin while they wait."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read when torch is imported; processes that tests start inherit it

"""Run a compiler command and keep its output beside the object it made, as OBJECT.ptxas.

CMake puts this in front of nvcc with TPKERNELS_CUDA_REPORT: a build that compiles nothing anew says nothing, and still
the report of every kernel is there for tests/project/test_cuda_build.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    """Run it, print its output only when it failed, and return its status."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text(done.stdout)
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run nvcc and keep, beside the object it made, what it printed (OBJECT.ptxas) and its PTX (OBJECT[.compute_N].ptx).

CMake puts this in front of nvcc with TPKERNELS_CUDA_REPORT: a build that compiles nothing anew says nothing, and still
the report and the PTX of every kernel are there for the tests (tests/harness/cuda_build.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main(command: list[str]) -> int:
    """Run it, print its output only when it failed, and return its status."""
    with tempfile.TemporaryDirectory() as folder:
        keep = ["-keep", "-keep-dir", folder]  # nvcc writes all its intermediate files there
        done = subprocess.run(
            [*command, *keep], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if "-o" in command:
            made = Path(command[command.index("-o") + 1])
            made.with_name(made.name + ".ptxas").write_text(done.stdout)
            for old in made.parent.glob(f"{made.name}*.ptx"):
                old.unlink()
            for ptx in Path(folder).glob("*.ptx"):
                arch = "".join(Path(ptx.stem).suffixes)  # where there are several
                made.with_name(f"{made.name}{arch}.ptx").write_text(ptx.read_text())
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Examples and commands on ranks."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from tpkernels.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, script: str, *arguments: str, timeout: float = 120.0) -> str:
    """Run an example on so many ranks of this machine; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, f"examples/{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def in_ranks(ranks: int, program: str, *arguments: str) -> str:
    """Run an example, or the module tpkernels, on ranks that are forked, not started by torchrun; what it printed.

    They have imported torch and transformers already, which takes each process of torchrun 1.5 to 3 s.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return "".join(run_ranks(_as_main, ranks, store.port, program, arguments, fresh=True))


def _as_main(port: int, program: str, arguments: tuple[str, ...]) -> str:
    """Run the program on this rank, in the environment of a process of torchrun; return what it printed."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = [program, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            if program.endswith(".py"):
                runpy.run_path(f"examples/{program}", run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    return printed.getvalue()

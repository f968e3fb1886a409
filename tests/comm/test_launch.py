"""No process group is left when Python ends: a thread of gloo that needs Python then ends the process by a signal."""

import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tpkernels import Group, ops
from tpkernels.testing import run_ranks


def gloo_threads() -> int:
    found = 0
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since it was listed
            found += "gloo_runloop" in Path(f"/proc/self/task/{task}/comm").read_text()
    return found


def check_a_closed_group_lets_go(transport: str) -> None:
    before = gloo_threads()
    below = dist.new_group([0, 1])
    group = Group.open(below, transport=transport)
    ops.all_reduce(torch.ones(5), group=group)
    assert group.process_group is below
    assert gloo_threads() > before, "a process group brings threads"
    dist.barrier()  # nobody leaves while the other still sums
    group.close()
    dist.destroy_process_group(below)
    del below
    assert gloo_threads() == before
    with pytest.raises(RuntimeError, match=f"group '{group.label}' is closed"):
        _ = group.process_group


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_closed_group_lets_its_process_group_go(transport: str) -> None:
    run_ranks(check_a_closed_group_lets_go, 2, transport)


def test_nothing_of_gloo_is_left_when_a_command_has_ended() -> None:
    program = f"""
    import os, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from tpkernels.comm.torchrun import open_ranks
    from tests.comm.test_launch import gloo_threads
    with open_ranks(30.0, 2, tp=1) as layout:
        import torch._dynamo  # as optimizers do: modules below it take the world's process group as a default argument
        assert gloo_threads() > 0
        assert layout.world.process_group is not None
    assert gloo_threads() == 0
    """
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | world,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr

"""The main function of a rank process: joins the process group, then calls functions from a pipe until it closes."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import signal
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


def serve(pipe: Connection, rank: int, world_size: int, folder: str, backend: str) -> None:
    """Run as rank `rank`: answer every (function, arguments) with (True, value) or (False, traceback).

    Args:
        pipe: to the process that started this one.
        rank: of this process.
        world_size: how many ranks share the folder.
        folder: holds the rendezvous, and the stack of this rank at the last SIGUSR1 (stack-<rank>).
        backend: of the process group; one with NCCL gives the rank the GPU of its number.
    """
    die_with_parent()  # the fork server ends with the test run
    stack = open(os.path.join(folder, f"stack-{rank}"), "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
    _join_process_group(rank, world_size, folder, backend)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            message = pipe.recv_bytes()
            pipe.send_bytes(_answer(message))


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _join_process_group(rank: int, world_size: int, folder: str, backend: str) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(GLOO_SOCKET_IFNAME="lo", TORCHINDUCTOR_COMPILE_THREADS="1")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    url = f"file://{os.path.join(folder, 'rendezvous')}"
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, url, timedelta(seconds=120), world_size, rank)


def _answer(message: bytes) -> bytes:
    import torch

    try:
        fn, args = pickle.loads(message)
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        return pickle.dumps((True, fn(*args)))
    except BaseException:  # whatever it is, the test must see it
        return pickle.dumps((False, traceback.format_exc()))

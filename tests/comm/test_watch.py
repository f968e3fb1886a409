"""Which ranks a watch names when a process of this host has ended: what its rank said, then what can be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch.distributed as dist

from tests.harness.ops import raised
from tpkernels.comm.watch import Watch
from tpkernels.errors import PeerLostError
from tpkernels.testing import run_ranks

RANK, ENDED, REMOTE = 3, 2, [0, 1]
FAILED = ["failed", 7, REMOTE, True]  # the message of a rank that waited for those of the other host


class Silent(dist.Store):
    """A store whose host no longer answers."""

    def check(self, keys: Any) -> bool:
        return threading.Event().wait()

    def set(self, key: Any, value: Any) -> None:
        threading.Event().wait()


def watch_over(store: dist.Store, remote: bool = False) -> Watch:
    """That of rank 3 of 4, of which two are on another host and one has ended; remote: all are on other hosts."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the back end "fake")

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=store, rank=RANK, world_size=4)
    assert dist.group.WORLD is not None
    return Watch(dist.group.WORLD, "g", 3.0, [None, None, None if remote else ended.pid, os.getpid()])


def check_a_message_before_its_end() -> None:
    watch = watch_over(dist.HashStore())
    for late in (False, True):
        text = raised(lambda late=late: watch.look(7, late, late, "gloo"), PeerLostError)
        assert text.startswith(f"ranks [{ENDED}] died"), text
    watch.store.set(f"g/{ENDED}", json.dumps(FAILED))
    for late in (False, True):
        text = raised(lambda late=late: watch.look(7, late, late, "gloo"), TimeoutError)
        assert text == f"rank {ENDED} gave up at call 7, because ranks {REMOTE} did not come", text
    watch.store.set(f"g/{ENDED}", json.dumps(["closed", 7, [], False]))
    assert f"ranks [{ENDED}] died" in raised(lambda: watch.look(7, False, False, "gloo"), PeerLostError)


def check_a_store_behind_a_cut_link() -> None:
    store = Silent()  # its Python half is not kept by torch
    watch = watch_over(store)
    assert f"ranks [{ENDED}] died" in raised(lambda: watch.look(7, False, False, "gloo"), PeerLostError)
    assert f"ranks {REMOTE} did not come" in raised(lambda: watch.look(7, True, True, "gloo"), TimeoutError)
    assert f"ranks {REMOTE} were lost" in raised(lambda: watch.look(7, False, True, "gloo"), PeerLostError)


def check_a_connection_that_ended_when_its_rank_gave_up() -> None:
    for late in (False, True):
        watch = watch_over(dist.HashStore(), remote=True)
        watch.store.set("g/0", json.dumps(["failed", 7, [], late]))  # it has not found out which ones
        how, kind = ("did not come", TimeoutError) if late else ("were lost", PeerLostError)
        assert f"ranks [1, 2] {how}" in raised(lambda watch=watch: watch.look(7, False, True, "it ended"), kind)


CHECKS = [
    check_a_message_before_its_end,
    check_a_store_behind_a_cut_link,
    check_a_connection_that_ended_when_its_rank_gave_up,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_ranks_at_fault_are_named_not_those_that_gave_up(check: Any) -> None:
    run_ranks(check, 1, fresh=True)

"""Saving beside the training: one thread, which talks to the other ranks' threads over process groups of its own.

Collectives of two threads on one process group would meet in another order on each rank, so the thread gets its own,
made once for each pair of groups and kept.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import torch.distributed as dist

from tpkernels.checkpoint.ranks import Place, Talk
from tpkernels.comm.group import Group
from tpkernels.comm.objects import Ranks, private_process_group
from tpkernels.errors import CheckpointError, UnequalGroupsError

_talks: dict[int, tuple[dist.ProcessGroup, Talk]] = {}  # by id; the group is kept, so that no other gets its id
atexit.register(_talks.clear)  # no process group is to be left when Python ends; see Group.close
_pending: dict[int, SaveHandle] = {}  # by rank: ranks may be threads of one process


class SaveHandle:
    """A save that is under way."""

    def __init__(self, work: Callable[[], Path]) -> None:
        self._work = work
        self._folder: Path | None = None
        self._error: BaseException | None = None
        self.told = False
        self._begin: Queue[bool] = Queue()
        # Not a daemon: a program that ends waits until the checkpoint is written.
        self._thread = threading.Thread(target=self._run, name="tpkernels-save")
        self._thread.start()

    def begin(self, do: bool) -> None:
        """Let the thread go on: to write, or, where another rank has none, to end at once."""
        self._begin.put(do)

    def done(self) -> bool:
        """Whether it has come to its end, good or bad."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the checkpoint is on the disk and complete; its folder. All ranks may call it, in any order.

        Raises:
            CheckpointError, PeerLostError: what `checkpoint.save` would have raised, on every rank.
        """
        self._thread.join()
        self.told = True
        if self._error is not None:
            raise self._error
        assert self._folder is not None, "a save that ended without an error has a folder"
        return self._folder

    def _run(self) -> None:
        try:
            if self._begin.get():
                self._folder = self._work()
        except BaseException as error:  # for wait, whatever it is
            self._error = error


def start(write: Callable[[Place], Path], place: Place, final: Path) -> SaveHandle:
    """Begin to write in a thread; collective.

    Raises:
        CheckpointError: on all ranks, when some cannot have process groups for the thread.
    """
    with place.together(f"save {final}"):
        talk = _talk(place.group)
    with place.together(f"save {final}"):
        dp_talk = _talk(place.dp_group) if place.dp_group is not None else None
    apart = Place(talk, dp_talk)
    handle: SaveHandle | None = None
    try:
        with place.together(f"save {final}"):
            handle = SaveHandle(lambda: write(apart))
    except BaseException:
        if handle is not None:
            handle.begin(False)
        raise
    assert handle is not None, "a rank without a thread has raised"
    _pending[place.number] = handle
    handle.begin(True)
    return handle


def wait_for_pending(place: Place) -> None:
    """Wait for the save that is under way, if there is one. Collective.

    Raises:
        CheckpointError, PeerLostError: it failed, and some rank has not been told yet.
    """
    with place.together(""):
        handle = _pending.pop(place.number, None)
        if handle is not None and not handle.told:
            handle.wait()


def _talk(group: Group | Ranks) -> Talk:
    """A process group over the same ranks, for the thread; collective when it is asked for the first time."""
    pg = group.process_group
    if pg is None or group.world_size == 1:
        return Talk(group.label, group.rank, group.world_size, None)
    if id(pg) not in _talks:
        try:
            own = private_process_group(group, "saving thread", "save_async", "gloo")
        except UnequalGroupsError as error:
            raise CheckpointError(f"{error}, or take `save`") from None
        _talks[id(pg)] = (pg, Talk(group.label, group.rank, group.world_size, own))
    return _talks[id(pg)][1]

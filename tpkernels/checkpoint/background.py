"""Saving beside the training: one thread, over process groups of its own.

Collectives of two threads on one process group would meet in another order on each rank, so the thread gets process
groups of its own, made once for each process group and kept.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import torch.distributed as dist

from tpkernels.checkpoint.ranks import CheckpointRanks, ControlGroup
from tpkernels.comm.group import Group
from tpkernels.comm.objects import Ranks, private_process_group
from tpkernels.errors import CheckpointError, UnequalGroupsError


class SaveHandle:
    """A save that runs beside the training."""

    def __init__(self, work: Callable[[], Path]) -> None:
        self._work = work
        self._folder: Path | None = None
        self._error: BaseException | None = None
        self.waited_for = False
        self._begin: Queue[bool] = Queue()
        # Not a daemon: a program that ends waits until the checkpoint is written.
        self._thread = threading.Thread(target=self._run, name="tpkernels-save")
        self._thread.start()

    def begin(self, do: bool) -> None:
        """Start the work of the thread; False ends the thread without it, where another rank has no thread."""
        self._begin.put(do)

    def done(self) -> bool:
        """Whether it has ended, with a checkpoint or an error."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the checkpoint is on the disk and complete. All ranks may call it, in any order.

        Returns:
            its folder.

        Raises:
            CheckpointError, PeerLostError: as `checkpoint.save`, on every rank.
        """
        self._thread.join()
        self.waited_for = True
        if self._error is not None:
            raise self._error
        assert self._folder is not None, "a save that ended without an error has a folder"
        return self._folder

    def _run(self) -> None:
        try:
            if self._begin.get():
                self._folder = self._work()
        except BaseException as error:  # re-raised by wait
            self._error = error


class Saver:
    """The saves of this process beside its training: one at a time, each waits for the one before."""

    def __init__(self) -> None:
        self._pending: SaveHandle | None = None
        self._made: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
        atexit.register(self._made.clear)  # no process group may be left when Python ends; see Group.close

    def start(self, write: Callable[[CheckpointRanks], Path], ranks: CheckpointRanks, final: Path) -> SaveHandle:
        """Start a save in a thread; collective.

        Args:
            write: writes the checkpoint, with the ranks over process groups of the thread's own; its folder.
            ranks: of the checkpoint.
            final: its folder, for messages.

        Raises:
            CheckpointError: on all ranks, when some cannot have process groups for the thread.
        """
        doing = f"save {final}"
        with ranks.together(doing):
            control = self._control_group(ranks.group)
        with ranks.together(doing):
            dp_control = self._control_group(ranks.dp_group) if ranks.dp_group is not None else None
        with ranks.together(doing):
            pp_control = self._control_group(ranks.pp_group) if ranks.pp_group is not None else None
        apart = CheckpointRanks(control, dp_control, pp_control)
        handle: SaveHandle | None = None
        try:
            with ranks.together(doing):
                handle = SaveHandle(lambda: write(apart))
        except BaseException:
            if handle is not None:
                handle.begin(False)
            raise
        assert handle is not None, "a rank without a thread has raised"
        self._pending = handle
        handle.begin(True)
        return handle

    def wait(self, ranks: CheckpointRanks) -> None:
        """Wait for the save that is running, if there is one. Collective.

        Raises:
            CheckpointError, PeerLostError: it failed, and `wait` of its handle was not called on some rank.
        """
        with ranks.together(""):
            handle, self._pending = self._pending, None
            if handle is not None and not handle.waited_for:
                handle.wait()

    def _control_group(self, group: Group | Ranks) -> ControlGroup:
        """The same ranks over a process group of the thread's own; collective when there is none yet."""
        given = group.process_group
        if given is None or group.world_size == 1:
            return ControlGroup(group.label, group.rank, group.world_size, None)
        if given not in self._made:
            try:
                self._made[given] = private_process_group(group, "saving thread", "save_async", "gloo")
            except UnequalGroupsError as error:
                raise CheckpointError(f"{error}, or take `save`") from None
        return ControlGroup(group.label, group.rank, group.world_size, self._made[given])


saver = Saver()

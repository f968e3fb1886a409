"""The hidden folders in which checkpoints are written and removed, beside those of other jobs in the same folder.

    .saving-NAME.BOOTRAND     an unfinished save, reshard or export of NAME
    .removing-RAND            a folder that is being removed

The process that writes a `.saving-` folder holds a lock on it (flock), which ends with the process. The next save in
the same parent removes those without a lock that were made since this machine was started (BOOT is the start of the
kernel's boot id), because over a network locks may hold on one machine only. It removes others once a save of the same
NAME is complete: no process can finish them then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from functools import cache
from pathlib import Path
from typing import Self

from tpkernels.checkpoint.files import sync_folder
from tpkernels.errors import CheckpointError

SAVING, REMOVING = ".saving-", ".removing-"
NO_LOCK = "nolocks."  # instead of a boot, on a file system without locks: never removed as dead


class StagingFolder:
    """The hidden folder that becomes `final` in one step when it is complete. One process makes it, many write there.

    Raises:
        CheckpointError: `final` exists.
    """

    def __init__(self, final: Path) -> None:
        refuse_existing(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(final.parent)
        self.final = final
        self.path, self._lock = _locked_folder(final)

    def publish(self) -> None:
        """Rename the folder, whose files are on the disk, to its final name.

        Raises:
            CheckpointError: another save took the name meanwhile; that one is whole.
        """
        sync_folder(self.path)
        try:
            self.path.rename(self.final)
        except OSError:
            refuse_existing(self.final)
            raise
        sync_folder(self.final.parent)
        _remove_left_overs(self.final.parent, self.final.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # a published folder has another name
        if self._lock is not None:
            os.close(self._lock)


def refuse_existing(final: Path) -> None:
    """Raise CheckpointError when there is something of this name."""
    if final.exists():
        raise CheckpointError("it exists already: remove it or save under another name")


def refuse_later(parent: Path, prefix: str, step: int) -> None:
    """Refuse a folder in which a run that continues at `step` would meet checkpoints of later steps.

    Args:
        parent: of the checkpoints.
        prefix: of their names, before the step.
        step: of the run.

    Raises:
        CheckpointError: there is a checkpoint of a later step.
    """
    for path in sorted(parent.glob(f"{prefix}[0-9]*")):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and int(number) > step:
            raise CheckpointError(
                f"{path} exists already, and a run that is at step {step} would have to save there: resume from it, "
                f"remove it, or name another folder"
            )


def remove(folder: Path) -> None:
    """Remove a folder: renamed first, so that no reader finds half of it, also when this process is killed."""
    hidden = folder.with_name(f"{REMOVING}{secrets.token_hex(8)}")
    try:
        folder.rename(hidden)
    except FileNotFoundError:
        return  # another process removed it
    shutil.rmtree(hidden, ignore_errors=True)  # the next save removes the rest


def _locked_folder(final: Path) -> tuple[Path, int | None]:
    """A new hidden folder for `final`, and the lock on it (None where the file system has no locks)."""
    while True:
        path = final.with_name(f"{SAVING}{final.name}.{_boot()}{secrets.token_hex(4)}")
        path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another save removed it, which has no lock yet
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            return path.rename(final.with_name(f"{SAVING}{final.name}.{NO_LOCK}{secrets.token_hex(4)}")), None
        if path.exists():
            return path, handle
        os.close(handle)  # it was removed before it was locked


def _remove_left_overs(parent: Path, published: str = "") -> None:
    """Remove the folders of dead processes, and those of other saves of `published`."""
    for left in parent.glob(f"{REMOVING}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in parent.glob(f"{SAVING}*"):
        name = left.name.removeprefix(SAVING)
        replaced = published in (name, name[:-17]) and published != ""  # without the random part, as it once was
        if replaced or name[-16:-8] == _boot() != NO_LOCK:
            _remove_unless_locked(left, replaced)


def _remove_unless_locked(folder: Path, without_locks: bool) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(folder)
    except BlockingIOError:
        return  # the process that writes it lives
    except OSError as error:
        if without_locks and error.errno != errno.ENOENT:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


@cache
def _boot() -> str:
    """Identifies this machine since it was started; 8 letters."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return NO_LOCK

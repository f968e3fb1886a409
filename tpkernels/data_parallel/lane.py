"""A lane: collectives in a fixed order beside the training thread, over a communicator of their own.

On the CPU it is a communication thread; the ops release Python while they compute and wait. On a GPU it is a stream
beside the current one, ordered by events, and needs no thread.
"""

from __future__ import annotations

import atexit
import hashlib
import queue
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.futures import Future

from tpkernels.comm.group import Group
from tpkernels.comm.objects import private_process_group

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]"]
_Last = Callable[[BaseException | None], None]  # called with the failure of the lane, if it has one

NO_COPY = (
    "an aggregator of gradients (GradAggregator, comm_hook) belongs to this process and can be neither copied nor "
    "pickled: copy or save the model itself (of DistributedDataParallel: its .module)"
)
GRACE_S = 5.0  # beyond the group's timeout, for a thread that waits for a lost rank

# Process groups of closed lanes, for the next one. They are not destroyed: torch gives a new group of the same ranks
# the name of the old one, whose addresses are still in the store, and some of the ranks could wait for them for ever.
_idle: list[dist.ProcessGroup] = []
_open_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


class Lane:
    """Runs jobs one after the other beside the caller. Every rank must submit the same jobs in the same order.

    A lane to which no reference is left closes by itself, when the jobs that were submitted have ended.

    Attributes:
        group: the lane's own group, over the ranks of the given one: only jobs call ops on it.
    """

    _dropped: weakref.finalize[Any, Lane]

    def __init__(self, group: Group) -> None:
        """Open the lane; a collective over `group`, which stays free for others.

        Args:
            group: the ranks; the lane has the same kind of transport.

        Raises:
            RuntimeError: the ranks cannot open a process group of their own (says why).
        """
        self.group, self._process_group = _private_group(group)
        self._failure: BaseException | None = None
        self._closed = False
        _open_lanes.add(self)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run job() after all jobs before it.

        Returns:
            a future: its wait() gives the result of the job, or raises its error.

        Raises:
            RuntimeError: the lane is closed.
            TimeoutError, PeerLostError, ...: the error of an earlier job. The lane runs no job after a failure, as
                the ranks no longer agree on the next job.
        """
        self.check()
        return self._submit(job)

    def check(self) -> None:
        """Raise the error of an earlier job, if there was one, or RuntimeError if the lane is closed."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError(f"the communication lane of group {self.group.label!r} is closed")

    def call(self, function: Callable[[], T]) -> T:
        """Call a function that uses the communicator of the lane, such as its counters, between two jobs.

        The communicator returns once the collective that runs has ended; called from the training thread, which holds
        Python meanwhile, it would wait for a job that waits for Python.
        """
        return function()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{NO_COPY}, got one over group {self.group.label!r}")

    def close(self) -> None:
        """Wait for the submitted jobs, the group's timeout at most, and close the group. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        self._dropped.detach()
        self._finish()
        _close_group(self.group, self._process_group, self._failure)
        self._process_group = None

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class _ThreadLane(Lane):
    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._jobs: queue.SimpleQueue[_Job | _Last] = queue.SimpleQueue()
        # The thread must not keep the lane alive. It closes the group of a lane that is dropped, so that no garbage
        # collection waits for other ranks.
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, weakref.ref(self)), name=f"tpkernels-lane-{group.label}", daemon=True
        )
        self._thread.start()
        close = partial(_close_group, self.group, self._process_group)
        self._dropped = weakref.finalize(self, self._jobs.put, close)
        self._dropped.atexit = False

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def call(self, function: Callable[[], T]) -> T:
        if self._failure is not None or self._closed:
            return function()
        return self._submit(function).wait()

    def _finish(self) -> None:
        self._jobs.put(lambda failure: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(self.group.timeout_s + GRACE_S)


def _close_group(group: Group, process_group: dist.ProcessGroup | None, failure: BaseException | None) -> None:
    """Close the group of a lane; the next lane takes its process group, unless ranks may still wait in it."""
    group.close()
    if process_group is not None and failure is None:
        _idle.append(process_group)


def _work(jobs: queue.SimpleQueue[_Job | _Last], lane: weakref.ref[Lane]) -> None:
    """The thread: runs jobs until the last entry, which is no job; after a failure all later jobs fail with it."""
    failure: BaseException | None = None
    with torch.no_grad():
        while isinstance(entry := jobs.get(), tuple):
            job, future = entry
            if failure is None:
                try:
                    value = job()
                except BaseException as error:  # re-raised in the thread that waits on the future
                    failure = error
                    if (owner := lane()) is not None:
                        owner._failure = error
                    del owner
                else:
                    future.set_result(value)
            if failure is not None:
                future.set_exception(failure)
            del entry, job, future
            value = None
    entry(failure)


class _StreamLane(Lane):
    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._stream = torch.cuda.Stream(group.device)  # type: ignore[no-untyped-call]
        self._dropped = weakref.finalize(self, _close_stream_lane, self._stream, self.group, self._process_group)
        self._dropped.atexit = False

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future(devices=[self.group.device])
        self._stream.wait_stream(torch.cuda.current_stream(self.group.device))
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                future.set_result(job())  # remembers the stream: wait() lets the current one wait for it
        except BaseException as error:
            self._failure = error
            raise
        return future

    def _finish(self) -> None:
        self._stream.synchronize()


def _close_stream_lane(stream: torch.cuda.Stream, group: Group, process_group: dist.ProcessGroup | None) -> None:
    stream.synchronize()
    _close_group(group, process_group, None)


def open_lane(group: Group) -> Lane:
    """Open a lane over the ranks of a group; every rank calls this. See Lane."""
    return _ThreadLane(group) if group.is_cpu else _StreamLane(group)


def _private_group(group: Group) -> tuple[Group, dist.ProcessGroup | None]:
    """A second group of the same ranks, and the process group made for it, if one had to be."""
    given = group.process_group
    if given is None or group.transport != "group":
        # The process group is needed only to open it: no message goes through it.
        transport = "auto" if group.transport == "local" else group.transport
        return Group.open(given, group.timeout_s, transport=transport, device=group.device), None
    backend = dist.get_backend_config(given)
    private = _take_idle(group, dist.get_process_group_ranks(given), backend)
    if private is None:
        private = private_process_group(group, "lane", "GradAggregator, comm_hook", backend)
    return Group.open(private, group.timeout_s, transport="group", device=group.device), private


def _take_idle(group: Group, ranks: list[int], backend: str) -> dist.ProcessGroup | None:
    """The process group of a closed lane, if all ranks have the same one left, else None."""
    known = dist.distributed_c10d._world.pg_map
    _idle[:] = [pg for pg in _idle if pg in known]  # torch.distributed may have been started anew
    fit = [p for p in _idle if (dist.get_process_group_ranks(p), dist.get_backend_config(p)) == (ranks, backend)]
    first = min(fit, key=lambda pg: pg.group_name, default=None)
    digest = 0 if first is None else 1 + int.from_bytes(hashlib.sha256(first.group_name.encode()).digest()[:6], "big")
    if len(set(group.all_gather_ints(digest))) > 1 or first is None:
        return None
    _idle.remove(first)
    return first


@atexit.register
def _close_all() -> None:
    """Close the lanes before the groups close and Python ends, with threads that still wait for other ranks."""
    for lane in list(_open_lanes):
        try:
            lane.close()
        except Exception:  # atexit: errors are ignored
            continue
    _idle.clear()

"""The exchanges of the ranks that open a group: through the store of their process group, with a deadline.

Not through the backend: its collectives wait for the process group's time-out (half an hour by default), name the
socket that was silent and not the rank, and cannot be cancelled.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from tpkernels._build import build_info
from tpkernels._native import _C
from tpkernels.comm.asking import Asking
from tpkernels.comm.process_groups import store_of
from tpkernels.comm.watch import is_dead
from tpkernels.errors import PeerLostError

_SLICE_S = 0.2  # between two checks of the other ranks
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02  # between two reads of the store
_MESSAGE_S = 1.0  # for what is only part of a message
_COMPLETE = b"complete"
T = TypeVar("T")


@dataclass(frozen=True)
class Build:
    """The versions that a rank runs. All but torch must be the same on all ranks."""

    tpkernels: str
    commit: str | None
    limits: dict[str, int]  # of messages and arenas; "arena_layout" counts their changes
    torch: str

    @classmethod
    def here(cls) -> Build:
        """That of this process."""
        found = build_info()
        return cls(found.version, found.commit, dict(_C.limits()), torch.__version__)

    def __str__(self) -> str:
        return f"{self.tpkernels} (commit {self.commit}, arena layout {self.limits.get('arena_layout')})"


def check_builds(builds: Sequence[Build]) -> str | None:
    """Refuse ranks whose messages and arenas differ.

    Returns:
        a warning where they run different torches, else None. That is no error: no bytes of torch are sent, and ranks
        on different CPUs round differently, too; but what every rank computes for itself may then drift apart.

    Raises:
        RuntimeError: they run different tpkernels, on every rank; names the ranks and what they run.
    """
    for r, other in enumerate(builds):
        if (other.tpkernels, other.commit, other.limits) != (builds[0].tpkernels, builds[0].commit, builds[0].limits):
            raise RuntimeError(
                f"Group.open: the ranks run different builds of tpkernels: rank 0 has {builds[0]}, rank {r} has "
                f"{other}. Install the same build for all of them"
            )
    for r, other in enumerate(builds):
        if other.torch != builds[0].torch:
            return (
                f"rank 0 runs torch {builds[0].torch}, rank {r} {other.torch}: what each rank computes for itself, "
                f"such as a replicated norm, may round differently and drift apart"
            )
    return None


class Bootstrap:
    """The ranks of a process group, all in the same Group.open.

    Its rounds are numbered, so that a round that some ranks gave up disturbs no later one.

    Args:
        process_group: the ranks. All of them call the same methods in the same order.
        label: the name of the group in messages.
        timeout_s: seconds that a wait for the others may take.
    """

    _next: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, int]] = weakref.WeakKeyDictionary()  # round

    def __init__(self, process_group: dist.ProcessGroup, label: str, timeout_s: float) -> None:
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self._process_group, self._label, self._timeout_s = process_group, label, timeout_s
        self._store, self._asking = store_of(process_group), Asking()
        self._number = self._step = 0
        self._pids: Sequence[int | None] = [None] * self.world_size

    def begin(self, mine: Any) -> tuple[list[Any], str | None]:
        """Wait for all ranks and gather one value of each.

        Args:
            mine: this rank's value.

        Returns:
            the values in rank order, and a warning about their builds, or None (see `check_builds`).

        Raises:
            TimeoutError: ranks did not come; the same ranks are named on all that did.
            RuntimeError: the ranks run different builds of tpkernels.
        """
        message = json.dumps(asdict(Build.here())).encode() + b"\n" + pickle.dumps(mine)
        with self._announced():
            messages = self._first_round(message) if self._store is not None else self._through_the_backend(message)
        pairs = [message.split(b"\n", 1) for message in messages]
        # Before anything is unpickled: this build need not have the classes that another one pickles.
        warning = check_builds([Build(**json.loads(build)) for build, _ in pairs])
        return [pickle.loads(value) for _, value in pairs], warning

    def watch(self, pids: Sequence[int | None]) -> None:
        """Notice from now on when one of these processes ends.

        Args:
            pids: of every rank in rank order, None for those of other hosts.
        """
        self._pids = list(pids)

    def gather(self, mine: Any, longer_s: float = 0.0) -> list[Any]:
        """Gather one value of every rank, in rank order.

        Args:
            mine: this rank's value.
            longer_s: seconds that another rank may be busy longer than this one before it calls this.

        Raises:
            TimeoutError, PeerLostError: a rank is late, or died; names it.
        """
        if self._store is None:
            return self._through_the_backend(mine)
        self._step += 1
        keys = self._keys(self._step)
        self._set(keys[self.rank], pickle.dumps(mine))
        deadline = time.monotonic() + self._timeout_s + longer_s
        while not self._wait(keys):
            missing = self._missing(keys)
            if dead := [r for r in missing if (pid := self._pids[r]) is not None and is_dead(pid)]:
                raise PeerLostError(f"Group.open({self._label!r}): {_ranks(dead)} died while the group was opened")
            if missing and time.monotonic() >= deadline:
                raise TimeoutError(
                    f"Group.open({self._label!r}): {_ranks(missing)} came, and then did nothing for "
                    f"{self._timeout_s:g} s"
                )
        return [pickle.loads(self._get(key)) for key in keys]

    def first_obstacle(self, mine: str | None, longer_s: float = 0.0) -> str | None:
        """The obstacle of the first rank that has one, on every rank."""
        return next((obstacle for obstacle in self.gather(mine, longer_s) if obstacle is not None), None)

    def post_obstacle(self, obstacle: str) -> None:
        """Put an obstacle into the store, for ranks that wait for something else: see `posted_obstacle`."""
        if self._store is not None:
            self._set(f"{self._prefix}/obstacle", obstacle.encode())

    def posted_obstacle(self) -> str | None:
        """The obstacle that a rank has posted since `begin`, None when none has."""
        key = f"{self._prefix}/obstacle"
        if self._store is None:
            return None
        store = self._store
        return self._ask(lambda: store.get(key).decode() if store.check([key]) else None)

    def _through_the_backend(self, mine: Any) -> list[Any]:
        """The same where there is no store (MPI), and so no deadline but that of the backend."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine, group=self._process_group)
        return everyone

    # --- `begin`: one numbered round after another, each of which all ranks complete or give up

    def _first_round(self, mine: bytes) -> list[bytes]:
        deadline = time.monotonic() + self._timeout_s
        self._number = self._next.get(self._process_group, 1)
        before = None
        while (verdict := self._verdict()) or self._has_been_here():
            before = verdict if verdict and verdict != _COMPLETE else before
            self._number += 1
        self._next[self._process_group] = self._number + 1
        keys = self._keys(0)
        self._set(keys[self.rank], mine)
        verdict = self._verdict_when(keys, deadline)
        if verdict != _COMPLETE:
            raise TimeoutError(self._absence(verdict, before))
        return [self._get(key) for key in keys]

    def _verdict_when(self, keys: list[str], deadline: float) -> bytes:
        """The verdict of the round, once all keys are there or the deadline has passed."""
        missing: list[int] = []
        elsewhere: list[tuple[int, str]] = []
        try:
            while not self._wait(keys):
                if verdict := self._verdict():
                    return verdict
                missing = self._missing(keys)
                elsewhere = self._elsewhere(missing)
                if missing and time.monotonic() >= deadline:
                    return self._decide(json.dumps([self.rank, missing, elsewhere]).encode())
            return self._decide(_COMPLETE)
        except (PeerLostError, TimeoutError) as error:
            known = f". Until then {_ranks(missing)} had not come{_where(elsewhere)}" if missing else ""
            raise type(error)(f"{error}{known}") from None

    def _has_been_here(self) -> bool:
        """Whether this rank took part in this round over another process group of the same name and store."""
        return bool(self._ask(lambda: self._store.check([self._keys(0)[self.rank]])))

    def _absence(self, verdict: bytes, before: bytes | None) -> str:
        by, missing, elsewhere = json.loads(verdict)
        came = [r for r in range(self.world_size) if r not in missing]
        text = (
            f"Group.open({self._label!r}): {_ranks(missing)} did not come within {self._timeout_s:g} s, {_ranks(came)} "
            f"did{'' if by == self.rank else f' (rank {by} gave up first)'}. Every rank must open the same groups in "
            f"the same order"
        )
        text += _where(elsewhere)
        if before is not None:
            by, missing, _ = json.loads(before)
            text += f"; rank {by} gave up earlier, because {_ranks(missing)} had not come"
        return f"{text}. If they are only slow, raise Group.open(timeout_s=...)."

    def _verdict(self) -> bytes | None:
        key = f"{self._prefix}/verdict"
        return self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)

    def _decide(self, verdict: bytes) -> bytes:
        """Of all verdicts of a round the first one counts."""
        first: bytes = self._ask(lambda: self._store.compare_set(f"{self._prefix}/verdict", "", verdict.decode()))
        return first

    # --- which group a rank is opening, for the messages of ranks that wait for it in another one

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        self._announce(self._label)
        yield
        self._announce("")  # not after an error: ranks that wait for this one elsewhere still read it

    def _announce(self, label: str) -> None:
        with contextlib.suppress(Exception):  # for messages only; without a default group there is no key
            key = f"tpkernels/opening/{dist.get_rank()}"
            self._asking(lambda: dist.distributed_c10d._get_default_store().set(key, label), _MESSAGE_S)

    def _elsewhere(self, missing: Sequence[int]) -> list[tuple[int, str]]:
        """Which groups these ranks are opening."""
        found = []

        def read() -> None:
            store = dist.distributed_c10d._get_default_store()
            for r in missing:
                key = f"tpkernels/opening/{dist.get_global_rank(self._process_group, r)}"
                label = store.get(key).decode() if store.check([key]) else ""
                if label:
                    found.append((r, label))

        with contextlib.suppress(Exception):
            self._asking(read, _MESSAGE_S)
        return list(found)

    # --- the store

    @property
    def _prefix(self) -> str:
        return f"tpkernels/open/{self._number}"

    def _keys(self, step: int) -> list[str]:
        return [f"{self._prefix}/{step}/{r}" for r in range(self.world_size)]

    def _set(self, key: str, value: bytes) -> None:
        self._ask(lambda: self._store.set(key, value))  # type: ignore[arg-type]  # bytes are missing in the stub

    def _get(self, key: str) -> bytes:
        return bytes(self._ask(lambda: self._store.get(key)))

    def _wait(self, keys: list[str]) -> bool:
        """Whether all keys are there within a slice of time. Polls, because torch logs a wait that fails."""
        until = time.monotonic() + _SLICE_S

        def poll() -> bool:
            pause_s = _SHORTEST_PAUSE_S
            while not self._store.check(keys):
                if time.monotonic() >= until:
                    return False
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            return True

        return self._ask(poll)

    def _missing(self, keys: list[str]) -> list[int]:
        return self._ask(lambda: [r for r, key in enumerate(keys) if not self._store.check([key])])

    def _ask(self, access: Callable[[], T]) -> T:
        """Access the store.

        Raises:
            TimeoutError: it did not answer within the timeout of the group.
            PeerLostError: it is gone.
        """
        who = f"Group.open({self._label!r}), rank {self.rank} of {self.world_size}"
        keeper = "the rank that keeps it (rank 0 as a rule)"
        try:
            return self._asking(access, self._timeout_s + _SLICE_S)
        except TimeoutError:
            raise TimeoutError(
                f"{who}: the store of the process group did not answer within {self._timeout_s:g} s: {keeper} is "
                f"stopped, or the link to its host is cut"
            ) from None
        except RuntimeError as error:
            raise PeerLostError(
                f"{who}: the store of the process group does not answer; {keeper} may have ended: "
                f"{str(error).strip().splitlines()[0]}"
            ) from None


def _where(elsewhere: Sequence[tuple[int, str]]) -> str:
    return "".join(f"; rank {r} was seen opening {where!r}" for r, where in elsewhere)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"

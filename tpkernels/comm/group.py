"""Group: the ranks that work together, opened over a process group or a dimension of a DeviceMesh."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh

from tpkernels.comm.devices import device_of
from tpkernels.comm.explain import Explanation, explain
from tpkernels.comm.one_shot import Team, measure_one_shot
from tpkernels.comm.open import TIMEOUT_S, open_communicator
from tpkernels.comm.process_groups import DESTROYED, check_usable, process_group_of, when_destroyed
from tpkernels.comm.profile import Product, measure

# Strong: a graph before its backward has only the name of its group.
_open_groups: dict[str, Group] = {}
_default: Group | None = None
_CPU = torch.device("cpu")
_of_the_parent: list[Group] = []  # in a forked child


class Group:
    """The ranks that work together in collective and fused ops.

    Made by `Group.open`, which every rank of the process group calls. Ops take the group as an argument and carry its
    name. It stays open, whether or not anything refers to it, until `close` or the end of the process.

    Attributes:
        name: key under which ops find the communicator; the same on all ranks.
        label: the name of the group in messages.
        rank: this process's place in the group.
        world_size: how many ranks.
        device: of the tensors of its ops: torch.device("cpu"), or this rank's GPU. is_cpu: which of the two.
        transport: how bytes are moved: "shm" (CPU, one host, shared memory), "peer" (CUDA, one host, the GPUs read each
            other's memory), "hierarchical" (CPU, several hosts: shared memory inside them, connections between them),
            "group" (any c10d backend), "local" (one rank).
        timeout_s: seconds that a rank waits for another before it raises TimeoutError.
    """

    def __init__(
        self,
        communicator: Any,
        process_group: dist.ProcessGroup | None,
        timeout_s: float,
        reason: str,
        device: torch.device = _CPU,
        profile: Path | None = None,
    ) -> None:
        self.name: str = communicator.name
        self.label: str = communicator.label
        self.rank: int = communicator.rank
        self.world_size: int = communicator.world_size
        self.transport: str = communicator.transport
        self.device = device
        self.is_cpu = device.type == "cpu"
        self.timeout_s = timeout_s
        self._process_group = process_group
        self._closed = False
        self._communicator = communicator
        self._device_type = device.type  # of autocast: the property makes a string of it at each call
        self._address: int = communicator.address  # for the fast path of ops/_op.py; 0: there is none
        self._reason = reason
        self._profile = "" if profile is None else str(profile)
        _open_groups[self.name] = self
        self._forget_end = (lambda: None) if process_group is None else _close_with(process_group, self.name)

    @classmethod
    def open(
        cls,
        process_group_or_mesh_dim: dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None = None,
        timeout_s: float | None = None,
        arena_bytes: int | None = None,
        *,
        transport: str = "auto",
        device: torch.device | str | None = None,
        multicast: bool = False,
    ) -> Group:
        """Open a group; every rank of it must call this, in the same order relative to other groups.

        Args:
            process_group_or_mesh_dim: a c10d group, a one-dimensional DeviceMesh, or (mesh, dimension). None means all
                ranks of the default process group, or a group of one when torch.distributed is not initialised.
            timeout_s: seconds that any wait may take, that for the other ranks here included; the same on all ranks.
                math.inf: as long as no rank is lost. Default 30 on the CPU, 600 on GPUs: there a kernel that gives up
                ends the CUDA context of its process, and a rank that compiles or saves may be minutes late.
            arena_bytes: memory for each rank that the others reach (transports "shm" and "peer"): two slots for
                messages, the rest for `group.empty`. Default 16 MiB on the CPU, or what /dev/shm has room for if that
                is less, down to 1 MiB; 256 MiB on a GPU.
            transport: "auto", "shm", "hierarchical", "peer" or "group". auto takes shared memory ("shm" on the CPU,
                "peer" on GPUs) when all ranks run on one host and can, and "hierarchical" on the CPU when some host of
                several has several ranks; `explain()` says why it did not. Over "hierarchical" sums are taken inside
                the hosts first, so that their bits are not those of other transports.
            device: "cpu", "cuda" (the current GPU) or "cuda:1"; the same kind on all ranks. None means CUDA when the
                process group carries tensors of GPUs by NCCL, else the CPU.
            multicast: let the switch between the GPUs take large sums (NVLink SHARP). All ranks still hold the same
                bits, but the order of such a sum is the switch's, so they are not those of other transports.

        Raises:
            ValueError: arguments that do not fit, or that differ between ranks.
            RuntimeError: a rank cannot use CUDA; says why and what to do. Or the ranks run different builds of
                tpkernels, or this process was forked from the one that made the process group.
            OSError: the shared memory that arena_bytes or transport="shm" ask for cannot be reserved; says what is
                needed and what there is.
            TimeoutError, PeerLostError: ranks did not come within timeout_s, or ended; names them.
        """
        process_group, label = process_group_of(process_group_or_mesh_dim)
        check_usable(process_group, label)
        where = device_of(process_group, device)
        if timeout_s is None:
            timeout_s = TIMEOUT_S[where.type]
        opened = open_communicator(process_group, label, where, timeout_s, arena_bytes, transport, multicast)
        return cls(opened.communicator, process_group, timeout_s, opened.reason, where, opened.profile)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The c10d group underneath, None when there is none.

        Raises:
            RuntimeError: this group is closed, and keeps no process group alive.
        """
        if self._closed:
            raise RuntimeError(f"group {self.label!r} is closed")
        return self._process_group

    def empty(self, shape: Sequence[int] | int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor inside this rank's arena: a collective on it copies nothing in.

        Args:
            shape: its shape.
            dtype: its dtype, the default dtype when None.

        Raises:
            ValueError: it does not fit (says the needed and the present size), or the transport has no arena.
        """
        sizes = [shape] if isinstance(shape, int) else list(shape)
        dtype = dtype or torch.get_default_dtype()
        if is_compiling():  # where a collective in place makes another tensor in any case
            return torch.empty(sizes, dtype=dtype, device=self.device)
        if self.is_cpu:
            made: Tensor = torch.ops.tpkernels.arena_empty(self.name, sizes, dtype)
        else:
            made = torch.ops.tpkernels.device_arena_empty(self.name, sizes, dtype, self.device)
        return made

    def barrier(self) -> None:
        """Return when every rank of the group has called this; on a GPU, when its stream has reached it.

        Raises:
            ValueError: a CUDA graph is being captured, in which nothing can be waited for.
        """
        self._refuse_in_a_capture("barrier", "there is nothing to wait for: what is captured has not run")
        self._communicator.barrier()

    def all_gather_ints(self, mine: int) -> list[int]:
        """All-gather one integer of each rank, such as a size or a digest; in rank order.

        Args:
            mine: this rank's, of 64 bits with sign.

        Raises:
            ValueError: a CUDA graph is being captured, in which nothing can be waited for.
        """
        self._refuse_in_a_capture("all_gather_ints", "pass the size of the whole (dim_size, vocab_size, full_size)")
        return list(self._communicator.exchange(mine))

    def _refuse_in_a_capture(self, what: str, instead: str) -> None:
        if not self.is_cpu and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{what} on group {self.label!r}: the ranks cannot ask each other while a CUDA graph is captured; "
                f"{instead}"
            )

    def check(self) -> None:
        """Raise the errors of calls on the GPU that have returned; waits for their end. Does nothing on the CPU.

        A call on a GPU returns before it has run. A rank that was late or called something else is reported by the
        next call on the group, or here. It waits for no launches of CUDA graphs: synchronise the stream on which the
        graph was launched, then check; where that raises an error of CUDA, check gives the reason.

        Raises:
            TimeoutError, RankMismatchError, PeerLostError: what the call would have raised on the CPU.
            ValueError: a CUDA graph is being captured, in which nothing can be waited for.
        """
        self._refuse_in_a_capture("check", "check when the graph has been launched")
        self._communicator.check()

    def explain(
        self,
        op: str | None = None,
        *,
        M: int = 0,
        N: int = 0,
        K: int = 0,
        numel: int = 0,
        dtype: torch.dtype = torch.float32,
        codec: str = "none",
        bias: bool = False,
        dim: int = 0,
        tune: bool = False,
    ) -> Explanation:
        """The path that a call would take, and the reason.

        Args:
            op: name of a collective or a GEMM; None explains the choice of the transport.
            M, N, K: this rank's sizes of a GEMM: x[M, K], w[N, K].
            numel: values of a collective's tensor.
            dtype: of the tensors.
            codec: of the sum, or of what is gathered.
            bias: whether a GEMM has one; the path is the same.
            dim: the dimension that is scattered or gathered.
            tune: time the GEMM engines of the CPU, or the paths on GPUs, for this shape first; this group and those
                that open later take the fastest. All ranks call it.

        Raises:
            ValueError: no such op, or a dtype or codec that it does not take.
        """
        if op is None:
            return Explanation(self.transport, self._reason, profile=self._profile)
        shape = {"M": M, "N": N, "K": K, "numel": numel, "dim": dim}
        found = explain(self._communicator, self.is_cpu, op, **shape, dtype=dtype, codec=codec, tune=tune)
        return replace(found, profile=self._profile)

    def note_shards(self, even: bool) -> None:
        """Say whether all ranks' shards of a weight have the same size. Parallel linears do so.

        On GPUs the rule takes one kernel for a GEMM and its collective only where all noted shards are even: a rank
        does not see what the others have, and all must choose alike. A caller of the ops that has no parallel linears
        notes its own shards. Where even ones were noted and a call has others, it may raise a RankMismatchError.

        Args:
            even: whether they have; the same on all ranks, in the same order relative to their calls. False stays.
        """
        if hasattr(self._communicator, "note_shards"):
            self._communicator.note_shards(even)

    def measure_engines(
        self, products: Iterable[Product], progress: Callable[[], object] | None = None
    ) -> dict[Product, dict[str, float]]:
        """Time every engine of the CPU for each product, on all ranks at once. Changes no choice of this group.

        Args:
            products: the same on all ranks, which all call this.
            progress: called after each product.

        Returns:
            microseconds by engine, of the slowest rank; the same on all ranks.
        """
        return measure(self._communicator, products, progress=progress)

    def measure_one_shot(self) -> dict[Team, int]:
        """Find up to how many bytes every rank sums a whole message itself (one_shot.py); all ranks call this.

        Returns:
            one entry, that of this group, for Profile.one_shot; none where the ranks do not share memory, or times did
            not repeat. The group itself goes on with the size of the rule.
        """
        nbytes = measure_one_shot(self._communicator) if self.transport == "shm" else None
        return {} if nbytes is None else {Team.of(self._communicator, len(os.sched_getaffinity(0))): nbytes}

    def stats(self) -> dict[str, Any]:
        """Counters since the group was opened, or since reset_stats.

        Returns:
            calls, wire_bytes (sent by this rank; what k ranks read counts k times), seconds (inside collectives,
            waiting included, GEMMs excluded; on a GPU, of the host), wait_seconds, and the same for each op under
            "by_op", and there heap_inputs: calls whose input lay in the arena (CPU), so that it was not copied. What a
            CUDA graph captures counts once, when it is captured; its launches pass no counter.
        """
        by_op: dict[str, dict[str, float]] = self._communicator.stats_by_op()
        keys = ("calls", "wire_bytes", "seconds", "wait_seconds")
        return {key: sum(row[key] for row in by_op.values()) for key in keys} | {"by_op": by_op}

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._communicator.reset_stats()

    def close(self) -> None:
        """Close the group; calls of other ranks that need this one raise PeerLostError. Closing twice does nothing.

        A CUDA graph that has calls of this group must not be launched any more.
        """
        self._close("this rank closed the group")

    def _close(self, why: str) -> None:
        self._forget_end()
        self._communicator.close(why)
        # A process group that still exists when Python ends can end the process by a signal: a thread of gloo frees a
        # tensor, needs Python for it, and is cancelled. Models keep their groups, so the groups release theirs.
        self._closed, self._process_group = True, None
        _open_groups.pop(self.name, None)
        global _default
        if _default is self:
            _default = None

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Group({self.label!r}, rank {self.rank} of {self.world_size}, transport {self.transport!r}, {self.device})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Copies of a layer share its group."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled layer gets the group of the same name, else of the same label, of the process that loads it."""
        return (_restore, (self.name, self.label))


def resolve(group: Group | None) -> Group:
    """The group itself, or for None all ranks of the present default process group, opened once and kept.

    Raises:
        TypeError: it is neither.
    """
    if group is not None:
        if not isinstance(group, Group):
            raise TypeError(f"group must be a tpkernels.Group or None, got {type(group).__name__}")
        return group
    global _default
    if _default is None or _default._process_group is not dist.group.WORLD:
        if _default is not None:
            _default._close(DESTROYED)
        _default = Group.open()
    return _default


def find(*, name: str | None = None, label: str | None = None) -> Group | None:
    """The group that is open in this process under that name, else the first one of that label, else None."""
    if name is not None and name in _open_groups:
        return _open_groups[name]
    return next((group for group in _open_groups.values() if label is not None and group.label == label), None)


def _restore(name: str, label: str) -> Group:
    group = find(name=name, label=label)
    if group is None and label in ("world", "local"):
        return resolve(None)
    if group is None:
        known = sorted({group.label for group in _open_groups.values()})
        raise ValueError(f"group: no group '{label}' is open in this process (open: {known}); open it before loading")
    return group


def _close_with(process_group: dist.ProcessGroup, name: str) -> Callable[[], object]:
    """Close the group of that name when the process group is destroyed.

    Ops over shared memory use no process group, so that they would not notice its end.
    """

    def gone() -> None:
        if (group := _open_groups.get(name)) is not None:
            with contextlib.suppress(Exception):
                group._close(DESTROYED)

    return when_destroyed(process_group, gone)


def _forget_the_parent() -> None:
    """In a forked child: the groups belong to the parent and must not be closed here, so they are kept."""
    global _default
    _default = None
    _of_the_parent.extend(_open_groups.values())
    _open_groups.clear()


os.register_at_fork(after_in_child=_forget_the_parent)


def _close_all() -> None:
    for group in list(_open_groups.values()):
        with contextlib.suppress(Exception):
            group.close()


atexit.register(_close_all)

"""Back end `tpk` for torch.distributed: the collectives of any program on CPU ranks, by this package's communicator.

`import tpkernels` (or this module) registers it. Then `dist.init_process_group("tpk")`, or "cpu:tpk,cuda:nccl", or
`dist.new_group(backend="tpk")` make groups of it.

The back end is C++, in a module compiled for one torch (`_C_c10d`): c10d has no stable ABI. Ranks that share a host use
shared memory, others connections; messages between hosts and sums of sparse tensors go over gloo.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from tpkernels.comm.open import TRANSPORTS, open_for_backend
from tpkernels.comm.process_groups import NewGroup

NAME = "tpk"


@dataclass(frozen=True)
class Options:
    """What `pg_options` of `dist.init_process_group` and `dist.new_group` may be; the same on all ranks.

    Attributes:
        transport: "auto": shared memory where all ranks run on one host and can, "hierarchical" where some host of
            several has several ranks; "shm" and "hierarchical" demand that; "group" means connections.
    """

    transport: str = "auto"


@cache
def _module() -> Any:
    """The compiled module.

    Raises:
        RuntimeError: it was not built, or for another torch; says what to do.
    """
    torch_here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    try:
        module: Any = importlib.import_module("tpkernels._C_c10d")
        if module.torch_version == torch_here:
            return module
        why = "it was built for torch {}.{}".format(*module.torch_version)
    except ImportError as error:
        why = str(error)
    raise RuntimeError(
        f"the back end 'tpk' of tpkernels cannot be loaded in torch {torch.__version__} ({why}): build tpkernels "
        f"again in this environment, or use back end 'gloo'"
    )


def obstacle() -> str | None:
    """Why groups with this back end cannot be made here; None where they can."""
    if not dist.is_available():
        return "this torch has no torch.distributed"
    try:
        _module()
    except RuntimeError as error:
        return str(error)
    return None


def _create(options: Any, wanted: Any) -> Any:
    """The back end of a new process group; every rank of the group calls this."""
    transport = wanted.transport if isinstance(wanted, Options) else "auto"  # "cuda:nccl" beside it has others
    if transport not in TRANSPORTS["cpu"]:
        raise ValueError(
            f"c10d.Options: transport must be {', '.join(map(repr, TRANSPORTS['cpu']))}, got {transport!r}"
        )
    label = options.group_id if dist.is_initialized() else "world"
    group = NewGroup(options.store, options.group_rank, options.group_size, options.group_id, options.timeout)
    return _open(group, label, transport)


def _open(group: NewGroup, label: str, transport: str) -> Any:
    module = _module()
    communicator, is_crowded = open_for_backend(group, label, group.timeout.total_seconds(), transport)
    if communicator.transport not in ("shm", "local"):
        group.gloo  # noqa: B018  # for messages, which two ranks alone exchange: made while all ranks are here

    def split(store: dist.distributed_c10d.Store, rank: int, size: int, name: str, timeout_s: float) -> Any:
        """The back end of some of the ranks."""
        return _open(NewGroup(store, rank, size, name, timedelta(seconds=timeout_s)), name, transport)

    return module.open_backend(communicator, group.store, is_crowded, lambda: group.gloo, split)


@contextlib.contextmanager
def codec(group: dist.ProcessGroup | None, name: str) -> Iterator[None]:
    """Pack what all_reduce and reduce_scatter of the group send, in calls made inside the context.

    Only sums and averages of float32, bfloat16 and float16 are packed. All ranks must enter the context together.

    Args:
        group: of back end tpk; None is the default group.
        name: of a codec of `tpkernels.compress`, or "none".

    Raises:
        ValueError: the group's back end for the CPU is another one, or there is no such codec.
    """
    process_group = group or dist.group.WORLD
    backend = process_group._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    if not isinstance(backend, _module().Backend):
        raise ValueError(f"c10d.codec: the group's back end for the cpu must be 'tpk', got {backend.name()!r}")
    before = backend.set_codec(name)
    try:
        yield
    finally:
        backend.set_codec(before)


if dist.is_available() and not hasattr(dist.Backend, NAME.upper()):
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])

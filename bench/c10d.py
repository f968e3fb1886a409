"""The back end `tpk` of torch.distributed against gloo, in the same processes: `python -m bench.c10d`.

The default group of the ranks has gloo, another of the same ranks has tpk (and commux, where that is installed). Both
are called as any program calls them. Sizes are those of the full tensor, in bytes. `neighbour` reduces while a thread
of each rank computes. The programs are in bench/c10d_programs.py.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor

from bench import baselines, table
from bench.cell import Cell, Setting, compare, sum_tolerance
from bench.collectives import NO_ERROR, numel_of, sums, taking
from bench.ranks import cores
from bench.rows import KEEP_HELP, circumstances, destination, save
from bench.run import BYTES, Bench, Spec, complete, named, parse_sizes, run
from bench.shapes import parse_bytes
from bench.timing import Candidate

GLOO, OURS, OTHER = "gloo", "tpk", "commux"
BLOCK_S = 0.02
Body = Callable[[Any, Tensor], Tensor]  # (group, input) -> output


@functools.cache
def group_of(backend: str) -> Any:
    """A process group of all ranks."""
    return dist.group.WORLD if backend == GLOO else dist.new_group(backend=backend)


@functools.cache
def backends() -> tuple[str, ...]:
    """Those that this process can open."""
    with contextlib.suppress(ImportError, OSError):
        __import__(OTHER)
    return (GLOO, *(name for name in (OURS, OTHER) if dist.is_backend_available(name)))


def cell(
    setting: Setting, op: str, nbytes: int, source: Tensor, run: Body, error: Callable[[Tensor], float], bus: float
) -> Cell:
    """The same call on the groups of all back ends."""

    def candidate(backend: str) -> Candidate:
        group = group_of(backend)
        return taking(setting, source, backend, functools.partial(run, group), error, label={"transport": backend})

    candidates = setting.pick(**{name: functools.partial(candidate, name) for name in backends()})
    return Cell(f"c10d_{op}", setting.dtype_name, setting.world_size, {"bytes": nbytes}, candidates, GLOO,
                bus_factor=bus)  # fmt: skip


def all_reduce(setting: Setting, nbytes: int) -> Cell:
    """In place."""

    def run(group: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    numel, R = numel_of(setting, nbytes), setting.world_size
    want, magnitude = sums(setting, numel)
    error = compare(want, sum_tolerance(setting, magnitude))
    return cell(setting, "all_reduce", numel * setting.itemsize, setting.values(setting.rank, numel), run, error,
                2 * (R - 1) / R)  # fmt: skip


def neighbour(setting: Setting, nbytes: int) -> Cell:
    """all_reduce while a thread of every rank multiplies matrices, as a data loader or another pool would."""
    found = all_reduce(setting, nbytes)
    threading.Thread(target=_multiply, args=(weakref.ref(found),), daemon=True).start()
    return Cell(**{**vars(found), "op": "c10d_neighbour"} | {"candidates": [_kept(c, found) for c in found.candidates]})


def _kept(candidate: Candidate, cell: Cell) -> Candidate:
    """A candidate that keeps the cell, and so its neighbour, alive."""

    def call() -> Any:
        return cell and candidate.call()

    return Candidate(**vars(candidate) | {"call": call})


def _multiply(alive: weakref.ref[Cell]) -> None:
    x = torch.full((128, 128), 1 / 128)
    while alive() is not None:
        x = x @ x


def broadcast(setting: Setting, nbytes: int) -> Cell:
    """From the last rank."""
    numel, root = numel_of(setting, nbytes), setting.world_size - 1

    def run(group: Any, x: Tensor) -> Tensor:
        dist.broadcast(x, root, group=group)
        return x

    error = compare(setting.values(root, numel).double(), NO_ERROR)
    return cell(setting, "broadcast", numel * setting.itemsize, setting.values(setting.rank, numel), run, error, 1.0)


def reduce(setting: Setting, nbytes: int) -> Cell:
    """To rank 0; what the others have then is not defined."""
    numel = numel_of(setting, nbytes)

    def run(group: Any, x: Tensor) -> Tensor:
        dist.reduce(x, 0, group=group)
        return x

    want, magnitude = sums(setting, numel)
    error = (lambda _: 0.0) if setting.rank else compare(want, sum_tolerance(setting, magnitude))
    return cell(setting, "reduce", numel * setting.itemsize, setting.values(setting.rank, numel), run, error, 1.0)


def _gathering(setting: Setting, op: str, nbytes: int, make: Callable[[Tensor], Body]) -> Cell:
    """The cell of a call that brings every rank's part together; make(room for all) is the call."""
    numel, R = numel_of(setting, nbytes), setting.world_size
    part = numel // R
    error = compare(torch.cat([setting.values(r, part) for r in range(R)]).double(), NO_ERROR)
    run = make(torch.empty(numel, dtype=setting.dtype))
    return cell(setting, op, numel * setting.itemsize, setting.values(setting.rank, part), run, error, (R - 1) / R)


def all_gather_into_tensor(setting: Setting, nbytes: int) -> Cell:
    """Into a kept tensor."""

    def make(out: Tensor) -> Body:
        def run(group: Any, x: Tensor) -> Tensor:
            baselines.all_gather(out, x, group=group)
            return out

        return run

    return _gathering(setting, "all_gather_into_tensor", nbytes, make)


def all_gather(setting: Setting, nbytes: int) -> Cell:
    """Into a list of kept tensors, which lie side by side."""

    def make(out: Tensor) -> Body:
        parts = list(out.chunk(setting.world_size))

        def run(group: Any, x: Tensor) -> Tensor:
            dist.all_gather(parts, x, group=group)
            return out

        return run

    return _gathering(setting, "all_gather", nbytes, make)


def gather(setting: Setting, nbytes: int) -> Cell:
    """To rank 0."""

    def make(out: Tensor) -> Body:
        parts = list(out.chunk(setting.world_size)) if setting.rank == 0 else None

        def run(group: Any, x: Tensor) -> Tensor:
            dist.gather(x, parts, 0, group=group)
            return out

        return run

    found = _gathering(setting, "gather", nbytes, make)
    if setting.rank:  # has nothing to compare
        found.candidates[:] = [Candidate(**vars(c) | {"error": lambda _: 0.0}) for c in found.candidates]
    return found


def reduce_scatter_tensor(setting: Setting, nbytes: int) -> Cell:
    """Into a kept tensor."""
    numel, R = numel_of(setting, nbytes), setting.world_size
    part = numel // R
    want, magnitude = (x.narrow(0, setting.rank * part, part).clone() for x in sums(setting, numel))
    out = torch.empty(part, dtype=setting.dtype)

    def run(group: Any, x: Tensor) -> Tensor:
        baselines.reduce_scatter(out, x, group=group)
        return out

    error = compare(want, sum_tolerance(setting, magnitude))
    return cell(setting, "reduce_scatter_tensor", numel * setting.itemsize, setting.values(setting.rank, numel), run,
                error, (R - 1) / R)  # fmt: skip


def all_to_all_single(setting: Setting, nbytes: int) -> Cell:
    """Equal parts, into a kept tensor."""
    numel, R, rank = numel_of(setting, nbytes), setting.world_size, setting.rank
    out = torch.empty(numel, dtype=setting.dtype)

    def run(group: Any, x: Tensor) -> Tensor:
        dist.all_to_all_single(out, x, group=group)
        return out

    want = torch.cat([setting.values(r, numel).chunk(R)[rank] for r in range(R)]).double()
    return cell(setting, "all_to_all_single", numel * setting.itemsize, setting.values(rank, numel), run,
                compare(want, NO_ERROR), (R - 1) / R)  # fmt: skip


def scatter(setting: Setting, nbytes: int) -> Cell:
    """From rank 0."""
    numel, R, rank = numel_of(setting, nbytes), setting.world_size, setting.rank
    out = torch.empty(numel // R, dtype=setting.dtype)

    def run(group: Any, x: Tensor) -> Tensor:
        dist.scatter(out, None if rank else list(x.chunk(R)), 0, group=group)
        return out

    error = compare(setting.values(0, numel).chunk(R)[rank].double(), NO_ERROR)
    return cell(setting, "scatter", numel * setting.itemsize, setting.values(rank, numel), run, error, (R - 1) / R)


def send_recv(setting: Setting, nbytes: int) -> Cell:
    """Every rank sends to the next and receives from the one before, as a pipeline does."""
    numel, R, rank = numel_of(setting, nbytes), setting.world_size, setting.rank
    out = torch.empty(numel, dtype=setting.dtype)

    def run(group: Any, x: Tensor) -> Tensor:
        ops = [dist.P2POp(dist.isend, x, (rank + 1) % R, group), dist.P2POp(dist.irecv, out, (rank - 1) % R, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return out

    error = compare(setting.values((rank - 1) % R, numel).double(), NO_ERROR)
    return cell(setting, "send_recv", numel * setting.itemsize, setting.values(rank, numel), run, error, 1.0)


def barrier(setting: Setting, nbytes: int) -> Cell:
    """Nothing travels; the size is that of a tensor which stays where it is."""

    def run(group: Any, x: Tensor) -> Tensor:
        dist.barrier(group=group)
        return x

    source = setting.values(setting.rank, max(1, nbytes // setting.itemsize))
    return cell(setting, "barrier", nbytes, source, run, compare(source.double(), NO_ERROR), 0.0)


PROGRAMS = ("ddp", "fsdp", "tensor_parallel")
SIZED = {
    f"c10d_{call}": Bench(f"bench.c10d:{call}", parse_bytes, BYTES)
    for call in (
        "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast", "reduce",
        "all_gather", "gather", "scatter", "send_recv", "neighbour",
    )
}  # fmt: skip
BENCHES = {
    **SIZED,
    "c10d_barrier": Bench("bench.c10d:barrier", parse_bytes, (4,)),
    **{
        f"c10d_{name}": Bench(f"bench.c10d_programs:{name}", parse_bytes, (40 << 20,))
        for name in ("ddp", "fsdp", "tensor_parallel")
    },
    "c10d_decode": Bench("bench.c10d_programs:decode", parse_bytes, (12 * 14 << 20,)),
}


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Names without c10d_; default all.")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "2,4",
    sizes: Annotated[str | None, typer.Option(help="Of the collectives: 4KiB,1MiB.")] = None,
    only: Annotated[str | None, typer.Option(help="Back ends to run, with commas; default all.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 11,
    wait: Annotated[float, typer.Option(help="Seconds to wait, for each number of ranks, for a quiet machine.")] = 0.0,
    most_lost: Annotated[float, typer.Option(help="Part of a block that others may take; 1e9: any.")] = 0.05,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
) -> None:
    """Measure collectives and programs on gloo and tpk, all of them in the same processes."""
    console, wrong = Console(width=max(160, Console().width)), False
    setting = {"only": tuple(only.split(",")) if only else ()}
    names = [named(f"c10d_{op}", BENCHES, "OPS") for op in ops] if ops else list(BENCHES)
    jobs = [(name, size) for name in names for size in parse_sizes(BENCHES[name], sizes if name in SIZED else None)]
    for R in (int(number) for number in ranks.split(",")):
        pinned = len(cores()) >= R
        spec = Spec(tuple(jobs), setting, rounds, BLOCK_S, most_lost, circumstances(pinned), wait, BENCHES)
        for found in run(spec, R, pin=pinned):
            if isinstance(found, str):
                console.print(found)
                continue
            table.show(found, console)
            wrong = wrong or not all(row["verified"] for row in found)
            if complete(found, rounds):
                save(destination("c10d.jsonl", keep), found)
            else:
                console.print("something else had the cores: not kept", style="yellow")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)

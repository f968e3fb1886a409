"""The machine's profile: times of the GEMM engines, measured before a group computes, and kept in a file.

Which engine multiplies decides the last bits of a product, so a run never times anything by itself: a group reads the
profile when it opens, and the same file gives the same bits. A profile has points (measured once on a machine, for
sizes between which any other lies), shapes (those of a model, each measured for itself) and, for ranks that share
memory, the largest message that each of them sums by itself (one_shot.py), which changes no bits. It is measured

- when a group of several ranks opens on a machine that has none, in about three seconds, messages for each new number
  of ranks in 0.4 at most;
- by `tpkernels tune`, also for the shapes of a model;
- for one shape by `group.explain(op, M=..., N=..., K=..., tune=True)`.

The environment variable TPKERNELS_PROFILE is "auto" (the default), "off" (a rule of sizes decides, as in
csrc/cpu/choose.cpp), or the path of a profile, which is then read and never measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpkernels._build import build_info
from tpkernels._native import _C
from tpkernels.comm.cache import cache_file, replace_file
from tpkernels.comm.one_shot import Team, measure_one_shot, parse_one_shot

_VARIABLE = "TPKERNELS_PROFILE"
_ROUNDS, _FEW_ROUNDS = 5, 3  # few for products of 5 ms and more, which other programs disturb less
_SECONDS = 5.0  # that measuring the points may take
_MOST_FLOPS = 4.5e9  # of a point: about 30 to 60 ms of a core
_ROWS = (1, 8, 64, 512, 2, 16, 128, 4, 32, 256)  # where the time is up early, no part of the range is without a point
_SIZES = (256, 1024, 4096, 88)  # of N and of K; 88 is no multiple of a vector
_DTYPES = ("float32", "bfloat16", "float16")  # those with several engines
_ENGINES = {"aten", "onednn", "gemv"}
_log = logging.getLogger("tpkernels")


class Product(NamedTuple):
    """y[M, N] = x[M, K] @ w[N, K].T of a dtype, such as "float32"."""

    dtype: str
    M: int
    N: int
    K: int


Times = dict[str, float]  # microseconds by engine


@dataclass
class Profile:
    """Measured times, those of the machine's points and those of shapes of their own; bytes summed by every rank."""

    points: dict[Product, Times] = field(default_factory=dict)
    shapes: dict[Product, Times] = field(default_factory=dict)
    one_shot: dict[Team, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Read what `text` returned.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is no profile.
        """
        parts = json.loads(text)
        points, shapes = ({_product(*row[:-1]): _times(row[-1]) for row in parts[k]} for k in ("points", "shapes"))
        return cls(points, shapes, dict(parse_one_shot(*row) for row in parts.get("one_shot", [])))

    def text(self) -> str:
        """As JSON, a row a line."""
        tables: dict[str, dict[Any, Any]] = {"points": self.points, "shapes": self.shapes, "one_shot": self.one_shot}
        parts = [
            f'"{name}": [\n' + ",\n".join(json.dumps([*key, value]) for key, value in rows.items()) + "\n]"
            for name, rows in tables.items()
        ]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def give(self, communicator: Any, cores: int = 1) -> None:
        """Add all measurements to those of a communicator, whose ranks may use so many cores together."""
        if (nbytes := self.one_shot.get(Team.of(communicator, cores))) is not None:
            communicator.set_one_shot(nbytes, is_measured=True)
        for product, us in self.points.items():
            communicator.add_measured(*product, us, is_point=True)
        for product, us in self.shapes.items():
            communicator.add_measured(*product, us)


def _product(dtype: str, *sizes: int) -> Product:
    if dtype not in _DTYPES or len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"profile: expected a dtype of {', '.join(_DTYPES)}, M, N and K, got {(dtype, *sizes)}")
    return Product(dtype, *sizes)


def _times(us: dict[str, Any]) -> Times:
    times = {engine: float(time) for engine, time in us.items()}
    if not times or not times.keys() <= _ENGINES or not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"profile: expected microseconds by engine of {', '.join(sorted(_ENGINES))}, got {us}")
    return times


def mode() -> str:
    """Return TPKERNELS_PROFILE: "auto", "off", or a path."""
    return os.environ.get(_VARIABLE) or "auto"


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Groups that open inside neither read nor measure a profile."""
    given = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "off"
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if given is not None:
            os.environ[_VARIABLE] = given


def profile_file(transport: str) -> Path:
    """Return the file of this machine's profile: one for each CPU, number of threads, torch, build and transport.

    Args:
        transport: of the group; its ranks multiply at the same time where it is not "local".
    """
    if mode() not in ("auto", "off"):
        return Path(mode())
    built = build_info()
    key = (torch.get_num_threads(), torch.__version__, built.version, built.commit, transport)
    return cache_file("profile", ".json", *key)


def read(transport: str) -> Profile | None:
    """Read the machine's profile; None where there is none, or where it is switched off.

    Raises:
        ValueError: TPKERNELS_PROFILE is a path, and no profile is there.
    """
    if mode() == "off":
        return None
    file = profile_file(transport)
    try:
        return Profile.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if mode() != "auto":
            raise ValueError(
                f"TPKERNELS_PROFILE: expected auto, off, or the path of a profile, got {mode()!r}: {error}"
            ) from None
        return None


def write(profile: Profile, transport: str) -> None:
    """Keep the machine's profile; other processes read the old file or the new one.

    Raises:
        OSError: the folder of caches cannot be written.
    """
    replace_file(profile_file(transport), profile.text())


def open_with_profile(communicator: Any, cores: int = 1, ranks: int = 1) -> Path | None:
    """Give a communicator that opens the machine's profile, and measure one where there is none; all ranks call this.

    The ranks use it where all of them read the same; where they differ, or some read none, the rule decides on all.

    Args:
        communicator: of a group on the CPU.
        cores: of this machine that its ranks may use.
        ranks: how many of its ranks this machine runs.

    Returns:
        the file; None where the rule decides.

    Raises:
        ValueError: TPKERNELS_PROFILE is a path, and no profile is there.
    """
    transport, found = communicator.transport, read(communicator.transport)
    if communicator.world_size > 1:
        found = _agreed(communicator, found, cores, ranks)
    if found is None:
        return None
    found.give(communicator, cores)
    return profile_file(transport)


def _agreed(communicator: Any, found: Profile | None, cores: int, ranks: int) -> Profile | None:
    """The profile of all ranks, None where they have none or different ones."""
    digests = communicator.exchange(_digest(found, _can_measure(cores, ranks, communicator.transport)))
    if len(set(digests)) == 1:
        found = _first_profile(communicator) if digests[0] == _MEASURE else found
        return _with_one_shot(communicator, found, Team.of(communicator, cores))
    if communicator.rank == 0 and not {_MEASURE, _NONE}.issuperset(digests):
        _log.warning(
            "group '%s': the ranks have different profiles of their machines; none is used, and a rule of sizes "
            "decides which engine multiplies", communicator.label,
        )  # fmt: skip
    return None


def _with_one_shot(communicator: Any, found: Profile | None, team: Team) -> Profile | None:
    """The same with the messages that this team sums in one shot, also where its ranks share cores."""
    if communicator.transport != "shm" or (found is not None and team in found.one_shot):
        return found
    if not all(communicator.exchange(int(_can_keep(communicator.transport)))):
        return found
    if (nbytes := measure_one_shot(communicator)) is not None:
        found = found or Profile()
        found.one_shot[team] = nbytes
        _keep(found, communicator)
    return found


_NONE, _MEASURE = 0, 1


def _digest(found: Profile | None, can_measure: bool) -> int:
    if can_measure and (found is None or not (found.points or found.shapes)):
        return _MEASURE
    if found is None:
        return _NONE
    return int.from_bytes(hashlib.sha256(found.text().encode()).digest()[:7], "big") + 2


def _can_measure(cores: int, ranks: int, transport: str) -> bool:
    """Whether the ranks of this machine have cores of their own, and the file can be written."""
    return cores >= ranks * torch.get_num_threads() and _can_keep(transport)


def _can_keep(transport: str) -> bool:
    if mode() != "auto":
        return False
    folder = profile_file(transport).parent
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def _first_profile(communicator: Any) -> Profile:
    if communicator.rank == 0:
        _log.info("group '%s': measuring the GEMM engines of this machine once (about 3 s)", communicator.label)
    profile = Profile(measure(communicator, points(), seconds=_SECONDS))
    _keep(profile, communicator)  # by each rank, the same: their machines may have folders of their own
    communicator.barrier()
    return profile


def _keep(profile: Profile, communicator: Any) -> None:
    """Write a profile; where that fails, groups that open later measure again."""
    try:
        write(profile, communicator.transport)
    except OSError as error:
        _log.warning("group '%s': the profile of this machine cannot be kept: %s", communicator.label, error)


def points() -> Iterator[Product]:
    """Yield the products of a profile's points."""
    for m, dtype, n, k in itertools.product(_ROWS, _DTYPES, _SIZES, _SIZES):
        if 2.0 * m * n * k <= _MOST_FLOPS and has_choice(Product(dtype, m, n, k)):
            yield Product(dtype, m, n, k)


def has_choice(product: Product) -> bool:
    """Whether this machine has several engines for a product."""
    return len(_C.engines_for(*product)) > 1


def measure(
    communicator: Any,
    products: Iterable[Product],
    *,
    seconds: float = math.inf,
    progress: Callable[[], object] | None = None,
) -> dict[Product, Times]:
    """Time every engine for each product on all ranks at once; all ranks call this.

    Args:
        communicator: of a group on the CPU.
        products: the same on all ranks.
        seconds: after which no further product is measured.
        progress: called after each product.

    Returns:
        microseconds by engine, of the slowest rank; the same on all ranks.
    """
    measured: dict[Product, Times] = {}
    started = time.monotonic_ns()
    with _Engines() as engines:
        for product in products:
            if max(communicator.exchange(time.monotonic_ns() - started)) > seconds * 1e9:
                break
            best = engines.time(communicator, product)
            measured[product] = {name: max(communicator.exchange(ns)) / 1e3 for name, ns in best.items()}
            if progress is not None:
                progress()
    return measured


class _Engines:
    """Groups of this process alone, each of which multiplies with one engine."""

    def __init__(self) -> None:
        self._kernel = torch.ops.tpkernels.replicated_gemm.default._handle.redispatch_boxed
        self._cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        self._local: dict[str, Any] = {}
        self._weights: dict[torch.dtype, torch.Tensor] = {}

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for communicator in self._local.values():
            communicator.close()

    def time(self, communicator: Any, product: Product) -> dict[str, int]:
        """The least nanoseconds of some calls, by engine."""
        dtype: torch.dtype = getattr(torch, product.dtype)
        size = product.N * product.K
        if dtype not in self._weights or self._weights[dtype].numel() < size:
            self._weights[dtype] = torch.full((size,), 0.5, dtype=dtype, device="cpu")
        w = self._weights[dtype][:size].view(product.N, product.K)
        x = torch.full((product.M, product.K), 0.5, dtype=dtype, device="cpu")
        runs = {name: self._run(name, product, x, w) for name in _C.engines_for(*product)}
        best = dict.fromkeys(runs, 1 << 62)
        calls = 1 + int(2e6 / (product.M * w.numel()))  # of small products, several
        for done in range(_ROUNDS):
            if done >= _FEW_ROUNDS and max(communicator.exchange(min(best.values()))) >= 5e6:
                break
            for name, run in runs.items():
                communicator.barrier()
                started = time.perf_counter_ns()
                for _ in range(calls):
                    run()
                best[name] = min(best[name], (time.perf_counter_ns() - started) // calls)
        return best

    def _run(self, engine: str, product: Product, x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
        """The product x @ w.T by this engine, the way that replicated_gemm takes."""
        if engine not in self._local:
            self._local[engine] = _C.open_local(f"engine/{engine}/{id(self)}", engine)
        local = self._local[engine]
        local.add_measured(*product, {engine: 0.0})
        if _C.fast_linear(x, w, None, local.address, "none") is not None:
            return lambda: _C.fast_linear(x, w, None, local.address, "none")
        return lambda: self._kernel(self._cpu, x, w, None, local.name, 1, "none")


def measure_shape(communicator: Any, product: Product) -> Times:
    """Time the engines for one shape, use and keep the result; all ranks call this.

    Returns:
        microseconds by engine, of the slowest rank; the same on all ranks.
    """
    us = measure(communicator, [product])[product]
    communicator.add_measured(*product, us)
    _add_shapes({product: us}, communicator)
    return us


def _add_shapes(shapes: dict[Product, Times], communicator: Any) -> None:
    """Add shapes to the machine's profile, unless it is switched off or given; all ranks call this with the same."""
    if communicator.rank == 0 and mode() == "auto":
        profile = read(communicator.transport) or Profile()
        profile.shapes |= shapes
        _keep(profile, communicator)
    communicator.barrier()

"""The manifest: what a checkpoint holds, and which file holds it.

version     of this format
layout      {tp: ranks that a replica is cut over, dp: replicas, pp: stages, absent where there is one}
step, extra arguments of `save`
files       {name: sha-256}
tensors     {name: how it is cut}, see regions.py
own         {file: {tensors: {name: dtype and shape}, aggregator: numbers}} of the tensors of one rank alone
aliases     {second name: first name} of tied tensors
optimizer   its options, by parameter group
sha256      of all this
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpkernels.checkpoint.files import TensorFile, check_file, check_folder, damaged, read_manifest
from tpkernels.checkpoint.ranks import CheckpointRanks, file_name
from tpkernels.checkpoint.regions import Entry, Read
from tpkernels.checkpoint.replicas import has_own_parameters
from tpkernels.checkpoint.schema import check_manifest
from tpkernels.checkpoint.snapshot import Snapshot
from tpkernels.errors import CheckpointError, shorten

VERSION = 2


def common(snapshot: Snapshot) -> dict[str, Any]:
    """The part of the manifest that must be the same on all ranks, for `check_agreement`."""
    return {
        "step": snapshot.step,
        "extra": snapshot.extra,
        "aliases": snapshot.aliases,
        "optimizer": snapshot.optimizer,
        "aggregator": snapshot.aggregator is not None,
        "own_parameters": has_own_parameters(snapshot.aggregator or {}),
        # Where replicas cut the values differs between ranks whose parts have other sizes.
        "tensors": {n: e.to_json() | {"flat": e.flat is not None} for n, e in snapshot.entries.items()},
    }


def check_agreement(parts: list[dict[str, Any]], pp: int = 1) -> None:
    """Compare the `common` parts of all ranks, stage by stage, replica by replica.

    Args:
        parts: of the ranks. pp: stages; ranks of different stages may have different tensors and parameters.

    Raises:
        CheckpointError: they differ as JSON (says where).
    """
    each = len(parts) // pp
    for number, other in enumerate(parts[1:], start=1):
        first = number // each * each
        for base, view in ((first, lambda part: part), (0, _without_stage)):
            if (found := _difference(view(parts[base]), view(other))) is not None:
                where, mine, theirs = found
                raise CheckpointError(
                    f"ranks disagree about {where}: {mine:.100} on rank {base}, {theirs:.100} on rank {number}"
                )


def _without_stage(part: dict[str, Any]) -> dict[str, Any]:
    """What ranks of different stages have in common."""
    shared = {key: value for key, value in part.items() if key not in ("tensors", "aliases")}
    if shared["optimizer"] is not None:
        options = [{k: v for k, v in group.items() if k != "params"} for group in shared["optimizer"]["groups"]]
        shared["optimizer"] = {"class": shared["optimizer"]["class"], "groups": options}
    return shared


def _difference(mine: Any, theirs: Any, where: str = "") -> tuple[str, str, str] | None:
    """Where two values of JSON differ first, and how, as text: NaN equals itself there."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            if found := _difference(mine.get(key), theirs.get(key), f"{where}[{key!r}]" if where else key):
                return found
        return None
    texts = json.dumps(mine, sort_keys=True), json.dumps(theirs, sort_keys=True)
    return None if texts[0] == texts[1] else (where, *texts)


def describe(snapshot: Snapshot, file: str, digest: str, replicas: dict[str, str]) -> dict[str, Any]:
    """The part of the manifest about the file of this rank, for `join`.

    Args:
        snapshot: of this rank.
        file: the name of its file. digest: the sha-256 of that.
        replicas: see `Snapshot.replica_digests`.
    """
    own = {key: snapshot.tensors[key] for key in snapshot.own}
    return {
        "file": file,
        "sha256": digest,
        "replicas": replicas,
        "entries": snapshot.entries,
        "aliases": snapshot.aliases,
        "optimizer": snapshot.optimizer,
        "own": {
            "tensors": {k: kind_of(t.dtype, t.shape) for k, t in own.items()},
            "aggregator": snapshot.aggregator,
        },
    }


def kind_of(dtype: torch.dtype, shape: Iterable[int]) -> dict[str, Any]:
    """The entry of a tensor that belongs to one rank alone."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def join(parts: list[dict[str, Any]], snapshot: Snapshot, ranks: CheckpointRanks) -> dict[str, Any]:
    """The manifest, from the parts that `describe` gave on all ranks, stage by stage, replica by replica."""
    entries: dict[str, Entry] = {}
    stages = [parts[stage * ranks.dp * ranks.tp :][: ranks.tp] for stage in range(ranks.pp)]
    for stage, own in enumerate(stages):  # what several stages hold, such as buffers, is taken from the first
        for name, entry in own[0]["entries"].items():
            bounds = [part["entries"][name].flat for part in own]
            flat = None if entry.flat is None else tuple(cut for each in bounds for cut in each)
            entries.setdefault(name, replace(_marked(name, entry, own), stage=stage, flat=flat))
    aliases = {second: first for own in stages for second, first in own[0]["aliases"].items()}
    return {
        "version": VERSION,
        "layout": {"tp": ranks.tp, "dp": ranks.dp} | ({"pp": ranks.pp} if ranks.pp > 1 else {}),
        "step": snapshot.step,
        "files": {part["file"]: part["sha256"] for part in parts},
        "tensors": {name: entry.to_json() for name, entry in entries.items()},
        "own": {part["file"]: part["own"] for part in parts},
        "aliases": aliases,
        "optimizer": _whole_optimizer([own[0]["optimizer"] for own in stages]),
        "extra": snapshot.extra,
    }


def _whole_optimizer(stages: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The optimizer of the whole model, from those of the stages: of equal options, group by group."""
    first = stages[0]
    if first is None:
        return None
    every = [stage for stage in stages if stage is not None]
    groups = [
        group | {"params": list(dict.fromkeys(name for stage in every for name in stage["groups"][i]["params"]))}
        for i, group in enumerate(first["groups"])
    ]
    return first | {"groups": groups, "state": {k: v for stage in every for k, v in stage["state"].items()}}


def _marked(name: str, entry: Entry, parts: list[dict[str, Any]]) -> Entry:
    """The entry, marked where ranks that hold the same indices have other bits."""
    seen: dict[Any, str] = {}
    for rank, part in enumerate(parts):
        digest = part["replicas"].get(name)
        key = None if entry.dim is None else entry.runs_of(rank, len(parts))
        if digest is not None and seen.setdefault(key, digest) != digest:
            return replace(entry, replicas_differ=True)
    return entry


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest.

    Raises:
        CheckpointError: there is none, it is damaged, or it has another version.
    """
    manifest = read_manifest(Path(folder))
    version = manifest.get("version")
    if version != VERSION or not isinstance(version, int):
        raise CheckpointError(
            f"{folder} has format version {version} and this tpkernels reads {VERSION}: use the tpkernels that wrote it"
        )
    try:
        check_manifest(manifest)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the manifest makes no sense ({error!r})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return manifest


@dataclass
class Source:
    """A checkpoint that is read: its manifest and its files, which are opened when they are needed."""

    folder: Path
    manifest: dict[str, Any]

    def __post_init__(self) -> None:
        layout = self.manifest["layout"]
        self.tp, self.dp, self.pp = int(layout["tp"]), int(layout["dp"]), int(layout.get("pp", 1))
        self.entries = {name: Entry.from_json(name, fields) for name, fields in self.manifest["tensors"].items()}
        wrong = [n for n, e in self.entries.items() if {len(b) for b in e.flat or ()} - {self.dp + 1}]
        wrong += [n for n, e in self.entries.items() if e.flat is not None and len(e.flat) != self.tp]
        if wrong:
            raise CheckpointError(
                f"the manifest lists the parts of other ranks than {self.tp} of {self.dp}: {wrong[0]}"
            )
        self._open: dict[str, TensorFile] = {}
        names = set()
        if self.tp * self.dp * self.pp == len(self.manifest["files"]):
            every = product(range(self.tp), range(self.dp), range(self.pp))
            names = {file_name(rank, self.tp, replica, stage, self.pp) for rank, replica, stage in every}
        if names != set(self.manifest["files"]) or names != set(self.manifest["own"]):
            raise CheckpointError(
                f"the manifest says that {self.tp} ranks of {self.dp} replicas"
                f"{f' of {self.pp} stages' if self.pp > 1 else ''} wrote it, and lists "
                f"{', '.join(sorted(self.manifest['files'])) or 'no files'}"
            )

    def check_files(self, number: int = 0, of: int = 1) -> None:
        """Check that the folder has the files that were written, and read some of them through.

        Args:
            number, of: of all files in order of their names, every `of`-th from `number` on is read.

        Raises:
            CheckpointError: names the file that is missing, damaged, or too many.
        """
        check_folder(self.folder, self.manifest)
        for name in sorted(self.manifest["files"])[number::of]:
            check_file(self.folder, name, self.manifest)

    def first_rank(self, rank: int, tp: int) -> int:
        """The rank whose file is read first by rank `rank` of `tp`: the same where as many ranks wrote it, else 0."""
        return rank if tp == self.tp else 0

    def file(self, rank: int, replica: int = 0, stage: int = 0) -> TensorFile:
        """The file of a rank, checked to hold the tensors of the manifest.

        Raises:
            CheckpointError: it holds others.
        """
        name = file_name(rank, self.tp, replica, stage, self.pp)
        if name not in self._open:
            file = TensorFile(self.folder / name)
            expected = {key: (t["dtype"], tuple(t["shape"])) for key, t in self.own(rank, replica, stage).items()}
            for key, entry in self.entries.items():
                if entry.stage == stage and (shape := entry.held_shape(rank, self.tp, replica)) is not None:
                    expected[key] = (str(entry.dtype).removeprefix("torch."), shape)
            differ = sorted(expected.keys() ^ set(file.names))
            if stage > 0:  # it may have what an earlier stage has, too
                differ = [key for key in differ if key not in self.entries or key in expected]
            if differ:
                raise damaged(file.path, f"its tensors are not those of the manifest: {', '.join(differ[:3])}")
            for key, (dtype, shape) in expected.items():
                got = (str(file.dtype(key)).removeprefix("torch."), file.shape(key))
                if got != (dtype, shape):
                    raise damaged(file.path, f"{key} is {got[0]} {list(got[1])}, expected {dtype} {list(shape)}")
            self._open[name] = file
        return self._open[name]

    def own(self, rank: int, replica: int, stage: int = 0) -> dict[str, dict[str, Any]]:
        """Dtype and shape of the tensors that belong to a rank alone, by name."""
        found: dict[str, dict[str, Any]] = self._own_of(rank, replica, stage)["tensors"]
        return found

    def reader(self, key: str) -> Read:
        """A function that reads ranges of a tensor out of the file of a rank; of what replicas have parts, of all."""
        entry = self.entries[key]
        if entry.flat is None:
            return lambda rank, *ranges: self.file(rank, 0, entry.stage).read(key, *ranges)

        @cache
        def whole(rank: int) -> Tensor:
            parts = [self.file(rank, replica, entry.stage).read(key) for replica in range(self.dp)]
            return torch.cat(parts).view(entry.part_shape(rank, self.tp))

        def read(rank: int, *ranges: tuple[int, int, int]) -> Tensor:
            found = whole(rank)
            for dim, start, stop in ranges:
                found = found.narrow(dim, start, stop - start)
            return found

        return read

    def own_tensors(self, rank: int, replica: int, kind: str, stage: int = 0) -> dict[str, Tensor]:
        """Copies of the tensors of a kind ("rng", "aggregator") that belong to a rank alone, without the kind."""
        keys = [key for key in self.own(rank, replica, stage) if key.startswith(f"{kind}/")]
        return {key.partition("/")[2]: self.file(rank, replica, stage).read(key).clone() for key in keys}

    def aggregator_numbers(self, rank: int, replica: int, stage: int = 0) -> Any:
        """The state of the aggregator of a rank besides its tensors; None when none was saved."""
        return self._own_of(rank, replica, stage)["aggregator"]

    def _own_of(self, rank: int, replica: int, stage: int) -> dict[str, Any]:
        found: dict[str, Any] = self.manifest["own"][file_name(rank, self.tp, replica, stage, self.pp)]
        return found

    def warn_of_replicas(self) -> None:
        """Warn of the tensors that differed between ranks that hold the same indices."""
        differ = [name.removeprefix("model/") for name, entry in self.entries.items() if entry.replicas_differ]
        if differ:
            warnings.warn(
                f"{self.folder}: the ranks that saved it did not hold the same bits of {shorten(sorted(differ))}; the "
                f"first that holds each is taken",
                stacklevel=4,
            )

    def rng(self, rank: int, replica: int, stage: int = 0) -> dict[str, Tensor]:
        """The states of the random generators of a rank, also of one that did not save; by device.

        Rank t of replica d of stage s takes those of rank t modulo tp, replica d modulo dp and stage s modulo pp. When
        replicas were added and the saved ones drew different numbers, an added one gets a state of its own, derived
        from these and its number.
        """
        stage %= self.pp
        state = self.own_tensors(rank % self.tp, replica % self.dp, "rng", stage)
        if replica >= self.dp > 1:
            first, second = (self.own_tensors(rank % self.tp, d, "rng", stage) for d in (0, 1))
            if not torch.equal(first["cpu"], second["cpu"]):
                text = state["cpu"].numpy().tobytes() + replica.to_bytes(8, "little")
                seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
                state["cpu"] = torch.Generator().manual_seed(seed).get_state()
        return state

"""The manifest: what a checkpoint holds, and which file holds it.

version     of this layout
world_size  ranks that a replica is cut over; `layout` says it with the replicas and the stages: {tp, dp, pp}
step, extra what the training said
files       {name: sha-256}
tensors     {name: how it is cut}, see regions.py
own         {file: {tensors: {name: dtype and shape}, aggregator: numbers}} of what belongs to one rank alone
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpkernels.checkpoint.files import TensorFile, check_file, check_folder, damaged, read_manifest
from tpkernels.checkpoint.ranks import Place, file_name
from tpkernels.checkpoint.regions import Entry, Read
from tpkernels.checkpoint.schema import check_manifest
from tpkernels.checkpoint.snapshot import Snapshot
from tpkernels.errors import CheckpointError

VERSION = 2


def common(snapshot: Snapshot) -> dict[str, Any]:
    """What all ranks must say alike, for `check_agreement`."""
    return {
        "step": snapshot.step,
        "extra": snapshot.extra,
        "aliases": snapshot.aliases,
        "optimizer": snapshot.optimizer,
        "aggregator": snapshot.aggregator is not None,
        "tensors": {name: entry.to_json() for name, entry in snapshot.entries.items()},
    }


def check_agreement(said: list[dict[str, Any]]) -> None:
    """Compare what the ranks say, replica by replica.

    Raises:
        CheckpointError: they do not say the same, as JSON has it.
    """
    for number, other in enumerate(said[1:], start=1):
        if (found := _difference(said[0], other)) is not None:
            where, mine, theirs = found
            raise CheckpointError(
                f"ranks disagree about {where}: {mine:.100} on rank 0, {theirs:.100} on rank {number}"
            )


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
    """What a rank says of its file, for `join`."""
    own = {key: snapshot.tensors[key] for key in snapshot.own}
    return {
        "file": file,
        "sha256": digest,
        "replicas": replicas,
        "own": {
            "tensors": {k: kind_of(t.dtype, t.shape) for k, t in own.items()},
            "aggregator": snapshot.aggregator,
        },
    }


def kind_of(dtype: torch.dtype, shape: Iterable[int]) -> dict[str, Any]:
    """What the manifest says of a tensor that belongs to one rank alone."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def join(said: list[dict[str, Any]], snapshot: Snapshot, place: Place) -> dict[str, Any]:
    """The manifest, from what the ranks say of their files, replica by replica."""
    tensors = {name: _marked(name, entry, said[: place.tp]).to_json() for name, entry in snapshot.entries.items()}
    return {
        "version": VERSION,
        "world_size": place.tp,
        "layout": {"tp": place.tp, "dp": place.dp, "pp": 1},
        "step": snapshot.step,
        "files": {s["file"]: s["sha256"] for s in said},
        "tensors": tensors,
        "own": {s["file"]: s["own"] for s in said},
        "aliases": snapshot.aliases,
        "optimizer": snapshot.optimizer,
        "extra": snapshot.extra,
    }


def _marked(name: str, entry: Entry, said: list[dict[str, Any]]) -> Entry:
    """The entry, which says so when ranks that should hold the same hold something else."""
    seen: dict[Any, str] = {}
    for rank, one in enumerate(said):
        digest = one["replicas"].get(name)
        key = None if entry.dim is None else entry.runs_of(rank, len(said))
        if digest is not None and seen.setdefault(key, digest) != digest:
            return replace(entry, replicas_differ=True)
    return entry


def few(names: Iterable[str]) -> str:
    """Some of the names, for a message."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest, in the present layout.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer tpkernels wrote it.
    """
    manifest = read_manifest(Path(folder))
    version = manifest.get("version")
    if version not in (1, VERSION) or isinstance(version, (bool, float)):
        raise CheckpointError(
            f"{folder} has layout version {version} and this tpkernels reads 1 to {VERSION}: "
            f"use the tpkernels that wrote it"
        )
    try:
        manifest = _from_version_1(manifest) if version == 1 else manifest
        check_manifest(manifest)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the manifest makes no sense ({error!r})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return manifest


def _from_version_1(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had no replicas, and what belongs to one rank stood among the tensors with the style "rank"."""
    own = {name: said for name, said in old["tensors"].items() if said["style"] == "rank"}
    shared = {name: said for name, said in old["tensors"].items() if name not in own}
    return old | {
        "version": VERSION,
        "layout": {"tp": old["world_size"], "dp": 1, "pp": 1},
        "tensors": shared,
        "own": {file: {"tensors": own, "aggregator": None} for file in old["files"]},
    }


@dataclass
class Source:
    """A checkpoint that is read: its manifest and its files, opened when they are needed."""

    folder: Path
    manifest: dict[str, Any]

    def __post_init__(self) -> None:
        layout = self.manifest["layout"]
        self.tp, self.dp = int(layout["tp"]), int(layout["dp"])
        if layout["pp"] != 1:
            raise CheckpointError(
                f"it was saved by {layout['pp']} stages of a model cut by layer, which this tpkernels does not read"
            )
        self.entries = {name: Entry.from_json(name, said) for name, said in self.manifest["tensors"].items()}
        self._open: dict[str, TensorFile] = {}
        names = set()
        if self.tp * self.dp == len(self.manifest["files"]):
            names = {file_name(rank, self.tp, replica) for replica in range(self.dp) for rank in range(self.tp)}
        if names != set(self.manifest["files"]) or names != set(self.manifest["own"]):
            raise CheckpointError(
                f"the manifest says that {self.tp} ranks of {self.dp} replicas wrote it, and lists "
                f"{', '.join(sorted(self.manifest['files'])) or 'no files'}"
            )

    def check_files(self, number: int = 0, of: int = 1) -> None:
        """Check that the files are those that were written; reads every `of`-th from `number` on.

        Raises:
            CheckpointError: names the file that is missing, damaged, or too many.
        """
        check_folder(self.folder, self.manifest)
        for name in sorted(self.manifest["files"])[number::of]:
            check_file(self.folder, name, self.manifest)

    def file(self, rank: int, replica: int = 0) -> TensorFile:
        """The file of a rank, with the tensors that the manifest says it holds."""
        name = file_name(rank, self.tp, replica)
        if name not in self._open:
            file = TensorFile(self.folder / name)
            expected = {key: (t["dtype"], tuple(t["shape"])) for key, t in self.own(rank, replica).items()}
            if replica == 0:
                for key, entry in self.entries.items():
                    dtype = str(entry.dtype).removeprefix("torch.")
                    expected[key] = (dtype, entry.part_shape(rank, self.tp))
            if differ := sorted(expected.keys() ^ set(file.names)):
                raise damaged(file.path, f"its tensors are not those of the manifest: {', '.join(differ[:3])}")
            for key, (dtype, shape) in expected.items():
                got = (str(file.dtype(key)).removeprefix("torch."), file.shape(key))
                if got != (dtype, shape):
                    raise damaged(file.path, f"{key} is {got[0]} {list(got[1])}, expected {dtype} {list(shape)}")
            self._open[name] = file
        return self._open[name]

    def own(self, rank: int, replica: int) -> dict[str, dict[str, Any]]:
        """What the manifest says of the tensors that belong to a rank alone."""
        found: dict[str, dict[str, Any]] = self.manifest["own"][file_name(rank, self.tp, replica)]["tensors"]
        return found

    def reader(self, key: str) -> Read:
        """Reads ranges of a tensor out of the file of a rank."""
        return lambda rank, *ranges: self.file(rank).read(key, *ranges)

    def own_tensors(self, rank: int, replica: int, kind: str) -> dict[str, Tensor]:
        """Copies of the tensors of a kind ("rng", "aggregator") that belong to a rank alone, without the kind."""
        keys = [key for key in self.own(rank, replica) if key.startswith(f"{kind}/")]
        return {key.partition("/")[2]: self.file(rank, replica).read(key).clone() for key in keys}

    def aggregator_numbers(self, rank: int, replica: int) -> Any:
        """What the aggregator of a rank said besides tensors; None when none was saved."""
        return self.manifest["own"][file_name(rank, self.tp, replica)]["aggregator"]

    def warn_of_replicas(self) -> None:
        """Say which tensors were not the same on all ranks that should hold the same."""
        differ = [name.removeprefix("model/") for name, entry in self.entries.items() if entry.replicas_differ]
        if differ:
            warnings.warn(
                f"{self.folder}: the ranks that saved it did not hold the same bits of {few(differ)}; the first that "
                f"holds each is taken",
                stacklevel=4,
            )

    def rng(self, rank: int, replica: int) -> dict[str, Tensor]:
        """The random numbers of a rank, also of one that was not there when the checkpoint was saved.

        Rank t of replica d takes those of rank t modulo tp of replica d modulo dp. When replicas were added and the
        saved ones drew different numbers, an added one gets numbers of its own, derived from these and its place.
        """
        state = self.own_tensors(rank % self.tp, replica % self.dp, "rng")
        if replica >= self.dp > 1:
            first, second = (self.own_tensors(rank % self.tp, d, "rng") for d in (0, 1))
            if not torch.equal(first["cpu"], second["cpu"]):
                text = state["cpu"].numpy().tobytes() + replica.to_bytes(8, "little")
                seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
                state["cpu"] = torch.Generator().manual_seed(seed).get_state()
        return state

"""Resharding: writes the files that another number of ranks would have saved, one tensor at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpkernels.checkpoint.files import TensorWriter, write_manifest
from tpkernels.checkpoint.manifest import Source, kind_of, read
from tpkernels.checkpoint.ranks import file_name
from tpkernels.checkpoint.regions import Entry, read_part
from tpkernels.checkpoint.residuals import Residuals
from tpkernels.checkpoint.staging import StagingFolder, refuse_existing
from tpkernels.errors import CheckpointError
from tpkernels.shard import Runs


def reshard(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    tp: int | None = None,
    dp: int | None = None,
    pp: int | None = None,
) -> Path:
    """Write a checkpoint anew for another number of ranks: the tensors that these would have saved, bit for bit.

    One process does it; call it on one rank. In memory are one tensor of the new files and one slice of an old one.
    `checkpoint.load` needs no reshard, it reads any checkpoint; resharding once saves every later load its slicing.

    Args:
        src: a checkpoint. All of it is checked first.
        dst: the new checkpoint's folder; must not exist yet.
        tp: ranks that each replica is to be cut over; None keeps their number.
        dp: number of replicas; None keeps it.
        pp: 1 joins the stages of a pipeline; None keeps them. `load` reads the files of any stages into any others.

    Returns:
        dst, on the disk and complete. Where the rule of shard.py cut a tensor, the new parts are those of the
        rule. Where ranks listed their runs (packed projections, shared heads), from which no other number of ranks
        follows, the new parts are plain ones; `load` reads them into any cut.

    Raises:
        CheckpointError: src is no checkpoint or damaged (named), dst exists, or the disk is full.
    """
    source_folder, final = Path(src), Path(dst)
    try:
        return _reshard(source_folder, final, tp, dp, pp)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"reshard {source_folder} to {final}: {error}") from None


def _reshard(source_folder: Path, final: Path, tp: int | None, dp: int | None, pp: int | None) -> Path:
    source = Source(source_folder, read(source_folder))
    tp, dp = source.tp if tp is None else tp, source.dp if dp is None else dp
    if tp < 1 or dp < 1:
        raise CheckpointError(f"tp and dp must be 1 or more, got tp={tp}, dp={dp}")
    pp = source.pp if pp is None else pp
    if pp not in (1, source.pp):
        raise CheckpointError(f"pp must be 1 or that of the checkpoint, {source.pp}, got {pp}: `load` reads into any")
    refuse_existing(final)
    source.check_files()
    entries = {name: replace(e, flat=None) for name, e in source.entries.items()}  # the first replica has all of it
    if tp != source.tp:
        source.warn_of_replicas()
        entries = {name: replace(e, runs=None, replicas_differ=False) for name, e in entries.items()}
    if pp != source.pp:
        entries = {name: replace(e, stage=0) for name, e in entries.items()}
    target = _Target(source, entries, tp, dp, pp)
    manifest = dict(source.manifest) | {
        "layout": {"tp": tp, "dp": dp} | ({"pp": pp} if pp > 1 else {}),
        "tensors": {name: entry.to_json() for name, entry in entries.items()},
        "files": {},
        "own": {},
    }
    with StagingFolder(final) as staging:
        for stage, replica, rank in product(range(pp), range(dp), range(tp)):
            name = file_name(rank, tp, replica, stage, pp)
            manifest["files"][name], manifest["own"][name] = target.write(staging.path / name, rank, replica, stage)
        write_manifest(staging.path, manifest)
        staging.publish()
    return final


@dataclass
class _Target:
    """The new checkpoint: how its tensors are cut."""

    source: Source
    entries: dict[str, Entry]
    tp: int
    dp: int
    pp: int

    def write(self, path: Path, rank: int, replica: int, stage: int) -> tuple[str, dict[str, Any]]:
        """Write the file of a rank; its digest, and the entry of the manifest about the rank's own tensors."""
        own = {f"rng/{key}": value for key, value in self.source.rng(rank, replica, stage).items()}
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}
        described: dict[str, Any] = {"aggregator": None}
        residuals: Residuals | None = None
        if self.source.aggregator_numbers(0, 0) is not None:
            only = stage if self.pp > 1 else None
            residuals = Residuals(self.source, rank, self.tp, replica, self.dp, self._cuts(rank), stage=only)
            described["aggregator"] = residuals.numbers()
            layout |= {f"aggregator/{name}": kind for name, kind in residuals.layout().items()}
        described["tensors"] = {name: kind_of(*kind) for name, kind in layout.items()}
        if replica == 0:
            mine = {name: e for name, e in self.entries.items() if e.stage == stage}
            layout = {name: (e.dtype, e.part_shape(rank, self.tp)) for name, e in mine.items()} | layout
        with TensorWriter(path, layout) as writer:
            for name in writer.names:
                if name in own:
                    writer.add(name, own[name])
                elif residuals is not None and name.startswith("aggregator/"):
                    writer.add(name, residuals.tensor(name.partition("/")[2]))
                else:
                    writer.add(name, self._part(name, rank))
            return writer.finish(), described

    def _cuts(self, rank: int) -> dict[str, tuple[int | None, Runs]]:
        """What the rank holds of each tensor of the model."""
        found = {
            name.partition("/")[2]: (e.dim, () if e.dim is None else e.runs_of(rank, self.tp))
            for name, e in self.entries.items()
            if name.startswith("model/")
        }
        copies = self.source.manifest["aliases"].items() if self.pp > 1 else ()
        return found | {second: found[first] for second, first in copies}

    def _part(self, name: str, rank: int) -> Tensor:
        entry = self.entries[name]
        out = torch.empty(entry.part_shape(rank, self.tp), dtype=entry.dtype)
        runs = () if entry.dim is None else entry.runs_of(rank, self.tp)
        first = self.source.first_rank(rank, self.tp)
        read_part(self.source.entries[name], self.source.tp, self.source.reader(name), entry.dim, runs, out, first)
        return out

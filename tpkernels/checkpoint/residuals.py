"""The state of a GradAggregator in a checkpoint: saved by every rank of every replica, and resharded for others.

Its tensors are called "<kind>.<parameter>" and have the parameter's shape, so they are cut like it. For another number
of replicas the rule of `data_parallel.state.reshard_state` is applied to one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpkernels.checkpoint.manifest import Source
from tpkernels.checkpoint.regions import Entry, Read, read_part
from tpkernels.data_parallel.state import OWN, AggregatorState, reshard_state
from tpkernels.errors import CheckpointError
from tpkernels.shard import Runs, run_size


@dataclass(frozen=True)
class Residuals:
    """The state for rank `rank` of `tp` of replica `replica` of `dp`.

    Args:
        source: the checkpoint.
        cuts: the part of each parameter that this rank holds, as (dim, runs).
        some: whether `cuts` has the parameters of some stages only, so that the state of others is left out.
        stage: the stage of the source to read from; None: all.

    Raises:
        CheckpointError: none was saved, or the saved state fits no other number of ranks.
    """

    source: Source
    rank: int
    tp: int
    replica: int
    dp: int
    cuts: Mapping[str, tuple[int | None, Runs]]
    some: bool = False
    stage: int | None = None

    def numbers(self) -> dict[str, Any]:
        """The numbers of the state.

        Raises:
            CheckpointError: no state was saved, or it fits no other number of replicas.
        """
        order: list[str] = []
        for stage in self._stages:
            saved = [self.source.aggregator_numbers(self._old_rank, q, stage) for q in range(self.source.dp)]
            if any(n is None for n in saved):
                raise CheckpointError("it holds no state of an aggregator: load it without one")
            try:
                found = reshard_state([{"tensors": {}, "numbers": n} for n in saved], self.dp)[self.replica]["numbers"]
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            order += [name for name in found["order"] if name in self.cuts or not self.some]
        return found | {"order": order}

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return {
            name: (getattr(torch, self.source.own(self._old_rank, 0, stage)[f"aggregator/{name}"]["dtype"]), shape)
            for name, stage in self._names.items()
            for shape in (self._cut(name)[2],)
        }

    @property
    def _stages(self) -> list[int]:
        return list(range(self.source.pp)) if self.stage is None else [self.stage]

    @property
    def _names(self) -> dict[str, int]:
        """The tensors of this rank, with the stage that saved each."""
        found: dict[str, int] = {}
        for stage in self._stages:
            for key in self.source.own(self._old_rank, 0, stage):
                kind, _, name = key.partition("/")
                if kind == "aggregator" and (not self.some or name.partition(".")[2] in self.cuts):
                    found.setdefault(name, stage)
        return found

    def tensor(self, name: str) -> Tensor:
        """One of the tensors; besides it, memory holds at most another of its size and a slice."""
        entry, (dim, runs, shape) = self._entry(name), self._cut(name)
        first = self.source.first_rank(self.rank, self.tp)
        total = torch.zeros(shape, dtype=self.layout()[name][0])
        old = [0] if name.partition(".")[0] not in OWN else list(range(self.replica, self.source.dp, self.dp))
        if self.dp == self.source.dp:
            old = [self.replica]
        for q in old:
            part = torch.empty_like(total) if len(old) > 1 else total
            read_part(entry, self.source.tp, self._reader(q, name), dim, runs, part, first)
            if part is not total:
                total += part
        return total

    def state(self) -> AggregatorState:
        """Tensors and numbers."""
        return {"tensors": {name: self.tensor(name) for name in self.layout()}, "numbers": self.numbers()}

    @property
    def _old_rank(self) -> int:
        return self.rank % self.source.tp

    def _entry(self, name: str) -> Entry:
        parameter = name.partition(".")[2]
        key = f"model/{self.source.manifest['aliases'].get(parameter, parameter)}"
        if key not in self.source.entries:
            raise CheckpointError(f"it holds the aggregator's state of {parameter}, which is no parameter of the model")
        return self.source.entries[key]

    def _cut(self, name: str) -> tuple[int | None, Runs, tuple[int, ...]]:
        """The part of a tensor that this rank holds: dim, runs, and its shape."""
        entry, parameter = self._entry(name), name.partition(".")[2]
        if parameter not in self.cuts:
            raise CheckpointError(f"it holds the aggregator's state of {parameter}, which the model lacks")
        dim, runs = self.cuts[parameter]
        shape = list(entry.shape)
        if dim is not None:
            shape[dim] = run_size(runs)
        return dim, runs, tuple(shape)

    def _reader(self, replica: int, name: str) -> Read:
        stage = self._names[name]
        return lambda rank, *ranges: self.source.file(rank, replica, stage).read(f"aggregator/{name}", *ranges)

"""Checkpoints of a Trainer whose model is sharded, in the format of tpkernels.checkpoint.

The Trainer's own would be files that all ranks write under the same name. A checkpoint has the model, the optimizer and
the random numbers of torch; the state of the Trainer and of its scheduler are in its `extra`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tpkernels import checkpoint, layers
from tpkernels.checkpoint.staging import remove
from tpkernels.comm.group import Group

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # the real one follows in the class that this is mixed into

STEP = "checkpoint-"  # and the step: the names of checkpoints
STATE = "trainer_state.json"  # the name under which a Trainer reads its state


class CheckpointMixin(Base):
    """Saves and loads for a Trainer.

    Attributes:
        tpk_group: the ranks that the model is sharded over.
        tpk_dp_group: the ranks that hold the same shards of other replicas; None when there is one replica.
        tpk_place: this rank among both; None until they are set.
    """

    accelerator: Any
    model: Any
    args: Any
    state: Any
    processing_class: Any
    tpk_group: Group
    tpk_dp_group: Group | None = None
    tpk_place: Any = None  # checkpoint.ranks.CheckpointRanks
    tpk_rng_state: dict[str, Tensor] | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a plain Hugging Face folder. Collective."""
        folder = output_dir or self.args.output_dir
        with self.tpk_place.together(f"save {folder}"):
            if self.tpk_place.replica == 0:
                self.model.save_pretrained(folder)
            if self.tpk_place.is_first and self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        from transformers.trainer_callback import ExportableState

        self.store_flos()
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept, name = self.state.stateful_callbacks, type(callback).__name__
                kept[name] = [*kept[name], callback.state()] if isinstance(kept[name], list) else callback.state()
        step, best = self.state.global_step, self.state.best_global_step
        if best and (best == step or os.path.isdir(self._checkpoint_of(best))):
            self.state.best_model_checkpoint = self._checkpoint_of(best)
        extra = {
            "trainer_state": json.loads(json.dumps(dataclasses.asdict(self.state))),
            "scheduler": scheduler_state(self.lr_scheduler),
            "sequences": self._sequences(),
        }
        folder = checkpoint.save(
            self.model,
            self._checkpoint_of(step),
            group=self.tpk_group,
            dp_group=self.tpk_dp_group,
            optimizer=_plain(self.optimizer),
            step=step,
            extra=self.tpk_place.gather(extra)[0],  # a Trainer's state differs by rank: it has is_world_process_zero
        )
        with self.tpk_place.together(f"save {folder}"):
            if self.tpk_place.is_first and (self.args.save_total_limit or 0) > 0:
                checkpoint.prune(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _checkpoint_of(self, step: int) -> str:
        return os.path.join(self.args.output_dir, f"{STEP}{step:08d}")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """By the metrics of the first rank, so that all ranks save, and stop, alike."""
        return bool(super()._determine_best_metric(self.tpk_place.gather(metrics)[0], trial))

    def _load_best_model(self) -> None:
        """Load the model of the best checkpoint; the random numbers stay as they are."""
        folder, random = self.state.best_model_checkpoint, layers.rng_state()
        checkpoint.load(self.model, folder, group=self.tpk_group, dp_group=self.tpk_dp_group)
        layers.set_rng_state(random)
        with self.tpk_place.together(f"load {folder}"):
            if self.tpk_place.is_first and self.args.save_total_limit == 1:
                # The Trainer would do this next, on every rank at once.
                for other in Path(self.args.output_dir).glob(f"{STEP}*"):
                    if other != Path(folder):
                        remove(other)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        """Write STATE, which the Trainer reads next. The rest is loaded once there is an optimizer, and STATE removed.

        Raises:
            CheckpointError: it cannot be read, or a step is of another number of sequences than when it was saved.
        """
        with self.tpk_place.together(f"load {folder}"):
            extra, path = checkpoint.peek(folder)["extra"], os.path.join(folder, STATE)
            before, now = extra.get("sequences"), self._sequences()
            if before not in (None, now) and not self.args.ignore_data_skip:
                raise checkpoint.CheckpointError(
                    f"a step was of {before} sequences when it was saved, and is of {now} now, so that the data would "
                    f"go on elsewhere: change batch or accumulation, or set ignore_data_skip=True"
                )
            if self.tpk_place.is_first:
                with open(path + ".new", "w") as file:
                    json.dump(extra["trainer_state"], file, indent=2, sort_keys=True)
                os.replace(path + ".new", path)

    def _sequences(self) -> int:
        """Sequences of a step, over all replicas."""
        return int(self.get_total_train_batch_size(self.args))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        self.tpk_place.gather(None)  # every rank has read STATE
        with self.tpk_place.together(f"load {folder}"):
            if self.tpk_place.is_first:
                os.remove(os.path.join(folder, STATE))  # a checkpoint holds what its save wrote, and nothing else
        found = checkpoint.load(
            self.model, folder, group=self.tpk_group, dp_group=self.tpk_dp_group, optimizer=_plain(self.optimizer)
        )
        load_scheduler(self.lr_scheduler, found.extra["scheduler"])
        self.tpk_rng_state = layers.rng_state()  # set again after the batches before the checkpoint have been skipped

    def _load_rng_state(self, folder: str | None) -> None:
        if self.tpk_rng_state is not None:
            layers.set_rng_state(self.tpk_rng_state)


def _plain(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate has wrapped it."""
    return getattr(optimizer, "optimizer", optimizer)


def scheduler_state(scheduler: Any) -> Any:
    """Return the state of a scheduler for JSON, whose keys are text: a mapping with other keys as a list of pairs."""
    return _pairs(scheduler.state_dict())


def load_scheduler(scheduler: Any, state: Any) -> None:
    """Give a scheduler the state that `scheduler_state` returned."""
    found = _unpaired(state)
    for name, value in found.items():
        if isinstance(getattr(scheduler, name, None), Counter):  # the milestones of MultiStepLR
            found[name] = Counter(value)
    scheduler.load_state_dict(found)


def _pairs(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = [[key, _pairs(inner)] for key, inner in value.items()]
        return dict(items) if all(isinstance(key, str) for key, _ in items) else {"pairs": items}
    return [_pairs(inner) for inner in value] if isinstance(value, list | tuple) else value


def _unpaired(value: Any) -> Any:
    if isinstance(value, dict):
        items = value["pairs"] if value.keys() == {"pairs"} else value.items()
        return {key: _unpaired(inner) for key, inner in items}
    return [_unpaired(inner) for inner in value] if isinstance(value, list) else value

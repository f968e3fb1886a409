"""The accelerator of a tensor-parallel Trainer: clips by the norm over all ranks, shards data over the replicas."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, clip_grad_norm_


class AcceleratorMixin:
    """The differences of the Accelerator of one rank; to be mixed in before an Accelerator class.

    Attributes:
        tpk_group: the ranks that a replica is sharded over.
        tpk_dp_group: the ranks that hold the same shards of other replicas; None when there is one replica.
        tpk_aggregator: averages the gradients of the replicas; set while a Trainer trains.
        tpk_shards_data: whether data loaders take this replica's batches only.
    """

    tpk_group: Group
    tpk_dp_group: Group | None
    tpk_aggregator: GradAggregator | None = None
    tpk_shards_data = False

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that their norm over all ranks is at most max_norm; the norm before."""
        return clip_grad_norm_(list(parameters), max_norm, groups=self.tpk_group, norm_type=norm_type)

    def no_sync(self, model: Any = None) -> Any:
        """A context in which the gradients of a backward are added up and not yet averaged."""
        if self.tpk_aggregator is None:
            return super().no_sync(model)  # type: ignore[misc]
        return self.tpk_aggregator.no_sync()

    def prepare_data_loader(self, data_loader: Any, device_placement: bool | None = None, **kwargs: Any) -> Any:
        """A data loader for this device, of this replica's batches where `tpk_shards_data` is set."""
        from accelerate.data_loader import prepare_data_loader

        accelerator: Any = self
        if self.tpk_dp_group is None or not self.tpk_shards_data:
            return super().prepare_data_loader(data_loader, device_placement, **kwargs)  # type: ignore[misc]
        made = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=self.tpk_dp_group.world_size,
            process_index=self.tpk_dp_group.rank,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            dispatch_batches=False,
            use_seedable_sampler=True,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(made)
        return made


def mix_in(mixin: type[Any], instance: Any) -> None:
    """Change the class of an instance to one of (mixin, its class), unless it has the mixin."""
    if not isinstance(instance, mixin):
        base = type(instance)
        own = {"__module__": base.__module__, "__doc__": base.__doc__}
        instance.__class__ = type(f"TensorParallel{base.__name__}", (mixin, base), own)

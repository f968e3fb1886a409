"""Pipeline parallelism: a model split by layers, and schedules of torch.distributed.pipelining that run the stages."""

from __future__ import annotations

from tpkernels.pipeline.flights import Flights
from tpkernels.pipeline.schedule import Pipeline
from tpkernels.pipeline.split import split_by_layer
from tpkernels.pipeline.stages import HeldStages, Split, Stage, take_stages

__all__ = ["Flights", "HeldStages", "Pipeline", "Split", "Stage", "split_by_layer", "take_stages"]

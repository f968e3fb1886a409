"""The time of one training step of a recipe, put together from the terms."""

from __future__ import annotations

from dataclasses import dataclass

from tpkernels.planner.hardware import Cluster
from tpkernels.planner.memory import parameters_of_rank
from tpkernels.planner.recipe import WIRE_BYTES, Job, Recipe
from tpkernels.planner.terms import (
    LayerTime,
    all_reduce_s,
    grad_codec_s,
    head_s,
    layer_s,
    memory_s,
    optimizer_s,
    send_s,
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the rank that takes longest.

    Attributes:
        compute: products, attention, pointwise work, the head, and the host's launches beside them.
        tensor: sums over tp that nothing hides.
        pipeline: messages between stages.
        data: gradients, and with ZeRO parameters, over dp that nothing hides.
        bubble: waiting for the first micro-batch, and for others after the last.
        optimizer: of the rank's share.
    """

    compute: float
    tensor: float
    pipeline: float
    data: float
    bubble: float
    optimizer: float

    @property
    def communication(self) -> float:
        """All communication that is exposed."""
        return self.tensor + self.pipeline + self.data

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.communication + self.bubble + self.optimizer


def step_s(cluster: Cluster, job: Job, recipe: Recipe) -> StepTime:
    """Return the time of one step.

        n (stage + head + 2 sends) + (pp - 1) / virtual (stage + 2 sends) + gradients + optimizer

    with n micro-batches and ceil(layers / pp) layers of a stage: the last stage, which has the head, is always busy,
    and waits for the others at the start and at the end (1F1B, Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
    """
    value = cluster.device.value_bytes
    part = recipe.slice(job, value)
    return assemble(cluster, job, recipe, layer_s(cluster, job.shape, part), head_s(cluster, job.shape, part))


def assemble(cluster: Cluster, job: Job, recipe: Recipe, layer: LayerTime, head: LayerTime) -> StepTime:
    """Return `step_s` from the time of one layer and of the head, which many recipes share."""
    r, device = recipe, cluster.device
    n, layers = r.micro_batches(job), -(-job.shape.layers // r.pp)
    sends = 0.0
    if r.pp > 1:
        # Each of the tp ranks sends its part; the ranks of the next stage gather them inside their node.
        size = device.value_bytes * r.micro_batch * job.sequence * job.shape.hidden / min(r.tp, cluster.per_node)
        sends = 2 * r.virtual * send_s(cluster, size, r.tp * r.dp, r.pp)
    stage = layers * layer.total
    mine = parameters_of_rank(job.shape, r)
    return StepTime(
        compute=n * (layers * layer.compute + head.compute),
        tensor=n * (layers * layer.communication + head.communication),
        pipeline=n * sends,
        data=data_parallel_s(cluster, job, r, mine, n * layers * layer.compute),
        bubble=(r.pp - 1) / r.virtual * (stage + sends),
        optimizer=optimizer_s(device, mine / (r.dp if r.zero else 1)),
    )


def data_parallel_s(cluster: Cluster, job: Job, recipe: Recipe, mine: float, compute: float) -> float:
    """Return the exposed time of the exchange between replicas.

    An all-reduce of a rank's gradients; ZeRO-1 and 2 have a reduce-scatter of gradients and, after the update, an
    all-gather of parameters instead, as many bytes; ZeRO-3 gathers the parameters for the forward and the backward of
    every micro-batch and sums gradients after each, half as much again. With `overlap`, what fits of the gradients
    beside the backward of the last micro-batch, and of the parameters beside the forward of the first, is hidden
    (ZeRO-3: of everything beside everything), but neither those of the first layer, which come last and are wanted
    first, nor the rank's own work: codecs, and copies into messages and out of them, with ZeRO of parameters, too.

    Args:
        mine: parameters of the rank.
        compute: seconds of the layers of all micro-batches.
    """
    r = recipe
    if r.dp == 1:
        return 0.0
    n, value = r.micro_batches(job), cluster.device.value_bytes
    wire = min(WIRE_BYTES[r.grad_codec] or value, value)
    average, gather = all_reduce_s(cluster, mine * wire, r.dp, r.tp), 0.0
    if r.zero:  # a reduce-scatter and an all-gather are half an all-reduce each
        average, gather = average / 2, all_reduce_s(cluster, mine * value, r.dp, r.tp) / 2
    moved = memory_s(cluster.device, cluster.device.average_bytes * mine * (1 + 1 / r.dp if r.zero else 1))
    if wire < value:
        moved += grad_codec_s(cluster.device, r.grad_codec, mine * value)
    if r.zero == 3:
        return max(0.0, 1.5 * n * (average + gather) - (compute if job.overlap else 0.0)) + n * moved
    if not job.overlap:
        return average + gather + moved
    first = 1 / -(-job.shape.layers // r.pp)
    return (
        max(first * average, average - 2 / 3 * compute / n) + max(first * gather, gather - 1 / 3 * compute / n) + moved
    )

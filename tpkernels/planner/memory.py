"""The memory of the rank that needs most: the one of the first stage, or of the last."""

from __future__ import annotations

from dataclasses import dataclass

from tpkernels.planner.hardware import Cluster
from tpkernels.planner.recipe import Job, Recipe
from tpkernels.planner.shape import Shape

FULLEST = 0.95  # of the memory that may be planned for: allocators leave fragments


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    arena: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.arena


def parameters_of_rank(shape: Shape, recipe: Recipe) -> float:
    """Return the parameters of the fullest rank: its layers, and the table of a first or last stage."""
    layers = -(-shape.layers // recipe.pp)
    tables = shape.table_parameters if recipe.pp == 1 else shape.vocab * shape.hidden
    tp = recipe.tp
    width = shape.own_heads(tp) + 2 * shape.own_kv_heads(tp) + shape.own_heads(tp)
    experts = shape.own_experts(tp) * shape.experts + shape.shared / tp
    layer = shape.hidden * width * shape.head_dim + experts * shape.expert_parameters
    return layers * layer + tables / tp


def activation_values(shape: Shape, job: Job, recipe: Recipe) -> float:
    """Return the values that one layer keeps of one micro-batch for its backward.

    The count of Korthikanti et al. 2022 (arXiv:2205.05198, section 4), there in bytes of 16-bit values: 10 of the
    hidden width that every tp rank keeps (cut by sequence parallel), 24 that are cut by tp, and 5 a score.
    """
    tokens, r = recipe.micro_batch * job.sequence, recipe
    hidden, heads = float(shape.hidden), shape.own_heads(r.tp)
    replicated = 5.0 * hidden
    if r.recompute == "full":
        return tokens * hidden / (r.tp if r.sequence_parallel else 1)
    attention = 2.0 * shape.head_dim * (heads + shape.own_kv_heads(r.tp))
    inner = (3 if shape.gated else 2) * shape.ffn * (shape.active + shape.shared)
    own = attention + inner / r.tp
    scores = 0.0 if job.flash or r.recompute == "selective" else 2.5 * heads * job.sequence
    return tokens * (replicated / (r.tp if r.sequence_parallel else 1) + own + scores)


def memory_of(cluster: Cluster, job: Job, recipe: Recipe, arena_bytes: float) -> Memory:
    """Return what the fullest rank needs.

    Mixed precision: 2 bytes a parameter, 4 a gradient (sums of micro-batches are fp32), 12 of AdamW (a copy of the
    parameter and two moments in fp32); in fp32 4, 4 and 8. The first of pp stages keeps the activations of pp
    micro-batches (interleaved: 1 + (pp - 1) / (pp virtual) times as many, as in Korthikanti et al. 2022), and full
    recomputation those of one layer beside the inputs of all. The logits of one micro-batch are kept as values and
    twice in fp32. Where replicas copy gradients into messages (`average_bytes`), these are as large, and so is what
    comes back, except in ZeRO-2.
    """
    r, shape, value = recipe, job.shape, cluster.device.value_bytes
    mine = parameters_of_rank(shape, r)
    state = 8 if value == 4 else 12
    in_flight = min(r.pp, r.micro_batches(job))
    kept = in_flight * -(-shape.layers // r.pp) * activation_values(shape, job, r)
    if r.virtual > 1:
        kept *= 1 + (r.pp - 1) / (r.pp * r.virtual)
    if r.recompute == "full":
        whole = Recipe(r.tp, r.pp, r.dp, r.micro_batch, r.sequence_parallel)
        kept += activation_values(shape, job, whole)
    messages = (8 if r.zero < 2 else 4) * mine if r.dp > 1 and cluster.device.average_bytes else 0.0
    logits = (value + 8) * r.micro_batch * job.sequence * shape.vocab / r.tp
    return Memory(
        parameters=mine * value / (r.dp if r.zero == 3 else 1),
        gradients=mine * 4 / (r.dp if r.zero >= 2 else 1) + messages,
        optimizer=mine * state / (r.dp if r.zero else 1),
        activations=value * kept + logits,
        arena=arena_bytes,
    )


def most(cluster: Cluster) -> float:
    """Return the bytes of a rank that may be planned for."""
    return FULLEST * (cluster.device.memory - cluster.device.reserved)


def refuse_memory(cluster: Cluster, need: Memory) -> str | None:
    """Return by how much a rank's memory is too small, None if it is not."""
    if need.total <= most(cluster):
        return None
    parts = {"parameters": need.parameters, "gradients": need.gradients, "optimizer state": need.optimizer,
             "activations": need.activations, "arena": need.arena}  # fmt: skip
    largest = max(parts, key=lambda key: parts[key])
    return (
        f"needs {need.total / 2**30:.1f} GiB on a rank, which has {most(cluster) / 2**30:.1f} GiB to plan for; "
        f"{largest} take {parts[largest] / 2**30:.1f} GiB"
    )

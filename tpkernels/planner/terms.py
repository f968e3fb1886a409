"""The terms of the model of time, one function each; docs/planner.md has them as formulas.

Times are seconds, sizes are values or bytes as named, rates are fractions of a device's or link's figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpkernels.planner.hardware import CODEC_PASSES, Cluster, Device
from tpkernels.planner.shape import Shape

TILE = 128 * 128  # outputs of a product that one processor computes at a time
RAMP = 64  # columns of K that a product needs to fill and to drain its pipeline


@dataclass(frozen=True)
class Slice:
    """What one rank computes of one micro-batch.

    Attributes:
        batch: sequences of the micro-batch.
        sequence: tokens of one of them.
        tp: ranks that share each layer.
        sequence_parallel: whether norms, dropout and residuals are cut over the tokens.
        recompute: "none", "selective" (attention) or "full" (the forward of each layer).
        flash: whether attention is one kernel that keeps no matrix of scores.
        value_bytes: of a parameter and of an activation.
        wire_bytes: of a value of a partial sum on the wire.
        codec: that packs it.
    """

    batch: int
    sequence: int
    tp: int
    sequence_parallel: bool = False
    recompute: str = "none"
    flash: bool = False
    value_bytes: float = 2.0
    wire_bytes: float = 2.0
    codec: str = "none"

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.batch * self.sequence

    @property
    def forwards(self) -> int:
        """Forward passes of a layer: two if it is recomputed."""
        return 2 if self.recompute == "full" else 1


def gemm_s(device: Device, M: float, N: float, K: float, batch: float = 1.0) -> float:
    """Return the time of `batch` products [M, K] @ [K, N].

    2 (K + RAMP) (M N batch + P TILE / 2) / (rate x peak): on average half a wave of the P processors has no tile, and
    each tile pays RAMP columns to fill its pipeline.
    """
    outputs = M * N * batch + 0.5 * device.processors * TILE
    return 2.0 * (K + RAMP) * outputs / (device.gemm_rate * device.flops)


def linear_s(device: Device, M: float, N: float, K: float, forwards: int) -> tuple[float, float]:
    """Return the times of a linear's forward passes with its input gradient, and of its weight gradient."""
    return forwards * gemm_s(device, M, N, K) + gemm_s(device, M, K, N), gemm_s(device, N, K, M)


def memory_s(device: Device, size: float) -> float:
    """Return the time to move `size` bytes from and to memory."""
    return size / (device.memory_rate * device.memory_bandwidth)


def attention_s(device: Device, shape: Shape, part: Slice) -> float:
    """Return the time of the products and, unless `flash`, of the matrix of scores of one layer's attention.

    Forward 2 products, backward 4 (with `flash` 5, as the scores are computed again, and half of each product is above
    the diagonal and skipped). The scores are moved 9 bytes a value (softmax 4, dropout 5) in the forward and twice
    that in the backward.
    """
    blocks = part.batch * shape.own_heads(part.tp)
    s, d = part.sequence, shape.head_dim
    forwards = 1 if part.recompute == "none" else 2
    if part.flash:
        products = 2 * (forwards if part.recompute == "full" else 1) + 5
        return products * blocks * s * s * d / (device.flash_rate * device.flops)
    scores, values = gemm_s(device, s, s, d, blocks), gemm_s(device, s, d, s, blocks)
    traffic = (2 + forwards) * 4.5 * part.value_bytes * blocks * s * s
    return (1 + forwards) * scores + (3 + forwards) * values + memory_s(device, traffic)


def pointwise_s(device: Device, shape: Shape, part: Slice) -> float:
    """Return the time of norms, dropout, residuals, activations and transposes of one layer.

    Passes of a value of the hidden width in the forward: two norms 4, two of bias, dropout and residual 7 (with half a
    pass for the mask of each); of a rank's own heads and inner width: 6 per head value moved, and 2 (gated 3) of the
    inner width. The backward moves twice that.
    """
    whole = 11.0 * shape.hidden / (part.tp if part.sequence_parallel else 1)
    inner = (3 if shape.gated else 2) * shape.ffn * (shape.active + shape.shared)
    own = 6.0 * shape.own_heads(part.tp) * shape.head_dim + inner / part.tp
    return memory_s(device, (2 + part.forwards) * part.value_bytes * part.tokens * (whole + own))


def all_reduce_s(cluster: Cluster, size: float, ranks: int, stride: int = 1, pause: float = 0.0) -> float:
    """Return the time of an all-reduce of `size` bytes over ranks that are `stride` apart.

    Ring inside a node, and between nodes each byte twice over a node's link, which the groups of a node share:

        latency(n) + max(2 (n - 1) / n size / inside, 2 (nodes - 1) / nodes size groups / between)

    After `pause` seconds without traffic the `burst` of the link between nodes passes at once. A reduce-scatter or an
    all-gather takes half of it.
    """
    if ranks == 1:
        return 0.0
    inside, nodes = cluster.spread(ranks, stride)
    groups = cluster.per_node / inside
    time = cluster.inside.latency(inside)
    ring = 2.0 * (inside - 1) / inside * size / cluster.inside.rate_of(cluster.per_node)
    if nodes == 1:
        return time + ring
    across = 2.0 * (nodes - 1) / nodes * size * groups / cluster.node_bandwidth
    across = max(0.0, across - min(pause, cluster.between.burst / cluster.node_bandwidth))
    return time + cluster.between.latency(nodes) + max(ring, across)


def send_s(cluster: Cluster, size: float, stride: int, pp: int) -> float:
    """Return the time to send `size` bytes from a stage to the next, `stride` ranks away, which computed meanwhile."""
    if stride * pp <= cluster.per_node:
        return cluster.device.send_s + size / cluster.inside.rate_of(cluster.per_node)
    of_node = max(0.0, size * cluster.per_node - cluster.between.burst)
    return cluster.device.send_s + of_node / cluster.node_bandwidth


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer for one micro-batch, forward and backward: `compute` and, not hidden, `communication`."""

    compute: float
    communication: float

    @property
    def total(self) -> float:
        """Both."""
        return self.compute + self.communication


def together(device: Device, work_s: float, host_s: float) -> float:
    """Return the time of a device that works while a host launches: a norm, between their sum and the longer."""
    p = device.launch_norm
    return float((work_s**p + host_s**p) ** (1 / p))


def layer_s(cluster: Cluster, shape: Shape, part: Slice) -> LayerTime:
    """Return the time of a layer: its products, attention, pointwise work and collectives beside the host's launches.

    Two all-reduces in each forward pass and two in the backward; those of the forward may run beside later chunks of
    their own product, those of the backward run beside the weight gradients of the same linears. Ranks that are held
    up by their hosts come late: `skew_s` a collective, times the share of the host.
    """
    device, m, tp = cluster.device, part.tokens, part.tp
    width = shape.own_heads(tp) * shape.head_dim
    blocks = shape.active + shape.shared
    qkv = width + 2 * shape.own_kv_heads(tp) * shape.head_dim
    first, wait_first = linear_s(device, m, qkv, shape.hidden, part.forwards)
    second, wait_second = linear_s(device, m, shape.hidden, width, part.forwards)
    up, wait_up = linear_s(device, m * blocks, shape.up / tp, shape.hidden, part.forwards)
    down, wait_down = linear_s(device, m * blocks, shape.hidden, shape.ffn / tp, part.forwards)
    products = first + second + up + down + wait_first + wait_second + wait_up + wait_down
    compute = products + attention_s(device, shape, part) + pointwise_s(device, shape, part)
    calls = 2 * part.forwards + 2 if tp > 1 else 0
    hops = math.log2(tp)
    host = device.host_layer_s * (2 + part.forwards) / 3 + calls * device.host_call_s * hops
    if tp == 1:
        return LayerTime(together(device, compute, host), 0.0)
    reduce = sum_s(cluster, shape, part, compute / calls)
    exposed = max(0.0, reduce - wait_first) + max(0.0, reduce - wait_up)
    for K in (width, shape.ffn / tp):
        exposed += part.forwards * exposed_s(reduce, gemm_s(device, m, shape.hidden, K), device.sum_chunks)
    exposed += calls * device.skew_s * hops * host / (host + compute + exposed)
    alone = together(device, compute, host)
    return LayerTime(alone, together(device, compute + exposed, host) - alone)


def exposed_s(sum_time: float, product_time: float, chunks: float) -> float:
    """Return what a sum adds to its product when both go in chunks: max + min / chunks - product; all of it if 1."""
    both = max(sum_time, product_time) + min(sum_time, product_time) / chunks
    return both - product_time


def sum_s(cluster: Cluster, shape: Shape, part: Slice, pause: float = 0.0) -> float:
    """Return the time to sum the activations of a micro-batch over the tp ranks, packed or not, after a pause."""
    values = part.tokens * shape.hidden
    time = all_reduce_s(cluster, part.wire_bytes * values, part.tp, pause=pause)
    packed = part.tp > 1 and part.wire_bytes < part.value_bytes
    return time + codec_s(cluster.device, part.codec, part.value_bytes * values) if packed else time


def codec_s(device: Device, codec: str, size: float) -> float:
    """Return the time to pack `size` bytes of values, and to unpack and sum as many."""
    return memory_s(device, device.codec_passes.get(codec, CODEC_PASSES) * size)


def grad_codec_s(device: Device, codec: str, size: float) -> float:
    """Return the time to pack `size` bytes of gradients with what packing lost before, and to unpack and sum them."""
    passes = device.grad_codec_passes.get(codec)
    return codec_s(device, codec, size) if passes is None else memory_s(device, passes * size)


def head_s(cluster: Cluster, shape: Shape, part: Slice) -> LayerTime:
    """Return the time of the embedding, the head and the loss for one micro-batch, forward and backward.

    The loss moves 12 passes of the logits: cast, maximum, exponential, sum, and their gradients. A vocabulary that is
    no multiple of 8 is padded to one where it is cut; where it is not, its products run at `unaligned_rate`. Over tp
    ranks the embedding's rows and the gradient of the head's input are summed: two all-reduces.
    """
    device, columns = cluster.device, shape.vocab / part.tp
    products = sum(linear_s(device, part.tokens, columns, shape.hidden, 1))
    if part.tp == 1 and shape.vocab % 8:
        products /= device.unaligned_rate
    compute = products + memory_s(device, 12 * part.value_bytes * part.tokens * columns) + device.host_head_s
    return LayerTime(compute, 2 * sum_s(cluster, shape, part))


def optimizer_s(device: Device, parameters: float) -> float:
    """Return the time of AdamW in mixed precision for a rank's own parameters: `optimizer_bytes` moved for each."""
    return memory_s(device, device.optimizer_bytes * parameters)

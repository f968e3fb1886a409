"""What a calibration measures on all ranks of this machine at once.

Products are timed as `tpkernels tune` times them (comm/profile.py), by the fastest engine. Everything else is a call
that the ranks begin together; the slowest rank counts, and the fastest of some rounds, as other work makes all slower,
at times some seconds apart.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpkernels import data_parallel, layers, ops
from tpkernels.comm.group import Group
from tpkernels.comm.profile import Product
from tpkernels.planner.recipe import WIRE_BYTES

ROUNDS, PASSES = 5, 3  # of a call, and over all calls: a machine may be slow for some seconds
HEAD_DIM, VOCAB = 64, 256
PIECES = 16  # parameters of a model that is updated


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        rows, widths: M, and N and K, of products.
        layers: (sequences, tokens of a sequence, hidden width) of layers that constants are taken from.
        left_out: of layers that show their error.
        messages: bytes of all-reduces.
        copied, updated: values that are copied, and that AdamW updates.
    """

    rows: tuple[int, ...] = (64, 256, 1024)
    widths: tuple[int, ...] = (256, 1024)
    layers: tuple[tuple[int, int, int], ...] = ((1, 128, 128), (8, 128, 256), (4, 128, 512), (4, 256, 384))
    left_out: tuple[tuple[int, int, int], ...] = ((4, 128, 256), (8, 128, 384))
    messages: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
    copied: int = 32 << 20
    updated: int = 4 << 20


class Layer(nn.Module):
    """A layer of a GPT over a group, of the sizes of `Shape.gpt`."""

    def __init__(self, hidden: int, group: Group) -> None:
        super().__init__()
        self.before, self.between = (layers.LayerNorm(hidden, group=group) for _ in range(2))
        self.qkv = layers.ColumnParallelLinear(hidden, 3 * hidden, unit=3 * HEAD_DIM, group=group)
        self.proj = layers.RowParallelLinear(hidden, hidden, unit=HEAD_DIM, group=group)
        self.up = layers.ColumnParallelLinear(hidden, 4 * hidden, group=group)
        self.down = layers.RowParallelLinear(4 * hidden, hidden, group=group)

    def forward(self, x: Tensor, sequences: int) -> Tensor:
        """x: [tokens, hidden], of so many sequences of one length."""
        qkv: Tensor = self.qkv(self.before(x))
        q, k, v = qkv.view(sequences, len(x) // sequences, -1, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)
        q, k = (turned(each) for each in (q, k))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.proj(heads.reshape(len(x), -1))
        y: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return y


def turned(x: Tensor) -> Tensor:
    """x [..., tokens, head_dim] with rotary embeddings of its positions (Su et al. 2021, arXiv:2104.09864)."""
    angle = torch.arange(x.shape[-2])[:, None] * 1e4 ** -torch.linspace(0, 1, x.shape[-1] // 2)
    a, b = x.chunk(2, -1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)


class Clock:
    """Seconds of calls that the ranks of a group begin together: of the slowest rank, in the fastest round."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, call: Callable[[], object]) -> float:
        """Time a call; all ranks do."""
        call()
        found = []
        for _ in range(ROUNDS):
            self.group.all_gather_ints(0)
            started = time.perf_counter_ns()
            call()
            found.append(max(self.group.all_gather_ints(time.perf_counter_ns() - started)))
        return min(found) / 1e9

    def copy(self, values: int) -> float:
        """Time a copy of fp32 values."""
        source, target = torch.ones(values), torch.empty(values)
        return self(lambda: target.copy_(source))

    def layer(self, size: tuple[int, int, int], group: Group) -> float:
        """Time a layer's forward and backward over a group."""
        sequences, tokens, hidden = size
        made = Layer(hidden, group)
        x = torch.randn(sequences * tokens, hidden, requires_grad=True)

        def call() -> None:
            made(x, sequences).sum().backward()
            made.zero_grad()
            x.grad = None

        return self(call)

    def head(self, tokens: int, hidden: int) -> float:
        """Time an embedding, a head and the loss, forward and backward."""
        table, head = nn.Embedding(VOCAB, hidden), nn.Linear(hidden, VOCAB, bias=False)
        ids = torch.arange(tokens) % VOCAB

        def call() -> None:
            F.cross_entropy(head(table(ids)), ids).backward()  # type: ignore[no-untyped-call]
            table.zero_grad()
            head.zero_grad()

        return self(call)

    def update(self, values: int) -> float:
        """Time the clipping of gradients and a step of AdamW."""
        model = nn.ParameterList(nn.Parameter(torch.zeros(values // PIECES)) for _ in range(PIECES))
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(model, fused=True)

        def call() -> None:
            data_parallel.clip_grad_norm_(model, 1.0, groups=[])
            optimizer.step()

        return self(call)

    def average(self, values: int, codec: str | None) -> float:
        """Time a backward pass that makes so many gradients, with an aggregator unless there is no codec."""
        model = nn.ParameterList(nn.Parameter(torch.zeros(values // PIECES)) for _ in range(PIECES))
        aggregator = None if codec is None else data_parallel.GradAggregator(model, group=self.group, codec=codec)

        def call() -> None:
            torch.stack([parameter.sum() for parameter in model]).sum().backward()  # type: ignore[no-untyped-call]
            if aggregator is not None:
                aggregator.wait()
            for parameter in model:
                parameter.grad = None

        try:
            return self(call)
        finally:
            if aggregator is not None:
                aggregator.close()

    def attention(self, size: tuple[int, int, int]) -> float:
        """Time the attention of a layer alone, forward and backward."""
        sequences, tokens, hidden = size
        q, k, v = (torch.randn(sequences, hidden // HEAD_DIM, tokens, HEAD_DIM, requires_grad=True) for _ in range(3))
        return self(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())  # type: ignore[no-untyped-call]

    def all_reduce(self, size: int, codec: str = "none") -> float:
        """Time an all-reduce of fp32 values, of so many bytes before they are packed."""
        x = torch.ones(size // 4)
        return self(lambda: ops.all_reduce(x, group=self.group, codec=codec))


@dataclass(frozen=True)
class Times:
    """What was measured, in seconds; `Sizes` has the keys.

    Attributes:
        products: (M, N, K) of the fastest engine.
        copy: of `copied` values.
        layers, left_out: over one rank, and with tp over all of them; NaN where those have no whole heads.
        attention: of the layer of the last of `layers`.
        head: of the tokens and width of the second of `layers`.
        update: of clipping and AdamW. average: of an aggregator's gradients, 0 with one rank.
        packed: of the same gradients with each codec.
        messages: all-reduces, empty with one rank.
        codecs: all-reduces of the last but one of `messages`.
        resident: bytes of a rank that has trained a small layer.
    """

    products: Mapping[tuple[int, int, int], float]
    copy: float
    layers: Sequence[tuple[float, float]]
    left_out: Sequence[tuple[float, float]]
    attention: float
    head: float
    update: float
    average: float
    packed: Mapping[str, float]
    messages: Mapping[int, float]
    codecs: Mapping[str, float]
    resident: int


def measure(ranks: Group, alone: Group, sizes: Sizes) -> Times:
    """Measure on all ranks at once; every rank calls this and gets the same.

    Args:
        ranks: all ranks of this machine. alone: this rank.
    """
    clock, several = Clock(ranks), ranks.world_size > 1
    clock.update(PIECES)
    if several:
        clock.average(PIECES, "none")
    clock.layer(sizes.layers[0], alone)
    # With the libraries that a step loads, before large tensors.
    resident = max(ranks.all_gather_ints(_resident_bytes()))
    pairs = itertools.product(sizes.rows, sizes.widths, sizes.widths)
    engines = ranks.measure_engines([Product("float32", *mnk) for mnk in pairs])
    packing = [codec for codec in WIRE_BYTES if codec != "none"] if several else []
    sequences, tokens, hidden = sizes.layers[1]
    calls: dict[object, Callable[[], float]] = {
        "copy": partial(clock.copy, sizes.copied),
        "attention": partial(clock.attention, sizes.layers[-1]),
        "head": partial(clock.head, sequences * tokens, hidden),
        "update": partial(clock.update, sizes.updated),
    }
    for size in (*sizes.layers, *sizes.left_out):
        calls["one", size] = partial(clock.layer, size, alone)
        if several and size[2] // HEAD_DIM >= ranks.world_size:
            calls["many", size] = partial(clock.layer, size, ranks)
    if several:
        calls |= {("message", size): partial(clock.all_reduce, size) for size in sizes.messages}
        calls |= {("codec", codec): partial(clock.all_reduce, sizes.messages[-2], codec) for codec in packing}
        calls |= {("average", codec): partial(clock.average, sizes.updated, codec) for codec in (None, *WIRE_BYTES)}
    best = dict.fromkeys(calls, math.inf)
    for _ in range(PASSES):
        for key, call in calls.items():
            best[key] = min(best[key], call())

    def layer(size: tuple[int, int, int]) -> tuple[float, float]:
        return best["one", size], best.get(("many", size), math.nan)

    def average(codec: str) -> float:
        return max(0.0, best["average", codec] - best["average", None])

    return Times(
        products={(p.M, p.N, p.K): min(us.values()) / 1e6 for p, us in engines.items()},
        copy=best["copy"],
        layers=[layer(size) for size in sizes.layers],
        left_out=[layer(size) for size in sizes.left_out],
        attention=best["attention"],
        head=best["head"],
        update=best["update"],
        average=average("none") if several else 0.0,
        packed={codec: average(codec) for codec in packing},
        messages={size: best["message", size] for size in sizes.messages} if several else {},
        codecs={codec: best["codec", codec] for codec in packing},
        resident=resident,
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

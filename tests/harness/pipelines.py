"""What the tests of pipelines share: a tiny model with tied embeddings, its batches, and training in any shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.parallelize import part_of
from tpkernels import checkpoint, ops, parallelize
from tpkernels.comm.mesh import Mesh, rows_of
from tpkernels.data_parallel import GradAggregator, clip_grad_norm_, replicas_agree, zero_optimizer
from tpkernels.pipeline import HeldStages, Pipeline, split_by_layer, take_stages
from tpkernels.pipeline.batches import labels_that_count

ROWS, STEPS = 8, 3  # rows of a batch of all replicas; steps before and after the checkpoint
CLIP = 0.5


def tiny_llama(layers: int = 4, *, tied: bool = True, seed: int = 0) -> nn.Module:
    """Nine heads that share three keys, and 67 words: neither divides by two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=67, hidden_size=36, intermediate_size=50, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=32, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(step: int, rows: int = ROWS) -> dict[str, Tensor]:
    """Of another length each step; the last tokens of some rows are padding, whose labels do not count."""
    random, length = torch.Generator().manual_seed(step), 5 + step % 4
    ids = torch.randint(1, 67, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(0, rows, 3):
        mask[row, length - 1 - row % 2 :] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


@dataclass(frozen=True)
class Shape:
    """How a model is divided: ranks of each kind, and how they work together."""

    tp: int = 1
    sequence: bool = False
    pp: int = 1
    dp: int = 1
    codec: str = "none"
    accumulate: int = 1
    zero: int = 0

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def id(self) -> str:
        return f"tp{self.tp}{'s' * self.sequence}-pp{self.pp}-dp{self.dp}-{self.codec}-x{self.accumulate}-z{self.zero}"


class Uncut:
    """The whole model in one process, trained on the whole batches."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self.start = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)

    def step(self, number: int, accumulate: int) -> float:
        losses = [self.model(**batch_of(number * accumulate + i)).loss for i in range(accumulate)]
        (torch.stack(losses).sum() / accumulate).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(torch.stack(losses).detach().double().mean())


class Divided:
    """The same model in a shape."""

    def __init__(self, shape: Shape, mesh: Mesh, seed: int, *, first: str = "parallelize") -> None:
        """`first`: which of parallelize and take_stages is called first."""
        self.shape, self.mesh, self.model = shape, mesh, tiny_llama(seed=seed)
        options: dict[str, Any] = {"group": mesh.tp, "sequence_parallel": shape.sequence, "codec": shape.codec}
        split = split_by_layer(self.model, shape.pp) if mesh.pp is not None else None
        stages: HeldStages | None = None
        if first == "parallelize":
            parallelize(self.model, gather_logits=False, **options)
        if split is not None:
            stages = take_stages(self.model, split, mesh.stage)
        if first != "parallelize":
            parallelize(self.model, **options)
        self.aggregator: GradAggregator | None = None
        if mesh.dp is not None:
            self.aggregator = GradAggregator(self.model, group=mesh.dp, codec=shape.codec, zero=shape.zero)
        if self.aggregator is not None and shape.zero:
            self.optimizer = zero_optimizer(torch.optim.SGD, self.aggregator, lr=0.5, momentum=0.9)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.groups: dict[str, Any] = {"group": mesh.tp, "dp_group": mesh.dp, "pp_group": mesh.pp}
        self._stages = stages
        self.pipe: Pipeline | None = None

    def begin(self) -> None:
        """Once the parameters have their values."""
        if self._stages is not None and self.mesh.pp is not None:
            self.pipe = Pipeline(
                self._stages, group=self.mesh.pp, micro_batches=3, codec=self.shape.codec, aggregator=self.aggregator
            )

    def step(self, number: int) -> float:
        """One step of the optimizer; the loss of the whole batches."""
        losses, dp, last = [], self.mesh.dp, self.shape.accumulate - 1
        for i in range(self.shape.accumulate):
            whole = batch_of(number * self.shape.accumulate + i)
            rows = range(ROWS) if dp is None else rows_of(ROWS, dp)
            mine = {name: x[rows.start : rows.stop] for name, x in whole.items()}
            share = labels_that_count(self.model, mine) / labels_that_count(self.model, whole) * self.shape.dp
            if self.aggregator is not None and i < last:
                with self.aggregator.no_sync():
                    loss = self._pass(mine, share / self.shape.accumulate)
            else:
                loss = self._pass(mine, share / self.shape.accumulate)
            losses.append(loss.detach().double().reshape(1) * share)
        if self.aggregator is not None:
            self.aggregator.wait()
        if self.pipe is not None:
            self.pipe.sum_tied()
        tied = [] if self.pipe is None else self.pipe.tied_copies
        clip_grad_norm_(self.model, CLIP, groups=[self.mesh.tp], pipeline=self.mesh.pp, tied=tied)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = torch.stack(losses).mean(0)
        return float(mean if dp is None else ops.all_reduce(mean, group=dp, op="avg"))

    def _pass(self, batch: dict[str, Tensor], scale: float) -> Tensor:
        if self.pipe is not None:
            return self.pipe.step(scale=scale, **batch)
        loss: Tensor = self.model(**batch).loss
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss

    def close(self) -> None:
        """Replicas and copies of tied parameters must still be equal."""
        if self.aggregator is not None:
            self.aggregator.close()
        replicas_agree(self.model, mesh=self.mesh).check()


def compare(divided: Divided, uncut: Uncut, label: str, tolerance: float) -> float:
    """Every parameter of this rank, against the change that the uncut model has made; the largest share of that."""
    worst = 0.0
    others, starts = (dict(m.named_parameters(remove_duplicate=False)) for m in (uncut.model, uncut.start))
    for name, parameter in divided.model.named_parameters():
        want = others[name].detach()
        change = float((want - starts[name]).abs().max())
        error = float((parameter.detach() - part_of(parameter, want)).abs().max()) if parameter.numel() else 0.0
        rounding = 4 * STEPS * 2.0**-24 * float(want.abs().max())  # of the values themselves, twice a step
        assert error <= tolerance * change + rounding, f"{label}: {name} is off by {error} of a change of {change}"
        worst = max(worst, error / change if change else 0.0)
    return worst


EVERY = [
    Shape(tp, sequence, pp, dp, codec, accumulate, zero)
    for (tp, sequence), pp, (dp, zero), codec, accumulate in product(
        [(1, False), (2, False), (2, True)], [1, 2], [(1, 0), (2, 0), (2, 1)], ["none", "fp16"], [1, 2]
    )
]


def other_of(shape: Shape) -> Shape:
    """Another shape of as many ranks, where there is one."""
    tp, pp, dp = shape.pp, shape.dp, shape.tp
    zero = int(dp > 1 and shape.zero == 0)
    return Shape(tp, tp > 1 and not shape.sequence, pp, dp, shape.codec, shape.accumulate, zero)


def check_shape(shape: Shape, other: Shape, folder: str, *, first: str = "parallelize") -> tuple[float, float]:
    """Some steps in one shape, and some more in another that reads the checkpoint of the first.

    Returns:
        how far they were from the uncut model, the most of both shapes on this rank: losses, as a share of the loss,
        and parameters, as a share of the largest change that each has made.

    A gradient is the sum of products in fp32, each with a relative error of 2^-24 that adds up over some hundred
    terms; fp16 packs values with 2^-11, in some tens of messages a step. Momentum and later steps carry errors on.
    """
    uncut, where, off = Uncut(), Path(folder, shape.id), [0.0, 0.0]
    for part, now in enumerate((shape, other)):
        tolerance = 2e-2 if shape.codec != "none" else 1e-4
        with Mesh.open(tp=now.tp, dp=now.dp, pp=now.pp) as mesh:
            divided = Divided(now, mesh, seed=part, first=first if part == 0 else "parallelize")
            if part == 1:
                loaded = checkpoint.load(divided.model, where, optimizer=divided.optimizer, **divided.groups)
                assert loaded.step == STEPS
            divided.begin()
            for step in range(part * STEPS, (part + 1) * STEPS):
                want, got = uncut.step(step, shape.accumulate), divided.step(step)
                assert abs(got - want) <= tolerance * want, f"{now.id}: loss {got} at step {step}, expected {want}"
                off[0] = max(off[0], abs(got - want) / want)
            off[1] = max(off[1], compare(divided, uncut, now.id, tolerance))
            if part == 0:
                checkpoint.save(divided.model, where, optimizer=divided.optimizer, step=STEPS, **divided.groups)
            divided.close()
    return off[0], off[1]

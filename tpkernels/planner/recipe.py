"""Job and Recipe: what is trained and how it is cut; the reasons why a recipe cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpkernels.planner.hardware import Cluster
from tpkernels.planner.shape import Shape
from tpkernels.planner.terms import Slice

RECOMPUTE = ("none", "selective", "full")
# Bytes of a value on the wire; None: those of the values themselves. docs/codecs.md
WIRE_BYTES: dict[str, float | None] = {"none": None, "fp16": 2.03, "bf16": 2.0, "int8": 1.06, "fp8": 1.03}


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        shape: of the model.
        sequence: tokens of a sequence.
        batch: sequences of a step, over all replicas.
        flash: whether attention is one kernel that keeps no matrix of scores.
        overlap: whether gradients are sent beside the last backward pass, and ZeRO parameters beside the next forward.
    """

    shape: Shape
    sequence: int
    batch: int
    flash: bool = True
    overlap: bool = True

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.batch


@dataclass(frozen=True)
class Recipe:
    """How the ranks share a job.

    Attributes:
        tp, pp, dp: ranks that share a layer, stages, and replicas.
        micro_batch: sequences that a replica computes at a time.
        sequence_parallel: whether norms, dropout and residuals are cut over the tokens.
        zero: 0 replicates what AdamW needs; 1 cuts its state over the replicas, 2 gradients too, 3 parameters too.
        virtual: pieces of a stage that a rank has: 1 is the schedule 1F1B, more are the interleaved one.
        recompute: "none", "selective" (attention's scores) or "full" (layers from their inputs).
        codec, grad_codec: how sums over tp, and gradients over dp, are packed.
    """

    tp: int
    pp: int
    dp: int
    micro_batch: int
    sequence_parallel: bool = False
    zero: int = 0
    virtual: int = 1
    recompute: str = "none"
    codec: str = "none"
    grad_codec: str = "none"

    @property
    def ranks(self) -> int:
        """How many it needs."""
        return self.tp * self.pp * self.dp

    @property
    def schedule(self) -> str:
        """Its name, "" without stages."""
        return "" if self.pp == 1 else "1F1B" if self.virtual == 1 else f"interleaved x{self.virtual}"

    def micro_batches(self, job: Job) -> int:
        """How many each replica computes in a step."""
        return job.batch // (self.dp * self.micro_batch)

    def slice(self, job: Job, value_bytes: float) -> Slice:
        """Return what one rank computes of one micro-batch."""
        wire = WIRE_BYTES[self.codec] or value_bytes
        return Slice(
            self.micro_batch, job.sequence, self.tp, self.sequence_parallel, self.recompute, job.flash, value_bytes,
            min(wire, value_bytes), self.codec,
        )  # fmt: skip

    def text(self) -> str:
        """In one line, for people."""
        parts = [f"tp {self.tp}", f"pp {self.pp}", f"dp {self.dp}", f"micro-batch {self.micro_batch}"]
        parts += ["sequence parallel"] if self.sequence_parallel else []
        parts += [f"ZeRO-{self.zero}"] if self.zero else []
        parts += [self.schedule] if self.pp > 1 else []
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        parts += [
            f"{name} {codec}"
            for name, codec in (("codec", self.codec), ("gradients", self.grad_codec))
            if codec != "none"
        ]
        return ", ".join(parts)


Cuts = Callable[[int], "str | None"]  # why a model cannot be cut over so many ranks, None if it can


def whole_heads(shape: Shape) -> Cuts:
    """Return the rule of a model that is known by its sizes alone: each rank needs a whole head."""

    def why_not(tp: int) -> str | None:
        if tp > shape.heads:
            return f"{shape.heads} heads leave some of {tp} ranks with none"
        return None

    return why_not


def refuse_cut(job: Job, cluster: Cluster, tp: int, pp: int, dp: int, cuts: Cuts) -> str | None:
    """Return why a cut of the ranks cannot run whatever else is chosen, None if it can.

    Args:
        cuts: of the model, as `whole_heads` or `Cutting.why_not` return it.
    """
    if tp * pp * dp != cluster.ranks:
        return f"tp {tp} x pp {pp} x dp {dp} is {tp * pp * dp} ranks, and there are {cluster.ranks}"
    if pp > job.shape.layers:
        return f"{job.shape.layers} layers leave some of {pp} stages with none"
    if job.batch % dp:
        return f"a batch of {job.batch} sequences does not divide over {dp} replicas"
    if tp > 1 and (why := cuts(tp)):
        return why
    return None


def refuse(job: Job, recipe: Recipe) -> str | None:
    """Return why a recipe of a cut that can run cannot, None if it can."""
    r = recipe
    share = job.batch // r.dp
    if share % r.micro_batch:
        return f"the {share} sequences of a replica do not divide into micro-batches of {r.micro_batch}"
    if r.sequence_parallel and r.tp == 1:
        return "sequence parallel shares the tokens of a layer over tp ranks, and tp is 1"
    if r.sequence_parallel and job.sequence % r.tp:
        return f"sequence parallel: {job.sequence} tokens do not divide over {r.tp} ranks"
    if r.zero and r.dp == 1:
        return f"ZeRO-{r.zero} shares state over replicas, and dp is 1"
    if r.zero >= 2 and r.pp > 1:
        return f"ZeRO-{r.zero} sums gradients after each micro-batch, and {r.pp} stages keep them until the last"
    if r.virtual > 1 and r.pp == 1:
        return "an interleaved schedule needs stages, and pp is 1"
    if r.virtual > 1 and job.shape.layers % (r.pp * r.virtual):
        return f"{job.shape.layers} layers do not divide into {r.pp} stages of {r.virtual} pieces"
    if r.virtual > 1 and r.micro_batches(job) % r.pp:
        return f"an interleaved schedule needs micro-batches in multiples of pp, got {r.micro_batches(job)} and {r.pp}"
    return None

"""Published iteration times of large models, and what the planner says for the same recipes; none is fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tpkernels.planner.hardware import Cluster, cluster
from tpkernels.planner.memory import memory_of, refuse_memory
from tpkernels.planner.recipe import Job, Recipe
from tpkernels.planner.search import divisors
from tpkernels.planner.shape import Shape
from tpkernels.planner.step import step_s

MEGATRON_2021 = "Megatron-LM, Narayanan et al. 2021 (arXiv:2104.04473), table 1"
MEGATRON_2022 = "Megatron-LM, Korthikanti et al. 2022 (arXiv:2205.05198), table 5"
ABSTRACT_2022 = "Korthikanti et al. 2022, abstract"
LLAMA_3 = "Llama 3 405B (arXiv:2407.21783), table 4"
VOCAB = 51200
# billion parameters: heads, hidden, layers, tp, pp, GPUs, batch, TFLOP/s a GPU with the recomputed forward
SCALING = {
    "1.7": (24, 2304, 24, 1, 1, 32, 512, 137),
    "3.6": (32, 3072, 30, 2, 1, 64, 512, 138),
    "7.5": (32, 4096, 36, 4, 1, 128, 512, 142),
    "18.4": (48, 6144, 40, 8, 1, 256, 1024, 135),
    "39.1": (64, 8192, 48, 8, 2, 512, 1536, 138),
    "76.1": (80, 10240, 60, 8, 4, 1024, 1792, 140),
    "145.6": (96, 12288, 80, 8, 8, 1536, 2304, 148),
    "310.1": (128, 16384, 96, 8, 16, 1920, 2160, 155),
    "529.6": (128, 20480, 105, 8, 35, 2520, 2520, 163),
    "1008.0": (160, 25600, 128, 8, 64, 3072, 3072, 163),
}
# model: heads, hidden, layers, pp, virtual, batch, micro-batch, seconds with full and selective recomputation; tp 8
SELECTIVE = {
    "22B": (64, 6144, 48, 1, 1, 4, 4, 1.42, 1.10),
    "175B": (96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
    "530B": (128, 20480, 105, 35, 3, 280, 1, 49.05, 37.83),
    "1T": (160, 25600, 128, 64, 1, 512, 1, 94.42, 71.49),
}
REPLICAS_2022, UTILISATION = 8, {"full": 0.421, "selective": 0.542}  # of 530B, 2,240 GPUs
LLAMA = Shape(126, 16384, 128, 8, 128, 53248, 128256, gated=True, tied=False, name="Llama 3 405B")
# GPUs: dp, sequences of a replica, TFLOP/s a GPU
LLAMA_PIECES = 4  # of a stage, which the paper does not say
LLAMA_RUNS = {8192: (64, 32, 430), 16384: (128, 16, 400)}


@dataclass(frozen=True)
class Published:
    """One row of a published table: what ran, on what, and its seconds."""

    source: str
    name: str
    cluster: Cluster
    job: Job
    recipe: Recipe
    seconds: float

    @property
    def predicted(self) -> float:
        return step_s(self.cluster, self.job, self.recipe).total


def rows() -> Iterator[Published]:
    """Every row. What a table does not say is chosen by the planner: the micro-batch of 2021 and of Llama 3."""
    for name, (heads, hidden, layers, tp, pp, gpus, batch, tflops) in SCALING.items():
        job = Job(Shape.gpt(layers, hidden, heads, VOCAB, name), 2048, batch, flash=False, overlap=False)
        flops = 96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + VOCAB / (16 * layers * hidden))
        machine = cluster("a100", gpus, "ib200")
        virtual = next(v for v in (2, 3, 1) if layers % (pp * v) == 0) if pp > 1 else 1
        recipe = Recipe(tp, pp, gpus // (tp * pp), 1, virtual=virtual, recompute="full")
        recipe = best_micro_batch(machine, job, recipe)
        yield Published(MEGATRON_2021, f"{name} B", machine, job, recipe, flops / (tflops * 1e12 * gpus))
    for name, (heads, hidden, layers, pp, virtual, batch, micro, *seconds) in SELECTIVE.items():
        job = Job(Shape.gpt(layers, hidden, heads, VOCAB, name), 2048, batch, flash=False, overlap=False)
        machine = cluster("a100", 8 * pp, "ib200")
        for kind, time in zip(("full", "selective"), seconds, strict=True):
            recipe = Recipe(8, pp, 1, micro, kind == "selective", virtual=virtual, recompute=kind)
            yield Published(MEGATRON_2022, f"{name}, {kind} recomputation", machine, job, recipe, time)
    heads, hidden, layers, pp, virtual, batch, micro = SELECTIVE["530B"][:7]
    job = Job(Shape.gpt(layers, hidden, heads, VOCAB), 2048, REPLICAS_2022 * batch, flash=False, overlap=False)
    machine = cluster("a100", 8 * pp * REPLICAS_2022, "ib200")
    for kind, used in UTILISATION.items():
        recipe = Recipe(8, pp, REPLICAS_2022, micro, kind == "selective", virtual=virtual, recompute=kind)
        time = job.shape.flops(job.tokens, 2048) / (used * machine.device.flops * machine.ranks)
        yield Published(ABSTRACT_2022, f"530B, {machine.ranks:,} GPUs, {kind}", machine, job, recipe, time)
    for gpus, (dp, share, tflops) in LLAMA_RUNS.items():
        job = Job(LLAMA, 8192, dp * share)
        flops = LLAMA.flops(job.tokens, 8192)
        recipe = Recipe(8, 16, dp, 1, True, 1, LLAMA_PIECES)
        yield Published(
            LLAMA_3, f"{gpus:,} GPUs", cluster("h100", gpus, "ib400"), job, recipe, flops / (tflops * 1e12 * gpus)
        )


def best_micro_batch(machine: Cluster, job: Job, recipe: Recipe) -> Recipe:
    """The recipe with the fastest micro-batch that fits and that its schedule can run."""
    tried = [replace(recipe, micro_batch=b) for b in divisors(job.batch // recipe.dp) if b <= 16]
    can = [r for r in tried if r.virtual == 1 or r.micro_batches(job) % r.pp == 0]
    fits = [r for r in can if not refuse_memory(machine, memory_of(machine, job, r, 0))]
    return min(fits or can, key=lambda r: step_s(machine, job, r).total)

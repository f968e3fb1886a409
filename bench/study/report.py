"""The study as tables: in the terminal, and in docs/compression_study.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

from bench.rows import Row, select
from bench.study import goals
from bench.study.links import LOOPBACK, RATES
from bench.study.measure import VALIDATIONS
from bench.study.methods import LAYOUTS, POWER_RANK, POWER_START, methods
from bench.study.plan import FULL, SMALL
from bench.table import markdown, show_lines
from tpkernels.train.gpt import GPT, GPTConfig, whole_parts
from tpkernels.train.settings import Settings

LINKS = (LOOPBACK, *RATES)
TITLES = {
    "dp2": "two replicas",
    "tp2": "one model cut over two ranks (the codec packs sums of activations and of their gradients)",
    "tp2dp2": "two replicas, each cut over two ranks (four ranks)",
}


def cells(kept: Sequence[Row], layout: str) -> Iterator[list[str]]:
    """A line for each method that has been measured: name, bytes, share, loss, against fp32, tokens/s for each link."""
    base_name = next(m.name for m in methods(layout))
    base = goals.runs(kept, layout, "none")
    for method in methods(layout):
        rows = goals.runs(kept, layout, method.name)
        speeds = [goals.tokens(kept, layout, link, method.name) for link in LINKS]
        if not rows and not any(speeds):
            continue
        line = [method.name]
        if rows:
            found = goals.losses(kept, layout, method.name)
            sent = rows[-1]["bytes_per_step"]
            share = f"{sent / base[-1]['bytes_per_step']:.3f}" if base and sent else ""
            spread = f"{mean(found):.4f} [{min(found):.4f}, {max(found):.4f}]"
            worse = goals.against(kept, layout, method.name)
            against = f"{worse:+.2%}" if worse is not None else ""
            line += [f"{sent:,}" if sent else "not counted", share, spread, against]
        else:
            line += [""] * 4
        for link, speed in zip(LINKS, speeds, strict=True):
            against_base = goals.tokens(kept, layout, link, base_name)
            ratio = f" ({speed / against_base:.2f}x)" if speed and against_base else ""
            line.append(f"{speed:,.0f}{ratio}" if speed else "")
        yield line


HEADS = ["method", "bytes a step", "of fp32", "validation loss [seeds]", "against fp32"]


def show(kept: Sequence[Row], console: Console) -> None:
    """Print the tables."""
    for layout in LAYOUTS:
        lines = list(cells(kept, layout))
        if lines:
            show_lines([*HEADS, *(f"tokens/s {link}" for link in LINKS)], lines, console, TITLES[layout])
    show_lines(["goal", "found", ""], goal_lines(kept), console, "goals")


def goal_lines(kept: Sequence[Row]) -> list[list[str]]:
    """A line for each goal."""
    return [[v.goal, v.found, v.word] for v in goals.verdicts(kept)]


def write(kept: Sequence[Row], folder: Path) -> Path:
    """Write compression_study.md: the tables, the conditions of the measurements, and the goals."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compression_study.md"
    path.write_text("\n".join(lines_of(kept)) + "\n")
    return path


def lines_of(kept: Sequence[Row]) -> Iterator[str]:
    yield "# Compression of gradients: loss and speed"
    yield ""
    yield "Written by `python examples/compression_study.py --keep` from `bench/results/study/compression_study.jsonl`."
    yield ""
    yield "![loss over bytes, loss over steps, tokens per second over links](compression_study.png)"
    yield ""
    yield from conditions(kept)
    for layout in LAYOUTS:
        lines = list(cells(kept, layout))
        if not lines:
            continue
        yield f"## {layout}: {TITLES[layout]}"
        yield ""
        runs = select(kept, kind="loss", layout=layout)
        if runs:
            counts = sorted({len(goals.losses(kept, layout, row["method"])) for row in runs})
            yield f"Loss after {goals.main_steps(kept, layout)} steps, {span(counts)} seeds."
            yield ""
        yield markdown([*HEADS, *(f"tokens/s, {link}" for link in LINKS)], lines)
    yield "## Goals"
    yield ""
    yield markdown(["goal", "found", ""], goal_lines(kept))
    yield from notes()


def conditions(kept: Sequence[Row]) -> Iterator[str]:
    losses, speeds = select(kept, kind="loss"), select(kept, kind="speed")
    if losses:
        yield (
            f"Loss: the byte-level GPT of `tpkernels train`, {largest(losses) / 1e6:.2f} M parameters (narrower "
            f"than that of `make run`), steps of {SMALL.tokens} bytes on Python's standard library, AdamW; each seed "
            f"means other weights and other data; validation on {VALIDATIONS * SMALL.batch} windows. In brackets: the "
            "seeds' least and most."
        )
        yield ""
    if speeds:
        rounds = sorted(int(row["rounds"]) for row in speeds)
        yield (
            f"Speed: the model of `make run` ({parameters(FULL) / 1e6:.2f} M parameters, {FULL.tokens} bytes a step), "
            "one core and one thread a rank, transport `group` (TCP); each method in turn, "
            f"{span(rounds)} rounds, the slowest rank counts, medians. Links: namespaces joined by "
            "veth, `tbf` at the rate named, at both ends. In parentheses: against the first line."
        )
        yield ""
    if kept:
        last = kept[-1]
        machine = last["machine"]
        cpu = f"{machine['class']} ({machine['cpu']}), {machine['cores']} cores"
        yield f"Machine: {cpu}; torch {last['torch']}; {last['date']}."
        yield ""


def largest(rows: Sequence[Row]) -> int:
    """Parameters of the uncut model: of a rank where nothing is cut."""
    return max(int(row["parameters"]) for row in rows)


def parameters(settings: Settings) -> int:
    """Of the uncut model that these settings train."""
    with torch.device("meta"):
        model = GPT(GPTConfig(settings.layers, settings.d_model, settings.heads, settings.context), whole_parts())
    return sum(p.numel() for p in model.parameters())


def notes() -> Iterator[str]:
    yield f"""## How to read it

- bytes a step: sent by each rank for the averages, counted by the communicator in the second half of the run; for DDP
  from the sizes of what its hooks reduce, as a ring sends them.
- `none`, `fp16`, ... are codecs of `GradAggregator`, with error feedback; `delayed` applies each average one step
  later, `local` averages parameters every {SMALL.local_steps} steps (their plain mean), and its bytes are spread over
  them.
- PowerSGD: rank {POWER_RANK}, from step {POWER_START} on, in one bucket: over gloo its callbacks start collectives in
  an order that differs between ranks as soon as there are two, and the process aborts.
- `topk` falls to its share within the warm-up of the learning rate; its bytes are those after it."""


def span(counts: Sequence[int]) -> str:
    """From the least to the most."""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"

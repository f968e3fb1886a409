"""The goals of the study, and whether its rows reach them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from bench.goals import EVEN, word
from bench.rows import Row, select

BASE, PLAIN = "none", "DDP"  # of the losses and bytes, and of the speed


@dataclass(frozen=True)
class Verdict:
    """One goal and what was found."""

    goal: str
    found: str
    reached: bool | None

    @property
    def word(self) -> str:
        return word(self.reached)


def verdicts(kept: Sequence[Row]) -> Iterator[Verdict]:
    """All goals, for the layouts that they are about."""
    for layout in ("dp2", "tp2dp2"):
        yield loss_goal(kept, layout, "fp16", 0.51, None)
        yield loss_goal(kept, layout, "int8", 0.275, 0.005)
        yield loss_goal(kept, layout, "topk", 0.03, 0.02)
        if layout == "dp2":
            yield loss_goal(kept, layout, "topk local", 0.03, 0.02)
        for steps in sorted({int(row["steps"]) for row in select(kept, kind="loss", layout=layout, method="topk")}):
            if steps > main_steps(kept, layout):
                yield loss_goal(kept, layout, "topk", 0.03, 0.02, steps)
    for method, factor in (("fp16", 1.8), ("int8", 3.0)):
        yield speed_goal(kept, "100mbit", method, factor)
    for link in ("1gbit", "10gbit"):
        for method in ("none", "fp16", "int8"):
            yield speed_goal(kept, link, method, 1.0)
    for link in ("100mbit", "1gbit", "10gbit"):
        for codec in ("none", "fp16", "int8"):
            yield hidden_goal(kept, link, codec)


def main_steps(kept: Sequence[Row], layout: str) -> int:
    """The length of most runs of a layout; longer ones are extra."""
    counts = Counter(int(row["steps"]) for row in select(kept, kind="loss", layout=layout))
    return counts.most_common(1)[0][0] if counts else 0


def runs(kept: Sequence[Row], layout: str, method: str, steps: int | None = None) -> list[Row]:
    """The rows of a method in the order of the seeds."""
    steps = main_steps(kept, layout) if steps is None else steps
    found = select(kept, kind="loss", layout=layout, method=method, steps=steps)
    return sorted(found, key=lambda row: int(row["seed"]))


def losses(kept: Sequence[Row], layout: str, method: str, steps: int | None = None) -> list[float]:
    """The validation losses, in the order of the seeds."""
    return [float(row["validation_loss"]) for row in runs(kept, layout, method, steps)]


def against(kept: Sequence[Row], layout: str, method: str, steps: int | None = None) -> float | None:
    """The loss over that of fp32, less one, over the seeds that both have."""
    base = {row["seed"]: float(row["validation_loss"]) for row in runs(kept, layout, BASE, steps)}
    mine = {row["seed"]: float(row["validation_loss"]) for row in runs(kept, layout, method, steps)}
    both = sorted(base.keys() & mine.keys())
    return sum(mine[s] for s in both) / sum(base[s] for s in both) - 1 if both else None


def loss_goal(
    kept: Sequence[Row], layout: str, method: str, share: float, within: float | None, steps: int | None = None
) -> Verdict:
    """The loss within a share of that of fp32, or, for None, within the spread of the seeds; and the bytes."""
    allowed = "the seeds' spread" if within is None else f"{within:.1%}"
    after = "" if steps is None else f", {steps} steps"
    goal = f"{layout}{after}: {method} at {share:.3g} of the bytes, loss within {allowed}"
    base, mine = losses(kept, layout, BASE, steps), losses(kept, layout, method, steps)
    worse = against(kept, layout, method, steps)
    if worse is None or (steps is None and min(len(base), len(mine)) < 2):
        return Verdict(goal, "", None)
    sent = [runs(kept, layout, name, steps)[-1]["bytes_per_step"] for name in (method, BASE)]
    ratio = sent[0] / sent[1]
    limit = (max(base) - min(base)) / mean(base) if within is None else within
    found = f"{ratio:.3f} of the bytes, loss {worse:+.2%} (seeds spread {(max(base) - min(base)) / mean(base):.2%})"
    inside = abs(worse) <= limit if within is None else worse <= limit
    return Verdict(goal, found, ratio <= share and inside)


def tokens(kept: Sequence[Row], layout: str, link: str, method: str) -> float | None:
    """Tokens per second, of the latest row."""
    found = select(kept, kind="speed", layout=layout, link=link, method=method)
    return float(found[-1]["tokens_per_s"]) if found else None


def speed_goal(kept: Sequence[Row], link: str, method: str, factor: float) -> Verdict:
    """Times as fast as DDP plain."""
    goal = f"dp2, {link}: {method} {f'{factor:g}x' if factor > 1 else 'not slower than'} DDP plain"
    mine, plain = (tokens(kept, "dp2", link, name) for name in (method, PLAIN))
    if mine is None or plain is None:
        return Verdict(goal, "", None)
    return Verdict(
        goal, f"{mine / plain:.2f}x ({mine:,.0f} tokens/s)", mine / plain >= (factor if factor > 1 else EVEN)
    )


def hidden_goal(kept: Sequence[Row], link: str, codec: str) -> Verdict:
    """How much of the averaging that fits under forward and backward the mode delayed hides there.

    fits = min(averaging alone, computing alone); the rest is the time by which a step takes longer than the same step
    without replicas, by more than what does not fit. Negative: the step loses more than the averaging takes by itself.
    """
    goal = f"dp2, {link}: delayed hides 90 % of what fits, {codec}"
    alone = {row["method"]: float(row["step_seconds"]) for row in select(kept, kind="alone", layout="dp2", link=link)}
    name = f"{codec} delayed"
    steps = select(kept, kind="speed", layout="dp2", link=link, method=name)
    computing, averaging = alone.get("computing alone"), alone.get(f"averaging alone, {codec}")
    if not steps or computing is None or averaging is None:
        return Verdict(goal, "", None)
    fits = min(computing, averaging)
    step = float(steps[-1]["step_seconds"])
    whole = alone["step alone"]
    hidden = min(1.0, 1 - (step - whole - (averaging - fits)) / fits)
    found = (
        f"{hidden:.0%}: step {1e3 * step:.0f} ms, alone {1e3 * whole:.0f} ms, averaging alone {1e3 * averaging:.0f} ms"
    )
    return Verdict(goal, found, hidden >= 0.9)

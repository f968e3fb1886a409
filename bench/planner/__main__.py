"""Fit the planner's constants, hold it against all measurements, and write both: `python -m bench.planner ROWS`.

ROWS is the folder of the rows published with vTrain (MICRO 2024, arXiv:2312.12391; MIT licence, VIA Research Group,
KAIST), one_node_fit.csv and many_nodes_fit.csv, which are not part of this project. Written are the constants and
errors in tpkernels/planner/data and the tables and the picture of docs/planner.md; --check prints the errors and
writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.planner import cpus, cuts, fit, memory, published
from bench.planner.scatter import scatter
from tpkernels.planner.hardware import DATA

PAGE = Path(__file__).parents[2] / "docs" / "planner.md"
NAMES = {"one_node": "one node", "many_nodes": "many nodes"}
Validated = dict[tuple[str, str], tuple[list[Any], Any]]


def set_values(file: Path, values: dict[str, float]) -> None:
    """Replace the values of figures of a TOML file; their sources stay."""
    text = file.read_text()
    for key, value in values.items():
        text, count = re.subn(rf"^({key} = {{ value = )[^,]+", rf"\g<1>{value:.4g}", text, flags=re.M)
        if count != 1:
            raise SystemExit(f"{file.name} has {count} lines of {key}")
    file.write_text(text)


def constants(rows: Sequence[fit.Iteration], steps: Sequence[cpus.Measured]) -> None:
    """Fit and write the constants of A100, of links between its nodes, and of CPU ranks."""
    found = fit.fit(rows)
    rate = found.pop("between_rate")
    set_values(DATA / "constants.toml", found)
    for name in ("hdr100", "ib200", "ib400", "ib800"):
        set_values(DATA / "links" / f"{name}.toml", {"rate": rate})
    found = fit.fit(steps, cpus.START)
    rate = found.pop("between_rate")
    set_values(DATA / "devices" / "cpu.toml", found)
    for name in ("100mbit", "1gbit", "10gbit"):
        set_values(DATA / "links" / f"{name}.toml", {"rate": rate})


def errors_of(found: Validated) -> dict[str, float]:
    """The mean absolute percentage error of each kind of rows."""
    kinds: dict[str, list[float]] = {}
    for (kind, _), (rows, predicted) in found.items():
        kinds.setdefault(kind, []).extend(100 * abs(p / row.ms - 1) for row, p in zip(rows, predicted, strict=True))
    return {kind: float(np.mean(values)) for kind, values in kinds.items()}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def a100_table(found: Validated, whole: dict[str, float]) -> str:
    lines = [
        [f"{NAMES[kind]}, hidden x layers {size}", str(len(rows)), f"{fit.percentage_error(rows, p):.1f} %",
         f"{fit.rank_correlation(rows, p):.3f}"]
        for (kind, size), (rows, p) in sorted(found.items(), reverse=True)
    ]  # fmt: skip
    lines += [[f"all of {NAMES[kind]}", "", f"{error:.1f} %", ""] for kind, error in whole.items()]
    return table(("rows left out of the fit", "rows", "mean absolute error", "rank correlation"), lines)


def order_table(rows: Sequence[fit.Iteration]) -> str:
    """How well rows can be ranked that scatter as these do."""
    found = scatter(rows)
    lines = [
        ["scatter of rows of tp 8", f"{found.of_least:.1%}"],
        ["scatter of the others", f"{found.of_others:.1%}"],
        ["rank correlation of the factors with these rows", f"{found.fitted:.3f}"],
        ["with rows that scatter so around them, mean", f"{found.expected:.3f}"],
        ["nine of ten times between", f"{found.low:.3f} and {found.high:.3f}"],
    ]
    return table(("39.1 G, a factor for each (tp, pp) and for each micro-batch", ""), lines)


def worst_table(found: Validated) -> str:
    """The ten rows that are furthest off."""
    pairs = [
        (row, p / row.ms - 1) for rows, predicted in found.values() for row, p in zip(rows, predicted, strict=True)
    ]
    pairs.sort(key=lambda pair: -abs(np.log1p(pair[1])))
    keys = ("hidden", "layers", "gpus", "global_batch", "micro_batch", "tp", "pp", "dp")
    lines = [
        [*(r.values[k] for k in keys), f"{r.ms:,.0f}", f"{r.ms * (1 + e):,.0f}", f"{e:+.0%}"] for r, e in pairs[:10]
    ]
    return table((*keys, "measured ms", "predicted ms", "error"), lines)


def published_table() -> str:
    lines, source = [], ""
    errors: dict[str, list[float]] = {}
    for row in published.rows():
        if row.source != source:
            source = row.source
            lines.append([f"**{source}**", "", "", "", ""])
        error = row.predicted / row.seconds - 1
        errors.setdefault(source, []).append(abs(error))
        lines.append([row.name, row.recipe.text(), f"{row.seconds:.2f}", f"{row.predicted:.2f}", f"{error:+.1%}"])
    for source, found in errors.items():
        lines.append([f"mean absolute error of {source.partition(' (')[0]}", "", "", "", f"{np.mean(found):.1%}"])
    text = table(("model", "recipe", "published s", "predicted s", "error"), lines)
    return text.replace("| --- | ---: |", "| --- | --- |", 1)


def cpu_table(found: Validated) -> str:
    """Errors of each cut and link, and how much slower the codec that the planner would take is than the fastest."""
    lines = []
    for (_, name), (rows, predicted) in found.items():
        chosen, fastest = rows[int(np.argmin(predicted))], min(rows, key=lambda row: row.ms)
        error = f"{fit.percentage_error(rows, predicted):.1f} %"
        lines.append([name, str(len(rows)), error, chosen.codec, fastest.codec, f"{chosen.ms / fastest.ms - 1:+.1%}"])
    return table(
        ("cut and link left out", "steps", "mean absolute error", "planner's codec", "fastest", "slower by"), lines
    )


def steps_table(steps: Sequence[cpus.Step]) -> str:
    errors = [step.predicted / step.ms - 1 for step in steps]
    lines = [
        [step.name, f"{step.ms:.0f}", f"{step.predicted:.0f}", f"{e:+.0%}"]
        for step, e in zip(steps, errors, strict=True)
    ]
    lines.append(["median of the absolute errors", "", "", f"{100 * np.median(np.abs(errors)):.1f} %"])
    return table(("job", "measured ms", "predicted ms", "error"), lines)


def cuts_table(cases: dict[str, list[cuts.Row]]) -> str:
    """Errors of each case, and how much slower the cut that the planner would take is than the fastest."""
    lines, lost, errors = [], [], []
    for case, rows in cases.items():
        chosen, fastest = min(rows, key=lambda row: row.predicted), min(rows, key=lambda row: row.ms)
        own = [abs(row.predicted / row.ms - 1) for row in rows]
        lost.append(chosen.ms / fastest.ms - 1)
        errors += own
        error = f"{100 * np.median(own):.1f} %"
        lines.append([case, str(len(rows)), error, chosen.name, fastest.name, f"{fastest.ms:.0f}", f"{lost[-1]:+.1%}"])
    right = sum(more <= 0.03 for more in lost)
    middle = f"{100 * np.median(errors):.1f} %"
    lines.append(["all; within 3 % of the fastest", str(len(errors)), middle, "", "", "", f"{right} of {len(lost)}"])
    head = ("job, two ranks over", "cuts", "median error", "planner's cut", "fastest", "its ms", "slower by")
    return table(head, lines)


def memory_table(rows: Sequence[memory.Row]) -> str:
    lines = [
        [row.name, f"{row.mib:.0f}", f"{row.predicted:.0f}", f"{row.predicted / row.mib - 1:+.0%}"] for row in rows
    ]
    return table(("job", "measured MiB", "predicted MiB", "error"), lines)


def picture(found: Validated, file: Path) -> None:
    """Predicted over measured, each row by a fit that has not seen its model size."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 5.2), layout="constrained")
    for axes, kind in zip(drawn.subplots(1, 2), NAMES, strict=True):
        for (own, size), (rows, predicted) in sorted(found.items()):
            if own == kind:
                axes.scatter([row.ms for row in rows], predicted, s=14, alpha=0.7, label=f"hidden x layers {size}")
        low, high = axes.get_xlim()
        low = min(row.ms for (own, _), (rows, _) in found.items() if own == kind for row in rows)
        for factor, style in ((1.0, "-"), (1.2, ":"), (1 / 1.2, ":")):
            axes.plot([low, high], [low * factor, high * factor], color="black", linestyle=style, linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="measured ms", ylabel="predicted ms")
        axes.set_title(f"A100, {NAMES[kind]} (dotted: ± 20 %)")
        axes.legend(fontsize=8)
    drawn.savefig(file, dpi=100)


def put(text: str, name: str, content: str) -> str:
    """Replace what is between <!-- planner:NAME --> and <!-- /planner -->."""
    new, count = re.subn(
        rf"(<!-- planner:{name} -->\n).*?(<!-- /planner -->)", lambda m: m[1] + content + m[2], text, flags=re.S
    )
    if count != 1:
        raise SystemExit(f"{PAGE.name} has {count} places for {name}")
    return new


def main(folder: Path, check: Annotated[bool, typer.Option("--check", help="Write nothing.")] = False) -> None:
    """Fit, cross-validate, and write constants, errors and documents."""
    rows, steps = fit.read(folder), cpus.read()
    if not check:
        constants(rows, steps)
    found, cpu = fit.cross_validate(rows), fit.cross_validate(steps, cpus.START)
    whole, more, own = errors_of(found), fit.extrapolations(rows), cpus.read_steps()
    tables = {
        "a100": a100_table(found, whole),
        "order": order_table([row for row in rows if row.group == ("many_nodes", "8192 x 48")]),
        "further": table(("left out", "error"), [[what, f"{error:.1f} %"] for what, error in more.items()]),
        "worst": worst_table(found),
        "published": published_table(),
        "cpu": cpu_table(cpu),
        "steps": steps_table(own),
        "cuts": cuts_table(cuts.read()),
        "memory": memory_table(memory.read()),
    }
    for name, text in tables.items():
        print(name, text, sep="\n")
    print(errors_of(cpu))
    if check:
        return
    set_values(DATA / "devices" / "a100.toml", {kind: round(error, 1) for kind, error in whole.items()})
    set_values(
        DATA / "devices" / "cpu.toml",
        {
            "many_nodes": round(errors_of(cpu)["cpu"], 1),
            "one_node": round(float(np.mean([100 * abs(step.predicted / step.ms - 1) for step in own])), 1),
        },
    )
    text = PAGE.read_text()
    for name, content in tables.items():
        text = put(text, name, content)
    PAGE.write_text(text)
    picture(found, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)

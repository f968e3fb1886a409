"""Write the tables of the documents from the kept results: `python -m bench.readme`, or `--check` to only compare.

A table NAME is between `<!-- bench:NAME -->` and `<!-- /bench -->`. The text there is replaced. Each machine class that
was measured has a table of its own, or in a table of goals a column of its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import rows as kept
from bench.codecs import OP, share
from bench.goals import GOALS, TOKENS, Goal, Verdict, split, verdicts
from bench.rows import Row
from bench.shapes import format_bytes
from bench.study.links import parsed
from bench.table import digits, markdown, ratio, size, times_faster, under
from tpkernels.compress import CODECS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/benchmarks.md", "docs/c10d.md", "docs/training.md")
MARKED = re.compile(r"<!-- bench:(\w+) -->\n(.*?)<!-- /bench -->", re.DOTALL)
OURS = ("plain", "functional", "sym", "tpkernels", "op_only", *CODECS[1:])
# What a program or a call without a size takes.
C10D_ALONE = ("c10d_barrier", "c10d_ddp", "c10d_fsdp", "c10d_tensor_parallel", "c10d_decode")
# The goals that README.md shows: title, and what they are measured against.
SUMMARY = {
    *((f"all_reduce plain, {size}", "gloo") for size in ("4 KiB", "1 MiB", "64 MiB")),
    *((f"gemm_all_reduce tpkernels, M = {m}", "linear_gloo") for m in (16, 512)),
    ("train_step tpkernels", "gloo"),
    ("c10d_all_reduce tpk, 4 KiB", "gloo"),
    *((f"decode_smollm2 tpkernels_{cache}", "transformers") for cache in ("static", "compiled")),
    ("decode_smollm2 tpkernels_compiled", "transformers_compiled"),
    *((f"serve_smollm2 tpkernels, {clients}", TOKENS) for clients in ("1 client", "8 clients")),
}


def in_placement(rows: Sequence[Row], placement: str) -> str:
    """The ratio of the run with most rounds in this placement."""
    measured = [row["by_placement"][placement] for row in rows if placement in row["by_placement"]]
    if not measured:
        return "-"
    at = max(measured, key=lambda m: m["rounds"])
    return times_faster((at["ratio"], at["ratio_min"], at["ratio_max"]))


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by these fields, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def sizes_in_order(rows: Iterable[Row]) -> list[Row]:
    """By R, dtype, then size."""
    return sorted(rows, key=lambda r: (r["R"], r["dtype"] != "fp32", r["dtype"], r["M"] or 0, r["bytes"] or 0))


def collective(rows: Sequence[Row]) -> str:
    """One line for each size and variant of ours: microseconds of the baseline and of ours, ratio near and far."""
    rows = [row for row in sizes_in_order(rows) if row["verified"]]
    baseline = grouped(rows, "variant", "bytes", "M", "N", "K", "R", "dtype")
    lines = []
    for key, same in grouped(rows, "op", "variant", "codec", "bytes", "M", "N", "K", "R", "dtype").items():
        row = max(same, key=lambda r: r["date"])
        if key[1] not in OURS:
            continue
        base = baseline.get((row["baseline"], *key[3:]), [row])
        there = next((b for b in base if b["date"] == row["date"]), base[-1])
        name = row["variant"] if row["codec"] in ("none", row["variant"]) else f"{row['variant']} {row['codec']}"
        crowded = [in_placement(same, "crowded")] if row["placement"] == "crowded" else []
        cells = crowded * 2 or [in_placement(same, "near"), in_placement(same, "far")]
        microseconds = [digits(there["median_us"]), digits(row["median_us"])]
        lines.append([size(row), name, str(row["R"]), row["dtype"], *microseconds, digits(row["busbw_gbs"]), *cells])
    base_name = rows[0]["baseline"] if rows else "gloo"
    head = ["size", "variant", "R", "dtype", f"{base_name} us", "us", "busbw GB/s", "times faster, near", "far"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def gemm(rows: Sequence[Row]) -> str:
    """One line for each op, size and dtype: against F.linear + gloo, and against the GEMM alone."""
    rows = [row for row in sizes_in_order(rows) if row["verified"]]
    lines = []
    for same in grouped(rows, "op", "variant", "codec", "M", "N", "K", "R", "dtype").values():
        row = max(same, key=lambda r: r["date"])
        if row["variant"] != "tpkernels":
            continue
        numbers = [digits(row[name]) for name in ("median_us", "gflops", "exposed_us")]
        against = [times_faster(row["ratios"].get(name)) for name in ("linear_tpk", "linear_gloo")]
        over = f"{100 * kept.over_roof(row):+.1f} %"
        lines.append([row["op"], size(row), str(row["R"]), row["dtype"], *numbers, over, *against])
    head = ["op", "M x N x K", "R", "dtype", "us", "GFLOP/s a rank", "exposed us", "over the GEMM alone",
            "vs F.linear + our collective", "vs F.linear + gloo"]  # fmt: skip
    return markdown(head, lines, under(rows[-1])) if rows else ""


def few_rows(rows: Sequence[Row]) -> str:
    """One line for each product: microseconds of reading the weights, of F.linear and of ours, and their shares."""
    rows = sizes_in_order(row for row in rows if row["verified"])
    lines = []
    for same in grouped(rows, "dtype", "M", "N", "K").values():
        by_way = {row["variant"]: row for row in same}
        if {"read", "linear", "tpkernels"} <= by_way.keys():
            ours, linear = by_way["tpkernels"], by_way["linear"]
            times = [digits(by_way[way]["median_us"]) for way in ("read", "linear", "tpkernels")]
            lines.append([size(ours), ours["dtype"], *times, f"{linear['ratio']:.0%}", f"{ours['ratio']:.0%}",
                          times_faster(ours["ratios"]["linear"])])  # fmt: skip
    head = ["M x N x K", "dtype", "reading us", "F.linear us", "us", "F.linear, share of reading", "ours",
            "vs F.linear"]  # fmt: skip
    return markdown(head, lines, under(rows[-1])) if rows else ""


def moves(rows: Sequence[Row]) -> str:
    """One line for each move of each codec: the share of a copy's bandwidth, for each size."""
    rows = [row for row in rows if row["verified"] and row["variant"] != "copy"]
    sizes = sorted({row["bytes"] for row in rows})
    newest = {(row["variant"], row["bytes"]): row for row in sorted(rows, key=lambda r: r["date"])}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = [newest.get((variant, size)) for size in sizes]
        lines.append([variant.replace("_", " "), *(f"{share(row):.0%}" if row else "-" for row in found)])
    head = ["move", *(f"{format_bytes(size)} of fp32" for size in sizes)]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def decode(rows: Sequence[Row]) -> str:
    """One line for each way to decode: milliseconds a token, and how often as fast as the baseline."""
    rows = [row for row in rows if row["verified"]]
    lines = [[row["op"].removeprefix("decode_"), row["variant"], row["dtype"], digits(row["median_us"] / 1e3),
              ratio(row)] for row in rows]  # fmt: skip
    head = ["model", "program", "dtype", "ms a token", "times as fast as transformers"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def serving(rows: Sequence[Row]) -> str:
    """One line for each number of clients."""
    rows = [row for row in rows if row["verified"]]
    lines = [[str(row["clients"]), str(row["slots"]), row["dtype"], str(row["calls"]), digits(row["tokens_per_s"]),
              *(digits(row[of] / 1e6) for of in ("median_us", "p95_us"))] for row in rows]  # fmt: skip
    head = ["clients at once", "slots", "dtype", "requests", "tokens/s", "p50 s", "p95 s"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def of_goals(found: Sequence[Verdict], foot: str = "") -> str:
    """One line for each goal: what every machine class reached."""
    machines = list(dict.fromkeys(v.machine for v in found))
    by_goal: dict[Goal, dict[str, Verdict]] = {}
    for v in found:
        by_goal.setdefault(v.goal, {})[v.machine] = v
    lines = [[goal.title, goal.dtype, str(goal.R), goal.against, f"{digits(goal.at_least)}{goal.unit}",
              *(f"{of[m].word}: {of[m].text}" if m in of else "-" for m in machines)]
             for goal, of in by_goal.items()]  # fmt: skip
    return markdown(["goal", "dtype", "R", "against", "at least", *machines], lines, foot)


def c10d(rows: Sequence[Row]) -> str:
    """One line for each call and number of ranks, a column for each size: the ratio, us of gloo and of tpk."""
    rows = [row for row in rows if row["verified"] and row["variant"] in ("gloo", "tpk")]
    rows = [row for row in rows if row["op"] not in C10D_ALONE]
    sizes = sorted({row["bytes"] for row in rows})
    lines = []
    for (op, R), same in grouped(rows, "op", "R").items():
        pairs = [newest(row for row in same if row["bytes"] == size) for size in sizes]
        lines.append([op.removeprefix("c10d_"), str(R), *(against_gloo(pair) for pair in pairs)])
    head = ["call", "R", *map(format_bytes, sizes)]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def c10d_programs(rows: Sequence[Row]) -> str:
    """One line for each program and number of ranks, with what no back end can surpass."""
    rows = [row for row in rows if row["verified"] and row["op"] in C10D_ALONE]
    pairs = [(op, R, newest(same)) for (op, R), same in grouped(rows, "op", "R").items()]
    lines = [[op.removeprefix("c10d_"), str(R), against_gloo(pair), against_gloo(pair, "bound")]
             for op, R, pair in pairs]  # fmt: skip
    head = ["program", "R", "times as fast as gloo (us of gloo, us of tpk)", "bound (us of gloo, us)"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """The latest row of each variant, in any placement of the cores."""
    return {row["variant"]: row for row in sorted(rows, key=lambda r: str(r["date"]))}


def against_gloo(pair: dict[str, Row], variant: str = "tpk") -> str:
    """The ratio of two rows of a run, and their microseconds."""
    if not {"gloo", variant} <= pair.keys() or pair[variant]["ratio"] is None:
        return "-"
    times = ", ".join(digits(pair[name]["median_us"]) for name in ("gloo", variant))
    return f"{digits(pair[variant]['ratio'])}x ({times})"


def goals(rows: Sequence[Row]) -> str:
    """All goals, and how many of them each machine class reaches."""
    found = list(verdicts(GOALS, rows))
    differ = [f"{goal.title} ({goal.dtype}, against {goal.against})" for goal in split(found)]
    said = [f"Reached on one machine class and missed on another: {', '.join(differ)}."] * bool(differ)
    return of_goals(found, "\n".join([counts(found), *said]))


def summary(rows: Sequence[Row]) -> str:
    """A few goals, and how many of all there are each machine class reaches."""
    found = list(verdicts(GOALS, rows))
    return of_goals([v for v in found if v.goal.R == 2 and (v.goal.title, v.goal.against) in SUMMARY], counts(found))


def counts(found: Sequence[Verdict]) -> str:
    """Goals reached and missed by each machine class, and of how many two classes differ."""
    lines = []
    for machine in dict.fromkeys(v.machine for v in found):
        words = [v.word for v in found if v.machine == machine]
        each = (f"{words.count(w)} {w.lower()}" for w in ("reached", "even", "MISSED", "not measured"))
        lines.append(f"Of {len(words)} goals on {machine}: {', '.join(each)}.")
    differ = len(list(split(found)))
    return "\n".join(lines + [f"Reached on one machine class and missed on another: {differ}."] * bool(differ))


def between_hosts(rows: Sequence[Row]) -> str:
    """One line for each of our candidates over a link: milliseconds, what of them is exposed, and the ratio."""
    lines = []
    for row in sorted(rows, key=lambda r: parsed(r["link"])):
        named_by_op = row["variant"] in ("tpkernels", *CODECS[1:])
        if not row["verified"] or not (named_by_op or (row["op"] == "ddp_step" and row["variant"] != "gloo")):
            continue
        alone = next((r for r in rows if r["variant"] == "one_chunk" and same_call(r, row)), None)
        exposed = [None if r is None or r["exposed_us"] is None else r["exposed_us"] / 1e3 for r in (row, alone)]
        took = digits(row["median_us"] / 1e3)
        op = row["op"] if named_by_op else f"{row['op']} {row['variant']}"
        lines.append([row["link"], op, size(row), row["dtype"], row["codec"],
                      row["path"] or "-", took, *map(digits, exposed), ratio(row)])  # fmt: skip
    head = ["link", "op", "M x N x K", "dtype", "codec", "path", "ms", "exposed", "exposed in one chunk",
            "times as fast as torch over gloo"]  # fmt: skip
    return markdown(head, lines, under(rows[-1])) if rows else ""


def hierarchical(rows: Sequence[Row]) -> str:
    """One line for each size of a collective of two ranks on each of two hosts, over each link."""
    lines = []
    for row in sorted(rows, key=lambda r: (*parsed(r["link"]), r["bytes"])):
        if row["variant"] != "plain" or not row["verified"]:
            continue
        flat, gloo = (next(r for r in rows if r["variant"] == v and same_call(r, row) and r["bytes"] == row["bytes"])
                      for v in ("flat", "gloo"))  # fmt: skip
        middle, least, most = row["ratios"]["flat"]
        times = [digits(r["median_us"]) for r in (row, flat, gloo)]
        faster = f"{middle:.3g}x [{least:.3g}, {most:.3g}]"
        lines.append([row["link"], row["op"], size(row), row["path"], *times, faster])
    head = ["link", "op", "size", "path", "hierarchical us", "group us", "gloo us", "times as fast as group"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def train_hosts(rows: Sequence[Row]) -> str:
    """One line for each way to train on two hosts of two ranks each."""
    lines = []
    for row in sorted(rows, key=lambda r: parsed(r["link"])):
        loss = f"{row['loss']:.3f} ({row['steps']})" if "loss" in row else "-"
        late = row["ratios"].get("zero_step") if row["variant"] == "zero_forward" else None
        gain = "-" if late is None else "{:.3g}x [{:.3g}, {:.3g}]".format(*late)
        speed = digits(1e6 / row["median_us"])
        variant = "none" if row["variant"] == "tpkernels" else row["variant"]
        lines.append([row["link"], variant, digits(row["median_us"] / 1e3), speed, ratio(row), gain, loss])
    head = ["link", "gradients", "ms", "steps/s", "times as fast as none", "as zero_step", "loss (after steps)"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def same_call(a: Row, b: Row) -> bool:
    """Whether two candidates were timed in one call of the bench, at one size."""
    return all(a[key] == b[key] for key in ("op", "codec", "dtype", "link", "date", "M", "N", "K"))


def compositions(rows: Sequence[Row]) -> str:
    """One line for each cut of a model, with the most over its codecs' accumulations and over the cut that goes on."""
    lines = []
    for key, same in grouped(
        [row | row["shape"] for row in rows], "ranks", "tp", "sequence", "pp", "dp", "zero"
    ).items():
        ranks, tp, sequence, pp, dp, zero = key
        cells = [
            f"{max(row[what] for row in same if row['codec'] == codec):.1e}"
            for codec in ("none", "fp16") for what in ("loss", "parameters")
        ]  # fmt: skip
        lines.append([f"{tp}{', sequence' * sequence}", str(pp), str(dp), str(zero), str(ranks), *cells])
    head = ["tp", "pp", "dp", "zero", "ranks", "losses", "parameters", "losses, fp16", "parameters, fp16"]
    foot = f"{len(rows)} compositions of {rows[0]['steps']} steps, commit {rows[0]['commit']}." if rows else ""
    return markdown(head, lines, foot) if rows else ""


def bubbles(rows: Sequence[Row]) -> str:
    """One line for each schedule and number of micro-batches: how much of a step a rank waits, and the formula."""
    lines = []
    for row in rows:
        middle, least, most = row["bubble"]
        cells = f"{middle:.1%} ({least:.1%} to {most:.1%})", f"{row['expected']:.1%}"
        lines.append([row["layout"], row["method"].split()[0], *cells, digits(row["ms"])])
    head = ["schedule", "micro-batches", "waits", "formula", "ms a step"]
    foot = f"{rows[0]['rounds']} rounds of {rows[0]['steps']} steps; {under(rows[0])}" if rows else ""
    return markdown(head, lines, foot) if rows else ""


def only(*ops: str, linked: bool = False) -> Callable[[Sequence[Row]], list[Row]]:
    """Rows of these ops, measured on one host, or over links."""
    return lambda rows: [row for row in rows if row["op"] in ops and (row.get("link") is not None) == linked]


def each_class(write: Callable[[Sequence[Row]], str]) -> Callable[[Sequence[Row]], str]:
    """The table of each machine class, one after the other."""
    return lambda rows: "\n".join(
        write([row for row in rows if row["machine"]["class"] == machine]) for machine in kept.classes(rows)
    )


TABLES: dict[str, tuple[Callable[[Sequence[Row]], Sequence[Row]], Callable[[Sequence[Row]], str]]] = {
    "all_reduce": (only("all_reduce"), each_class(collective)),
    "reduce_scatter": (only("reduce_scatter"), each_class(collective)),
    "all_gather": (only("all_gather"), each_class(collective)),
    "gemm": (only("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm"), each_class(gemm)),
    "hierarchical": (
        lambda rows: [row for row in rows if row.get("link") is not None and row["R"] > 2 and row["bytes"]],
        each_class(hierarchical),
    ),
    "train_hosts": (only("train_step_hosts", linked=True), each_class(train_hosts)),
    "links": (
        lambda rows: [row for row in rows if row.get("link") is not None and "kind" not in row and row["R"] == 2],
        each_class(between_hosts),
    ),
    "few_rows": (only("few_rows"), each_class(few_rows)),
    "vocab": (only("vocab_embedding", "vocab_cross_entropy"), each_class(collective)),
    "codecs": (only("codecs", "codecs_group"), each_class(collective)),
    "dispatch": (only("dispatch"), each_class(collective)),
    "train_step": (only("train_step"), each_class(collective)),
    "codec_moves": (only(OP), each_class(moves)),
    "decode": (only("decode_smollm2", "decode_llama_8_heads"), each_class(decode)),
    "serve": (only("serve_smollm2"), each_class(serving)),
    "c10d": (lambda rows: [row for row in rows if str(row["op"]).startswith("c10d_")], each_class(c10d)),
    "c10d_programs": (lambda rows: [row for row in rows if row["op"] in C10D_ALONE], each_class(c10d_programs)),
    "bubble": (lambda rows: kept.load(kept.RESULTS / kept.BUBBLES), bubbles),
    "compositions": (lambda rows: kept.load(kept.RESULTS / kept.COMPOSITIONS), compositions),
    "goals": (lambda rows: rows, goals),
    "summary": (lambda rows: rows, summary),
}


def table(name: str, rows: Sequence[Row]) -> str:
    """The text between the markers of this name.

    Raises:
        ValueError: there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}; the tables are {', '.join(TABLES)}")
    pick, write = TABLES[name]
    return write(pick(rows))


def filled(text: str, rows: Sequence[Row]) -> str:
    """The text with every marked table written anew."""
    return MARKED.sub(lambda m: f"<!-- bench:{m[1]} -->\n{table(m[1], rows)}<!-- /bench -->", text)


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 if a document differs.")] = False,
    results: Annotated[Path, typer.Option()] = kept.RESULTS,
) -> None:
    """Write the measured tables of all documents from bench/results."""
    rows = kept.load(results)
    for path in (ROOT / name for name in DOCUMENTS):
        before = path.read_text()
        after = filled(before, rows)
        if check and before != after:
            sys.exit(f"{path.name}: the measured tables differ from bench/results; run python -m bench.readme")
        if not check:
            path.write_text(after)


if __name__ == "__main__":
    typer.run(main)

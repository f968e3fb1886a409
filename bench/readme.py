"""Write the tables of the documents from the kept results: `python -m bench.readme`, or `--check` to only compare.

A table NAME is between `<!-- bench:NAME -->` and `<!-- /bench -->`. The text there is replaced.
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
from bench.goals import GOALS, Verdict, verdicts
from bench.rows import Row
from bench.shapes import format_bytes
from bench.study.links import rate_of
from bench.table import digits, markdown, size, under
from tpkernels.compress import CODECS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/benchmarks.md")
MARKED = re.compile(r"<!-- bench:(\w+) -->\n(.*?)<!-- /bench -->", re.DOTALL)
OURS = ("plain", "functional", "sym", "tpkernels", "op_only", *CODECS[1:])
# The goals that README.md shows: title, and what they are measured against.
SUMMARY = {
    *((f"all_reduce plain, {size}", "gloo") for size in ("4 KiB", "1 MiB", "64 MiB")),
    *((f"gemm_all_reduce tpkernels, M = {m}", "linear_gloo") for m in (16, 512)),
    ("train_step tpkernels", "gloo"),
    *((f"decode_smollm2 tpkernels_{cache}", "transformers") for cache in ("static", "compiled")),
}


def ratio(values: Sequence[Any] | None) -> str:
    """Median, and least and most in brackets."""
    if not values or values[0] is None:
        return "-"
    return f"{digits(values[0])}x [{digits(values[1])}, {digits(values[2])}]"


def in_placement(rows: Sequence[Row], placement: str) -> str:
    """The ratio of the run with most rounds in this placement."""
    measured = [row["by_placement"][placement] for row in rows if placement in row["by_placement"]]
    if not measured:
        return "-"
    at = max(measured, key=lambda m: m["rounds"])
    return ratio((at["ratio"], at["ratio_min"], at["ratio_max"]))


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
        against = [ratio(row["ratios"].get(name)) for name in ("linear_tpk", "linear_gloo")]
        over = f"{100 * kept.over_roof(row):+.1f} %"
        lines.append([row["op"], size(row), str(row["R"]), row["dtype"], *numbers, over, *against])
    head = ["op", "M x N x K", "R", "dtype", "us", "GFLOP/s a rank", "exposed us", "over the GEMM alone",
            "vs F.linear + our collective", "vs F.linear + gloo"]  # fmt: skip
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
              ratio((row["ratio"], row["ratio_min"], row["ratio_max"]))] for row in rows]  # fmt: skip
    head = ["model", "program", "dtype", "ms a token", "times as fast as transformers"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def serving(rows: Sequence[Row]) -> str:
    """One line for each number of clients."""
    rows = [row for row in rows if row["verified"]]
    lines = [[str(row["clients"]), str(row["slots"]), row["dtype"], str(row["calls"]), digits(row["tokens_per_s"]),
              *(digits(row[of] / 1e6) for of in ("median_us", "p95_us"))] for row in rows]  # fmt: skip
    head = ["clients at once", "slots", "dtype", "requests", "tokens/s", "p50 s", "p95 s"]
    return markdown(head, lines, under(rows[-1])) if rows else ""


def measured(verdict: Verdict) -> str:
    """The ratio of a verdict; against the GEMM alone there is a median only."""
    if verdict.found is None:
        return "-"
    return ratio(verdict.found) if verdict.found[1] == verdict.found[1] else f"{digits(verdict.found[0])}x"


def goals(rows: Sequence[Row]) -> str:
    """The goals, and which of them are reached."""
    lines = [[v.goal.title, v.goal.dtype, str(v.goal.R), v.goal.against, f"{digits(v.goal.at_least)}x",
              measured(v), v.placement, v.word] for v in verdicts(GOALS, rows)]  # fmt: skip
    return markdown(["goal", "dtype", "R", "against", "at least", "found", "where", ""], lines)


def summary(rows: Sequence[Row]) -> str:
    """A few goals, and how many there are."""
    found = list(verdicts(GOALS, rows))
    shown = [v for v in found if v.found is not None and v.goal.R == 2 and (v.goal.title, v.goal.against) in SUMMARY]
    lines = [[v.goal.title, v.goal.dtype, v.goal.against, measured(v), v.placement,
              f"{digits(v.goal.at_least)}x", v.word] for v in shown]  # fmt: skip
    words = [v.word for v in found]
    counts = ", ".join(f"{words.count(word)} {word.lower()}" for word in ("reached", "even", "MISSED", "not measured"))
    foot = f"Of {len(words)} goals: {counts}."
    return markdown(["what", "dtype", "against", "times as fast: median [min, max]", "where", "goal", ""], lines, foot)


def between_hosts(rows: Sequence[Row]) -> str:
    """One line for each of our candidates over a link: milliseconds, what of them is exposed, and the ratio."""
    lines = []
    for row in sorted(rows, key=lambda r: rate_of(r["link"])):
        if not row["verified"] or row["variant"] not in ("tpkernels", *CODECS[1:]):
            continue
        alone = next((r for r in rows if r["variant"] == "one_chunk" and same_call(r, row)), None)
        exposed = [None if r is None or r["exposed_us"] is None else r["exposed_us"] / 1e3 for r in (row, alone)]
        took = digits(row["median_us"] / 1e3)
        against = ratio((row["ratio"], row["ratio_min"], row["ratio_max"]))
        lines.append([row["link"], row["op"], size(row) if row["M"] else "-", row["dtype"], row["codec"],
                      row["path"] or "-", took, *map(digits, exposed), against])  # fmt: skip
    head = ["link", "op", "M x N x K", "dtype", "codec", "path", "ms", "exposed", "exposed in one chunk",
            "times as fast as torch over gloo"]  # fmt: skip
    return markdown(head, lines, under(rows[-1])) if rows else ""


def same_call(a: Row, b: Row) -> bool:
    """Whether two candidates were timed in one call of the bench, at one size."""
    return all(a[key] == b[key] for key in ("op", "codec", "dtype", "link", "date", "M", "N", "K"))


def only(*ops: str) -> Callable[[Sequence[Row]], list[Row]]:
    """Rows of these ops on one host."""
    return lambda rows: [row for row in rows if row["op"] in ops and not row.get("link")]


TABLES: dict[str, tuple[Callable[[Sequence[Row]], Sequence[Row]], Callable[[Sequence[Row]], str]]] = {
    "all_reduce": (only("all_reduce"), collective),
    "reduce_scatter": (only("reduce_scatter"), collective),
    "all_gather": (only("all_gather"), collective),
    "gemm": (only("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm"), gemm),
    "vocab": (only("vocab_embedding", "vocab_cross_entropy"), collective),
    "codecs": (only("codecs", "codecs_group"), collective),
    "dispatch": (only("dispatch"), collective),
    "train_step": (only("train_step"), collective),
    "codec_moves": (only(OP), moves),
    "decode": (lambda rows: [row for row in rows if str(row["op"]).startswith("decode_")], decode),
    "serve": (only("serve_smollm2"), serving),
    "links": (lambda rows: [row for row in rows if row.get("link") and "kind" not in row], between_hosts),
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

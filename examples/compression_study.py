"""What compression of gradients costs in loss and gains in speed, measured on this machine.

    python examples/compression_study.py                    # all cells that are missing; hours
    python examples/compression_study.py --kind loss --only "dp2/*" --minutes 5
    python examples/compression_study.py --keep --table-only    # docs/ anew from the rows that are kept
    python examples/compression_study.py --smoke            # does it work? seconds

Trains the byte-level model of `tpkernels train` with two replicas, cut over two ranks, and both, for every codec and
mode and several seeds, beside torch's DDP plain, with its fp16 hook, and with PowerSGD; times their steps over links of
100 Mbit, 1 Gbit and 10 Gbit (network namespaces joined by a veth pair behind a token bucket: needs root; without it the
loopback alone is measured). Each cell is one row in runs/bench/study/compression_study.jsonl, added when it is done, so
that the study can be interrupted and goes on; table and picture lie beside it. With --keep the rows are those in
bench/results/study, table and picture docs/compression_study.md and .png.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import rows  # noqa: E402
from bench.study import picture, plan, report  # noqa: E402
from bench.study.methods import LAYOUTS  # noqa: E402

KINDS = ("loss", "speed")


def main(
    kind: Annotated[list[str] | None, typer.Option(help="loss, speed; again for both.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LAYOUTS)}; may be repeated.")] = None,
    link: Annotated[list[str] | None, typer.Option(help="loopback, 100mbit, 1gbit, 10gbit; may be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Cells by pattern, 'dp2/int8*'; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of a run for the loss.")] = plan.Study.steps,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = plan.Study.seeds,
    rounds: Annotated[int, typer.Option(help="Turns of each method on a link.")] = plan.Study.rounds,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing new after so many.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help=f"{rows.KEEP_HELP} Table and picture: docs/.")] = False,
    out: Annotated[Path | None, typer.Option(help="The rows.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Folder of table and picture.")] = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Measure nothing.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two methods, few steps, the loopback; no files.")] = False,
) -> None:
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks and namespaces are cleaned up
    study = plan.Study(
        layouts=tuple(layout or LAYOUTS), links=tuple(link or plan.Study.links), only=tuple(only or ()),
        steps=steps, seeds=seeds, rounds=rounds, minutes=minutes,
    )  # fmt: skip
    out = rows.destination(rows.STUDY, keep, out)
    docs = docs or (ROOT / "docs" if keep else out.parent)
    with tempfile.TemporaryDirectory() as folder:
        if smoke:
            out, docs = Path(folder, "rows.jsonl"), Path(folder)
            study = plan.smoke()
        if not table_only:
            plan.run(study, out, kind or KINDS, lambda text: console.print(text, highlight=False))
        kept = rows.load(out)
        written = [report.write(kept, docs), picture.draw(kept, docs)]
        report.show(kept, console)
        console.print("written: " + ", ".join(str(path) for path in written if path is not None), highlight=False)


if __name__ == "__main__":
    typer.run(main)

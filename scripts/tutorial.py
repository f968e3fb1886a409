"""Run the python blocks of docs/tutorial.md, one after the other in one program on two ranks, and check their output.

A ```text block right behind a ```python block is what rank 0 printed there. Numbers differ between machines, and so do
the engine and the path of a GEMM, so only the words around them are compared; `--write` puts the present output, and
the figures that the blocks save, into docs/.

Usage: python scripts/tutorial.py [--write] [docs/tutorial.md]
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?")
GEMM = re.compile(r"^\w+: GEMM by \w+ \(.*\).*$")  # what `explain` says of one: a rule of the CPU at hand
RANKS = 2


def run_blocks(document: Path, result: Path) -> None:
    """On one rank: execute every block in one namespace; rank 0 keeps the output of each."""
    namespace: dict[str, object] = {"__name__": "tutorial"}
    printed = []
    for block in BLOCK.finditer(document.read_text()):
        line = document.read_text()[: block.start("code")].count("\n")
        code = compile("\n" * line + block["code"], str(document), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, namespace)
        printed.append(out.getvalue())
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps(printed))


def launch(document: Path, folder: Path) -> list[str]:
    """Run this file on the ranks, with `folder` as the current one; the output of the blocks."""
    result = folder / ".printed.json"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
         str(Path(__file__).resolve()), "--rank", str(document.resolve()), str(result)],
        cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    printed = json.loads(result.read_text())
    result.unlink()
    return list(printed)


def with_outputs(document: str, printed: list[str]) -> str:
    """The document with these outputs behind its blocks; a block that prints nothing has none."""
    outputs = iter(printed)

    def replace(block: re.Match[str]) -> str:
        text = "\n".join(line.rstrip() for line in next(outputs).splitlines())
        return f"```python\n{block['code']}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    return BLOCK.sub(replace, document)


def skeleton(document: str) -> list[str]:
    """The lines of a document with what differs between machines and the width of every column taken out."""
    lines = [GEMM.sub("GEMM by an engine", line) for line in document.splitlines()]
    return [re.sub(r"[ ─━-]+", " ", NUMBER.sub("#", line)).strip() for line in lines]


def main(arguments: list[str]) -> int:
    """Check the tutorial, or write it; the exit status is 0 when it says what happens."""
    if arguments[:1] == ["--rank"]:
        run_blocks(Path(arguments[1]), Path(arguments[2]))
        return 0
    write = "--write" in arguments
    path = Path(next((a for a in arguments if not a.startswith("--")), "docs/tutorial.md"))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            printed = launch(path, path.parent.resolve() if write else Path(temporary))
        except subprocess.CalledProcessError:
            print(f"tutorial: a block of {path} failed; its error is above")
            return 1
    new = with_outputs(path.read_text(), printed)
    if write:
        path.write_text(new)
        return 0
    difference = list(
        difflib.unified_diff(skeleton(path.read_text()), skeleton(new), "written", "happens", lineterm="")
    )
    print("\n".join(difference) or f"tutorial: {path} says what happens")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run the fenced `sh` and `python` blocks of a Markdown file, so that its commands are known to work.

Every such block runs, in order, in the current folder; bash stops at the first error. A comment right above a block
changes that, and is the only thing that can:

    <!-- ci: skip, REASON -->                    does not run; the reason is printed
    <!-- ci: set RUN_ARGS="--minutes 0.3" -->    runs with this variable (make run is long)
    <!-- ci: ranks 2 -->                         a python block that runs under torchrun

Usage: python scripts/readme_commands.py README.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^(?:<!-- ci: (?P<note>[^\n]*?) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```(?:sh|python)\b", re.M)
NOTE = re.compile(r"(?P<kind>skip, (?=\S)|set (?=\w+=)|ranks (?=\d+$))(?P<rest>.*)")


class Block(NamedTuple):
    """A fenced block and the note above it, split in its kind ("", "skip,", "set", "ranks") and the rest."""

    language: str
    text: str
    kind: str
    rest: str


def blocks(markdown: str) -> list[Block]:
    """Find the blocks; a fence or a note that is not understood is an error, so that nothing is skipped by a typo."""
    found = []
    for match in BLOCK.finditer(markdown):
        note = NOTE.fullmatch(match["note"] or "")
        if match["note"] is not None and note is None:
            raise ValueError(f"readme_commands: note not understood: {match['note']!r}")
        found.append(
            Block(match["language"], match["text"], note["kind"].strip() if note else "", note["rest"] if note else "")
        )
    if len(found) != len(FENCE.findall(markdown)):
        raise ValueError(f"readme_commands: {len(FENCE.findall(markdown))} blocks begin, {len(found)} are understood")
    return found


def run(block: Block) -> None:
    """Run one block; subprocess.CalledProcessError where it fails."""
    if block.language == "sh":
        before = f"export {block.rest}\n" if block.kind == "set" else ""
        subprocess.run(["bash", "-euo", "pipefail", "-c", before + block.text], check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "readme_block.py")
        script.write_text(block.text)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", block.rest]
        subprocess.run(["python", *(torchrun if block.kind == "ranks" else []), str(script)], check=True)


def main(path: str) -> int:
    """Run all blocks of the file; the exit status is 0 if all that ran succeeded and at least one did."""
    ran = 0
    for block in blocks(Path(path).read_text()):
        title = block.text.strip().splitlines()[0]
        if block.kind == "skip,":
            print(f"-- skipped, {block.rest}: {title}", flush=True)
            continue
        print(f"-- {block.language} {block.kind} {block.rest}: {title}", flush=True)
        start = time.monotonic()
        try:
            run(block)
        except subprocess.CalledProcessError as error:
            print(f"readme_commands: exit status {error.returncode} from this block of {path}:\n{block.text}")
            return 1
        print(f"-- done in {time.monotonic() - start:.0f} s", flush=True)
        ran += 1
    print(f"readme_commands: {ran} blocks of {path} ran")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""All blocks of the tutorial run, and print the text below them."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import tutorial  # noqa: E402

DOCUMENT = """
```python
import os
rank = int(os.environ["RANK"])
```

```python
if rank == 0:
    print("rank", rank, "took 3.25 ms")
```

```text
rank 0 took 1.5 ms
```
"""


def run(document: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/tutorial.py", str(document)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.nightly
def test_the_tutorial_says_what_happens() -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'tpkernels[hf]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'tpkernels[bench]'")
    done = run(ROOT / "docs/tutorial.md")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_numbers_may_differ_and_words_may_not(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(DOCUMENT)
    assert run(document).returncode == 0
    document.write_text(DOCUMENT.replace("took 1.5", "needed 1.5"))
    done = run(document)
    assert done.returncode == 1
    assert "+rank # took # ms" in done.stdout
    document.write_text(DOCUMENT.replace("import os", "import no_such_module"))
    done = run(document)
    assert done.returncode == 1
    assert "no_such_module" in done.stderr


def explain_a_gemm_on_every_cpu() -> list[str]:
    """The line that the tutorial prints of a GEMM, by the rule for each kind of CPU."""
    lines = []
    with Group.open() as group, contextlib.ExitStack() as stack:
        stack.callback(_C.forget_assumed_cpu)
        for amd, avx512 in itertools.product((True, False), repeat=2):
            _C.assume_cpu(amd, avx512)
            why = group.explain("gemm_all_reduce", M=256, N=144, K=192, dtype=torch.float32)
            lines.append(f"{why.path}: {why.reason}")
    return lines


def test_the_way_of_a_gemm_may_differ_between_cpus_and_no_other_may() -> None:
    lines = run_ranks(explain_a_gemm_on_every_cpu, 2)[0]
    assert not torch._C._has_mkldnn or len(set(lines)) > 1
    assert {tuple(tutorial.skeleton(line)) for line in lines} == {("GEMM by an engine",)}
    assert tutorial.skeleton("one_shot: 9 bytes") != tutorial.skeleton("two_shot: 9 bytes")


def test_outputs_are_put_below_their_blocks() -> None:
    written = tutorial.with_outputs(DOCUMENT, ["", "rank 0 took 9 ms\n"])
    assert written == DOCUMENT.replace("1.5", "9")
    assert tutorial.with_outputs(written, ["a line\n", ""]).count("```text") == 1

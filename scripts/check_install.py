"""Use the installed tpkernels as a first-time user would: import it outside the checkout, run an op on one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import tpkernels as tpk


def main() -> None:
    """Fail loudly when the checkout is imported instead of the installation, or when the op is wrong."""
    here = Path(tpk.__file__).resolve()
    assert Path(sys.prefix).resolve() in here.parents, f"imported {here}, not the installation in {sys.prefix}"
    x, w, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    with tpk.Group.open() as group:
        y = tpk.ops.gemm_all_reduce(x, w, bias, group=group)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    print(f"check_install: {here.parent} works: {tpk.build_info()}")


if __name__ == "__main__":
    main()

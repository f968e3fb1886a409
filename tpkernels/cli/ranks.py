"""Starts the ranks of a command, with torchrun's own log off."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tpkernels.launch import launch


def start_ranks(ranks: int, arguments: Sequence[str], hint: str = "") -> int:
    """Run `tpkernels <arguments>` on so many ranks; the exit code.

    The ranks write their own errors to this terminal, so torchrun's report of them is not logged. This process logs
    nothing else meanwhile.

    Args:
        ranks, arguments, hint: as for `launch`.
    """
    logging.disable(logging.CRITICAL)
    try:
        return launch(ranks, arguments, hint)
    finally:
        logging.disable(logging.NOTSET)

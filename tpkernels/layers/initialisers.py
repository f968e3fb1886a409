"""torch.nn.init on a sharded parameter: this rank's shard of what the function draws for the full one.

On the shard alone every rank would draw the same numbers, so that two hidden units had the same weights for good, from
bounds for the sizes of the shard.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tpkernels.shard import shard_info

from .base import init_shard_

BY_ROWS = {"normal_", "uniform_"}
NAMES = BY_ROWS | {
    "dirac_", "eye_", "kaiming_normal_", "kaiming_uniform_", "orthogonal_", "sparse_", "trunc_normal_",
    "xavier_normal_", "xavier_uniform_",
}  # fmt: skip


def fill_shards() -> None:
    """Wrap the functions in torch.nn.init, and in the table that transformers keeps of them."""
    for name in NAMES:
        setattr(nn.init, name, _of_full_tensor(getattr(nn.init, name), by_rows=name in BY_ROWS))
    table: dict[str, Any] = getattr(sys.modules.get("transformers.initialization"), "TORCH_INIT_FUNCTIONS", {})
    table.update({name: getattr(nn.init, name) for name in NAMES & table.keys()})


def _of_full_tensor(plain: Callable[..., Tensor], *, by_rows: bool) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def fill(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        info = shard_info(tensor)
        if info is None or info.world_size == 1:
            return plain(tensor, *args, **kwargs)
        return init_shard_(tensor, lambda full: plain(full, *args, **kwargs), by_rows=by_rows)

    return fill

"""FlopCounterMode of torch counts the products of the ops: all ranks together have those of the uncut program."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
from tpkernels.testing import run_ranks

TOKENS, IN, HIDDEN = 7, 5, 12  # tokens and IN do not divide by the ranks


def flops(forward_and_backward: object) -> Tensor:
    """The count of each phase."""
    with FlopCounterMode(display=False) as counter:
        forward_and_backward()  # type: ignore[operator]
    return torch.tensor(counter.get_total_flops())


def of_layers(sequence_parallel: bool, input_needs_gradient: bool, weights_need_gradients: bool) -> None:
    up, down = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN)
    with Group.open() as group:
        column = ColumnParallelLinear.from_linear(up, group=group, sequence_parallel=sequence_parallel)
        row = RowParallelLinear.from_linear(down, group=group, sequence_parallel=sequence_parallel)
        x = torch.ones(TOKENS, IN, requires_grad=input_needs_gradient)
        for one, cut in ((up, column), (down, row)):
            one.weight.requires_grad_(weights_need_gradients)
            cut.weight.requires_grad_(weights_need_gradients)
        mine = x.tensor_split(group.world_size)[group.rank] if sequence_parallel else x
        # The biases need gradients in any case.
        want = flops(lambda: down(F.relu(up(x))).sum().backward())
        got = flops(lambda: row(F.relu(column(mine))).sum().backward())
        dist.all_reduce(got)
        assert want > 0 and got == want, (got, want)
        with torch.no_grad():  # the ops themselves, without autograd
            part = torch.ones(TOKENS, row.weight.size(1))
            got = flops(lambda: ops.gemm_all_reduce(part, row.weight, group=group))
        dist.all_reduce(got)
        assert got == 2 * TOKENS * HIDDEN * IN


def check_layers() -> None:
    for sequence_parallel in (False, True):
        for needed in ((False, True), (True, False), (True, True)):
            of_layers(sequence_parallel, *needed)


def test_products_are_counted_on_the_rank_that_makes_them() -> None:
    run_ranks(check_layers, 3)


def test_every_op_with_a_product_has_a_formula() -> None:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("tpkernels::")]
    names = [s.name.split("::")[1] for s in schemas if any(a.name in ("w", "w_shard") for a in s.arguments)]
    assert len(names) == 8
    assert all(getattr(torch.ops.tpkernels, name) in flop_registry for name in names), names

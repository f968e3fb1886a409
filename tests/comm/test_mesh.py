"""Mesh.open: the groups of a rank, and sizes that do not fit."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.comm.objects import global_ranks
from tpkernels.planner import Recipe
from tpkernels.testing import run_ranks


def check_groups() -> None:
    rank = dist.get_rank()
    for tp, dp, pp in ((2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1)):
        with Mesh.open(tp=tp, dp=dp, pp=pp) as mesh:
            assert rank == (mesh.stage * dp + mesh.replica) * tp + mesh.tp.rank
            sizes = [1 if group is None else group.world_size for group in (mesh.tp, mesh.dp, mesh.pp)]
            assert sizes == [tp, dp, pp]
            assert global_ranks(mesh.world) == [0, 1, 2, 3]
            if mesh.pp is not None:
                assert global_ranks(mesh.pp) == [rank % (tp * dp), rank % (tp * dp) + tp * dp]
    with Group.open() as world:
        for sizes, text in (
            ({"tp": 2, "pp": 3}, r"tp \* dp \* pp = 2 \* 1 \* 3 = 6 must be the number of ranks, got 4: start 6 ranks"),
            ({"dp": 0}, "dp must be an int of 1 or more, got 0"),
        ):
            with pytest.raises(ValueError, match=text), Mesh.open(world=world, **sizes):  # type: ignore[arg-type]
                pass
        with Mesh.open(Recipe(tp=2, pp=1, dp=2, micro_batch=1), world=world) as mesh:
            assert mesh.tp.world_size == 2 == mesh.replicas and mesh.pp is None
        with pytest.raises(ValueError, match="got a cut and 2, 1 and 1"), Mesh.open(Recipe(4, 1, 1, 1), tp=2):
            pass


def test_a_mesh_has_the_groups_of_each_rank_and_refuses_sizes_that_do_not_fit() -> None:
    run_ranks(check_groups, 4)

"""The cut rule and its consequences, exhaustively over small sizes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tpkernels import shard

SIZES = [(n, R, unit) for unit in (1, 2, 3) for n in range(0, 13 * unit, unit) for R in range(1, 6)]


def test_part_sizes_add_up_and_differ_by_one_unit_at_most_with_the_larger_first() -> None:
    for n, R, unit in SIZES:
        sizes = shard.part_sizes(n, R, unit)
        assert len(sizes) == R
        assert sum(sizes) == n
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) in (0, unit)
        assert all(size % unit == 0 for size in sizes)


def test_part_starts_are_the_running_sums_of_the_sizes() -> None:
    for n, R, unit in SIZES:
        sizes = shard.part_sizes(n, R, unit)
        for rank in range(R):
            assert shard.part_start(n, R, rank, unit) == sum(sizes[:rank])
            assert shard.part_size(n, R, rank, unit) == sizes[rank]


def test_seven_items_over_three_ranks_are_three_two_two() -> None:
    assert shard.part_sizes(7, 3) == [3, 2, 2]
    assert shard.part_sizes(20, 3, unit=4) == [8, 8, 4]
    assert shard.part_sizes(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_join_gives_back_what_split_and_part_cut(dim: int) -> None:
    for n, R, unit in SIZES:
        shape = [3, 3]
        shape[dim] = n
        full = torch.arange(3 * n).reshape(shape)
        parts = [shard.part(full, dim, R, rank, unit) for rank in range(R)]
        assert all(torch.equal(a, b) for a, b in zip(parts, shard.split(full, dim, R, unit), strict=True))
        assert torch.equal(shard.join(parts, dim, unit), full)


def test_a_part_is_a_view_and_a_reslice_is_a_copy() -> None:
    full = torch.zeros(4, 2)
    shard.part(full, 0, 2, 1).fill_(1)
    assert full.sum() == 4
    shard.reslice(shard.split(full, 0, 2), 0, 1, 0).fill_(7)
    assert full.sum() == 4


@pytest.mark.parametrize("dim", [0, 1])
def test_a_reslice_from_any_R_to_any_R_equals_joining_and_cutting_again(dim: int) -> None:
    for n, R, unit in SIZES:
        shape = [2, 2]
        shape[dim] = n
        full = torch.arange(2 * n).reshape(shape)
        parts = shard.split(full, dim, R, unit)
        for R_to in range(1, 6):
            for rank in range(R_to):
                got = shard.reslice(parts, dim, R_to, rank, unit)
                assert torch.equal(got, shard.part(full, dim, R_to, rank, unit))


def test_shard_info_knows_its_part_of_the_unsharded_tensor() -> None:
    full = torch.arange(14).reshape(7, 2)
    info = shard.ShardInfo(dim=0, full_size=7, world_size=3, rank=1)
    assert (info.start, info.size) == (3, 2)
    assert torch.equal(info.part(full), full[3:5])
    assert info.sizes == [3, 2, 2]
    part = torch.nn.Parameter(full[3:5].float())
    assert shard.full_shape(part) == part.shape
    shard.mark_shard(part, info)
    assert shard.full_shape(part) == info.full_shape(part) == full.shape
    with pytest.raises(ValueError, match=r"dim 0 must have 7 indices, got shape \[2, 7\]"):
        info.part(full.t())


def test_parts_of_listed_runs_are_put_where_they_belong() -> None:
    runs = (((0, 2), (5, 0), (6, 1)), ((2, 2), (6, 1)), ())
    full = torch.arange(14).reshape(2, 7)
    infos = [shard.ShardInfo(-1, 7, 3, rank, runs=runs) for rank in range(3)]
    assert infos[0].sizes == [3, 3, 0]
    assert shard.lay_out(runs[0]) == [(0, 0, 2), (2, 6, 1)]
    whole = torch.full_like(full, -1)
    for rank, info in enumerate(infos):
        info.put(info.part(full), rank, whole)
    assert whole[:, [0, 1, 2, 3, 6]].equal(full[:, [0, 1, 2, 3, 6]]), "what a rank holds"
    assert (whole[:, 4:6] == -1).all(), "what nobody holds"


def test_shard_info_sits_on_parameters_and_survives_copy_and_pickle() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert shard.shard_info(parameter) is None
    info = shard.ShardInfo(0, 5, 2, 1, "key", "tp", 1)
    shard.mark_shard(parameter, info)
    assert shard.shard_info(parameter) is info
    assert pickle.loads(pickle.dumps(info)) == copy.deepcopy(info) == info


@pytest.mark.parametrize(
    ("n", "R", "unit", "rank"), [(-1, 2, 1, 0), (4, 0, 1, 0), (4, 2, 0, 0), (5, 2, 2, 0), (4, 2, 1, 2), (4, 2, 1, -1)]
)
def test_an_impossible_cut_says_what_came(n: int, R: int, unit: int, rank: int) -> None:
    with pytest.raises(ValueError, match="got"):
        shard.part_start(n, R, rank, unit)


def test_parts_of_another_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes \[3, 2\], got \[2, 3\]"):
        shard.join([torch.zeros(2), torch.zeros(3)], 0)
    with pytest.raises(ValueError, match=r"sizes \[2, 2\], got \[3, 1\]"):
        shard.reslice([torch.zeros(3), torch.zeros(1)], 0, 1, 0)
    with pytest.raises(ValueError, match="got none"):
        shard.join([], 0)

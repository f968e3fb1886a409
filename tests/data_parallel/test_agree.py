"""replicas_agree: planted differences between replicas are found and named, whatever their kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.pipelines import tiny_llama
from tpkernels import layers, parallelize
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.data_parallel import digest as digests
from tpkernels.data_parallel import replicas_agree
from tpkernels.data_parallel.agree import Agreement
from tpkernels.data_parallel.digest import digest
from tpkernels.errors import RankMismatchError
from tpkernels.pipeline import split_by_layer, take_stages
from tpkernels.testing import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


class Tied(nn.Module):
    """All kinds of tensors: tied, low precision, empty, at an odd offset of a flat buffer, complex, counters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.low = nn.Linear(6, 5, dtype=torch.bfloat16)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.flat = nn.Parameter(torch.randn(9)[1:8])
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("waves", torch.randn(3, dtype=torch.complex64))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, to write into."""
    return tensor.detach().view(torch.uint8).view(-1)


@torch.no_grad()
def flip(tensor: Tensor) -> None:
    """The lowest bit of the last byte but one."""
    bits(tensor)[-2] ^= 1


@torch.no_grad()
def swap(tensor: Tensor) -> None:
    tensor[0], tensor[1] = tensor[1].clone(), tensor[0].clone()


@torch.no_grad()
def negative_zero(tensor: Tensor) -> None:
    tensor.view(-1)[0] = -0.0 if str(float(tensor.view(-1)[0])) == "0.0" else 0.0


def held(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer of that name."""
    module, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(module), name)
    assert isinstance(found, Tensor)
    return found


FAULTS: list[tuple[str, Callable[[Tensor], object]]] = [
    ("embedding.weight", flip),
    ("head.weight", swap),
    ("low.weight", flip),
    ("low.bias", swap),
    ("norm.bias", negative_zero),
    ("flat", flip),
    ("transposed", lambda t: swap(t.detach())),
    ("norm.running_mean", flip),
    ("norm.num_batches_tracked", lambda t: t.add_(1)),
    ("waves", lambda t: flip(torch.view_as_real(t))),
]


@contextmanager
def faulty(tensor: Tensor, fault: Callable[[Tensor], object], here: bool) -> Iterator[None]:
    """The fault inside, on this rank if it is here, and the old bits again behind."""
    kept = tensor.detach().clone()
    if here:
        fault(tensor)
    yield
    tensor.detach().copy_(kept)


def compared(model: nn.Module, group: Group, **options: bool) -> Agreement:
    """What was found, which must be the same on all ranks."""
    found = replicas_agree(model, group=group, **options)
    every: list[Agreement | None] = [None] * group.world_size
    dist.all_gather_object(every, found, group=group.process_group)
    assert set(every) == {found}, every
    return found


def check_every_fault_is_named() -> None:
    group = Group.open()
    R, last = group.world_size, group.world_size - 1
    torch.manual_seed(0)
    model = Tied()
    found = compared(model, group)
    assert found, found.text
    assert found.text == f"all {R} ranks hold the same {9 + 4} parameters and buffers"
    found.check()
    for (path, fault), culprit in itertools.product(FAULTS, (0, last)):
        with faulty(held(model, path), fault, group.rank == culprit):
            found = compared(model, group)
        name = path.replace("head.weight", "embedding.weight")  # tied
        # Of two ranks neither is in the majority: the lower one is taken for right.
        expected = (1,) if R == 2 else (culprit,)
        assert (found.agree, found.first, found.ranks) == (False, name, expected), f"{name} on rank {culprit}: {found}"
        assert f"{name!r} is the first to differ, on ranks {list(expected)}: other bits in" in found.text
        with pytest.raises(RankMismatchError, match="is the first to differ"):
            found.check()
        assert compared(model, group), "the fault is gone"
    with faulty(held(model, "norm.running_mean"), flip, group.rank == 0):
        assert compared(model, group, buffers=False), "buffers do not count"
    with torch.no_grad():  # several faults: the first one is named, and every rank that has it
        model.low.bias.fill_(float(group.rank == 0))
        model.norm.weight.fill_(float(group.rank == 0))
    found = compared(model, group)
    assert (found.first, found.ranks) == ("norm.weight", (1,) if R == 2 else (0,)), found


def check_nan_counts_by_its_bits() -> None:
    group = Group.open()
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert compared(model, group), "a NaN is itself"
    bits(model.bias)[0] = group.rank
    assert bool(model.bias.isnan().all())
    assert not compared(model, group), "another payload is other bits"


def check_other_models_are_named() -> None:
    group = Group.open()
    odd = group.rank == group.world_size - 1
    torch.manual_seed(0)
    for mine, name, text in (
        (nn.Linear(3, 4 if odd else 5), "weight", "float32 [4, 3]"),
        (nn.Linear(3, 4, bias=not odd), "bias", "nothing on rank"),
        (nn.Linear(3, 4, dtype=torch.bfloat16 if odd else None), "weight", "bfloat16 [4, 3]"),
        (nn.Sequential(nn.Linear(1, 1)) if odd else nn.ModuleDict({"a": nn.Linear(1, 1)}), "a.weight", "'0.weight'"),
    ):
        for parameter in mine.parameters():
            nn.init.zeros_(parameter)
        found = compared(mine, group)
        assert not found
        assert found.first == name, found
        assert found.ranks == (group.world_size - 1,), found
        assert text in found.text, found.text
    assert compared(nn.Identity(), group), "nothing to differ"
    torch.manual_seed(0)
    untied = Tied()
    assert compared(untied, group)
    if odd:
        untied.head.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    assert not compared(untied, group), "tied here, not there"


def check_cut_parameters_compare_over_the_replicas_only() -> None:
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    tp, dp = Group.open(rows[rank // 2]), Group.open(columns[rank % 2])
    torch.manual_seed(0)
    model = nn.Sequential(layers.ColumnParallelLinear(6, 5, group=tp), layers.RowParallelLinear(5, 6, group=tp))
    model.append(layers.RMSNorm(6, group=tp))
    for group in (tp, dp):
        assert compared(model, group), group.label
    first, second = held(model, "0.weight"), held(model, "1.bias")
    with faulty(first, flip, rank == 3):
        assert compared(model, tp), "the parts of ranks differ by design"
        assert bool(compared(model, dp)) == (rank % 2 == 0), "only the replicas of the part see it"
    with faulty(second, flip, rank == 3):
        for group, others in ((tp, rank < 2), (dp, rank % 2 == 0)):
            found = compared(model, group)
            assert bool(found) == others
            assert others or (found.first, found.ranks) == ("1.bias", (1,)), found
    again = Group.open(rows[rank // 2])
    assert compared(model, again), "another group of the same ranks"
    wider = nn.Sequential(layers.ColumnParallelLinear(6, 5 if rank % 2 else 7, group=tp))
    found = compared(wider, tp)
    assert (found.first, found.ranks) == ("0.weight", (1,)), found
    assert "[7, 6], cut over this group" in found.text, found.text
    for group in (again, tp, dp):
        group.close()


def check_two_or_three_ranks() -> None:
    check_every_fault_is_named()
    check_nan_counts_by_its_bits()
    check_other_models_are_named()
    assert replicas_agree(nn.Linear(2, 2), group=Group.open()) is not None
    with pytest.raises(ValueError, match="'weight' must be dense and hold values"):
        replicas_agree(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match="got list"):
        replicas_agree([], group=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("R", [1, 2, 3])
def test_replicas_that_differ_are_found_and_named(R: int) -> None:
    run_ranks(check_two_or_three_ranks if R > 1 else check_one_rank, R)


def check_one_rank() -> None:
    assert replicas_agree(Tied(), group=Group.open())


def test_parts_of_ranks_are_no_replicas_of_each_other() -> None:
    run_ranks(check_cut_parameters_compare_over_the_replicas_only, 4)


@pytest.mark.parametrize("run", [4, digests.RUN])
def test_the_digest_depends_on_every_bit_and_on_its_place(run: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(digests, "RUN", run), mock.patch.dict(digests.ROWS, {"cpu": 3 if run == 4 else 1}):
        digests._numbers.cache_clear()
        for dtype, size in itertools.product(DTYPES, (1, 2, 3, 8, 9, 64, 200)):
            x = torch.randint(0, 2, (size,), generator=generator).to(dtype)
            known = digest(x)
            assert torch.equal(digest(x.clone()), known)
            seen = {int(known)}
            data = bits(x)
            places = range(data.numel()) if size <= 9 else range(0, data.numel(), 37)
            for byte, bit in itertools.product(places, (1, 128)):
                data[byte] ^= bit
                seen.add(int(digest(x)))
                data[byte] ^= bit
            assert len(seen) == 1 + 2 * len(places), f"{dtype}, {size} values: two bits gave one digest"
        zeros = torch.zeros(5 * 4 * 40)
        found = set()
        for i in range(zeros.numel()):
            zeros[i] = -0.0
            found.add(int(digest(zeros)))
            zeros[i] = 0.0
        assert len(found) == zeros.numel(), "where the minus is must count"
        words = torch.arange(200)
        swapped = {int(digest(words))}
        for i, j in itertools.combinations(range(0, 200, 9), 2):
            words[[i, j]] = words[[j, i]]
            swapped.add(int(digest(words)))
            words[[i, j]] = words[[j, i]]
        assert len(swapped) == 1 + 23 * 22 // 2
    digests._numbers.cache_clear()


def test_the_digest_of_a_long_tensor_is_that_of_its_runs() -> None:
    x = torch.randn(3 * digests.RUN * 2 + 11)
    known = digest(x)
    for place in (0, 2 * digests.RUN, 4 * digests.RUN + 1, x.numel() - 1):
        with faulty(x[place : place + 1], flip, True):
            assert not torch.equal(digest(x), known)
    a, b = x[: 2 * digests.RUN].clone(), x[2 * digests.RUN : 4 * digests.RUN].clone()
    x[: 2 * digests.RUN], x[2 * digests.RUN : 4 * digests.RUN] = b, a
    assert not torch.equal(digest(x), known), "whole runs that change places"


def check_a_mesh() -> None:
    """A bit of a parameter that both shards hold, of a shard of both replicas, and of a copy on another stage."""
    norm, up = "model.layers.0.input_layernorm.weight", "model.layers.2.mlp.up_proj.weight"
    for sizes, changed, on, first in (
        ({"tp": 2, "pp": 2}, norm, 1, norm),
        ({"tp": 2, "dp": 2}, up, 3, up),
        ({"pp": 4}, "lm_head.weight", 3, "model.embed_tokens.weight"),
    ):
        with Mesh.open(**sizes) as mesh:
            model = tiny_llama()
            split = split_by_layer(model, sizes.get("pp", 1)) if mesh.pp is not None else None
            parallelize(model, group=mesh.tp)
            if split is not None:
                take_stages(model, split, mesh.stage)
            replicas_agree(model, mesh=mesh).check()
            if mesh.world.rank == on:
                flip(dict(model.named_parameters(remove_duplicate=False))[changed])
            agreement = replicas_agree(model, mesh=mesh)
            assert not agreement and agreement.first == first, (sizes, agreement.text)
            with pytest.raises(ValueError, match="got both"):
                replicas_agree(model, mesh=mesh, group=mesh.world)


def test_all_ranks_of_a_mesh_see_what_differs_on_one() -> None:
    run_ranks(check_a_mesh, 4)

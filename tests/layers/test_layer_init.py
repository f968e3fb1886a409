"""The same random numbers for any number of ranks: initialisation, dropout, the state of the generators."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.harness.layers import assert_equal, leaf, mine
from tpkernels import layers, parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.layers import base
from tpkernels.shard import ShardInfo, mark_shard, part, shard_info
from tpkernels.testing import run_ranks

RANKS = pytest.mark.parametrize("R", [1, 2, 3, 4])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def drawn_in_parts(shape: tuple[int, ...], dim: int, R: int, rank: int, fill: Callable[[Tensor], object]) -> Tensor:
    """This rank's part of a tensor, drawn in blocks with seed 0, and one more number to see the generator's state."""
    info = ShardInfo(dim, shape[dim], R, rank)
    sizes = list(shape)
    sizes[dim] = info.size
    parameter = nn.Parameter(torch.full(sizes, torch.nan))
    mark_shard(parameter, info)
    torch.manual_seed(0)
    base.init_shard_(parameter, fill, by_rows=True)
    return torch.cat([parameter.detach().flatten(), torch.rand(1)])


@pytest.mark.parametrize("fill", [nn.init.normal_, nn.init.uniform_], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", [0, 1])
def test_drawing_in_row_blocks_equals_one_draw_bit_for_bit(
    fill: Callable[[Tensor], object], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block, rows, columns in itertools.product((16, 64, 1 << 20), (1, 15, 16, 17, 47, 48, 50), (1, 3, 16)):
        monkeypatch.setattr(base, "BLOCK_ELEMENTS", block)
        torch.manual_seed(0)
        full = torch.empty(rows, columns)
        fill(full)
        last = torch.rand(1)
        for R in (1, 2, 3):
            for rank in range(R):
                want = torch.cat([part(full, dim, R, rank).flatten(), last])
                got = drawn_in_parts((rows, columns), dim, R, rank, fill)
                assert torch.equal(got, want), (block, rows, columns, R, rank)


def test_a_large_draw_never_holds_the_whole_tensor() -> None:
    sizes: list[int] = []

    def fill(block: Tensor) -> None:
        sizes.append(block.numel())
        nn.init.normal_(block)

    drawn_in_parts((5000, 1000), 0, 4, 1, fill)
    assert sum(sizes) == 5_000_000
    assert max(sizes) < 2 * base.BLOCK_ELEMENTS


def check_layers_start_as_unsharded_ones() -> None:
    group = Group.open()
    for dtype, bias, (K, N) in itertools.product(DTYPES, (True, False), ((40, 24), (7, 5), (130, 67), (3, 1))):
        for cls in (layers.ColumnParallelLinear, layers.RowParallelLinear):
            torch.manual_seed(1)
            reference = nn.Linear(K, N, bias, dtype=dtype)
            state = torch.get_rng_state()
            torch.manual_seed(1)
            layer = cls(K, N, bias, group=group, dtype=dtype)
            assert torch.equal(torch.get_rng_state(), state), "the generator goes on as after the unsharded layer"
            for name, parameter in layer.named_parameters():
                info = shard_info(parameter)
                full = getattr(reference, name).detach()
                assert_equal(parameter.detach(), (full if info is None else info.part(full)).contiguous(), name)
            assert_equal(layer.full_weight(), reference.weight.detach(), "full_weight")
            if bias:
                assert_equal(layer.full_bias(), reference.bias.detach(), "full_bias")
    for dtype, padding, V in itertools.product(DTYPES, (None, 2, -1), (16, 11, 3)):
        torch.manual_seed(1)
        table = nn.Embedding(V, 6, padding_idx=padding, dtype=dtype)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        embedding = layers.VocabParallelEmbedding(V, 6, group=group, padding_idx=padding, dtype=dtype)
        assert torch.equal(torch.get_rng_state(), state)
        assert_equal(embedding.full_weight(), table.weight.detach(), "table")


@RANKS
def test_layers_start_with_the_values_of_the_unsharded_ones_for_the_same_seed(R: int) -> None:
    run_ranks(check_layers_start_as_unsharded_ones, R)


def check_init_shard() -> None:
    group = Group.open()

    layer = layers.RowParallelLinear(5, 7, group=group, device="meta").to_empty(device="cpu")
    for fill in (nn.init.orthogonal_, nn.init.trunc_normal_):  # neither can be drawn in pieces
        torch.manual_seed(2)
        full = fill(torch.empty(7, 5))
        torch.manual_seed(2)
        layers.init_shard_(layer.weight, fill)
        assert_equal(layer.weight.detach(), mine(full, 1, group).contiguous(), "weight")
    assert layer.bias is not None
    layers.init_shard_(layer.bias, nn.init.ones_)
    assert_equal(layer.bias.detach(), torch.ones(7), "a replicated parameter is filled as it is")


@RANKS
def test_init_shard_gives_each_rank_its_part_of_any_initialiser(R: int) -> None:
    run_ranks(check_init_shard, R)


# Dropout.


INITIALISERS: list[tuple[str, dict[str, float | str]]] = [
    ("normal_", {"std": 0.1}), ("uniform_", {}), ("trunc_normal_", {"std": 0.02}), ("eye_", {}), ("orthogonal_", {}),
    ("sparse_", {"sparsity": 0.4}), ("xavier_normal_", {}), ("xavier_uniform_", {}), ("kaiming_uniform_", {}),
    ("kaiming_normal_", {"mode": "fan_out"}),
]  # fmt: skip


def drawn_by(name: str, options: dict[str, float | str], model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            getattr(nn.init, name)(parameter, **options)
        else:
            nn.init.normal_(tensor=parameter)
    return model


def check_torchs_initialisers() -> None:
    group = Group.open()
    whole = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 10), nn.Linear(10, 6))
    plan = {"0": "vocab", "1": "column", "2": "row"}
    cut = parallelize(copy.deepcopy(whole), group=group, plan=plan)
    for name, options in INITIALISERS:
        full = dict(drawn_by(name, options, whole).named_parameters())
        for key, got in drawn_by(name, options, cut).named_parameters():
            info = shard_info(got)
            assert_equal(got, full[key] if info is None else info.part(full[key]), f"{name} {key}")
    for padding in (1, 5):
        table = nn.Sequential(nn.Embedding(7, 6, padding_idx=padding))
        shard = parallelize(copy.deepcopy(table), group=group, plan={"0": "vocab"})
        for model in (table, shard):
            torch.manual_seed(2)
            model.apply(_init_weights)
        assert_equal(shard[0].weight, shard_info(shard[0].weight).part(table[0].weight), f"padding {padding}")
        assert shard[0].padding_idx == padding


@torch.no_grad()
def _init_weights(module: nn.Module) -> None:
    """The rule for tables in models of transformers."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


@RANKS
def test_functions_of_torch_give_each_rank_its_part_of_the_unsharded_draw(R: int) -> None:
    run_ranks(check_torchs_initialisers, R)


def check_dropout() -> None:
    group = Group.open()
    for dtype, (dim, size), p in itertools.product(DTYPES, ((None, 9), (0, 9), (1, 8), (-1, 7)), (0.3, 0.0, 1.0)):
        shape = [6, 6, 6]
        shape[dim or 0] = size
        x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        torch.manual_seed(3)
        theirs, ours = leaf(x), leaf(x if dim is None else mine(x, dim, group))
        want = nn.Dropout(p)(theirs)
        state = torch.get_rng_state()
        for full_size in (None, size):
            ours.grad = theirs.grad = None
            torch.manual_seed(3)
            y = layers.ParallelDropout(p, group=group, shard_dim=dim)(ours, full_size)
            assert torch.equal(torch.get_rng_state(), state), "the generator goes on as after nn.Dropout"
            assert_equal(y, want if dim is None else mine(want, dim, group).contiguous(), "y")
            y.backward(torch.ones_like(y))
            want.backward(torch.ones_like(want), retain_graph=True)
            assert theirs.grad is not None
            assert_equal(ours.grad, theirs.grad if dim is None else mine(theirs.grad, dim, group).contiguous(), "dx")
    silent = layers.ParallelDropout(0.5, group=group, shard_dim=0).eval()
    assert silent(x) is x


@RANKS
def test_dropout_of_cut_activations_equals_that_of_the_unsharded_ones_bit_for_bit(R: int) -> None:
    run_ranks(check_dropout, R)


def check_dropout_refuses_another_cut() -> None:
    group = Group.open()
    dropout = layers.ParallelDropout(0.5, group=group, shard_dim=0)
    with pytest.raises(ValueError, match=f"the part of rank {group.rank} of 2 of 9 along dim 0 has shape"):
        dropout(torch.ones(3), 9)


def test_dropout_refuses_a_part_of_another_cut() -> None:
    run_ranks(check_dropout_refuses_another_cut, 2)


def check_rank_rng() -> None:
    group = Group.open()
    torch.manual_seed(5)
    with layers.rank_rng(group):
        own = torch.rand(4)
    common = torch.rand(4)
    with layers.rank_rng(group):
        again = torch.rand(4)
    layers.check_same_rng(group)
    both = torch.cat([own, again, common]).unsqueeze(0)
    rows = base.gather(both, 0, group.world_size, group)
    assert torch.equal(rows[:, 8:], rows[:1, 8:].expand(group.world_size, 4)), "behind the block all ranks agree"
    assert rows[:, :8].unique().numel() == 8 * group.world_size, "inside it nothing repeats"
    torch.manual_seed(5)
    with layers.rank_rng(group):
        assert torch.equal(torch.rand(4), own), "and all of it follows from the seed"


def check_state_goes_into_a_checkpoint() -> None:
    group = Group.open()
    dropout = layers.ParallelDropout(0.5, group=group, shard_dim=0)
    x = torch.ones(40)
    dropout(x, 40 * group.world_size)
    state = layers.rng_state()
    first = dropout(x, 40 * group.world_size)
    with layers.rank_rng(group):
        second = F.dropout(x)
    torch.rand(17)
    layers.set_rng_state(state)
    assert torch.equal(dropout(x, 40 * group.world_size), first)
    with layers.rank_rng(group):
        assert torch.equal(F.dropout(x), second)


def check_activation_checkpointing_replays_the_masks() -> None:
    group = Group.open()
    size = 30 * group.world_size
    dropout = layers.ParallelDropout(0.5, group=group, shard_dim=0)

    def body(x: Tensor) -> Tensor:
        y = dropout(x.exp(), size)
        with layers.rank_rng(group):
            return F.dropout(y.exp()) * y

    results = []
    for body_ in (body, lambda x: checkpoint(body, x, use_reentrant=False)):
        torch.manual_seed(6)
        x = leaf(torch.linspace(0, 1, 30))
        y = body_(x)
        torch.rand(3)  # the generator moves on between forward and backward
        y.sum().backward()
        results.append((y, x.grad))
    assert_equal(results[1][0], results[0][0], "y")
    assert_equal(results[1][1], results[0][1], "dx")


def check_drifted_generators_are_found() -> None:
    group = Group.open()
    torch.manual_seed(7)
    layers.check_same_rng(group)
    if group.rank == 1:
        torch.rand(1)
    if group.world_size == 1:
        return
    with pytest.raises(RankMismatchError, match="default generators are in different states"):
        layers.check_same_rng(group)


@pytest.mark.parametrize("R", [1, 2, 3])
@pytest.mark.parametrize(
    "check",
    [
        check_rank_rng,
        check_state_goes_into_a_checkpoint,
        check_activation_checkpointing_replays_the_masks,
        check_drifted_generators_are_found,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_random_numbers_over_the_ranks(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


def test_a_probability_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p must be between 0 and 1, got 1\.5"):
        layers.ParallelDropout(1.5)

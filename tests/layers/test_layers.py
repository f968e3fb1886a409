"""What layers do besides computing: options, copies, devices, dtypes, activation checkpointing, messages."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.harness.layers import F64, assert_equal, assert_same_step, integers, leaf, make_integer, mine
from tests.harness.ranks import Run, on_processes, on_ranks
from tpkernels import layers
from tpkernels.comm.group import Group
from tpkernels.layers.base import ParallelModule
from tpkernels.shard import part_size, shard_info
from tpkernels.testing import run_ranks


def an_mlp(group: Group | None, **options: object) -> nn.Sequential:
    """Integer-valued, uneven over 2 and 3 ranks."""
    up = make_integer(nn.Linear(6, 7, dtype=F64))
    down = make_integer(nn.Linear(7, 6, dtype=F64), seed=5)
    return nn.Sequential(
        layers.ColumnParallelLinear.from_linear(up, group=group, **options),
        nn.ReLU(),
        layers.RowParallelLinear.from_linear(down, group=group, **options),
    )


def the_same_mlp_unsharded() -> nn.Sequential:
    up, down = make_integer(nn.Linear(6, 7, dtype=F64)), make_integer(nn.Linear(7, 6, dtype=F64), seed=5)
    return nn.Sequential(up, nn.ReLU(), down)


def every_layer(group: Group | None, **kwargs: object) -> list[ParallelModule]:
    return [
        layers.ColumnParallelLinear(6, 7, group=group, **kwargs),
        layers.RowParallelLinear(7, 6, group=group, **kwargs),
        layers.VocabParallelEmbedding(11, 6, group=group, padding_idx=3, **kwargs),
        layers.RMSNorm(6, group=group, sequence_parallel=True, **kwargs),
        layers.LayerNorm(6, group=group, sequence_parallel=True, **kwargs),
    ]


def marks(module: nn.Module) -> dict[str, object]:
    return {name: shard_info(parameter) for name, parameter in module.named_parameters()}


@on_ranks(1, 2, 3)
def check_from_linear_keeps_what_the_module_was(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        linear, table = nn.Linear(6, 7, dtype=dtype).eval(), nn.Embedding(11, 6, dtype=dtype)
        linear.weight.requires_grad_(False)
        before = torch.get_rng_state()
        made = [
            layers.ColumnParallelLinear.from_linear(linear, group=group),
            layers.RowParallelLinear.from_linear(linear, group=group),
        ]
        embedding = layers.VocabParallelEmbedding.from_embedding(table, group=group)
        assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"
        for layer in made:
            assert not layer.training
            assert not layer.weight.requires_grad
            assert layer.bias is not None
            assert layer.bias.requires_grad
            assert layer.weight.is_contiguous()
            assert layer.weight.untyped_storage().data_ptr() != linear.weight.untyped_storage().data_ptr()
            assert_equal(layer.full_weight(), linear.weight.detach(), "full_weight")
            assert_equal(layer.full_bias(), linear.bias.detach(), "full_bias")
        assert embedding.training
        assert_equal(embedding.full_weight(), table.weight.detach(), "table")
        norm = nn.LayerNorm(6, eps=0.5, dtype=dtype).eval()
        copied = layers.LayerNorm.from_norm(norm, group=group)
        assert (copied.eps, copied.training, copied.weight is norm.weight) == (0.5, False, False)


@on_ranks(1, 2, 3)
def check_state_dicts_have_the_unsharded_keys(group: Group) -> None:
    model = an_mlp(group)
    assert list(model.state_dict()) == list(the_same_mlp_unsharded().state_dict())
    expected = marks(model)
    other = an_mlp(group).double()
    for assign in (False, True):
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.load_state_dict(model.state_dict(), assign=assign)
        assert marks(other) == expected, "assign=True makes new parameters; they are marked again"
        assert_equal(other[0].weight.detach(), model[0].weight.detach(), "weight")
    if group.world_size > 1:
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(the_same_mlp_unsharded().state_dict())


@on_ranks(1, 2, 3)
def check_copies_and_pickles_share_the_group_and_keep_the_marks(group: Group) -> None:
    torch.manual_seed(0)
    for layer in every_layer(group):
        layer.eval()
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(layer),
            copy.copy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ):
            assert twin.group is group
            assert not twin.training
            assert marks(twin) == marks(layer)
            assert repr(twin) == repr(layer)
            for name, value in layer.state_dict().items():
                assert_equal(twin.state_dict()[name], value, name)
        twin = copy.deepcopy(layer)
        nn.init.zeros_(next(twin.parameters()))
        assert next(layer.parameters()).any(), "a deep copy has its own weights"
    model = copy.deepcopy(an_mlp(group))
    x = integers(3, 6, seed=1)
    assert_equal(model(x), the_same_mlp_unsharded()(x), "a copied model computes")


@on_ranks(1, 2, 3)
def check_set_group_moves_a_layer(group: Group) -> None:
    first, second = group, Group.open()
    model = an_mlp(first)
    for layer in (model[0], model[2]):
        layer.set_group(second)
    first.close()
    x = integers(3, 6, seed=1)
    assert_equal(model(x), the_same_mlp_unsharded()(x), "y")
    info = shard_info(model[0].weight)
    assert info is not None
    assert info.group_name == second.name


@on_ranks(1, 2, 3)
def check_meta_to_empty_and_casts(group: Group) -> None:
    torch.manual_seed(3)
    real = every_layer(group)
    torch.manual_seed(3)
    for layer, want in zip(every_layer(group, device="meta"), real, strict=True):
        assert all(p.is_meta for p in layer.parameters())
        layer.to_empty(device="cpu")
        layer.reset_parameters()  # type: ignore[operator]
        assert marks(layer) == marks(want)
        for name, value in want.state_dict().items():
            assert_equal(layer.state_dict()[name], value, name)
        assert marks(layer.to(torch.bfloat16)) == marks(want)
        assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    with torch.device("meta"):
        assert layers.RowParallelLinear(7, 6, group=group).weight.is_meta
        linear = nn.Linear(6, 7)
    assert layers.ColumnParallelLinear.from_linear(linear, group=group).weight.is_meta
    x = torch.empty(2, 5, 6, device="meta")
    y = layers.ColumnParallelLinear(6, 7, group=group, device="meta", gather_output=True)(x)
    assert (y.shape, y.device.type) == ((2, 5, 7), "meta")


@on_ranks(1, 2, 3)
def check_autocast(group: Group) -> None:
    reference, model = the_same_mlp_unsharded().float(), an_mlp(group).float()
    reference[0].weight.data.clamp_(-1, 1)  # sums stay below 256, which bf16 holds exactly
    reference[2].weight.data.clamp_(-1, 1)
    with torch.no_grad():
        for layer, other in ((model[0], reference[0]), (model[2], reference[2])):
            info = shard_info(layer.weight)
            assert info is not None
            layer.weight.copy_(info.part(other.weight))
    x = integers(4, 6, seed=1, dtype=torch.float32)
    ours, theirs = leaf(x), leaf(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = model(ours), reference(theirs)
    assert y.dtype == torch.bfloat16
    assert_equal(y, want, "y")
    y.sum().backward()
    want.sum().backward()
    assert_equal(ours.grad, theirs.grad, "dx")
    assert_same_step(model, reference, exact=True)


@on_ranks(1, 2, 3)
def check_frozen_weights(group: Group) -> None:
    model, reference = an_mlp(group), the_same_mlp_unsharded()
    for parameter in (*model.parameters(), *reference.parameters()):
        parameter.requires_grad_(False)
    ours, theirs = leaf(integers(3, 6, seed=1)), leaf(integers(3, 6, seed=1))
    model(ours).sum().backward()
    reference(theirs).sum().backward()
    assert_equal(ours.grad, theirs.grad, "dx")
    norm = layers.RMSNorm(6, group=group, sequence_parallel=True, dtype=F64).requires_grad_(False)
    norm(ours).sum().backward()
    assert norm.weight is not None
    assert norm.weight.grad is None


@on_ranks(1, 2, 3)
def check_activation_checkpointing(group: Group) -> None:
    for cut in (False, True):
        model, reference = an_mlp(group, sequence_parallel=cut), the_same_mlp_unsharded()
        x = integers(5, 6, seed=1)
        ours, theirs = leaf(mine(x, 0, group) if cut else x), leaf(x)
        y, want = checkpoint(model, ours, use_reentrant=False), reference(theirs)
        y.sum().backward()
        want.sum().backward()
        assert theirs.grad is not None
        assert_equal(ours.grad, mine(theirs.grad, 0, group).contiguous() if cut else theirs.grad, "dx")
        assert_same_step(model, reference, exact=True)


@on_ranks(1, 2, 3)
def check_tied_weights(group: Group) -> None:
    table = make_integer(nn.Embedding(11, 6, dtype=F64))
    head = nn.Linear(6, 11, bias=False, dtype=F64)
    head.weight = table.weight
    embedding = layers.VocabParallelEmbedding.from_embedding(table, group=group)
    tied = layers.ColumnParallelLinear(6, 11, bias=False, group=group, dtype=F64)
    tied.weight = embedding.weight
    ids = torch.tensor([[1, 10, 3], [0, 5, 5]])
    logits, want = tied(embedding(ids)), head(table(ids))
    assert_equal(logits, mine(want, -1, group).contiguous(), "logits")
    logits.sum().backward()
    want.sum().backward()
    assert_same_step(nn.Sequential(embedding), nn.Sequential(table), exact=True)


@on_ranks(1, 2, 3)
def check_wire_codecs_reach_the_ops(group: Group) -> None:
    torch.manual_seed(0)
    reference = nn.Linear(64, 32)
    x = torch.randn(8, 64)
    want = reference(x)
    for codec, eps in (("fp16", 2.0**-10), ("bf16", 2.0**-7)):
        layer = layers.RowParallelLinear.from_linear(reference, group=group, codec=codec, input_is_parallel=False)
        error = (layer(x) - want).abs().max() / want.abs().max()
        assert error < 2 * group.world_size * eps
        assert group.world_size == 1 or error > 1e-6, "packed values are rounded"
        assert f"codec='{codec}'" in repr(layer)


@on_ranks(1, 2, 3)
def check_a_vector_without_batch(group: Group) -> None:
    whole, cut = the_same_mlp_unsharded(), an_mlp(group)
    x = integers(6, seed=3)
    inputs = [leaf(x), leaf(x)]
    outputs = [model(given) for model, given in zip((whole, cut), inputs, strict=True)]
    assert_equal(outputs[1], outputs[0], "y")
    for output in outputs:
        output.sum().backward()
    assert_equal(inputs[1].grad, inputs[0].grad, "dx")
    gathers = layers.ColumnParallelLinear.from_linear(whole[0], group=group, gather_output=True)
    assert_equal(gathers(x), whole[0](x), "gathered")


@on_processes(globals())
def test_layers_over_the_ranks(run: Run) -> None:
    run()


# Pickles between processes.


def write_pickle(folder: str) -> None:
    torch.save(an_mlp(None), Path(folder) / f"{Group.open().rank}.pt")


def read_pickle(folder: str, shift: int) -> None:
    group = Group.open()
    model = torch.load(Path(folder) / f"{(group.rank + shift) % 2}.pt", weights_only=False)
    x = integers(3, 6, seed=1)
    assert_equal(model(x), the_same_mlp_unsharded()(x), "y")
    info = shard_info(model[0].weight)
    assert info is not None
    assert info.group_name == model[0].group.name


def test_a_layer_pickled_in_one_process_works_in_another(tmp_path: Path) -> None:
    run_ranks(write_pickle, 2, str(tmp_path))
    run_ranks(read_pickle, 2, str(tmp_path), 0)
    with pytest.raises(
        ValueError, match=r"pickled by rank 0 of 2, whose shard it holds, got group '.*' with rank 0 of 1"
    ):
        torch.load(tmp_path / "0.pt", weights_only=False)


# One process, no process group.


def test_without_a_process_group_layers_are_the_plain_modules() -> None:
    x = integers(4, 6, seed=1)
    assert_equal(an_mlp(None)(x), the_same_mlp_unsharded()(x), "y")
    assert an_mlp(None)[0].group.transport == "local"


def check_representations() -> None:
    group = Group.open()
    shard = part_size(7, 2, group.rank)
    column = layers.ColumnParallelLinear(6, 7, group=group, sequence_parallel=True, sequence_dim=1)
    assert column.extra_repr() == (
        f"in_features=6, out_features=7 (shard {shard}), bias=True, rank={group.rank} of 2, sequence_dim=1"
    )
    row = layers.RowParallelLinear(7, 6, False, group=group)
    assert row.extra_repr() == f"in_features=7 (shard {shard}), out_features=6, bias=False, rank={group.rank} of 2"
    embedding = layers.VocabParallelEmbedding(7, 6, group=group, padding_idx=-1)
    assert embedding.extra_repr() == f"7 (shard {shard}), 6, rank={group.rank} of 2, padding_idx=6"


def test_representations_say_full_and_shard_sizes() -> None:
    run_ranks(check_representations, 2)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: layers.VocabParallelEmbedding(5, 2, max_norm=1.0), ValueError, r"max_norm .* got 1\.0; use None"),
        (lambda: layers.VocabParallelEmbedding(5, 2, sparse=True), ValueError, "sparse gradients are not supported"),
        (
            lambda: layers.VocabParallelEmbedding.from_embedding(nn.Embedding(5, 2, scale_grad_by_freq=True)),
            ValueError,
            "scale_grad_by_freq is not supported",
        ),
        (lambda: layers.VocabParallelEmbedding(5, 2, padding_idx=5), ValueError, "within the 5 rows, got 5"),
        (lambda: layers.VocabParallelEmbedding(5, 2)(torch.tensor([5])), ValueError, "5"),
        (lambda: layers.VocabParallelCrossEntropy(reduction="avg"), ValueError, "got 'avg'"),
        (lambda: layers.VocabParallelCrossEntropy(label_smoothing=1.5), ValueError, r"between 0 and 1, got 1\.5"),
        (lambda: layers.ColumnParallelLinear.from_linear(nn.Bilinear(2, 2, 2)), TypeError, "got Bilinear"),
        (lambda: layers.VocabParallelEmbedding.from_embedding(nn.Linear(2, 2)), TypeError, "got Linear"),
        (lambda: layers.RMSNorm.from_norm(nn.LayerNorm(2)), TypeError, "got LayerNorm"),
        (lambda: layers.LayerNorm.from_norm(nn.RMSNorm(2)), TypeError, "got RMSNorm"),
        (lambda: layers.ColumnParallelLinear(4, 6, unit=4), ValueError, "n=6, R=1, unit=4"),
        (
            lambda: layers.RowParallelLinear(4, 6, input_is_parallel=False)(torch.zeros(2, 5)),
            ValueError,
            r"the unsharded 4 features, got shape \[2, 5\]",
        ),
        (lambda: layers.ColumnParallelLinear(4, 6)(torch.zeros(2, 5)), ValueError, "5 and 4"),
    ],
)
def test_bad_arguments_say_what_came(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()

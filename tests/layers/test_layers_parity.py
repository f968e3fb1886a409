"""Every layer against its unsharded torch module in fp64: output, gradients, one SGD step, over 1 to 4 ranks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from tests.harness.layers import F64, assert_close, assert_equal, assert_same_step, integers, leaf, make_integer, mine
from tests.harness.ops import ALONE, Drawn
from tests.harness.ranks import Run, on_devices, on_processes, on_ranks
from tpkernels import layers, ops
from tpkernels.comm.group import Group
from tpkernels.shard import shard_info, split
from tpkernels.testing import run_ranks


def assert_replicated_gradients_have_the_same_bits(module: nn.Module, group: Group) -> None:
    for name, parameter in module.named_parameters():
        if shard_info(parameter) is None:
            assert parameter.grad is not None, name
            rows = ops.all_gather(parameter.grad.unsqueeze(0), 0, group=group)
            assert torch.equal(rows, rows[:1].expand_as(rows)), f"the gradient of {name} differs over the ranks"


# Linear layers: integers in floats, so everything is compared with torch.equal.


@on_ranks(1, 2, 3, 4, devices=(1, 2))
def check_column_parallel(group: Group) -> None:
    for bias, gather_output, N, unit in itertools.product((True, False), (True, False), (8, 7, 12, 3), (1, 4)):
        if N % unit:
            continue
        reference = make_integer(nn.Linear(6, N, bias, dtype=F64))
        layer = layers.ColumnParallelLinear.from_linear(reference, group=group, gather_output=gather_output, unit=unit)
        x, dy = integers(2, 5, 6, seed=1), integers(2, 5, N, seed=2)
        ours, theirs = leaf(x), leaf(x)
        y, want = layer(ours), reference(theirs)
        assert_equal(layer.full_weight(), reference.weight.detach(), "full_weight")
        assert_equal(y, want if gather_output else mine(want, -1, group, unit).contiguous(), "y")
        y.backward(dy if gather_output else mine(dy, -1, group, unit))
        want.backward(dy)
        assert_equal(ours.grad, theirs.grad, "dx")
        assert_same_step(layer, reference, exact=True)


@on_ranks(1, 2, 3, 4, devices=(3,))
def check_column_parallel_on_sequence_shards(group: Group) -> None:
    for dim, tokens, gather_output in itertools.product((0, 1, -2), (8, 5), (True, False)):
        reference = make_integer(nn.Linear(6, 7, dtype=F64))
        layer = layers.ColumnParallelLinear.from_linear(
            reference, group=group, sequence_parallel=True, sequence_dim=dim, gather_output=gather_output
        )
        shape = [3, 3]
        shape[{0: 0, 1: 1, -2: 1}[dim]] = tokens
        x, dy = integers(*shape, 6, seed=1), integers(*shape, 7, seed=2)
        ours, theirs = leaf(mine(x, dim, group)), leaf(x)
        y, want = layer(ours), reference(theirs)
        assert_equal(y, want if gather_output else mine(want, -1, group).contiguous(), "y")
        assert_equal(layer(ours, sequence_size=tokens), y, "y when the size is given")
        y.backward(dy if gather_output else mine(dy, -1, group))
        want.backward(dy)
        assert theirs.grad is not None
        assert_equal(ours.grad, mine(theirs.grad, dim, group).contiguous(), "dx")
        assert_same_step(layer, reference, exact=True)


@on_ranks(1, 2, 3, 4, devices=(1, 3))
def check_row_parallel(group: Group) -> None:
    for bias, parallel, K, unit in itertools.product((True, False), (True, False), (8, 7, 12, 3), (1, 4)):
        if K % unit:
            continue
        reference = make_integer(nn.Linear(K, 6, bias, dtype=F64))
        layer = layers.RowParallelLinear.from_linear(reference, group=group, input_is_parallel=parallel, unit=unit)
        x, dy = integers(2, 5, K, seed=1), integers(2, 5, 6, seed=2)
        ours, theirs = leaf(mine(x, -1, group, unit) if parallel else x), leaf(x)
        y, want = layer(ours), reference(theirs)
        assert_equal(y, want, "y")
        assert_equal(layer.full_weight(), reference.weight.detach(), "full_weight")
        y.backward(dy)
        want.backward(dy)
        assert theirs.grad is not None
        dx = mine(theirs.grad, -1, group, unit) if parallel else theirs.grad
        assert_equal(ours.grad, dx.contiguous(), "dx")
        assert_same_step(layer, reference, exact=True)


@on_ranks(1, 2, 3, 4, devices=(2,))
def check_row_parallel_to_sequence_shards(group: Group) -> None:
    for dim, tokens, parallel in itertools.product((0, 1, -2), (8, 5), (True, False)):
        reference = make_integer(nn.Linear(7, 6, dtype=F64))
        layer = layers.RowParallelLinear.from_linear(
            reference, group=group, sequence_parallel=True, sequence_dim=dim, input_is_parallel=parallel
        )
        shape = [3, 3]
        shape[{0: 0, 1: 1, -2: 1}[dim]] = tokens
        x, dy = integers(*shape, 7, seed=1), integers(*shape, 6, seed=2)
        ours, theirs = leaf(mine(x, -1, group) if parallel else x), leaf(x)
        y, want = layer(ours), reference(theirs)
        assert_equal(y, mine(want, dim, group).contiguous(), "y")
        y.backward(mine(dy, dim, group))
        want.backward(dy)
        assert theirs.grad is not None
        dx = mine(theirs.grad, -1, group) if parallel else theirs.grad
        assert_equal(ours.grad, dx.contiguous(), "dx")
        assert_same_step(layer, reference, exact=True)


@on_ranks(1, 2, 3, 4, devices=(3,))
def check_embedding(group: Group) -> None:
    for vocab, padding, sequence_dim in itertools.product((12, 11, 3), (None, 0, -1), (None, 0, 1)):
        reference = make_integer(nn.Embedding(vocab, 4, padding_idx=padding, dtype=F64))
        assert isinstance(reference, nn.Embedding)
        options = {} if sequence_dim is None else {"sequence_parallel": True, "sequence_dim": sequence_dim}
        layer = layers.VocabParallelEmbedding.from_embedding(reference, group=group, **options)
        ids = Drawn(group, 3).randint(vocab, 5, 7)
        dy = integers(5, 7, 4, seed=2)
        y, want = layer(ids), reference(ids)
        cut = sequence_dim is not None
        assert_equal(y, mine(want, sequence_dim, group).contiguous() if cut else want, "y")
        y.backward(mine(dy, sequence_dim, group) if cut else dy)
        want.backward(dy)
        assert_same_step(layer, reference, exact=True)


@on_ranks(1, 2, 3, 4, devices=(2, 4))
def check_take_shard_and_sum_gradient(group: Group) -> None:
    x = integers(5, 6, seed=1)
    weight = integers(6, seed=2)
    ours, theirs, w_ours, w_theirs, frozen = leaf(x), leaf(x), leaf(weight), leaf(weight), weight.clone()
    summed, unchanged = layers.sum_gradient(w_ours, frozen, group=group)
    assert unchanged is frozen
    y = layers.take_shard(ours, 0, group=group) * summed
    assert_equal(y, mine(theirs * w_theirs, 0, group).contiguous(), "y")
    dy = integers(5, 6, seed=3)
    y.backward(mine(dy, 0, group))
    (theirs * w_theirs).backward(dy)
    assert_equal(ours.grad, theirs.grad, "dx")
    assert_equal(w_ours.grad, w_theirs.grad, "dw")


# Loss and norms: rounding differs, so the bound is that of fp64 sums.


@on_ranks(1, 2, 3, 4, devices=(3,))
def check_cross_entropy(group: Group) -> None:
    drawn = Drawn(group)
    for vocab, smoothing, reduction in itertools.product((12, 11), (0.0, 0.1), ("none", "mean", "sum")):
        x = drawn.randn(2, 5, vocab).double() * 4
        target = drawn.randint(vocab, 2, 5)
        target[0, 1] = target[1, 4] = -100
        ours, theirs = leaf(mine(x, -1, group)), leaf(x)
        loss = layers.VocabParallelCrossEntropy(
            group=group, vocab_size=vocab, label_smoothing=smoothing, reduction=reduction
        )(ours, target)
        want = F.cross_entropy(theirs.transpose(1, 2), target, label_smoothing=smoothing, reduction=reduction)
        assert_close(loss, want, "loss")
        weight = integers(*want.shape, seed=5)
        (loss * weight).sum().backward()
        (want * weight).sum().backward()
        assert theirs.grad is not None
        assert_close(ours.grad, mine(theirs.grad, -1, group), "gradient of the logits")
    none = layers.VocabParallelCrossEntropy(group=group, ignore_index=7)(mine(x, -1, group), torch.full((2, 5), 7))
    assert none.isnan(), "the mean over no token is NaN, as in torch"


@on_ranks(1, 2, 3, 4, devices=(3,))
def check_norms_on_sequence_shards(group: Group) -> None:
    drawn = Drawn(group)
    modules = [
        (layers.RMSNorm, nn.RMSNorm(6, dtype=F64)),
        (layers.RMSNorm, nn.RMSNorm((5, 6), eps=1e-3, dtype=F64)),
        (layers.LayerNorm, nn.LayerNorm(6, dtype=F64)),
        (layers.LayerNorm, nn.LayerNorm((5, 6), bias=False, dtype=F64)),
        (layers.LayerNorm, nn.LayerNorm(6, elementwise_affine=False, dtype=F64)),
    ]
    for (cls, reference), cut in itertools.product(modules, (True, False)):
        reference.zero_grad()
        for parameter in reference.parameters():
            parameter.data.copy_(drawn.randn(*parameter.shape))
        layer = cls.from_norm(reference, group=group, sequence_parallel=cut)
        x, dy = drawn.randn(7, 5, 6).double(), drawn.randn(7, 5, 6).double()
        ours, theirs = leaf(mine(x, 0, group) if cut else x), leaf(x)
        y, want = layer(ours), reference(theirs)
        assert_close(y, mine(want, 0, group) if cut else want, "y")
        y.backward(mine(dy, 0, group) if cut else dy)
        want.backward(dy)
        assert theirs.grad is not None
        assert_close(ours.grad, mine(theirs.grad, 0, group) if cut else theirs.grad, "dx")
        assert_replicated_gradients_have_the_same_bits(layer, group)
        assert_same_step(layer, reference, exact=False)


# Compositions.


class Mlp(nn.Module):
    """Unsharded; `parallel` cuts it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 11, dtype=F64)
        self.down = nn.Linear(11, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))

    def parallel(self, group: Group, **options: object) -> Mlp:
        new = Mlp()
        new.up = layers.ColumnParallelLinear.from_linear(self.up, group=group, **options)
        new.down = layers.RowParallelLinear.from_linear(self.down, group=group, **options)
        return new


def check_mlp_in_a_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for dim in ("tp", "dp"):
        check_mlp(Group.open((mesh, dim)))


@on_ranks(1, 2, 3, 4, devices=(2, 4))
def check_mlp(group: Group) -> None:
    for cut, dim in ((False, 0), (True, 0), (True, 1)):
        reference = make_integer(Mlp())
        assert isinstance(reference, Mlp)
        model = reference.parallel(group, sequence_parallel=cut, sequence_dim=dim)
        x, dy = integers(5, 7, 6, seed=1), integers(5, 7, 6, seed=2)
        ours, theirs = leaf(mine(x, dim, group) if cut else x), leaf(x)
        y, want = model(ours), reference(theirs)
        assert_equal(y, mine(want, dim, group).contiguous() if cut else want, "y")
        y.backward(mine(dy, dim, group) if cut else dy)
        want.backward(dy)
        assert theirs.grad is not None
        assert_equal(ours.grad, mine(theirs.grad, dim, group).contiguous() if cut else theirs.grad, "dx")
        assert_same_step(model, reference, exact=True)


class Block(nn.Module):
    """A one-layer language model: embedding, attention, MLP, norms, head. Unsharded; `parallel` cuts it."""

    HEADS, HEAD_DIM, VOCAB = 3, 4, 13

    def __init__(self) -> None:
        super().__init__()
        width = self.HEADS * self.HEAD_DIM
        self.batch_first = True
        self.embed = nn.Embedding(self.VOCAB, width, dtype=F64)
        self.norm1, self.norm2 = nn.LayerNorm(width, dtype=F64), nn.RMSNorm(width, dtype=F64)
        self.q, self.k, self.v = (nn.Linear(width, width, dtype=F64) for _ in range(3))
        self.out = nn.Linear(width, width, dtype=F64)
        self.up, self.down = nn.Linear(width, 19, dtype=F64), nn.Linear(19, width, dtype=F64)
        self.norm3 = nn.LayerNorm(width, dtype=F64)
        self.head = nn.Linear(width, self.VOCAB, bias=False, dtype=F64)

    def attention(self, x: Tensor) -> Tensor:
        """Causal attention over the heads that this rank holds; x is [B, S, H] or [S, B, H]."""
        q, k, v = (m(x).unflatten(-1, (-1, self.HEAD_DIM)) for m in (self.q, self.k, self.v))
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        y = F.scaled_dot_product_attention(*(t.permute(order) for t in (q, k, v)), is_causal=True)
        back = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return self.out(y.permute(back).flatten(-2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))

    def parallel(self, group: Group, *, sequence_parallel: bool, sequence_dim: int) -> Block:
        with ALONE:  # its draws are not used, but come from the generator of all
            new = Block()
        new.batch_first = self.batch_first
        cut = {"group": group, "sequence_parallel": sequence_parallel}
        dim = {"sequence_dim": sequence_dim}
        new.embed = layers.VocabParallelEmbedding.from_embedding(self.embed, **cut, **dim)
        for name in ("q", "k", "v"):
            linear = getattr(self, name)
            heads = layers.ColumnParallelLinear.from_linear(linear, unit=self.HEAD_DIM, **cut, **dim)
            setattr(new, name, heads)
        new.out = layers.RowParallelLinear.from_linear(self.out, unit=self.HEAD_DIM, **cut, **dim)
        new.up = layers.ColumnParallelLinear.from_linear(self.up, **cut, **dim)
        new.down = layers.RowParallelLinear.from_linear(self.down, **cut, **dim)
        new.head = layers.ColumnParallelLinear.from_linear(self.head, **cut, **dim)
        for name, cls in (("norm1", layers.LayerNorm), ("norm2", layers.RMSNorm), ("norm3", layers.LayerNorm)):
            setattr(new, name, cls.from_norm(getattr(self, name), **cut))
        return new


def first_block() -> Block:
    """The block that every rank begins with."""
    with ALONE:
        torch.manual_seed(0)
        return Block()


@on_ranks(1, 2, 3, devices=(1, 2, 3), exchanging=(3,))
def check_block(group: Group) -> None:
    if group.world_size > Block.HEADS:
        return
    for cut, dim in ((False, 0), (True, 0), (True, 1)):
        reference = first_block()
        reference.batch_first = dim == 1
        model = reference.parallel(group, sequence_parallel=cut, sequence_dim=dim)
        drawn = Drawn(group)
        ids, target = drawn.randint(Block.VOCAB, 5, 7), drawn.randint(Block.VOCAB, 5, 7)
        loss = layers.VocabParallelCrossEntropy(group=group, vocab_size=Block.VOCAB)(model(ids), target)
        want = F.cross_entropy(reference(ids).flatten(0, 1), target.flatten())
        assert_close(loss, want, "loss")
        loss.backward()
        want.backward()
        assert_replicated_gradients_have_the_same_bits(model, group)
        assert_same_step(model, reference, exact=False, terms=4096)


@on_ranks(2, 3, devices=(2,))
def check_a_block_in_fp32_keeps_the_ranks_alike(group: Group) -> None:
    for cut in (False, True):
        model = first_block().parallel(group, sequence_parallel=cut, sequence_dim=1).float()
        drawn = Drawn(group)
        ids, target = drawn.randint(Block.VOCAB, 5, 7), drawn.randint(Block.VOCAB, 5, 7)
        layers.VocabParallelCrossEntropy(group=group, vocab_size=Block.VOCAB)(model(ids), target).backward()
        assert_replicated_gradients_have_the_same_bits(model, group)


def test_an_mlp_over_one_dimension_of_a_mesh_equals_the_unsharded_one() -> None:
    run_ranks(check_mlp_in_a_mesh, 4)


@on_ranks(3, devices=(3,))
def check_one_step_is_the_same_for_ranks_without_tokens(group: Group) -> None:
    reference = make_integer(Mlp())
    assert isinstance(reference, Mlp)
    model = reference.parallel(group, sequence_parallel=True)
    x = integers(1, 6, seed=1)  # one token: all ranks but the first hold none
    ours, theirs = leaf(mine(x, 0, group)), leaf(x)
    assert ours.size(0) == (group.rank == 0)
    y, want = model(ours), reference(theirs)
    assert_equal(y, split(want, 0, group.world_size)[group.rank].contiguous(), "y")
    y.sum().backward()
    want.sum().backward()
    assert_same_step(model, reference, exact=True)


@on_processes(globals())
def test_a_layer_equals_its_unsharded_module(run: Run) -> None:
    run()


@on_devices(globals())
def test_a_layer_on_devices_equals_its_unsharded_module(run: Run) -> None:
    run()

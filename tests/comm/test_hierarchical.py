"""Transport `hierarchical`: the order of its sums, where ranks lie on hosts in any way, and when it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.c10d import new_group
from tests.harness.hosts import Hosts, open_group, pretended, reduced, repacked, values
from tests.harness.ops import FLOATS, INTEGERS, assert_same_on_all_ranks, raised
from tests.harness.ranks import nightly
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS as ALL_CODECS
from tpkernels.data_parallel import GradAggregator
from tpkernels.errors import RankMismatchError
from tpkernels.shard import part, part_sizes
from tpkernels.testing import run_ranks

# Ranks of each host: as many, one more on one, in turns, three hosts, one that has all but one.
LAYOUTS: dict[str, Hosts] = {
    "2+2": [[0, 1], [2, 3]],
    "3+1": [[0, 1, 2], [3]],
    "in turns": [[0, 2], [1, 3]],
    "2+1+2": [[0, 4], [1], [2, 3]],
    "2+2+2": [[0, 1], [2, 3], [4, 5]],
}
CODECS = tuple(codec for codec in ALL_CODECS if codec != "none")
LENGTHS = (0, 1, 511, 1_025, 5_003, 150_001)
ON_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)


def ranks_of(layout: str) -> int:
    return sum(len(ranks) for ranks in LAYOUTS[layout])


def set_delay(group: Group, n: int) -> None:
    """Of every other length, so long that sums are one exchange, or none."""
    group._communicator.set_link(1e9, 1.0 if LENGTHS.index(n) % 2 == 0 else 1e-12)


def check_sums(layout: str) -> None:
    hosts = LAYOUTS[layout]
    with open_group(hosts=hosts, transport="hierarchical") as group:
        R, rank = group.world_size, group.rank
        for n in LENGTHS:
            set_delay(group, n)
            for dtype in (*FLOATS, *INTEGERS):
                inputs = [values(n, dtype, r) for r in range(R)]
                for op in ("sum", "avg", "max", "min"):
                    if op == "avg" and not dtype.is_floating_point:
                        continue
                    want, what = reduced(inputs, hosts, op, "none").to(dtype), (n, dtype, op)
                    assert torch.equal(ops.all_reduce(inputs[rank], group=group, op=op), want), what
                    in_place = inputs[rank].clone()
                    assert torch.equal(ops.all_reduce_(in_place, group=group, op=op), want), what
                    mine = ops.reduce_scatter(inputs[rank], group=group, op=op)
                    assert torch.equal(mine, part(want, 0, R, rank)), what
                    assert torch.equal(ops.all_gather(mine, group=group, dim_size=n), want), what


def check_codecs(layout: str) -> None:
    hosts = LAYOUTS[layout]
    with open_group(hosts=hosts, transport="hierarchical") as group:
        R, rank = group.world_size, group.rank
        for n in LENGTHS:
            set_delay(group, n)
            for codec in CODECS:
                for op in ("sum", "avg"):
                    for dtype in (torch.float32, torch.bfloat16):
                        inputs, what = [values(n, dtype, r) for r in range(R)], (n, codec, op, dtype)
                        total = reduced(inputs, hosts, op, codec)
                        y = ops.all_reduce(inputs[rank], group=group, op=op, codec=codec)
                        assert torch.equal(y, repacked(total, codec).to(dtype)), what
                        assert_same_on_all_ranks(group, str(what), y)
                shard = values(part_sizes(n, R)[rank], torch.float32, rank)
                parts = [repacked(values(m, torch.float32, r), codec) for r, m in enumerate(part_sizes(n, R))]
                assert torch.equal(ops.all_gather(shard, group=group, dim_size=n, codec=codec), torch.cat(parts)), n


def check_strides_and_the_arena(layout: str) -> None:
    """Any strides, dimensions that are cut unevenly, tensors of group.empty, non-finite values."""
    hosts = LAYOUTS[layout]
    with open_group(hosts=hosts, transport="hierarchical") as group:
        R, rank = group.world_size, group.rank
        every = [values(7 * 9 * 5, torch.float32, r).reshape(7, 9, 5) for r in range(R)]
        want = reduced(every, hosts, "sum", "none")
        strided = torch.stack([every[rank], every[rank]], -1)[..., 0]
        assert torch.equal(ops.all_reduce(strided, group=group), want)
        for dim in range(3):
            mine = ops.reduce_scatter(strided, group=group, dim=dim)
            assert torch.equal(mine, part(want, dim, R, rank)), dim
            assert torch.equal(ops.all_gather(mine, group=group, dim=dim), want), "ranks exchange their sizes"
        n = 100_003
        inside = group.empty(n).copy_(values(n, torch.float32, rank))
        want = reduced([values(n, torch.float32, r) for r in range(R)], hosts, "sum", "none")
        assert torch.equal(ops.all_reduce(inside, group=group), want)
        if rank % 2:  # in the memory of some ranks alone
            inside = inside.clone()
        assert torch.equal(ops.all_reduce_(inside, group=group), want)
        for codec in ALL_CODECS:
            x = values(1000, torch.float32, rank)
            x[600] = float("nan") if rank == R - 1 else 1.0
            assert ops.all_reduce(x, group=group, codec=codec)[600].isnan(), codec
        assert group.all_gather_ints(10 * rank) == [10 * r for r in range(R)]
        group.barrier()


def check_packed_inputs(layout: str) -> None:
    """Inputs that ranks have packed are sent as they are: the bits are those of every transport."""
    with Group.open(transport="shm") as plain, pretended(LAYOUTS[layout]), Group.open() as group:
        R, rank = group.world_size, group.rank
        for codec in CODECS:
            for n in (0, 100, 5_003):
                x = values(n, torch.float32, rank)
                wire, parts = ops.compress(x, codec), ops.compress_parts(x, codec, group=group)
                for op in ("sum", "avg"):
                    found = []
                    for each in (group, plain):
                        whole = ops.all_reduce_packed(wire, (n,), x.dtype, group=each, op=op, codec=codec)
                        mine = ops.reduce_scatter_packed(parts, n, x.dtype, group=each, op=op, codec=codec)
                        found.append((whole, mine))
                    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), (codec, n)
                    if rank == 0:  # some inputs are packed, others not
                        y = ops.all_reduce_packed(wire, (n,), x.dtype, group=group, op=op, codec=codec)
                    else:
                        y = ops.all_reduce(x, group=group, op=op, codec=codec)
                    assert torch.equal(y, found[0][0]), (codec, n)
        model = torch.nn.Linear(400, 40)
        with GradAggregator(model, group=group, codec="int8", sync_parameters=True) as aggregator:
            total, sent = torch.zeros(40, 400), torch.zeros(40, 400)
            for step in range(20):
                model.weight.grad = None
                model(torch.full((1, 400), rank + step + 0.01)).sum().backward()
                assert model.weight.grad is not None
                total += sum(r + step + 0.01 for r in range(R)) / R
                assert aggregator.wait()
                sent += model.weight.grad
                assert_same_on_all_ranks(group, "gradient", model.weight.grad)
        assert ((sent - total).abs() < 0.02 * 20).all(), "what one step loses the next ones send"
        assert R > 0


@ON_LAYOUTS
def test_sums_are_those_of_the_hosts_in_order_rounded_once(layout: str) -> None:
    run_ranks(check_sums, ranks_of(layout), layout)


@ON_LAYOUTS
def test_a_codec_packs_the_sums_of_hosts(layout: str) -> None:
    run_ranks(check_codecs, ranks_of(layout), layout)


@ON_LAYOUTS
def test_strides_parts_and_memory_are_any(layout: str) -> None:
    run_ranks(check_strides_and_the_arena, ranks_of(layout), layout)


@pytest.mark.parametrize("layout", ["2+2", "3+1", "2+1+2"])
def test_packed_inputs_are_sent_unchanged(layout: str) -> None:
    run_ranks(check_packed_inputs, ranks_of(layout), layout)


def check_moves_of_torch(layout: str) -> None:
    """All-to-alls and broadcasts of back end tpk, whose parts are of any size."""
    with pretended(LAYOUTS[layout]):
        group = new_group("hierarchical")
    R, rank = dist.get_world_size(), dist.get_rank()

    def sent(s: int, d: int) -> Tensor:
        return torch.arange((3 * s + 5 * d) % 7 * 1000, dtype=torch.float32) + 100.0 * s + d

    into = [torch.empty_like(sent(s, rank)) for s in range(R)]
    dist.all_to_all(into, [sent(rank, d) for d in range(R)], group=group)
    for s in range(R):
        assert torch.equal(into[s], sent(s, rank)), s
    for root in range(R):
        x = values(5_003, torch.float64, rank)
        dist.broadcast(x, root, group=group)
        assert torch.equal(x, values(5_003, torch.float64, root)), root


@ON_LAYOUTS
def test_moves_reach_every_rank(layout: str) -> None:
    run_ranks(check_moves_of_torch, ranks_of(layout), layout)


def check_choice() -> None:
    R = dist.get_world_size()
    with pretended(LAYOUTS["3+1"]), Group.open() as group:
        assert group.transport == "hierarchical"
        assert group.explain().reason == (
            "2 hosts have 3 + 1 ranks: over shared memory inside a host, over connections between the hosts, of 1 rank "
            "of each"
        )
        assert group.explain("all_reduce", numel=4).path == "one_exchange"
        assert group.explain("all_reduce", numel=1024).path == "one_exchange"
        group._communicator.set_link(1e9, 1e-6)
        assert group.explain("all_reduce", numel=1025).path == "one_exchange"
        assert group.explain("all_reduce", numel=1 << 20).path == "hierarchical"
        assert group.explain("reduce_scatter", numel=1 << 20).path == "hierarchical"
        assert group.explain("all_gather", numel=1 << 20).path == "hierarchical"
        assert group.explain("all_gather", numel=4).path == "one_exchange"
        group._communicator.set_link(1e9, 1.0)
        for op in ("all_reduce", "reduce_scatter", "all_gather"):
            assert group.explain(op, numel=1 << 20).path == "one_exchange", "two more ways take longer than the bytes"
        assert group.explain("gemm_all_reduce", M=64, N=64, K=64).path == "unfused"
        group.reset_stats()
        ops.all_reduce(torch.ones(1000), group=group)
        assert sum(group.all_gather_ints(int(group.stats()["wire_bytes"]))) > 0
    with pretended([[r] for r in range(R)]):
        with Group.open() as group:
            assert group.transport == "group", "no host has several ranks"
        text = raised(lambda: Group.open(transport="hierarchical"), ValueError)
        assert "transport 'hierarchical' cannot be used" in text and "one on each" in text, text
    text = raised(lambda: Group.open(transport="hierarchical"), ValueError)
    assert "all ranks run on one host" in text, text
    with pretended(LAYOUTS["2+2"]):
        text = raised(lambda: Group.open(transport="shm"), ValueError)
        assert "the ranks run on 2 hosts" in text, text
        text = raised(lambda: Group.open(arena_bytes=1 << 42), OSError)
        assert "bytes free" in text, text
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 3:
                patch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
            with Group.open() as group:
                assert group.transport == "group" and "GLOO_DEVICE_TRANSPORT" in group.explain().reason
                assert ops.all_reduce(torch.ones(2), group=group).tolist() == [R, R]


def test_it_is_taken_where_a_host_has_several_ranks() -> None:
    run_ranks(check_choice, 4)


def check_disagreement(layout: str) -> None:
    with open_group(hosts=LAYOUTS[layout], transport="hierarchical") as group:
        R, rank = group.world_size, group.rank
        for odd in range(R):
            for n in (10, 100_000):
                x = torch.ones(n + (rank == odd))
                text = raised(lambda x=x: ops.all_reduce(x, group=group), RankMismatchError)
                assert "the ranks disagree" in text and "Nothing was read" in text, text
                y = ops.all_reduce(torch.full((n,), rank + 1.0), group=group)
                assert torch.equal(y, torch.full((n,), R * (R + 1) / 2)), "the group stays in step"

                def unlike(n: int = n, odd: int = odd) -> Tensor:
                    if rank == odd:
                        return ops.all_gather(torch.ones(n), group=group, dim_size=n * R)
                    return ops.all_reduce(torch.ones(n), group=group)

                text = raised(unlike, RankMismatchError)
                assert "the ranks disagree" in text, text
            text = raised(
                lambda odd=odd: ops.all_gather(torch.ones(2 + (rank == odd)), group=group, dim_size=2 * R),
                RankMismatchError,
            )
            assert f"rank {odd} brings 3 values" in text, text


@pytest.mark.parametrize("layout", ["2+2", "3+1"])
def test_ranks_that_disagree_get_one_error_and_go_on(layout: str) -> None:
    run_ranks(check_disagreement, ranks_of(layout), layout)


def step(x: Tensor, w: Tensor, group: Group) -> Tensor:
    y = ops.gemm_all_reduce(x, w, group=group).relu()
    z = ops.all_gather(ops.reduce_scatter(y * y, group=group), group=group, dim_size=y.shape[0])
    return ops.all_reduce(z, group=group, op="avg").sum()


def check_compiled(backend: str) -> None:
    with open_group(transport="hierarchical") as group:
        found = []
        for call in (step, torch.compile(step, fullgraph=True, backend=backend)):
            x = values(6 * 8, torch.float32, 0).reshape(6, 8).requires_grad_()
            w = values(5 * 8, torch.float32, group.rank).reshape(5, 8).requires_grad_()
            loss = call(x, w, group)
            loss.backward()
            found.append((loss.detach(), x.grad, w.grad))
        for eager, compiled in zip(*found, strict=True):
            assert eager is not None and compiled is not None
            torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("backend", ["aot_eager", *nightly("inductor")])
def test_compiled_graphs_have_the_same_calls(backend: str) -> None:
    run_ranks(check_compiled, 3, backend)

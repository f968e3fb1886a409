"""Checkpoints of one number of ranks, read by another: bit for bit, whatever the cut, two tensors at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from tests.harness.checkpoints import adamw, assert_same, grid, learn, residuals, small_gpt, whole
from tests.harness.memory import PeakMemory, needs_mallinfo2
from tpkernels import checkpoint, layers, parallelize
from tpkernels.checkpoint.ranks import file_name
from tpkernels.cli import app
from tpkernels.comm.group import Group, resolve
from tpkernels.data_parallel import GradAggregator
from tpkernels.data_parallel.state import reshard_state
from tpkernels.errors import CheckpointError
from tpkernels.layers.base import Cut
from tpkernels.testing import run_ranks

# (tp, dp) of each stage; every one loads what the one before saved.
STAGES = [(1, 2), (2, 2), (3, 1), (4, 1), (1, 2)]


def small_llama(group: Group) -> nn.Module:
    """9 heads that share 3 key and value heads, which 4 ranks have to share; tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=13, hidden_size=18, intermediate_size=10, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    return parallelize(LlamaForCausalLM(config), group=group)


def stage(folder: str, number: int) -> None:
    """Load what the stage before saved (the first trains instead), and save it again."""
    (tp, dp), root = STAGES[number], Path(folder)
    with grid(tp, dp) as (cut, replicas):
        model, llama = small_gpt(cut, seed=number + 1), small_llama(cut)
        optimizer, sgd = adamw(model), torch.optim.SGD(llama.parameters(), lr=0.1, momentum=0.9)
        aggregator, other = (GradAggregator(m, group=replicas, codec="int8") for m in (model, llama))
        torch.manual_seed(100 * number)
        both = {"group": cut, "dp_group": replicas}
        before = {"gpt": root / f"gpt-{number - 1}", "llama": root / f"llama-{number - 1}"}
        if number == 0:
            learn(model, optimizer, range(2), aggregator, replicas.rank)
            llama(input_ids=(torch.arange(12)[None] + replicas.rank) % 13).logits.square().sum().backward()
            other.wait()
            sgd.step()
            torch.rand(replicas.rank + 1)  # so that the replicas' random numbers differ
        else:
            loaded = checkpoint.load(model, before["gpt"], optimizer=optimizer, aggregator=aggregator, **both)
            checkpoint.load(llama, before["llama"], optimizer=sgd, aggregator=other, **both)
            assert (loaded.step, loaded.extra) == (2, {"note": "x"})
            assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
            assert llama.lm_head.weight is llama.model.embed_tokens.weight
        more = {"step": 2, "extra": {"note": "x"}}
        checkpoint.save(model, root / f"gpt-{number}", optimizer=optimizer, aggregator=aggregator, **both, **more)
        checkpoint.save(llama, root / f"llama-{number}", optimizer=sgd, aggregator=other, **both, **more)
        aggregator.close()
        other.close()


def test_a_checkpoint_goes_from_1_to_2_to_3_to_4_ranks_and_back_without_losing_a_bit(tmp_path: Path) -> None:
    for number, (tp, dp) in enumerate(STAGES):
        run_ranks(stage, tp * dp, str(tmp_path), number)
    for kind in ("gpt", "llama"):
        first = whole(tmp_path / f"{kind}-0")
        assert any(name.startswith("optimizer/") for name in first)
        for number in range(1, len(STAGES)):
            assert_same(whole(tmp_path / f"{kind}-{number}"), first)
        check_residuals(tmp_path, kind)
    check_random_numbers(tmp_path)
    check_resharding(tmp_path)


def check_residuals(root: Path, kind: str) -> None:
    """Cut like their parameters; of fewer replicas they add up, of more the new ones begin with nothing."""
    old = [residuals(root / f"{kind}-0", replica) for replica in (0, 1)]
    assert all(any(t.any() for t in state.values()) for state in old)
    for replica in (0, 1):
        assert_same(residuals(root / f"{kind}-1", replica), old[replica])
    total = {name: old[0][name] + old[1][name] for name in old[0]}
    assert_same(residuals(root / f"{kind}-2", 0), total)
    assert_same(residuals(root / f"{kind}-3", 0), total)
    assert_same(residuals(root / f"{kind}-4", 0), total)
    assert not any(t.any() for t in residuals(root / f"{kind}-4", 1).values())
    states = [
        {
            "tensors": {name.partition("/")[2]: t for name, t in state.items()},
            "numbers": numbers_of(root / f"{kind}-0", r),
        }
        for r, state in enumerate(old)
    ]
    rule = reshard_state(states, 1)[0]["tensors"]  # type: ignore[arg-type]
    assert_same({f"aggregator/{name}": t for name, t in rule.items()}, total)


def numbers_of(folder: Path, replica: int) -> object:
    return checkpoint.peek(folder)["own"][file_name(0, 1, replica)]["aggregator"]


def check_random_numbers(root: Path) -> None:
    """Rank t of replica d goes on with those of rank t modulo tp of replica d modulo dp."""

    def rng(number: int, rank: int, replica: int) -> torch.Tensor:
        return load_file(root / f"gpt-{number}" / file_name(rank, STAGES[number][0], replica))["rng/cpu"]

    assert not torch.equal(rng(0, 0, 0), rng(0, 0, 1))
    for rank in (0, 1):
        for replica in (0, 1):
            assert torch.equal(rng(1, rank, replica), rng(0, 0, replica))
    assert torch.equal(rng(2, 2, 0), rng(0, 0, 0))
    assert torch.equal(rng(4, 0, 1), rng(0, 0, 0))


def check_resharding(root: Path) -> None:
    """The files of a reshard are those that so many ranks would have saved, byte for byte."""
    for source, number in ((0, 1), (1, 2), (2, 3), (3, 2)):
        tp, dp = STAGES[number]
        made = checkpoint.reshard(root / f"gpt-{source}", root / f"made-{source}-{number}", tp, dp)
        saved = root / f"gpt-{number}"
        for path in saved.glob("*.safetensors"):
            assert (made / path.name).read_bytes() == path.read_bytes(), path
        assert checkpoint.peek(made) == checkpoint.peek(saved)
    for number, tp in ((0, 4), (3, 2)):  # heads that ranks share: plain parts, of which the same tensors come together
        made = checkpoint.reshard(root / f"llama-{number}", root / f"made-llama-{number}", tp=tp, dp=1)
        assert_same(whole(made), whole(root / "llama-0"))
        assert_same(residuals(made, 0), residuals(root / "llama-2", 0))
    run_ranks(load_made, 2, str(root))


def load_made(folder: str) -> None:
    """Resharded heads are put where the model reads them."""
    with grid(2, 1) as (cut, replicas):
        llama = small_llama(cut)
        checkpoint.load(llama, Path(folder, "made-llama-3"), group=cut, dp_group=replicas)
        checkpoint.save(llama, Path(folder, "again"), group=cut)
    if cut.rank == 0:
        want = {k: v for k, v in whole(Path(folder, "llama-0")).items() if k.startswith("model/")}
        assert_same(whole(Path(folder, "again")), want)


def go_on(folder: str) -> list[float]:
    with Group.open() as group:
        model = small_gpt(group, seed=9, dtype=torch.float64)
        optimizer = adamw(model)
        checkpoint.load(model, Path(folder, "one"), group=group, optimizer=optimizer)
        losses = learn(model, optimizer, range(3, 8))
        checkpoint.save(model, Path(folder, f"on-{group.world_size}"), group=group, optimizer=optimizer)
    return losses


def test_a_run_that_goes_on_over_other_ranks_learns_what_it_would_have_learned(tmp_path: Path) -> None:
    with grid(1, 1) as (group, _):
        model = small_gpt(group, dtype=torch.float64)
        optimizer = adamw(model)
        learn(model, optimizer, range(3))
        checkpoint.save(model, tmp_path / "one", group=group, optimizer=optimizer)
        want = learn(model, optimizer, range(3, 8))
        checkpoint.save(model, tmp_path / "want", group=group, optimizer=optimizer)
    for ranks in (2, 3):
        losses = run_ranks(go_on, ranks, str(tmp_path))
        # fp64 has 2.2e-16 a rounding; the first steps of AdamW divide by the root of small second moments.
        torch.testing.assert_close(losses, [want] * ranks, rtol=1e-9, atol=0)
        got, expected = whole(tmp_path / f"on-{ranks}"), whole(tmp_path / "want")
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def drift(folder: str) -> None:
    with Group.open() as group:
        model, other = small_gpt(group), small_gpt(group, seed=2)
        with torch.no_grad():
            model.norm.weight.add_(group.rank)
        checkpoint.save(model, Path(folder, "x"), group=group)
        checkpoint.load(other, Path(folder, "x"), group=group)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_replicas_that_differ_get_their_own_back_and_other_ranks_are_warned(tmp_path: Path) -> None:
    run_ranks(drift, 2, str(tmp_path))
    model = small_gpt(resolve(None))
    with pytest.warns(UserWarning, match=r"did not hold the same bits of norm\.weight; the first that holds each"):
        checkpoint.load(model, tmp_path / "x")
    assert torch.equal(model.norm.weight, torch.ones(24))


def test_listed_runs_and_residuals_go_through_any_number_of_ranks(tmp_path: Path) -> None:
    group = resolve(None)
    model = layers.ColumnParallelLinear(4, 6, group=group)
    backwards = Cut(0, 6, runs=(((3, 3), (0, 3)),))
    model._cuts = {"weight": backwards, "bias": backwards}
    model._mark()
    aggregator = GradAggregator(model, group=group, codec="int8")
    model(torch.rand(2, 4)).square().sum().backward()
    aggregator.wait()
    state = aggregator.state_dict()
    assert sorted(state["tensors"]) == ["residual.bias", "residual.weight"]
    for tensor in state["tensors"].values():
        tensor.uniform_()  # one rank alone packs nothing
    aggregator.load_state_dict(state)
    checkpoint.save(model, tmp_path / "a", dp_group=group, aggregator=aggregator)
    checkpoint.reshard(tmp_path / "a", tmp_path / "b", tp=4, dp=3)
    assert_same(whole(tmp_path / "b"), whole(tmp_path / "a"))
    assert_same(residuals(tmp_path / "b", 0), residuals(tmp_path / "a", 0))
    checkpoint.reshard(tmp_path / "b", tmp_path / "c", tp=2, dp=1)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state["tensors"].items()}
    aggregator.load_state_dict({"tensors": zeros, "numbers": state["numbers"]})
    checkpoint.load(model, tmp_path / "c", dp_group=group, aggregator=aggregator)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert_same(aggregator.state_dict()["tensors"], state["tensors"])
    aggregator.close()


@needs_mallinfo2
def test_a_reshard_holds_two_tensors_at_a_time(tmp_path: Path) -> None:
    side = 768  # 2.25 MiB each; half of them cut by columns, whose slices are not neighbours in the file
    group = resolve(None)
    kinds = (layers.RowParallelLinear, layers.ColumnParallelLinear)
    model = nn.Sequential(*(kinds[i % 2](side, side, bias=False, group=group) for i in range(16)))
    aggregator = GradAggregator(model, group=group, codec="int8")
    checkpoint.save(model, tmp_path / "1", group=group, dp_group=group, aggregator=aggregator)
    aggregator.close()
    assert len(residuals(tmp_path / "1", 0)) == 16
    for before, after, tp in (("1", "3", 3), ("3", "2", 2), ("2", "back", 1)):
        with PeakMemory() as peak:
            checkpoint.reshard(tmp_path / before, tmp_path / after, tp=tp)
        assert peak.bytes < 2 * 4 * side * side + (2 << 20), (after, peak.bytes)  # a third one would be 2.25 MiB
    assert_same(whole(tmp_path / "back"), whole(tmp_path / "1"))


def test_the_command_line_reshards_and_says_what_is_wrong(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoint.save(model, tmp_path / "run/step-1")
    runner = CliRunner()
    done = runner.invoke(app, ["reshard", str(tmp_path / "run"), str(tmp_path / "b"), "--tp", "3"])
    assert done.exit_code == 0, done.output
    assert "for 3 ranks of 1 replicas" in done.output.replace("\n", "")
    other = nn.Linear(2, 2)
    checkpoint.load(other, tmp_path / "b")
    assert torch.equal(other.weight, model.weight)
    again = runner.invoke(app, ["reshard", str(tmp_path / "run"), str(tmp_path / "b"), "--tp", "3"])
    assert again.exit_code == 2
    assert "exists already" in again.output.replace("\n", " ")


def test_a_reshard_of_no_checkpoint_or_to_no_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.reshard(tmp_path, tmp_path / "b", tp=2)
    checkpoint.save(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(CheckpointError, match="tp and dp must be 1 or more, got tp=0, dp=1"):
        checkpoint.reshard(tmp_path / "a", tmp_path / "b", tp=0)

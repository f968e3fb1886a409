"""The search and its report: refusals, what wins and why others lose, models of transformers, serving, pictures."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tpkernels import planner
from tpkernels.cli import app
from tpkernels.errors import UserError
from tpkernels.planner import Candidate, Choices, Job, Recipe, Report, Shape, cluster, plan, plan_serving
from tpkernels.planner.api import count
from tpkernels.planner.hardware import device, keys, link
from tpkernels.planner.memory import memory_of, most
from tpkernels.planner.recipe import refuse, refuse_cut, whole_heads
from tpkernels.planner.step import step_s

GPT = Shape.gpt(layers=24, hidden=2048, heads=16, vocab=51200)
JOB = Job(GPT, 1024, 64)
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ((2, 2, 1), "tp 2 x pp 2 x dp 1 is 4 ranks, and there are 96"),
        ((1, 32, 3), "24 layers leave some of 32 stages with none"),
        ((1, 2, 48), "a batch of 64 sequences does not divide over 48 replicas"),
        ((48, 2, 1), "16 heads leave some of 48 ranks with none"),
        ((2, 12, 4), None),
    ],
)
def test_a_cut_that_cannot_run_is_refused_with_its_reason(cut: tuple[int, int, int], text: str | None) -> None:
    assert refuse_cut(JOB, cluster("a100", 96, "ib200"), *cut, whole_heads(GPT)) == text


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Recipe(1, 1, 4, 5), "the 16 sequences of a replica do not divide into micro-batches of 5"),
        (Recipe(1, 1, 4, 1, sequence_parallel=True), "tp is 1"),
        (Recipe(3, 1, 4, 1, sequence_parallel=True), "1024 tokens do not divide over 3 ranks"),
        (Recipe(4, 1, 1, 1, zero=1), "ZeRO-1 shares state over replicas, and dp is 1"),
        (Recipe(1, 2, 4, 1, zero=2), "ZeRO-2 sums gradients after each micro-batch"),
        (Recipe(1, 2, 4, 1, zero=3), "ZeRO-3 sums gradients after each micro-batch"),
        (Recipe(1, 1, 4, 1, virtual=2), "an interleaved schedule needs stages"),
        (Recipe(1, 2, 4, 1, virtual=5), "24 layers do not divide into 2 stages of 5 pieces"),
        (Recipe(1, 8, 4, 4, virtual=3), "micro-batches in multiples of pp, got 4 and 8"),
        (Recipe(2, 2, 4, 4, sequence_parallel=True, zero=1, virtual=2), None),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_with_its_reason(recipe: Recipe, text: str | None) -> None:
    found = refuse(JOB, recipe)
    assert found == text if text is None else found is not None and text in found


def test_the_best_is_the_fastest_of_all_recipes_that_can_run_and_fit() -> None:
    machine, sizes = cluster("a100", 8), (1, 2, 4, 8, 16, 32, 64)
    best = math.inf
    fields = (sizes, (False, True), range(4), (1, 2, 4), ("none", "full"))
    for tp, pp in itertools.product((1, 2, 4, 8), repeat=2):
        dp = 8 // (tp * pp)
        if dp and refuse_cut(JOB, machine, tp, pp, dp, whole_heads(GPT)) is None:
            for chosen in itertools.product(*fields):
                recipe = Recipe(tp, pp, dp, *chosen)
                need = memory_of(machine, JOB, recipe, 16 << 20).total
                if refuse(JOB, recipe) is None and need <= most(machine):
                    best = min(best, step_s(machine, JOB, recipe).total)
    report = plan(GPT, machine, tokens=JOB.tokens, sequence=1024, codecs=("none",))
    assert report.best is not None and report.best.seconds == pytest.approx(best)


def test_every_cut_is_there_once_and_every_loser_says_why() -> None:
    report = plan(GPT, cluster("a100", 96, "ib200"), tokens=JOB.tokens, sequence=1024)
    cuts = [(c.tp, c.pp, c.dp) for c in report.candidates]
    expected = [(t, p, 96 // t // p) for t in range(1, 97) if 96 % t == 0 for p in range(1, 97) if 96 // t % p == 0]
    assert sorted(cuts) == expected
    seconds = [c.seconds for c in report.candidates]
    assert seconds == sorted(seconds)
    assert report.candidates[0].why == "" and all(c.why for c in report.candidates[1:])
    for c in report.runnable:
        assert c.memory is not None and c.memory.total <= most(report.cluster)
    reasons = " ".join(c.why for c in report.candidates)
    assert "heads leave" in reasons and "layers leave" in reasons and "replicas" in reasons


def test_what_does_not_fit_says_by_how_much_for_the_most_frugal_recipe() -> None:
    huge = Shape.gpt(layers=128, hidden=25600, heads=160, vocab=51200)
    report = plan(huge, cluster("a100", 8), tokens=8 * 2048, sequence=2048)
    assert report.best is None
    whys = {(c.tp, c.pp): c.why for c in report.candidates}
    assert "GiB on a rank, which has" in whys[8, 1] and "take" in whys[1, 8]


def test_a_trillion_parameters_on_a_hundred_thousand_gpus_are_planned() -> None:
    huge = Shape.gpt(layers=128, hidden=25600, heads=160, vocab=51200)
    report = plan(huge, cluster("h100", 100_000, "ib400"), tokens=50_000 * 2048, sequence=2048)
    assert report.best is not None and 0.2 < report.mfu(report.best) < 0.65


def test_published_times_are_met() -> None:
    # GPT of 175 G parameters on 64 A100, selective recomputation: 13.75 s (Korthikanti et al. 2022, table 5).
    job = Job(Shape.gpt(96, 12288, 96, 51200), 2048, 64, flash=False, overlap=False)
    recipe = Recipe(8, 8, 1, 1, True, virtual=3, recompute="selective")
    assert step_s(cluster("a100", 64, "ib200"), job, recipe).total == pytest.approx(13.75, rel=0.1)


def test_a_slow_link_makes_a_codec_win_and_the_best_without_is_told() -> None:
    small = replace(Shape.gpt(4, 256, 4, 256), tied=False)
    choices = Choices(tp=(2,), pp=(1,))
    report = plan(small, cluster("cpu", 2, "100mbit", 1), tokens=1024, sequence=128, choices=choices)
    assert report.best and report.best.recipe and report.best.recipe.codec == "int8"
    assert report.exact and report.exact.recipe and report.exact.recipe.codec == "none"
    assert report.exact.seconds > 1.5 * report.best.seconds
    assert any(line.startswith("Without codecs that round: tp 2") for line in report.texts())


def test_the_error_is_that_of_the_machine_class_or_unknown() -> None:
    one, many = cluster("a100", 8).error, cluster("a100", 64, "ib200").error
    assert one[0] and many[0] and one[0] < many[0] and "720 rows" in one[1] and "73 rows" in many[1]
    nothing = replace(cluster("a100", 8), device=replace(device("a100"), errors={}))
    report = Report(nothing, JOB, [Candidate(1, 1, 8, why="x")])
    assert report.error[0] is None and report.texts()[0].startswith("Error: unknown; nothing measured")


def test_the_recipe_of_a_report_is_that_of_the_best_or_says_why_there_is_none() -> None:
    report = plan(GPT, cluster("a100", 8), tokens=JOB.tokens, sequence=1024)
    assert report.best is not None and report.recipe is report.best.recipe
    huge = Shape.gpt(layers=128, hidden=25600, heads=160, vocab=51200)
    with pytest.raises(UserError, match=r"no cut of 8 ranks can run: tp 1, pp 1, dp 8: needs .* GiB on a rank"):
        _ = plan(huge, cluster("a100", 8), tokens=8 * 2048, sequence=2048).recipe


def test_choices_leave_the_cuts_and_micro_batches_that_they_name() -> None:
    def cuts(**choices: object) -> set[tuple[int, int, int]]:
        chosen = Choices(**choices)  # type: ignore[arg-type]
        found = plan(GPT, cluster("a100", 8), tokens=JOB.tokens, sequence=1024, choices=chosen).runnable
        for c in found:
            assert c.recipe
            if not chosen.accumulate and c.pp == 1:
                assert c.recipe.micro_batches(JOB) == 1
            if chosen.micro_batches and c.pp > 1:
                assert c.recipe.micro_batches(JOB) in chosen.micro_batches
        return {(c.tp, c.pp, c.dp) for c in found}

    assert cuts(dp=(4,)) == {(1, 2, 4), (2, 1, 4)}
    assert {(2, 2, 2), (8, 1, 1)} <= cuts(accumulate=False, micro_batches=(4, 8))


def test_zero_is_chosen_where_the_state_of_the_optimizer_does_not_fit_otherwise() -> None:
    large = Shape.gpt(layers=32, hidden=4096, heads=32, vocab=51200)  # 6.6 G parameters: 119 GB with their state
    only = Choices(tp=(1,), pp=(1,))
    h100 = cluster("h100", 8)
    best = plan(large, h100, tokens=8 * 2048, sequence=2048, choices=only).recipe
    assert best.zero >= 1 and memory_of(h100, Job(large, 2048, 8), replace(best, zero=0), 16 << 20).total > most(h100)
    with pytest.raises(UserError, match="optimizer state take"):
        _ = plan(large, h100, tokens=8 * 2048, sequence=2048, choices=replace(only, zero=(0,))).recipe


def test_numbers_are_read_with_their_units() -> None:
    assert [count(text, "--tokens") for text in ("7", "4K", "8M", "1G")] == [7, 4096, 8 << 20, 1 << 30]
    for text in ("", "8 M", "0", "-1", "8T", "1.5M"):
        with pytest.raises(UserError, match="--tokens: expected a number"):
            count(text, "--tokens")


def test_hardware_is_data_with_sources(tmp_path: Path) -> None:
    for key in keys("devices"):
        assert device(key).flops > 0 and all(device(key).sources.values())
    for key in keys("links"):
        assert link(key).bandwidth > 0 and {"bandwidth", "rate", "latency_s", "hop_s"} <= link(key).sources.keys()
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\nof_node = true\n[figures]\nbandwidth = { value = 1e9 }\n')
    with pytest.raises(UserError, match=r"bandwidth: expected . value = number, source = text"):
        link(str(own))
    own.write_text('name = "own"\nof_node = true\n[figures]\nbandwidth = { value = 1e9, source = "x" }\n')
    with pytest.raises(UserError, match="rate"):
        link(str(own))
    with pytest.raises(UserError, match="expected one of the devices a100, cpu"):
        device("v9")
    with pytest.raises(UserError, match="name the link between them"):
        cluster("a100", 64)


# --- models of transformers and the command


@pytest.fixture
def llama(tmp_path: Path) -> str:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_a_config_gives_the_shape_and_the_plan_says_what_cannot_be_cut(llama: str) -> None:
    shape, cuts = planner.api.known(llama)
    assert (shape.layers, shape.kv_heads, shape.ffn, shape.gated, shape.longest) == (4, 2, 688, True, 2048)
    assert cuts(3) is None and cuts(8) is None  # uneven heads, and kv heads that several ranks share
    assert cuts(16) == "8 heads leave some of 16 ranks with none"
    assert (shape.own_heads(2), shape.own_kv_heads(2)) == (4, 1)
    assert (shape.own_heads(3), shape.own_kv_heads(8)) == (3, 1)


def test_models_without_a_model_of_time_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run("t5", "--gpus", "8", "--tokens", "64K")
    assert found.exit_code == 2 and "no decoder-only transformer" in found.output
    # Layers that the sizes of a config do not tell: each second one has no experts.
    odd = {**LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 64, "num_experts": 8, "decoder_sparse_step": 2}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    found = run(str(tmp_path), "--gpus", "8", "--tokens", "64K", "--context", "1024")
    assert found.exit_code == 2 and "its layers are of a kind" in found.output.replace("\n", " "), found.output


def test_the_command_prints_the_ranking_and_as_json_all_of_it(llama: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = [llama, "--gpus", "16", "--gpu", "h200", "--link", "nvlink,ib400", "--tokens", "64K"]
    picture, page = tmp_path / "p.png", tmp_path / "p.html"
    shown = run(*arguments, "--png", str(picture), "--html", str(page))
    assert shown.exit_code == 0, shown.output
    assert "it is the best" in shown.output and "heads leave some" in shown.output and "Error: " in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "data:image/png;base64," in text and "Cuts that cannot" in text and "http" not in text
    found = json.loads(run(*arguments, "--json").output)
    best = found["candidates"][0]
    assert best["seconds"] == pytest.approx(sum(best["time"].values()))
    assert best["tokens_per_s"] == pytest.approx(found["job"]["tokens"] / best["seconds"])
    memory = best["memory"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert {(c["tp"], c["why"]) for c in found["candidates"]} >= {(16, "8 heads leave some of 16 ranks with none")}


def test_cpu_ranks_are_planned_over_a_link(llama: str) -> None:
    shown = run(llama, "--cpu", "--ranks", "4", "--hosts", "2", "--link", "1gbit", "--tokens", "8K", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert found["machine"]["per_node"] == 2 and "1gbit" in found["machine"]["between"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "8K"], "expected --gpus N, or --cpu"),
        (["--cpu", "--gpus", "8", "--tokens", "8K"], "expected --gpus N, or --cpu"),
        (["--cpu", "--ranks", "3", "--hosts", "2", "--tokens", "8K"], "ranks: expected a multiple of 2 hosts, got 3"),
        (["--gpus", "8"], "--tokens: expected those of one step"),
        (["--gpus", "8", "--tokens", "1000", "--context", "512"], "expected a multiple of the 512 tokens"),
        (["--gpus", "8", "--tokens", "8K", "--context", "4096"], "expected 1 to 2048 tokens, got 4096"),
        (["--gpus", "8", "--tokens", "8K", "--codecs", "zip"], "expected some of none, fp16, bf16, int8, fp8, got zip"),
        (["--gpus", "16", "--tokens", "8K"], "name the link between them"),
        (["--gpus", "8", "--gpu", "tpu", "--tokens", "8K"], "expected one of the devices"),
        (["--gpus", "8", "--serve", "--batch", "0"], "batch: expected 1 or more, got 0"),
    ],
)
def test_bad_options_are_errors(llama: str, arguments: list[str], text: str) -> None:
    found = run(llama, *arguments)
    assert found.exit_code == 2 and text in found.output.replace("\n", ""), found.output


def test_serving_reads_the_weights_and_the_cache_for_each_token(llama: str) -> None:
    shape = Shape(80, 8192, 64, 8, 128, 28672, 128256, gated=True, tied=False)
    machine = cluster("h200", 8)
    found = {s.tp: s for s in plan_serving(shape, machine, batch=8, context=4096)}
    assert sorted(found) == [1, 2, 4, 8] and found[1].why and not found[2].why
    for tp in (2, 8):
        one = found[tp]
        assert one.cache == pytest.approx(2 * 2 * 80 * 8 * 4096 * max(1, 8 // tp) * 128)
        least = (one.weights + one.cache) / machine.device.memory_bandwidth
        assert one.next_s > 0.9 * least and one.first_s > 50 * one.next_s
    assert found[8].next_s < found[2].next_s
    shown = run(llama, "--gpus", "8", "--serve", "--context", "512")
    assert shown.exit_code == 0 and "next token ms" in shown.output and "Error: unknown" in shown.output
    listed = json.loads(run(llama, "--gpus", "16", "--link", "ib400", "--serve", "--json").output)
    assert {s["tp"] for s in listed} == {1, 2, 4, 8, 16} and listed[-1]["next_s"] is None

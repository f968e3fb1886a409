"""The bench's protocol on a clock of its own, its rows, its tables, and one real run of every op at tiny sizes.

Nothing here asserts how long anything took.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import codecs, placement, rows, shapes, suite
from bench import run as bench_run
from bench.cell import Setting, compare, product_tolerance, sum_tolerance
from bench.ranks import RankTeam, cores_of, launch
from bench.study import links
from bench.timing import CALIBRATIONS, Candidate, Timing, exposed, measure, ratios, summary
from tests.harness.bench import Clock, Team, candidate, right, where, wrong

ROOT = Path(__file__).parents[2]


def test_the_rewrite_of_the_input_is_subtracted() -> None:
    clock = Clock()
    (timing,) = measure([candidate(clock, "a", 1e-3, rewrite=4e-3)], Team(), rounds=5, clock=clock)
    assert timing.seconds == pytest.approx([1e-3] * 5)


def test_a_round_in_which_the_rewrite_seemed_longer_than_both_is_not_a_number() -> None:
    clock, turn = Clock(), iter(range(100))

    def moody() -> None:  # thrice to find the number of calls, then by turns with the call (1 ms) and alone (9 ms)
        clock.now += 9e-3 if next(turn) % 2 == 0 else 1e-3

    job = Candidate("a", call=clock.work("a", 1e-4), error=right, refresh=moody)
    (timing,) = measure([job], Team(), rounds=4, block_s=1e-3, clock=clock)
    assert timing.calls == 1 and len(timing.seconds) == 4
    assert all(math.isnan(s) for s in timing.seconds)


def test_candidates_take_turns_and_the_order_alternates() -> None:
    clock = Clock()
    jobs = [candidate(clock, name, 0.02) for name in "abc"]
    starts: list[int] = []
    measure(jobs, Team(), rounds=4, clock=clock, each_round=lambda: starts.append(len(clock.events)))
    assert [clock.events[at : at + 3] for at in starts] == [list("abc"), list("cba")] * 2


def test_there_is_a_barrier_before_every_block() -> None:
    clock, team = Clock(), Team()
    measure([candidate(clock, "a", 0.02), candidate(clock, "b", 0.02, rewrite=0.01)], team, rounds=7, clock=clock)
    assert team.barriers == 2 * CALIBRATIONS + 7 * (1 + 2)


def test_a_block_is_filled_and_every_rank_makes_the_same_number_of_calls() -> None:
    clock = Clock()
    (alone,) = measure([candidate(clock, "a", 1e-4)], Team(), rounds=1, clock=clock)
    assert alone.calls == pytest.approx(200, abs=1)
    (with_slow,) = measure([candidate(clock, "a", 1e-4)], Team(lambda v: [v * 4]), rounds=1, clock=clock)
    assert with_slow.calls == pytest.approx(50, abs=1)


def test_the_slowest_rank_counts() -> None:
    clock = Clock()
    (timing,) = measure([candidate(clock, "a", 1e-3)], Team(lambda v: [v * 3, v / 2]), rounds=3, clock=clock)
    assert timing.seconds == pytest.approx([3e-3] * 3)


def test_ratios_are_taken_inside_rounds() -> None:
    clock, turn = Clock(), iter(range(100))

    def change_speed() -> None:
        clock.speed = (1.0, 1.0, 10.0)[next(turn) % 3]

    jobs = [candidate(clock, "slow", 0.3), candidate(clock, "fast", 0.1)]
    slow, fast = measure(jobs, Team(), rounds=9, clock=clock, each_round=change_speed)
    assert ratios(slow, fast) == pytest.approx([3.0] * 9)
    assert max(slow.seconds) == pytest.approx(10 * min(slow.seconds))


def test_a_block_that_had_to_share_its_core_is_repeated() -> None:
    clock, team = Clock(), Team()
    others_run = iter([True] * 3 + [False] * 5)

    def call() -> None:
        busy = clock.events.count("round") > 0 and next(others_run, False)
        clock.now += 0.5 if busy else 0.1
        team.lost += 0.4 if busy else 0.0

    job = Candidate("a", call=call, error=right)
    (timing,) = measure([job], team, rounds=2, clock=clock, each_round=lambda: clock.events.append("round"))
    assert timing.seconds == pytest.approx([0.1, 0.1]) and timing.repeated == 3


def test_a_block_that_is_never_left_alone_gives_no_number() -> None:
    clock, team = Clock(), Team()

    def call() -> None:
        clock.now += 0.5
        team.lost += 0.4

    (timing,) = measure([Candidate("a", call=call, error=right)], team, rounds=2, clock=clock)
    assert all(math.isnan(s) for s in timing.seconds) and timing.verified
    assert math.isnan(summary(timing.seconds).median)


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (wrong, lambda value: []),
        (lambda _: math.nan, lambda value: []),
        (right, lambda value: [1.5]),  # wrong on another rank only
    ],
)
def test_a_wrong_result_is_not_timed(error: Callable[[Any], float], others: Callable[[float], list[float]]) -> None:
    clock = Clock()
    good, bad = candidate(clock, "good", 0.1), candidate(clock, "bad", 0.1, error=error)
    (timing,) = measure([bad], Team(others), rounds=3, clock=clock)
    assert not timing.verified and timing.error > 1 and timing.seconds == []
    assert clock.events.count("bad") == 1
    if not others(0.0):
        timings = measure([good, bad], Team(), rounds=3, clock=clock)
        assert [(t.verified, len(t.seconds)) for t in timings] == [(True, 3), (False, 0)]


def test_a_result_that_turns_wrong_while_it_is_timed_is_found() -> None:
    clock = Clock()
    job = candidate(clock, "a", 0.1, error=lambda _: 2.0 if clock.now > 0.35 else 0.0)
    (timing,) = measure([job], Team(), rounds=5, clock=clock)
    assert not timing.verified


def test_the_summary_leaves_out_what_is_no_number_and_counts_percentiles_upwards() -> None:
    values = [float(v) for v in range(1, 11)]
    random.Random(0).shuffle(values)
    found = summary([*values, math.nan])
    assert (found.median, found.p90, found.least, found.most) == (5.5, 9.0, 1.0, 10.0)
    assert math.isnan(summary([math.nan]).median)


def test_exposed_time_is_counted_from_the_fastest_roof_of_the_same_round() -> None:
    ours, first, second = (Timing(n, 0.0, 1, list(s)) for n, s in (("o", (5, 9)), ("f", (4, 9)), ("s", (6, 5))))
    assert exposed(ours, [first, second]) == [1, 4]


def test_a_round_is_near_or_far_only_if_the_cores_stayed_there() -> None:
    assert placement.of_rounds([100, 120, 500, 600, 90]) == ["near", "mixed", "far", "mixed"]
    assert placement.of_rounds([math.nan, math.nan], crowded=True) == ["crowded"]
    assert placement.of_rounds([math.nan, math.nan]) == ["unprobed"]
    assert placement.of_run(["near"] * 9 + ["mixed"]) == "near"
    assert placement.of_run(["near"] * 5 + ["far"] * 5) == "mixed"


def test_sizes_are_read_as_they_are_written() -> None:
    for count in (4, 4096, 65536, 1 << 20, 3 << 30, 1000):
        assert shapes.parse_bytes(shapes.format_bytes(count)) == count
    assert shapes.parse_gemm("16") == (16, 4096, 4096)
    assert shapes.parse_gemm("8x16x32") == (8, 16, 32)
    assert shapes.parse_gemm("gpt3_fc1/8") == (512, 6144, 1536)
    for parse, text in ((shapes.parse_bytes, "4 apples"), (shapes.parse_gemm, "8x16"), (shapes.parse_vocab, "7"),
                        (shapes.parse_rows, "7x8x9")):  # fmt: skip
        with pytest.raises(ValueError, match=r"sizes: expected .*got"):
            parse(text)


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16", "fp16", "fp64", "int32"])
def test_the_check_of_a_sum_lets_rounding_pass_and_nothing_else(dtype_name: str) -> None:
    world = 4
    setting = Setting(0, world, dtype_name)
    terms = [setting.values(rank, 1000) for rank in range(world)]
    want = sum(t.double() for t in terms)
    check = compare(want, sum_tolerance(setting, sum(t.double().abs() for t in terms)))
    assert check(terms[0] + terms[1] + terms[2] + terms[3]) <= 1
    assert check(terms[0] + terms[1] + terms[2]) > 1, "a rank is missing"
    late = (terms[0] + terms[1] + terms[2] + terms[3]).clone()
    late[517] = terms[0][517]
    assert check(late) > 1, "one element was read too early"
    assert check(want[:-1]) == math.inf, "an element is missing"


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_the_check_of_a_product_lets_rounding_pass_and_nothing_else(dtype_name: str) -> None:
    setting, inner = Setting(0, 2, dtype_name), 1024
    x, w = setting.values(0, 16, inner), (setting.values(1, 64, inner) / 32).to(setting.dtype)
    want = x.double() @ w.double().T
    check = compare(want, product_tolerance(setting, want, inner, 1 / 32))
    half = inner // 2
    assert check(x @ w.T) <= 1
    assert check(x[:, :half] @ w[:, :half].T + x[:, half:] @ w[:, half:].T) <= 1
    assert check(x[:, :half] @ w[:, :half].T) > 1, "a rank is missing"
    assert check((x @ w.T).roll(1, 0)) > 1, "rows in the wrong place"


def talk(team: RankTeam, planted: int, send: Callable[[Any], None]) -> None:
    """On each rank: gather, a round trip, and a result that is wrong on one rank."""
    everything = [team.gather([team.rank * 10.0 + turn]) for turn in range(50)]
    job = Candidate("a", call=lambda: torch.ones(()), error=lambda y: 3.0 if team.rank == planted else 0.0)
    fine = Candidate("b", call=lambda: torch.ones(()), error=right)
    timings = measure([job, fine], team, rounds=2, block_s=1e-4, most_lost=math.inf)
    send((everything, [t.verified for t in timings], [t.seconds for t in timings], team.flag_rtt_ns()))


@pytest.mark.parametrize(("number", "first", "second"), [(2, [0], [1]), (5, [0, 1], [2, 3, 4]), (1, [0], [0])])
def test_hosts_share_the_cores(
    number: int, first: list[int], second: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.ranks.cores", lambda: list(range(number)))
    hosts = [links.Host(address=address) for address in ("a", "a", "b", "b")]
    assert [cores_of(host, hosts) for host in hosts] == [first, first, second, second]


def test_all_ranks_see_the_same_values_and_a_wrong_result_of_one_stops_all() -> None:
    world = 3
    found = list(launch(world, talk, 1, pin=False))
    assert len(found) == world
    for everything, verified, seconds, _ in found:
        assert everything == [[[rank * 10.0 + turn] for rank in range(world)] for turn in range(50)]
        assert verified == [False, True]
        assert seconds == found[0][2] and seconds[0] == [] and len(seconds[1]) == 2


TINY: dict[str, Any] = {
    "all_reduce": 4096, "all_reduce_sym": 4096, "reduce_scatter": 4096, "all_gather": 4096, "codecs": 4096,
    "codecs_group": 4096, "codec_moves": 4096, "dispatch": 4, "gemm_all_reduce": shapes.Gemm(8, 32, 64),
    "gemm_reduce_scatter": shapes.Gemm(8, 32, 64), "all_gather_gemm": shapes.Gemm(8, 32, 64),
    "few_rows": shapes.Gemm(3, 32, 64), "few_rows_cached": shapes.Gemm(3, 32, 64),
    "all_reduce_add_rms_norm": shapes.Rows(5, 48),
    "overheads": shapes.Gemm(4, 32, 64), "overheads_training": shapes.Gemm(4, 32, 64),
    "vocab_embedding": shapes.Vocab(16, 64, 8), "vocab_cross_entropy": shapes.Vocab(16, 64, 8),
    "ddp_step": 64 << 10,
}  # fmt: skip


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_every_op_is_right_and_makes_complete_rows(dtype_name: str) -> None:
    assert set(TINY) == set(bench_run.BENCHES)
    setting = {"dtype_name": dtype_name, "codec": "none"}
    jobs = tuple(job for job in TINY.items() if job[0] != "ddp_step" or dtype_name == "fp32")  # which it alone has
    spec = bench_run.Spec(jobs, setting, 2, 1e-4, math.inf, where())
    cells = list(bench_run.run(spec, 2, pin=False))
    assert not [cell for cell in cells if isinstance(cell, str)]
    assert len(cells) == len(jobs)
    for row in (row for cell in cells for row in cell):
        assert tuple(row) == rows.FIELDS
        assert row["verified"], (row["op"], row["variant"], row["error"])
        assert row["calls"] > 0 and row["rounds"] == 2


def test_ranks_on_two_hosts_compare_the_op_with_itself_in_one_chunk() -> None:
    if (why := links.obstacle()) is not None:
        pytest.skip(f"needs network namespaces with shaped links: {why}")
    ops = ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm")
    jobs = tuple((op, shapes.Gemm(512, 64, 512 if op == "all_gather_gemm" else 64)) for op in ops)
    setting = {"dtype_name": "fp32", "codec": "fp16", "transport": "group"}
    spec = bench_run.Spec(jobs, setting, 1, 1e-4, math.inf, {**where(), "link": "2gbit"})
    cells = list(bench_run.run(spec, 2, pin=False, link="2gbit"))
    assert len(cells) == len(jobs)
    for cell in cells:
        assert not isinstance(cell, str), cell
        by_name = {row["variant"]: row for row in cell}
        assert all(row["verified"] and row["link"] == "2gbit" for row in cell)
        assert by_name["tpkernels"]["transport"] == by_name["one_chunk"]["transport"] == "group"
        assert by_name["one_chunk"]["path"] == "unfused"


def test_the_efficiency_of_an_overlap_is_the_part_of_the_communication_that_it_hides() -> None:
    def row(variant: str, codec: str, M: int, exposed_us: float | None) -> rows.Row:
        return {"op": "gemm_all_reduce", "variant": variant, "codec": codec, "M": M, "N": 8, "K": 8, "bytes": None,
                "exposed_us": exposed_us}  # fmt: skip

    values = [
        ("tpkernels", "fp16", 4, 2000.0),
        ("one_chunk", "fp16", 4, 8000.0),
        ("gemm_aten", "none", 4, None),
        ("tpkernels", "fp16", 8, -5.0),
        ("one_chunk", "fp16", 8, 1000.0),
        ("tpkernels", "none", 9, 1.0),
    ]
    found = [row(*value) for value in values]
    assert list(bench_run.overlaps(found)) == [
        "gemm_all_reduce 4x8x8, codec fp16: exposed communication 2.0 ms of 8.0 ms, overlap efficiency 0.75",
        "gemm_all_reduce 8x8x8, codec fp16: exposed communication 0.0 ms of 1.0 ms, overlap efficiency 1.00",
    ]


def test_a_link_is_named_by_its_rate() -> None:
    assert [links.parsed(name)[0] for name in ("1gbit", "300mbit")] == [1e9, 300e6]
    for name in ("fast", "0mbit", "1.5gbit", "loopback"):
        with pytest.raises(ValueError, match="a link is called like 1gbit"):
            links.parsed(name)[0]


def test_a_size_that_the_ranks_do_not_divide_is_left_out_with_its_reason() -> None:
    spec = bench_run.Spec((("gemm_reduce_scatter", shapes.Gemm(1, 32, 64)),), {}, 1, 1e-4, math.inf, where())
    (message,) = bench_run.run(spec, 2, pin=False)
    assert isinstance(message, str) and "1 does not divide by 2 ranks" in message


def test_a_share_of_the_copy_is_of_bytes_and_not_of_times() -> None:
    row = {"variant": "encode_bf16", "bytes": 4 << 20, "dtype": "fp32", "ratio": 1.0}
    assert codecs.share(row) == 0.75, "in the time in which 8 bytes are copied, 4 are read and 2 written"
    assert codecs.share({**row, "variant": "feedback_bf16"}) == 1.75
    for move in codecs.MOVES:
        for codec in ("fp16", "int8"):
            least = {**row, "variant": f"{move}_{codec}", "ratio": codecs.least_ratio(move, codec)}
            assert codecs.share(least) == pytest.approx(codecs.GOALS[move])


def test_every_run_of_the_suite_is_one_that_the_bench_knows() -> None:
    runs = [run.split() for run in suite.RUNS + suite.OTHERS]
    assert {op for op, *_ in runs} | {"all_reduce_sym"} == {*bench_run.BENCHES, *suite.PROGRAMS}
    assert suite.chosen(["dispatch"]) == ["dispatch"] and "dispatch" not in suite.chosen([])
    assert suite.chosen([], everything=True) == suite.RUNS + suite.OTHERS
    for op, *words in runs:
        main = importlib.import_module(f"bench.{op}" if op in suite.PROGRAMS else "bench.run").main
        options = {f"--{name.replace('_', '-')}" for name in inspect.signature(main).parameters}
        assert {word for word in words if word.startswith("--")} | {"--out"} <= options, (op, words)

"""Tokens/s of decoding at batch 1, against transformers, alone and cut by its own tp_plan: `python -m bench.generate`.

Three teams of processes live side by side, and only the one whose turn it is runs (the others sleep in a pipe):

    alone      one process with as many threads as there are ranks: transformers with its dynamic cache, and with its
               static cache and torch.compile
    tpkernels  a process of one thread for each rank, the model cut by tpkernels.parallelize; and, in place of a token,
               the mere reading of each rank's weights ("reading_weights"), all ranks at the same time
    tp_plan    the same with transformers' tp_plan="auto" over gloo; it needs heads that divide evenly, which those of
               SmolLM2 (9 and 3) do not over 2 ranks, so that it has a model of the same size with 8 and 4 heads

There are these teams for each dtype. A round runs every candidate once for so many tokens; a ratio is taken inside a
round, also between dtypes. Verified before: logits after a prompt and one decoded token against fp32 logits of the full
model, within the rounding of the dtype.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.cell import DTYPES, Cell
from bench.rows import KEEP_HELP, Row, circumstances, destination, row_of, save
from bench.table import digits, under
from bench.timing import Candidate, Timing

PROMPT = list(range(1000, 1016))
CHECKED_TOKEN = 504
MOST = 256  # tokens of a static cache
ROUNDING = {"fp32": 2e-4, "bf16": 0.06}  # of the largest logit; 30 layers, each rounding several times
EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4}
ALONE = ("transformers", "transformers_compiled")
OURS = ("tpkernels_dynamic", "tpkernels_static", "tpkernels_compiled", "reading_weights")
PLAN = ("tp_plan_gloo",)
KINDS = {name: team for team, names in (("alone", ALONE), ("tpkernels", OURS), ("tp_plan", PLAN)) for name in names}
WAIT_S = 600.0

Named = tuple[str, str]  # dtype, candidate


def make_model(even: bool, dtype: torch.dtype, **options: Any) -> Any:
    """SmolLM2 with its weights, or a model of its size with heads that divide."""
    if not even:
        from tpkernels.generate.load import load_whole, quiet_transformers

        quiet_transformers()
        return load_whole("smollm2", {v: k for k, v in DTYPES.items()}[dtype])[0]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.pop("folder"), dtype=dtype, **options).eval()


def write_even(folder: Path) -> None:
    """The folder of the model that divides: sizes of SmolLM2, weights at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "head_dim": 64,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, **EVEN, tie_word_embeddings=True)).save_pretrained(folder)


class Transformers:
    """Decoding by transformers alone: its model, a cache of its own, the likeliest token."""

    def __init__(self, model: Any, *, static: bool = False) -> None:
        self._model, self._static = model, static
        self._run = torch.compile(self._forward, dynamic=False) if static else self._forward

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        found = self._model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = found.logits[:, -1]
        return logits

    @torch.inference_mode()
    def start(self) -> Tensor:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        self._cache = StaticCache(config=config, max_cache_len=MOST) if self._static else DynamicCache(config=config)
        self._position = torch.tensor([[len(PROMPT)]])
        return self._forward(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None], self._cache)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        logits = self._run(torch.tensor([[token]]), self._position, self._cache)
        self._position = self._position + 1
        return logits


class Ours:
    """Decoding by tpkernels.generate."""

    def __init__(self, model: Any, cache: str) -> None:
        from tpkernels.generate import decoders

        self._made: Any = (
            decoders.DynamicDecoder(model)
            if cache == "dynamic"
            else decoders.SlotDecoder(model, 1, MOST, compile=cache == "compiled")
        )

    def start(self) -> Tensor:
        found: Tensor = self._made.start([PROMPT])
        return found

    def step(self, token: int) -> Tensor:
        found: Tensor = self._made.step({0: token})
        return found


class Weights:
    """The least that a token takes: every parameter of this rank is read once."""

    def __init__(self, model: Any) -> None:
        values = [p.detach().contiguous().view(-1) for p in model.parameters()]
        self._words = [v.view(torch.int64 if v.nbytes % 8 == 0 else torch.uint8) for v in values]

    def start(self) -> Tensor:
        return torch.zeros(1)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        for words in self._words:
            words.sum()
        return torch.zeros(1)


def decode(runner: Any, count: int, share: Callable[[int], int]) -> float:
    """Seconds for so many tokens after the first."""
    token = share(int(runner.start().argmax()))
    start = time.perf_counter()
    for _ in range(count):
        token = share(int(runner.step(token).argmax()))
    return time.perf_counter() - start


def error_of(runner: Any, want: Tensor, allowed: float) -> float:
    if isinstance(runner, Weights):
        return 0.0
    runner.start()
    got = runner.step(CHECKED_TOKEN)[0].float()
    return float((got - want).abs().max() / (allowed * want.abs().max()))


def candidates_of(
    team: str, even: bool, dtype: torch.dtype, folder: str
) -> tuple[dict[str, Any], Callable[[int], int]]:
    """The programs of a process of a team; all its ranks draw the same token."""
    if team == "alone":
        model = make_model(even, dtype, folder=folder)
        return dict(zip(ALONE, (Transformers(model), Transformers(model, static=True)), strict=True)), int
    import torch.distributed as dist

    if team == "tp_plan":
        model = make_model(even, dtype, folder=folder, tp_plan="auto")
        return {"tp_plan_gloo": Transformers(model)}, int
    dist.init_process_group("gloo")
    from tpkernels import Group
    from tpkernels.generate.sampling import share
    from tpkernels.plan.api import parallelize

    group = Group.open(timeout_s=WAIT_S)
    model = parallelize(make_model(even, dtype, folder=folder), group=group)
    kinds = ("dynamic", "static", "compiled")
    runners: dict[str, Any] = {f"tpkernels_{kind}": Ours(model, kind) for kind in kinds}
    runners["reading_weights"] = Weights(model)
    return runners, lambda token: share([token], group)[0]


def process(
    pipe: Connection, team: str, rank: int, ranks: int, port: int, even: bool, dtype: str, folder: str, reference: bool
) -> None:
    """Serve one process of a team: the wanted logits, then ("check", name, 0) and ("run", name, count) until None.

    Args:
        reference: send the wanted logits first; of the team "alone".
    """
    try:
        if team != "alone":
            size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), **size, **where})
        torch.set_num_threads(ranks if team == "alone" else 1)
        want = None
        if reference and dtype != "fp32":
            want = _logits(make_model(even, torch.float32, folder=folder))
        runners, share = candidates_of(team, even, DTYPES[dtype], folder)
        if reference:
            pipe.send(("ok", want if want is not None else _logits(runners["transformers"])))
        want = pipe.recv()
        while (order := pipe.recv()) is not None:
            what, name, count = order
            if what == "check":
                pipe.send(("ok", error_of(runners[name], want, ROUNDING[dtype])))
            else:
                pipe.send(("ok", decode(runners[name], count, share)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _logits(model: Any) -> Tensor:
    runner = model if isinstance(model, Transformers) else Transformers(model)
    runner.start()
    return runner.step(CHECKED_TOKEN)[0].float().clone()


class Team:
    """The processes of one team, which run the same at the same time."""

    def __init__(self, name: str, ranks: int, even: bool, dtype: str, folder: str, port: int, reference: bool) -> None:
        context, size = mp.get_context("spawn"), 1 if name == "alone" else ranks
        self.name, self.dtype, self._pipes, self._processes = name, dtype, list[Any](), list[Any]()
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, name, rank, ranks, port, even, dtype, folder, reference)
            made = context.Process(target=process, args=arguments, daemon=True)
            made.start()
            self._pipes.append(ours)
            self._processes.append(made)

    def send(self, message: Any) -> None:
        for pipe in self._pipes:
            pipe.send(message)

    def call(self, message: Any) -> float:
        """The largest answer of the processes."""
        self.send(message)
        return max(self.answer(pipe) for pipe in self._pipes)

    def answer(self, pipe: Any = None) -> Any:
        pipe = pipe or self._pipes[0]
        if not pipe.poll(WAIT_S):
            raise TimeoutError(f"{self.name}: no answer within {WAIT_S:.0f} s")
        state, value = pipe.recv()
        if state != "ok":
            raise RuntimeError(f"{self.name}:\n{value}")
        return value

    def end(self) -> None:
        for made in self._processes:
            made.kill()
            made.join()


def checked(teams: list[Team], names: dict[str, list[str]]) -> dict[Named, Timing]:
    """Every candidate of every dtype, verified and warm, without times."""
    want = teams[0].answer()
    for team in teams:
        team.send(want)
    errors = {(t.dtype, name): t.call(("check", name, 0)) for t in teams for name in names[t.name]}
    return {key: Timing(key[1], error) for key, error in errors.items()}


def measured(teams: list[Team], timings: dict[Named, Timing], rounds: int, count: int) -> dict[Named, Timing]:
    """Those that are right once a round, in turning order; seconds are of one token."""
    by_kind = {(team.dtype, team.name): team for team in teams}
    where = {key: by_kind[key[0], KINDS[key[1]]] for key, timing in timings.items() if timing.verified}
    for key, team in where.items():
        timings[key].calls = count
        team.call(("run", key[1], 3))
    for turn in range(rounds):
        for key, team in where.items() if turn % 2 == 0 else reversed(where.items()):
            timings[key].seconds.append(team.call(("run", key[1], count)) / count)
    return timings


def rows_of(timings: dict[Named, Timing], op: str, ranks: int, where: Row) -> list[Row]:
    """The rows of all dtypes; ratios against a candidate of another dtype have that in front of its name."""
    rounds = max(len(t.seconds) for t in timings.values())
    rows = []
    for dtype in dict.fromkeys(dtype for dtype, _ in timings):
        by_name = {name if of == dtype else f"{of} {name}": t for (of, name), t in timings.items()}
        names = [name for of, name in timings if of == dtype and by_name[name].seconds]
        made = [Candidate(name, lambda: None, lambda _: 0.0, label={"codec": "none"}) for name in names]
        for candidate in made:
            alone = candidate.name in ALONE
            cell = Cell(op, dtype, 1 if alone else ranks, {"M": 1}, made, baseline="transformers")
            threads = {"threads": ranks if alone else 1}
            row = row_of(cell, candidate, by_name, [math.nan] * (rounds + 1), {**where, **threads})
            rows.append({**row, "tokens_per_s": round(1e6 / row["median_us"], 2)})
    return rows


def show(rows: list[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("decode", "dtype", "R", "ms/token", "p90", "tokens/s", "vs transformers", "least", "most", "error"):
        table.add_column(name, justify="left" if name == "decode" else "right")
    for row in rows:
        ms = [digits(row[key] / 1e3) for key in ("median_us", "p90_us")]
        ratio = [digits(row[key]) for key in ("ratio", "ratio_min", "ratio_max")]
        speed = f"{row['tokens_per_s']:.1f}"
        table.add_row(row["variant"], row["dtype"], str(row["R"]), *ms, speed, *ratio, digits(row["error"]))
    console.print(table)
    console.print(under(rows[0]), style="dim", markup=False)


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 2,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or both with a comma.")] = "fp32",
    even: Annotated[
        Path | None, typer.Option(help="Folder for the model whose heads divide; measure that one, tp_plan among it.")
    ] = None,
    only: Annotated[str, typer.Option(help="Candidates, separated by commas; all of them when empty.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Of a candidate in a round.")] = 24,
    port: Annotated[int, typer.Option(help="And the next ones: where ranks meet.")] = 29533,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to add the rows to; default runs/bench/generate.jsonl.")
    ] = None,
) -> None:
    """Measure decoding of SmolLM2 at batch 1."""
    if even is not None and not (even / "config.json").exists():
        write_even(even)
    names = {"alone": ALONE, "tpkernels": OURS, "tp_plan": PLAN if even is not None else ()}
    chosen = {t: [n for n in found if not only or n in only.split(",")] for t, found in names.items()}
    chosen["alone"] = list(dict.fromkeys(["transformers", *chosen["alone"]]))
    kinds = [(of, name) for of in dtype.split(",") for name, found in chosen.items() if found]
    teams = [Team(name, ranks, even is not None, of, str(even), port + i, i == 0) for i, (of, name) in enumerate(kinds)]
    try:
        timings = measured(teams, checked(teams, chosen), rounds, tokens)
    finally:
        for team in teams:
            team.end()
    op = "decode_llama_8_heads" if even is not None else "decode_smollm2"
    found = rows_of(timings, op, ranks, circumstances(pinned=False))
    show(found, Console(width=max(140, Console().width)))
    wrong = [f"{of} {name}" for (of, name), timing in timings.items() if not timing.verified]
    if wrong:
        print(f"wrong and not timed: {', '.join(wrong)}")
    else:
        save(destination("generate.jsonl", keep, out), found)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)

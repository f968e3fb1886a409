"""The compression study: it runs, keeps its rows, goes on where it stopped, and leaves no network behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import rows
from bench.study import goals, links, plan, report, session
from bench.study.methods import LAYOUTS, methods, settings_of
from tpkernels.train.settings import check

ROOT = Path(__file__).resolve().parents[2]
# Sends 1000 bytes to a host that nobody listens on. Its refusal of the second connection says that they have left.
SEND = """
import contextlib, socket, sys
def knock():
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((sys.argv[1], 9), timeout=10)
knock()
socket.socket(type=socket.SOCK_DGRAM).sendto(bytes(1000), (sys.argv[1], 9))
knock()
"""


def loss_row(method: str, seed: int, loss: float, sent: int, steps: int = 300) -> dict[str, Any]:
    return {
        "kind": "loss", "layout": "dp2", "link": "shared memory", "method": method, "seed": seed, "steps": steps,
        "validation_loss": loss, "bytes_per_step": sent, "parameters": 10, "curve": [loss],
        "machine": {"class": "AMD Zen 4", "cores": 2, "cpu": "some"}, "torch": "2", "date": "today", "commit": "c",
    }  # fmt: skip


def speed_row(method: str, link: str, tokens: float, kind: str = "speed") -> dict[str, Any]:
    return {
        "kind": kind, "layout": "dp2", "link": link, "method": method, "steps": 4, "rounds": 3,
        "tokens_per_s": tokens, "step_seconds": 1 / tokens,
        "machine": {"class": "AMD Zen 4", "cores": 2, "cpu": "some"}, "torch": "2", "date": "today", "commit": "c",
    }  # fmt: skip


@pytest.mark.nightly
def test_the_smoke_run_measures_two_methods_and_shows_tables() -> None:
    command = [sys.executable, "examples/compression_study.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False,
                          env=os.environ | {"COLUMNS": "200"})  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for words in ("loss dp2", "speed dp2 loopback", "DDP fp16 hook", "two replicas", "goals", "compression_study.md"):
        assert words in done.stdout, words


def test_every_method_is_one_that_the_trainer_accepts() -> None:
    for layout in LAYOUTS:
        names = [method.name for method in methods(layout)]
        assert len(set(names)) == len(names)
        for method in methods(layout):
            check(settings_of(plan.SMALL, layout, method))
    assert {"DDP", "PowerSGD", "int8 delayed", "fp8 local", "topk", "topk local"} <= {m.name for m in methods("dp2")}


def test_cells_that_are_kept_are_not_measured_again_and_a_cut_off_row_is(tmp_path: Path) -> None:
    study = plan.Study(layouts=("dp2",), only=("dp2/DDP", "dp2/int8"), seeds=2, links=("100mbit",))
    path = tmp_path / "rows.jsonl"
    rows.append(path, loss_row("DDP", 0, 2.0, 4))
    with path.open("a") as file:
        file.write('{"kind": "loss", "lay')
    rows.append(path, loss_row("int8", 0, 2.0, 1))
    rows.append(path, loss_row("int8", 0, 2.1, 1))
    kept = rows.load(path)
    assert [(r["method"], r["validation_loss"]) for r in kept] == [("DDP", 2.0), ("int8", 2.1)]
    assert [(j["seeds"], j["methods"]) for j, _, _ in plan.loss_jobs(study, kept)] == [([1], ["DDP", "int8"])]
    timed = [speed_row("DDP", "100mbit", 1.0), speed_row("int8", "100mbit", 1.0)]
    assert [j["kind"] for j, _, _ in plan.speed_jobs(study, timed)] == ["alone"]
    assert [j["kind"] for j, _, _ in plan.speed_jobs(study, timed[:1])] == ["speed", "alone"]


def test_goals_are_reached_missed_or_not_measured() -> None:
    kept = [loss_row("none", s, 2.0 + s / 100, 400) for s in range(3)]
    kept += [loss_row("fp16", s, 2.005 + s / 100, 201) for s in range(3)]
    kept += [loss_row("int8", s, 2.1 + s / 100, 106) for s in range(3)]
    kept += [speed_row("DDP", "100mbit", 1.0), speed_row("fp16", "100mbit", 1.9), speed_row("int8", "100mbit", 2.0)]
    kept += [speed_row("DDP", "1gbit", 1.0), speed_row("fp16", "1gbit", 0.9)]
    alone = {"step alone": 10, "computing alone": 12.5, "averaging alone, fp16": 20, "averaging alone, none": 20}
    kept += [speed_row(name, "1gbit", per_s, "alone") for name, per_s in alone.items()]
    kept += [speed_row("fp16 delayed", "1gbit", 1 / 0.104), speed_row("none delayed", "1gbit", 1 / 0.15)]
    found = {v.goal: v.word for v in goals.verdicts(kept)}
    words = [
        ("dp2: fp16 at", "reached"), ("dp2: int8 at", "MISSED"), ("dp2: topk at", "not measured"),
        ("dp2, 100mbit: fp16 1.8x", "reached"), ("dp2, 100mbit: int8 3x", "MISSED"),
        ("dp2, 1gbit: fp16 not slower", "MISSED"), ("dp2, 1gbit: delayed hides 90 % of what fits, fp16", "reached"),
        ("dp2, 1gbit: delayed hides 90 % of what fits, none", "MISSED"),
    ]  # fmt: skip
    for goal, word in words:
        assert [w for g, w in found.items() if g.startswith(goal)] == [word], goal
    text = "\n".join(report.lines_of(kept))
    assert "| int8 | 106 | 0.265 | 2.1100 [2.1000, 2.1200] | +4.98% |" in text


def test_a_shaped_link_joins_two_namespaces_and_is_gone_after_an_error() -> None:
    why = links.obstacle()
    if why is not None:
        pytest.skip(f"needs network namespaces with shaped links: {why}")
    with pytest.raises(RuntimeError, match="on the way"), links.shaped("100mbit") as link:
        assert "rate 100Mbit" in links.run(*link.hosts[0].command, links.program("tc"), "qdisc", "show", "dev", "v0")
        addresses = [
            links.run(*host.command, links.program("ip"), "addr", "show", host.interface) for host in link.hosts
        ]
        assert all("inet6" not in text for text in addresses), "IPv6 sends by itself"
        before = [host.sent_bytes() for host in link.hosts]
        links.run(*link.hosts[1].command, sys.executable, "-c", SEND, link.hosts[0].address)
        sent = [host.sent_bytes() - was for host, was in zip(link.hosts, before, strict=True)]
        assert 1042 <= sent[1] < 4000, "a datagram of 1000 bytes with its headers, two requests, an address looked up"
        assert 0 < sent[0] < 1000, "two refusals"
        raise RuntimeError("on the way")
    assert f"{links.PREFIX}-{os.getpid()}" not in links.run(links.program("ip"), "netns", "list")


def test_a_rank_that_fails_ends_the_session_with_what_it_said() -> None:
    job = {"kind": "nonsense", "layout": "dp2", "transport": "auto", "settings": plan.TINY.__dict__, "methods": []}
    with pytest.raises(session.RanksFailed, match="kind must be loss, speed or alone, got nonsense"):
        list(session.run(job, links.Link(links.LOOPBACK), timeout_s=60.0))

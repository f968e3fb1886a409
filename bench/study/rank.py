"""One rank of the study: `python -m bench.study.rank '<job as JSON>'`, started by session.py with torchrun's variables.

Rank 0 writes one JSON line for each row to its standard output; everything else goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench.study import measure
from bench.study.methods import LAYOUTS, Method, methods
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.train.settings import Settings

TIMEOUT = timedelta(minutes=5)


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        with ExitStack() as opened:
            groups = open_groups(opened, job["layout"], job["transport"])
            session = measure.Session.begin(job["layout"], groups, Settings(**job["settings"]))
            for row in rows(session, job):
                if dist.get_rank() == 0:
                    print(json.dumps(row), flush=True)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def open_groups(opened: ExitStack, layout: str, transport: str) -> Mesh:
    """The groups of a layout; those whose ranks sit on both ends of the link take `transport`.

    tp = 2 with replicas stays on one host, as one would have it.
    """
    tp, dp = LAYOUTS[layout]
    mesh = dist.init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    inner = transport if dp == 1 else "auto"
    timeout = TIMEOUT.total_seconds()
    tp_group = opened.enter_context(Group.open((mesh, "tp"), timeout, transport=inner if tp > 1 else "auto"))
    dp_group = opened.enter_context(Group.open((mesh, "dp"), timeout, transport=transport)) if dp > 1 else None
    return Mesh(tp_group, tp_group, dp_group)


def rows(session: measure.Session, job: dict[str, Any]) -> Iterator[measure.Row]:
    known = {m.name: m for m in methods(job["layout"])}
    chosen: list[Method] = [known[name] for name in job["methods"]]
    if job["kind"] == "loss":
        for seed in job["seeds"]:
            for method in chosen:
                yield {"method": method.name, "seed": seed, **measure.train(session, method, seed, job["steps"])}
    elif job["kind"] == "speed":
        yield from measure.timed(session, chosen, job["rounds"], job["steps"])
    elif job["kind"] == "alone":
        yield from measure.alone(session, sorted({m.codec for m in chosen if m.torch is None}), job["rounds"])
    else:
        raise ValueError(f"job: kind must be loss, speed or alone, got {job['kind']}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""The job files of examples/launch: their commands are read by the parsers that will read them; Slurm's is run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser

from bench.study import links
from tpkernels.cli import app
from tpkernels.train.runlog import read

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).parents[2] / "examples" / "launch"
TINY = [
    "--layers=1", "--d-model=16", "--heads=2", "--context=16", "--batch=4", "--steps=4", "--checkpoint-every=2",
    "--sample-bytes=0", "--parity-steps=0", "--tp=2", "--dp=2", "--grad-codec=fp16",
]  # fmt: skip


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[Any, dict[str, Any]]:
    """The arguments of torchrun, and those of `tpkernels train` behind them."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words[0] == "torchrun"
    launch = get_args_parser().parse_args(words[1:])
    assert launch.module and launch.training_script == "tpkernels"
    name, *options = launch.training_script_args
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return launch, command.make_context(name, options).params


def check_pod(pod: dict[str, Any]) -> list[str]:
    """Its ranks have shared memory and a volume for the run; the command."""
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounts["/runs"]]
    return list(container["command"])


def check_job(launch: Any, options: dict[str, Any], hosts: int) -> None:
    assert int(launch.nnodes) == hosts and launch.max_restarts > 0
    assert options["resume_or_start"] and str(options["folder"]).startswith("/runs/")
    assert math.prod(options[name] for name in ("tp", "dp", "pp")) == hosts * int(launch.nproc_per_node)


def test_a_jobset_starts_the_ranks_of_its_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    (hosts,) = job["spec"]["replicatedJobs"]
    spec = hosts["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    launch, options = parsed(check_pod(spec["template"]["spec"]), monkeypatch)
    check_job(launch, options, spec["parallelism"])
    name, port = f"{job['metadata']['name']}-{hosts['name']}-0-0", launch.rdzv_endpoint.rpartition(":")[2]
    assert launch.rdzv_endpoint == f"{name}.{job['spec']['network']['subdomain']}:{port}"


def test_a_pytorchjob_starts_the_ranks_of_its_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"] and replicas["Master"]["replicas"] == 1
    hosts = sum(each["replicas"] for each in replicas.values())
    for each in replicas.values():
        assert each["template"]["spec"]["containers"][0]["name"] == "pytorch", "the operator looks for that name"
        operator = {"PET_NNODES": str(hosts), "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"]}
        launch, options = parsed(check_pod(each["template"]["spec"]), monkeypatch, **operator)
        check_job(launch, options, hosts)


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
{starts}
status=0
for job in $(jobs -p); do wait $job || status=1; done
exit $status
"""


@pytest.mark.nightly
def test_the_slurm_job_trains_on_two_hosts(tmp_path: Path, text: str) -> None:
    """Two network namespaces, a rendezvous over their link; srun is a script that starts its command in both."""
    if (why := links.obstacle()) is not None:
        pytest.skip(f"needs network namespaces: {why}")
    with links.shaped("1gbit", own_memory=True) as link:
        # Hosts have names, by which torchrun finds out whether it is the first one; namespaces have none of their own.
        starts = "\n".join(
            f"PET_RDZV_CONF=is_host={int(host is link.hosts[0])} PET_LOCAL_ADDR={host.address} "
            f"GLOO_SOCKET_IFNAME={host.interface} nsenter --mount={host.memory} --net=/run/netns/{host.namespace} "
            '"$@" &'
            for host in link.hosts
        )
        programs = {
            "srun": SRUN.format(starts=starts),
            "scontrol": f"#!/bin/bash\nprintf '%s\\n' {' '.join(host.address for host in link.hosts)}\n",
            "torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        }
        for name, script in programs.items():
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
        env = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "host[0-1]",
        }  # fmt: skip
        run = tmp_path / "run"
        done = subprocess.run(
            ["bash", FOLDER / "slurm.sbatch", run, f"--data={text}", *TINY],
            env=env, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 replicas (group, gradients fp16, sync) of 2 ranks (shm)" in " ".join(done.stdout.split())
    assert len(read(run / "log.jsonl")) == 4

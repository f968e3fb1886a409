"""Models and measures of the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tpkernels import checkpoint
from tpkernels.checkpoint.ranks import file_name
from tpkernels.comm.group import Group, resolve
from tpkernels.data_parallel import GradAggregator
from tpkernels.shard import ShardInfo
from tpkernels.train.gpt import GPT, GPTConfig, sharded_parts


@contextmanager
def grid(tp: int, dp: int) -> Iterator[tuple[Group, Group]]:
    """The groups of tp * dp ranks: (over which a replica is cut, over the replicas)."""
    if not torch.distributed.is_initialized():
        yield resolve(None), resolve(None)
        return
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    with Group.open((mesh, "tp")) as cut, Group.open((mesh, "dp")) as replicas:
        yield cut, replicas


def small_gpt(group: Group, seed: int = 1, dtype: torch.dtype = torch.float32) -> GPT:
    """Three heads, so that any number of ranks but 1 and 3 cuts unevenly."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(layers=1, d_model=24, heads=3, context=8, vocab=11), sharded_parts(group)).to(dtype)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))


def learn(
    model: GPT, optimizer: torch.optim.Optimizer, steps: range, aggregator: GradAggregator | None = None, who: int = 0
) -> list[float]:
    """Steps on made-up bytes; each step draws its own, and each replica its own."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1000 * who + step))
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if aggregator is not None:
            aggregator.wait()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def whole(folder: Path, kinds: tuple[str, ...] = ("model", "optimizer")) -> dict[str, Tensor]:
    """The unsharded tensors of a checkpoint, put together from what the manifest says by shard.py alone."""
    manifest = checkpoint.peek(folder)
    R = manifest["layout"]["tp"]
    files = [load_file(folder / file_name(r, R)) for r in range(R)]
    found = {}
    for name, entry in manifest["tensors"].items():
        if name.partition("/")[0] in kinds:
            found[name] = _joined([f[name] for f in files], entry, R)
            assert list(found[name].shape) == entry["shape"]
    return found


def residuals(folder: Path, replica: int) -> dict[str, Tensor]:
    """The unsharded residuals of a replica."""
    manifest = checkpoint.peek(folder)
    R = manifest["layout"]["tp"]
    files = [load_file(folder / file_name(r, R, replica)) for r in range(R)]
    names = [name for name in files[0] if name.startswith("aggregator/residual.")]
    entries = {name: manifest["tensors"]["model/" + name.partition(".")[2]] for name in names}
    return {name: _joined([f[name] for f in files], entries[name], R) for name in names}


def _joined(parts: list[Tensor], entry: dict[str, Any], R: int) -> Tensor:
    if entry["dim"] is None:
        assert all(torch.equal(p, parts[0]) for p in parts)
        return parts[0]
    runs = tuple(tuple(map(tuple, rank)) for rank in entry["runs"] or ())
    return ShardInfo(entry["dim"], entry["shape"][entry["dim"]], R, 0, unit=entry["unit"], runs=runs).assemble(parts)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name

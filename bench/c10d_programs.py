"""Programs on the back end `tpk` of torch.distributed and on gloo: steps of training, and tokens.

DistributedDataParallel, fully_shard and parallelize_module on an MLP, whose loss after two updates must be that of one
process in fp64; and what transformers decodes with tp_plan="auto", which must be the tokens of the whole model. A size
is that of the parameters, in bytes of fp32. The bound is the same program on torch's back end `fake`, which answers at
once and moves nothing between ranks: what it computes is wrong, and no back end makes the program faster.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the back end
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from bench.c10d import GLOO, backends, group_of
from bench.cell import Cell, Setting
from bench.timing import Candidate, nothing

BOUND, FAKE = "bound", "fake"
LAYERS, ROWS = 4, 32  # linears; rows of each rank's batch
CHECKED = 3  # steps from the start until the loss is compared
RATE = 0.5  # of learning: each update takes 9e-4 of the loss, half of it where gradients are not averaged
ALLOWED = 1e-4  # of a loss after CHECKED - 1 updates, in fp32: sums of `width` products, LAYERS times


def width_of(setting: Setting, nbytes: int) -> int:
    """Of the layers of an MLP whose parameters have so many bytes: a multiple of 16.

    Raises:
        ValueError: the dtype is not fp32.
    """
    if setting.dtype != torch.float32:
        raise ValueError(f"programs of c10d are measured in fp32, got {setting.dtype_name}")
    return math.isqrt(nbytes // 4 // LAYERS) // 16 * 16


def mlp(width: int) -> nn.Sequential:
    """The model of the programs, the same on all ranks."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(LAYERS // 2)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def batch(width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Input and target of a rank."""
    x, y = torch.randn(2, ROWS, width, generator=torch.Generator().manual_seed(rank))
    return x, y


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, averaged: Callable[[], Any] = nothing
) -> Tensor:
    """One step of training; the loss before it.

    Args:
        averaged: returns when the gradients are averages, where `backward` does not see to that.
    """
    optimizer.zero_grad()
    loss = (model(x) - target).square().mean()
    loss.backward()
    averaged()
    optimizer.step()
    return loss.detach()


@dataclass
class Training:
    """A program on one back end: `restart` makes its model anew, every call is the next step."""

    wrap: Callable[[nn.Sequential], nn.Module]
    width: int
    data: tuple[Tensor, Tensor]
    want: float

    def restart(self) -> None:
        self.model = self.wrap(mlp(self.width))
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE)
        for _ in range(CHECKED - 1):
            self.step()

    def step(self) -> Tensor:
        return step(self.model, self.optimizer, *self.data)

    def error(self, loss: Tensor) -> float:
        """Of the loss of this rank."""
        return abs(float(loss) / self.want - 1) / ALLOWED


def expected(width: int, ranks: Sequence[int]) -> list[float]:
    """The loss of each of these ranks in the checked step, from one process in fp64."""
    model, parts = mlp(width).double(), [tuple(x.double() for x in batch(width, r)) for r in ranks]
    optimizer, losses = torch.optim.SGD(model.parameters(), RATE), []
    for _ in range(CHECKED):
        optimizer.zero_grad()
        found = [(model(x) - target).square().mean() for x, target in parts]
        (sum(found) / len(found)).backward()  # type: ignore[union-attr]
        optimizer.step()
        losses = [float(loss.detach()) for loss in found]
    return losses


def ways() -> dict[str, str]:
    """The back end of each candidate."""
    return {name: name for name in backends()} | {BOUND: FAKE}


def checked(name: str, error: Callable[[Any], float]) -> Callable[[Any], float]:
    """The check of a candidate; the bound computes nothing that could be right."""
    return (lambda _: 0.0) if name == BOUND else error


def _program(
    setting: Setting, op: str, nbytes: int, wrap: Callable[[Any, nn.Sequential], nn.Module], shared: bool = False
) -> Cell:
    """The cell of a program; shared: all ranks have the batch of rank 0."""
    R, width, mine = setting.world_size, width_of(setting, nbytes), 0 if shared else setting.rank
    want = expected(width, [0] if shared else range(R))[mine]

    def candidate(name: str, backend: str) -> Candidate:
        job = Training(functools.partial(wrap, group_of(backend)), width, batch(width, mine), want)
        job.restart()
        return Candidate(name, job.step, checked(name, job.error), load=job.restart, label={"transport": backend})

    candidates = setting.pick(**{name: functools.partial(candidate, name, of) for name, of in ways().items()})
    return Cell(f"c10d_{op}", setting.dtype_name, R, {"bytes": nbytes}, candidates, GLOO)


def ddp(setting: Setting, nbytes: int) -> Cell:
    """A step with gradients averaged in buckets while the backward pass goes on."""
    return _program(setting, "ddp", nbytes, ddp_over)


def ddp_over(group: Any, model: nn.Module) -> DistributedDataParallel:
    """A model that is trained on all ranks of the group."""
    wrapped = DistributedDataParallel(model, process_group=group)
    if dist.get_backend(group) == FAKE:  # the futures of its works are empty, which DDP does not take
        wrapped.register_comm_hook(None, lambda _, bucket: unchanged(bucket))
    return wrapped


def unchanged(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A bucket that is ready at once."""
    found: torch.futures.Future[Tensor] = torch.futures.Future()
    found.set_result(bucket.buffer())
    return found


def _mesh(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def fsdp(setting: Setting, nbytes: int) -> Cell:
    """A step with parameters gathered before use and gradients reduced into shards."""

    def wrap(group: Any, model: nn.Sequential) -> nn.Module:
        for layer in (layer for layer in model if isinstance(layer, nn.Linear)):
            fully_shard(layer, mesh=_mesh(group))
        return fully_shard(model, mesh=_mesh(group))

    return _program(setting, "fsdp", nbytes, wrap)


def tensor_parallel(setting: Setting, nbytes: int) -> Cell:
    """A step on columns and rows of DTensor."""

    def wrap(group: Any, model: nn.Sequential) -> nn.Module:
        linears = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
        plan = {name: RowwiseParallel() if i % 2 else ColwiseParallel() for i, name in enumerate(linears)}
        return parallelize_module(model, _mesh(group), plan)

    return _program(setting, "tensor_parallel", nbytes, wrap, shared=True)


DECODED = 4  # tokens of a call
LAYER_BYTES = 14 << 20  # of a layer of LLAMA
LLAMA = {
    "vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, "eos_token_id": None,
}  # fmt: skip


@contextlib.contextmanager
def _meshes_of(backend: str) -> Iterator[None]:
    """init_device_mesh makes groups of this back end: transformers takes that of the default group."""
    made = torch.distributed.init_device_mesh

    def init_device_mesh(kind: str, shape: tuple[int, ...], *, mesh_dim_names: tuple[str, ...]) -> DeviceMesh:
        return made(kind, shape, mesh_dim_names=mesh_dim_names, backend_override=dict.fromkeys(mesh_dim_names, backend))

    with mock.patch.object(torch.distributed, "init_device_mesh", init_device_mesh):
        yield


def decode(setting: Setting, nbytes: int) -> Cell:
    """DECODED tokens of a Llama with layers of so many bytes, which transformers has cut by its own plan."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    prompt = torch.arange(100, 116)[None]

    def tokens(model: Any) -> Tensor:
        found: Tensor = model.generate(prompt, max_new_tokens=DECODED, do_sample=False, pad_token_id=0)
        return found

    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=nbytes // LAYER_BYTES)).eval()
    want, candidates = tokens(whole), {}
    with tempfile.TemporaryDirectory() as own:
        places = [own]
        dist.broadcast_object_list(places)
        (folder,) = places
        whole.save_pretrained(folder)  # on rank 0 only
        dist.barrier()
        for name, backend in ways().items():
            with _meshes_of(backend):
                plan = DistributedConfig(tp_size=setting.world_size, tp_plan="auto")
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, distributed_config=plan
                ).eval()
            candidates[name] = functools.partial(
                Candidate, name, functools.partial(tokens, model),
                checked(name, lambda found: 0.0 if torch.equal(found, want) else 2.0), label={"transport": backend},
            )  # fmt: skip
        dist.barrier()
    sizes = {"bytes": nbytes}
    return Cell("c10d_decode", setting.dtype_name, setting.world_size, sizes, setting.pick(**candidates), GLOO)

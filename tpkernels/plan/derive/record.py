"""Run a model, and the models in it, once as they are, and record the features that reach each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from tpkernels.errors import DeriveError
from tpkernels.plan.derive.calls import Dropouts, tensors_in
from tpkernels.plan.derive.flow import Flow
from tpkernels.plan.derive.inputs import Call, candidates


def record_runs(
    model: nn.Module, sources: dict[str, nn.Module], attention: dict[str, nn.Module], inputs: Call | None
) -> list[Run]:
    """Run the model, and then those models in it that it did not call (a vision tower without an image).

    Args:
        model: the full one.
        sources: {name: linear, Conv1D or embedding} that start features.
        attention: {name: nn.MultiheadAttention}, which are sharded by themselves, if at all.
        inputs: (args, kwargs) of the model; None: sample inputs are made.

    Raises:
        DeriveError: the model could not be run.
    """
    first: Exception | None = None
    runs: list[Run] = []
    watched = [*sources, *attention]
    for name, part in [("", model), *_models_in(model)]:
        own = {s for s in watched if s.startswith(f"{name}." if name else "")}
        if not own or any(own & set(run.flow.called) for run in runs):
            continue
        run, error = first_that_runs(
            model, part, sources, attention, [inputs] if inputs is not None and not name else None
        )
        runs += [run] if run else []
        first = first or error
    if not runs:
        which = "sample inputs" if inputs is None else "the inputs given"
        raise DeriveError(
            f"derive_plan: {type(model).__name__} could not be run on {which} "
            f"({f'{type(first).__name__}: {first}' if first else 'none could be guessed'}); "
            f"give inputs=(args, kwargs) or a plan"
        ) from first
    return runs


def _models_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name and hasattr(module, "config") and hasattr(module, "main_input_name"):
            yield name, module


@dataclass
class Run:
    """A run that worked.

    Attributes:
        part: the model, or a model in it.
        call: its arguments.
        device: "meta", or that of the model.
        flow: of its features.
        shapes: of the tensors that it returned.
    """

    part: nn.Module
    call: Call
    device: str
    flow: Flow
    shapes: list[torch.Size] = field(default_factory=list)


class Mismatch(Exception):
    """One rank of the cut model would not compute its part of what the model computes. `where` names a module."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(why)
        self.where = where


def first_that_runs(
    model: nn.Module,
    part: nn.Module,
    sources: dict[str, nn.Module],
    closed: dict[str, nn.Module],
    calls: list[Call] | None,
) -> tuple[Run | None, Exception | None]:
    """Try inputs until the part runs with one: on meta tensors, else, where it reads values, with real ones.

    Args:
        model: the full one.
        part: the model, or a model in it.
        sources, closed: as in `Flow`.
        calls: inputs to try; None: sample inputs.

    Returns:
        the run, and None; or None, and the first error.
    """
    first: Exception | None = None
    tensors = [*model.parameters(), *model.buffers()]
    devices = ["meta"] + ([str(tensors[0].device)] if not any(t.is_meta for t in tensors) else [])
    for device in devices:
        for call in calls if calls is not None else candidates(part):
            own = {name: module for name, module in sources.items() if module in set(part.modules())}
            run = Run(part, call, device, Flow(own, {}, closed))
            try:
                whole = {name: stand_in(p, device) for name, p in model.named_parameters()}
                execute(model, run, run.flow, whole)
                return run, None
            except Exception as error:  # any that a forward raises for arguments that do not fit
                first = first or error
    return None, first


def execute(model: nn.Module, run: Run, flow: Flow, values: dict[str, Tensor]) -> None:
    """Call the part of a run with `values` in the place of the model's parameters.

    Args:
        model: the full one.
        run: its part, call and device.
        flow: that follows the features.
        values: {name: the tensor that replaces the parameter}.

    Raises:
        Mismatch: it returns tensors of other sizes than before.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    local = {name: values[names[id(p)]] for name, p in run.part.named_parameters()}
    place = "cpu" if run.device == "meta" else run.device
    args, kwargs = tree_map(lambda x: x.to(place) if isinstance(x, Tensor) else x, run.call)
    flow.take_parameters(values)
    paths = {module: name for name, module in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flow.hooked(run.part, paths), flow, Dropouts(flow.drop):
            output = functional_call(run.part, local, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flow.note_output(output)
    run.shapes = run.shapes or [t.shape for t in tensors_in(output)]
    if [t.shape for t in tensors_in(output)] != run.shapes:
        raise Mismatch("", "it would return tensors of other sizes")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode; every module's mode and the random state are put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def stand_in(tensor: Tensor, device: str) -> Tensor:
    """Return the tensor that replaces a parameter in a run on a device."""
    return torch.empty_like(tensor, device="meta") if device == "meta" else tensor.detach()

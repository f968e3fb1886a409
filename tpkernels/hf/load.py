"""Hugging Face models that are too large for one rank: built on meta, sharded, then filled with this rank's slices.

    model = tpk.hf.load_pretrained("path/to/folder", group=group)        # or path/to/model.gguf

equals `tpk.parallelize(AutoModel....from_pretrained(path), group=group)` bit for bit, and no rank ever holds more than
its shards and one tensor. `checkpoint.export_hf` writes such a folder.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.comm.group import Group, resolve
from tpkernels.comm.objects import raise_together
from tpkernels.errors import CheckpointError, PlanError, shorten
from tpkernels.hf import files as hf_files
from tpkernels.hf import gguf as hf_gguf
from tpkernels.hf.initialise import initialised
from tpkernels.layers.base import mark_shards
from tpkernels.pipeline import split_by_layer, take_stages
from tpkernels.pipeline.orders import stages_on
from tpkernels.plan.api import parallelize
from tpkernels.plan.rules import Plan
from tpkernels.shard import full_shape, lay_out, shard_info

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    group: Group | None = None,
    plan: str | Mapping[str, str] | Plan = "auto",
    dtype: torch.dtype | str | None = None,
    model_class: type[Any] | None = None,
    config: PreTrainedConfig | None = None,
    variant: str | None = None,
    sequence_parallel: bool = False,
    codec: str = "none",
    grad_codec: str | None = None,
    gather_logits: bool = True,
    pipeline: Group | None = None,
    balance: str | Sequence[int] = "cost",
    stages_per_rank: int = 1,
    schedule: str = "1f1b",
) -> PreTrainedModel:
    """Load a Hugging Face model, sharded over the ranks of a group, or this rank's stages of it. Collective.

    Args:
        path: a folder with config.json and safetensors (one file, or several with an index), or a GGUF file.
        group: the ranks to shard over; None means all ranks.
        plan, sequence_parallel, codec, grad_codec, gather_logits: as for `parallelize`.
        dtype: of the parameters, also by its name; None and "auto" take that of the config, else that of the file.
        model_class: a class of transformers, or one of its Auto classes. None takes the class that the config names;
            AutoModelForCausalLM for a GGUF file. A class that was not the one saved may lack tensors of the file (a
            base without its head) and have others (a new head): these are initialised as transformers does it, the
            same on all ranks, and rank 0 warns of both.
        config: in place of the one in the path, for example with another attn_implementation.
        variant: as for `from_pretrained`: reads model.<variant>.safetensors.
        pipeline: the ranks over which the model is split by layer, too: this rank's stages are loaded, and
            `model.tpk_stages` is what `pipeline.Pipeline` takes. None: the whole model.
        balance: as for `pipeline.split_by_layer`. stages_per_rank: more than 1 for schedule "interleaved", 2 for
            "dualpipev". schedule: of the pipeline.

    Returns:
        the model in eval mode, on the group's device, with its generation config. Parameters and buffers are those that
        `from_pretrained` gives, sharded; tied parameters are tied.

    Raises:
        CheckpointError: files are missing or damaged, the weights are quantised, or they have other names or shapes
            than the model (named).
        PlanError: the model cannot be sharded by the plan.
        ModuleNotFoundError: transformers, accelerate or gguf is not installed; the text has the pip command.
    """
    group, path = resolve(group), Path(path)
    place, doing = CheckpointRanks(group, pp_group=pipeline), f"load {path}"
    _need_transformers()
    model: Any = None
    with place.together(doing):
        if not path.exists():
            raise CheckpointError("there is no such file or folder")
        config = config if config is not None else _config_of(path)
        if not _is_gguf(path):
            hf_files.refuse_quantised(path, config)
        files = {} if _is_gguf(path) else hf_files.open_folder(path, variant)
        kind, dtype = _class_of(config, model_class), _dtype_of(dtype, config, files)
        model = _empty(config, kind, dtype)
    split = None
    with raise_together(group, PlanError, "", gather_text=place.gather):
        if pipeline is not None:
            split = split_by_layer(model, pipeline.world_size * stages_per_rank, balance)
        parallelize(
            model, group=group, plan=plan, sequence_parallel=sequence_parallel, codec=codec, grad_codec=grad_codec,
            gather_logits=gather_logits,
        )  # fmt: skip
    state, fresh = _state(model), list[str]()
    supply: Callable[[Mapping[str, Tensor]], Supply]
    with place.together(doing):
        if _is_gguf(path):
            supply = partial(_from_gguf, model, state, path)
        else:
            supply, fresh = _from_folder(model, state, files, _names_other(config, model), warn=place.is_first)
        if split is not None and pipeline is not None:
            take_stages(model, split, *stages_on(schedule, pipeline.rank, pipeline.world_size, len(split.stages)))
        _materialise(model, group.device)
        held = _held(state, model)
        _fill(held, supply(held))
    if fresh:
        drawn = place.gather(torch.get_rng_state() if place.is_first else None)[0]
        with place.together(doing):
            values = initialised(_empty(config, kind, dtype), fresh, drawn)
            _fill(held, ((name, tuple(t.shape), _ranges_of(t)) for name, t in values.items()))
    _add_generation_config(model, path)
    return model.eval()  # type: ignore[no-any-return]


def _need_transformers() -> None:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"load_pretrained needs {error.name}: pip install 'tpkernels[hf]'", name=error.name
        ) from None


def _is_gguf(path: Path) -> bool:
    return path.is_file()


def _config_of(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        if _is_gguf(path):
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise CheckpointError(f"its config cannot be read: {error}") from None


def _class_of(config: Any, given: type[Any] | None) -> Any:
    """The class to build, which may be an Auto class."""
    import transformers

    if given is not None:
        return given
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    if config.architectures:
        raise CheckpointError(
            f"its class {config.architectures[0]} is not one of transformers {transformers.__version__}: "
            f"pass model_class"
        )
    return transformers.AutoModelForCausalLM


def _names_other(config: Any, model: Any) -> bool:
    """Whether the config names other classes than that of the model."""
    return bool(config.architectures) and type(model).__name__ not in config.architectures


def _dtype_of(given: torch.dtype | str | None, config: Any, files: Mapping[str, Any]) -> torch.dtype:
    """The dtype that `from_pretrained` takes."""
    wanted = getattr(config, "dtype", None) if given in (None, "auto") else given
    if wanted is not None:
        found = wanted if isinstance(wanted, torch.dtype) else getattr(torch, str(wanted), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise CheckpointError(f"dtype must be a floating dtype of torch, its name, 'auto' or None, got {wanted!r}")
        return found
    dtypes = (file.dtype(name) for name, file in files.items())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _empty(config: Any, model_class: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on meta; buffers that are computed, such as rotary tables, are there."""
    from accelerate import init_empty_weights

    build = model_class._from_config if hasattr(model_class, "_from_config") else model_class.from_config
    with init_empty_weights(include_buffers=False):
        model = build(config, dtype=dtype)
    model.tie_weights()  # parameters that are moved to meta one by one are no longer tied
    fp32 = model._get_dtype_plan(dtype)
    if fp32:
        from transformers.core_model_loading import build_glob_alternation

        kept = build_glob_alternation(list(fp32))[0]
        for name, parameter in model.named_parameters():
            if kept.search(name):
                _replace(parameter, torch.empty_like(parameter, dtype=torch.float32))
    return model


def _replace(parameter: Tensor, value: Tensor) -> None:
    """Replace the memory of a parameter. It stays the same object, so that tied parameters and marks are kept."""
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, new)  # type: ignore[no-untyped-call]


def _state(model: Any) -> dict[str, Tensor]:
    """The tensors to fill, by name; of tied ones every name."""
    mark_shards(model)
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _held(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Those of the tensors of the whole model that this rank holds, by all their names; of tied ones every name."""
    now = _state(model)
    held = {id(t) for t in now.values()}
    return {name: now.get(name, t) for name, t in state.items() if name in now or id(t) in held}


def _materialise(model: Any, device: torch.device) -> None:
    for parameter in model.parameters():
        if parameter.is_meta:
            _replace(parameter, torch.empty_like(parameter, device=device))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


Supply = Iterator[tuple[str, hf_files.Shape, hf_files.Fetch]]


def _from_folder(
    model: Any, state: dict[str, Tensor], files: Mapping[str, Any], other_class: bool, warn: bool
) -> tuple[Callable[[Mapping[str, Tensor]], Supply], list[str]]:
    """The source of each tensor, and the names of those that are initialised.

    Names and shapes are checked now, tensors are read one by one later.

    Args:
        other_class: the model is of another class than the one that was saved, and may lack and have tensors.
        warn: of these.
    """
    found = hf_files.find(model, state, dict(files))
    there = set(found.direct) | {name for names, _ in found.made for name in names}
    unexpected = sorted(set(found.unexpected) - set(hf_files.ignored(model, found.unexpected)))
    missing = _missing(model, state, there)
    heads = [name for name in missing if not _matches(name, model._keys_to_ignore_on_save or ())]  # others are computed
    if other_class and there:
        if warn and (heads or unexpected):
            hf_files.warn_of_other(type(model).__name__, heads, unexpected)
    else:
        _refuse_names(model, heads, unexpected)
    for name, (shape, _) in found.direct.items():
        _check_shape(name, shape, state)

    def supply(held: Mapping[str, Tensor]) -> Supply:
        for name, (shape, fetch) in found.direct.items():
            yield name, shape, fetch
        for names, make in found.made:
            for name, tensor in make().items() if any(name in held for name in names) else ():
                if name not in state:
                    raise CheckpointError(f"it gives {name}, which the model lacks")
                yield name, tuple(tensor.shape), _ranges_of(tensor)

    fresh = [name for name in missing if isinstance(state[name], nn.Parameter)]  # buffers are as they were built
    return supply, fresh


def _from_gguf(model: Any, state: dict[str, Tensor], path: Path, held: Mapping[str, Tensor]) -> Supply:
    there = set()
    for name, tensor in hf_gguf.tensors(path, model):
        there.add(name)
        if name in held:
            yield name, tuple(tensor.shape), _ranges_of(tensor)
    _refuse_names(model, _missing(model, state, there), sorted(there - set(state)))


def _ranges_of(tensor: Tensor) -> hf_files.Fetch:
    def fetch(*ranges: tuple[int, int, int]) -> Tensor:
        part = tensor
        for dim, start, stop in ranges:
            part = part.narrow(dim, start, stop - start)
        return part

    return fetch


def _missing(model: Any, state: dict[str, Tensor], there: set[str]) -> list[str]:
    """The tensors that have no source under any of their names, and are not computed when the model is built."""
    filled = {id(state[name]) for name in there if name in state}
    may_lack = model._keys_to_ignore_on_load_missing or ()
    return [
        name
        for name, tensor in state.items()
        if id(tensor) not in filled and not (not isinstance(tensor, nn.Parameter) and _matches(name, may_lack))
    ]


def _refuse_names(model: Any, missing: list[str], unexpected: list[str]) -> None:
    for text, names in (("lacks", missing), ("has, and the model lacks,", unexpected)):
        if names:
            raise CheckpointError(
                f"it {text} {shorten(sorted(names))}: is {type(model).__name__} the class that was saved?"
            )


def _matches(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _check_shape(name: str, shape: tuple[int, ...], state: dict[str, Tensor]) -> None:
    expected = tuple(full_shape(state[name]))
    if shape != expected:
        raise CheckpointError(f"{name} has shape {list(shape)} in it and {list(expected)} in the model")


@torch.no_grad()
def _fill(state: dict[str, Tensor], supply: Supply) -> None:
    """Copy this rank's shard of each tensor."""
    for name, shape, fetch in supply:
        if name not in state:  # of another pipeline stage
            continue
        _check_shape(name, shape, state)
        tensor = state[name]
        info = shard_info(tensor)
        if info is None:
            _copy(name, tensor, fetch())
            continue
        dim = info.dim % tensor.dim()
        for at, start, size in lay_out(info.runs_of(info.rank)):
            _copy(name, tensor.narrow(dim, at, size), fetch((dim, start, start + size)))


def _copy(name: str, into: Tensor, value: Tensor) -> None:
    if into.is_floating_point() and not value.is_floating_point():
        raise CheckpointError(
            f"{name} is {value.dtype} in it, as quantised weights are: take a folder that is not quantised"
        )
    into.copy_(value)


def _add_generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if not _is_gguf(path) and (path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)

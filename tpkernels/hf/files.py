"""The weights of a Hugging Face folder, read by slices: one safetensors file, or several with an index.

Names in files are turned into those of the model by transformers' own rules (conversion_mapping.py there). Where these
make one tensor of several (the experts of a mixture, for example), it is computed unsharded, sharded, and dropped.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tpkernels.checkpoint.export import full_shapes
from tpkernels.checkpoint.files import INDEX, SINGLE, TensorFile, damaged
from tpkernels.errors import CheckpointError, shorten

Shape = tuple[int, ...]
Fetch = Callable[..., Tensor]  # (*(dim, start, stop)) -> that range of the tensor, or all of it


@dataclass
class FoundTensors:
    """The tensors of the files, for a model.

    Attributes:
        direct: {name in the model: (shape, fetch)} of tensors that are read by slices.
        made: for each group of tensors that transformers computes together, their names and a function that computes
            them, unsharded.
        unexpected: names in the files that the model has no place for.
    """

    direct: dict[str, tuple[Shape, Fetch]] = field(default_factory=dict)
    made: list[tuple[list[str], Callable[[], dict[str, Tensor]]]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def refuse_quantised(folder: Path, config: Any) -> None:
    """Raise CheckpointError when the weights of a folder are packed, which no rank can cut.

    Args:
        folder: its config.json is checked, too, because `config` may be another.
    """
    quantisation = getattr(config, "quantization_config", None)
    if (file := folder / "config.json").is_file():
        try:
            quantisation = quantisation or json.loads(file.read_text()).get("quantization_config")
        except (ValueError, AttributeError) as error:
            raise damaged(file, str(error)) from None
    if quantisation:
        fields = quantisation if isinstance(quantisation, dict) else vars(quantisation)
        method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method") or "of an unknown method"))
        raise CheckpointError(
            f"its weights are quantised ({method}; quantization_config of its config), and packed weights cannot be "
            f"cut: take the folder of the model before it was quantised, or save a dequantised one"
        )


def warn_of_other(kind: str, missing: list[str], unexpected: list[str]) -> None:
    """Warn that a model of another class than the saved one was loaded.

    Args:
        kind: the class of the model.
        missing: its tensors that the files lack, and that are initialised.
        unexpected: tensors of the files that it lacks.
    """
    texts = []
    if missing:
        texts.append(
            f"{shorten(sorted(missing))} of {kind} are not in it and are newly initialised: train them before you use "
            f"them"
        )
    if unexpected:
        texts.append(f"{shorten(sorted(unexpected))} of it are not in {kind} and are not used")
    warnings.warn(f"load_pretrained: the class that was saved is another: {'; '.join(texts)}", stacklevel=5)


def open_folder(folder: Path, variant: str | None = None) -> dict[str, TensorFile]:
    """The files of a folder, by the names of the tensors that they hold.

    Args:
        variant: which files, model.<variant>.safetensors; None takes model.safetensors.

    Raises:
        CheckpointError: there are no safetensors files, one of the index is missing or lacks a tensor, or is damaged.
    """
    single, index_name = SINGLE, INDEX
    if variant is not None:
        single, index_name = f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"
    if (index := folder / index_name).exists():
        try:
            where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(index, str(error)) from None
        if bad := [name for name in where.values() if Path(name).name != name]:
            raise damaged(index, f"it names {bad[0]}, which is no file of the folder")
        files = {name: TensorFile(folder / name) for name in sorted(set(where.values()))}
        for name, file in files.items():
            listed = {tensor for tensor, place in where.items() if place == name}
            if differ := sorted(listed ^ set(file.names)):
                raise damaged(file.path, f"its tensors are not those of the index: {', '.join(differ[:3])}")
        return {tensor: files[name] for tensor, name in where.items()}
    if (folder / single).exists():
        file = TensorFile(folder / single)
        return dict.fromkeys(file.names, file)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = ""
    if others:
        hint = f" (it has {shorten(sorted(others))}: pass variant=... where that is model.<variant>.safetensors)"
    elif pickles:
        hint = (
            f" (it has {pickles[0]}, a pickle, which is not opened: convert it to safetensors, for example by "
            f"from_pretrained and save_pretrained of transformers)"
        )
    raise CheckpointError(f"{folder} has neither {single} nor {index_name}{hint}")


def find(model: Any, state: dict[str, Tensor], files: dict[str, TensorFile]) -> FoundTensors:
    """Find the tensors of the files from which each tensor of the model is made. Nothing is read yet.

    Args:
        model: a transformers model; the rules by which its weights are renamed are stored in it, so that
            `save_pretrained` can revert them.
        state: its state dict.
        files: from `open_folder`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    found = FoundTensors()
    groups: dict[str, Any] = {}
    for name in sorted(files, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            found.unexpected.append(name)
        elif pattern is None:
            found.direct[renamed] = (files[name].shape(name), _fetch(files[name], name))
        else:
            group = groups.setdefault(renamed, deepcopy(of_pattern[pattern]))
            group.add_tensor(renamed, name, pattern, _fetch(files[name], name))
    for first, group in groups.items():
        found.made.append((_names_made(group, first), _maker(group, first, model)))
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    return found


def _fetch(file: TensorFile, name: str) -> Fetch:
    return lambda *ranges: file.read(name, *ranges)


def _names_made(converter: Any, first: str) -> list[str]:
    """The names of the tensors that a converter computes; `first` is one of them, which matches one of its patterns."""
    pattern = next(p for p in converter.target_patterns if p in first)
    return [first.replace(pattern, other, 1) for other in converter.target_patterns]


def _maker(converter: Any, first: str, model: Any) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        try:
            with full_shapes(model):
                made = converter.convert(first, model=model, config=model.config)
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{', '.join(_names_made(converter, first))} cannot be made of {converter.source_patterns} ({error}): "
                f"are they all there?"
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return make


def ignored(model: Any, names: list[str]) -> Iterator[str]:
    """Those of the names that transformers ignores for this model.

    Args:
        names: of tensors in files that the model lacks.
    """
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    patterns |= {rf"{name}$" for name in ("rotary_emb.inv_freq", "position_ids") if any(map(_ends(name), buffers))}
    for name in names:
        if any(re.search(pattern, name) for pattern in patterns):
            yield name


def _ends(name: str) -> Callable[[str], bool]:
    return lambda buffer: buffer.endswith(name)

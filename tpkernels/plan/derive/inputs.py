"""Sample inputs for a run of an unknown model: small, and the same on all ranks."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

BATCH, TOKENS = 2, 6
# What models whose arguments all have a default call texts and images.
TEXTS, IMAGES = ("text", "texts", "input_ids", "ids", "tokens"), ("image", "images", "img", "pixel_values")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def check_inputs(inputs: object) -> None:
    """Raise ValueError unless inputs are None or (args, kwargs)."""
    fits = isinstance(inputs, (tuple, list)) and len(inputs) == 2
    if inputs is not None and not (fits and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], dict)):  # type: ignore[index]
        raise ValueError(f"inputs must be (args, kwargs), such as ((ids,), {{}}), got {type(inputs).__name__}")


def candidates(model: nn.Module) -> list[Call]:
    """Return arguments for model(*args, **kwargs), the likeliest first.

    Those of a model of transformers follow from its config and the names of its arguments; of another module the
    arguments without a default are tried as token ids, as features and as images, in the dtype of its parameters.
    """
    with torch.device("cpu"):
        known = getattr(model, "config", None) is not None and hasattr(model, "main_input_name")
        calls = [*(_of_transformers(model) if known else ()), *_of_module(model)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    found: list[Call] = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, calls)
    return found


def _of_transformers(model: nn.Module) -> Iterator[Call]:
    names = inspect.signature(model.forward).parameters
    config = model.config
    known = {name: value for name, value in _known(config).items() if name in names and value is not None}
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    required = [n for n, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = str(model.main_input_name)
    text = [n for n in ("input_ids", "decoder_input_ids", "bbox") if n in known]
    for chosen in (list(known), [main, "decoder_input_ids"], text, [main, *required]):
        if chosen and all(n in known for n in required if n in chosen):
            yield (), {**{n: known[n] for n in chosen if n in known}, **fixed}


def _known(config: Any) -> dict[str, Tensor | None]:
    text, vision, audio = (
        getattr(config, name, None) or config for name in ("text_config", "vision_config", "audio_config")
    )
    ids = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mels = getattr(audio, "num_mel_bins", None)
    frames = 2 * getattr(audio, "max_source_positions", 50)
    return {
        "input_ids": ids if getattr(text, "vocab_size", None) else None,
        "pixel_values": _image(vision),
        "input_features": torch.zeros(BATCH, mels, frames) if mels else None,
        "input_values": _sound(config),
        "decoder_input_ids": ids if getattr(config, "is_encoder_decoder", False) else None,
        "bbox": torch.zeros(BATCH, TOKENS, 4, dtype=torch.int64),
        **_patches(config),
    }


def _sound(config: Any) -> Tensor | None:
    """A wave, or the spectrogram of one where the model takes patches of it."""
    if hasattr(config, "frequency_stride"):
        return torch.zeros(BATCH, config.max_length, config.num_mel_bins)
    return torch.zeros(BATCH, 4000) if hasattr(config, "conv_kernel") else None


def _patches(config: Any) -> dict[str, Tensor]:
    """Vision towers that take patches of images of any size in one row, and the sizes of the images."""
    if not hasattr(config, "temporal_patch_size"):
        return {}
    edge = 2 * getattr(config, "spatial_merge_size", 1)
    width = getattr(config, "in_channels", 3) * config.temporal_patch_size * config.patch_size**2
    return {"hidden_states": torch.zeros(edge**2, width), "grid_thw": torch.tensor([[1, edge, edge]])}


def _image(config: Any) -> Tensor | None:
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    frames = (config.num_frames,) if hasattr(config, "tubelet_size") else ()
    return torch.zeros(BATCH, *frames, getattr(config, "num_channels", 3), height, width)


def _of_module(model: nn.Module) -> Iterator[Call]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = sum(p.default is p.empty for p in names)
    modules = list(model.modules())
    ids, images = list(_ids(model, modules)), list(_images(modules))
    if not count:  # a model of images and texts takes either
        known = {p.name: ids if p.name in TEXTS else images for p in names if p.name in (*TEXTS, *IMAGES)}
        for chosen in itertools.product(*known.values()) if known else ():
            yield (), dict(zip(known, chosen, strict=True))
        return
    for x in ids:
        yield (x,) * count, {}
    for width in dict.fromkeys(m.in_features for m in modules if isinstance(m, nn.Linear)):
        yield (torch.zeros(BATCH, TOKENS, width),) * count, {}
        yield (torch.zeros(BATCH, width),) * count, {}
    for x in images:
        yield (x,) * count, {}


def _ids(model: nn.Module, modules: list[nn.Module]) -> Iterator[Tensor]:
    """Token ids, of any length, and of the one length that some models take."""
    if any(isinstance(m, nn.Embedding) for m in modules):
        lengths = (TOKENS, getattr(model, "context_length", None))
        for length in dict.fromkeys(n for n in lengths if isinstance(n, int)):
            yield torch.ones(BATCH, length, dtype=torch.int64)


def _images(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Images of the sizes that are attributes of modules, and of usual ones."""
    stated = [size for size in (getattr(m, "image_size", None) for m in modules) if isinstance(size, (int, tuple))]
    for conv in [m for m in modules if isinstance(m, nn.Conv2d)][:1]:
        for size in dict.fromkeys([*stated, 32, 224]):
            height, width = (size, size) if isinstance(size, int) else size
            yield torch.zeros(BATCH, conv.in_channels, height, width)

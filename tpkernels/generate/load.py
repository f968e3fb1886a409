"""Loads the model that a command names, with its tokenizer, from files of this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tpkernels.comm.group import Group
from tpkernels.errors import CheckpointError, PlanError, UserError
from tpkernels.generate.find import find, require
from tpkernels.hf.load import load_pretrained

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(name: str, group: Group, dtype: str = "auto") -> tuple[Any, Any]:
    """The model, sharded over the group, and its tokenizer. Collective.

    Args:
        name: what `find` takes.
        group: the ranks to shard over; each reads its slices only.
        dtype: fp32, bf16, fp16, or auto for that of the file (of a GGUF file: fp32).

    Raises:
        UserError: there is no such model, it cannot be cut, or what loads it is not installed.
    """
    if group.world_size == 1:
        return load_whole(name, dtype)
    path, wanted = _prepare(name, dtype)
    try:
        return load_pretrained(path, group=group, dtype=wanted), _tokenizer(path)
    except (CheckpointError, PlanError) as error:
        raise UserError(f"{name}: {error}") from None


def load_whole(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """The model, not sharded, and its tokenizer.

    Args:
        name, dtype: as for `load`.

    Raises:
        UserError: there is no such model, or what loads it is not installed.
    """
    path, wanted = _prepare(name, dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model: Any
    if path.is_dir():
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(path, dtype=wanted or "auto", local_files_only=True)
    else:
        file = {"gguf_file": path.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=wanted, **file)
        _forget_packing(model)
    return model.eval(), _tokenizer(path)


def _prepare(name: str, dtype: str) -> tuple[Path, torch.dtype | None]:
    """The path and the dtype (None: that of the file), checked."""
    require("hf", "transformers", "accelerate")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path, wanted = find(name), DTYPES[dtype]
    if path.is_file():
        require("hf", "gguf")
        wanted = wanted or torch.float32
    return path, wanted


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    if path.is_dir():
        return tokenizers.from_pretrained(path, local_files_only=True)
    return tokenizers.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def _forget_packing(model: Any) -> None:
    """Remove the marks of quantisation: the weights of a GGUF file are plain tensors once they are read."""
    model.is_quantized, model.hf_quantizer = False, None
    for holder, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)


def quiet_transformers() -> None:
    """Turn off the warnings and progress bars of transformers in this process, for a command that prints its own."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()

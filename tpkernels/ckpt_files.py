"""The files of a checkpoint: written so that they are on the disk, read only when they are whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the text says which, why, and what to do."""


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(path: Path) -> str:
    """The sha-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


def read_tensors(folder: Path, name: str, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one rank's file.

    Raises:
        CheckpointError: the file is missing, or is not what was written.
    """
    path = folder / name
    try:
        digest = digest_of(path)
        if digest != manifest["files"].get(name):
            raise _damaged(
                path, f"its sha-256 is {digest[:12]}..., written was {str(manifest['files'].get(name))[:12]}..."
            )
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy it back, or load an earlier checkpoint") from None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with its own digest in it, and wait until it is on the disk."""
    path = folder / MANIFEST
    manifest = json.loads(
        json.dumps(manifest)
    )  # as it will be read: JSON turns tuples into lists and every key into text
    path.write_text(json.dumps({**manifest, "sha256": _digest_of_manifest(manifest)}, indent=1) + "\n")
    sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, without its digest.

    Raises:
        CheckpointError: it is missing, or is not what was written.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        written = manifest.pop("sha256", None)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint (it has no {MANIFEST}): name another folder") from None
    except (ValueError, AttributeError) as error:
        raise _damaged(path, str(error)) from None
    if written != _digest_of_manifest(manifest):
        raise _damaged(path, "it is not what its sha-256 says")
    return manifest


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({why}): copy it back, or load an earlier checkpoint")

"""The files of a checkpoint: written and synced to the disk, read after a check of their digests.

Tensors are safetensors files: a JSON header of names, dtypes, shapes and offsets, then the bytes. They are written here
one tensor after the other, so that a writer needs no more memory than for one tensor, and read by slices through the
safetensors package, which checks that no two tensors overlap and that the header fits the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpkernels.errors import CheckpointError

MANIFEST = "manifest.json"
CHUNK = 1 << 24
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the weights of a Hugging Face folder
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; some file systems (FUSE, SMB) do not support it."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def digest_of(path: Path) -> str:
    """The sha-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor as a file holds them; a contiguous tensor on the CPU is not copied."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class TensorWriter:
    """A safetensors file that is written one tensor after the other.

    Args:
        layout: dtype and shape of every tensor, by name.
        metadata: texts for the header.

    Attributes:
        names: the order in which `add` expects the tensors: wide dtypes first, because readers want each aligned.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.layout = path, layout
        self.names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
        self._left = iter(self.names)
        header = _header(self.names, layout, metadata)
        self._hash = hashlib.sha256()
        self.size = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(memoryview(header))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Args:
            name: the next one of `names`.
            tensor: of the dtype and shape in the layout.

        Raises:
            ValueError: it is another tensor.
            OSError: the disk is full.
        """
        expected = next(self._left, None)
        dtype, shape = self.layout[name]
        if expected != name or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"TensorWriter.add: expected {expected}, {dtype} {list(shape)}, "
                f"got {name}, {tensor.dtype} {list(tensor.shape)}"
            )
        self._write(bytes_of(tensor))

    def finish(self) -> str:
        """Wait until the file is on the disk; its sha-256.

        Raises:
            OSError: the disk did not take all of it.
        """
        if (left := next(self._left, None)) is not None:
            raise ValueError(f"TensorWriter.finish: expected all tensors, got none for {left}")
        os.fsync(self._file)
        if (there := os.fstat(self._file).st_size) != self.size:
            raise OSError(f"{self.path} has {there} bytes on the disk and {self.size} were written")
        return self._hash.hexdigest()

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._hash.update(chunk)
            self.size += len(chunk)
            while chunk:  # a write may take less than it was given
                chunk = chunk[os.write(self._file, chunk) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Check that a file can hold each of the tensors; the values are not read.

    Raises:
        CheckpointError: one has no values of its own in plain memory, or no dtype of safetensors; named.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} of the model's state is {type(tensor).__name__}, not a tensor")
        if (why := _not_plain(tensor)) is not None:
            raise CheckpointError(f"{name} {why}")


def _not_plain(tensor: Tensor) -> str | None:
    kind = type(tensor).__name__
    if torch.nn.parameter.is_lazy(tensor):
        return f"is a {kind}: run the model once, so that it has a shape"
    if any(getattr(tensor, field, None) is not None for field in ("quant_state", "SCB")):
        return f"is quantised ({kind}), and its scales are not in the tensor: dequantise it first"
    if type(tensor.data) is not Tensor:
        return f"is a {kind}, which safetensors files cannot hold: make a plain tensor of it first"
    if tensor.is_meta:
        return "is on the meta device and has no values: load or initialise the model first"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}, which safetensors files cannot hold: make it dense first (to_dense())"
    if tensor.dtype not in DTYPES:
        return f"is {tensor.dtype}, which safetensors files cannot hold: convert it first"
    return None


def _header(names: list[str], layout: Layout, metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and wait until it is on the disk; its sha-256."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(path, layout, metadata) as writer:
        for name in writer.names:
            writer.add(name, tensors[name])
        return writer.finish()


def check_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Read a file through and compare its digest with that of the manifest.

    Raises:
        CheckpointError: the file is missing, or has another digest.
    """
    path, written = folder / name, str(manifest["files"][name])
    try:
        digest = digest_of(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy it back, or load an earlier checkpoint") from None
    if digest != written:
        raise damaged(path, f"its sha-256 is {digest[:12]}..., written was {written[:12]}...")


def check_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the folder holds the files of the manifest and nothing else.

    Raises:
        CheckpointError: a file is missing, or the save did not write it.
    """
    there, written = {path.name for path in folder.iterdir()}, {MANIFEST, *manifest["files"]}
    for name in sorted(written - there):
        raise CheckpointError(f"{folder / name} is missing: copy it back, or load an earlier checkpoint")
    for name in sorted(there - written):
        raise CheckpointError(f"{folder / name} does not belong to the checkpoint: move it away")


class TensorFile:
    """A safetensors file, read by slices. Nothing of it stays in memory.

    Raises:
        CheckpointError: its header does not fit the file, tensors overlap, or a name is not in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: copy it back, or load an earlier checkpoint") from None
        except SafetensorError as error:
            raise damaged(path, str(error)) from None
        self.names: list[str] = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the file."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the file.

        Raises:
            CheckpointError: it is none that torch has.
        """
        code = self._slice(name).get_dtype()
        dtype = next((dtype for dtype, known in DTYPES.items() if known == code), None)
        if dtype is None:
            raise CheckpointError(f"{self.path} holds {name} as {code}, which this tpkernels does not read")
        return dtype

    def read(self, name: str, *ranges: tuple[int, int, int]) -> Tensor:
        """A tensor, or only its ranges, each (dim, start, stop); its memory is the file, so copy what is kept."""
        if not ranges:
            tensor: Tensor = self._file.get_tensor(name)
            return tensor
        index = [slice(None)] * len(self.shape(name))
        for dim, start, stop in ranges:
            index[dim] = slice(start, stop)
        part: Tensor = self._slice(name)[tuple(index)]
        return part

    def _slice(self, name: str) -> Any:
        try:
            return self._file.get_slice(name)
        except SafetensorError:
            raise damaged(self.path, f"it has no tensor {name}") from None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with its own digest in it, and wait until it is on the disk."""
    path = folder / MANIFEST
    # As it will be read: JSON turns tuples into lists and every key into text.
    manifest = json.loads(json.dumps(manifest))
    path.write_text(json.dumps({**manifest, "sha256": _digest_of_manifest(manifest)}, indent=1) + "\n")
    sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, without its digest.

    Raises:
        CheckpointError: it is missing, or has another digest than it holds.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(), object_pairs_hook=_unique)
        written = manifest.pop("sha256", None)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint (it has no {MANIFEST}): name another folder") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    if written != _digest_of_manifest(manifest):
        raise damaged(path, "its sha-256 is another one")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, why: str) -> CheckpointError:
    """The error of a file that holds other bytes than were written."""
    return CheckpointError(f"{path} is damaged ({why}): copy it back, or load an earlier checkpoint")

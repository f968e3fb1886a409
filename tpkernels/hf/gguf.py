"""The weights of a GGUF file, for the families that transformers reads: one tensor dequantised at a time.

The tables of transformers give the names, and the order of values where that of llama.cpp differs. A rank holds one
dequantised tensor at a time, except for mixtures, whose experts transformers concatenates.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpkernels.errors import CheckpointError


def tensors(path: Path, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the model, unsharded fp32 tensor) for each tensor of the file that the model has.

    Args:
        model: of the file's config; on meta is enough.

    Raises:
        CheckpointError: the file cannot be read, or is of a family that transformers does not read.
    """
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, read_field

    try:
        reader = GGUFReader(path)
        family = read_field(reader, "general.architecture")[0]  # type: ignore[no-untyped-call]
        processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=model.config.to_dict())  # type: ignore[no-untyped-call]
        names = _names(model, processor)
    except (ValueError, LookupError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from None
    together: dict[str, Tensor] = {}  # tensors that the processor computes from several of the file
    for tensor in reader.tensors:
        done = processor.process(  # type: ignore[no-untyped-call]
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": together},
        )
        if done.name in names:
            yield names[done.name], torch.from_numpy(done.weights.copy())
    yield from together.items()


def _names(model: Any, processor: Any) -> dict[str, str]:
    """{name in the file: name in the model}.

    transformers builds a table for every inner module, too (some files name tensors from an inner one on), which
    takes seconds; that of the outermost alone is used where it has all names.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    wanted = set(model.state_dict()) - set(model.all_tied_weights_keys)
    names: dict[str, str] = get_gguf_hf_weights_map(_Outermost(model), processor)
    return names if wanted <= set(names.values()) else get_gguf_hf_weights_map(model, processor)


class _Outermost:
    """A model without inner modules."""

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[Any]:
        return []

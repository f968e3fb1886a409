"""Save and load a model that is cut over ranks; a crash at any moment leaves the last good checkpoint.

A checkpoint is a folder:

    step-00000100/
        rank-0-of-2.safetensors     of rank 0: parameters, buffers, optimizer state, random numbers
        rank-1-of-2.safetensors
        manifest.json               sha-256 of each file; how each tensor is cut; step; optimizer's options; extra

Written into a hidden folder beside it, synced to disk, then renamed: a folder with the final name is complete. There
is no pickle anywhere. An error of one rank is raised on all ranks. Loading checks the digests first. Jobs that save
into the same parent folder do not disturb each other.

The manifest has for each tensor the unsharded shape and the part that each rank holds, so that any number of ranks, cut
in any way, reads slices of these same files: `load` reads them directly, `reshard` writes new files.

Modules: api (the calls), ranks (the file of each rank), files (bytes), staging (hidden folders), regions (how a tensor
is cut), snapshot (the tensors that are saved), manifest and schema,
restore, residuals and replicas (state of each replica), background (save_async), resharding; export writes a plain
Hugging Face folder.
"""

from __future__ import annotations

from tpkernels.checkpoint.api import SaveHandle, latest, load, peek, prune, save, save_async
from tpkernels.checkpoint.export import export_hf
from tpkernels.checkpoint.resharding import reshard
from tpkernels.checkpoint.restore import Loaded
from tpkernels.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "Loaded",
    "SaveHandle",
    "export_hf",
    "latest",
    "load",
    "peek",
    "prune",
    "reshard",
    "save",
    "save_async",
]

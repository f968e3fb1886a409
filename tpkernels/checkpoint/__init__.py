"""Save and load a model that is cut over ranks, so that a crash at any moment leaves the last good checkpoint.

A checkpoint is a folder:

    step-00000100/
        rank-0-of-2.safetensors     what rank 0 holds: parameters, buffers, optimizer state, random numbers
        rank-1-of-2.safetensors
        manifest.json               sha-256 of each file; how each tensor is cut; step; optimizer's options; extra

Written into a hidden folder beside it, synced to disk, then renamed: a folder with the final name is complete. There
is no pickle anywhere. A rank that fails, in whichever way, makes the call fail on all ranks. Loading checks the digests
first. Jobs that save into the same parent folder do not disturb each other.

The manifest says for each tensor the unsharded shape and what each rank holds of it, so that any number of ranks, cut
in any way, is served by slices of these same files: `load` takes them directly, `reshard` writes them anew.

Modules: files (bytes), staging (hidden folders), regions (how a tensor is cut), snapshot (what is saved), manifest,
restore, background (save_async), resharding; export writes a plain Hugging Face folder.
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

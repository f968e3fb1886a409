from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import Backend as _Backend
from torch._C._distributed_c10d import Store

from tpkernels._C import Communicator

torch_version: tuple[int, int]

class Backend(_Backend):
    @property
    def options(self) -> _Backend.Options: ...
    def set_codec(self, name: str) -> str: ...

def open_backend(
    communicator: Communicator, store: Store, is_crowded: bool, make_gloo: Callable[[], Any], split: Callable[..., Any]
) -> Backend: ...

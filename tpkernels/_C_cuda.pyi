from typing import Any

from tpkernels._C import Communicator as _Communicator

class Communicator(_Communicator):
    @property
    def device(self) -> int: ...
    def force(self, path: str = "", blocks: int = 0, parts: int = 0, grid: int = 0) -> None: ...
    def share_device(self, ranks: int) -> None: ...

def open_peer(
    name: str,
    label: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    device: int,
    arenas: list[int],
    multicast: int,
    arena_bytes: int,
    keeps: Any,
) -> Communicator: ...
def open_group(
    name: str, label: str, rank: int, world_size: int, timeout_s: float, device: int, exchange: Any
) -> Communicator: ...
def open_local(name: str, label: str, device: int) -> Communicator: ...
def set_error_types(mismatch: type[BaseException], lost: type[BaseException]) -> None: ...
def limits() -> dict[str, int]: ...
def explain(
    communicator: Communicator,
    op: str,
    dtype: str,
    codec: str,
    M: int,
    N: int,
    K: int,
    numel: int,
    dim: int,
) -> tuple[str, str, str]: ...

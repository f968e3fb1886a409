"""TCP connections between the ranks of a CPU group, for the exchanges of transport `group`.

A collective of gloo wakes three or four threads on every rank: 0.3 ms of a core for an exchange of a kilobyte, which a
connection of one's own does in 0.01 (two ranks of one core, link of 10 Gbit). IPv4 only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import resource
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpkernels.comm.bootstrap import Bootstrap
from tpkernels.comm.devices import backend_of

_DEADLINE_S = 10.0  # until all connections are open
_LOOK_S = 0.2  # between two checks whether another rank has given up
_HELLO_S = 1.0  # from the connection to the rank number that identifies it
_TOKEN_BYTES = 16
_SIOCGIFADDR = 0x8915  # of Linux: the address of an interface


@dataclass(frozen=True)
class _Offer:
    """The address at which a rank listens and the token that its peers must send; or why it cannot listen."""

    address: tuple[str, int] = ("", 0)
    token: bytes = b""
    obstacle: str | None = None


def measured_link(communicator: Any, hosts: int, slices: int = 1) -> tuple[float, float]:
    """Time sums and empty calls over the connections of a group that opens; all ranks call this.

    Args:
        communicator: of the group.
        hosts: how many ranks are connected with each other.
        slices: how many such ranks share what is sent; more than one over transport hierarchical.

    Returns:
        bytes a second that a rank sends, and receives as many, and the seconds of an empty call: the slowest rank's,
        the same on all ranks. They decide in how many chunks GEMMs are sent, and which sums are one exchange; neither
        changes a bit.
    """
    name, world_size = communicator.name, communicator.world_size
    # A rank that comes a hop later than the others finds their messages there and lets them wait for two hops: of two
    # calls behind one another each has its hop. The first call may wait for a rank that has just opened.
    ends = []
    for _ in range(5):
        communicator.exchange(0)
        ends.append(time.perf_counter_ns())
    hop = max(communicator.exchange(min(ends[2] - ends[0], ends[4] - ends[2]) // 2))
    communicator.set_link(1e12, 1e-12)  # so that a sum goes three ways over the link: openings, values and sums
    rate, spent = 0.0, 0
    # 64 KiB, which buffers on the way may swallow, then 1 MiB where that takes less than half a second. The first of
    # three is not counted: a shaper lets a burst pass that it has saved up (1 Gbit looked like 1.8). The faster of the
    # others is the link's own; the other may have waited for a core that something else had.
    for nbytes in (1 << 16, 1 << 20):
        if spent > 300e6 or (rate > 0 and nbytes / rate > 0.5):
            break
        x, best = torch.zeros(nbytes // 4, dtype=torch.float32, device="cpu"), 0.0
        for i in range(3):
            started = time.perf_counter_ns()
            torch.ops.tpkernels.all_reduce_(x, name, world_size, "sum", "none")
            done = time.perf_counter_ns()
            nanoseconds = max(communicator.exchange(done - started))
            if i > 0:
                moving = max(nanoseconds - 3 * hop, nanoseconds / 20)
                best = max(best, 2e9 * nbytes * (hosts - 1) / hosts / slices / moving)
            spent += nanoseconds
        rate = best
    return rate, hop / 1e9


def connect(
    process_group: dist.ProcessGroup, bootstrap: Bootstrap, peers: Sequence[int]
) -> tuple[list[int], str | None]:
    """Connect ranks with each other; all ranks of the bootstrap call this.

    Args:
        process_group, bootstrap: of the ranks.
        peers: the ranks that are connected with each other and with this one, itself included, the same on all of
            them; none: this rank is connected with no other.

    Returns:
        file descriptors in the order of peers (-1 for this rank), which are the caller's, and None; or, on all ranks,
        none and the obstacle of the first rank that has one.
    """
    with contextlib.ExitStack() as opened:
        offer = _Offer(obstacle=_obstacle(process_group))
        if offer.obstacle is None:
            try:
                _check_room(len(peers))
                listener = opened.enter_context(_listen())
                offer = _Offer(listener.getsockname()[:2], secrets.token_bytes(_TOKEN_BYTES))
            except OSError as error:
                offer = _Offer(obstacle=f"it cannot listen: {error}")
        offers: list[_Offer] = bootstrap.gather(offer)
        for r, other in enumerate(offers):
            if other.obstacle is not None:
                return [], f"rank {r} has no connections: {other.obstacle}"
        found: dict[int, socket.socket] = {}
        problem = None
        try:
            _connect_all(bootstrap, peers, offers, listener, found)
        except OSError as error:
            problem = f"rank {bootstrap.rank} has not reached all others: {error}"
            bootstrap.post_obstacle(problem)
            for connection in (listener, *found.values()):  # so that no rank waits for an answer on them
                connection.close()
            found.clear()
        for connection in found.values():
            opened.enter_context(connection)
        if (problem := bootstrap.first_obstacle(problem, longer_s=_DEADLINE_S)) is not None:
            return [], problem
        return [found[r].detach() if r in found else -1 for r in peers], None


def _obstacle(process_group: dist.ProcessGroup) -> str | None:
    backend, wanted = backend_of(process_group, "cpu"), os.environ.get("GLOO_DEVICE_TRANSPORT", "TCP")
    if backend not in ("gloo", "tpk"):
        return f"tensors on the cpu go through {backend}"
    if wanted != "TCP":  # such as TLS: sockets of our own would bypass it
        return f"GLOO_DEVICE_TRANSPORT is {wanted}"
    return None


def _listen() -> socket.socket:
    address = _address()
    family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address, 0), family=family, backlog=1024)


def _address() -> str:
    """This rank's address, reachable by the others: that of gloo's interface, or of the route to rank 0's host."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        if interface:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)[20:24])
        with contextlib.suppress(OSError):
            asking.connect((os.environ.get("MASTER_ADDR") or socket.gethostname(), 9))  # sends nothing
            return str(asking.getsockname()[0])
    return "127.0.0.1"


def _check_room(num_ranks: int) -> None:
    """Raise OSError unless this process may open as many files as connections need: the others would wait in vain."""
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(num_ranks + 1):
                opened.callback(os.close, os.eventfd(0))
        except OSError as error:
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise OSError(
                error.errno,
                f"{error.strerror}: connections of {num_ranks} ranks need {num_ranks + 1} more than this process has "
                f"open, of at most {most}; raise that (ulimit -n)",
            ) from None


def _connect_all(
    bootstrap: Bootstrap,
    peers: Sequence[int],
    offers: list[_Offer],
    listener: socket.socket,
    found: dict[int, socket.socket],
) -> None:
    """Connect to all lower peers, accept all higher ones; both sides send a token from the group's store."""
    deadline = time.monotonic() + _DEADLINE_S
    rank = bootstrap.rank
    mine = offers[rank].token
    for r in (peer for peer in peers if peer < rank):
        found[r] = connection = socket.create_connection(offers[r].address, _left(deadline))
        connection.sendall(offers[r].token + struct.pack("!I", rank))
        connection.settimeout(_left(deadline))
        if not hmac.compare_digest(_receive(connection, _TOKEN_BYTES), mine):
            raise OSError(f"another program answers at the address of rank {r}")
        _prepare(connection)
    while len(found) < len(peers) - 1:
        listener.settimeout(min(_left(deadline), _LOOK_S))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if (problem := bootstrap.posted_obstacle()) is not None:
                raise OSError(f"another has given up: {problem}") from None
            continue
        connection.settimeout(_HELLO_S)
        try:
            hello = _receive(connection, _TOKEN_BYTES + 4)
        except OSError:
            connection.close()
            continue
        r = struct.unpack("!I", hello[_TOKEN_BYTES:])[0]
        if not hmac.compare_digest(hello[:_TOKEN_BYTES], mine) or r <= rank or r not in peers or r in found:
            connection.close()
            continue
        connection.sendall(offers[r].token)
        _prepare(connection)
        found[r] = connection


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not within {_DEADLINE_S:g} s")
    return left


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionError("connection closed")
        data += more
    return data


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

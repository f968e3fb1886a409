"""Links of a known bandwidth between "hosts" of this machine: network namespaces, veth pairs, token buckets.

    host 0 (namespace) -- v0 10.77.0.1 ==== v1 10.77.0.2 -- host 1 (namespace)      each end sends at `rate` at most

More hosts than two are joined by a bridge, and those that a link delays by a process that holds packets back
(bench/study/delay.py). A host may have a /dev/shm of its own (a mount namespace), so that its ranks share memory with
each other alone.

TCP sends as Linux does by default (cubic), whatever the machine is set to. BBR measures the bandwidth and takes that of
a burst, which a bucket lets pass, for the link's: of 300 calls of 95 ms over 1gbit 34 took 40 to 190 ms longer with it,
8 of 630 with cubic.

Needs root and the programs `ip` and `tc`. Names contain the process id; the namespaces of a killed process are
removed by the next one. Where namespaces cannot be made, the loopback of the machine takes their place.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "tpkstudy"
PLACES = ("/usr/sbin", "/sbin")  # where tc and ip lie when PATH does not say
# Bits per second of the links of the study. A token bucket must hold the bytes of a tick of the kernel's timer.
RATES = {"100mbit": 100e6, "1gbit": 1e9, "10gbit": 10e9}
LOOPBACK = "loopback"
CONGESTION = "cubic"
CONGESTIONS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
IPV6 = Path("/proc/sys/net/ipv6")  # there where the kernel has it
LEAST_BURST, TICK_S = 64 << 10, 0.004
NETWORK, MOUNTS, FILES = 0x40000000, 0x00020000, 0x00000200  # CLONE_NEWNET, CLONE_NEWNS, CLONE_FS
OWN_MEMORY = "mount -t tmpfs tmpfs /dev/shm && echo made && exec cat"  # until its input ends
MTU_DELAYED = 60_000  # so that few packets pass through the process that delays them


@dataclass(frozen=True)
class Host:
    """Where a rank runs: what to put before its command, the name of its network interface, and its address."""

    command: tuple[str, ...] = ()
    interface: str = "lo"
    address: str = "127.0.0.1"
    namespace: str | None = None  # of the network; None: that of the machine
    memory: str | None = None  # the file of a mount namespace with another /dev/shm; None: that of the machine

    def enter(self) -> None:
        """Move this thread into the namespaces, and gloo, which this process starts later, to the interface.

        Raises:
            OSError: there is no such namespace, or it may not be entered.
        """
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        if self.memory is not None:
            enter(self.memory, MOUNTS)
        if self.namespace is not None:
            enter(f"/run/netns/{self.namespace}", NETWORK)

    def sent_bytes(self) -> int:
        """Bytes that have left through the interface, headers of the network included."""
        path = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(run(*self.command, "cat", path))


@dataclass(frozen=True)
class Link:
    """Hosts and the link between them."""

    name: str
    hosts: tuple[Host, ...] = field(default_factory=lambda: (Host(), Host()))


def enter(path: str, kind: int) -> None:
    """Move this thread into a namespace.

    Raises:
        OSError: there is no such namespace, or it may not be entered.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as namespace:
        if (kind == MOUNTS and libc.unshare(FILES)) or libc.setns(namespace.fileno(), kind):
            raise OSError(ctypes.get_errno(), f"setns to {path}: {os.strerror(ctypes.get_errno())}")


def run(*command: str) -> str:
    """The output of a program that must end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def program(name: str) -> str:
    """Its path, also where PATH does not reach."""
    found = shutil.which(name) or next((f"{p}/{name}" for p in PLACES if os.access(f"{p}/{name}", os.X_OK)), None)
    if found is None:
        raise OSError(f"there is no program {name} (package iproute2)")
    return found


def parsed(name: str) -> tuple[float, int]:
    """Bits per second and milliseconds of delay, one way, of a link called 1gbit, 300mbit, 1gbit+20ms, ...

    Raises:
        ValueError: another kind of name.
    """
    found = re.fullmatch(r"([1-9]\d*)(mbit|gbit)(?:\+([1-9]\d*)ms)?", name)
    if found is None:
        raise ValueError(f"a link is called like 1gbit, 300mbit or 1gbit+20ms, got {name!r}")
    return int(found[1]) * {"mbit": 1e6, "gbit": 1e9}[found[2]], int(found[3] or 0)


def obstacle() -> str | None:
    """Why no shaped link can be made on this machine; None when it can."""
    try:
        with shaped("1gbit"):
            return None
    except OSError as error:
        return str(error)


def burst_of(rate: float) -> int:
    """The bytes of a token bucket of so many bits per second."""
    return max(LEAST_BURST, int(rate / 8 * TICK_S))


@contextlib.contextmanager
def opened(name: str, hosts: int = 2, own_memory: bool = False) -> Iterator[Link]:
    """The link of that name: a rate, or the loopback. Arguments as of `shaped`."""
    if name == LOOPBACK:
        yield Link(name)
    else:
        with shaped(name, hosts, own_memory) as link:
            yield link


@contextlib.contextmanager
def shaped(name: str, hosts: int = 2, own_memory: bool = False) -> Iterator[Link]:
    """Namespaces joined at the rate that the name says; gone afterwards, whatever happens in between.

    Args:
        name: of the link, see `parsed`.
        hosts: how many; with a delay, two.
        own_memory: each has a /dev/shm of its own.

    Raises:
        OSError: namespaces, interfaces or token buckets cannot be made here; says which command failed and why.
        ValueError: as `parsed`.
    """
    (rate, delay_ms), ip, tc = parsed(name), program("ip"), program("tc")
    remove_left_behind(ip)
    names = [f"{PREFIX}-{os.getpid()}-{side}" for side in range(hosts)]
    middle = f"{PREFIX}-{os.getpid()}-9"  # of more than two
    burst = max(burst_of(rate), 2 * MTU_DELAYED if delay_ms else 0)

    def limit(namespace: str, end: str) -> None:
        bucket = ("rate", f"{rate:.0f}bit", "burst", f"{burst}b", "latency", "50ms")
        run(ip, "netns", "exec", namespace, tc, "qdisc", "add", "dev", end, "root", "tbf", *bucket)

    with contextlib.ExitStack() as made:
        made.callback(remove, ip, [*names, middle])
        for namespace in names:
            run(ip, "netns", "add", namespace)
        if delay_ms:
            made.enter_context(delayed(ip, names, delay_ms))
        elif hosts == 2:
            run(ip, "link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        else:
            join_by_bridge(ip, names, middle, limit)
        found = []
        for side, namespace in enumerate(names):
            end, address = f"v{side}", f"10.77.0.{1 + side}"
            run(ip, "-n", namespace, "addr", "add", f"{address}/24", "dev", end)
            if IPV6.exists():  # it would look for neighbours and routers at times of its own, which sent_bytes counts
                run(ip, "-n", namespace, "link", "set", end, "addrgenmode", "none")
            for interface in ("lo", end):
                run(ip, "-n", namespace, "link", "set", interface, "up")
            if CONGESTION in CONGESTIONS.read_text().split():
                way = ("10.77.0.0/24", "dev", end, "src", address, "congctl", CONGESTION)
                run(ip, "-n", namespace, "route", "replace", *way)
            limit(namespace, end)
            memory = made.enter_context(memory_of_its_own()) if own_memory else None
            found.append(Host((ip, "netns", "exec", namespace), end, address, namespace, memory))
        yield Link(name, tuple(found))


def join_by_bridge(ip: str, names: Sequence[str], middle: str, limit: Callable[[str, str], None]) -> None:
    """Connect v<i> of each namespace with one bridge, which sends to each at the rate of the link."""
    run(ip, "netns", "add", middle)
    run(ip, "-n", middle, "link", "add", "bridge", "type", "bridge")
    for side, namespace in enumerate(names):
        ends = ("name", f"v{side}", "netns", namespace)
        run(ip, "link", "add", f"s{side}", "netns", middle, "type", "veth", "peer", *ends)
        run(ip, "-n", middle, "link", "set", f"s{side}", "master", "bridge")
        run(ip, "-n", middle, "link", "set", f"s{side}", "up")
        limit(middle, f"s{side}")
    run(ip, "-n", middle, "link", "set", "bridge", "up")


@contextlib.contextmanager
def delayed(ip: str, names: Sequence[str], delay_ms: int) -> Iterator[None]:
    """Interfaces v0 and v1 of two namespaces, whose packets a process passes on after a while."""
    for side, namespace in enumerate(names):
        run(ip, "-n", namespace, "tuntap", "add", f"v{side}", "mode", "tun")
        run(ip, "-n", namespace, "link", "set", f"v{side}", "mtu", str(MTU_DELAYED))
    command = [sys.executable, str(Path(__file__).with_name("delay.py")), *names, str(delay_ms)]
    with lasting(command):
        yield


@contextlib.contextmanager
def memory_of_its_own() -> Iterator[str]:
    """The file of a mount namespace with an empty /dev/shm."""
    with lasting([program("unshare"), "--mount", "sh", "-c", OWN_MEMORY]) as process:
        yield f"/proc/{process.pid}/ns/mnt"


@contextlib.contextmanager
def lasting(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that prints a line when it is ready and ends with its input, which ends with this process."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise OSError(f"{' '.join(command)} failed")
            yield process
        finally:
            process.kill()


def remove(ip: str, namespaces: Sequence[str]) -> None:
    """Delete namespaces with their interfaces; those that were never made are no error."""
    for namespace in namespaces:
        subprocess.run([ip, "netns", "del", namespace], capture_output=True, timeout=30, check=False)


def remove_left_behind(ip: str) -> None:
    """Delete the namespaces of studies whose process is gone."""
    for line in run(ip, "netns", "list").splitlines():
        found = re.match(rf"{PREFIX}-(\d+)-\d", line)
        if found and not Path(f"/proc/{found[1]}").exists():
            remove(ip, [found[0]])

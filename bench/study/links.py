"""Links of a known bandwidth between two "hosts" of this machine: network namespaces, a veth pair, a token bucket.

    host 0 (namespace) -- v0 10.77.0.1 ==== v1 10.77.0.2 -- host 1 (namespace)      each end sends at `rate` at most

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "tpkstudy"
PLACES = ("/usr/sbin", "/sbin")  # where tc and ip lie when PATH does not say
# Bits per second of the links of the study. A token bucket must hold the bytes of a tick of the kernel's timer.
RATES = {"100mbit": 100e6, "1gbit": 1e9, "10gbit": 10e9}
LOOPBACK = "loopback"
IPV6 = Path("/proc/sys/net/ipv6")  # there where the kernel has it
LEAST_BURST, TICK_S = 64 << 10, 0.004
NETWORK = 0x40000000  # CLONE_NEWNET, for setns


@dataclass(frozen=True)
class Host:
    """Where a rank runs: what to put before its command, the name of its network interface, and its address."""

    command: tuple[str, ...] = ()
    interface: str = "lo"
    address: str = "127.0.0.1"
    namespace: str | None = None  # of the network; None: that of the machine

    def enter(self) -> None:
        """Move this thread into the namespace, and gloo, which this process starts later, to the interface.

        Raises:
            OSError: there is no such namespace, or it may not be entered.
        """
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        if self.namespace is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}", "rb") as namespace:
            if libc.setns(namespace.fileno(), NETWORK):
                raise OSError(ctypes.get_errno(), f"setns to {self.namespace}: {os.strerror(ctypes.get_errno())}")

    def sent_bytes(self) -> int:
        """Bytes that have left through the interface, headers of the network included."""
        path = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(run(*self.command, "cat", path))


@dataclass(frozen=True)
class Link:
    """Two hosts and the link between them."""

    name: str
    hosts: tuple[Host, Host] = field(default_factory=lambda: (Host(), Host()))


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


def rate_of(name: str) -> float:
    """Bits per second of a link called 1gbit, 300mbit, ...

    Raises:
        ValueError: another kind of name.
    """
    found = re.fullmatch(r"([1-9]\d*)(mbit|gbit)", name)
    if found is None:
        raise ValueError(f"a link is called like 1gbit or 300mbit, got {name!r}")
    return int(found[1]) * {"mbit": 1e6, "gbit": 1e9}[found[2]]


def obstacle() -> str | None:
    """Why no shaped link can be made on this machine; None when it can."""
    try:
        with shaped("1gbit"):
            return None
    except OSError as error:
        return str(error)


@contextlib.contextmanager
def opened(name: str) -> Iterator[Link]:
    """The link of that name: a rate, or the loopback."""
    if name == LOOPBACK:
        yield Link(name)
    else:
        with shaped(name) as link:
            yield link


@contextlib.contextmanager
def shaped(name: str) -> Iterator[Link]:
    """Two namespaces joined at the rate that the name says; gone afterwards, whatever happens in between.

    Raises:
        OSError: namespaces, interfaces or token buckets cannot be made here; says which command failed and why.
        ValueError: as `rate_of`.
    """
    rate, ip, tc = rate_of(name), program("ip"), program("tc")
    remove_left_behind(ip)
    names = [f"{PREFIX}-{os.getpid()}-{side}" for side in (0, 1)]
    ends = [(f"v{side}", f"10.77.0.{1 + side}") for side in (0, 1)]
    burst = max(LEAST_BURST, int(rate / 8 * TICK_S))
    try:
        for namespace in names:
            run(ip, "netns", "add", namespace)
        run(ip, "link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        for namespace, (end, address) in zip(names, ends, strict=True):
            run(ip, "-n", namespace, "addr", "add", f"{address}/24", "dev", end)
            if IPV6.exists():  # it would look for neighbours and routers at times of its own, which sent_bytes counts
                run(ip, "-n", namespace, "link", "set", end, "addrgenmode", "none")
            for interface in ("lo", end):
                run(ip, "-n", namespace, "link", "set", interface, "up")
            bucket = ("rate", f"{rate:.0f}bit", "burst", f"{burst}b", "latency", "50ms")
            run(ip, "netns", "exec", namespace, tc, "qdisc", "add", "dev", end, "root", "tbf", *bucket)
        first, second = (
            Host((ip, "netns", "exec", namespace), end, address, namespace)
            for namespace, (end, address) in zip(names, ends, strict=True)
        )
        yield Link(name, (first, second))
    finally:
        remove(ip, names)


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

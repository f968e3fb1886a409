"""Passes packets between two interfaces after a delay: `python delay.py NAMESPACE NAMESPACE MILLISECONDS`.

The interfaces v0 and v1 are tun devices of the two network namespaces. (Linux has a queue for this, netem, but not
every kernel has it.) It prints a line when it has begun, and ends with its input. It imports nothing that takes time.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, TUN, NO_HEADER = 0x400454CA, 0x0001, 0x1000
NETWORK = 0x40000000  # CLONE_NEWNET
LARGEST = 1 << 16


def opened(namespace: str, interface: str) -> int:
    """The descriptor of a tun device, on which packets are read and written."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), NETWORK):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", interface.encode(), TUN | NO_HEADER))
    return device


def main(first: str, second: str, milliseconds: str) -> None:
    """Pass packets on until the input ends."""
    delay_s = int(milliseconds) / 1e3
    ends = [opened(first, "v0"), opened(second, "v1")]
    other = dict(zip(ends, reversed(ends), strict=True))
    waiting: deque[tuple[float, int, bytes]] = deque()  # when, where, what
    poll = select.poll()
    for descriptor in (0, *ends):
        poll.register(descriptor, select.POLLIN)
    print("begun", flush=True)
    while True:
        wait_ms = max(0.0, 1e3 * (waiting[0][0] - time.monotonic())) if waiting else None
        for descriptor, _ in poll.poll(wait_ms):
            if descriptor == 0:
                return
            try:
                while True:
                    waiting.append((time.monotonic() + delay_s, other[descriptor], os.read(descriptor, LARGEST)))
            except BlockingIOError:
                continue
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, packet = waiting.popleft()
            os.write(end, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""TCP ports for servers of the tests, that nobody else takes between the choice and the server's start.

A port that the kernel chooses (bind to 0) is one that it also gives to any connection that goes out a moment later, and
several test runs go on at once. So these lie below the kernel's range for such connections (ip_local_port_range), and each
process has a block of its own, marked by an abstract socket that goes with the process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

FIRST, BLOCK, BLOCKS = 12000, 100, 180      # up to 29999; Linux begins at 32768


def free_port() -> int:
    """A port of this process's block that nobody listens on. It comes again after a hundred others."""
    for port in _ports:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("the ports come round for ever")


def _round() -> Iterator[int]:
    first = _own_block()
    while True:
        yield from range(first, first + BLOCK)


def _own_block() -> int:
    for n in range(BLOCKS):
        block = (os.getpid() + n) % BLOCKS
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0pgha-test-ports-{block}")
        except OSError:
            mark.close()
            continue
        _held.append(mark)
        return FIRST + block * BLOCK
    raise AssertionError("no block of ports is left: too many test runs at once")


_held: list[socket.socket] = []
_ports = _round()

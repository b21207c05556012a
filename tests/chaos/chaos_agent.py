"""`pgha` as it ships, on a machine with a watchdog device or a wall clock of its own.

    chaos_agent.py PGHA.PYZ run CONFIG

What is simulated is the kernel's side: pgha opens a character device (a node of /dev/null's numbers, named in
CHAOS_WATCHDOG), and the three ioctls on it, and the magic close, are answered here. The count is a file
`<device>.count`, which `chaos_bed.Device` follows from outside: it kills the whole node when the count runs out, whatever has
become of this process. (CUSE, softdog and /dev/watchdog are in no kernel that the tests can rely on; a setting of
pgha's own that replaces the device would be of no use to anybody else.)

The wall clock (`time.time`, which is what pgha reads it by) is that of the machine plus the seconds that the file
CHAOS_CLOCK holds, for this process alone: PostgreSQL's stamps are what the checker compares. (libfaketime, which would
do the same from below, reads its file through one FILE for all threads: the agent dies of "invalid stdio handle".)
"""

from __future__ import annotations

import fcntl
import os
import runpy
import struct
import sys
import time
from typing import Any

_GETSUPPORT, _KEEPALIVE, _SETTIMEOUT, _GETTIMEOUT = 0x80285700, 0x80045705, 0xC0045706, 0x80045707
_OPTIONS = 0x0080 | 0x0100 | 0x8000  # settable, magic close, can be petted
_DEFAULT_S = 60


class Kernel:
    """One watchdog: opening it starts its count."""

    def __init__(self, device: str) -> None:
        self.number = os.stat(device).st_ino
        self.timeout_s = _DEFAULT_S
        self.count = os.open(f"{device}.count", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.ioctl, self.write = fcntl.ioctl, os.write

    def fires_in(self, seconds: float | None) -> None:
        """None: stopped. Zero is never a moment of CLOCK_MONOTONIC's that matters."""
        at_ns = 0 if seconds is None else time.monotonic_ns() + round(seconds * 1e9)
        os.pwrite(self.count, struct.pack("q", at_ns), 0)

    def is_device(self, fd: Any) -> bool:
        return isinstance(fd, int) and os.fstat(fd).st_ino == self.number

    def on_ioctl(self, fd: Any, request: int, argument: Any = 0, *more: Any) -> Any:
        if request not in (_GETSUPPORT, _KEEPALIVE, _SETTIMEOUT, _GETTIMEOUT) or not self.is_device(fd):
            return self.ioctl(fd, request, argument, *more)
        if request == _GETSUPPORT:
            argument[:] = struct.pack("II32s", _OPTIONS, 0, b"simulated")
        if request == _SETTIMEOUT:
            self.timeout_s = struct.unpack("i", argument)[0]
        if request == _GETTIMEOUT:
            return struct.pack("i", self.timeout_s)
        self.fires_in(self.timeout_s)
        return 0

    def on_write(self, fd: int, data: bytes) -> int:
        if data == b"V" and self.is_device(fd):
            self.fires_in(None)
        return self.write(fd, data)


class WallClock:
    """Read anew at each call."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.true = time.time

    def time(self) -> float:
        return self.true() + int(os.pread(self.fd, 32, 0) or b"0")


def main() -> None:
    clock = os.environ.pop("CHAOS_CLOCK", "")
    if clock:
        time.time = WallClock(clock).time  # type: ignore[assignment]
    device = os.environ.pop("CHAOS_WATCHDOG", "")
    if device:
        kernel = Kernel(device)
        fcntl.ioctl, os.write = kernel.on_ioctl, kernel.on_write  # type: ignore[assignment]
    sys.argv[:] = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

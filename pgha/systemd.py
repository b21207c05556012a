"""What systemd is told, and how: sd_notify(3) and the journal on standard error, sd-daemon(3).

Rules of this file:
- The standard library only, and little of it: the guard imports it.
- Nothing here waits: systemd that does not read must never delay the lock's renewal.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

#: More of a status line nobody reads, and one datagram is to hold everything.
LONGEST_STATUS = 500

#: syslog's number for each level of logging; what has none of these names is told as a notice.
PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_NOTICE = 5


def notify(message: str, path: str | None = None) -> bool:
    """Send e.g. "READY=1" to `path`, by default $NOTIFY_SOCKET. False if nobody listens, or the queue is full."""
    path = os.environ.get("NOTIFY_SOCKET") if path is None else path
    if not path:
        return False
    address = "\0" + path[1:] if path[0] == "@" else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(message.encode(errors="replace"), address)
        except OSError:
            return False
    return True


class Notifier:
    """Says what is so now; sends only what systemd does not know yet, and so whatever a full queue did not take, too.

    `say` may be called at any time and as often as one likes with lines of NAME=VALUE. Without $NOTIFY_SOCKET it does nothing.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        self._known: dict[str, str] = {}

    def say(self, state: str) -> None:
        if not self._path:
            return
        said = dict(line.partition("=")[::2] for line in state.split("\n") if line)
        if "RELOADING" in said:
            self._known.pop("READY", None)      # whose next READY=1 says that it is done, and is news
            said["MONOTONIC_USEC"] = str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)     # of the request, for Type=notify-reload
        news = {name: value for name, value in said.items() if name in _EVENTS or self._known.get(name) != value}
        if news and notify("\n".join(f"{name}={value}" for name, value in news.items()), self._path):
            self._known |= {name: value for name, value in news.items() if name not in _EVENTS}


#: Not states: said whenever they are said.
_EVENTS = frozenset({"RELOADING", "MONOTONIC_USEC", "WATCHDOG"})


def status(text: str) -> str:
    """STATUS=…: one line, whatever others have put into `text`; a line of its own would be an order to systemd."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return f"STATUS={shown[:LONGEST_STATUS]}"


def watchdog_every_s(environ: Mapping[str, str]) -> float | None:
    """How often systemd wants to hear WATCHDOG=1: half of WatchdogSec=. None: it does not ask this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2_000_000


def journal_listens(environ: Mapping[str, str], descriptor: int = 2) -> bool:
    """Whether this descriptor is the journal's: it is the very socket that $JOURNAL_STREAM names (device:inode).

    The variable alone says nothing: children inherit it whose standard error goes elsewhere.
    """
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def with_priority(text: str, level: str) -> str:
    """`text` as the journal takes it: "<3>" before each of its lines, since each becomes an entry of its own."""
    prefix = f"<{PRIORITIES.get(level, _NOTICE)}>"
    return "\n".join(prefix + line for line in text.split("\n"))

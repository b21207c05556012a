"""Followers of GET /pgha/events: a crowd that never reads, as a program, and one that comes and goes and misses nothing.

    python event_readers.py HOST PORT MANY     a crowd; it says "N are there", and goes when its input ends
"""

from __future__ import annotations

import base64
import json
import resource
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

_UPGRADE = b"GET /pgha/events HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(b"k" * 16) + b"\r\n\r\n"


class Crowd:
    """So many followers that never read, in a process of their own. `served`: how many were let in."""

    def __init__(self, host: str, port: int, many: int) -> None:
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), host, str(port), str(many)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.served = int(self._process.stdout.readline().split()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """They go."""
        if self._process.poll() is None:
            self.leave()

    def leave(self) -> int:
        """How many had not been dropped by then."""
        out, _ = self._process.communicate("", timeout=30)
        return int(out.split()[0])


class Follower(threading.Thread):
    """Follows one agent's events, goes away after every few of them, comes back with its last id. `events`: all that it was
    told, gaps included, across restarts of the agent."""

    def __init__(self, host: str, port: int, *, leaves_after: int = 3) -> None:
        super().__init__(name=f"follower of {host}", daemon=True)
        self._address, self._leaves_after = (host, port), leaves_after
        self._end = threading.Event()
        self.events: list[dict[str, Any]] = []
        self.last = "0"
        self.came = 0

    def stop(self) -> None:
        self._end.set()
        self.join(20)

    def run(self) -> None:
        while not self._end.is_set():
            try:
                with socket.create_connection(self._address, timeout=1) as sock, sock.makefile("rb") as stream:
                    sock.sendall(_UPGRADE.replace(b"/events", b"/events?after=" + self.last.encode()))
                    if stream.readline().split()[1] != b"101":
                        raise ConnectionError
                    while stream.readline() != b"\r\n":
                        pass
                    self.came += 1
                    self._read(sock, stream)
            except (OSError, IndexError):
                self._end.wait(0.1)     # it is away

    def _read(self, sock: socket.socket, stream: Any) -> None:
        """A few events; a frame that is cut off by the end of the connection is none."""
        left = self._leaves_after
        while left and not self._end.is_set():
            if not stream.peek():
                raise ConnectionError
            opcode, length = stream.read(2)
            if length == 126:
                length = int.from_bytes(stream.read(2), "big")
            payload = stream.read(length)
            if len(payload) < length or opcode == 0x88:
                raise ConnectionError
            if opcode == 0x89:
                sock.sendall(bytes((0x8A, 0x80 | length, 0, 0, 0, 0)) + payload)
                continue
            event = json.loads(payload)
            self.last = event["id"]
            if event["kind"] != "hello":
                self.events.append(event)
                left -= 1


def main(host: str, port: int, many: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    crowd = []
    for _ in range(many):
        sock = socket.create_connection((host, port), timeout=20)
        sock.sendall(_UPGRADE)
        crowd.append(sock)
    crowd = [sock for sock in crowd if sock.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL).startswith(b"HTTP/1.1 101")]
    print(f"{len(crowd)} are there", flush=True)
    sys.stdin.read()
    poll = select.poll()
    for sock in crowd:
        poll.register(sock, select.POLLRDHUP)
    print(f"{len(crowd) - len(poll.poll(0))} are still there", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

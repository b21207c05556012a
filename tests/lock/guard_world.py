"""A real PostgreSQL and a real guard process, both as user postgres, and stand-ins that only bear its name."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg

from pgha.clock import Instant, SystemClock, remaining_s
from pgha.lock import recipe

ROOT = Path(__file__).parents[2]
CLOCK = SystemClock()


def postgres_bin() -> Path:
    found = shutil.which("postgres")
    return Path(found).parent if found else max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))


AS_POSTGRES = {"user": "postgres", "group": "postgres", "extra_groups": []}


def own(path: Path) -> None:
    entry = pwd.getpwnam("postgres")
    os.chown(path, entry.pw_uid, entry.pw_gid)


def until(holds, within_s: float, what: str = "") -> float:
    """Wait for a fact with a deadline; seconds that it took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < within_s, f"not within {within_s} s: {what or holds}"
        time.sleep(0.002)
    return time.monotonic() - begun


class Node:
    """A data directory of its own, and the server in it."""

    def __init__(self, template: Path, base: Path) -> None:
        self.base = base
        self.data = base / "data"
        self.server: subprocess.Popen[bytes] | None = None
        subprocess.run(["cp", "-a", template, self.data], check=True)
        with (self.data / "postgresql.conf").open("a") as f:
            f.write(f"unix_socket_directories = '{base}'\n")

    def signal_file(self, *, there: bool = True) -> None:
        path = self.data / "standby.signal"
        if there:
            path.touch()
            own(path)
        else:
            path.unlink()

    def launch(self) -> subprocess.Popen[bytes]:
        with (self.base / "log").open("ab") as log:
            self.server = subprocess.Popen([postgres_bin() / "postgres", "-D", self.data], stdout=log, stderr=log,
                                           stdin=subprocess.DEVNULL, start_new_session=True, cwd="/", **AS_POSTGRES)
        return self.server

    def start(self) -> int:
        server = self.launch()
        until(self.ready, 10, "server ready")
        return server.pid

    def ready(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            assert self.server.poll() is None, (self.base / "log").read_text()[-2000:]
            return False
        return True

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(f"host={self.base} user=postgres dbname=postgres connect_timeout=2", autocommit=True)

    def sql(self, text: str):
        with self.connect() as c:
            cursor = c.execute(text)
            return cursor.fetchall() if cursor.description else None

    def processes(self) -> list[recipe.Proc]:
        return recipe.processes_of(self.data)

    def stop(self) -> None:
        recipe.wait_gone(recipe.kill_all(self.data), 5)
        if self.server is not None:
            self.server.wait(5)


def reap() -> None:
    """What this process adopted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


class GuardProcess:
    """The guard of one data directory, and a plain client of it."""

    def __init__(self, data: Path, base: Path) -> None:
        self.data = data
        self.runtime = base / "run"
        self.agent_lock = base / "agent.lock"
        self.log = base / "guard.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._sock: socket.socket | None = None

    def argv(self) -> list[str]:
        return [sys.executable, "-c", (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
                "from pgha.lock.guard import main; sys.exit(main(sys.argv[1:]))"),
                "--data-dir", str(self.data), "--runtime-dir", str(self.runtime), "--agent-lock", str(self.agent_lock)]

    def start(self) -> dict:
        self.launch()
        until(self._answers, 5, "guard answers")
        return self.ask(op="status")

    def launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                            start_new_session=True, cwd="/", **AS_POSTGRES)
        return self.process

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask(op="status")["pid"] == self.process.pid
        except (OSError, ValueError):
            self.hang_up()
            return False

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(2)
        try:
            sock.connect(str(self.runtime / "guard.sock"))
        except OSError:
            sock.close()
            raise
        return sock

    def hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def send(self, line: bytes) -> dict:
        if self._sock is None:
            self._sock = self.connect()
        try:
            self._sock.sendall(line)
            received = b""
            while not received.endswith(b"\n"):
                chunk = self._sock.recv(4096)
                if not chunk:
                    raise ConnectionResetError("closed")
                received += chunk
        except OSError:
            self.hang_up()
            raise
        return json.loads(received)

    def ask(self, op: str, **fields) -> dict:
        message = {"op": op}
        if op != "status":
            message |= {"incarnation": "one", "started_ns": self.started_ns}
        return self.send(json.dumps(message | fields).encode() + b"\n")

    def arm(self, in_s: float, sequence: int = 1, **fields) -> Instant:
        """Arm for `in_s` seconds; the deadline."""
        fence_at = CLOCK.now().plus_s(in_s)
        answer = self.ask(op="arm", sequence=sequence, fence_at=fence_at, **fields)
        assert answer["ok"], answer
        assert answer["state"] == "armed"
        return fence_at

    @property
    def state(self) -> str:
        return self.ask(op="status")["state"]

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(5)
        self.hang_up()


class Writer:
    """A client that commits one row after the other and remembers when it was told so."""

    def __init__(self, node: Node) -> None:
        self._connection = node.connect()
        self._connection.execute("create table if not exists t (n int)")
        self.acknowledged = 0
        self.last: Instant = CLOCK.now()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until(lambda: self.acknowledged > 20, 5, "writes")

    def _run(self) -> None:
        try:
            while not self._stop:
                self._connection.execute("insert into t values (1)")
                self.last = CLOCK.now()
                self.acknowledged += 1
        except psycopg.Error:
            pass
        finally:
            self._connection.close()

    def join(self, within_s: float = 10) -> Instant:
        """When the last commit was acknowledged, once the connection has broken."""
        self._thread.join(within_s)
        assert not self._thread.is_alive()
        return self.last

    def stop(self) -> None:
        self._stop = True
        self._thread.join(10)


def late_s(deadline: Instant, moment: Instant) -> float:
    """How long after the deadline; negative: before."""
    return -remaining_s(deadline, moment)


#: A process with PostgreSQL's name that is none: argv[1] its name, argv[2] its directory, argv[3] "" or "undumpable".
STAND_IN = """
import ctypes, os, sys, time
os.chdir(sys.argv[2])
libc = ctypes.CDLL(None)
libc.prctl(15, sys.argv[1].encode(), 0, 0, 0)
if sys.argv[3]:
    libc.prctl(4, 0, 0, 0, 0)
print("x", flush=True)
time.sleep(60)
"""

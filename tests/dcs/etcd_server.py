"""Real etcd servers for tests: data on /dev/shm, loopback only, faults by signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Self

from free_ports import free_port

START_S = 20.0


class EtcdServer:
    """One member. `url` is its client URL; `arguments` as etcd takes them."""

    def __init__(self, name: str, directory: Path, *, scheme: str = "http") -> None:
        self.name = name
        self.directory = directory
        self.port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.peer_url = f"http://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, initial_cluster: str, *arguments: str) -> None:
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                # dies with the test run, also when that is killed; the pid stays the same
                ["setpriv", "--pdeathsig", "KILL", "etcd", "--name", self.name, "--data-dir", str(self.directory / self.name),
                 "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
                 "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
                 "--initial-cluster", initial_cluster, "--heartbeat-interval", "50", "--election-timeout", "500",
                 *arguments],
                stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        elif number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)      # on a busy machine it answers a while longer

    def wipe(self) -> None:
        shutil.rmtree(self.directory / self.name)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class EtcdCluster:
    """`size` members under one directory of their own; a context manager that leaves nothing behind."""

    def __init__(self, size: int = 1, *arguments: str, scheme: str = "http",
                 ssl_context: ssl.SSLContext | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pgha-etcd-", dir="/dev/shm"))
        self.members = [EtcdServer(f"e{n}", self.directory, scheme=scheme) for n in range(size)]
        self.arguments = arguments
        self.ssl_context = ssl_context

    @property
    def urls(self) -> list[str]:
        return [member.url for member in self.members]

    @property
    def initial_cluster(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def __enter__(self) -> Self:
        try:
            for member in self.members:
                member.start(self.initial_cluster, *self.arguments)
            self.wait_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.stop()
        shutil.rmtree(self.directory)

    def post(self, member: EtcdServer, path: str, body: dict[str, object], token: str = "") -> dict[str, object]:
        request = urllib.request.Request(member.url + path, json.dumps(body).encode(),
                                         {"Authorization": token} if token else {})
        with urllib.request.urlopen(request, timeout=2, context=self.ssl_context) as response:
            return json.load(response)

    def wait_healthy(self) -> None:
        """Until every member sees a leader and answers linearizable reads."""
        deadline = time.monotonic() + START_S
        for member in self.members:
            while True:
                try:
                    self.post(member, "/v3/kv/range", {"key": "AA=="})
                    break
                except OSError as error:  # refused, timed out, or an error status
                    if getattr(error, "code", 0) in (400, 403):
                        break  # up, and wants a login
                    if time.monotonic() > deadline or member.process is None or member.process.poll() is not None:
                        log = (self.directory / f"{member.name}.log").read_text(errors="replace")
                        raise AssertionError(f"{member.name} does not become healthy: {error}\n{log[-3000:]}") from error
                    time.sleep(0.02)

    def leader(self) -> EtcdServer:
        for member in self.members:
            status = self.post(member, "/v3/maintenance/status", {})
            if status["header"]["member_id"] == status.get("leader"):
                return member
        raise AssertionError("no member says that it is the leader")

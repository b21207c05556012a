"""A real etcd of one or three members on loopback, and the few requests that a test bed makes of it."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from pgha.demo.processes import process_of, spawn

_REQUEST_S = 2.0


class EtcdMember:
    """One etcd process. `address` is its own loopback address; its data survives a restart."""

    def __init__(self, name: str, address: str, client_port: int, directory: Path, log: Path) -> None:
        self.name = name
        self.address = address
        self.client_port = client_port
        self.peer_port = client_port + 1
        self.directory = directory
        self.log = log
        self.child: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.client_port}"

    def start(self, program: str, initial_cluster: str, token: str, user: str | None) -> None:
        client, peer = f"http://{self.endpoint}", f"http://{self.address}:{self.peer_port}"
        self.child = spawn(
            [program, "--name", self.name, "--data-dir", str(self.directory), "--listen-client-urls", client,
             "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
             "--initial-cluster", initial_cluster, "--initial-cluster-state", "new", "--initial-cluster-token", token],
            log=self.log, directory=self.log.parent, user=user,
        )

    def send(self, number: signal.Signals) -> bool:
        process = process_of(self.child) if self.child else None
        return process is not None and process.send(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and wait; SIGTERM lets it close its files, SIGKILL is a crash."""
        if self.child is None:
            return
        self.send(number)
        self.send(signal.SIGCONT)
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.child.wait(10)
        self.child = None

    def request(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """One request to the gRPC gateway; None if it did not answer with 200 in time."""
        connection = http.client.HTTPConnection(self.address, self.client_port, timeout=_REQUEST_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return answer if response.status == 200 and isinstance(answer, dict) else None


class Etcd:
    """All members of one etcd cluster."""

    def __init__(self, members: list[EtcdMember], program: str, user: str | None) -> None:
        self.members = members
        self._program = program
        self._user = user
        self._builds = 1

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def start(self, *members: EtcdMember) -> None:
        """Start these members, or all; it answers some moments later (see `ready`)."""
        initial = ",".join(f"{m.name}=http://{m.address}:{m.peer_port}" for m in self.members)
        for member in members or self.members:
            member.start(self._program, initial, f"pgha-bed-{self._builds}", self._user)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End all members at once."""
        for member in self.members:
            member.send(number)
        for member in self.members:
            member.stop(number)

    def rebuild_empty(self) -> None:
        """Replace it by a new cluster without any data, under the same addresses."""
        self.stop(signal.SIGKILL)
        for member in self.members:
            shutil.rmtree(member.directory, ignore_errors=True)
        self._builds += 1
        self.start()

    def ready(self) -> bool:
        """A linearizable read is answered."""
        return self.get("/pgha-bed-ready") is not None

    def leader(self) -> EtcdMember | None:
        """The member that leads, as it says itself."""
        for member in self.members:
            status = member.request("/v3/maintenance/status", {})
            if status and status.get("leader") not in {None, "0"} and status["leader"] == status["header"]["member_id"]:
                return member
        return None

    def _any(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        for member in self.members:
            if (answer := member.request(path, body)) is not None:
                return answer
        return None

    def get(self, key: str) -> list[tuple[str, bytes, int]] | None:
        """(key, value, revision of its last write) of one key or, if it ends in '/', of all below; None: no answer."""
        end = {"range_end": _b64(key[:-1] + "0")} if key.endswith("/") else {}
        answer = self._any("/v3/kv/range", {"key": _b64(key), **end})
        if answer is None:
            return None
        return [
            (base64.b64decode(kv["key"]).decode(), base64.b64decode(kv.get("value", "")), int(kv["mod_revision"]))
            for kv in answer.get("kvs", [])
        ]

    def value(self, key: str) -> Any:
        """The decoded JSON of one key; None if it is absent or nobody answered."""
        found = self.get(key)
        return json.loads(found[0][1]) if found else None

    def put(self, key: str, value: bytes) -> bool:
        return self._any("/v3/kv/put", {"key": _b64(key), "value": base64.b64encode(value).decode()}) is not None

    def delete(self, key: str) -> bool:
        """True if the key was there and is gone."""
        answer = self._any("/v3/kv/deleterange", {"key": _b64(key)})
        return answer is not None and int(answer.get("deleted", 0)) > 0


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()

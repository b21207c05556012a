"""One cluster's keys in a real etcd, written by hand or from a recording, and ctl to look at them."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from etcd_server import EtcdCluster
from rest_world import GOLDEN

from pgha.ctl import main

_numbers = itertools.count(1)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class World:
    """One cluster's keys in etcd, the configuration file of its node n1, and ctl."""

    def __init__(self, etcd: EtcdCluster, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.etcd = etcd
        self.scope = "bench"
        self.namespace = f"ns{next(_numbers)}"
        self.root = f"/{self.namespace}/{self.scope}/"
        self.config = directory / "pgha.toml"
        self.extra = ""
        self.capsys = capsys
        self._lease = 0

    def put(self, name: str, value: Any, *, leased: bool = False) -> None:
        member = self.etcd.members[0]
        if leased and not self._lease:
            self._lease = int(str(self.etcd.post(member, "/v3/lease/grant", {"TTL": 600})["ID"]))
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.etcd.post(member, "/v3/kv/put", {"key": _b64((self.root + name).encode()), "value": _b64(data), "lease": self._lease if leased else 0})

    def delete(self, name: str) -> None:
        self.etcd.post(self.etcd.members[0], "/v3/kv/deleterange", {"key": _b64((self.root + name).encode())})

    def get(self, name: str) -> bytes:
        kvs: Any = self.etcd.post(self.etcd.members[0], "/v3/kv/range", {"key": _b64((self.root + name).encode())}).get("kvs")
        return base64.b64decode(kvs[0]["value"])

    def load(self, when: str) -> Mapping[str, Any]:
        """The keys of a recording of the reference."""
        recorded: dict[str, Any] = json.loads((GOLDEN / f"{when}.json").read_text())
        for key, entry in recorded["etcd"].items():
            self.put(key.removeprefix("/service/bench/"), str(entry["value"]).encode(), leased=entry["leased"])
        return recorded

    def agent_at(self, name: str, address: tuple[str, int]) -> None:
        """Let a member publish this address."""
        raw = json.loads(self.get(f"members/{name}"))
        raw["api_url"] = f"http://{address[0]}:{address[1]}/patroni"
        self.put(f"members/{name}", raw, leased=True)

    def write_config(self) -> None:
        hosts = json.dumps([url.removeprefix("http://") for url in self.etcd.urls])
        self.config.write_text(f'scope = "{self.scope}"\nnamespace = "{self.namespace}"\nname = "n1"\n[etcd3]\nhosts = {hosts}\n{self.extra}')

    def ctl(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.write_config()
        self.capsys.readouterr()
        code = main(["-c", str(self.config), *arguments])
        out, err = self.capsys.readouterr()
        return code, out, err

"""A cluster whose nodes are run by pgha or by the real Patroni, one scope, one etcd; each node can change from one to the other.

Patroni is watched from outside: its REST answers, the keys that it writes, its log.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from pgha.demo.bed import Bed
from pgha.demo.node import Node, Profile, Settings
from pgha.demo.processes import run, spawn

sys.path.insert(0, str(Path(__file__).parents[1] / "clients"))
from patroni_env import copied_to, patroni, patronictl

Make = Literal["pgha", "patroni"]

#: The fastest that Patroni permits.
PROFILE = Profile(ttl=20, loop_wait=1, retry_timeout=3)


class MixedNode(Node):
    """`make` says who runs it next."""

    make: Make = "pgha"
    programs: Path      # where the copy of Patroni's environment is
    imported = False    # pgha.toml comes from `pgha config import`

    @property
    def yaml_path(self) -> Path:
        return self.directory / "patroni.yml"

    @property
    def other_log_path(self) -> Path:
        return self.directory / "patroni.log"

    def patroni_configuration(self) -> dict[str, Any]:
        """What patroni.yml holds: the same node, in Patroni's words."""
        return {k: v for k, v in super().configuration().items() if k != "pgha"}

    def write_configuration(self) -> None:
        for place in (self.directory, self.runtime):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._give(place)
        if not self.yaml_path.exists():
            self.yaml_path.write_text(json.dumps(self.patroni_configuration(), indent=1), encoding="utf-8")      # JSON is YAML
            self.yaml_path.chmod(0o600)
            self._give(self.yaml_path)
        if not self.imported:
            super().write_configuration()

    def import_configuration(self) -> str:
        """`pgha config import patroni.yml`: what it says. From then on that is this node's pgha.toml."""
        self.write_configuration()
        program = self.settings.program
        result = run([*program.argv, "config", "import", str(self.yaml_path), "--output", str(self.config_path), "--force"], timeout_s=30,
                     user=self.settings.user, environment=program.environment)
        assert result.returncode == 0, result.stdout + result.stderr
        self.imported = True
        return result.stdout + result.stderr

    def start_agent(self) -> None:
        if self.make == "pgha":
            if self.imported:
                self.agent = None
                program = self.settings.program
                environment = {**program.environment, "RUNTIME_DIRECTORY": str(self.runtime)}
                self.agent = spawn([*program.argv, "run", str(self.config_path)], log=self.log_path, directory=self.directory,
                                   user=self.settings.user, environment=environment)
                self._meant_to_run = True
            else:
                super().start_agent()
            return
        self.write_configuration()
        self.agent = spawn([str(copied_to(self.programs, patroni())), str(self.yaml_path)], log=self.other_log_path, directory=self.directory,
                           user=self.settings.user)
        self._meant_to_run = True

    def log_tail(self, lines: int = 40) -> str:
        def end(path: Path) -> str:
            return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(none)"
        return f"{end(self.log_path)}\n--- Patroni's\n{end(self.other_log_path)}"


class MixedBed(Bed):
    """`makes`: who runs each node at first, "pgha" or "patroni"."""

    def __init__(self, directory: Path, program: Any, *, makes: tuple[Make, ...], programs: Path, **rest: Any) -> None:
        self._programs = programs
        super().__init__(directory, program, nodes=len(makes), **{"profile": PROFILE, **rest})
        for node, make in zip(self.nodes, makes, strict=True):
            node.make = make

    nodes: list[MixedNode]      # type: ignore[assignment]

    def new_node(self, name: str, address: str, *, ports: tuple[int, int], directory: Path, runtime: Path, settings: Settings) -> MixedNode:
        node = MixedNode(name, address, ports=ports, directory=directory, runtime=runtime, settings=settings)
        node.programs = self._programs
        return node

    def close(self, *, remove: bool = True) -> None:
        for node in self.nodes:     # a frozen one would not notice
            node.signal_agent(signal.SIGCONT)
        super().close(remove=remove)

    def patronictl(self, *words: str, timeout_s: float = 60) -> str:
        """What the real patronictl says."""
        config = self.nodes[0].yaml_path
        self.nodes[0].write_configuration()
        result = run([str(copied_to(self._programs, patronictl())), "-c", str(config), *words], timeout_s=timeout_s, user=self.settings.user)
        return result.stdout + result.stderr

    def ctl(self, *words: str, node: MixedNode | None = None, timeout_s: float = 60) -> str:
        """What `pgha ctl` says; AssertionError if it fails."""
        program, node = self.settings.program, node or self.nodes[0]
        node.write_configuration()
        result = run([*program.argv, "ctl", "-c", str(node.config_path), *words], timeout_s=timeout_s, user=self.settings.user, environment=program.environment)
        assert result.returncode == 0, (words, result.returncode, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def leased(self, key: str) -> bool:
        """Does this key stand under a lease?"""
        import base64
        path = base64.b64encode(self.key(key).encode()).decode()
        for member in self.etcd.members:
            answer = member.request("/v3/kv/range", {"key": path})
            if answer is not None:
                return any(kv.get("lease") not in (None, "0") for kv in answer.get("kvs", []))
        return False

    def text(self, key: str) -> str:
        found = self.etcd.get(self.key(key))
        return found[0][1].decode() if found else ""


def lent(bed: MixedBed, request: pytest.FixtureRequest) -> Iterator[MixedBed]:
    """For a fixture: after a failure its files stay, and the ends of the logs are printed."""
    yield bed
    failed = getattr(request.node, "has_failed", False)
    if failed:
        for node in bed.nodes:
            print(f"\n--- the end of the logs of {node.name}\n{node.log_tail(60)}")
        print(bed.describe())
    bed.close(remove=not failed)

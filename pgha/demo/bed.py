"""A whole cluster on loopback: a real etcd and real pgha nodes under one directory; everything it starts, it ends.

Each bed has a network of its own, 127.0.X: nodes at .11 and up, etcd at .21 and up. Connections to such an address
come from 127.0.0.1, so no client's port can take a server's while that is down.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from pgha.demo.etcd import Etcd, EtcdMember
from pgha.demo.node import FAST, Node, Profile, Settings
from pgha.demo.processes import belonging_to, signal_all
from pgha.demo.programs import Program
from pgha.errors import PghaError

T = TypeVar("T")

SCOPE = "demo"
_POLL_S = 0.05
_QUIT_S = 5
_END_S = 15
_MAX_NODES = 7
_PORT_OFFSETS = (0, 10000, 20000)
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (private directories are made below it)
_STATE = "bed.json"


class Claim(Protocol):
    """Held for as long as the bed is there."""

    def close(self) -> None: ...


class BedTimeout(PghaError):
    """Something did not come true in time; the text holds the state of all nodes."""


class Bed:
    """Nothing runs before `start`. `directory` must be empty or absent, and enterable for `user`.

    A bed on another network than loopback says so in `claim_network`, `new_member` and `new_node`.
    """

    def __init__(
        self, directory: Path, program: Program, *, etcd_program: str, bin_dir: Path, nodes: int = 3, etcd_members: int = 1,
        profile: Profile = FAST, user: str | None = None, dynamic: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self._lock, network, offset = self.claim_network(etcd_members)
        self.network = network
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # etcd's fsyncs and the guard's files belong on tmpfs: a slow disk is not the subject here
        self.shared_memory = Path(tempfile.mkdtemp(prefix="pgha-bed-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else directory))
        self.profile = profile
        self._user = user
        for place in (self.directory, self.shared_memory):
            if user is not None:
                shutil.chown(place, user, user)
        members = [
            self.new_member(f"etcd{i + 1}", f"{network}.{21 + i}", 2379 + offset, self.shared_memory / f"etcd{i + 1}",
                       self.directory / f"etcd{i + 1}.log")
            for i in range(etcd_members)
        ]
        self.etcd = Etcd(members, etcd_program, user)
        self.settings = Settings(program, bin_dir, SCOPE, secrets.token_urlsafe(12), profile, tuple(self.etcd.endpoints), user,
                                 dynamic or {})
        self._ports = (5432 + offset, 8008 + offset)
        self.nodes: list[Node] = []
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> Node:
        """One more node; its agent is not started."""
        number = len(self.nodes) + 1
        assert number <= _MAX_NODES, "addresses are reserved for seven nodes"
        name = f"n{number}"
        node = self.new_node(name, f"{self.network}.{10 + number}", ports=self._ports, directory=self.directory / name,
                             runtime=self.shared_memory / name, settings=self.settings)
        self.nodes.append(node)
        return node

    def claim_network(self, etcd_members: int) -> tuple[Claim, str, int]:
        """The first three numbers of the addresses, an offset for all ports, and what keeps others away until it is closed."""
        return _choose_network(etcd_members)

    def new_member(self, name: str, address: str, client_port: int, directory: Path, log: Path) -> EtcdMember:
        return EtcdMember(name, address, client_port, directory, log)

    def new_node(self, name: str, address: str, *, ports: tuple[int, int], directory: Path, runtime: Path, settings: Settings) -> Node:
        return Node(name, address, ports=ports, directory=directory, runtime=runtime, settings=settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- life

    def start(self) -> None:
        """Start etcd, wait for it, start every agent. The cluster is up some seconds later (see `wait_healthy`)."""
        self.start_etcd()
        for node in self.nodes:
            node.start_agent()

    def start_etcd(self) -> None:
        self.etcd.start()
        self.wait(self.etcd.ready, 20, "etcd answers")

    def stop(self, timeout_s: float = 30) -> None:
        """An orderly end: SIGTERM to the replicas' agents, then to the primary's; `close` ends what is left."""
        leader = self.leader()
        for group in ([n for n in self.nodes if n is not leader], [leader] if leader else []):
            for node in group:
                node.signal_agent(signal.SIGTERM)
            for node in group:
                if node.agent is not None:
                    try:
                        node.agent.wait(timeout_s)
                    except subprocess.TimeoutExpired:
                        continue  # close() ends it

    def close(self, *, remove: bool = True) -> None:
        """End every process of this bed, whatever state it is in, and remove its directories (or keep them)."""
        for node in self.nodes:
            node.kill_agent()
            signal_all(node.guards(), signal.SIGKILL)
            node.quit_postgres()
        _poll(lambda: not any(node.postgres() for node in self.nodes), _QUIT_S)
        end_processes_of(self.directory, self.shared_memory)
        self.etcd.stop(signal.SIGKILL)
        for node in self.nodes:
            if node.agent is not None:
                node.agent.wait(10)
        self._lock.close()
        shutil.rmtree(self.shared_memory, ignore_errors=True)
        if remove:
            shutil.rmtree(self.directory, ignore_errors=True)

    def remember(self) -> None:
        """Write down what is needed to end this bed from another process (`end_remembered`)."""
        (self.directory / _STATE).write_text(json.dumps({"shared_memory": str(self.shared_memory)}), encoding="utf-8")

    # -- waiting

    def wait(self, condition: Callable[[], T | None], timeout_s: float, what: str, *, every_s: float = _POLL_S) -> T:
        """The first true value of `condition`; BedTimeout with everybody's state if there is none in time, or an agent gave up."""

        def watched() -> T | None:
            value = condition()
            for node in self.nodes:
                if not value and node.ended_by_itself is not None:
                    raise BedTimeout(f"the agent of {node.name} ended by itself with exit code {node.ended_by_itself}, "
                                     f"while waiting for: {what}\n{self.describe()}")
            return value

        value = _poll(watched, timeout_s, every_s)
        if not value:
            raise BedTimeout(f"after {timeout_s:g} s still not: {what}\n{self.describe()}")
        return value

    def wait_healthy(self, timeout_s: float = 60) -> Node:
        """The primary, once every node with a running agent is a member of one working cluster, as agents and SQL say."""
        return self.wait(self.healthy, timeout_s, "one primary, all others streaming from it")

    def wait_leader(self, *, other_than: Node | None = None, timeout_s: float = 60) -> Node:
        """The node that says that it is the running primary and holds the lock."""

        def found() -> Node | None:
            leader = self.leader()
            return leader if leader is not other_than else None

        return self.wait(found, timeout_s, f"a primary{f' other than {other_than.name}' if other_than else ''}")

    # -- what is so

    def node(self, name: str) -> Node:
        return next(n for n in self.nodes if n.name == name)

    def key(self, name: str) -> str:
        """The full key of this cluster."""
        return f"/service/{self.settings.scope}/{name}"

    def leader(self) -> Node | None:
        """The only node whose agent says that it has the lock and its PostgreSQL is a primary; None if there are none or two.

        (`/primary` alone answers 200 from when the lock is held, which is before PostgreSQL is promoted.)
        """
        found = [n for n in self.nodes if n.says_primary()]
        return found[0] if len(found) == 1 else None

    def healthy(self) -> Node | None:
        """The primary, if agents, store and PostgreSQL all agree that the cluster is whole."""
        running = [n for n in self.nodes if n.agent_process is not None]
        leader = self.leader()
        if leader is None:
            return None
        timeline = leader.patroni().get("timeline")
        for node in running:
            if node is not leader:
                says = node.patroni()
                if (says.get("state"), says.get("role"), says.get("replication_state")) != ("running", "replica", "streaming"):
                    return None
                if says.get("timeline") != timeline:
                    return None
        return leader if self._streaming(leader) >= {n.name for n in running if n is not leader} else None

    def _streaming(self, leader: Node) -> set[str]:
        import psycopg

        try:
            with leader.connect() as connection:
                if connection.execute("SELECT pg_is_in_recovery()").fetchone() != (False,):
                    return set()
                rows = connection.execute("SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'").fetchall()
        except psycopg.Error:
            return set()
        return {row[0] for row in rows}

    def describe(self) -> str:
        """Everybody's state, a line each, for people who look at a failure."""
        lines = []
        for node in self.nodes:
            says = node.patroni()
            facts = {k: says.get(k) for k in ("state", "role", "timeline", "replication_state", "xlog") if k in says}
            lines.append(f"{node.name} {node.address}: agent {node.agent_process}, guard {node.guards()}, "
                         f"postmaster {node.postmaster()} of {len(node.postgres())} processes, REST {facts or 'silent'}")
        for key, value, revision in self.etcd.get(self.key("")) or []:
            lines.append(f"{key} @{revision} = {value.decode(errors='replace')[:300]}")
        return "\n".join(lines)


def _poll(condition: Callable[[], T | None], timeout_s: float, every_s: float = _POLL_S) -> T | None:
    """The first true value, or the last one after that time."""
    end = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(every_s)
    return value


def end_processes_of(*places: Path) -> None:
    """SIGKILL until none is left; BedTimeout if that does not succeed."""

    def none_left() -> bool:
        left = belonging_to(*places)
        signal_all(left, signal.SIGKILL)
        return not left

    if not _poll(none_left, _END_S):
        raise BedTimeout(f"these processes do not die: {belonging_to(*places)}")


def end_remembered(directory: Path) -> bool:
    """End a bed that another process left running, and remove its directories. False if there is none here."""
    try:
        shared_memory = Path(json.loads((directory / _STATE).read_text(encoding="utf-8"))["shared_memory"])
    except (OSError, ValueError, KeyError):
        return False
    end_processes_of(directory.absolute(), shared_memory)
    shutil.rmtree(shared_memory, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    return True


def _choose_network(etcd_members: int) -> tuple[socket.socket, str, int]:
    """A network 127.0.X that no other bed has, with a port offset at which all its ports are free.

    The returned socket is the claim on the network: whoever holds it, has it.
    """
    candidates = list(range(64, 250))
    random.shuffle(candidates)
    for third in candidates:
        network = f"127.0.{third}"
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            lock.bind(f"\0pgha-bed-{network}")
        except OSError:
            lock.close()
            continue
        for offset in _PORT_OFFSETS:
            wanted = [(f"{network}.{10 + n}", port + offset) for n in range(1, _MAX_NODES + 1) for port in (5432, 8008)]
            wanted += [(f"{network}.{21 + n}", port + offset) for n in range(etcd_members) for port in (2379, 2380)]
            if all(_is_free(address, port) for address, port in wanted):
                return lock, network, offset
        lock.close()
    raise OSError("no free network 127.0.64 to 127.0.249 on loopback")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True

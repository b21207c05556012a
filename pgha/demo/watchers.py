"""What the demo sees while it runs: the rows that it wrote, the lock in etcd, and what each agent says of its node.

Each watcher is a thread that only looks (the writer writes), keeps its latest values under plain attributes, and ends
when its context does.
"""

from __future__ import annotations

import bisect
import json
import threading
import time
from collections import Counter
from typing import Any, NamedTuple, Self

import psycopg

from pgha.demo.bed import Bed
from pgha.demo.node import Node

_WRITE_INTERVAL_S = 0.01
_RETRY_S = 0.02
_LOCK_INTERVAL_S = 0.03
_MEMBERS_INTERVAL_S = 0.2
_JOIN_S = 10

TABLE = "CREATE TABLE IF NOT EXISTS demo_rows (id bigint PRIMARY KEY, written timestamptz NOT NULL DEFAULT clock_timestamp())"


class _Watcher:
    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self.work, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._thread.join(_JOIN_S)

    def work(self) -> None:
        raise NotImplementedError


class Written(NamedTuple):
    """One acknowledged row; `at_s` by the monotonic clock."""

    id: int
    node: str
    at_s: float


class Writer(_Watcher):
    """A client as applications have it: all nodes in its connection string, it wants the one that takes writes."""

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed)
        self.written: list[Written] = []
        self.rows: Counter[str] = Counter()

    def work(self) -> None:
        names = {node.address: node.name for node in self.bed.nodes}
        number = 0
        while not self.ended.is_set():
            try:
                with psycopg.connect(
                    host=",".join(names), port=str(self.bed.nodes[0].port), user="postgres", dbname="postgres",
                    password=self.bed.settings.password, target_session_attrs="read-write", autocommit=True, connect_timeout=2,
                    sslmode="disable", gssencmode="disable",
                ) as connection:
                    name = names[connection.info.host]
                    while not self.ended.wait(_WRITE_INTERVAL_S):
                        number += 1
                        connection.execute("INSERT INTO demo_rows (id) VALUES (%s)", (number,))
                        self.written.append(Written(number, name, time.monotonic()))
                        self.rows[name] += 1
            except (psycopg.OperationalError, psycopg.InternalError):
                self.ended.wait(_RETRY_S)

    def first_on_another(self, old: str, after_s: float) -> Written | None:
        """The first row acknowledged by another node than `old` after that moment."""
        start = bisect.bisect_right(self.written, after_s, key=lambda written: written.at_s)
        return next((written for written in self.written[start:] if written.node != old), None)


class LockSight(NamedTuple):
    """The lock as it was first seen in this state."""

    at_s: float
    holder: str
    ttl_s: float


class LockWatcher(_Watcher):
    """Follows the lock record, to tell when it was last renewed and when it was taken."""

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed)
        self.sights: list[LockSight] = []

    def work(self) -> None:
        last = 0
        while not self.ended.wait(_LOCK_INTERVAL_S):
            value = self.bed.etcd.get(self.bed.key("pgha/lock"))
            if value and value[0][2] != last:
                last = value[0][2]
                record = json.loads(value[0][1])
                self.sights.append(LockSight(time.monotonic(), str(record.get("holder", "")), float(record.get("ttl_s", 0))))

    def last_renewal_of(self, holder: str) -> LockSight | None:
        return next((s for s in reversed(self.sights) if s.holder == holder), None)

    def taken_after(self, at_s: float, *, other_than: str) -> LockSight | None:
        return next((s for s in self.sights if s.at_s > at_s and s.holder != other_than), None)


class Member(NamedTuple):
    """One line of the table. `lag`: bytes behind the primary's last known position, None if unknown or the primary."""

    name: str
    address: str
    role: str
    state: str
    timeline: int | None
    lag: int | None


class MembersWatcher(_Watcher):
    """Asks every agent for its node."""

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed)
        self.members: list[Member] = []

    def work(self) -> None:
        self.look()
        while not self.ended.wait(_MEMBERS_INTERVAL_S):
            self.look()

    def look(self) -> None:
        lags = self._lags()
        self.members = [_member(node, lags.get(node.name)) for node in self.bed.nodes]

    def _lags(self) -> dict[str, Any]:
        for node in self.bed.nodes:
            answer = node.get("/cluster") if node.agent_process else None
            if answer is not None and answer.status == 200:
                return {m.get("name"): m.get("lag") for m in answer.body.get("members", [])}
        return {}


def _member(node: Node, lag: Any) -> Member:
    where = f"{node.address}:{node.port}"
    if node.agent_process is None:
        return Member(node.name, where, "", "stopped" if not node.postgres() else "no agent", None, None)
    says = node.patroni()
    if not says:
        return Member(node.name, where, "", "starting", None, None)
    role = {"primary": "Leader", "replica": "Replica"}.get(says.get("role", ""), str(says.get("role", "")))
    state = says.get("replication_state") if role == "Replica" and says.get("replication_state") else says.get("state", "")
    return Member(node.name, where, role, str(state), says.get("timeline"), lag if isinstance(lag, int) and role == "Replica" else None)

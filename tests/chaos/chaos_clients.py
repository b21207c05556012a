"""Clients on every host and one that roams, and what is to be said of their histories.

    Clients     writer.py on each node's host to its own PostgreSQL, and on host `cl` to whoever takes writes
    judge       who wrote beside whom, what was lost, against what is promised for this mode

What is promised: safety model 1. In asynchronous mode a row may be lost if it was acknowledged in the last ttl of its
timeline (and a little: the lock's renewals are that far apart), or if it lies less than `maximum_lag_on_failover` bytes
before the end of what was written until then. In the other modes none may be.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import history
import psycopg
from chaos_bed import ChaosBed, Host
from history import Ack, Breach

from pgha.demo.processes import spawn

NODE_RATE, ROAMING_RATE = 40, 60
ROAMING = "cl"
TABLE = "CREATE TABLE IF NOT EXISTS traffic (id bigint PRIMARY KEY, stamp timestamptz NOT NULL)"
MAXIMUM_LAG_BYTES = 1 << 20
#: Renewals of the lock, which carry the position, come every 0.4 ttl, and may be late on a busy machine.
PUBLISHED_TTLS = 1.5
_WRITER = Path(history.__file__).with_name("writer.py")
#: A client whose server's host vanished must notice it itself.
_IMPATIENT = "tcp_user_timeout=1500 keepalives_idle=1 keepalives_interval=1 keepalives_count=2"
_numbers = itertools.count(1)


class Clients:
    """Use as a context; histories lie in the bed's directory as `acks-*`."""

    def __init__(self, bed: ChaosBed) -> None:
        self.bed = bed
        self._children: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._read: dict[Path, tuple[int, list[Ack]]] = {}
        with bed.wait_healthy(90).connect() as connection:
            connection.execute(TABLE)

    def __enter__(self) -> Self:
        for host in self.bed.hosts:
            self._add(host.name, {"dsn": host.dsn(), "node": host.name, "rate": NODE_RATE})
        names = {host.address: host.name for host in self.bed.hosts}
        dsn = f"host={','.join(names)} port={self.bed.hosts[0].port} user=postgres dbname=postgres target_session_attrs=read-write {_IMPATIENT}"
        self._add(ROAMING, {"dsn": dsn, "node": "?", "names": names, "rate": ROAMING_RATE})
        self.wait_for_more(100)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _add(self, where: str, spec: dict[str, object]) -> None:
        number = next(_numbers)
        out = self.bed.directory / f"acks-{number}-{where}"
        out.touch()
        with self.bed.net.inside(where):
            child = spawn([sys.executable, str(_WRITER), "plain", str(out), json.dumps({**spec, "number": number})], log=out.with_suffix(".log"),
                          directory=_WRITER.parent, environment={"PGPASSWORD": self.bed.settings.password})
        self._children.append((child, out))

    def stop(self) -> None:
        for child, _ in self._children:
            child.send_signal(signal.SIGTERM)
        for child, _ in self._children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(10)

    def acks(self, where: str = "") -> list[Ack]:
        """All so far, of one host or of all; what was read once is not read again."""
        found: list[Ack] = []
        for _, out in self._children:
            if not where or out.name.endswith(f"-{where}"):
                offset, known = self._read.get(out, (0, []))
                with out.open("rb") as file:
                    file.seek(offset)
                    fresh = file.read().rpartition(b"\n")[0]
                if fresh:
                    known.extend(history.parse(fresh.decode() + "\n"))
                    self._read[out] = (offset + len(fresh) + 1, known)
                found += known
        return found

    def wait_for_more(self, rows: int, timeout_s: float = 60) -> None:
        """Proof that writing works now, for the client that roams, too."""
        for child, out in self._children:
            assert child.poll() is None, f"a writer ended: {out.with_suffix('.log').read_text(encoding='utf-8')}"
        for where in ("", ROAMING):
            goal = len(self.acks(where)) + rows // (4 if where else 1)
            self.bed.wait(lambda where=where, goal=goal: len(self.acks(where)) >= goal, timeout_s, f"more acknowledged rows{' for the client that roams' if where else ''}")


class Exposed(NamedTuple):
    """From when until when a node had neither agent nor guard (and no device): what it wrote then is measured, not judged."""

    node: str
    from_us: int
    until_us: int

    def covers(self, ack: Ack) -> bool:
        return ack.node == self.node and self.from_us <= ack.ack_us <= self.until_us


class Verdict(NamedTuple):
    """`violations`: sentences. `exposures`: (node, seconds of two writers, rows acknowledged in them that are lost)."""

    violations: tuple[str, ...]
    exposures: tuple[tuple[str, float, int], ...]
    lost: tuple[Ack, ...]
    failovers: int


def judge(acks: Sequence[Ack], present: set[int], *, durable: bool, ttl_s: float, exposed: Sequence[Exposed] = (),
          maximum_lag_bytes: int = MAXIMUM_LAG_BYTES) -> Verdict:
    """`durable`: a synchronous mode. `present`: ids in the final primary's table."""
    violations: list[str] = []
    exposures: dict[Exposed, float] = dict.fromkeys(exposed, 0.0)
    reigns = history.reigns_of(acks)
    last = {(a.node, a.timeline, a.life_us): a for a in sorted(acks, key=lambda a: a.stamp_us)}
    for breach in history.breaches(reigns):
        cover = _cover(breach, last, exposed)
        if cover is None:
            violations.append(breach.text)
        else:
            exposures[cover] = max(exposures[cover], breach.overlap_s)
    lost = tuple(a for a in acks if a.id not in present)
    lost_in = dict.fromkeys(exposed, 0)
    judged = []
    for ack in lost:
        cover = next((each for each in exposed if each.covers(ack)), None)
        if cover is None or durable:  # its standbys follow another by then, so that a synchronous commit gets no answer
            judged.append(ack)
        else:
            lost_in[cover] += 1
    violations += _too_much(judged, acks, durable=durable, ttl_s=ttl_s, maximum_lag_bytes=maximum_lag_bytes)
    failovers = sum(a.node != b.node for a, b in itertools.pairwise(reigns))
    return Verdict(tuple(violations), tuple((e.node, s, lost_in[e]) for e, s in exposures.items()), lost, failovers)


def _cover(breach: Breach, last: dict[tuple[str, int, int], Ack], exposed: Sequence[Exposed]) -> Exposed | None:
    """The exposure in which the old one wrote its last row, if that is all that there is to the breach."""
    if breach.old is None or not breach.overlap_s:
        return None
    ack = last[breach.old.node, breach.old.timeline, breach.old.life_us]
    return next((each for each in exposed if each.covers(ack)), None)


def _too_much(lost: Sequence[Ack], acks: Sequence[Ack], *, durable: bool, ttl_s: float, maximum_lag_bytes: int) -> list[str]:
    if durable:
        return [f"{len(lost)} acknowledged rows are lost in a synchronous mode, first {lost[0]}"] if lost else []
    violations = []
    timelines: dict[int, list[Ack]] = defaultdict(list)
    for ack in acks:
        timelines[ack.timeline].append(ack)
    for timeline in sorted({ack.timeline for ack in lost}):
        rows = timelines[timeline]
        end_us = max(a.ack_us for a in rows)
        known = max((a.lsn for a in rows if a.ack_us < end_us - PUBLISHED_TTLS * ttl_s * 1e6), default=0)
        wrong = [a for a in lost if a.timeline == timeline and a.lsn <= known - maximum_lag_bytes]
        if wrong:
            violations.append(f"{len(wrong)} rows of timeline {timeline} are lost that were {known - wrong[0].lsn} bytes before what was known "
                              f"{PUBLISHED_TTLS:g} ttl before its end (allowed: {maximum_lag_bytes}), first {wrong[0]}")
    return violations


def longest_gap(moments_us: Sequence[int], from_us: int, until_us: int) -> float:
    """Seconds without an acknowledgement, of what overlaps this time."""
    ordered = sorted(moments_us)
    return max(((b - a) / 1e6 for a, b in itertools.pairwise(ordered) if b >= from_us and a <= until_us), default=0.0)


def ids(host: Host) -> set[int]:
    with host.connect() as connection:
        return {row[0] for row in connection.execute("SELECT id FROM traffic")}


def ids_or_none(host: Host) -> set[int]:
    """The same of a node that need not answer now: none."""
    try:
        return ids(host)
    except psycopg.Error:
        return set()


def now_us() -> int:
    return time.monotonic_ns() // 1000

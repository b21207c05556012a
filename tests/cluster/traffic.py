"""Clients on every node of a bed, from before a fault until after it, and the verdict on what they remember."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import history

from pgha.demo.bed import Bed
from pgha.demo.node import Node
from pgha.demo.processes import spawn

#: More than the hundred a second that the scenarios are to have, so that a busy machine still reaches them.
RATE = 150
#: Shorter gaps in writing are what a busy machine makes by itself.
INTERRUPTION_S = 0.3
TABLE = "CREATE TABLE IF NOT EXISTS traffic (id bigint PRIMARY KEY, stamp timestamptz NOT NULL)"
_numbers = itertools.count(1)
_WRITER = Path(__file__).with_name("writer.py")


class Traffic:
    """One plain writer per node; `add` puts others beside them. Use as a context; `finish` gives the verdict."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.faults: list[tuple[str, int]] = []
        self._children: list[tuple[subprocess.Popen[bytes], Path]] = []
        leader = bed.wait_healthy()
        with leader.connect() as connection:
            connection.execute(TABLE)
            connection.execute("TRUNCATE traffic")

    def __enter__(self) -> Self:
        for node in self.bed.nodes:
            if node.agent is not None:
                self.add("plain", node)
        self.wait_for_more(100)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def add(self, kind: str, node: Node) -> None:
        number = next(_numbers)
        out = self.bed.directory / f"acks-{number}-{kind}-{node.name}"
        out.touch()
        spec = {"dsn": node.dsn(), "node": node.name, "number": number, "rate": RATE}
        child = spawn([sys.executable, str(_WRITER), kind, str(out), json.dumps(spec)], log=out.with_suffix(".log"), directory=_WRITER.parent,
                      environment={"PGPASSWORD": self.bed.settings.password})
        self._children.append((child, out))

    def acks(self) -> list[history.Ack]:
        """All so far."""
        return [ack for _, out in self._children for ack in history.read(out)]

    def count(self, kind: str = "") -> int:
        """How many rows were acknowledged so far (of one kind of client)."""
        return sum(out.read_bytes().count(b"\n") for _, out in self._children if f"-{kind}" in out.name)

    def wait_for_more(self, rows: int, *, kind: str = "", timeout_s: float = 60) -> None:
        """Until that many more rows have been acknowledged: proof that writing works now."""
        for child, out in self._children:
            assert child.poll() is None, f"a writer ended: {out.with_suffix('.log').read_text()}"
        goal = self.count(kind) + rows
        self.bed.wait(lambda: self.count(kind) >= goal, timeout_s, f"{rows} more acknowledged rows")

    def fault(self, what: str) -> float:
        """Note that it happens now; gives time.monotonic()."""
        now = time.monotonic()
        self.faults.append((what, round(now * 1e6)))
        return now

    def _end(self) -> None:
        for child, _ in self._children:
            child.send_signal(signal.SIGTERM)
        for child, _ in self._children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(10)

    def finish(self, *, lost_since_s: float | None = None, timeout_s: float = 60) -> history.Verdict:
        """Wait until all is well again and written to, stop, compare with every node's table, and judge.

        No violation is ever fine. `lost_since_s` (monotonic): rows acknowledged before that moment must all be there;
        None: no row may be lost at all.
        """
        self.bed.wait_healthy(timeout_s)
        self.wait_for_more(50)
        self._end()
        leader = self.bed.wait_healthy()
        present = ids(leader)
        for node in self.bed.nodes:
            if node is not leader and node.agent_process is not None:
                self.bed.wait(lambda node=node: ids(node) == present, 20, f"{node.name} has the same rows as {leader.name}")
        verdict = history.judge(self.acks(), present)
        for what, at_us in self.faults:
            print(f"{what}: writing again after {self.resumed_after_s(at_us / 1e6):.2f} s")
        print(verdict)
        assert not verdict.violations, str(verdict)
        if lost_since_s is None:
            assert not verdict.lost, str(verdict)
        else:
            early = [ack for ack in verdict.lost if ack.ack_us < lost_since_s * 1e6]
            assert not early, f"{len(early)} rows lost that were acknowledged up to {lost_since_s - early[0].ack_us / 1e6:.2f} s earlier than any may be"
        return verdict

    def failures_of(self, node: Node) -> list[str]:
        """What a plain client of this node met other than "read-only"."""
        return [why for _, out in self._children if out.name.endswith(f"-plain-{node.name}") for _, why in history.failures(out)]

    def resumed_after_s(self, at_s: float) -> float:
        """From that moment (monotonic) to the end of the first interruption that ended after it; 0 if there was none."""
        moments = sorted(ack.ack_us / 1e6 for ack in self.acks())
        ends = (b for a, b in itertools.pairwise(moments) if b > at_s and b - a > INTERRUPTION_S)
        return next(ends, at_s) - at_s


def ids(node: Node) -> set[int]:
    """The rows that this node has."""
    with node.connect() as connection:
        return {row[0] for row in connection.execute("SELECT id FROM traffic")}

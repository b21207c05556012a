"""What has happened on this node lately? A bounded log with ids that a reader can resume from.

An id is "<run>-<number>": the run is this agent's start, numbers are consecutive. A reader that comes back with its last
id gets all that followed, or is told plainly that it cannot: another run, or more events than are kept.

Rules of this file: adding never waits, whoever reads.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import trio

from pgha.model.event import Event, Gap

#: what is kept: so many events, and so many bytes of them
KEPT = 1000
KEPT_BYTES = 1 << 20

_ID = re.compile(r"([0-9A-Za-z]{1,64})-(\d{1,15})", re.ASCII)


class Entry(NamedTuple):
    """One event as it is told: a JSON object."""

    number: int
    kind: str
    text: bytes


class Start(NamedTuple):
    """Where a reader begins: after the event `number`. `gap`: what it is to be told first."""

    number: int
    gap: Gap | None


class NoSuchId(ValueError):
    """It is no id of any agent's."""


class EventLog:
    """`run`: of this start of the agent, letters and digits."""

    def __init__(self, *, run: str, node: str, scope: str, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        assert _ID.fullmatch(f"{run}-0"), run
        self.run, self.node, self.scope = run, node, scope
        self._kept, self._kept_bytes = kept, kept_bytes
        self._node = msgspec.json.encode(node)
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._added = trio.Event()
        self.last = 0       # number of the newest event there ever was

    @property
    def forgotten(self) -> int:
        """Number of the newest event that is not kept any more; 0 if all are."""
        return self._entries[0].number - 1 if self._entries else self.last

    def id_of(self, number: int) -> str:
        return f"{self.run}-{number}"

    def add(self, event: Event, *, wall_s: float) -> None:
        """It is kept, and whoever waits is woken."""
        self.last += 1
        entry = Entry(self.last, str(event.__struct_config__.tag), self.message(event, number=self.last, wall_s=wall_s))
        self._entries.append(entry)
        self._bytes += len(entry.text)
        while len(self._entries) > self._kept or (self._bytes > self._kept_bytes and len(self._entries) > 1):
            self._bytes -= len(self._entries.popleft().text)
        if self._added.statistics().tasks_waiting:
            added, self._added = self._added, trio.Event()
            added.set()

    def message(self, event: Event, *, number: int, wall_s: float) -> bytes:
        """An event (or what is said to one reader) as JSON, with the id of that position."""
        at = datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        return b'{"id":"%s","at":"%s","node":%s,%s' % (self.id_of(number).encode(), at.encode(), self._node, msgspec.json.encode(event)[1:])

    def after(self, number: int, kinds: Collection[str] | None = None) -> Iterator[Entry]:
        """The kept events that follow, oldest first. `kinds` None: all."""
        skip = max(0, number - self.forgotten)
        entries = self._entries
        # From the nearer end: who is up to date wants the last few of a thousand.
        for at in range(skip, len(entries)):
            entry = entries[at]
            if kinds is None or entry.kind in kinds:
                yield entry

    def start(self, after: str) -> Start:
        """Where to go on for somebody whose last id is `after`; "0": with all that is kept. NoSuchId."""
        if after == "0":
            return Start(self.forgotten, None)
        match = _ID.fullmatch(after)
        if match is None:
            raise NoSuchId(f"{after[:80]!r} is no id of an event")
        number = int(match[2])
        if match[1] != self.run or number > self.last:
            return Start(self.forgotten, Gap(reason="restarted", after=after, missed=None))
        if number < self.forgotten:
            return Start(self.forgotten, Gap(reason="dropped", after=after, missed=self.forgotten - number))
        return Start(number, None)

    async def wait_beyond(self, number: int) -> None:
        """Until there is an event after that one. The caller bounds the wait."""
        while self.last <= number:
            await self._added.wait()

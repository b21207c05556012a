"""What happened: one line an event, with virtual time. The same seed gives the same bytes, in any process."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any, TextIO

from tests.simulation.scheduler import Scheduler

#: The last lines are kept for the report of a failure.
KEPT = 400


class Trace:
    """`out`: where lines go while they are wanted; the hash and the last lines are kept in any case."""

    def __init__(self, scheduler: Scheduler, out: TextIO | None = None) -> None:
        self._scheduler = scheduler
        self._out = out
        self._hash = hashlib.sha256()
        self.last: deque[str] = deque(maxlen=KEPT)
        self.lines = 0

    def __call__(self, where: str, what: str, /, **facts: Any) -> None:
        text = f"{self._scheduler.now_ns / 1e9:13.6f} {where:<9} {what}"
        if facts:
            text += "".join(f" {k}={str(v).replace(' ', '_')}" for k, v in facts.items())
        self.lines += 1
        self.last.append(text)
        self._hash.update(text.encode())
        if self._out is not None:
            self._out.write(text + "\n")

    def digest(self) -> str:
        return self._hash.hexdigest()

"""Who reads the node's files again, and who hears what came of it: SIGHUP, and POST /reload.

One reading at a time, in a task of its own: whoever asks may stop waiting, which must not end a reading half-way, and the
disk may hang. Whoever asks while one is under way is served by the next, together with all others who ask until it begins:
the files may have changed after the first had read them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio


class _Turn:
    def __init__(self) -> None:
        self.asked, self.done = trio.Event(), trio.Event()
        self.problems: tuple[str, ...] = ()


class Reread:
    """`read`: reads and takes the files; what is wrong with them, which then changes nothing; () if they are in force."""

    def __init__(self, read: Callable[[], Awaitable[tuple[str, ...]]]) -> None:
        self._read = read
        self._next = _Turn()

    def ask(self) -> None:
        """A signal wants it: nobody waits."""
        self._next.asked.set()

    async def outcome(self) -> tuple[str, ...]:
        """Ask, and return what `read` returned that began after this call."""
        turn = self._next
        turn.asked.set()
        await turn.done.wait()
        return turn.problems

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Never returns; raises what `read` raises."""
        task_status.started()
        while True:
            await self._next.asked.wait()
            turn, self._next = self._next, _Turn()
            turn.problems = await self._read()
            turn.done.set()

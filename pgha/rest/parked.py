"""Who waits here for what the loop publishes next, and how many may.

A question that waits has a place of the listener's, and cannot be made to give it up as a silent client is: so who asks
without a login must not be able to take them all. There are two ways to bound that, and the one that ends a connection
is the worse: a vote that a real peer waits for would be cut off by strangers, and the peer would take this node for one
that does not answer. So a newcomer only ends the wait of who has waited longest, and that one is answered at once, as if
its time were over: with what is known by now, which is true, and it asks again. Peers wait for a quarter of a second,
strangers longer if they mean harm, and then it is theirs that end; all that many strangers can do is to turn waiting
into asking again.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from pgha.rest.published import Board, Published


class Parked:
    """Of one kind of question. `at_most`: how many may wait at a time."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.at_most = 1
        #: a dict keeps its order: the first has waited longest
        self._waiting: dict[trio.CancelScope, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def until(self, met: Callable[[Published], bool], *, at_most_s: float) -> Published:
        """What is published once it is as wanted, or by the end of the wait."""
        published = self._board.current()
        if met(published) or at_most_s <= 0:
            return published
        while len(self._waiting) >= self.at_most:
            longest = next(iter(self._waiting))
            del self._waiting[longest]
            longest.cancel()
        scope = trio.CancelScope(deadline=trio.current_time() + at_most_s)
        self._waiting[scope] = None
        try:
            with scope:
                while not met(published):
                    published = await self._board.wait_changed(published)
        finally:
            self._waiting.pop(scope, None)
        return self._board.current()

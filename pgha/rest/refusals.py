"""Who was turned away, and why: a line in the log, once, and again after a while with the number of those in between.

Whoever guesses passwords must be seen; whoever does so a thousand times a second must not fill the disk.
"""

from __future__ import annotations

import trio

from pgha.log import Log

log = Log("pgha.rest")

#: The same peer, refused for the same reason, is named again after this time.
AGAIN_S = 60.0
#: So many are remembered; beyond that the one named longest ago is forgotten.
_REMEMBERED = 256


class Refusals:
    """For one listener."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], list[float]] = {}     # [when, how many since]

    def note(self, peer: str, why: str, **facts: object) -> None:
        """Say it, if it is news. Nothing that the client sent but method and path belongs into `facts`."""
        now_s, key = trio.current_time(), (peer, why)
        before = self._said.get(key)
        if before is not None and now_s - before[0] < AGAIN_S:
            before[1] += 1
            return
        if before is not None:
            del self._said[key]
            if before[1]:
                facts["more_since"] = int(before[1])
        elif len(self._said) >= _REMEMBERED:
            del self._said[next(iter(self._said))]
        self._said[key] = [now_s, 0]
        log.warning("REST client refused", peer=peer, why=why, **facts)

"""Is the store away? One line in the log when that begins, one when it ends, whoever notices (several tasks ask it, by
connections of their own).

Only who goes on asking until there is an answer may say that the store fails; others look at `on`, and keep quiet.
"""

from __future__ import annotations

from pgha.clock import Clock, Instant, candidate_age_s
from pgha.log import Log

log = Log("pgha.dcs")


class Outage:
    """Shared by all who talk with the store. It has ended when everybody who was without an answer has one again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._without: set[str] = set()
        self._since: Instant | None = None

    @property
    def on(self) -> bool:
        return self._since is not None

    def failing(self, who: str, why: str) -> None:
        """`who` gets no answer, and goes on asking."""
        self._without.add(who)
        if self._since is None:
            self._since = self._clock.now()
            log.warning("the store does not answer", why=why)

    def answered(self, who: str) -> None:
        """`who` has an answer, or asks no more."""
        self._without.discard(who)
        if self._since is not None and not self._without:
            log.info("the store answers again", after_s=candidate_age_s(self._since, self._clock.now()))
            self._since = None

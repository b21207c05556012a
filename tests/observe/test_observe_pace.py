"""How often PostgreSQL is looked at, and from when a smaller limit counts (observe/postgres.py)."""

from __future__ import annotations

import pytest

from pgha.clock import Instant
from pgha.model.node import PostgresFacts
from pgha.model.observation import Settings
from pgha.observe.postgres import look_every_s, not_looked_since

AT = Instant(10**12, 10**12)
SQL = PostgresFacts(process="running", answer="sql", answered_at=AT)


@pytest.mark.parametrize(("loop_wait_s", "limit_s", "every_s"), [
    (10.0, 29.0, 10.0),     # the defaults
    (1.0, 4.0, 1.0),        # ttl 5
    (60.0, 29.0, 11.6),     # looked at once a minute, every healthy server would be one that hangs
    (10.0, 5.0, 2.0),       # pgha.primary_hang_timeout 5
])
def test_a_healthy_server_is_looked_at_well_within_the_hang_timeout(loop_wait_s: float, limit_s: float, every_s: float):
    assert look_every_s(Settings(loop_wait_s=loop_wait_s, primary_hang_timeout_s=limit_s)) == every_s


@pytest.mark.parametrize(("before", "now", "limit_s"), [
    (None, SQL, 4.0),
    ((SQL, 29.0), SQL, 29.0),                                                                   # not looked at since
    ((SQL, 29.0), PostgresFacts(process="running", answer="sql", answered_at=AT.plus_s(1)), 4.0),    # it answers
    ((SQL, 29.0), PostgresFacts(process="running", answer="silent", answered_at=AT), 4.0),           # it does not
    ((SQL, 2.0), SQL, 4.0),
])
def test_a_smaller_hang_timeout_counts_from_the_first_look(before: tuple[PostgresFacts, float] | None, now: PostgresFacts, limit_s: float):
    """ttl 30 → 5: a healthy primary, looked at every 10 s until then, would be killed as one that hangs."""
    assert not_looked_since(Settings(primary_hang_timeout_s=4.0), before, now).primary_hang_timeout_s == limit_s

"""Is it time for what was scheduled? Judged by this node's wall clock, which is what people schedule by."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from pgha.model.observation import Observation
from pgha.model.request import NoZone, epoch_s, moment

#: Nobody wants at nine what was scheduled for three. The reference's bound is one and a half loop_wait; where that is a
#: moment, an operation in flight must not make it too late.
STALE_AFTER_LOOPS = 1.5
STALE_AFTER_AT_LEAST_S = 15.0


class Due(StrEnum):
    """`UNREADABLE`: it names no moment, so it never comes."""

    LATER = "later"
    NOW = "now"
    STALE = "stale"
    UNREADABLE = "unreadable"


class When(Struct, frozen=True, kw_only=True):
    """`in_s`: until then; 0 if it is not later."""

    due: Due
    because: str
    in_s: float = 0.0


def when(o: Observation, scheduled: str) -> When:
    """How `scheduled` (ISO 8601 with a zone) stands to now."""
    try:
        in_s = epoch_s(moment(scheduled)) - o.wall_s
    except NoZone:
        return When(due=Due.UNREADABLE, because=f"{scheduled[:60]!r} does not say in which time zone")
    except ValueError:
        return When(due=Due.UNREADABLE, because=f"{scheduled[:60]!r} is no moment in time (ISO 8601)")
    limit_s = max(STALE_AFTER_LOOPS * o.settings.loop_wait_s, STALE_AFTER_AT_LEAST_S)
    if in_s > 0:
        return When(due=Due.LATER, because=f"scheduled at {scheduled}, in {in_s:.1f} s", in_s=in_s)
    return When(due=Due.NOW if -in_s <= limit_s else Due.STALE, because=f"scheduled at {scheduled}, {-in_s:.1f} s ago, limit {limit_s:g} s")

"""Is there room in the store for the renewals to come, and is it ours to make some? (safety model 16)

Renewals are revisions; a store that nobody compacts fills its quota in weeks, and then refuses every write while it
still answers reads. That is unknown to the lock, never lost, but it ends in a demotion.
"""

from __future__ import annotations

from pgha.clock import candidate_age_s
from pgha.decide.common import mib, reason
from pgha.model.action import CompactStore
from pgha.model.decision import Reason
from pgha.model.observation import Observation

#: From which share of the quota on people are told, and from which on pgha compacts if nobody else does.
TELL_FROM = 0.5
COMPACT_FROM = 0.25
DAY_S = 86400.0


def store_has_room(o: Observation) -> Reason:
    """For explain: how much of the quota is used, and which alarms the store has raised."""
    rule, capacity = "capacity.store_has_room", o.dcs.capacity
    if capacity is None or not capacity.quota_bytes:
        return reason(rule, True, "the store has not said how full it is")
    used = capacity.used_bytes / capacity.quota_bytes
    alarms = f", alarms: {', '.join(capacity.alarms)}" if capacity.alarms else ""
    return reason(rule, used < TELL_FROM and not capacity.alarms, f"{mib(capacity.used_bytes)} of {mib(capacity.quota_bytes)} used ({used:.0%}){alarms}")


def compaction(o: Observation) -> CompactStore | None:
    """Forget what is older than a day, if a quarter of the quota is used and nobody has compacted for a day."""
    capacity = o.dcs.capacity
    if capacity is None or not o.settings.may_compact_store or not capacity.quota_bytes or not capacity.day_old_revision:
        return None
    compacted_age_s = candidate_age_s(capacity.compacted_at or capacity.watched_since, o.now)
    if compacted_age_s < DAY_S or capacity.used_bytes < COMPACT_FROM * capacity.quota_bytes:
        return None
    if capacity.day_old_revision <= capacity.compact_revision:
        return None
    return CompactStore(revision=capacity.day_old_revision)

"""Is there room in the store for the renewals to come, and is it ours to make some? (safety model 16)

Renewals are revisions; a store that nobody compacts fills its quota in weeks, and then refuses every write while it
still answers reads. That is unknown to the lock, never lost, but it ends in a demotion. Compaction makes the room of old
revisions usable again; it neither shrinks etcd's file (`etcdctl defrag`) nor takes an alarm back (`etcdctl alarm disarm`).
"""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide.common import mib, reason
from pgha.model.action import CompactStore
from pgha.model.decision import Memory, Reason
from pgha.model.observation import Observation, StoreCapacity

#: From which share of the quota on people are told, and from which on pgha compacts if nobody else does.
TELL_FROM = 0.5
COMPACT_FROM = 0.25
DAY_S = 86400.0
NO_SPACE = "NOSPACE"


def reasons(o: Observation) -> tuple[Reason, ...]:
    """For explain."""
    return (store_has_room(o), history_is_compacted(o))


def store_has_room(o: Observation) -> Reason:
    """How much of the quota is used, and which alarms the store has raised."""
    rule, capacity = "capacity.store_has_room", o.dcs.capacity
    if capacity is None or not capacity.quota_bytes:
        return reason(rule, True, "the store has not said how full it is")
    said = f"{mib(capacity.used_bytes)} of {mib(capacity.quota_bytes)} used ({used(capacity):.0%})"
    if capacity.alarms:
        said += f", alarms: {', '.join(capacity.alarms)}"
    if NO_SPACE in capacity.alarms:
        said += " (it refuses every write; needed on each member: etcdctl defrag, then once: etcdctl alarm disarm)"
    return reason(rule, used(capacity) < TELL_FROM and not capacity.alarms, said)


def history_is_compacted(o: Observation) -> Reason:
    """Does anybody compact the store's history?"""
    rule, capacity = "capacity.history_is_compacted", o.dcs.capacity
    if capacity is None:
        return reason(rule, True, "the store has not said how full it is")
    if capacity.compacted_at is not None:
        said = f"last compacted {_hours(uncompacted_s(o, capacity))} ago, up to revision {capacity.compact_revision}"
    else:
        said = f"not compacted in the {_hours(uncompacted_s(o, capacity))} that it was watched"
    if not o.settings.may_compact_store:
        return reason(rule, uncompacted_s(o, capacity) < 2 * DAY_S or used(capacity) < COMPACT_FROM, f"{said}; pgha must not (pgha.compaction is off)")
    return reason(rule, True, f"{said}; pgha does after a day from {COMPACT_FROM:.0%} of the quota on")


def used(capacity: StoreCapacity) -> float:
    """Share of the quota. A store that is out of space is full, whatever quota it is thought to have."""
    share = capacity.used_bytes / capacity.quota_bytes if capacity.quota_bytes else 0.0
    return max(1.0, share) if NO_SPACE in capacity.alarms else share


def uncompacted_s(o: Observation, capacity: StoreCapacity) -> float:
    """How long nobody has compacted, as far as this node knows."""
    return candidate_age_s(capacity.compacted_at or capacity.watched_since, o.now)


def compaction(o: Observation, memory: Memory) -> tuple[CompactStore | None, Memory]:
    """Forget what is older than a day, if a quarter of the quota is used and nobody has compacted for a day. Once for each
    revision: how full the store is is asked again minutes later only."""
    capacity = o.dcs.capacity
    if capacity is None or not o.settings.may_compact_store or not capacity.day_old_revision:
        return None, memory
    if uncompacted_s(o, capacity) < DAY_S or used(capacity) < COMPACT_FROM:
        return None, memory
    if capacity.day_old_revision <= max(capacity.compact_revision, memory.compacted_revision):
        return None, memory
    return CompactStore(revision=capacity.day_old_revision), replace(memory, compacted_revision=capacity.day_old_revision)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"

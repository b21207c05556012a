"""The store's capacity (decide/capacity.py): what is told, what is compacted, and that it is not said in every pass."""

from __future__ import annotations

import pytest
from decide_world import CANDIDATE, LEADER, MiB, ago, check, names, row
from msgspec.structs import replace

from pgha.decide import decide
from pgha.model.observation import StoreCapacity

DAY_S = 86400.0
OLD = StoreCapacity(asked_at=ago(1), watched_since=ago(2 * DAY_S), used_bytes=3 * MiB, quota_bytes=10 * MiB, day_old_revision=500)


@pytest.mark.parametrize("case", [
    row("nobody compacts", dcs__capacity=OLD, does="CompactStore", refuses="", says="not compacted in the 48.0 h that it was watched; pgha does after a day from 25% of the quota on"),
    row("somebody did a day and an hour ago", dcs__capacity=replace(OLD, compacted_at=ago(DAY_S + 3600), compact_revision=400), does="CompactStore", says="last compacted 25.0 h ago, up to revision 400"),
    row("somebody did today", dcs__capacity=replace(OLD, compacted_at=ago(3600), compact_revision=400), does="", refuses=""),
    row("watched for less than a day", dcs__capacity=replace(OLD, watched_since=ago(DAY_S - 60)), does=""),
    row("no revision is known to be a day old", dcs__capacity=replace(OLD, day_old_revision=0), does=""),
    row("a quarter is not used yet", dcs__capacity=replace(OLD, used_bytes=2 * MiB), does=""),
    row("pgha must not, and nobody does", dcs__capacity=OLD, settings__may_compact_store=False, does="", refuses="capacity.history_is_compacted", says="pgha must not (pgha.compaction is off)"),
    row("pgha must not, and somebody does", dcs__capacity=replace(OLD, compacted_at=ago(3600)), settings__may_compact_store=False, does="", refuses=""),
    row("half is used", dcs__capacity=replace(OLD, used_bytes=5 * MiB, compacted_at=ago(60)), does="", refuses="capacity.store_has_room", says="5.0 MiB of 10.0 MiB used (50%)"),
    row("out of space, whatever the quota is said to be", dcs__capacity=replace(OLD, used_bytes=MiB, alarms=("NOSPACE",)), does="CompactStore", refuses="capacity.store_has_room",
        says="alarms: NOSPACE (it refuses every write"),
    row("asked for already", dcs__capacity=OLD, memory__compacted_revision=500, does=""),
    row("a newer one is a day old by now", dcs__capacity=OLD, memory__compacted_revision=400, does="CompactStore"),
])
def test_what_a_leader_makes_of_it(case):
    check(LEADER, case)


def test_it_is_asked_for_once_not_in_every_pass_until_the_store_is_asked_again():
    world = LEADER.but(dcs__capacity=OLD)
    first = world.decide()
    assert names(first) == ("CompactStore",)
    assert names(decide(world.seen, first.memory)) == ()


def test_a_store_out_of_space_is_told_in_every_situation():
    """Nobody can take the lock then: explain says why, on the node that knows."""
    decision = CANDIDATE.but(dcs__capacity=replace(OLD, alarms=("NOSPACE",))).decide()
    assert decision.situation == "leaderless"
    assert [r.rule for r in decision.reasons if not r.holds and r.rule.startswith("capacity.")] == ["capacity.store_has_room"]

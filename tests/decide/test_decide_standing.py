"""Whose the lock is (decide/standing.py): every way that it can stand, and the moment at which each changes."""

from __future__ import annotations

from typing import Any

import pytest
from decide_world import BIRTH, CANDIDATE, LEADER, NOW, REPLICA, World, ago, ahead, peer, record, with_lock
from msgspec.structs import replace

from pgha.clock import Instant
from pgha.decide.standing import Whose, because, left_s, licensed, standing
from pgha.model.cluster import ClusterView
from pgha.model.lock import Licence, LicenceState


def seen(lock: Any, *, age_s: float = 2.0, **changes: Any) -> World:
    """b's view of this record, first seen so long ago."""
    return with_lock(REPLICA, lock, since=ago(age_s)).but(**changes)


def absent(for_s: float, **changes: Any) -> World:
    return with_lock(REPLICA, None, absent_since=ago(for_s)).but(**changes)


UNTRUSTED = {"dcs__trusted_from": ahead(20), "dcs__generation_changed": "revision went back"}

STANDINGS = [
    ("a valid licence", LEADER, Whose.MINE, "licence valid for 27.7 s", 0),
    ("a valid licence without a view", LEADER.but(dcs__view=None), Whose.MINE, "licence valid", 0),
    ("the licence ended a moment ago", LEADER.but(licence__valid_until=ago(0.001)), Whose.LIVE, "held by a", 28.3),
    ("never read", REPLICA.but(dcs__view=None), Whose.UNKNOWN, "not been read", 0),
    ("a take-over on the way", CANDIDATE.but(licence=Licence(state=LicenceState.ACQUIRING)), Whose.SETTLING, "not known yet", 0),
    ("another's, fresh", seen(record()), Whose.LIVE, "held by a, expires in 28.3 s", 28.3),
    ("another's, just not expired", seen(record(), age_s=30.29), Whose.LIVE, "expires in 0.0 s", 0.01),
    ("another's, just expired: ttl and what clocks may differ", seen(record(), age_s=30.31), Whose.FREE, "seen unchanged for 30.31 s, ttl 30 s", 0),
    ("the ttl is the record's own", seen(record(ttl_s=5.0), age_s=5.06), Whose.FREE, "ttl 5 s", 0),
    ("another's, since when is not known", with_lock(REPLICA.but(dcs__lock_seen__since=None), record()), Whose.LIVE, "expires in 30.3 s", 30.3),
    ("released", seen(record(mode="released"), age_s=0), Whose.FREE, "released by a", 0),
    ("released, store restored", seen(record(mode="released"), **UNTRUSTED), Whose.LIVE, "revision went back: no record is believed for another 20.0 s", 20),
    ("expired, store restored", seen(record(), age_s=99, **UNTRUSTED), Whose.LIVE, "no record is believed", 20),
    ("paused, long ago", seen(record(mode="paused"), age_s=9999), Whose.LIVE, "held by a in pause: does not expire", 1e9),
    ("nobody can read it", seen(record("", node_id="", incarnation="")), Whose.LIVE, "held by unknown", 28.3),
    ("nobody can read it, long enough", seen(record("", node_id="", incarnation=""), age_s=31), Whose.FREE, "unknown's record", 0),
    ("of this node's former process", seen(record("b", incarnation="run-0")), Whose.OWN_FORMER, "own record", 0),
    ("of this process, whose licence is forgotten", seen(record("b")), Whose.OWN_FORMER, "own record", 0),
    ("of this process, being released", seen(record("b"), licence=Licence(state=LicenceState.RELEASING)), Whose.LIVE, "held by b", 28.3),
    ("of this process, lost", seen(record("b"), licence=Licence(state=LicenceState.LOST)), Whose.LIVE, "held by b", 28.3),
    ("of this process, being released, expired", seen(record("b"), age_s=31, licence=Licence(state=LicenceState.RELEASING)), Whose.FREE, "b's record", 0),
    ("own, store restored", seen(record("b", incarnation="run-0"), **UNTRUSTED), Whose.LIVE, "no record is believed", 20),
    ("own, paused", seen(record("b", incarnation="run-0", mode="paused")), Whose.OWN_FORMER, "own record", 0),
    ("of this process, paused, after its licence was lost", seen(record("b", mode="paused"), licence=Licence(state=LicenceState.LOST)), Whose.OWN_FORMER, "own record", 0),
    ("of this process, held, after its licence was lost", seen(record("b"), licence=Licence(state=LicenceState.LOST)), Whose.LIVE, "held by b", 28.3),
    ("of another node of this name", seen(record("b", node_id="id-x")), Whose.IMPOSTOR, "another node (id id-x) holds the lock under the name b", 0),
    ("of another node of this name, expired", seen(record("b", node_id="id-x"), age_s=30.31), Whose.FREE, "b's record was seen unchanged", 0),
    ("of another node of this name, released", seen(record("b", node_id="id-x", mode="released")), Whose.FREE, "released by b", 0),
    ("of another node of this name, paused long ago", seen(record("b", node_id="id-x", mode="paused"), age_s=9999), Whose.IMPOSTOR, "another node", 0),
    ("of another node of this name, released, store restored", seen(record("b", node_id="id-x", mode="released"), **UNTRUSTED), Whose.LIVE, "no record is believed", 20),
    ("of another node of this name, expired, store restored", seen(record("b", node_id="id-x"), age_s=31, **UNTRUSTED), Whose.LIVE, "no record is believed", 20),
    ("nobody can read it, a longer ttl was seen once", seen(record("", node_id="", incarnation=""), age_s=31, dcs__remembered_ttl_s=60.0), Whose.LIVE, "held by unknown", 29.6),
    ("never initialised, but here is data", BIRTH.but(directory__state="valid"), Whose.ABSENT, "", 30.3),
    ("never initialised, but the store was rebuilt", BIRTH.but(**UNTRUSTED), Whose.ABSENT, "", 30.3),
    ("of this node under another name", seen(record("old-b", node_id="id-b", incarnation="run-0")), Whose.OWN_FORMER, "own record", 0),
    ("absent, not long", absent(29), Whose.ABSENT, "no record for 29.0 s, 30.3 s needed", 1.3),
    ("absent, long enough", absent(30.31), Whose.FREE, "no record for 30.3 s, 30.3 s needed", 0),
    ("absent, a longer ttl was seen once", absent(59, dcs__remembered_ttl_s=60.0), Whose.ABSENT, "60.6 s needed", 1.6),
    ("absent, a longer ttl is configured", absent(49, settings__ttl_s=50.0), Whose.ABSENT, "50.5 s needed", 1.5),
    ("absent, never less than 30 s", absent(29, settings__ttl_s=5.0, dcs__remembered_ttl_s=5.0), Whose.ABSENT, "30.3 s needed", 1.3),
    ("absent, store restored", absent(99, **UNTRUSTED), Whose.ABSENT, "no record", 20),
    ("absent, not read yet since when", with_lock(REPLICA, None), Whose.ABSENT, "no record for 0.0 s", 30.3),
    ("never initialised", BIRTH, Whose.NEVER, "never initialised", 0),
    ("never initialised, but a peer has data", BIRTH.but(peers={"a": peer("a")}), Whose.ABSENT, "no record", 30.3),
    ("never initialised, a peer answers without data", BIRTH.but(peers={"a": peer("a", system_identifier="")}), Whose.NEVER, "", 0),
    ("never initialised, but a lock was seen once", BIRTH.but(dcs__remembered_ttl_s=30.0), Whose.ABSENT, "", 30.3),
    ("never initialised, but there was an epoch", BIRTH.but(dcs__view__epoch__number=1), Whose.ABSENT, "", 30.3),
    ("being initialised", BIRTH.but(dcs__view=ClusterView(revision=2, initialize="")), Whose.ABSENT, "", 30.3),
]


@pytest.mark.parametrize("name, world, whose, says, left", STANDINGS, ids=[row[0] for row in STANDINGS])
def test_standing(name, world, whose, says, left):
    now = standing(world.seen)
    assert (now.whose, now.left_s) == (whose, pytest.approx(left, abs=0.005)), now
    assert says in now.because
    assert because(now).rule == f"standing.{whose}"
    assert because(now).because == now.because
    assert now.holder == (now.record.holder if now.record else "")


def test_a_candidate_measures_by_the_raw_clock_and_a_holder_by_the_one_that_went_further():
    """A suspend makes a holder give up early and a candidate wait longer (safety model 15)."""
    slept = Instant(NOW.boot_ns + 40_000_000_000, NOW.raw_ns)
    assert standing(replace(REPLICA.seen, now=slept)).whose is Whose.LIVE
    assert not licensed(replace(LEADER.seen, now=slept))


@pytest.mark.parametrize("state", [s for s in LicenceState if s is not LicenceState.HELD])
def test_only_a_held_licence_counts(state):
    assert not licensed(LEADER.but(licence__state=state).seen)


def test_what_is_left_of_a_licence():
    assert left_s(LEADER.seen) == pytest.approx(27.7)
    assert left_s(LEADER.but(licence__valid_until=ago(1)).seen) == 0
    assert left_s(REPLICA.seen) == 0
    assert not licensed(LEADER.but(licence__valid_until=NOW).seen)

"""The checker itself: what it must find, and what it must not take for a fault."""

from __future__ import annotations

import pytest
from chaos_clients import Exposed, judge, longest_gap
from chaos_faults import AGENT, FAULTS, GUARD, together
from chaos_run import plan
from history import Ack

S = 1_000_000
MIB = 1 << 20


def ack(node, at_s, *, timeline=1, lsn=None):
    at_us = round(at_s * S)
    return Ack("plain", node, at_us, timeline, at_us if lsn is None else lsn, 0, at_us - 500, at_us - 1000, at_us, at_us)


def reign(node, from_s, until_s, *, timeline, rows=50, bytes_a_row=1000):
    step = (until_s - from_s) / rows
    return [ack(node, from_s + i * step, timeline=timeline, lsn=i * bytes_a_row) for i in range(rows)]


OLD, NEW = reign("a", 0, 50, timeline=1), reign("b", 60, 70, timeline=2)


def but(*lost):
    return {a.id for a in (*OLD, *NEW)} - {a.id for a in lost}


@pytest.mark.parametrize(("present", "durable", "says"), [
    pytest.param(but(), True, "", id="nothing lost"),
    pytest.param(but(OLD[-1]), True, "lost in a synchronous mode", id="the last row, synchronous"),
    pytest.param(but(OLD[-1]), False, "", id="the last row, asynchronous"),
    pytest.param(but(*OLD[-7:]), False, "", id="all of the last 1.5 ttl"),
    pytest.param(but(*OLD[-20:]), False, "", id="less than the permitted lag before that"),
])
def test_what_may_be_lost(present, durable, says):
    found = judge(OLD + NEW, present, durable=durable, ttl_s=5).violations
    assert len(found) == bool(says)
    assert all(says in text for text in found)


def test_more_than_the_permitted_lag_is_a_violation():
    old = reign("a", 0, 50, timeline=1, bytes_a_row=MIB // 2)
    present = {a.id for a in old[:38]} | {a.id for a in NEW}
    (found,) = judge(old + NEW, present, durable=False, ttl_s=5).violations
    assert "rows of timeline 1 are lost" in found
    assert not judge(old + NEW, present | {a.id for a in old[:41]}, durable=False, ttl_s=5).violations


def test_two_writers_are_a_violation_unless_agent_and_guard_were_gone():
    both = [*OLD, *reign("a", 60.505, 64.005, timeline=1), *NEW]
    present = {a.id for a in (*OLD, *NEW)}
    assert len(judge(both, present, durable=False, ttl_s=30).violations) == 1
    exposed = Exposed("a", 49 * S, 66 * S)
    found = judge(both, present, durable=False, ttl_s=30, exposed=[exposed])
    assert not found.violations
    ((node, seconds, lost),) = found.exposures
    assert (node, lost) == ("a", 50)
    assert 3.9 < seconds < 4.1


@pytest.mark.parametrize("exposed", [Exposed("b", 49 * S, 66 * S), Exposed("a", 49 * S, 62 * S)])
def test_an_exposure_excuses_only_its_node_and_time(exposed):
    both = [*OLD, *reign("a", 60.505, 64.005, timeline=1), *NEW]
    assert judge(both, {a.id for a in both}, durable=False, ttl_s=30, exposed=[exposed]).violations


def test_a_synchronous_row_is_not_excused_by_an_exposure():
    exposed = Exposed("a", 49 * S, 66 * S)
    assert judge(OLD + NEW, but(OLD[-1]), durable=True, ttl_s=5, exposed=[exposed]).violations


def test_longest_gap_counts_what_overlaps():
    moments = [0, 1 * S, 5 * S, 6 * S, 20 * S]
    assert longest_gap(moments, 0, 4 * S) == 4
    assert longest_gap(moments, 5_500_000, 7 * S) == 14
    assert longest_gap([], 0, S) == 0


def test_a_plan_follows_from_its_seed_and_has_every_kind():
    def first(seed, rounds):
        plans = plan(seed, 5, list(FAULTS.values()))
        return [next(plans) for _ in range(rounds)]

    assert first(7, 50) == first(7, 50)
    assert first(7, 50) != first(8, 50)
    assert {fault.kind for each in first(7, 50) for fault in each} == FAULTS.keys()


def test_no_plan_takes_agent_and_guard_away_by_two_faults():
    plans = plan(3, 5, list(FAULTS.values()))
    for _ in range(2000):
        touching = [f for f in next(plans) if FAULTS[f.kind].touches & (AGENT | GUARD)]
        assert len(touching) <= 1, touching


def test_faults_that_may_not_come_together():
    assert not together(FAULTS["agent stopped"], FAULTS["guard stopped"])
    assert not together(FAULTS["disk hangs"], FAULTS["power lost"])
    assert not together(FAULTS["etcd leader killed"], FAULTS["all etcd killed"])
    assert together(FAULTS["agent stopped"], FAULTS["cut off from everything"])

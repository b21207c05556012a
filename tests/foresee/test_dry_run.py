"""What an agent says that it would do, and what would refuse (foresee/dry_run.py): the rules of decide/ on what it sees now.

That it is what then happens: test_dry_run_foretold.py, and tests/cluster/test_cluster_explain.py.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from pgha.foresee import dry_run
from pgha.foresee.dry_run import DryRun
from pgha.model.cluster import Tags
from pgha.model.lock import Licence
from tests.decide.decide_world import CANDIDATE, LEADER, LSN, REPLICA, MiB, peer, silent

ACT = "\n".join(path.read_text() for path in (Path(__file__).parents[2] / "pgha").glob("*/*.py") if path.parent.name in ("act", "decide")) \
    + (Path(__file__).parents[2] / "pgha/agent.py").read_text()


def move(world, *, leader="a", candidate="b", command="switchover", **key) -> DryRun:
    return dry_run.move(command, world.seen, world.memory, leader=leader, candidate=candidate, key={"leader": leader, "member": candidate, **key})


def rules(said):
    return {r.rule: r.because for r in said.refused_by}


def names(said):
    return [step.step for step in said.steps]


# --- switchover ------------------------------------------------------------------------------------------------------------

def test_a_switchover_that_would_be_done():
    said = move(LEADER)
    assert (said.would, said.refused_by, said.node) == (True, (), "a")
    assert names(said) == ["checkpoint", "demote", "wait", "sweep", "release", "freeze", "acquire", "promote", "follow", "rejoin"]
    assert [step.who for step in said.steps] == ["a", "a", "a", "a", "a", "b", "b", "b", "c", "a"]
    assert said.facts["candidates"]["b"]["lag_bytes"] == 0


def test_without_a_candidate_the_best_one_is_named():
    said = move(LEADER.but(peers__c=peer("c", tags=Tags(failover_priority=5))), candidate="")
    assert said.facts["candidate"] == "c"
    assert [step.who for step in said.steps if step.step == "promote"] == ["c"]
    behind = move(LEADER.but(peers__b=peer("b", lsn=LSN - 1)), candidate="")
    assert behind.facts["candidate"] == "c"


def test_before_stop_comes_first():
    assert names(move(LEADER.but(settings__before_stop_s=30.0)))[0] == "before_stop"


REFUSALS = [
    ("the candidate lags", {"peers__b": peer("b", lsn=LSN - 20 * MiB)}, {}, "switchover.has_good_candidate", "lag 20.0 MiB, limit 1.0 MiB"),
    ("the candidate has a tag", {"peers__b": peer("b", tags=Tags(nofailover=True))}, {}, "switchover.has_good_candidate", "tag nofailover is set"),
    ("two obstacles at once", {"peers__b": peer("b", lsn=LSN - 20 * MiB, tags=Tags(nofailover=True))}, {}, "switchover.has_good_candidate", "tag nofailover is set, lag 20.0 MiB"),
    ("the candidate is silent", {"peers__b": silent("b")}, {}, "switchover.has_good_candidate", "does not answer"),
    ("there is none of that name", {}, {"candidate": "x"}, "switchover.has_good_candidate", "is no member"),
    ("the candidate leads", {}, {"candidate": "a"}, "switchover.names_another_candidate", "the leader is a"),
    ("another is said to lead", {}, {"leader": "c"}, "switchover.names_this_leader", "the leader is a"),
    ("nobody is named, in pause", {"settings__pause": True}, {"candidate": ""}, "switchover.names_somebody_in_pause", "not possible in pause"),
]


@pytest.mark.parametrize(("name", "changes", "asked", "rule", "because"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_what_refuses_a_switchover(name, changes, asked, rule, because):
    said = move(LEADER.but(**changes), **asked)
    assert (said.would, said.steps) == (False, ())
    assert because in rules(said)[rule]


def test_several_obstacles_are_all_named():
    said = move(LEADER.but(settings__pause=True, peers={"b": silent("b"), "c": silent("c")}), candidate="")
    assert set(rules(said)) == {"switchover.names_somebody_in_pause", "switchover.has_good_candidate"}


def test_a_failover_is_judged_by_its_candidate_where_nobody_leads():
    said = move(CANDIDATE, leader="", command="failover")
    assert (said.would, names(said)) == (True, ["freeze", "acquire", "promote"])
    refused = move(CANDIDATE.but(guard__reachable=False, watchdog__failed=True), leader="", command="failover")
    assert set(rules(refused)) == {"restart.guard_answers", "promotion.watchdog_is_usable"}


def test_it_waits_for_a_lock_that_expires():
    said = move(REPLICA, leader="", command="failover")
    assert (said.would, names(said)[0]) == (True, "wait")
    assert said.facts["lock_free_in_s"] == pytest.approx(28.3)


def test_whoever_neither_leads_nor_is_the_candidate_cannot_say():
    said = move(REPLICA, candidate="c")
    assert (said.would, list(rules(said))) == (False, ["dry_run.is_the_one_to_ask"])


def test_before_the_store_was_read_nobody_can():
    assert list(rules(move(LEADER.but(dcs__view=None)))) == ["dry_run.store_was_read"]


# --- restart, reinitialize ---------------------------------------------------------------------------------------------------

def test_a_restart_of_the_primary():
    said = dry_run.restart(LEADER.seen, LEADER.memory, {})
    assert (said.would, names(said)) == (True, ["checkpoint", "stop", "start"])
    assert "starting as primary" in said.steps[-1].says


def test_a_restart_of_a_standby():
    said = dry_run.restart(REPLICA.seen, REPLICA.memory, {})
    assert (said.would, names(said), said.steps[-1].says) == (True, ["checkpoint", "stop", "start"], "starting as a standby of a")


def test_conditions_of_a_restart():
    said = dry_run.restart(REPLICA.seen, REPLICA.memory, {"role": "primary", "restart_pending": True})
    assert rules(said) == {"asked.has_role": "asked of a primary, this is a replica", "asked.restart_is_pending": "nothing waits for a restart"}
    later = dry_run.restart(REPLICA.seen, REPLICA.memory, {"schedule": "2099-01-01T00:00:00+00:00", "restart_pending": True})
    assert (later.would, names(later)) == (True, ["schedule"])


def test_a_leader_is_not_reinitialized():
    said = dry_run.reinitialize(LEADER.seen, LEADER.memory, {})
    assert (said.would, list(rules(said)), said.facts["answer"]) == (False, ["reinit.is_not_leader", "reinit.has_leader"], "I am the leader, can not reinitialize")


def test_a_replica_is():
    said = dry_run.reinitialize(REPLICA.seen, REPLICA.memory, {"from_leader": True})
    assert (said.would, names(said)) == (True, ["ask", "leave_sync", "stop", "copy", "rejoin", "delete"])
    assert said.facts["source"] == "a"


def test_without_a_leader_nobody_is():
    said = dry_run.reinitialize(CANDIDATE.seen, CANDIDATE.memory, {})
    assert (said.would, "reinit.has_leader" in rules(said)) == (False, True)


# --- all -------------------------------------------------------------------------------------------------------------------

def test_steps_are_named_as_they_are_logged():
    """What comes before a colon, a semicolon or a name is in the program's own words."""
    runs = [move(LEADER.but(settings__before_stop_s=30.0)), move(CANDIDATE, leader="", command="failover"), dry_run.restart(LEADER.seen, LEADER.memory, {}),
            dry_run.restart(REPLICA.seen, REPLICA.memory, {}), dry_run.reinitialize(REPLICA.seen, REPLICA.memory, {})]
    own = {"wait", "leave_sync"}       # of which nothing is logged by itself
    for step in [step for said in runs for step in said.steps if step.step not in own]:
        words = step.says.split(":")[0].split(";")[0].split(",")[0]
        words = words.removesuffix(" a").removesuffix(" b").removesuffix(" to a new timeline").removesuffix(" (b)")
        assert words in ACT, step


def test_nothing_that_is_asked_changes_what_is_seen():
    before = msgspec.json.encode(LEADER.seen), msgspec.json.encode(LEADER.memory)
    move(LEADER)
    dry_run.restart(LEADER.seen, LEADER.memory, {})
    dry_run.reinitialize(LEADER.seen, LEADER.memory, {})
    assert (msgspec.json.encode(LEADER.seen), msgspec.json.encode(LEADER.memory)) == before


def test_it_is_judged_for_now_and_never_raises_for_a_licence_that_ended():
    ended = LEADER.but(licence=Licence())
    assert move(ended).would is False
    assert replace(move(ended), node="") != move(LEADER)

"""What holds of every decision, whatever was observed: thousands of worlds by chance, each seed the same every time."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import decide_world as w
import pytest
from decide_anything import SYNCHRONOUS, TAKEN, mixed, paused_or_promised, world

from pgha.clock import candidate_age_s, remaining_s
from pgha.decide.standing import ABSENCE_S, Whose, standing
from pgha.model.action import (
    AcquireLock,
    AnswerRequest,
    Bootstrap,
    CancelOperation,
    Clone,
    Demote,
    LongAction,
    MaintainSlots,
    Promote,
    QuickAction,
    ReleaseLock,
    Restart,
    RestoreStandbySignal,
    SetSynchronousNames,
    StartPrimary,
    StartStandby,
    Stop,
    WriteKey,
)
from pgha.model.cluster import Tags, slot_name
from pgha.model.decision import Decision
from pgha.model.lock import LicenceState, wait_s
from pgha.model.synchronous import Promise, covers, parse_requirement

SEEDS = range(16)
EACH = 400


def cases(seed: int):
    chance = Random(seed)
    for _ in range(EACH):
        found = world(chance)
        yield found, found.decide()


def licensed(case: w.World) -> bool:
    licence = case.seen.licence
    return licence.state is LicenceState.HELD and licence.valid_until is not None and remaining_s(licence.valid_until, w.NOW) > 0


def makes_primary(action: object) -> bool:
    return isinstance(action, StartPrimary | Promote) or (isinstance(action, Restart) and action.as_primary)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_decision_is_whole_and_safe(seed):
    for case, decision in cases(seed):
        _is_safe(case, decision, (seed, decision.situation, decision.summary, decision.actions))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_decision_in_pause_or_beside_a_promise_is_whole_and_safe(seed):
    chance = Random(f"{seed}/modes")
    for _ in range(EACH):
        case = paused_or_promised(chance)
        decision = case.decide()
        o, because = case.seen, (seed, decision.situation, decision.summary, decision.actions)
        _is_safe(case, decision, because)
        for action in decision.actions:
            if isinstance(action, AcquireLock) and action.initialize_revision is None:
                promise = o.failsafe.promise
                assert promise is None or not promise.binds(o.dcs.lock_seen.record, o.now), because
            if o.licence.endless and o.settings.pause and o.postgres.is_primary and isinstance(action, Demote | Stop):
                # What ends a primary in pause: an operator's word, and nothing else that this node sees or does not see.
                assert o.dcs.view is not None, because
                assert not o.dcs.view.failover.empty, because


@pytest.mark.parametrize("seed", SEEDS)
def test_every_decision_of_a_mixed_cluster_heeds_the_key_leader(seed):
    chance = Random(f"{seed}/mixed")
    for _ in range(EACH):
        case = mixed(chance)
        decision = case.decide()
        o, because = case.seen, (seed, decision.situation, decision.summary, decision.actions)
        _is_whole(case, decision)
        for action in decision.actions:
            if makes_primary(action):
                assert licensed(case), because
            if isinstance(action, AcquireLock) and action.initialize_revision is None:
                view = o.dcs.view
                assert view is not None, because
                assert view.leader_lease == 0 or view.leader == o.me.name, because
                assert action.mixed is (view.lock is not None and view.lock.mixed if action.readopt else o.settings.mixed), because
                assert action.also_unchanged.get("leader", -1) == view.revision_of("leader") or (action.readopt and not action.mixed), because
                adopted = view.leader_lease != 0 and not action.readopt
                assert not adopted or o.postgres.is_primary, because
                assert not (action.readopt and action.mixed) or view.leader == o.me.name, because


def _is_safe(case: w.World, decision: Decision, because: object) -> None:
    o = case.seen
    _is_whole(case, decision)
    for action in decision.actions:
        if makes_primary(action):
            assert licensed(case), because
            assert o.licence.acquired_pass < o.number or o.number == 1, because
            assert decision.mandate.until is not None, because
        if isinstance(action, StartPrimary | StartStandby) and decision.situation != "blind":
            assert not o.directory.rewind_interrupted, because
        if isinstance(action, Clone):
            _may_copy(case, action, because)
        if isinstance(action, AcquireLock):
            _may_acquire(case, action, because)
        if isinstance(action, ReleaseLock):
            assert not o.postgres.alive, because
        if isinstance(action, Bootstrap):
            assert o.dcs.view is not None, because
            assert o.dcs.view.lock is None, because
            assert o.dcs.view.initialize is None, because
        if isinstance(action, WriteKey) and action.key != "failover":
            assert licensed(case), because
            assert action.epoch_revision == o.licence.epoch_revision, because
        if isinstance(action, RestoreStandbySignal):
            assert o.directory.state == "valid", because
        if isinstance(action, SetSynchronousNames):
            _is_covered(case, decision, because)
        if isinstance(action, MaintainSlots):
            _keeps_what_is_to_be_kept(case, action, because)
        if isinstance(action, WriteKey) and action.key == "sync":
            assert action.if_revision == case.seen.dcs.view.revision_of("sync"), because
    if o.postgres.is_primary and not licensed(case) and o.operation is None and not decision.actions:
        # In pause a primary whose record is gone runs on, until absence has proved that nobody else has the lock.
        waits = (Whose.UNKNOWN, Whose.SETTLING, Whose.ABSENT) if decision.situation == "paused" else (Whose.UNKNOWN, Whose.SETTLING)
        assert standing(o).whose in waits or decision.situation == "stopping", because


def _may_copy(case: w.World, action: Clone, because: object) -> None:
    """Nothing is replaced beside a lock of this node's own, nor under a server that runs; what is another cluster's, never."""
    o = case.seen
    assert not licensed(case), because
    assert not o.postgres.alive, because
    assert o.dcs.view is not None, because
    if action.source is None:       # from a backup: nobody leads, nobody else has data, and nothing of this node's own is replaced
        assert standing(o).whose in (Whose.FREE, Whose.NEVER, Whose.OWN_FORMER), because
        assert not any(p.answered and p.system_identifier and not p.tags.nofailover for p in o.peers.values()), because
        assert action.replace == "nothing_there", because
        assert set(action.methods) <= set(o.settings.leaderless_methods), because
    else:
        assert standing(o).whose is Whose.LIVE, because
    assert action.system_identifier == o.dcs.view.initialize, because
    if action.replace != "nothing_there":
        assert o.directory.state in ("valid", "missing", "empty"), because
        assert o.directory.control is None or o.directory.control.system_identifier == o.dcs.view.initialize, because
        assert o.upstream is not None, because
        assert o.upstream.ok, because
        assert not o.upstream.in_recovery, because


def _keeps_what_is_to_be_kept(case: w.World, action: MaintainSlots, because: object) -> None:
    """Of slots only physical ones that nobody uses go; a permanent one only for one of the same name that keeps something."""
    o = case.seen
    assert o.postgres.row is not None, because
    found = {s.name: s for s in o.postgres.row.slots}
    for name in action.drop:
        assert found[name].type == "physical", because
        assert not found[name].active, because
        assert not o.settings.pause, because
        assert o.settings.may_drop_slots, because
        assert not any(m.name in ("", name) and m.type in ("", "physical") and not (m.database or m.plugin) for m in o.settings.ignored_slots), because
        if name in o.settings.permanent_slots and name != slot_name(o.me.name):
            assert name in action.create, because
            assert found[name].wal_status == "lost" or not found[name].restart_lsn, because
    for name, lsn in action.advance:
        assert not found[name].active, because
        assert found[name].restart_lsn < lsn <= max(o.postgres.row.lsn, o.postgres.row.replayed_lsn), because
        assert o.postgres.row.in_recovery or name not in o.settings.permanent_slots or name in {slot_name(m) for m in o.dcs.view.members}, because


def _is_covered(case: w.World, decision: Decision, because: object) -> None:
    """What commits wait for never falls short of what `/sync` may say, and is not touched by a pass that ends the primary."""
    action, view = w.only(decision, SetSynchronousNames), case.seen.dcs.view
    assert view is not None, because
    assert not any(isinstance(a, Demote | Stop | StartPrimary) for a in decision.actions), because
    assert licensed(case), because
    if case.seen.postgres.row is None or case.seen.postgres.row.in_recovery or not view.sync.leader:
        return
    if view.sync.leader.lower() == case.seen.me.name.lower():
        voters = frozenset(name.lower() for name in view.sync.members) - {case.seen.me.name.lower()}
        required = parse_requirement(action.names or "")
        assert covers(Promise(voters=voters, quorum=min(view.sync.quorum, len(voters)) if voters else 0), required), because


def _is_whole(case: w.World, decision: Decision) -> None:
    assert decision.summary, decision
    assert decision.state, decision
    assert decision.role, decision
    assert 0 <= decision.wake_in_s <= 60, decision
    long = [a for a in decision.actions if isinstance(a, LongAction)]
    assert len(long) <= 1, decision.actions
    assert not long or decision.actions[-1] is long[0], "a long operation is begun last"
    assert all(isinstance(a, QuickAction | LongAction) for a in decision.actions)
    if case.seen.operation is not None:
        assert all(isinstance(a, CancelOperation | AnswerRequest) for a in decision.actions), decision.actions
    for reason in decision.reasons:
        assert reason.rule.count(".") == 1, reason
        assert reason.because or reason.rule == "broken.control_is_readable", reason       # there observe/ says why
    if decision.summary.startswith("not taking the lock"):
        assert not any(isinstance(a, AcquireLock) for a in decision.actions)
        assert all(r.because in decision.summary for r in decision.reasons if not r.holds and r.rule != "restart.read_in_this_pass" and not r.rule.startswith(("asked.", "reinit."))), decision
    if not licensed(case):
        assert decision.mandate.kind == "none", decision.mandate
    elif decision.mandate.kind == "paused":
        assert case.seen.licence.endless, decision.mandate
    elif decision.mandate.until is not None:
        assert remaining_s(decision.mandate.until, w.NOW) <= min(case.seen.settings.ttl_s, 3 * case.seen.settings.loop_wait_s), decision.mandate


def _may_acquire(case: w.World, action: AcquireLock, because: object) -> None:
    o, view = case.seen, case.seen.dcs.view
    assert view is not None, because
    assert not licensed(case), because
    if action.initialize_revision is not None:
        assert view.lock is None, because
        made = case.seen.ended.facts.get("initialize_revision") if case.seen.ended else None
        claim = (case.memory.bootstrap_revision, made) if view.initialize is not None else (0,)
        assert action.initialize_revision in claim, because
        return
    now = standing(o)
    assert now.whose not in TAKEN, because
    assert (action.lock_revision, action.lock_value) == (view.lock_revision, view.lock_value), because
    assert o.dcs.read_at is not None, because
    lock, seen = view.lock, o.dcs.lock_seen
    untrusted = o.dcs.trusted_from is not None and remaining_s(o.dcs.trusted_from, w.NOW) > 0
    assert not untrusted, because
    if lock is None:
        if now.whose is not Whose.NEVER:
            since = seen.absent_since
            assert since is not None, because
            assert candidate_age_s(since, w.NOW) >= wait_s(max(o.dcs.remembered_ttl_s, o.settings.ttl_s, ABSENCE_S)), because
        return
    own = lock.node_id == o.me.node_id
    if action.readopt:
        assert own, because
    elif not own and lock.mode != "released":
        said_down = (view.failover.candidate, view.failover.down_incarnation, view.failover.down_sequence) == (o.me.name, lock.incarnation, lock.sequence)
        assert lock.mode != "paused" or said_down, because
        assert seen.since is not None, because
        assert candidate_age_s(seen.since, w.NOW) >= wait_s(lock.ttl_s), because
    if not action.readopt:
        assert action.claim_timeline > max(view.timeline, view.epoch.timeline), because
        assert o.postgres.row is not None, because
        assert o.postgres.row.in_recovery, because


@pytest.mark.parametrize("seed", SEEDS)
def test_the_synchronous_set_of_any_leader_or_winner(seed):
    chance = Random(f"{seed}/synchronous")
    for _ in range(EACH):
        case = chance.choice((w.LEADER, w.LEADER, w.WINNER, w.CRASHED)).but(settings__synchronous_mode=chance.choice(("on", "quorum")))
        for _ in range(chance.randrange(1, 8)):
            path, values = chance.choice(SYNCHRONOUS)
            if not path.startswith("postgres__row") or case.seen.postgres.row is not None:
                case = case.but(**{path: values(chance)})
        decision = case.decide()
        because = (seed, decision.summary, decision.actions, [r for r in decision.reasons if not r.holds])
        _is_whole(case, decision)
        view = case.seen.dcs.view
        names = [a.names for a in decision.actions if isinstance(a, SetSynchronousNames)] + [a.synchronous_names for a in decision.actions if isinstance(a, StartPrimary | Promote)]
        assert len([a for a in decision.actions if isinstance(a, SetSynchronousNames) or (isinstance(a, WriteKey) and a.key == "sync")]) <= (2 if case.seen.postgres.row and case.seen.postgres.row.in_recovery else 1)
        if names and view.sync.leader and not (case.seen.settings.synchronous_mode == "off" and isinstance(decision.actions[0], WriteKey)):
            required = parse_requirement(names[-1] or "")
            me, leader = case.seen.me.name.lower(), view.sync.leader.lower()
            voters = frozenset(n.lower() for n in view.sync.members)
            voters = (voters | ({leader} if me in voters and leader != me else frozenset())) - {me}
            assert covers(Promise(voters=voters, quorum=min(view.sync.quorum, len(voters)) if voters else 0), required), because


def test_whatever_begins_a_primary_asks_for_a_later_pass_than_the_acquisition():
    for here in (w.WINNER, w.CRASHED):
        assert not any(makes_primary(action) for action in here.but(licence__acquired_pass=w.PASS).decide().actions)


def test_the_worlds_by_chance_reach_every_situation_and_nearly_every_action():
    """Else the properties above would say nothing."""
    situations: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    for seed in SEEDS:
        for _, decision in cases(seed):
            situations[decision.situation] += 1
            actions.update(w.names(decision))
    assert set(situations) >= {"busy", "stopping", "foreign", "lease", "blind", "empty", "broken", "leading", "leaderless", "following"}, situations
    assert min(situations.values()) > 20, situations
    wanted = {"AcquireLock", "ReleaseLock", "WriteKey", "WriteInitialize", "Freeze", "Follow", "MaintainSlots", "RestoreStandbySignal", "ReadCluster", "Bootstrap", "Clone",
              "StartStandby", "StartPrimary", "Promote", "Demote", "Stop", "Restart", "InspectUpstream", "InspectEndOfWal", "Sweep", "CancelOperation", "ApplyConfiguration", "SetSynchronousNames"}
    assert set(actions) >= wanted, wanted - set(actions)


def test_the_same_pass_decides_the_same():
    chance = Random(1)
    for _ in range(200):
        case = world(chance)
        assert case.decide() == case.decide()


def test_what_is_written_is_json():
    for seed in SEEDS:
        for _, decision in cases(seed):
            for action in decision.actions:
                if isinstance(action, WriteKey) and action.value is not None:
                    json.loads(action.value)


def test_a_demotion_that_releases_is_one_of_a_holder_or_of_an_agent_that_stops():
    for seed in SEEDS:
        for case, decision in cases(seed):
            for action in decision.actions:
                if isinstance(action, Demote) and action.release:
                    assert licensed(case) or decision.situation == "stopping"


def test_an_endless_priority_of_a_member_is_none():
    assert Tags.of({"failover_priority": json.loads("1e999")}).failover_priority == 1


def test_a_conninfo_of_others_ends_nothing():
    REPLICA_OF_NONSENSE.decide()


REPLICA_OF_NONSENSE = w.REPLICA.but(postgres__row__primary_conninfo="host=a port=²")

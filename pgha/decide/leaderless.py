"""Nobody holds the lock, or nobody is known to: the election (safety model 6)."""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide import cramped, mixed, promotion, restart
from pgha.decide.common import NONSENSE_AHEAD, ask_others, fresh_peers, own_history, reason, view_of
from pgha.decide.standing import Standing, Whose, because, standing
from pgha.model.action import AcquireLock, Action, Freeze, ReadCluster, WriteKey
from pgha.model.decision import Decision, Election, Memory, Reason, Vote
from pgha.model.observation import Observation
from pgha.model.wal import format_lsn

READ_ABSENCE_EVERY_S = 1.0
FREEZE_SETTLES_S = 0.05
FREEZE_AGAIN_S = 1.0
REPLAY_STANDS_S = 0.5


def decide(o: Observation, memory: Memory) -> Decision | None:
    now = standing(o)
    if now.whose in (Whose.ABSENT, Whose.SETTLING, Whose.UNKNOWN):
        # Absence counts only by reads; the watch says nothing of what is not there.
        old = o.dcs.read_at is None or candidate_age_s(o.dcs.read_at, o.now) > READ_ABSENCE_EVERY_S
        return Decision(situation="leaderless", summary=f"waiting: {now.because}", reasons=(because(now),), memory=memory, ask_peers=ask_others(o, every_s=1.0), vote=_moving(o),
                        actions=(ReadCluster(),) if old else (), wake_in_s=min(0.5, now.left_s) if now.left_s else 0.2)
    if now.whose not in (Whose.FREE, Whose.NEVER, Whose.OWN_FORMER):
        return None
    if now.whose is Whose.NEVER and view_of(o).initialize == "":
        return Decision(situation="leaderless", summary="waiting for leader to bootstrap", reasons=(because(now),), memory=memory, wake_in_s=0.5)
    room = cramped.has_room(o)
    if not room.holds:      # frozen it stays at what it has, and it could not be promoted
        return Decision(situation="leaderless", summary=f"restarting to take part in the election: {room.because}", reasons=(because(now), room), memory=memory, vote=_moving(o),
                        actions=(cramped.restart(o),))
    read = restart.read_in_this_pass(o)
    if not read.holds and not _is_in_election(o, memory):
        return Decision(situation="leaderless", summary=f"the lock is free: {now.because}; reading the cluster", reasons=(because(now), read),
                        actions=(ReadCluster(),), memory=memory, ask_peers=ask_others(o, epoch=view_of(o).epoch.number), vote=_moving(o), wake_in_s=0.2)
    return _elect(o, _with_election(o, memory), now, read)


def _moving(o: Observation) -> Vote:
    """No vote yet, but a position: who is asked in this moment and told none looks as if it had nothing, and whoever has
    less would take the lock before it."""
    at = promotion.own_position(o)
    return Vote(epoch=-1, timeline=at.timeline, lsn=at.lsn)


def _is_in_election(o: Observation, memory: Memory) -> bool:
    """Is this node in the election for just this record already?"""
    view, election = view_of(o), memory.election
    return election is not None and election.epoch == view.epoch.number and election.lock_revision == view.lock_revision


def _with_election(o: Observation, memory: Memory) -> Memory:
    """The memory with this election in it: begun anew when another epoch or record is at stake."""
    view, election = view_of(o), memory.election
    if election is None or not _is_in_election(o, memory):
        frozen_at = election.frozen_at if election is not None and election.epoch == view.epoch.number else None
        election = Election(epoch=view.epoch.number, lock_revision=view.lock_revision, began_at=o.now, frozen_at=frozen_at)
    return replace(memory, election=election)


def _elect(o: Observation, memory: Memory, now: Standing, read: Reason) -> Decision:
    election = memory.election
    assert election is not None
    own = promotion.conditions(o, memory)
    receiver_gone = position_is_final(o, election)
    if election.frozen_at is not None and still_set(o, election):
        # The freeze has failed, or was overwritten: without it there is no vote of this node, ever.
        election = replace(election, frozen_at=o.now, voted_at=None)
        return Decision(situation="leaderless", summary="election: the upstream is still set, freezing again", reasons=(because(now), receiver_gone),
                        actions=(Freeze(epoch=election.epoch),), memory=replace(memory, election=election), ask_peers=ask_others(o, epoch=election.epoch), wake_in_s=0.2)
    election = _watch_position(o, election)
    memory = replace(memory, election=election)
    receiver_gone = position_is_final(o, election)
    if receiver_gone.holds and election.frozen_at and election.voted_at is None:
        election = replace(election, voted_at=o.now)
        memory = replace(memory, election=election)
    at = promotion.own_position(o)
    vote = Vote(epoch=election.epoch if election.voted_at else -1, timeline=at.timeline, lsn=at.lsn, candidate=all(r.holds for r in own),
                history=own_history(o, at.timeline) or ())
    ask = ask_others(o, epoch=election.epoch, every_s=0.05)
    decision = Decision(situation="leaderless", summary="", reasons=(because(now), read, *own, receiver_gone), memory=memory, ask_peers=ask, vote=vote,
                        wake_in_s=0.05)
    actions: tuple[Action, ...]
    if election.frozen_at is None and promotion.in_recovery(o).holds:
        election = replace(election, frozen_at=o.now)
        actions = (Freeze(epoch=election.epoch),)
        return replace(decision, summary="election: stopped streaming, so that the position is final", actions=actions, memory=replace(memory, election=election))
    ended = mixed.former_primary_has_ended(o, election, chosen=promotion.manually_chosen(o))
    peers = (*promotion.peer_conditions(o, election), *([ended] if ended is not None else []))
    reasons = (*decision.reasons, *peers)
    obstacles = [r for r in (*own, receiver_gone, *peers) if not r.holds]
    if not read.holds:
        summary = "not taking the lock: " + "; ".join(r.because for r in obstacles) if obstacles else "taking the lock as soon as it is read to be free"
        return replace(decision, summary=summary, reasons=reasons, actions=(ReadCluster(),), wake_in_s=0.1)
    if not obstacles:
        action = _acquire(o)
        standbys = tuple(sorted(p.name for p in fresh_peers(o).values() if p.in_recovery and p.running))
        return replace(decision, memory=replace(memory, expected_standbys=standbys), summary=f"taking the lock: {now.because}", reasons=reasons, actions=(action,), wake_in_s=0.0)
    if (ask_it := mixed.question(o, election, ended)) is not None and [ended] == obstacles:
        return replace(decision, summary=f"not taking the lock: {obstacles[0].because}", reasons=reasons, actions=(ask_it,))
    waited_s = candidate_age_s(election.began_at, o.now)
    if o.settings.mixed and promotion.is_named(o) and waited_s >= promotion.CANDIDATE_S:
        # Members of another make leave the field to whom an operator named for as long as it answers: it must say that it cannot.
        clear = WriteKey(key="failover", value=b"{}", if_revision=view_of(o).revision_of("failover"), epoch_revision=None)
        return replace(decision, summary="declining to take over, so that others may: " + "; ".join(r.because for r in obstacles), reasons=reasons, actions=(clear,))
    return replace(decision, summary="not taking the lock: " + "; ".join(r.because for r in obstacles), reasons=reasons,
                   wake_in_s=0.05 if waited_s < 3 else 0.5)


def still_set(o: Observation, election: Election) -> bool:
    """Do the settings name an upstream a second after they were to be empty?"""
    row, row_at = o.postgres.row, o.postgres.row_at
    if row is None or row_at is None or election.frozen_at is None or not row.in_recovery:
        return False
    return bool(row.primary_conninfo or row.restore_command) and candidate_age_s(election.frozen_at, row_at) >= FREEZE_AGAIN_S


def _watch_position(o: Observation, election: Election) -> Election:
    """Since when has the own position stood still?"""
    row, row_at = o.postgres.row, o.postgres.row_at
    if row is None or row_at is None or (election.standing_since is not None and row.position == election.standing_lsn):
        return election
    return replace(election, standing_lsn=row.position, standing_since=row_at)


def position_is_final(o: Observation, election: Election) -> Reason:
    """No walreceiver lives, and none can be started again: the settings are empty, and the startup process has had the
    time to read them (a backend may show them a few milliseconds before it has; measured)."""
    row, row_at, rule = o.postgres.row, o.postgres.row_at, "leaderless.position_is_final"
    if row is None or row_at is None or election.frozen_at is None:
        return reason(rule, False, "not frozen yet")
    if row.receiver is not None:
        return reason(rule, False, f"walreceiver is {row.receiver.status}")
    if row.primary_conninfo:
        return reason(rule, False, "primary_conninfo is still set")
    settled_s = candidate_age_s(election.frozen_at, row_at)
    if not row.received_lsn:
        # Nothing was received since it started: it replays what lies in pg_wal, and where that ends shows only at the end.
        if not row.startup_rests:
            return reason(rule, False, f"what lies in pg_wal is not replayed yet, as far as {format_lsn(row.position)}")
        stands_s = candidate_age_s(election.standing_since, row_at) if election.standing_since else 0.0
        return reason(rule, min(settled_s, stands_s) >= REPLAY_STANDS_S, f"replay has stood at {format_lsn(row.position)} for {stands_s:.2f} s, {REPLAY_STANDS_S} s needed")
    return reason(rule, settled_s >= FREEZE_SETTLES_S, f"no walreceiver {settled_s:.3f} s after the freeze, {FREEZE_SETTLES_S} s needed")


def _acquire(o: Observation) -> AcquireLock:
    """Take exactly the record that was judged, with a timeline number that nobody can have claimed."""
    view = view_of(o)
    own = promotion.own_position(o)
    # Also what members are known to be on: a store that was rebuilt has lost the claims (two promotions never share a number).
    known = [*(p.timeline for p in o.dcs.last_positions.values()), *(p.timeline for p in o.peers.values())]
    told = [view.timeline, view.epoch.timeline, *(number for number, _ in view.epoch.claims), *known]
    highest = max([own.timeline, *(number for number in told if number <= own.timeline + NONSENSE_AHEAD)])
    claims = view.epoch.claims
    if view.epoch.timeline > view.timeline and view.epoch.holder:
        # The last claim is not in /history: it may have been carried out by a node that nobody hears of.
        claims = (*claims, (view.epoch.timeline, view.epoch.holder))[-20:]
    return AcquireLock(
        lock_revision=view.lock_revision, lock_value=view.lock_value, epoch_revision=view.revision_of("pgha/epoch"), epoch_number=view.epoch.number,
        also_unchanged={key: view.revision_of(key) for key in ("sync", "failsafe", "config", "leader")}, mixed=o.settings.mixed,
        claim_timeline=highest + 1, claims=claims, lsn=own.lsn, timeline=own.timeline,
    )



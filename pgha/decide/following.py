"""Somebody else holds the lock: stream from the right server, and notice when that cannot work."""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import candidate_age_s, remaining_s
from pgha.decide import cramped, paused, promotion, rejoin, slots, synchronous
from pgha.decide.cascade import cascades_from
from pgha.decide.common import ask_others, leader_member, own_history, reason, source_of, view_of
from pgha.decide.leading import operator_requests
from pgha.decide.slots import own_slot_name
from pgha.decide.standing import Standing, because, standing
from pgha.model.action import Action, Follow, InspectUpstream, Restart, Source, Stop, WriteInitialize
from pgha.model.cluster import Member, is_system_identifier
from pgha.model.decision import Decision, Memory, PeerQuestion, Reason, Vote
from pgha.model.node import Row
from pgha.model.observation import Observation
from pgha.model.wal import Position, claim_of

#: A standby that does not stream for so long looks whether it can at all.
LOOK_AFTER_S = 1.0
LOOK_EVERY_S = 2.0
#: … and one that is not to stream at all.
LOOK_BESIDE_THE_ARCHIVE_S = 30.0
#: Peers are asked for their positions from so long before a record's expiry.
PROBE_BEFORE_EXPIRY_S = 2.0


def decide(o: Observation, memory: Memory) -> Decision | None:
    now, row = standing(o), o.postgres.row
    if memory.election is not None:
        memory = replace(memory, election=None)
    vote = Vote(epoch=-1, timeline=row.timeline if row else 0, lsn=row.position if row else 0, candidate=promotion.is_not_vetoed(o, memory).holds)
    ask = ask_others(o) if now.left_s < PROBE_BEFORE_EXPIRY_S else PeerQuestion()
    wake_in_s = min(o.settings.loop_wait_s, max(0.02, now.left_s - PROBE_BEFORE_EXPIRY_S if now.left_s > PROBE_BEFORE_EXPIRY_S else now.left_s))
    decision = Decision(situation="following", summary="", reasons=(because(now),), memory=memory, ask_peers=ask, vote=vote, wake_in_s=wake_in_s)
    if row is None:
        return replace(decision, summary=f"PostgreSQL is {o.postgres.process} ({o.postgres.answer})", wake_in_s=min(wake_in_s, 0.5))
    leader = leader_member(o, now.holder)
    server = _upstream(o, row, leader)
    upstream = source_of(server) if server is not None else None
    actions: list[Action] = []
    view = view_of(o)
    if view.initialize is None and is_system_identifier(row.system_identifier) and _is_the_clusters(o, row):
        actions.append(WriteInitialize(value=row.system_identifier, if_revision=view.revision_of("initialize")))
    wanted, same = follows_wanted(o, upstream), one_history(o, row, server)
    if not same.holds or not wanted.holds:
        decision = replace(decision, reasons=(*decision.reasons, same))
    if _claims_differ(o, row, leader):
        same = one_history(o, row, leader)
        decision = replace(decision, reasons=(because(now), same))
        if paused.in_force(o):
            return replace(decision, summary=f"cannot follow {now.holder} as it is, and is left alone in pause: {same.because}", memory=memory)
        return replace(decision, summary=f"cannot follow {now.holder} as it is: {same.because}", memory=memory, wake_in_s=0.5,
                       actions=(*actions, Stop(why=same.because, timeout_s=60.0)))
    if not wanted.holds and same.holds:
        actions.append(Follow(upstream=upstream, slot_name=own_slot_name(o) if upstream else ""))
    looked = _look(o, memory, leader)
    if looked is not None:
        more, memory, reasons, summary = looked
        if summary:
            return replace(decision, summary=summary, reasons=(*decision.reasons, wanted, *reasons), actions=(*actions, *more), memory=memory, wake_in_s=0.5)
    room = cramped.has_room(o)
    wants = operator_requests(o, as_primary=False)
    if not room.holds and not paused.in_force(o) and not any(isinstance(a, Restart) for a in wants):
        wants.append(cramped.restart(o))
    asked = [_with_upstream(a, upstream, own_slot_name(o)) for a in wants]
    let_go = synchronous.is_to_be_let_go(o, memory)
    actions += paused.outlived(o, now)
    if any(isinstance(a, Restart) for a in asked) and not let_go.holds:
        memory = memory if memory.leaving_since else replace(memory, leaving_since=o.now)
        return replace(decision, summary=f"asked to restart: {let_go.because}", reasons=(*decision.reasons, wanted, room, let_go), memory=memory, wake_in_s=0.1,
                       actions=tuple(a for a in (*actions, *asked) if not isinstance(a, Restart)))
    actions += asked or (slots.upkeep(o) if wanted.holds else [])
    in_the_way = slots.obstacles(o)
    if not room.holds:
        decision = replace(decision, reasons=(*decision.reasons, room))
    return replace(decision, summary=f"no action. I am ({o.me.name}), a secondary, " + _whom(o, now) + slots.complaint(in_the_way),
                   reasons=(*decision.reasons, wanted, *in_the_way), actions=tuple(actions), memory=memory)


def _is_the_clusters(o: Observation, row: Row) -> bool:
    """May this member tell a store that has lost `/initialize` whose the cluster is? PostgreSQL streams within one system
    only; else what this node remembers must agree: its data may have been replaced by another cluster's."""
    streams = row.receiver is not None and row.receiver.status == "streaming"
    return streams or row.system_identifier == o.dcs.remembered_identifier


def _whom(o: Observation, now: Standing) -> str:
    """A record that names this node, or that a restored store shows, is nobody's word to follow: the log says how it stands."""
    unbelieved = o.dcs.trusted_from is not None and remaining_s(o.dcs.trusted_from, o.now) > 0
    if now.holder == o.me.name:
        return f"and this node's own record {'is not believed' if unbelieved else 'stands'}: {now.because}"
    return f"and following a leader ({now.holder})" + (f"; {now.because}" if unbelieved else "")


def _with_upstream(action: Action, upstream: Source | None, slot_name: str) -> Action:
    return replace(action, upstream=upstream, slot_name=slot_name if upstream else "") if isinstance(action, Restart) else action


def _upstream(o: Observation, row: Row, leader: Member | None) -> Member | None:
    """Whom to stream from: the member named by replicatefrom if it runs on our timeline, else the leader; nobody with nostream."""
    if o.settings.tags.nostream:
        return None
    chosen = cascades_from(view_of(o), o.me.name, o.settings.tags, leader.name if leader is not None else "")
    member = chosen if chosen is not None and _goes_along(o, row, chosen) else leader
    if member is None or not member.host or member.name == o.me.name:
        return None
    return member


def _goes_along(o: Observation, row: Row, chosen: Member) -> bool:
    """Who is streamed from already may be told of a new timeline a moment later than this node has it."""
    streams = o.configured_upstream == chosen.name and row.receiver is not None
    return not _claims_differ(o, row, chosen) and (streams or one_history(o, row, chosen).holds)


def one_history(o: Observation, row: Row, server: Member | None) -> Reason:
    """May this standby stream from that member, by the timelines of both? A walreceiver asks for no more than the number: where
    two promotions took the same (a store was restored), it would go on behind rows of its own (safety model 7).

    A lower number, or one whose claim is not told yet: it is about to promote, to a number that might be ours. What it
    answered itself (`_look` asks) counts where its key does not say enough.
    """
    rule = "following.one_history"
    if server is None or not server.is_pgha or row.timeline <= 1:
        return reason(rule, True, "nothing to compare")
    history = own_history(o, row.timeline)
    if history is None:
        return reason(rule, False, f"how timeline {row.timeline} began has not been read yet{': ' + o.directory.why if o.directory.why else ''}")
    own = claim_of(history)
    if own is None:
        return reason(rule, True, f"how timeline {row.timeline} began is not known here")
    if _claims_differ(o, row, server):
        return reason(rule, False, f"both on timeline {row.timeline}, but it began as '{own}' here and as '{server.claim}' at {server.name}")
    if server.timeline > row.timeline or (server.timeline == row.timeline and server.tells_claim):
        return reason(rule, True, f"own timeline is {row.timeline}, {server.name}'s {server.timeline}")
    upstream = o.upstream
    if upstream is not None and upstream.ok and upstream.name == server.name and not upstream.in_recovery and candidate_age_s(upstream.asked_at, o.now) < LOOK_EVERY_S * 2:
        judged = rejoin.judge(Position(timeline=row.timeline, lsn=row.position), history, upstream, end_is_known=True)
        return reason(rule, judged.verdict is rejoin.Verdict.FOLLOW, f"asked {server.name}: {judged.because.because}")
    said = f"{server.name}'s {server.timeline}" if server.timeline else f"{server.name} has not said which it is on"
    return reason(rule, False, f"own timeline is {row.timeline}, {said}" + (", and not yet by which promotion" if server.timeline == row.timeline else ""))


def _claims_differ(o: Observation, row: Row, server: Member | None) -> bool:
    own = claim_of(own_history(o, row.timeline) or ())
    return server is not None and server.timeline == row.timeline and None not in (own, server.claim) and own != server.claim


def follows_wanted(o: Observation, upstream: Source | None) -> Reason:
    """Does primary_conninfo point at the upstream that it ought to?"""
    rule, row = "following.follows_wanted", o.postgres.row
    assert row is not None
    current = _conninfo_target(row.primary_conninfo)
    wanted = (upstream.host, upstream.port) if upstream else ("", 0)
    if upstream is None and not o.settings.tags.nostream:
        return reason(rule, True, "the leader's address is not known: left as it is")
    ours = o.configured_upstream == (upstream.name if upstream else "")      # a restarted agent has not written them yet
    slot_fits = row.primary_slot_name == (own_slot_name(o) if upstream else "")
    return reason(rule, current == wanted and slot_fits and ours, f"wanted {_address(wanted)}, set {_address(current)}, slot {row.primary_slot_name or 'none'}")


def _address(target: tuple[str, int]) -> str:
    return f"{target[0]}:{target[1]}" if target[0] else "nobody"


def _conninfo_target(conninfo: str) -> tuple[str, int]:
    """(host, port) of a conninfo string that pgha wrote: key=value or key='value'."""
    host, port = "", 0
    for part in conninfo.split():
        key, _, value = part.partition("=")
        value = value.strip("'")
        if key == "host":
            host = value
        elif key == "port" and value.isascii() and value.isdigit() and len(value) < 6:
            port = int(value)
    return host, port


def _look(o: Observation, memory: Memory, leader: Member | None) -> tuple[list[Action], Memory, tuple[Reason, ...], str] | None:
    """A standby that does not stream: has it diverged from the leader?"""
    since, row = memory.not_streaming_since, o.postgres.row
    assert row is not None
    if leader is None or leader.role != "primary" or not leader.host:
        return None
    upstream = o.upstream
    known = upstream is not None and upstream.name == leader.name and candidate_age_s(upstream.asked_at, o.now) < LOOK_EVERY_S * 2
    history = own_history(o, row.timeline)
    if history is not None and upstream is not None and known and upstream.ok and not upstream.in_recovery:
        own = Position(timeline=row.timeline, lsn=row.position)
        asked = memory.upstream_asked_at
        # What comes out of an archive goes on after the question: then having more than the answer proves nothing.
        asked_later = since is not None and asked is not None and remaining_s(asked, since) >= 0 and not row.restore_command
        judged = rejoin.judge(own, history, upstream, end_is_known=True, asked_later=asked_later)
        if judged.verdict is not rejoin.Verdict.FOLLOW and paused.in_force(o):
            return [], memory, (judged.because,), f"cannot follow {leader.name} as it is, and is left alone in pause: {judged.because.because}"
        if judged.verdict is not rejoin.Verdict.FOLLOW:
            stop = Stop(why=judged.because.because, timeout_s=60.0)
            return [stop], memory, (judged.because,), f"cannot follow {leader.name} as it is: {judged.because.because}"
    if since is None or candidate_age_s(since, o.now) < LOOK_AFTER_S:
        return None
    asked, every_s = memory.upstream_asked_at, LOOK_EVERY_S if not o.settings.tags.nostream else LOOK_BESIDE_THE_ARCHIVE_S
    if asked is None or candidate_age_s(asked, o.now) >= every_s:
        return [InspectUpstream(source=source_of(leader))], replace(memory, upstream_asked_at=o.now), (), f"not streaming, asking {leader.name} for its timeline"
    return None

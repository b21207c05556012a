"""There is no data here: make a new cluster, or copy one that is there?"""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide import eligible, failsafe, paused, restart
from pgha.decide.common import ask_others, backed_off, by_name, leader_member, others, reason, source_of, view_of
from pgha.decide.standing import Whose, because, licensed, standing
from pgha.model.action import AbandonDirectory, AcquireLock, Action, Bootstrap, Clone, ReadCluster, ReleaseLock, Stop
from pgha.model.cluster import Member
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation

#: Stands for a claim on `initialize` of which no revision is known.
NO_CLAIM = 1
#: A holder whose disk does not answer while no server runs gives the lock back after so long.
DISK_WITHIN_S = 10.0


def decide(o: Observation, memory: Memory) -> Decision | None:
    control = o.directory.control
    ours = control is not None and view_of(o).initialize == control.system_identifier
    if control is not None and not ours and not licensed(o) and not memory.bootstrap_revision and o.directory.bootstrap_unregistered and not o.postgres.alive:
        # The agent ended between the making of a cluster and its last write: go on from there, under no claim.
        memory = replace(memory, bootstrap_identifier=control.system_identifier, bootstrap_revision=NO_CLAIM)
    if memory.bootstrap_revision:
        return _finish_bootstrap(o, memory)
    state = o.directory.state
    if o.directory.abandoned_bootstrap and not o.postgres.alive:
        made = "copy" if o.directory.unfinished_copy else "bootstrap"
        abandon = AbandonDirectory(why=f"a {made} of it was begun and not ended")
        aside = "bringing back what a copy was to replace: it was never ended" if made == "copy" else "setting half a cluster aside: its bootstrap was never ended"
        return Decision(situation="empty", summary=aside, actions=(abandon,), memory=memory,
                        reasons=(reason("empty.bootstrap_was_ended", False, f"the {made}'s mark is still there"),), role="uninitialized")
    if state == "valid":
        return None
    if state in ("unknown", "unreadable") or (state == "partial" and (o.postgres.alive or not o.directory.unfinished_copy)):
        # A server that runs says itself what it holds; a disk that does not answer us must not stop its books.
        return None if o.postgres.alive else _unusable(o, memory)
    if o.postgres.alive and paused.in_force(o):
        return None         # PostgreSQL itself ends within a minute of losing its lock file; before that it is the operator's
    if o.postgres.alive:
        stop = Stop(why="its data directory is gone", timeout_s=5.0)
        return Decision(situation="empty", summary="stopping a server whose data directory is gone", actions=(stop,), memory=memory)
    if restart.read_in_this_pass(o).holds is False:
        return Decision(situation="empty", summary="waiting for leader to bootstrap", reasons=(restart.read_in_this_pass(o),), actions=(ReadCluster(),),
                        memory=memory, wake_in_s=0.5)
    if licensed(o):
        return _give_back(o, memory, reason("empty.lock_is_of_use", False, f"this node holds the lock, and its data directory is {state}"))
    now = standing(o)
    if now.whose is Whose.OWN_FORMER and now.record is not None and now.record.mode == "paused":
        # Its own record, which would not expire: nobody else can end it, and without data it is of use to nobody.
        promised = failsafe.nothing_is_promised(o)
        return Decision(situation="empty", summary="adopting this node's own paused lock record, to give it back: there is no data here", reasons=(because(now), promised),
                        actions=(restart.readopt(o),) if promised.holds else (), memory=memory, wake_in_s=0.2, role="uninitialized")
    if may_bootstrap(o)[0].holds and not o.directory.unfinished_copy:
        return _bootstrap(o, memory)
    return _clone(o, memory)


def _give_back(o: Observation, memory: Memory, why: Reason) -> Decision:
    """A lock without data, or without a disk that answers, keeps everybody else from it. What was published last stands."""
    lock = view_of(o).lock
    lsn, timeline = (lock.lsn, lock.timeline) if lock is not None and lock.node_id == o.me.node_id else (0, 0)
    release = ReleaseLock(lsn=lsn, timeline=timeline, why=why.because)
    return Decision(situation="empty", summary=f"giving the lock to those who can use it: {why.because}", reasons=(why,), actions=(release,), memory=memory,
                    wake_in_s=0.5)


def _unusable(o: Observation, memory: Memory) -> Decision:
    """Never taken for empty: nothing is begun on what cannot be read."""
    why = reason("empty.readable", False, f"the data directory is {o.directory.state}: {o.directory.why}")
    if licensed(o):
        memory = memory if memory.holding_since else replace(memory, holding_since=o.now)
        assert memory.holding_since is not None
        held_s = candidate_age_s(memory.holding_since, o.now)
        if held_s >= DISK_WITHIN_S:
            return _give_back(o, memory, reason("empty.lock_is_of_use", False, f"held for {held_s:.1f} s without a server, limit {DISK_WITHIN_S:g} s; {why.because}"))
    return Decision(situation="empty", summary=why.because, reasons=(why,), memory=memory, wake_in_s=min(2.0, o.settings.loop_wait_s))


# --- a new cluster -----------------------------------------------------------------------------------------------------

def may_bootstrap(o: Observation) -> tuple[Reason, ...]:
    """The first says whether this is a cluster to be made at all; the rest whether by this node, now."""
    view = view_of(o)
    now = standing(o)
    answering = sorted(p.name for p in o.peers.values() if p.answered and p.system_identifier)
    return (
        reason("empty.never_initialised", now.whose in (Whose.NEVER, Whose.FREE) and not view.initialize and view.lock is None,
               f"initialize is {view.initialize!r}, lock: {now.because}"),
        reason("empty.initialize_is_free", view.initialize is None, _initialize_says(view.initialize)),
        reason("empty.has_bootstrap_section", o.settings.has_bootstrap_section, "the configuration has "
               + ("a" if o.settings.has_bootstrap_section else "no") + " [bootstrap] section"),
        reason("empty.may_lead", not o.settings.tags.nofailover, "tag nofailover is " + ("set" if o.settings.tags.nofailover else "not set")),
        reason("empty.no_peer_has_data", not answering, f"{', '.join(answering)} answer with a system identifier" if answering
               else "no configured or remembered peer answers with a system identifier"),
        reason("empty.peers_were_asked", all(n in o.peers for n in others(o)), f"{len(o.peers)} of {len(others(o))} peers asked"),
    )


def _initialize_says(value: str | None) -> str:
    if value is None:
        return "initialize is absent"
    return f"the cluster is {value}, initialised already" if value else "somebody else is bootstrapping"


def _bootstrap(o: Observation, memory: Memory) -> Decision:
    reasons = may_bootstrap(o)
    wait_s = backed_off(o, failures=memory.clone_failures, last=memory.last_clone_failed_at)
    go = all(r.holds for r in reasons) and wait_s <= 0
    return Decision(
        situation="empty", summary="bootstrapping a new cluster" if go else "waiting to bootstrap", reasons=reasons,
        actions=(Bootstrap(),) if go else (), memory=memory, ask_peers=ask_others(o), wake_in_s=max(0.3, min(1.0, wait_s)),
        state="initializing new cluster" if go else "", role="uninitialized",
    )


def _finish_bootstrap(o: Observation, memory: Memory) -> Decision:
    """The last write of a bootstrap: own claim on `initialize`, no lock → lock, identifier, configuration, in one transaction."""
    view, now = view_of(o), standing(o)
    done = replace(memory, bootstrap_identifier="", bootstrap_revision=0)
    if now.whose is Whose.MINE or view.initialize == memory.bootstrap_identifier:
        return Decision(situation="empty", summary="initialized a new cluster", reasons=(because(now),), memory=done, wake_in_s=0.0)
    if view.lock is not None or (view.initialize is not None and view.initialize != ""):
        abandon = AbandonDirectory(why="another node has initialised the cluster meanwhile")
        return Decision(situation="empty", summary=abandon.why, reasons=(because(now),), actions=(abandon,), memory=done)
    if view.initialize is None and now.whose is not Whose.FREE:
        # The claim is gone, its lease ended while the store or this agent was away. The store may also have been emptied
        # under a living cluster: absence is waited for as ever.
        return Decision(situation="empty", summary=f"completing the bootstrap once nobody speaks up: {now.because}", reasons=(because(now),),
                        actions=() if restart.read_in_this_pass(o).holds else (ReadCluster(),), memory=memory, ask_peers=ask_others(o), wake_in_s=1.0)
    control = o.directory.control
    acquire = AcquireLock(
        lock_revision=0, lock_value=b"", epoch_revision=view.revision_of("pgha/epoch"), epoch_number=view.epoch.number,
        initialize_revision=memory.bootstrap_revision if view.initialize is not None else 0, initialize_value=memory.bootstrap_identifier,
        mixed=o.settings.mixed, also_unchanged={"leader": view.revision_of("leader")},
        lsn=control.checkpoint_lsn if control else 0, timeline=control.timeline if control else 1,
        claim_timeline=control.timeline if control else 1,
    )
    return Decision(situation="empty", summary="completing the bootstrap", reasons=(because(now),), actions=(ReadCluster(), acquire), memory=memory,
                    wake_in_s=0.2, state="initializing new cluster", role="uninitialized")


# --- a copy ------------------------------------------------------------------------------------------------------------

def clone_source(o: Observation, failures: int = 0, *, leader_only: bool = False) -> tuple[Member | None, Reason]:
    """A running member tagged clonefrom that is on the leader's timeline, else the leader.

    Of several each node takes another, as its name has it; who has failed goes on to the next, and last to the leader. Whoever may lead by /sync copies from the leader only: another's copy may lack what this name has confirmed before.
    """
    rule = "empty.has_source"
    view, now = view_of(o), standing(o)
    if now.whose is not Whose.LIVE:
        return None, reason(rule, False, f"no leader to copy from: {now.because}")
    leader = leader_member(o, now.holder)
    if leader is None or leader.role != "primary" or leader.state != "running" or not leader.host:
        return None, reason(rule, False, f"leader {now.holder} is not running as primary yet")
    offers = [] if leader_only else sorted(m.name for m in view.members.values() if m.tags.clonefrom and m.state == "running" and m.host and m.name not in (o.me.name, leader.name)
                    and m.timeline in (0, leader.timeline))
    first = sum(o.me.name.encode()) % len(offers) if offers else 0
    tagged = [*offers[first:], *offers[:first], ""][failures % (len(offers) + 1)]
    if tagged and eligible.is_active(o) and eligible.is_named(o, o.me.name):
        return leader, reason(rule, True, f"copying from {leader.name}, the leader, since /sync names {o.me.name}")
    source = view.members[tagged] if tagged else leader
    return source, reason(rule, True, f"copying from {source.name}" + (" (clonefrom)" if tagged else ", the leader"))


def without_leader(o: Observation, methods: tuple[str, ...]) -> tuple[Reason, ...]:
    """May this node be made from a backup, though nobody leads? Only where nobody with data could: such data is older."""
    now = standing(o)
    able = sorted(p.name for p in o.peers.values() if p.answered and p.system_identifier and not p.tags.nofailover)
    return (
        reason("empty.nobody_leads", now.whose in (Whose.FREE, Whose.NEVER, Whose.OWN_FORMER), now.because),
        reason("empty.nobody_else_has_data", not able, f"{', '.join(able)} answer with data, and may lead" if able else "no other member answers with data"),
        reason("empty.peers_were_asked", all(n in o.peers for n in others(o)), f"{len(o.peers)} of {len(others(o))} peers asked"),
        reason("empty.a_backup_will_do", set(o.settings.leaderless_methods) <= set(methods), f"{by_name(o.settings.leaderless_methods)} needs no leader"
               if set(o.settings.leaderless_methods) <= set(methods) else "/sync names this node: a backup may lack what it has confirmed"),
    )


def _clone(o: Observation, memory: Memory) -> Decision:
    view = view_of(o)
    source, why = clone_source(o, memory.clone_failures)
    known = reason("empty.cluster_is_initialised", view.initialized, f"initialize is {view.initialize!r}")
    wait_s = backed_off(o, failures=memory.clone_failures, last=memory.last_clone_failed_at)
    ready = reason("empty.clone_backoff", wait_s <= 0, f"{memory.clone_failures} failures, next try in {wait_s:.1f} s")
    # What speaks against a new cluster is of interest only where there is none.
    methods, by = eligible.copy_methods(o)
    reasons = (known, why, ready, *(by if known.holds else may_bootstrap(o)[1:]))
    actions: tuple[Action, ...] = ()
    summary = "waiting for leader to bootstrap" if not wait_s else f"the copy failed {memory.clone_failures} times, next try in {wait_s:.1f} s"
    if source is not None and view.initialized and wait_s <= 0:
        assert view.initialize is not None
        actions = (Clone(source=source_of(source), system_identifier=view.initialize, why=why.because, methods=methods),)
        summary = f"bootstrap from {'leader' if source.role == 'primary' else 'replica'} '{source.name}' with {by_name(methods)}"
    elif source is None and known.holds and o.settings.leaderless_methods:
        alone = without_leader(o, methods)
        reasons = (*reasons, *alone)
        if all(r.holds for r in alone) and wait_s <= 0:
            assert view.initialize is not None
            actions = (Clone(source=None, system_identifier=view.initialize, why=why.because, methods=o.settings.leaderless_methods),)
            summary = f"bootstrap (without leader) with {by_name(o.settings.leaderless_methods)}"
    return Decision(situation="empty", summary=summary, reasons=reasons, actions=actions, memory=memory, ask_peers=ask_others(o, every_s=1.0),
                    wake_in_s=min(o.settings.loop_wait_s, max(0.2, wait_s) if wait_s else 1.0), state="creating replica" if actions else "", role="uninitialized")



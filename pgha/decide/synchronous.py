"""Whom do commits wait for, and who may lead after this node? The leader's side of the synchronous modes.

Two things are kept in step: synchronous_standby_names of the running server, and `/sync`, by which the others judge who
may lead. What each change must leave true stands in model/synchronous.py, which change comes next in decide/steps.py,
who is wanted in decide/standbys.py, what is remembered in decide/sync_book.py. Here one step is decided a pass, and only
upon what is *seen*: the setting in the server's own answer, `/sync` in the view. (safety model 13; compatibility spec 12)

Taking over loses nobody. `/sync` is rewritten to name me and to keep everybody else whom it named, the old leader too,
and the setting demands just that of the first commit after the promotion. So whoever dies when, before or after the
promotion, those who might lead before still may (in quorum mode the old leader with votes, as a voter: the winner may
have been promoted already); who does not come back is let go afterwards by ordinary steps. (The reference empties
`/sync` first: should the winner die then, nobody but it may ever lead.)
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide import steps
from pgha.decide.common import reason, view_of
from pgha.decide.standbys import SOON_S, Verdict, note_replicas, standbys, target_of, who_is_fit
from pgha.decide.steps import State
from pgha.decide.sync_book import (
    SETTLES_S,
    SYNC,
    book_of,
    confirmed,
    demanded,
    is_on,
    leads_sync,
    may_send,
    may_set,
    note_mark,
    opened,
    primary_names,
    promises,
    setting_age_s,
    taken_over,
    text_of,
    voters_of,
    write_sync,
)
from pgha.model.action import Action, SetSynchronousNames, WriteKey
from pgha.model.decision import Memory, Reason, SyncBook
from pgha.model.node import Row
from pgha.model.observation import Observation
from pgha.model.synchronous import PLACEHOLDER, Promise, Requirement, covers, may_promise, parse_requirement
from pgha.model.wal import format_lsn

#: With the lock and without a checkpointer that has read the setting: rather nobody but this node may lead than no primary.
CHECKPOINTER_S = 3.0
COMMITS_GO_ON = "synchronous.commits_go_on"

__all__ = ["COMMITS_GO_ON", "Upkeep", "before_promotion", "is_counted_on", "is_to_be_let_go", "may_start", "primary_names", "upkeep"]


class Upkeep(Struct, frozen=True, kw_only=True):
    """What to do for the synchronous set in this pass: at most one step."""

    actions: tuple[Action, ...] = ()
    reasons: tuple[Reason, ...] = ()
    memory: Memory
    wake_in_s: float | None = None


# --- before there is a primary ------------------------------------------------------------------------------------------

def may_start(o: Observation, memory: Memory) -> tuple[Reason, tuple[Action, ...], Memory]:
    """Before a start in place: is it known what `/sync` says? If not, the action that makes it so."""
    rule, book = "synchronous.may_start", book_of(o, memory)
    doubted = is_on(o) and o.dcs.remembered_sync is not None
    if not doubted and (not view_of(o).sync.leader or opened(o, book)):
        return reason(rule, True, "what /sync says is known"), (), replace(memory, sync=book)
    action, book = write_sync(o, book, taken_over(o))
    return reason(rule, False, "writing /sync once, so that nothing of a former agent or of an old store counts any more"), (action,), replace(memory, sync=book)


def is_counted_on(o: Observation) -> bool:
    """Does `/sync` name this standby, and does it run?"""
    view = o.dcs.view
    return view is not None and is_on(o) and not o.settings.pause and o.me.name.lower() in voters_of(view.sync) and o.postgres.alive


def is_to_be_let_go(o: Observation, memory: Memory) -> Reason:
    """A synchronous standby that is about to stop says so in its tags, and waits until nobody counts on it: then no commit
    waits for its return. (compatibility spec 12.8)"""
    rule, view = "synchronous.is_to_be_let_go", o.dcs.view
    if view is None or not is_counted_on(o):
        return reason(rule, True, "nobody counts on this node's confirmations")
    waited_s, limit_s = candidate_age_s(memory.leaving_since, o.now) if memory.leaving_since else 0.0, 2 * o.settings.loop_wait_s
    return reason(rule, waited_s >= limit_s, f"named in /sync by {view.sync.leader}, waited {waited_s:.1f} s of {limit_s:g} s to be let go")


def before_promotion(o: Observation, memory: Memory) -> tuple[tuple[Reason, ...], tuple[Action, ...], Memory]:
    """The conditions that `/sync` and the setting ask of a promotion, and what makes them hold. Neither is of effect
    before the promotion, so both may be under way at once; each must be seen before it."""
    book, view, row = book_of(o, memory), view_of(o), o.postgres.row
    assert row is not None
    actions: list[Action] = []
    held_s = candidate_age_s(memory.holding_since, o.now) if memory.holding_since else 0.0
    rested = row.checkpointer_rests and setting_age_s(o, book) > 0
    ours = sync_names_me(o)
    if not is_on(o) and not ours.holds:
        actions.append(WriteKey(key=SYNC, value=None, if_revision=view.revision_of(SYNC), epoch_revision=o.licence.epoch_revision))
    elif not ours.holds and may_send(o, book):
        action, book = write_sync(o, book, taken_over(o))
        actions.append(action)
    wanted = None if not is_on(o) else text_of(o, demanded(o, book))
    written, seen = o.written_names, row.synchronous_standby_names
    if not written.told or written.names != wanted or (wanted is not None and seen != wanted and may_set(o, book)):
        actions.append(SetSynchronousNames(names=wanted))
        book = replace(book, set_at=o.now)
    elif ours.holds and wanted and seen == wanted and not rested and held_s >= CHECKPOINTER_S and promises(o, book) != (Promise(),):
        action, book = write_sync(o, book, Promise())
        actions.append(action)
    told = written.told and written.names == wanted and (wanted is None or seen == wanted)
    waits = rested or not wanted or wanted == PLACEHOLDER
    reasons = (
        ours,
        reason("synchronous.names_are_set", told, f"synchronous_standby_names is {seen!r}, " + ("the operator's own" if wanted is None else f"wanted {wanted!r}")),
        reason("synchronous.backends_will_wait", waits, "nobody is waited for" if not wanted else f"synchronous_standby_names seen for {setting_age_s(o, book):.2f} s, the checkpointer "
               + ("has read it" if row.checkpointer_rests else f"may not have read it (for {held_s:.1f} s, limit {CHECKPOINTER_S:g} s)")),
    )
    return reasons, tuple(actions), replace(memory, sync=book)


def sync_names_me(o: Observation) -> Reason:
    """`/sync` under the own epoch, before anything can be committed here."""
    rule, sync = "synchronous.sync_names_me", view_of(o).sync
    if is_on(o) and o.dcs.remembered_sync is not None:
        return reason(rule, False, f"/sync names {sync.leader or 'nobody'} as it did in a store that went back, and is to be written anew")
    if not sync.leader:
        return reason(rule, True, "/sync names no leader: no synchronous mode was active")
    if not is_on(o):
        return reason(rule, False, f"/sync still names {sync.leader} although the mode is off: to be deleted")
    return reason(rule, leads_sync(o), f"/sync names {sync.leader}, with {taken_over(o)}")


# --- everyday -----------------------------------------------------------------------------------------------------------

def upkeep(o: Observation, memory: Memory) -> Upkeep:
    """The step of this pass, by a leader whose primary runs."""
    book, row = book_of(o, memory), o.postgres.row
    assert row is not None
    if not is_on(o):
        return _switch_off(o, memory, book)
    book = note_replicas(o, book, row, memory.expected_standbys)
    book = note_mark(o, book, row)
    memory = replace(memory, sync=book)
    if not leads_sync(o):
        return _promised(o, memory, book, Promise(), reason("synchronous.sync_names_me", False, f"/sync names {view_of(o).sync.leader or 'nobody'}"))
    now = State(promise=taken_over(o), requirement=parse_requirement(row.synchronous_standby_names))
    verdicts = standbys(o, book, now)
    target = target_of(o, now, verdicts)
    reasons = (_standing(o, now, target), who_is_fit(verdicts), commits_go_on(now, verdicts))
    done = _step(o, memory, now, target, verdicts)
    wake_in_s = done.wake_in_s if done.wake_in_s is not None else min((v.again_in_s for v in verdicts.values() if v.again_in_s), default=None)
    return replace(done, reasons=(*reasons, *done.reasons), wake_in_s=wake_in_s)


def _step(o: Observation, memory: Memory, now: State, target: State, verdicts: dict[str, Verdict]) -> Upkeep:
    book, row, written = memory.sync, o.postgres.row, o.written_names
    assert row is not None
    if not covers(now.promise, now.requirement):
        why = f"/sync promises {now.promise}, but commits wait for {row.synchronous_standby_names!r} only: nobody else may lead until it is made good"
        return _promised(o, memory, book, Promise(), reason("synchronous.promise_is_covered", False, why))
    if not opened(o, book):
        return _promised(o, memory, book, now.promise, reason("synchronous.opened", False, "writing /sync once, so that nothing of a former agent can still change it"))
    if not written.told or (written.names is not None and parse_requirement(written.names) != now.requirement):
        return _same_in_file(o, memory, book, row)
    healthy = frozenset(name for name, verdict in verdicts.items() if verdict.healthy)
    votes = o.settings.synchronous_mode == "quorum"
    step = steps.first_step(now, target, healthy, votes=votes)
    if step is None:
        arrived = now == target
        return Upkeep(memory=memory, reasons=() if arrived else (reason("synchronous.has_a_way", False, f"no safe way from here to {target.promise}"),))
    if isinstance(step, Requirement):
        return _required(o, memory, book, step)
    safe = confirmed(row, book)
    settled = now.requirement if book.mark else None
    if not may_promise(now.promise, step, requirement=settled, confirmed=safe):
        partly = steps.partly(now.promise, step, now.requirement, safe, votes=votes) if settled else None
        if partly is None:
            missing = sorted(step.voters - safe) if settled else []
            why = f"{', '.join(missing)} not yet at {format_lsn(book.mark)}" if settled else f"the new setting was seen {setting_age_s(o, book):.2f} s ago, {SETTLES_S} s needed"
            return Upkeep(memory=memory, reasons=(reason("synchronous.confirmed", False, f"waiting to promise {step}: {why}"),), wake_in_s=SOON_S)
        step = partly
    assert may_promise(now.promise, step, requirement=settled, confirmed=safe), (now, step, safe)
    return _promised(o, memory, book, step, reason("synchronous.promise", True, f"{now.promise} becomes {step}"))


def _promised(o: Observation, memory: Memory, book: SyncBook, promise: Promise, why: Reason) -> Upkeep:
    """Write `/sync`, unless that was sent a moment ago and may yet be seen."""
    if promise in book.sent and not may_send(o, book):
        return Upkeep(memory=memory, reasons=(why,), wake_in_s=SOON_S)
    action, book = write_sync(o, book, promise)
    return Upkeep(actions=(action,), memory=replace(memory, sync=book), reasons=(why,), wake_in_s=SOON_S)


def _required(o: Observation, memory: Memory, book: SyncBook, requirement: Requirement) -> Upkeep:
    """Set synchronous_standby_names, if that bears out whatever `/sync` may say by now."""
    offered = promises(o, book)
    broken = [promise for promise in offered if not covers(promise, requirement)]
    if broken:
        why = reason("synchronous.nothing_is_under_way", False, f"/sync may yet become {broken[0]}, which {text_of(o, requirement)!r} does not bear out")
        return _promised(o, memory, book, offered[0], why)
    names = text_of(o, requirement)
    return Upkeep(actions=(SetSynchronousNames(names=names),), memory=replace(memory, sync=replace(book, set_at=o.now)), wake_in_s=SOON_S,
                  reasons=(reason("synchronous.requirement", True, f"commits are to wait for {names!r}"),))


def _same_in_file(o: Observation, memory: Memory, book: SyncBook, row: Row) -> Upkeep:
    """The files and the server differ: a reload is under way or was lost, or a former agent wrote something else. No step
    is taken on either before both say the same."""
    written = o.written_names
    why = reason("synchronous.names_are_seen", False, f"synchronous_standby_names is {row.synchronous_standby_names!r}, "
                 + (f"{written.names!r} was written" if written.told else "a former agent's file is to say the same"))
    if written.told and not may_set(o, book):
        return Upkeep(memory=memory, reasons=(why,), wake_in_s=SOON_S)
    names = written.names if written.told and written.names is not None else row.synchronous_standby_names
    if not all(covers(promise, parse_requirement(names)) for promise in promises(o, book)):
        # Somebody else wrote /sync, or the store is an old one: what was to be set does not bear that out.
        return _promised(o, memory, book, Promise(), why)
    return Upkeep(actions=(SetSynchronousNames(names=names),), memory=replace(memory, sync=replace(book, set_at=o.now)), reasons=(why,), wake_in_s=SOON_S)


def _switch_off(o: Observation, memory: Memory, book: SyncBook) -> Upkeep:
    """First `/sync` goes, then what commits wait for: once it is seen to be gone, nobody is promised anything."""
    view, written = view_of(o), o.written_names
    memory = replace(memory, sync=book)
    if view.sync.leader:
        delete = WriteKey(key=SYNC, value=None, if_revision=view.revision_of(SYNC), epoch_revision=o.licence.epoch_revision)
        why = reason("synchronous.switched_off", False, f"the mode is off: /sync, which names {view.sync.leader}, is deleted first")
        return Upkeep(actions=(delete,), memory=memory, reasons=(why,), wake_in_s=SOON_S)
    if not written.told or written.names is not None:
        why = reason("synchronous.switched_off", False, "the mode is off: synchronous_standby_names becomes the operator's own")
        return Upkeep(actions=(SetSynchronousNames(names=None),), memory=memory, reasons=(why,), wake_in_s=SOON_S)
    return Upkeep(memory=memory)


def commits_go_on(now: State, verdicts: dict[str, Verdict]) -> Reason:
    """Are there enough of those whom commits wait for?"""
    demand = now.requirement
    here = sorted(name for name, verdict in verdicts.items() if verdict.healthy and (demand.anybody or name in demand.names))
    holds = len(here) >= demand.count
    return reason(COMMITS_GO_ON, holds, f"{len(here)} standbys confirm, {demand.count} needed" if holds
                  else f"commits wait: {len(here)} standbys confirm, {demand.count} needed ({who_is_fit(verdicts).because})")


def _standing(o: Observation, now: State, target: State) -> Reason:
    names = text_of(o, now.requirement) if not now.requirement.anybody else "*"
    said = f"commits wait for {names or 'nobody'}, /sync promises {now.promise}"
    if now == target:
        return reason("synchronous.set_is_as_wanted", True, f"mode {o.settings.synchronous_mode}: {said}")
    return reason("synchronous.set_is_as_wanted", False, f"mode {o.settings.synchronous_mode}: {said}; wanted {text_of(o, target.requirement) or 'nobody'} and {target.promise}")

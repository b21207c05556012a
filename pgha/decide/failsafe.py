"""The store may be away for long: may this node lead on by the others' word, and has it given its own? (safety model 12)

A leader goes on as long as *all* who might take over promise, again and again, not to. Who might: the members listed in
`/failsafe`, which the leader keeps, and the current ones, who may be about to be listed. Whoever is missing in a list
that is not empty takes no part in an election, also after the mode was switched off: the leader that relies on the list
may be cut off, and not know. So the list is kept true for as long as it is there.

A list that was sent counts as written and as not written until the key's revision has moved on: it may still arrive, and
name a member whose key has vanished meanwhile (`FailsafeBook.sent`). The same holds for what a former agent of this epoch
may have sent, so a restarted one relies on the list only once the key has moved on, and writes it once for that.
"""

from __future__ import annotations

import json

from msgspec.structs import replace

from pgha.clock import remaining_s
from pgha.decide.common import may_write, reason, view_of
from pgha.decide.standing import licensed
from pgha.model.action import WriteKey
from pgha.model.cluster import ClusterView
from pgha.model.decision import FailsafeBook, Memory, Reason
from pgha.model.failsafe import FailsafeOrder, Promise
from pgha.model.lock import LicenceState
from pgha.model.observation import Observation

# --- the leader --------------------------------------------------------------------------------------------------------

def conditions(o: Observation, memory: Memory) -> tuple[Reason, ...]:
    """All must hold before this node leads on by the others' word."""
    return (mode_is_on(o), is_licensed(o), leader_is_listed(o), no_former_list_is_on_its_way(o, memory), nothing_ends_it(o))


def mode_is_on(o: Observation) -> Reason:
    return reason("failsafe.mode_is_on", o.settings.failsafe_mode, f"failsafe_mode {'on' if o.settings.failsafe_mode else 'off'}")


def is_licensed(o: Observation) -> Reason:
    """What is extended must be there; and in pause it does not end, once that is known to be committed. One that is only
    wanted, or whose answer was lost, ends: should its record stand after all, that does not expire, and a promise given
    beside it only makes the one who is named wait for longer."""
    licence = o.licence
    holds = licence.state is LicenceState.HELD and licence.mode == "held" and licence.valid_until is not None and remaining_s(licence.valid_until, o.now) > 0
    return reason("failsafe.is_licensed", holds, f"licence {licence.state}, mode {licence.mode}")


def leader_is_listed(o: Observation) -> Reason:
    """The list protects only once it was read from the store, with this node in it."""
    rule, view = "failsafe.leader_is_listed", o.dcs.view
    listed = view.failsafe if view is not None else {}
    return reason(rule, o.me.name in listed, f"the key failsafe lists {', '.join(sorted(listed)) or 'nobody'}")


def no_former_list_is_on_its_way(o: Observation, memory: Memory) -> Reason:
    """Whom an agent of this node's that is no more has listed last, nobody knows."""
    rule, view = "failsafe.no_former_list_is_on_its_way", o.dcs.view
    if view is None or view.epoch.incarnation == o.me.incarnation:
        return reason(rule, True, "all lists of this epoch are this agent's own")
    first, now = book_of(o, view, memory).first_revision, view.revision_of("failsafe")
    return reason(rule, now != first, f"the key failsafe has revision {now}, and had {first} when this agent took over the lock of a former one")


def nothing_ends_it(o: Observation) -> Reason:
    """A server that is being stopped needs no longer licence than it has."""
    ending = o.shutting_down or (o.operation is not None and o.operation.kind in ("Demote", "Stop"))
    return reason("failsafe.nothing_ends_it", not ending, "PostgreSQL is being stopped" if ending else "nothing is being stopped")


def order(o: Observation, memory: Memory, slots: dict[str, int]) -> FailsafeOrder | None:
    """Whom to ask if the store stays silent; None: nobody, the licence just ends."""
    if o.dcs.view is None or not all(r.holds for r in conditions(o, memory)):
        return None
    return FailsafeOrder(members=who_may_race(o, o.dcs.view, memory), slots=slots)


def who_may_race(o: Observation, view: ClusterView, memory: Memory) -> dict[str, str]:
    """name → api_url of all others that are listed, are members now, or were when a list was sent that may still arrive."""
    members = {**book_of(o, view, memory).sent, **view.failsafe, **{m.name: m.api_url for m in view.members.values() if m.api_url}}
    members.pop(o.me.name, None)
    return members


def book_of(o: Observation, view: ClusterView, memory: Memory) -> FailsafeBook:
    """The memory of this reign; what was sent is forgotten once the key has moved on."""
    book, revision = memory.failsafe, view.revision_of("failsafe")
    if book.epoch_revision != o.licence.epoch_revision or book.first_revision < 0:
        return FailsafeBook(epoch_revision=o.licence.epoch_revision, first_revision=revision)
    return replace(book, sent={}, sent_on=-1) if book.sent and book.sent_on != revision else book


def remember(o: Observation, memory: Memory) -> Memory:
    """The book is opened in the first pass of a reign that sees the store."""
    if o.dcs.view is None or not licensed(o):
        return memory
    book = book_of(o, o.dcs.view, memory)
    return memory if book == memory.failsafe else replace(memory, failsafe=book)


def agreement(o: Observation) -> str:
    """Who stands in the way, for people; "" if the mode is off or everybody agreed."""
    missing = o.failsafe.missing
    if not o.settings.failsafe_mode or not missing:
        return ""
    return "; failsafe: not accepted by " + ", ".join(f"{name} ({why})" for name, why in sorted(missing.items()))


def list_to_write(o: Observation, memory: Memory) -> tuple[WriteKey | None, Memory]:
    """`/failsafe`: all members with an api_url. None: it says so already and nothing else can arrive, or this is not the time.

    Not while the licence lives on the others' word: whoever is added now has not given any.
    """
    view = view_of(o)
    if o.licence.by_failsafe or o.dcs.unreachable_since is not None or not (o.settings.failsafe_mode or view.failsafe):
        return None, memory
    members = {m.name: m.api_url for m in sorted(view.members.values(), key=lambda m: m.name) if m.api_url}
    # A restarted store loses leased keys: who still streams from here has not gone, and must not be kept from succeeding.
    row = o.postgres.row
    streaming = {str(line.get("application_name")) for line in row.replication} if row is not None else set()
    members.update({n: url for n, url in view.failsafe.items() if n not in members and (n in streaming or n == o.me.name)})
    book, revision = book_of(o, view, memory), view.revision_of("failsafe")
    settled = not book.sent and no_former_list_is_on_its_way(o, memory).holds
    if o.me.name not in members or (members == view.failsafe and (settled or not o.settings.failsafe_mode)):
        return None, memory
    value = json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()
    action = WriteKey(key="failsafe", value=value, if_revision=revision, epoch_revision=o.licence.epoch_revision)
    return action, replace(memory, failsafe=replace(book, sent={**book.sent, **members}, sent_on=revision))


# --- everybody else ----------------------------------------------------------------------------------------------------

def promise(o: Observation) -> Promise | None:
    """The promise that binds now; None: nothing was promised, or it is over."""
    given = o.failsafe.promise
    return given if given is not None and given.binds(o.dcs.lock_seen.record, o.now) else None


def pinging_leader(o: Observation) -> Promise | None:
    """The leader to whom this node has promised; None also if it only assumes that it may have."""
    given = promise(o)
    return given if given is not None and given.name else None


def nothing_is_promised(o: Observation) -> Reason:
    """Asked again by the renewer, immediately before it sends."""
    given = promise(o)
    return reason("failsafe.nothing_is_promised", given is None, "no promise binds" if given is None else
                  f"promised to {given.name or 'a leader of before this boot'} not to take over for another {given.left_s(o.now):.1f} s")


def is_listed(o: Observation) -> Reason:
    """A leader that is cut off asks only those in the list: nobody else may take over."""
    listed = view_of(o).failsafe
    holds = not listed or o.me.name in listed
    return reason("failsafe.is_listed", holds, f"the key failsafe lists {', '.join(sorted(listed)) or 'nobody'}"
                  + ("" if holds else f", not {o.me.name}: if its leader is certainly down, delete that key"))


# --- both --------------------------------------------------------------------------------------------------------------

def is_active(o: Observation) -> bool:
    """Does a leader lead by the others' word, this one or the one to whom this node gave its own?"""
    return (o.licence.by_failsafe and is_licensed(o).holds and may_write(o)) or pinging_leader(o) is not None

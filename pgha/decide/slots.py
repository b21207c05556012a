"""Which physical slots ought this server to have, and where ought they to stand? (compatibility spec 15)

Every server keeps a slot for every other member, for those that went away within member_slots_ttl, and for each permanent
one of the shared configuration: so a promoted standby still holds the WAL that their readers need. A slot that nobody reads
from *here* is moved along: on a standby to what the leader publishes, on the leader to what a cascading member has.

Rules of this file:
* only physical slots are touched; what `ignore_slots` matches is never dropped.
* a permanent slot is dropped only if PostgreSQL has invalidated it, or it never kept anything: then it is made anew.
* nothing is dropped in pause, nor while the configuration does not say for certain what is to be kept.
"""

from __future__ import annotations

from collections.abc import Iterable

from pgha.clock import remaining_s
from pgha.decide import failsafe
from pgha.decide.cascade import cascades_from
from pgha.decide.common import mib, reason, view_of
from pgha.decide.standing import standing
from pgha.model.action import Action, MaintainSlots
from pgha.model.cluster import Member, slot_name
from pgha.model.decision import Reason
from pgha.model.node import Row, Slot
from pgha.model.observation import Observation, SlotMatcher
from pgha.model.wal import format_lsn

#: So much WAL kept by a logical slot that nobody moves is worth a word.
MUCH_BYTES = 64 << 20


def own_slot_name(o: Observation) -> str:
    """The slot that this node uses on its upstream; empty without slots."""
    return slot_name(o.me.name) if o.settings.use_slots else ""


def maintenance(o: Observation) -> MaintainSlots | None:
    """What to create, advance and drop now; None if nothing. A slot both dropped and created is made anew."""
    row = o.postgres.row
    if row is None:
        return None
    if not o.settings.use_slots:
        return _left_over(o, row)
    readers = _readers(o, row)
    wanted = _wanted(o, row, readers)
    taken = {s.name: s for s in row.slots}
    have = {s.name: s for s in row.slots if s.type == "physical" and not s.temporary}
    gone, anew = _unwanted(o, row, have, wanted), _useless(o, row, have, wanted, readers)
    create = tuple(sorted(anew | (wanted - taken.keys())))
    advance = tuple((name, lsn) for name, lsn in sorted(_targets(o, row, readers).items())
                    if name in have and name not in gone | anew and not have[name].active and 0 < have[name].restart_lsn < lsn)
    drop = tuple(sorted(gone | anew))
    if not (create or drop or advance):
        return None
    return MaintainSlots(create=create, advance=advance, drop=drop)


def upkeep(o: Observation) -> list[Action]:
    """The same as a pass does it, where nothing else is asked for: while there is no room for a slot it fails each time and ends
    its pass, and what would make room (another max_replication_slots, and the restart that it needs) must not wait for it."""
    action = maintenance(o)
    return [] if action is None else [action]


def published_slots(o: Observation) -> dict[str, int]:
    """`status.slots`: every member's and every permanent slot with its position on the leader, and the leader's own name with
    its LSN. Whoever else has a slot here, its position is nobody's to follow."""
    row = o.postgres.row
    if row is None or o.dcs.view is None or not o.settings.use_slots:
        return {}
    ours = _wanted(o, row, _readers(o, row)) | _retained(o, row)
    slots = {s.name: s.restart_lsn for s in row.slots if s.name in ours and s.type == "physical" and not s.temporary and s.restart_lsn}
    slots[slot_name(o.me.name)] = row.lsn
    return slots


def retained_names(o: Observation) -> list[str]:
    """`status.retain_slots`: of all members that there are, or were within member_slots_ttl."""
    row = o.postgres.row
    members = {slot_name(m.name) for m in view_of(o).members.values() if not m.tags.nostream}
    return sorted(members | (_retained(o, row) if row is not None else set()) | {slot_name(o.me.name)})


# --- which ---------------------------------------------------------------------------------------------------------------

def _readers(o: Observation, row: Row) -> frozenset[str]:
    """The members that are to stream from here."""
    view, me = view_of(o), o.me.name
    if row.in_recovery and not any(m.tags.replicatefrom for m in view.members.values()):
        return frozenset()
    leader = standing(o).holder if row.in_recovery else me
    upstreams = {m.name: cascades_from(view, m.name, m.tags, leader) for m in view.members.values()}
    return frozenset(name for name, upstream in upstreams.items() if (upstream.name == me if upstream is not None else not row.in_recovery))


def _wanted(o: Observation, row: Row, readers: frozenset[str]) -> set[str]:
    """Those that are made where they are missing."""
    names = {slot_name(m.name) for m in view_of(o).members.values() if _keeps_for(o, row, m, readers)}
    if not (row.in_recovery and o.settings.tags.nofailover):     # who will never lead keeps nothing for the time when it does
        names |= set(o.settings.permanent_slots)
        if row.in_recovery and o.settings.member_slots_ttl_s > 0:
            names |= set(view_of(o).status.retain_slots) - _silent(o)
    return names - {slot_name(o.me.name)}


def _keeps_for(o: Observation, row: Row, member: Member, readers: frozenset[str]) -> bool:
    """Is a slot for this member to be here? With member_slots_ttl 0 only where it streams from."""
    if member.name == o.me.name or member.tags.nostream:
        return False
    if member.name in readers or member.tags.replicatefrom == o.me.name:     # the latter: as soon as this node runs, too
        return True
    return o.settings.member_slots_ttl_s > 0 and not (row.in_recovery and o.settings.tags.nofailover)


def _retained(o: Observation, row: Row) -> set[str]:
    """Slots of members whose keys are gone, within member_slots_ttl. A standby takes the leader's word as well."""
    if o.settings.member_slots_ttl_s <= 0:
        return set()
    names = {slot_name(n) for n in o.dcs.remembered_members} | set(o.dcs.remembered_slots)
    if row.in_recovery:
        names |= set(view_of(o).status.retain_slots)
    return names - _silent(o) - {slot_name(o.me.name)}


def _silent(o: Observation) -> set[str]:
    """Of members that read from an archive only."""
    return {slot_name(m.name) for m in view_of(o).members.values() if m.tags.nostream}


def _ignored(o: Observation, slot: Slot) -> bool:
    return any(_matches(matcher, slot) for matcher in o.settings.ignored_slots)


def _matches(matcher: SlotMatcher, slot: Slot) -> bool:
    pairs = ((matcher.name, slot.name), (matcher.type, slot.type), (matcher.database, slot.database), (matcher.plugin, slot.plugin))
    return all(given in ("", found) for given, found in pairs)


# --- which not -----------------------------------------------------------------------------------------------------------

def _may_drop(o: Observation) -> bool:
    """In pause what is there may be an operator's; a configuration that is gone, unreadable or of a store just restored may keep
    what this node does not know of."""
    if o.settings.pause or (o.dcs.trusted_from is not None and remaining_s(o.dcs.trusted_from, o.now) > 0):
        return False
    return o.settings.may_drop_slots and view_of(o).config is not None


def _unwanted(o: Observation, row: Row, have: dict[str, Slot], wanted: set[str]) -> set[str]:
    if not _may_drop(o):
        return set()
    kept = wanted | _retained(o, row) | set(o.settings.permanent_slots) - {slot_name(o.me.name)}
    return {name for name, slot in have.items() if name not in kept and not slot.active and not _ignored(o, slot)}


def _left_over(o: Observation, row: Row) -> MaintainSlots | None:
    """Slots were switched off: those of members, which nobody uses any more, would keep WAL for ever."""
    members = {slot_name(m.name) for m in view_of(o).members.values()} | _retained(o, row)
    names = {s.name for s in row.slots if s.name in members - set(o.settings.permanent_slots) and s.type == "physical" and not (s.temporary or s.active or _ignored(o, s))}
    return MaintainSlots(drop=tuple(sorted(names))) if names and _may_drop(o) else None


def _useless(o: Observation, row: Row, have: dict[str, Slot], wanted: set[str], readers: frozenset[str]) -> set[str]:
    """Those to be dropped and made anew: they keep no WAL, or hold back vacuum for a standby that has gone to another server.

    The latter only while the member streams, or leads: then it needs nothing from before, and the new slot begins early enough.
    """
    if not _may_drop(o):
        return set()
    idle = {name: slot for name, slot in have.items() if name in wanted and not slot.active and not _ignored(o, slot)}
    useless = {name for name, slot in idle.items() if slot.wal_status == "lost" or not slot.restart_lsn}
    old = {name for name, slot in idle.items() if slot.holds_back_vacuum}
    if old and row.in_recovery:
        elsewhere = {slot_name(m.name) for m in view_of(o).members.values() if m.name not in readers and (m.replication_state == "streaming" or m.name == standing(o).holder)}
        useless |= old & (elsewhere - set(o.settings.permanent_slots))
    return useless


# --- where ---------------------------------------------------------------------------------------------------------------

def _targets(o: Observation, row: Row, readers: frozenset[str]) -> dict[str, int]:
    """How far each slot that nobody reads from here may go, no further than this server has replayed, or written."""
    view = view_of(o)
    here = {slot_name(name) for name in readers}
    if row.in_recovery:
        # Not what a former leader wrote: its positions may be beyond the point where the present one's history begins.
        told = view.status.slots if view.revision_of("status") > view.revision_of("pgha/epoch") else {}
        pinging = failsafe.pinging_leader(o)
        told = {**told, **(pinging.slots if pinging else {})}
        return {name: min(lsn, row.replayed_lsn) for name, lsn in told.items() if name not in here}
    cascading = [m for m in view.members.values() if m.name != o.me.name and slot_name(m.name) not in here and m.timeline == row.timeline]
    return {slot_name(m.name): min(m.receive_lsn or m.replay_lsn, row.lsn) for m in cascading}


# --- what is to be known -------------------------------------------------------------------------------------------------

def obstacles(o: Observation) -> tuple[Reason, ...]:
    """What stands in the way of a slot that is wanted; nothing while all is well."""
    row = o.postgres.row
    if row is None or not o.settings.use_slots:
        return ()
    return (*_shared_names(o), *_taken_names(o, row), *_late(o, row), *_logical(row))


def complaint(found: tuple[Reason, ...]) -> str:
    """Of what only people can put right, to be said in the log; "" if there is nothing."""
    return "".join(f"; {o.because}" for o in found if o.rule in ("slots.names_differ", "slots.name_is_free"))


def _shared_names(o: Observation) -> Iterable[Reason]:
    members: dict[str, list[str]] = {}
    for member in view_of(o).members.values():
        members.setdefault(slot_name(member.name), []).append(member.name)
    for name, those in sorted(members.items()):
        if len(those) > 1:
            yield reason("slots.names_differ", False, f"members {' and '.join(sorted(those))} have one slot, {name}: rename all but one of them")


def _taken_names(o: Observation, row: Row) -> Iterable[Reason]:
    others = [slot for slot in row.slots if slot.temporary or slot.type != "physical"]
    wanted = _wanted(o, row, _readers(o, row)) if others else set()
    for slot in others:
        if slot.name in wanted:
            yield reason("slots.name_is_free", False, f"a physical slot {slot.name} is wanted, and a {'temporary' if slot.temporary else slot.type} one has its name")


def _late(o: Observation, row: Row) -> Iterable[Reason]:
    """A slot begins where this server had WAL when it was made: its reader may need more."""
    for slot in row.slots if row.in_recovery else ():
        needed = view_of(o).status.slots.get(slot.name, 0)
        if slot.name in o.settings.permanent_slots and 0 < needed < slot.restart_lsn:
            yield reason("slots.kept_from_the_readers_position", False,
                         f"{slot.name} keeps WAL from {format_lsn(slot.restart_lsn)} here, its reader is at {format_lsn(needed)}: until it is past, it could not go on here")


def _logical(row: Row) -> Iterable[Reason]:
    """A former primary's: left alone, for it goes on where it was should this server lead again, and on a full disk nothing does."""
    for slot in row.slots if row.in_recovery else ():
        kept = row.replayed_lsn - slot.restart_lsn
        if slot.type == "logical" and not (slot.temporary or slot.active) and slot.restart_lsn and kept > MUCH_BYTES:
            yield reason("slots.logical_move_along", False, f"the logical slot {slot.name} keeps {mib(kept)} of WAL on this standby, and nobody moves it: drop it if it is not to be read from here again")

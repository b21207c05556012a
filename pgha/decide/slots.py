"""Which physical slots ought this server to have, and where ought they to stand? (compatibility spec 15)"""

from __future__ import annotations

from pgha.decide import failsafe
from pgha.decide.common import view_of
from pgha.model.action import MaintainSlots
from pgha.model.cluster import slot_name
from pgha.model.observation import Observation


def own_slot_name(o: Observation) -> str:
    """The slot that this node uses on its upstream; empty without slots."""
    return slot_name(o.me.name) if o.settings.use_slots else ""


def maintenance(o: Observation) -> MaintainSlots | None:
    """What to create, advance and drop now; None if nothing.

    Every node keeps a slot for every other member and for those that went away within member_slots_ttl, so that a
    promoted standby still holds the WAL that the others need.
    """
    row = o.postgres.row
    if row is None or not o.settings.use_slots:
        return None
    view = view_of(o)
    wanted = {slot_name(m.name) for m in view.members.values() if m.name != o.me.name and not m.tags.nostream}
    wanted |= {n for n in o.settings.permanent_slots if n != slot_name(o.me.name)}
    kept = wanted | set(o.settings.ignored_slots) | {slot_name(n) for n in o.dcs.remembered_members if n != o.me.name} | set(view.status.retain_slots) - {slot_name(o.me.name)}
    have = {s.name: s for s in row.slots if s.type == "physical" and not s.temporary}
    create = tuple(sorted(wanted - set(have)))
    ours = {s for s in have if s == slot_name(o.me.name)}
    unwanted = set() if o.settings.pause else (set(have) - kept) | ours      # pause: what is there may be an operator's
    drop = tuple(sorted(s for s in unwanted if not have[s].active))
    advance = []
    if row.in_recovery:
        leader = failsafe.pinging_leader(o)
        for name, lsn in sorted({**view.status.slots, **(leader.slots if leader else {})}.items()):
            slot = have.get(name)
            if slot is not None and not slot.active and slot.restart_lsn and slot.restart_lsn < lsn <= row.replayed_lsn:
                advance.append((name, lsn))
    if not (create or drop or advance):
        return None
    return MaintainSlots(create=create, advance=tuple(advance), drop=drop)


def published_slots(o: Observation) -> dict[str, int]:
    """`status.slots`: every member's slot with its position on the leader, and the leader's own name with its LSN."""
    row = o.postgres.row
    if row is None or not o.settings.use_slots:
        return {}
    slots = {s.name: s.restart_lsn for s in row.slots if s.type == "physical" and not s.temporary and s.restart_lsn}
    slots[slot_name(o.me.name)] = row.lsn
    return slots

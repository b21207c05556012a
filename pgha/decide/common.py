"""Small judgements that several situations share."""

from __future__ import annotations

from pgha.clock import Instant, candidate_age_s, holder_age_s, remaining_s
from pgha.model.action import Source
from pgha.model.cluster import ClusterView, Member
from pgha.model.decision import PeerQuestion, Reason
from pgha.model.lock import fence_at
from pgha.model.observation import Observation, Peer
from pgha.model.wal import HistoryRow

#: A peer's answer older than this says nothing about now.
FRESH_S = 1.0
#: Every number up to the claimed one is blocked by a file: a claim this far ahead was never a timeline.
NONSENSE_AHEAD = 1000


def may_write(o: Observation) -> bool:
    """May the running server accept writes? Unknown counts as yes where the guard was told that a primary may run."""
    postgres = o.postgres
    if not postgres.alive:
        return False
    if postgres.row is None:
        return o.guard.state in ("armed", "paused", "latched")
    return not postgres.row.in_recovery


def view_of(o: Observation) -> ClusterView:
    """The view, where a rung above has made sure that there is one."""
    assert o.dcs.view is not None, "decide.blind comes first"
    return o.dcs.view


def others(o: Observation) -> dict[str, str]:
    """Every other member there is, or was within member_slots_ttl, or that failsafe counts on: name → api_url (safety model 6.4)."""
    names = {**o.dcs.remembered_members, **view_of(o).failsafe}
    names.update({m.name: m.api_url for m in view_of(o).members.values() if m.api_url})
    names.pop(o.me.name, None)
    return names


def ask_others(o: Observation, *, epoch: int = -1, every_s: float = 0.1) -> PeerQuestion:
    """The question to all others."""
    return PeerQuestion(names=others(o), epoch=epoch, every_s=every_s)


def fresh_peers(o: Observation, within_s: float = FRESH_S) -> dict[str, Peer]:
    """Peers that answered within the last second or so."""
    return {n: p for n, p in o.peers.items() if p.answered and n != o.me.name and holder_age_s(p.asked_at, o.now) <= within_s}


def leader_member(o: Observation, holder: str) -> Member | None:
    """The holder's member key, if it has one."""
    return view_of(o).members.get(holder)


def source_of(member: Member) -> Source:
    return Source(name=member.name, host=member.host, port=member.port)


def fence_in_s(o: Observation) -> float:
    """Seconds until the fence by this incarnation's licence; negative without one."""
    licence = o.licence
    if licence.valid_until is None:
        return -1.0
    return remaining_s(fence_at(licence.valid_until, licence.ttl_s), o.now)


def backed_off(o: Observation, *, failures: int, last: Instant | None) -> float:
    """Seconds still to wait after `failures` failures in a row, the last at `last`: 1, 2, 4 … 30 s."""
    if not failures or last is None:
        return 0.0
    wait_s = min(30.0, 2.0 ** (failures - 1))
    return max(0.0, wait_s - candidate_age_s(last, o.now))


def stop_timeout_s(o: Observation) -> float:
    """How long an orderly stop may take: 0 counts as 300 s (safety model 10)."""
    return o.settings.primary_stop_timeout_s or 300.0


def own_history(o: Observation, timeline: int) -> tuple[HistoryRow, ...] | None:
    """The history of the own `timeline`; None if it is not known."""
    return o.directory.history_on(timeline)


def by_name(methods: tuple[str, ...]) -> str:
    """How a copy is made, for people."""
    return ", then ".join("pg_basebackup" if name == "basebackup" else name for name in methods)


def reason(rule: str, holds: bool, because: str) -> Reason:  # noqa: FBT001  (the verdict is what the reader looks for)
    return Reason(rule=rule, holds=holds, because=because)


def mib(size_bytes: int) -> str:
    """Bytes for people: "46.7 MiB", "512 bytes"."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} bytes"
    if abs(size_bytes) < 1024 * 1024:
        return f"{size_bytes / 1024:.1f} KiB"
    return f"{size_bytes / 1024 / 1024:.1f} MiB"

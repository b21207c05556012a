"""Which standbys are fit to be waited for, which are not, and why? Whom does the leader want, then?

A standby that is not waited for yet must first have confirmed a position that it was set: taking it earlier would let
commits wait until it has caught up. One that is waited for stays until it is told otherwise, is silent for as long as a
silent primary may be, or has been disconnected for a moment. (compatibility spec 12.3)
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide.common import mib, reason, view_of
from pgha.decide.steps import State
from pgha.decide.sync_book import flushed, taken_over
from pgha.model.cluster import Member
from pgha.model.decision import Reason, Replica, SyncBook
from pgha.model.node import Row
from pgha.model.observation import Observation
from pgha.model.synchronous import PLACEHOLDER, Promise, Requirement, parse_requirement
from pgha.model.wal import format_lsn

#: A standby that was connected may come back within this time before commits go on without it.
COMES_BACK_S = 2.0
SOON_S = 0.1


class Verdict(Struct, frozen=True, kw_only=True):
    """Of one standby. `why` '': it is fit to be waited for; `stays`: at least it is not let go yet. `healthy`: it streams
    and confirms. `again_in_s`: when this may change without news."""

    why: str = ""
    stays: bool = False
    healthy: bool = False
    again_in_s: float = 0.0
    order: tuple[int, int, int] = (0, 0, 0)
    reserve: bool = False            # tag nofailover: it could not lead, so it comes last


def note_replicas(o: Observation, book: SyncBook, row: Row, expected: tuple[str, ...]) -> SyncBook:
    """Set everybody who reached the last target a new one."""
    at, on_disk = o.postgres.row_at or o.now, flushed(row)
    known = book.replicas
    promise, requirement = taken_over(o), parse_requirement(row.synchronous_standby_names)
    if not known:
        # At the beginning of a reign those who answered as standbys have yet to connect; after an agent's start, all.
        here = {name.lower() for name in expected} if view_of(o).epoch.incarnation == o.me.incarnation else promise.voters
        known = {name: Replica(since=at, streaming=True) for name in sorted(here)}
    after: dict[str, Replica] = {}
    for name, lsn in on_disk.items():
        old = known.get(name)
        if old is None or not old.streaming or not old.target:
            after[name] = Replica(target=row.lsn, since=at)
        else:
            after[name] = Replica(target=row.lsn, since=at, confirmed=True) if lsn >= old.target else old
    for name, old in known.items():
        if name not in on_disk and (name in promise.voters or name in requirement.names):
            after[name] = Replica(since=at, streaming=False) if old.streaming else old
    return replace(book, replicas=after)


def standbys(o: Observation, book: SyncBook, now: State) -> dict[str, Verdict]:
    """Everybody who is a member, or is waited for or promised: fit or not, and why."""
    me = o.me.name.lower()
    members: dict[str, list[Member]] = {}
    for member in view_of(o).members.values():
        if member.name.lower() != me:
            members.setdefault(member.name.lower(), []).append(member)
    row = o.postgres.row
    assert row is not None
    on_disk = flushed(row)
    verdicts = {}
    for name in sorted({*members, *now.promise.voters, *now.requirement.names} - {PLACEHOLDER}):
        here = members.get(name, [])
        if len(here) != 1:
            verdicts[name] = Verdict(why="has no member key" if not here else "is the name of two members")
            continue
        current = name in now.requirement.names
        obstacle = _obstacle(o, here[0], on_disk)
        if obstacle:
            # It is to be let go, but as long as it confirms it may help to hand its place over.
            replica, lsn = book.replicas.get(name), on_disk.get(name)
            confirms = replica is not None and lsn is not None and _silent_s(o, replica, lsn) < o.settings.primary_hang_timeout_s
            verdicts[name] = Verdict(why=obstacle, healthy=current and confirms)
        elif name not in on_disk:
            verdicts[name] = _absent(o, here[0], book.replicas.get(name), current=current)
        else:
            best = max(lsn for other, lsn in on_disk.items() if other in members)
            verdicts[name] = _streaming(o, here[0], book.replicas[name], current=current, lsn=on_disk[name], best=best)
    return verdicts


def _obstacle(o: Observation, member: Member, on_disk: dict[str, int]) -> str:
    """What its own key says against it."""
    tags, upstream = member.tags, (member.tags.replicatefrom or "").lower()
    if tags.nosync or tags.nostream:
        return f"tag {'nosync' if tags.nosync else 'nostream'} is set"
    if member.state != "running":
        return f"state is {member.state or 'unknown'}"
    if upstream in on_disk and upstream not in (member.name.lower(), o.me.name.lower()):
        return f"is to stream from {tags.replicatefrom}"
    return ""


def _absent(o: Observation, member: Member, replica: Replica | None, *, current: bool) -> Verdict:
    left_s = COMES_BACK_S - candidate_age_s(replica.since, o.now) if replica is not None else 0.0
    if left_s <= 0:
        return Verdict(why="does not stream from here")
    return Verdict(why=f"does not stream from here, may come back for another {left_s:.1f} s", stays=current, again_in_s=max(SOON_S, left_s),
                   order=(-member.tags.sync_priority, 0, 0), reserve=member.tags.nofailover)


def _silent_s(o: Observation, replica: Replica, lsn: int) -> float:
    """For how long it has not reached the position that it was set."""
    return candidate_age_s(replica.since, o.now) if lsn < replica.target else 0.0


def _streaming(o: Observation, member: Member, replica: Replica, *, current: bool, lsn: int, best: int) -> Verdict:
    limit_s, limit = o.settings.primary_hang_timeout_s, o.settings.maximum_lag_on_syncnode_bytes
    silent_s = _silent_s(o, replica, lsn)
    if silent_s >= limit_s:
        return Verdict(why=f"has not confirmed {format_lsn(replica.target)} for {silent_s:.1f} s, limit {limit_s:g} s")
    if 0 < limit < best - lsn:
        return Verdict(why=f"lag {mib(best - lsn)}, maximum_lag_on_syncnode {mib(limit)}")
    if not current and not replica.confirmed:
        return Verdict(why=f"catches up: at {format_lsn(lsn)} of {format_lsn(replica.target)}", again_in_s=1.0)
    return Verdict(stays=current, healthy=True, order=(-member.tags.sync_priority, 0 if current else 1, 0 if current else -lsn), reserve=member.tags.nofailover,
                   again_in_s=max(SOON_S, limit_s - silent_s) if silent_s else 0.0)


def target_of(o: Observation, now: State, verdicts: dict[str, Verdict]) -> State:
    """What is wanted with those who are fit, and those who are not let go yet."""
    fit = sorted((n for n, v in verdicts.items() if not v.why or v.stays), key=lambda n: (verdicts[n].reserve, verdicts[n].order, n))
    number, quorum_mode = o.settings.synchronous_node_count, o.settings.synchronous_mode == "quorum"
    if quorum_mode:
        first = [n for n in fit if not verdicts[n].reserve]
        picked = [*first, *[n for n in fit if verdicts[n].reserve][:max(0, number - len(first))]]
    else:
        picked = fit[:number]
    if not picked:
        if not o.settings.synchronous_mode_strict:
            return State(promise=Promise(), requirement=Requirement())
        # Strict: rather no commit than one that only this node has. Nothing is acknowledged, so nobody need be let go.
        blocked = now.requirement if now.requirement.count and not now.requirement.anybody else Requirement(names=frozenset({PLACEHOLDER}), count=1)
        return State(promise=now.promise, requirement=blocked)
    names, count = frozenset(picked), min(number, len(picked))
    return State(promise=Promise(voters=names, quorum=len(names) - count), requirement=Requirement(names=names, count=count, by_priority=not quorum_mode))


def who_is_fit(verdicts: dict[str, Verdict]) -> Reason:
    fit = [name for name, verdict in verdicts.items() if not verdict.why]
    said = "; ".join(f"{name}: {verdict.why or 'fit'}" for name, verdict in verdicts.items())
    return reason("synchronous.somebody_is_fit", bool(fit), said or "there is no other member")

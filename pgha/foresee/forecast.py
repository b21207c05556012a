"""What comes of a hypothesis: who leads then, or why nobody does, when, and what each node decides on the way.

A future is open where the outcome hangs on what nobody knows now: whose clock runs faster, who gets what is still on its
way, whether a node that is just starting will be ready in time. Each of these is one way (`Supposed`), all are gone, and
`winners` are all who won in any of them. `likely` is who wins if clocks are right and WAL stands still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import DRIFT, NEVER
from pgha.decide import promotion
from pgha.decide.standing import Whose, standing
from pgha.foresee.hypothesis import Hypothesis
from pgha.foresee.world import TAKES_S, Said, Seen, Supposed, World
from pgha.model.decision import Reason
from pgha.model.lock import wait_s
from pgha.model.observation import Observation

#: After a record has expired: time for votes, silent members, a candidate that is left the field, and standing back.
ELECTION_S = 30.0
#: After the outcome is there: for the old leader to notice, and for /sync to be written.
AFTER_S = 1.0
#: A promotion takes this long by experience, and at most about this.
PROMOTION_S = (0.1, 1.5)


class Then(Struct, frozen=True, kw_only=True):
    """What a node decides from `at_s` on, in words and with all obstacles."""

    at_s: float
    situation: str
    summary: str
    refused_by: tuple[Reason, ...] = ()
    actions: tuple[str, ...] = ()


class Forecast(Struct, frozen=True, kw_only=True):
    """`leader`: who leads now, "" nobody; `writes_now`: and accepts writes. `winners`: who may lead in the end, the present leader too; empty: nobody will.

    `demotes`: who stops accepting writes, with the first and the last second at which it may begin; `writes_back_s`: when
    writes are possible again, at the earliest and the latest, None if they never stop or never come back. All in seconds
    from now, by ttl and loop_wait: estimates. `obstacles`: of everybody who does not win, why. `sync`: who may lead by /sync
    at the end; None: no synchronous mode. `unknown`: what this forecast does not know.
    """

    hypotheses: tuple[str, ...]
    leader: str = ""
    writes_now: bool = False
    likely: str = ""
    winners: tuple[str, ...] = ()
    nobody_possible: bool = False
    writes_stop: bool = False
    writes_back_s: tuple[float, float] | None = None
    lock_free_s: tuple[float, float] | None = None
    demotes: dict[str, tuple[float, float]] = {}
    why_demoted: dict[str, str] = {}
    failsafe: str = ""
    obstacles: dict[str, tuple[Reason, ...]] = {}
    sync: tuple[str, ...] | None = None
    sync_leader: str = ""
    commits_wait: str = ""
    nodes: dict[str, tuple[Then, ...]] = {}
    ages_s: dict[str, float] = {}
    unknown: tuple[str, ...] = ()
    ways: int = 0

    @property
    def certain(self) -> bool:
        """One outcome in all ways."""
        return len(self.winners) + self.nobody_possible == 1 and not (self.winners and self.nobody_possible)


class _Outcome(Struct, kw_only=True):
    """Of one way. `at_s`: when writes were possible again."""

    leader: str = ""
    at_s: float | None = None
    taken_at_s: float | None = None
    interrupted: bool = False


def foresee(seen: Mapping[str, Seen], hypotheses: Sequence[Hypothesis], *, unheard: Mapping[str, str] | None = None) -> Forecast:
    """`unheard`: members whose agents did not answer, and why: they are taken to be down. At least one must have answered."""
    assert seen, "nobody's observation: nothing can be foretold"
    base = World(seen, Supposed(hypotheses=tuple(hypotheses)))
    leader = _leads_now(seen)
    first = _run(base, leader)
    outcomes = [first]
    worlds = [base]
    for supposed in _ways(seen, base, tuple(hypotheses), leader):
        world = World(seen, supposed)
        outcomes.append(_run(world, leader))
        worlds.append(world)
    winners = tuple(sorted({o.leader for o in outcomes if o.leader}))
    mixed = any(not m.is_pgha and m.version for m in World(seen, Supposed()).view.members.values())
    unknown, may_join = _unknown(World(seen, Supposed(hypotheses=tuple(hypotheses))), unheard or {}, leader_lost=any(o.leader != leader for o in outcomes))
    back = [o.at_s for o in outcomes if o.at_s is not None]
    stops = any(o.interrupted for o in outcomes)
    return Forecast(
        hypotheses=tuple(str(h) for h in hypotheses), leader=leader, writes_now=leader in seen and seen[leader].observation.postgres.is_primary, likely=first.leader, winners=tuple(sorted({*winners, *may_join})),
        nobody_possible=any(not o.leader for o in outcomes), writes_stop=stops,
        writes_back_s=(0.0 if _is_about_to(seen) else round(min(back), 2), round(max(back) + PROMOTION_S[1] + _unseen_s(seen), 2)) if stops and back and not mixed else None,
        lock_free_s=_lock_free_s(seen, hypotheses), demotes=_demotions(worlds, seen), why_demoted={name: why for world in worlds for _, name, why in world.demoted},
        failsafe=_failsafe(base), obstacles=_obstacles(base, first), sync=_sync(base), sync_leader=base.view.sync.leader, commits_wait=_commits_wait(base),
        nodes={name: tuple(_then(said) for said in base.said if said.node == name) for name in base.nodes if base.nodes[name].up},
        ages_s={name: round(one.age_s, 3) for name, one in seen.items()}, unknown=unknown, ways=len(outcomes))


def _is_about_to(seen: Mapping[str, Seen]) -> bool:
    """Is a primary being started or promoted? That may be done in the next moment."""
    return any(one.observation.operation is not None and one.observation.operation.kind in ("StartPrimary", "Promote", "Restart") for one in seen.values())


def _leads_now(seen: Mapping[str, Seen]) -> str:
    world = World(seen, Supposed())
    leader = world.leader()
    return leader.name if leader is not None else world.outsider()


def _horizon_s(world: World) -> float:
    """By then whatever can be decided is: records expire, absence is believed, standbys are let go."""
    settings = [n.o.settings for n in world.nodes.values()]
    ttl_s = max([*(s.ttl_s for s in settings), world.view.lock.ttl_s if world.view.lock is not None else 0.0])
    waits = [left for n in world.nodes.values() if n.up and 0 < (left := standing(n.o).left_s) < 1e6]
    hang_s = max(s.primary_hang_timeout_s for s in settings) if any(s.synchronous_mode != "off" for s in settings) else 0.0
    return max([wait_s(ttl_s), *waits]) + max(ELECTION_S, hang_s)


def _run(world: World, leader: str) -> _Outcome:
    """Until somebody leads, or went on leading for long enough, or nobody will."""
    outcome = _Outcome()
    horizon_s = _horizon_s(world)

    def settled() -> bool:
        now = world.leader()
        if now is None or not now.writes or not world.store_up:
            return False        # without the store whoever leads now may have to stop
        return bool(world.promoted) and world.promoted[-1][1] == now.name and world.at_s >= world.promoted[-1][0] + AFTER_S

    world.run(horizon_s, stop=settled)
    now = world.leader()
    if leader not in world.nodes:
        # A member of another make leads, or nobody: what it does is not known here, but that it leads on if nothing befalls it.
        if now is None and world.store_up:
            outcome.leader = world.outsider()
        outcome.interrupted = leader not in ("", outcome.leader)
    else:
        outcome.interrupted = (not world.nodes[leader].up or any(name == leader for _, name, _ in world.demoted) or not world.nodes[leader].writes)
    if now is not None and now.writes:
        outcome.leader = now.name
        if world.promoted:
            outcome.at_s = world.promoted[-1][0]
    if world.taken:
        outcome.taken_at_s = world.taken[-1][0]
    return outcome


def _ways(seen: Mapping[str, Seen], base: World, hypotheses: tuple[Hypothesis, ...], leader: str) -> list[Supposed]:
    """What may go another way than in the plainest case, where there is an election at all."""
    if not base.taken and leader and not base.demoted and (base.nodes[leader].up if leader in base.nodes else base.outsider() == leader):
        # It leads on; unless its PostgreSQL, which is just being started, does not come up.
        others = [n.name for n in base.nodes.values() if n.up and n.name != leader]
        return [Supposed(hypotheses=hypotheses, fails=leader, quick=name) for name in ("", *others)] if base.promoted else []
    if base.view.lock is not None and base.view.lock.mode == "paused" and not base.taken:
        return []
    standbys = [n for n in base.nodes.values() if n.up and n.o.postgres.row is not None]
    ways = [Supposed(hypotheses=hypotheses, first=n.name, drift=drift) for n in standbys for drift in (DRIFT, DRIFT / 10)]
    ways += [Supposed(hypotheses=hypotheses, quick=n.name) for n in standbys]
    if _moves(World(seen, Supposed(hypotheses=hypotheses)), hypotheses):
        lags = {h.node for h in hypotheses if h.what == "lag"}
        moving = [n.name for n in standbys if n.name not in lags]
        ways += [Supposed(hypotheses=hypotheses, most=name) for name in moving]
        ways += [Supposed(hypotheses=hypotheses, most=name, first=other.name, drift=DRIFT) for name in moving for other in standbys if other.name != name]
    if any(seen[n.name].memory.election is not None for n in standbys):
        ways += [Supposed(hypotheses=hypotheses, late=n.name) for n in standbys]
    ways += [Supposed(hypotheses=hypotheses, vetoes=n.name) for n in standbys if n.o.settings.pre_promote_s]
    ways += [Supposed(hypotheses=hypotheses, done=n.name) for n in base.nodes.values() if _is_being_made(seen[n.name]) and n.up]
    return ways


def _is_being_made(seen: Seen) -> bool:
    """Its data is being copied or rewound: nobody knows for how long."""
    operation = seen.observation.operation
    return operation is not None and operation.kind not in TAKES_S


def _moves(world: World, hypotheses: tuple[Hypothesis, ...]) -> bool:
    """Is WAL on its way? It stands still if everybody has what the leader has, and that has not grown since it was last
    published; else who gets how much of what comes is open."""
    lags = {h.node for h in hypotheses if h.what == "lag"}
    ends = {row.position for n in world.nodes.values() if (row := n.o.postgres.row) is not None and n.name not in lags}
    writing = world.holder()
    if writing is not None and writing.o.postgres.is_primary:
        ends.add(world.view.published_position.lsn)
    return len(ends) > 1


def _unseen_s(seen: Mapping[str, Seen]) -> float:
    """The record may have been renewed since it was seen last."""
    return min((one.age_s for one in seen.values()), default=0.0)


def _lock_free_s(seen: Mapping[str, Seen], hypotheses: Sequence[Hypothesis]) -> tuple[float, float] | None:
    """When the record that stands may be taken if nobody renews it: by the first clock that may, and by the last."""
    if not any(h.what == "down" for h in hypotheses):
        return None
    world = World(seen, Supposed(hypotheses=tuple(hypotheses)))
    lefts = []
    for node in world.nodes.values():
        if node.up and world.store_up:
            now = standing(replace(node.o, now=node.clock(0.0)))
            if now.whose in (Whose.LIVE, Whose.ABSENT) and now.left_s < 1e6:
                lefts.append(now.left_s)
    return (round(min(lefts) * (1 - DRIFT), 2), round(max(lefts) * (1 + DRIFT), 2)) if lefts else None


def _demotions(worlds: Sequence[World], seen: Mapping[str, Seen]) -> dict[str, tuple[float, float]]:
    """When each begins, at the earliest and the latest: its licence may have been renewed since it was seen."""
    found: dict[str, list[float]] = {}
    for world in worlds:
        for at_s, name, _ in world.demoted:
            found.setdefault(name, []).append(at_s)
    return {name: (round(min(times), 2), round(max(times) + seen[name].age_s, 2)) for name, times in found.items()}


def _failsafe(world: World) -> str:
    """"" if no round was needed."""
    if not world.failsafe_rounds:
        return ""
    at_s, name, missing = world.failsafe_rounds[-1]
    if missing:
        return f"{name} asks the others after {at_s:.1f} s, and leads on only if all agree: " + ", ".join(f"{who} does not ({why})" for who, why in sorted(missing.items()))
    return f"{name} leads on by the others' word: all who might take over agree (asked first after {world.failsafe_rounds[0][0]:.1f} s)"


def _obstacles(world: World, outcome: _Outcome) -> dict[str, tuple[Reason, ...]]:
    """Of everybody who lives and does not lead in the plainest case: what speaks against it, by the rules of an election."""
    found = {}
    for name, node in world.nodes.items():
        if not node.up or name == outcome.leader or node.o.dcs.view is None:
            continue
        last = world.refused.get(name)
        reasons = {r.rule: r for r in (promotion.conditions(node.o, node.memory) if last is None else last) if not r.holds}
        now = standing(node.o)
        if not world.taken and now.whose in (Whose.LIVE, Whose.ABSENT, Whose.IMPOSTOR, Whose.UNKNOWN):
            reasons[f"standing.{now.whose}"] = Reason(rule=f"standing.{now.whose}", holds=False, because=now.because)
        found[name] = tuple(reasons.values())
    return found


def _sync(world: World) -> tuple[str, ...] | None:
    sync = world.view.sync
    if not sync.leader:
        return None
    return tuple(sorted(sync.members))


def _commits_wait(world: World) -> str:
    leader = world.leader()
    if leader is None or leader.decision is None:
        return ""
    held = next((r for r in leader.decision.reasons if r.rule == "synchronous.commits_go_on" and not r.holds), None)
    return held.because if held is not None else ""


def _then(said: Said) -> Then:
    decision = said.decision
    return Then(at_s=round(said.at_s, 2), situation=decision.situation, summary=decision.summary, refused_by=tuple(r for r in decision.reasons if not r.holds),
                actions=tuple(type(a).__name__ for a in decision.actions))


def _unknown(world: World, unheard: Mapping[str, str], *, leader_lost: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is not known, in sentences; and who may lead in the end for all that is known here."""
    said, may_join = [], []
    supposed = {h.node for h in world.supposed.hypotheses if h.what == "down"}
    for name, member in sorted(world.view.members.items()):
        if name in world.nodes or name in supposed:
            continue
        foreign = not member.is_pgha and bool(member.version)
        why = unheard.get(name, "was not asked")
        may = leader_lost and not member.tags.nofailover
        if foreign:
            said.append(f"{name} is run by another program (version {member.version}): what it decides is not known here" + ("; it may take over" if may else ""))
        else:
            said.append(f"{name} did not tell what it sees ({why}): it is taken to be down" + ("; if it is not, it may take over" if may else ""))
        if may:
            may_join.append(name)
    if any(not m.is_pgha and m.version for m in world.view.members.values()):
        said.append("members of another make take part: when the lease of the key leader ends, and whether one of them takes it first, is not foretold")
    for name, node in world.nodes.items():
        operation = node.o.operation
        if node.up and leader_lost and node.o.settings.pre_promote_s:
            said.append(f"{name}: its pre_promote may refuse, or take up to {node.o.settings.pre_promote_s:g} s")
        if node.up and operation is not None and operation.kind not in TAKES_S:
            said.append(f"{name}: how long its {operation.kind.lower()} takes is not known")
    return tuple(said), tuple(may_join)


def in_words(value: Any) -> str:
    """A moment for people: "in 12.3 s", "in 12 to 14 s"."""
    low, high = value
    return f"in about {low:.1f} s" if high - low < 0.5 else f"in {low:.1f} to {high:.1f} s"


def is_endless(o: Observation) -> bool:
    return o.licence.valid_until == NEVER

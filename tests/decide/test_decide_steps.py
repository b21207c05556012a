"""The way of a synchronous set (decide/steps.py): the steps as a DBA would expect them, and, for everything that three
standbys allow, that no state on any way lets somebody lead who lacks an acknowledged commit."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest

from pgha.decide.steps import State, first_step, partly
from pgha.model.synchronous import Promise, Requirement, covers, may_promise


def promise(voters: str = "", quorum: int = 0) -> Promise:
    return Promise(voters=frozenset(voters), quorum=quorum)


def at(voters: str, quorum: int, names: str, count: int, *, by_priority: bool = False) -> State:
    return State(promise=promise(voters, quorum), requirement=Requirement(names=frozenset(names), count=count, by_priority=by_priority or not names))


def all_of(names: str) -> State:
    """Priority mode, arrived."""
    return at(names, 0, names, len(names), by_priority=True)


def any_of(count: int, names: str) -> State:
    """Quorum mode, arrived."""
    return at(names, len(names) - count if names else 0, names, count)


def told(step: Promise | Requirement) -> str:
    if isinstance(step, Requirement):
        names = ",".join(sorted(step.names)) or "nobody"
        return f"commits wait for {step.count} of {names}" if step.count else "commits wait for nobody"
    return f"/sync: {','.join(sorted(step.voters)) or 'nobody'}" + (f" quorum {step.quorum}" if step.quorum else "")


def way(start: State, target: State, healthy: str, *, votes: bool) -> list[str]:
    steps, now = [], start
    while (step := first_step(now, target, frozenset(healthy), votes=votes)) is not None:
        assert len(steps) < 10, steps
        if isinstance(step, Requirement):
            assert covers(now.promise, step)
            now = State(promise=now.promise, requirement=step)
        else:
            assert may_promise(now.promise, step, requirement=now.requirement, confirmed=frozenset(healthy))
            now = State(promise=step, requirement=now.requirement)
        assert covers(now.promise, now.requirement)
        steps.append(told(step))
    assert now == target, (steps, now)
    return steps


PRIORITY = [
    ("the first standby", all_of(""), all_of("b"), "bc", ["commits wait for 1 of b", "/sync: b"]),
    ("it goes", all_of("b"), all_of(""), "", ["/sync: nobody", "commits wait for nobody"]),
    ("another takes the place of one that is gone", all_of("b"), all_of("c"), "c", ["/sync: nobody", "commits wait for 1 of c", "/sync: c"]),
    ("another takes its place, it is still there", all_of("b"), all_of("c"), "bc", ["commits wait for 2 of b,c", "/sync: c", "commits wait for 1 of c"]),
    ("a second one", all_of("b"), all_of("bc"), "bc", ["commits wait for 2 of b,c", "/sync: b,c"]),
    ("one of two goes", all_of("bc"), all_of("b"), "b", ["/sync: b", "commits wait for 1 of b"]),
    ("from quorum", any_of(1, "bc"), all_of("b"), "bc", ["commits wait for 1 of b", "/sync: b"]),
    ("only the word changes", any_of(2, "bc"), all_of("bc"), "bc", ["commits wait for 2 of b,c"]),
]

QUORUM = [
    ("the first two", any_of(0, ""), any_of(1, "bc"), "bc", ["commits wait for 1 of b,c", "/sync: b,c quorum 1"]),
    ("from priority", all_of("b"), any_of(1, "bc"), "bc", ["/sync: b,c quorum 1", "commits wait for 1 of b,c"]),
    ("a third", any_of(1, "bc"), any_of(1, "bcd"), "bcd", ["/sync: b,c,d quorum 2", "commits wait for 1 of b,c,d"]),
    ("one goes", any_of(1, "bcd"), any_of(1, "bc"), "bc", ["commits wait for 1 of b,c", "/sync: b,c quorum 1"]),
    ("one goes when all are waited for", any_of(2, "bc"), any_of(1, "b"), "b", ["/sync: b", "commits wait for 1 of b"]),
    ("all go", any_of(1, "bc"), any_of(0, ""), "", ["/sync: nobody", "commits wait for nobody"]),
    ("two are to confirm", any_of(1, "bc"), any_of(2, "bc"), "bc", ["commits wait for 2 of b,c", "/sync: b,c"]),
    ("one is enough again", any_of(2, "bc"), any_of(1, "bc"), "bc", ["/sync: b,c quorum 1", "commits wait for 1 of b,c"]),
    ("one goes, another comes", any_of(1, "bc"), any_of(1, "bd"), "bd", ["commits wait for 2 of b,d", "/sync: b,d quorum 1", "commits wait for 1 of b,d"]),
    ("the old leader does not come back", any_of(1, "ac"), any_of(1, "c"), "c", ["commits wait for 1 of c", "/sync: c"]),
]


@pytest.mark.parametrize(("start", "target", "healthy", "expected"), [pytest.param(*row[1:], id=row[0]) for row in PRIORITY])
def test_ways_in_priority_mode(start, target, healthy, expected):
    assert way(start, target, healthy, votes=False) == expected


@pytest.mark.parametrize(("start", "target", "healthy", "expected"), [pytest.param(*row[1:], id=row[0]) for row in QUORUM])
def test_ways_in_quorum_mode(start, target, healthy, expected):
    assert way(start, target, healthy, votes=True) == expected


def test_priority_mode_never_asks_for_votes_on_its_way():
    for start in (all_of("b"), all_of("bc"), all_of("")):
        for target in (all_of("c"), all_of("cd"), all_of("bcd"), all_of("")):
            assert not any("quorum" in step for step in way(start, target, "".join(target.promise.voters), votes=False))


def test_who_has_confirmed_may_be_promised_before_all_have():
    assert partly(promise(), promise("bc"), all_of("bc").requirement, frozenset("b"), votes=False) == promise("b")
    assert partly(promise(), promise("bc"), all_of("bc").requirement, frozenset(), votes=False) is None
    assert partly(promise("b"), promise("bc"), all_of("bc").requirement, frozenset("b"), votes=False) is None
    assert partly(promise(), promise("bcd", 1), any_of(2, "bcd").requirement, frozenset("bc"), votes=True) == promise("bc", 0 + 1)


# --- everything that three standbys allow ------------------------------------------------------------------------------------

NAMES = frozenset("bcd")
SUBSETS = tuple(frozenset(s) for n in range(4) for s in combinations("bcd", n))
TARGETS = {
    True: tuple(any_of(m, "".join(t)) for t in SUBSETS for m in (range(1, len(t) + 1) if t else (0,))),
    False: tuple(all_of("".join(t)) for t in SUBSETS),
}
#: Who has the commits that were acknowledged: the least sets of standbys, beside the leader, which always has them.
Holders = frozenset[frozenset[str]]


def least(sets: Holders) -> Holders:
    return frozenset(s for s in sets if not any(t < s for t in sets))


@cache
def acknowledged_by(requirement: Requirement) -> Holders:
    return frozenset(frozenset(s) for s in combinations(sorted(requirement.names), requirement.count))


@cache
def step_to(now: State, target: State, healthy: frozenset[str], votes: bool) -> Promise | Requirement | None:  # noqa: FBT001  (cached by value)
    return first_step(now, target, healthy, votes=votes)


def lacking(now: State, holders: Holders) -> tuple[frozenset[str], frozenset[str]] | None:
    """Voters who suffice for an election, and have nobody among them with some commit."""
    for elected in combinations(sorted(now.promise.voters), now.promise.quorum + 1):
        for having in holders:
            if not having & set(elected):
                return frozenset(elected), having
    return None


def taken_over(now: State, holders: Holders, winner: str) -> tuple[State, Holders]:
    """`winner` leads now, and goes by the name of the former leader from here on, who goes by the winner's."""
    def renamed(names: frozenset[str]) -> frozenset[str]:
        return names - {winner} | ({winner} if "a" in names else frozenset())

    voters = renamed(now.promise.voters | {"a"}) if winner in now.promise.voters else now.promise.voters
    had = least(frozenset(renamed(h | {"a"}) for h in holders))
    number = len(voters) - now.promise.quorum
    return State(promise=Promise(voters=voters, quorum=now.promise.quorum), requirement=Requirement(names=voters, count=number, by_priority=False)), had


@pytest.mark.parametrize("votes", [False, True])
def test_in_no_state_may_somebody_lead_who_lacks_an_acknowledged_commit(votes):
    """All states reachable by the steps toward any targets, changed at any time, with commits acknowledged at any moment by
    as few as the setting allows (the former setting, too, until the new one has surely reached every process), with any
    who confirm, agents that forget, and take-overs by whoever may lead."""
    begin = (at("", 0, "", 0), False, frozenset({frozenset()}))
    seen, queue = {begin}, [begin]
    while queue:
        now, settled, holders = queue.pop()
        assert lacking(now, holders) is None, (told(now.promise), told(now.requirement), lacking(now, holders))
        after = [(now, True, holders), (now, False, holders)]       # the setting has reached everybody; the agent begins anew
        for confirmed in SUBSETS if settled else (frozenset(),):
            having = least(frozenset(h | confirmed for h in holders) | acknowledged_by(now.requirement))
            after.append((now, settled, having))
            for target in TARGETS[votes]:
                for healthy in {target.promise.voters, NAMES}:
                    step = step_to(now, target, healthy, votes)
                    if isinstance(step, Requirement):
                        assert covers(now.promise, step)
                        after.append((State(promise=now.promise, requirement=step), False, least(having | acknowledged_by(step))))
                        continue
                    required = now.requirement if settled else None
                    if step is not None and not may_promise(now.promise, step, requirement=required, confirmed=confirmed):
                        step = partly(now.promise, step, now.requirement, confirmed, votes=votes) if settled else None
                    if step is not None:
                        after.append((State(promise=step, requirement=now.requirement), settled, having))
        for winner in now.promise.voters:
            taken, having = taken_over(now, holders, winner)
            after.append((taken, False, least(having | acknowledged_by(taken.requirement))))
        if len(now.promise.voters) > now.promise.quorum:        # a node that is no voter, with one vote more
            outsider = Requirement(names=now.promise.voters, count=len(now.promise.voters) - now.promise.quorum, by_priority=False)
            after.append((State(promise=now.promise, requirement=outsider), False, least(holders | acknowledged_by(outsider))))
        fresh = [state for state in after if state not in seen]
        seen.update(fresh)
        queue += fresh
    print(f"{len(seen)} states")
    assert len(seen) > 100


def test_every_target_is_reached_from_every_state():
    for voters in SUBSETS:
        for quorum in range(max(1, len(voters))):
            for names in SUBSETS:
                for count in range(1 if names else 0, len(names) + 1):
                    start = at("".join(voters), quorum, "".join(names), count)
                    if covers(start.promise, start.requirement):
                        for target in TARGETS[True]:
                            assert way(start, target, "".join(target.promise.voters), votes=True) is not None

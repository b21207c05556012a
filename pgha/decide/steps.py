"""By which step does a synchronous set come nearer to what is wanted, without ever promising too much?

A state is (`/sync`, synchronous_standby_names). Each step changes one of the two, and both rules of model/synchronous.py
guard it: the setting may become whatever still `covers` the promise; the promise whatever `may_promise` allows. Between
the guards the way is searched, not written down: the cheapest, where a step costs little, a state in which nobody could
take over costs more, and one in which commits wait for somebody who is not there costs most. Only its first step is
done; the next pass looks again. So safety rests on the guards alone, and the search can only be slow, never wrong.

That yields the order of compatibility spec 12.7: raise the quorum or the number first, lower it last; add to the setting
before the promise, take from the promise before the setting.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from msgspec import Struct

from pgha.model.synchronous import Promise, Requirement, covers, may_promise

STEP, NOBODY_ELECTABLE, COMMITS_WAIT = 1, 4, 8
#: No way is longer; a target that cannot be reached is none of ours.
FARTHEST = 40


class State(Struct, frozen=True, kw_only=True):
    promise: Promise
    requirement: Requirement


def first_step(now: State, target: State, healthy: frozenset[str], *, votes: bool) -> Promise | Requirement | None:
    """What to change first, on the way from `now` to `target`; None if there is nothing to do, or no way.

    `healthy`: who streams and confirms; the search supposes that they will have confirmed whatever a step waits for.
    `votes`: a quorum may be promised (not in priority mode, where others would not ask for votes).
    """
    start = (now.promise, now.requirement)
    goal = (target.promise, target.requirement)
    if start == goal:
        return None
    order = count()
    queue: list[tuple[int, int, tuple[Promise, Requirement], Promise | Requirement | None]] = [(0, next(order), start, None)]
    done = set()
    while queue:
        cost, _, state, first = heapq.heappop(queue)
        if state == goal:
            return first
        if state in done or cost > FARTHEST:
            continue
        done.add(state)
        for change in _changes(state, start, goal, healthy, votes=votes):
            after = (change, state[1]) if isinstance(change, Promise) else (state[0], change)
            if after not in done:
                heapq.heappush(queue, (cost + _cost(after, healthy), next(order), after, first or change))
    return None


def _cost(state: tuple[Promise, Requirement], healthy: frozenset[str]) -> int:
    promise, requirement = state
    cost = STEP
    if len(promise.voters & healthy) < promise.quorum + 1:
        cost += NOBODY_ELECTABLE
    if requirement.count > len(requirement.names & healthy):
        cost += COMMITS_WAIT
    return cost


def _changes(state: tuple[Promise, Requirement], start: tuple[Promise, Requirement], goal: tuple[Promise, Requirement],
             healthy: frozenset[str], *, votes: bool) -> Iterator[Promise | Requirement]:
    promise, requirement = state
    for wanted in _requirements(start[1], goal[1]):
        if wanted != requirement and covers(promise, wanted):
            yield wanted
    for offered in _promises(start[0], goal[0], requirement, votes=votes):
        if offered != promise and may_promise(promise, offered, requirement=requirement, confirmed=healthy) and covers(offered, requirement):
            yield offered


def _requirements(start: Requirement, goal: Requirement) -> Iterator[Requirement]:
    """The goal first: of equally good ways the one that is nearest to it."""
    yield goal
    for names in _unlike(goal.names, start.names & goal.names, start.names | goal.names):
        for number in sorted({min(start.count, len(names)), min(goal.count, len(names)), len(names)}):
            if number > 0 or not names:
                yield Requirement(names=names, count=number, by_priority=goal.by_priority)


def _promises(start: Promise, goal: Promise, requirement: Requirement, *, votes: bool) -> Iterator[Promise]:
    yield goal
    for voters in _unlike(goal.voters, start.voters & goal.voters, start.voters | goal.voters, start.voters, frozenset()):
        least = max(0, len(voters) - max(0, requirement.guaranteed - len(requirement.names - voters)))
        for quorum in sorted({least, start.quorum, goal.quorum, max(0, len(voters) - max(1, goal.quorum))} if votes and voters else {0}):
            if quorum < max(1, len(voters)):
                yield Promise(voters=voters, quorum=quorum)


def _unlike(*sets: frozenset[str]) -> Iterator[frozenset[str]]:
    yield from dict.fromkeys(sets)


def partly(now: Promise, target: Promise, requirement: Requirement, confirmed: frozenset[str], *, votes: bool) -> Promise | None:
    """What of `target` may be promised already, if that is more than now: those who have confirmed, with as small a
    quorum as their number allows."""
    voters = target.voters & (confirmed | now.voters)
    for quorum in range(len(voters) if votes else min(1, len(voters))):
        offered = Promise(voters=voters, quorum=quorum)
        if may_promise(now, offered, requirement=requirement, confirmed=confirmed) and covers(offered, requirement):
            return offered if offered != now and len(voters) - quorum > len(now.voters) - now.quorum else None
    return None

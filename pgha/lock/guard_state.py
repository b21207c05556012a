"""What may this data directory do now, and who may change that? The guard's rules, without its hands.

`Held` is all that the guard remembers (its file holds exactly this). `answer` says what a request makes of it, `lapse`
what time makes of it, `judge` and `after_look` what the sight of the data directory makes of it. No clock, no I/O:
the table in tests/lock/test_guard_state.py is the specification.

Rules of this file (safety model 3 and 8):
- An older agent changes nothing.
- Within one incarnation only a later sequence than any heard of widens the licence: a delayed or repeated `arm` or
  `pause` never does, neither after a `narrow` nor after the fence.
- LATCHED ends by an `arm` that reaches into the future, by a `pause`, or, once no process of the directory lives, by
  `standby` or `offline`. Never by time, never because the guard was restarted.
- PAUSED ends by any other word than a repeated `pause`. It is told only of a lock record in mode `paused` that is known
  to be committed, and `narrow` comes before the first byte that may end that.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from pgha.clock import Deadline, Instant, earlier, holder_age_s, remaining_s
from pgha.lock.protocol import MAX_ARM_S, MAX_OFFLINE_S, NOBODY, Agent, Op, Request, State

#: How long a primary may run that nobody has armed: time for an agent to speak up (safety model 8).
UNARMED_S = 2.0

#: DBState in pg_control, PostgreSQL 13 to 18.
IN_ARCHIVE_RECOVERY = 5


class Look(NamedTuple):
    """What the data directory showed: read in the order that `judge` relies on, status before and after the rest."""

    number: int = 0                  # of the request for it; a later one has seen everything before that request
    exists: bool = False
    identity: tuple[int, int, int] | None = None  # recipe.Identity
    postmaster_pid: int = 0          # first line of postmaster.pid (single-user servers write it negative), 0: no file
    status_before: str = ""          # its eighth line: starting, stopping, ready, standby
    control_state: int = -1          # DBState in global/pg_control, -1: unreadable
    status_after: str = ""
    standby_signal: bool = False
    watched: bool = False            # inotify watches this directory
    agent_alive: bool | None = None  # whether somebody holds the agent's flock; None: not asked
    epoch: int = 0                   # Looker.epoch when this look began


class Role(Enum):
    """What a server of this directory is, as far as its files tell."""

    RECOVERING = auto()    # certainly in recovery
    STARTING = auto()      # or stopping: accepts nobody; will recover, since standby.signal is in place
    PRIMARY = auto()       # accepts writes, or may come to


def judge(look: Look) -> Role:
    """The role of the server that runs in the directory that was looked at.

    postmaster.pid says "ready" for a hot standby as for a primary ("standby" only with hot_standby = off), so
    pg_control decides. It is written before "ready" at start and after "stopping" at the end, hence two readings of
    the status around it. At a promotion standby.signal goes first, before any write is accepted.
    """
    if not look.standby_signal:
        return Role.PRIMARY
    statuses = {look.status_before, look.status_after}
    if statuses == {"standby"} or (statuses == {"ready"} and look.control_state == IN_ARCHIVE_RECOVERY):
        return Role.RECOVERING
    return Role.PRIMARY if statuses == {"ready"} else Role.STARTING


class Held(NamedTuple):
    """What holds now. fence_at only while armed, until only while offline; why: what led to LATCHED or to the rest."""

    state: State = State.IDLE
    agent: Agent = NOBODY
    sequence: int = 0                # highest sequence of this agent that was heard of
    fence_at: Deadline | None = None
    until: Deadline | None = None
    why: str = ""


class Facts(NamedTuple):
    """What the guard looked up for this request (only for standby, offline, bye)."""

    processes: int = 0               # living processes of the directory
    look: Look | None = None         # None: the directory did not answer in time


class Verdict(NamedTuple):
    """What follows from a request."""

    held: Held
    error: str = ""                  # "" : granted
    fence: bool = False              # kill before doing anything else
    end: bool = False                # the guard may end after its answer


def latched(held: Held, why: str) -> Held:
    """The fence, as a state."""
    return held._replace(state=State.LATCHED, fence_at=None, until=None, why=why)


def unarmed(held: Held, now: Instant, why: str) -> Held:
    """A server runs that nobody has armed: an agent has this long to speak up."""
    return held._replace(state=State.ARMED, fence_at=now.plus_s(UNARMED_S), until=None, why=why)


def lapse(held: Held, now: Instant) -> Held:
    """What the passing of time has made of it."""
    if held.state is State.ARMED:
        assert held.fence_at is not None
        if remaining_s(held.fence_at, now) <= 0:
            return latched(held, "the licence has ended")
    if held.state is State.OFFLINE:
        assert held.until is not None
        if remaining_s(held.until, now) <= 0:
            return latched(held, "the time for the offline step is over")
    return held


def after_look(held: Held, look: Look, *, server: bool, now: Instant) -> Held:
    """What the sight of the data directory makes of it. `server`: a postmaster of it lives."""
    if held.state is State.IDLE and server:
        if judge(look) is Role.PRIMARY:
            return unarmed(held, now, "a server that may accept writes appeared, and no agent has spoken")
        return held._replace(state=State.STANDBY, why="a server in recovery appeared")
    if held.state is State.STANDBY and look.exists:
        if not look.standby_signal:
            return latched(held, "standby.signal has vanished")
        if server and judge(look) is Role.PRIMARY:
            return latched(held, f"a server runs that is not in recovery (pg_control state {look.control_state})")
    return held


def answer(held: Held, request: Request, facts: Facts, now: Instant) -> Verdict:
    """What a request changes. `held` has been through `lapse` at `now`."""
    agent = request.agent
    if request.op is Op.STATUS:
        return Verdict(held)
    if agent.started_ns < held.agent.started_ns:
        return Verdict(held, "an agent that started later is in charge")
    if agent.started_ns == held.agent.started_ns and agent.incarnation != held.agent.incarnation:
        return Verdict(held, "another agent that started at the same moment is in charge")
    if agent != held.agent:
        held_by_former, held = held, held._replace(agent=agent, sequence=0)
    else:
        held_by_former = held
    verdict = _RULES[request.op](held, request, facts, now)
    # A refusal changes nothing, not even who is in charge.
    return verdict._replace(held=held_by_former) if verdict.error and not verdict.fence else verdict


def _arm(held: Held, request: Request, _facts: Facts, now: Instant) -> Verdict:
    fence_at = request.deadline
    assert fence_at is not None
    left_s = remaining_s(fence_at, now)
    if left_s <= 0:
        return Verdict(held, f"fence_at passed {-left_s:.3f} s ago")
    ahead_s = holder_age_s(now, fence_at)     # on the clock that says more: else one of the two would bound nothing
    if ahead_s > MAX_ARM_S:
        return Verdict(held, f"fence_at is {ahead_s:.0f} s ahead, at most {MAX_ARM_S:.0f} s are believed")
    if request.sequence < held.sequence:
        return Verdict(held, f"sequence {request.sequence} is older than {held.sequence}")
    if request.sequence == held.sequence:
        if held.state is not State.ARMED:
            return Verdict(held, f"sequence {request.sequence} was used up, the state is {held.state}")
        assert held.fence_at is not None
        fence_at = earlier(fence_at, held.fence_at)  # repeated: the same, or less, never more
    return Verdict(Held(State.ARMED, held.agent, request.sequence, fence_at, None, "armed"))


def _pause(held: Held, request: Request, _facts: Facts, _now: Instant) -> Verdict:
    if request.sequence < held.sequence:
        return Verdict(held, f"sequence {request.sequence} is older than {held.sequence}")
    if request.sequence == held.sequence and held.state is not State.PAUSED:
        return Verdict(held, f"sequence {request.sequence} was used up, the state is {held.state}")
    return Verdict(Held(State.PAUSED, held.agent, request.sequence, None, None, "the lock record says paused"))


def _narrow(held: Held, request: Request, _facts: Facts, now: Instant) -> Verdict:
    assert request.deadline is not None
    held = held._replace(sequence=max(held.sequence, request.sequence))
    if held.state is State.PAUSED:
        held = held._replace(state=State.ARMED, fence_at=request.deadline, why="a pause is being ended")
    if held.state is not State.ARMED:
        return Verdict(held)  # nothing is armed that could be too wide
    assert held.fence_at is not None
    held = lapse(held._replace(fence_at=earlier(held.fence_at, request.deadline)), now)
    return Verdict(held, fence=held.state is State.LATCHED)


def _standby(held: Held, _request: Request, facts: Facts, _now: Instant) -> Verdict:
    look = facts.look
    if look is None:
        return Verdict(held, "the data directory did not answer in time")
    if not look.standby_signal:
        return Verdict(held, "standby.signal does not exist")
    if facts.processes:
        # A standby of this directory may go on if nothing was ever fenced here; all else waits for the exits.
        allowed = {State.STANDBY: (Role.RECOVERING, Role.STARTING), State.ARMED: (Role.RECOVERING,),
                   State.PAUSED: (Role.RECOVERING,), State.IDLE: (Role.RECOVERING, Role.STARTING)}
        if judge(look) not in allowed.get(held.state, ()):
            return Verdict(held, f"{facts.processes} processes of the data directory live, the state is {held.state}, "
                                 f"and no server is known to be in recovery")
    return Verdict(held._replace(state=State.STANDBY, fence_at=None, until=None, why="asked for"))


def _offline(held: Held, request: Request, facts: Facts, now: Instant) -> Verdict:
    until = request.deadline
    assert until is not None
    left_s = remaining_s(until, now)
    if left_s <= 0 or holder_age_s(now, until) > MAX_OFFLINE_S:
        return Verdict(held, f"until is {left_s:.3f} s ahead, it must be within {MAX_OFFLINE_S:.0f} s")
    if facts.processes and held.state is not State.OFFLINE:
        return Verdict(held, f"{facts.processes} processes of the data directory live")
    return Verdict(held._replace(state=State.OFFLINE, fence_at=None, until=until, why="asked for"))


def _fence_now(held: Held, _request: Request, _facts: Facts, _now: Instant) -> Verdict:
    return Verdict(latched(held, "asked for"), fence=True)


def _bye(held: Held, _request: Request, facts: Facts, _now: Instant) -> Verdict:
    if facts.processes:
        return Verdict(held, f"{facts.processes} processes of the data directory live")
    if held.state is State.LATCHED:
        return Verdict(held, "latched: ask for standby first, a start may be under way")
    return Verdict(held, end=True)


_RULES = {Op.ARM: _arm, Op.PAUSE: _pause, Op.NARROW: _narrow, Op.STANDBY: _standby, Op.OFFLINE: _offline, Op.FENCE_NOW: _fence_now,
          Op.BYE: _bye}

"""How old is a thing, safely? Two clocks, because a holder must err one way and a candidate the other.

`Instant` is one reading of both. CLOCK_BOOTTIME counts while the machine is suspended, CLOCK_MONOTONIC_RAW is not
steered by NTP. A holder's age is the larger of the two differences, a candidate's the RAW difference only, so that a
suspend or a steered clock makes a holder give up early and a candidate wait longer (safety model 15).

A `Deadline` is a point on both clocks; it has passed as soon as either clock has passed it. Both are plain numbers
of this boot, so the agent and the guard process can exchange them.

trio's own clock is used only to wake up; whoever wakes re-checks here.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

#: How much faster or slower two clocks may run, as a fraction (safety model 15).
DRIFT = 0.01


class Instant(NamedTuple):
    """One reading of both clocks, in nanoseconds."""

    boot_ns: int
    raw_ns: int

    def plus_s(self, seconds: float) -> Instant:
        """The same point later (or earlier, if negative) on both clocks."""
        ns = round(seconds * 1e9)
        return Instant(self[0] + ns, self[1] + ns)


#: A deadline is an instant that has passed as soon as either clock has passed it.
Deadline = Instant

#: A deadline that no clock reaches (a century and a half after boot), so that whatever compares deadlines needs no
#: second case for what does not end, and "no deadline" can go on meaning "no licence".
NEVER: Deadline = Instant(1 << 62, 1 << 62)


def holder_age_s(since: Instant, now: Instant) -> float:
    """Seconds since `since` for somebody who must not believe too long: the larger of both differences."""
    return max(now[0] - since[0], now[1] - since[1]) / 1e9


def candidate_age_s(since: Instant, now: Instant) -> float:
    """Seconds since `since` for somebody who must not act too early: the RAW difference, which no suspend lengthens."""
    return (now[1] - since[1]) / 1e9


def remaining_s(deadline: Deadline, now: Instant) -> float:
    """Seconds until the first clock passes `deadline`; negative once it has passed."""
    return min(deadline[0] - now[0], deadline[1] - now[1]) / 1e9


def earlier(a: Deadline, b: Deadline) -> Deadline:
    """The deadline that has passed as soon as one of the two has."""
    return Instant(min(a[0], b[0]), min(a[1], b[1]))


class Clock(Protocol):
    """The seam through which everybody reads time; the simulation has its own."""

    def now(self) -> Instant:
        """Both clocks, now."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch. For what people and other machines read; never for a decision."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> Instant:
        return Instant(time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW))

    def wall_s(self) -> float:
        return time.time()


def boot_id() -> str:
    """This boot's identity: instants of another boot mean nothing."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:  # noqa: PTH123  (the guard keeps its imports small)
        return f.read().strip()

"""How long a licence lasts, when it is fenced, when demotion begins: the numbers of safety model 8 and 15, by hand."""

from __future__ import annotations

import time

import pytest

from pgha.clock import DRIFT, Instant, SystemClock, boot_id, candidate_age_s, earlier, holder_age_s, remaining_s
from pgha.model.lock import demote_at, fence_at, fence_budget_s, licence_s, wait_s

T0 = Instant(1_000_000_000_000, 900_000_000_000)


def after(seconds: float) -> Instant:
    return T0.plus_s(seconds)


def s_after(moment: Instant) -> float:
    assert moment[0] - T0[0] == moment[1] - T0[1], "the same on both clocks"
    return (moment[0] - T0[0]) / 1e9


#: ttl, loop_wait → licence, budget, fence_at, demote_at, wait: seconds after the first send, computed by hand.
#: fence = 0.99 ttl - max(0.25, ttl/20); wanted = fence - max(3, ttl/3); not before loop_wait + 3; at the latest fence - 0.5.
NUMBERS = [
    (3, 1, 2.97, 0.25, 2.72, 2.22, 3.03),      # wanted -0.28, not before 4, latest 2.22
    (3, 10, 2.97, 0.25, 2.72, 2.22, 3.03),
    (5, 1, 4.95, 0.25, 4.70, 4.00, 5.05),      # wanted 1.70, not before 4, latest 4.20
    (5, 10, 4.95, 0.25, 4.70, 4.20, 5.05),     # not before 13: latest 4.20
    (20, 1, 19.8, 1.00, 18.80, 12.133333333, 20.2),   # wanted 18.80 - 6.67
    (20, 10, 19.8, 1.00, 18.80, 13.00, 20.2),  # not before 13
    (30, 1, 29.7, 1.50, 28.20, 18.20, 30.3),
    (30, 10, 29.7, 1.50, 28.20, 18.20, 30.3),
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=[f"ttl {n[0]} loop_wait {n[1]}" for n in NUMBERS])
def test_the_numbers(numbers: tuple[float, ...]):
    ttl_s, loop_wait_s, licence, budget, fence, demote, wait = numbers
    until = after(licence_s(ttl_s))
    assert s_after(until) == pytest.approx(licence, abs=1e-8)
    assert fence_budget_s(ttl_s) == pytest.approx(budget)
    assert s_after(fence_at(until, ttl_s)) == pytest.approx(fence, abs=1e-8)
    assert s_after(demote_at(until, ttl_s, since=T0, loop_wait_s=loop_wait_s)) == pytest.approx(demote, abs=1e-8)
    assert wait_s(ttl_s) == pytest.approx(wait)


@pytest.mark.parametrize("ttl_s", [1, 2, 3, 5, 10, 20, 29, 30, 60, 300])
@pytest.mark.parametrize("loop_wait_s", [1, 2, 10, 60])
def test_the_order_of_the_ends(ttl_s: float, loop_wait_s: float):
    until = after(licence_s(ttl_s))
    fence, demote = fence_at(until, ttl_s), demote_at(until, ttl_s, since=T0, loop_wait_s=loop_wait_s)
    assert T0 < demote <= fence.plus_s(-0.5) < fence < until < after(ttl_s) < after(wait_s(ttl_s))
    slow_holder = after(licence_s(ttl_s) * (1 + DRIFT))
    hasty_candidate = after(wait_s(ttl_s) * (1 - DRIFT))
    assert slow_holder < hasty_candidate.plus_s(fence_budget_s(ttl_s)), "clocks that differ by drift each: fenced before anybody takes over"


def test_a_shorter_licence_is_demoted_from_what_is_left():
    """Two renewals ago a ttl of 30, now confirmed to end 5 s after `since`."""
    until = after(5 * 0.99)
    assert s_after(demote_at(until, 5, since=T0.plus_s(-20), loop_wait_s=1)) == pytest.approx(1.7)


# --- clocks ----------------------------------------------------------------------------------------------------------

#: boot and raw seconds that have passed → a holder's age, a candidate's, and what is left of 10 s
AGES = [
    ("both run alike", 4, 4, 4, 4, 6),
    ("suspended for 100 s", 104, 4, 104, 4, -94),
    ("the raw clock is fast", 4, 5, 5, 5, 5),
    ("NTP holds the boot clock back", 3, 4, 4, 4, 6),
    ("nothing has passed", 0, 0, 0, 0, 10),
    ("before", -1, -1, -1, -1, 11),
]


@pytest.mark.parametrize(("boot", "raw", "holder", "candidate", "left"), [row[1:] for row in AGES], ids=[row[0] for row in AGES])
def test_a_holder_errs_to_the_early_side_and_a_candidate_to_the_late_one(boot: int, raw: int, holder: int, candidate: int, left: int):
    now = Instant(T0[0] + boot * 10**9, T0[1] + raw * 10**9)
    assert holder_age_s(T0, now) == holder
    assert candidate_age_s(T0, now) == candidate
    assert remaining_s(after(10), now) == left
    assert holder_age_s(T0, now) >= candidate_age_s(T0, now)


@pytest.mark.parametrize(("a", "b", "first"), [
    (Instant(1, 1), Instant(2, 2), Instant(1, 1)), (Instant(2, 2), Instant(1, 1), Instant(1, 1)), (Instant(1, 5), Instant(2, 2), Instant(1, 2)),
    (Instant(3, 3), Instant(3, 3), Instant(3, 3)),
])
def test_the_earlier_of_two_deadlines_has_passed_as_soon_as_one_has(a: Instant, b: Instant, first: Instant):
    assert earlier(a, b) == first
    for boot in range(5):
        for raw in range(6):
            now = Instant(boot, raw)
            assert (remaining_s(earlier(a, b), now) <= 0) == (remaining_s(a, now) <= 0 or remaining_s(b, now) <= 0)


def test_plus_is_exact_to_the_nanosecond():
    assert Instant(1, 2).plus_s(1.5) == Instant(1_500_000_001, 1_500_000_002)
    assert T0.plus_s(30 * 0.99).plus_s(-30 * 0.99) == T0
    assert T0.plus_s(0.1 + 0.2) == T0.plus_s(0.3)


def test_the_machines_clocks():
    clock = SystemClock()
    first, wall_s = clock.now(), clock.wall_s()
    assert abs(first.boot_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < 10**9
    assert abs(first.raw_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)) < 10**9
    assert abs(wall_s - time.time()) < 1
    second = clock.now()
    assert second.boot_ns >= first.boot_ns
    assert second.raw_ns >= first.raw_ns
    assert len(boot_id()) == 36
    assert boot_id() == boot_id()

"""The watchdog's numbers as tables, and the device driven through its port by a device that really fires."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from pgha.clock import Instant, remaining_s
from pgha.lock.watchdog import Limits, LinuxDevice, Wanted, Watchdog, next_pet, plan_timeout

NOW = Instant(1_000_000_000_000, 990_000_000_000)


@pytest.mark.parametrize(("ttl_s", "margin_s", "limits", "timeout_s", "replaced"), [
    (30, 5, Limits(), 25, False),          # the defaults
    (30, -1, Limits(), 15, False),
    (30, 0, Limits(), 28, True),           # 30 would fire after the licence: at most 30 × 0.99 − 1 = 28.7
    (30, 1, Limits(), 28, True),
    (30, 2, Limits(), 28, False),
    (5, 5, Limits(), 3, True),             # the fast profile: 5 × 0.99 − 1 = 3.95
    (5, -1, Limits(), 2, False),
    (3, 5, Limits(), 1, True),
    (3, -1, Limits(), 1, True),
    (2, 0, Limits(), None, True),
    (30, 29, Limits(), 28, True),
    (30, 5, Limits(1, 10), 10, True),      # the device cannot count so far: shorter is safe
    (30, 5, Limits(26, 100), 28, True),
    (30, 5, Limits(60, 600), None, True),
    (20.5, 5, Limits(), 15, False),
])
def test_timeout(ttl_s, margin_s, limits, timeout_s, replaced):
    plan = plan_timeout(ttl_s, margin_s, limits)
    assert (plan.timeout_s, plan.replaced) == (timeout_s, replaced)
    assert bool(plan.why) is replaced
    if timeout_s is not None:
        assert timeout_s <= ttl_s * 0.99 - 1


@pytest.mark.parametrize(("left_s", "timeout_s", "since_s", "due_s"), [
    (20, 10, 0.0, 1.0),       # every second
    (20, 10, 0.4, 0.6),
    (20, 10, 5.0, 0.0),
    (20, 2, 0.0, 0.5),        # every quarter of a short timeout
    (10.5, 10, 0.0, 0.48),    # the last one: just before valid_until − timeout
    (10.5, 10, 3.0, 0.0),
    (10.01, 10, 0.5, 0.0),    # past the moment aimed at, still permitted, not done yet
    (10.01, 10, 0.005, None),  # done
    (10.0, 10, 0.5, 0.0),
    (9.99, 10, 5.0, None),    # it would fire after the licence
    (-1, 10, 5.0, None),
])
def test_next_pet(left_s, timeout_s, since_s, due_s):
    due = next_pet(NOW, NOW.plus_s(left_s), timeout_s, NOW.plus_s(-since_s))
    assert due == (None if due_s is None else pytest.approx(due_s, abs=1e-6))


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> Instant:
        return self.at

    def wall_s(self) -> float:
        return 0.0

    def pass_s(self, seconds: float) -> None:
        self.at = self.at.plus_s(seconds)


class CountingDevice:
    """A device as the kernel's drivers behave: open, set_timeout and keepalive restart its count; it fires by itself."""

    def __init__(self, clock: Clock, *, most_s=0, nowayout=False, rounds_to=1, broken="") -> None:
        self.clock, self.most_s, self._nowayout, self._rounds_to, self.broken = clock, most_s, nowayout, rounds_to, broken
        self.timeout_s = 60
        self.fires_at: Instant | None = None
        self.is_open = False

    def accessible(self) -> str:
        return self.broken

    def limits(self) -> Limits:
        return Limits(1, self.most_s)

    def nowayout(self) -> bool:
        return self._nowayout

    def open(self) -> None:
        if self.broken:
            raise OSError(16, self.broken)
        self.is_open = True
        self.keepalive()

    def set_timeout(self, timeout_s: int) -> int:
        self.timeout_s = -(-timeout_s // self._rounds_to) * self._rounds_to
        self.keepalive()
        return self.timeout_s

    def keepalive(self) -> None:
        assert self.is_open
        assert not self.fired
        self.fires_at = self.clock.now().plus_s(self.timeout_s)

    def close(self, *, stop: bool) -> None:
        self.is_open = False
        if stop and not self._nowayout:
            self.fires_at = None

    @property
    def fired(self) -> bool:
        return self.fires_at is not None and remaining_s(self.fires_at, self.clock.now()) <= 0


def world(mode="automatic", margin_s=5, **device):
    clock = Clock()
    counting = CountingDevice(clock, **device)
    return clock, counting, Watchdog(counting, mode=mode, safety_margin_s=margin_s, clock=clock)


def live(clock, device, watchdog, ttl_s, *, for_s, renew_every_s=1.0, renew_until_s=1e9):
    """Renew and step through `for_s` seconds; when the device fired, relative to the licence's end (None: not)."""
    begun, renewed = clock.now(), clock.now()
    while -remaining_s(begun, clock.now()) < for_s:
        elapsed_s = -remaining_s(begun, clock.now())
        if elapsed_s < renew_until_s and -remaining_s(renewed, clock.now()) >= renew_every_s:
            renewed = clock.now()
        valid_until = renewed.plus_s(ttl_s * 0.99)
        sleep_s = watchdog.step(Wanted(True, ttl_s, valid_until))
        assert sleep_s > 0
        if device.fires_at is not None:
            assert remaining_s(device.fires_at, valid_until) <= 1e-6, "it never fires after the licence"
        clock.pass_s(min(sleep_s, 0.25))
        if device.fired:
            return remaining_s(valid_until, clock.now())
    return None


@pytest.mark.parametrize("ttl_s", [3, 5, 10, 30, 60])
def test_a_holder_that_renews_is_never_reset(ttl_s):
    clock, device, watchdog = world()
    assert live(clock, device, watchdog, ttl_s, for_s=200, renew_every_s=min(10, ttl_s / 3)) is None
    assert watchdog.facts.active
    assert watchdog.facts.timeout_s == plan_timeout(ttl_s, 5).timeout_s


@pytest.mark.parametrize("ttl_s", [3, 5, 10, 30, 60])
def test_without_renewals_it_fires_at_the_licences_end_and_not_earlier(ttl_s):
    clock, device, watchdog = world()
    left_s = live(clock, device, watchdog, ttl_s, for_s=200, renew_until_s=20)
    assert -0.26 < left_s < 0.3


def test_an_outage_shorter_than_the_licence_resets_nobody():
    clock, device, watchdog = world()
    for _ in range(5):
        assert live(clock, device, watchdog, 30, for_s=28, renew_until_s=0) is None  # 28 s without a renewal, then one


def test_a_frozen_agent_leaves_it_to_the_device():
    clock, device, watchdog = world()
    live(clock, device, watchdog, 30, for_s=10)
    clock.pass_s(25)
    assert device.fired


def test_opens_only_within_the_licence():
    clock, device, watchdog = world(mode="required")
    assert not watchdog.activate(30, clock.now().plus_s(24.9))
    assert not device.is_open
    assert watchdog.facts.failed
    assert watchdog.activate(30, clock.now().plus_s(25.1))
    assert device.timeout_s == 25
    assert (watchdog.facts.active, watchdog.facts.failed) == (True, False)


def test_pet_reads_the_clock_last_of_all():
    clock, _device, watchdog = world()
    valid_until = clock.now().plus_s(29.7)
    watchdog.activate(30, valid_until)
    clock.pass_s(4.7)
    assert watchdog.pet(valid_until)
    clock.pass_s(0.01)
    assert not watchdog.pet(valid_until)


@pytest.mark.parametrize(("mode", "failed"), [("automatic", False), ("required", True)])
@pytest.mark.parametrize(("device", "ttl_s", "why"), [
    ({"broken": "Device or resource busy"}, 30, "busy"),
    ({"rounds_to": 60}, 30, "the device took 60 s"),
    ({}, 2, "leaves at most 0 s"),
])
def test_a_device_that_cannot_protect(mode, failed, device, ttl_s, why):
    clock, counting, watchdog = world(mode=mode, **device)
    assert not watchdog.activate(ttl_s, clock.now().plus_s(ttl_s))
    assert why in watchdog.facts.why
    assert (watchdog.facts.failed, watchdog.facts.active) == (failed, False)
    assert not counting.is_open
    assert counting.fires_at is None


def test_required_says_so_before_leadership_is_sought():
    _clock, device, watchdog = world(mode="required", broken="no such device")
    assert watchdog.check(30).failed
    device.broken = ""
    assert not watchdog.check(30).failed
    assert watchdog.check(2).failed
    assert not device.is_open


def test_off_touches_nothing():
    clock, device, watchdog = world(mode="off", broken="not to be asked")
    assert watchdog.check(30).failed is False
    assert not watchdog.activate(30, clock.now().plus_s(30))
    watchdog.step(Wanted(True, 30, clock.now().plus_s(30)))
    assert not device.is_open


def test_stops_after_the_demotion():
    clock, device, watchdog = world()
    live(clock, device, watchdog, 30, for_s=5)
    watchdog.step(Wanted(False, 30))
    assert not device.is_open
    clock.pass_s(100)
    assert not device.fired
    assert not watchdog.facts.active


def test_without_a_licence_but_not_yet_demoted_it_is_not_petted():
    clock, device, watchdog = world()
    live(clock, device, watchdog, 30, for_s=5)
    for _ in range(300):
        if device.fired:
            break
        clock.pass_s(watchdog.step(Wanted(True, 30, None)))
    assert device.fired


def test_a_device_that_cannot_be_stopped_is_petted_on():
    clock, device, watchdog = world(nowayout=True)
    live(clock, device, watchdog, 30, for_s=5)
    for _ in range(200):
        clock.pass_s(watchdog.step(Wanted(False, 30)))
        assert not device.fired
    assert live(clock, device, watchdog, 30, for_s=60) is None
    watchdog.close()
    clock.pass_s(26)
    assert device.fired


def test_a_changed_ttl_changes_the_timeout():
    clock, device, watchdog = world()
    live(clock, device, watchdog, 30, for_s=5)
    assert live(clock, device, watchdog, 10, for_s=20) is None
    assert device.timeout_s == 5
    live(clock, device, watchdog, 60, for_s=5)
    assert device.timeout_s == 55


def test_a_device_that_fails_later_is_reported():
    clock, device, watchdog = world(mode="required")
    live(clock, device, watchdog, 30, for_s=5)

    def broken() -> None:
        raise OSError(5, "Input/output error")

    device.keepalive = broken
    clock.pass_s(1)
    assert not watchdog.pet(clock.now().plus_s(30))
    assert watchdog.facts.failed
    assert "Input/output error" in watchdog.facts.why


def test_the_task_pets():
    clock, device, watchdog = world()

    async def main():
        with trio.move_on_after(0.6):
            await watchdog.run(lambda: Wanted(True, 5, clock.now().plus_s(4.95)))

    trio.run(main)
    assert device.is_open


def test_a_path_that_is_no_device(tmp_path: Path):
    assert "is not there" in LinuxDevice(str(tmp_path / "watchdog")).accessible()
    (tmp_path / "file").touch()
    device = LinuxDevice(str(tmp_path / "file"))
    assert device.accessible()
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        device.open()
    device.close(stop=True)
    device.close(stop=True)
    assert device.limits() == Limits(0, 0)
    assert device.nowayout() is False
    assert os.path.getsize(tmp_path / "file") == 1  # the V of the first close

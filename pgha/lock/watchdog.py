"""The watchdog device: should agent and guard both be gone, the machine resets before the licence has ended.

    plan_timeout   which timeout, for this ttl and this device
    next_pet       when it may be petted next, if at all
    Watchdog       the device opened before a promotion, petted under the licence, closed after the demotion

Rules of this file (safety model 9):
- Whatever its timeout, the device fires at `valid_until` at the latest: it is petted only while now + timeout <=
  valid_until, and the clock is read again immediately before each ioctl that restarts its count (opening it and
  setting its timeout do, too).
- An outage shorter than the licence resets nobody: petting goes on until valid_until - timeout.
- It is closed (magic 'V') only after the demotion is complete, and in pause. A device that cannot be stopped
  (nowayout) goes on being petted without a condition then: nothing is left that it could protect.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import trio

from pgha.clock import DRIFT, Clock, Deadline, Instant, holder_age_s, remaining_s
from pgha.log import Log
from pgha.model.node import WatchdogFacts

log = Log("pgha.watchdog")

Mode = Literal["off", "automatic", "required"]

#: A timeout below this leaves no room for petting four times on a busy machine; used only where ttl leaves no other.
PREFERRED_LEAST_S = 2
#: The last pet aims this long before the moment after which none is permitted.
LAST_PET_LEAD_S = 0.02
#: How often a device that failed is tried again, and how long the task sleeps when nothing is to be done.
RETRY_S = 10.0
SHORTEST_SLEEP_S = 0.001
IDLE_S = 1.0

# linux/watchdog.h
_WDIOC_GETSUPPORT, _WDIOC_KEEPALIVE = 0x80285700, 0x80045705
_WDIOC_SETTIMEOUT, _WDIOC_GETTIMEOUT = 0xC0045706, 0x80045707
_WDIOF_SETTIMEOUT, _WDIOF_MAGICCLOSE, _WDIOF_KEEPALIVEPING = 0x0080, 0x0100, 0x8000


class Limits(NamedTuple):
    """What a device can be set to, in whole seconds; 0: not known."""

    least_s: int = 0
    most_s: int = 0


class Plan(NamedTuple):
    """The timeout to set; None: there is none that would fire in time. `replaced`: not the configured one."""

    timeout_s: int | None
    replaced: bool
    why: str


def plan_timeout(ttl_s: float, safety_margin_s: int, limits: Limits = Limits()) -> Plan:  # noqa: B008  (immutable)
    """ttl less the margin (-1: half of ttl) if that is possible, else the largest whole second that is.

    At most ttl x (1 - drift) - 1, so that there is a second of licence in which to pet.
    """
    wanted = math.floor(ttl_s / 2) if safety_margin_s < 0 else math.floor(ttl_s - safety_margin_s)
    ceiling = math.floor(ttl_s * (1 - DRIFT) - 1)
    if limits.most_s:
        ceiling = min(ceiling, limits.most_s)
    floor = max(1, limits.least_s)
    if ceiling < floor:
        return Plan(None, True, f"ttl {ttl_s:g} s leaves at most {ceiling} s, the device needs at least {floor} s")
    if max(PREFERRED_LEAST_S, floor) <= wanted <= ceiling:
        return Plan(wanted, False, "")
    return Plan(ceiling, True, f"ttl {ttl_s:g} s less safety_margin {safety_margin_s} gives {wanted} s, "
                               f"possible are {max(PREFERRED_LEAST_S, floor)} to {ceiling} s: using {ceiling} s")


def next_pet(now: Instant, valid_until: Deadline, timeout_s: float, last: Instant) -> float | None:
    """Seconds until the next pet (0: now); None if none is permitted any more under this licence.

    Every min(1 s, timeout/4), and a last time just before valid_until - timeout.
    """
    room_s = remaining_s(valid_until, now) - timeout_s
    since_last_s = holder_age_s(last, now)
    last_moment_in_s = room_s - LAST_PET_LEAD_S
    if room_s < 0 or last_moment_in_s <= -since_last_s:  # too late, or the last one has been done
        return None
    return max(0.0, min(period_s(timeout_s) - since_last_s, last_moment_in_s))


def period_s(timeout_s: float) -> float:
    """How often to pet."""
    return min(1.0, timeout_s / 4)


class WatchdogError(Exception):
    """The device cannot do what is needed; the text says what."""


class Device(Protocol):
    """One watchdog device, opened and closed any number of times. Every method raises OSError."""

    def accessible(self) -> str:
        """ "" if `open` should succeed, else why not. Does not start it."""
        ...

    def limits(self) -> Limits: ...
    def nowayout(self) -> bool: ...
    def open(self) -> None:
        """Starts it, with the timeout that it had last."""
        ...

    def set_timeout(self, timeout_s: int) -> int:
        """Restarts its count; returns the timeout that it really has now."""
        ...

    def keepalive(self) -> None: ...
    def close(self, *, stop: bool) -> None:
        """`stop`: with the magic character, so that it stops (where the driver permits it)."""
        ...


class LinuxDevice:
    """/dev/watchdog by its ioctls."""

    def __init__(self, path: str = "/dev/watchdog") -> None:
        self._path = path
        self._fd = -1

    def accessible(self) -> str:
        path = Path(self._path)
        if not path.is_char_device():
            return f"{self._path} is not there, or no device"
        return "" if os.access(self._path, os.W_OK) else f"{self._path} is not writable for user {os.geteuid()}"

    def limits(self) -> Limits:
        return Limits(self._sysfs("min_timeout"), self._sysfs("max_timeout"))

    def nowayout(self) -> bool:
        return self._sysfs("nowayout") == 1

    def _sysfs(self, name: str) -> int:
        """/sys/class/watchdog/watchdogN, by the device's number; 0 where the kernel does not tell."""
        try:
            number = os.stat(self._path).st_rdev  # noqa: PTH116  (the device's number is wanted)
            # /dev/watchdog itself (misc 10:130) is the first one's second name.
            here = Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}").resolve()
            base = Path("/sys/class/watchdog/watchdog0") if os.major(number) == 10 else here
            return int((base / name).read_text("ascii"))
        except (OSError, ValueError):
            return 0

    def open(self) -> None:
        assert self._fd < 0, "open already"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        buffer = bytearray(40)  # struct watchdog_info: options, firmware version, identity[32]
        fcntl.ioctl(self._fd, _WDIOC_GETSUPPORT, buffer)
        options, _, _ = struct.unpack("II32s", buffer)
        if not options & _WDIOF_SETTIMEOUT or not options & _WDIOF_KEEPALIVEPING:
            raise OSError(0, f"{self._path} cannot set its timeout, or cannot be petted")
        if not options & _WDIOF_MAGICCLOSE:
            log.warning("watchdog does not know the magic close: closing it may not stop it", device=self._path)

    def set_timeout(self, timeout_s: int) -> int:
        fcntl.ioctl(self._fd, _WDIOC_SETTIMEOUT, struct.pack("i", timeout_s))
        (actual,) = struct.unpack("i", fcntl.ioctl(self._fd, _WDIOC_GETTIMEOUT, struct.pack("i", 0)))
        return int(actual)

    def keepalive(self) -> None:
        fcntl.ioctl(self._fd, _WDIOC_KEEPALIVE, struct.pack("i", 0))

    def close(self, *, stop: bool) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                if stop:
                    os.write(fd, b"V")
            finally:
                os.close(fd)


class Wanted(NamedTuple):
    """What the rest of the agent wants of the watchdog now."""

    protecting: bool                     # from before the promotion until the demotion is complete; not in pause
    ttl_s: float
    valid_until: Deadline | None = None  # of the licence; None: no licence, nothing may be petted


class Watchdog:
    """Owner of the device. `facts` says what to publish; `failed` there means: required, but not usable."""

    def __init__(self, device: Device, *, mode: Mode, safety_margin_s: int, clock: Clock) -> None:
        self._device = device
        self._safety_margin_s = safety_margin_s
        self._clock = clock
        self._open = False
        self._nowayout = False
        self._timeout_s = 0
        self._last = clock.now()
        self._failed_at: Instant | None = None
        self.mode = mode
        self.facts = WatchdogFacts(mode=mode)

    def check(self, ttl_s: float) -> WatchdogFacts:
        """Could it protect a primary under this ttl? Asked before leadership is sought; does not start the device."""
        if not self._open and self.mode != "off":
            why = self._device.accessible() or ("" if (plan := self._plan(ttl_s)).timeout_s else plan.why)
            self._say(why=why, failed=bool(why))
        return self.facts

    def activate(self, ttl_s: float, valid_until: Deadline) -> bool:
        """Start it, before the promotion. False: not protected; whether that forbids the promotion: `facts.failed`."""
        if self.mode == "off":
            return False
        if self._open:
            return True
        plan = self._plan(ttl_s)
        if plan.timeout_s is None:
            self._fail(plan.why)
            return False
        if not self._permitted(plan.timeout_s, valid_until):
            self._say(why="too little of the licence is left to start it", failed=True)
            return False
        try:
            self._device.open()
            self._open = True
            self._nowayout = self._device.nowayout()
            self._set(plan.timeout_s, ttl_s)
        except (OSError, WatchdogError) as exc:
            self._close()
            self._fail(str(exc))
            return False
        self._failed_at = None
        if plan.replaced:
            log.warning("watchdog timeout replaced", why=plan.why)
        log.info("watchdog started", timeout_s=self._timeout_s, nowayout=self._nowayout)
        self._say(why=plan.why, failed=False)
        return True

    def pet(self, valid_until: Deadline) -> bool:
        """Pet it if the licence outlasts the device's next firing; the clock is read here, last of all."""
        if not self._open or not self._permitted(self._timeout_s, valid_until):
            return False
        return self._keepalive()

    def deactivate(self) -> None:
        """The demotion is complete, or a pause begins."""
        if not self._open:
            return
        if self._nowayout:
            self._keepalive()  # and step() goes on: it cannot be stopped, and nothing is to be protected any more
            return
        self._close()
        log.info("watchdog stopped")
        self._say(why="", failed=False)

    def close(self) -> None:
        """The agent ends, after its PostgreSQL."""
        if self._open and self._nowayout:
            self._keepalive()
            log.error("watchdog cannot be stopped (nowayout): this machine will be reset", in_s=self._timeout_s)
        self._close()

    def step(self, wanted: Wanted) -> float:
        """Do what is due now; seconds until the next step at the latest.

        Also to be called, with the new ttl and the licence that it leaves, before a smaller ttl is written: until then
        the device may still fire after that licence.
        """
        if self.mode == "off":
            return IDLE_S
        if not wanted.protecting:
            return self._rest()
        if wanted.valid_until is None:
            return period_s(self._timeout_s or 4)
        if not self._open:
            if self._failed_at is None or holder_age_s(self._failed_at, self._clock.now()) >= RETRY_S:
                self.activate(wanted.ttl_s, wanted.valid_until)
            return period_s(self._timeout_s or 4)
        self._follow_ttl(wanted.ttl_s, wanted.valid_until)
        due_in_s = next_pet(self._clock.now(), wanted.valid_until, self._timeout_s, self._last)
        if due_in_s is not None and due_in_s < SHORTEST_SLEEP_S:
            self.pet(wanted.valid_until)
            due_in_s = next_pet(self._clock.now(), wanted.valid_until, self._timeout_s, self._last)
        # None: waiting for a renewal; looked for often, since the device is counting.
        return min(0.1, period_s(self._timeout_s)) if due_in_s is None else max(SHORTEST_SLEEP_S, due_in_s)

    async def run(self, wanted: Callable[[], Wanted]) -> None:
        """Step for ever; when cancelled, the device keeps running until `close` or its own end."""
        while True:  # noqa: ASYNC110  (it is the time that is waited for)
            await trio.sleep(self.step(wanted()))

    # --- the device --------------------------------------------------------------------------------------------

    def _plan(self, ttl_s: float) -> Plan:
        return plan_timeout(ttl_s, self._safety_margin_s, self._device.limits())

    def _permitted(self, timeout_s: float, valid_until: Deadline) -> bool:
        return remaining_s(valid_until, self._clock.now()) >= timeout_s

    def _rest(self) -> float:
        if self._open and not self._nowayout:
            self.deactivate()
        if self._open:
            self._keepalive()
            return period_s(self._timeout_s)
        return IDLE_S

    def _follow_ttl(self, ttl_s: float, valid_until: Deadline) -> None:
        """A changed ttl changes the timeout, as soon as the new one fits into the licence: setting it restarts the count.

        The old one need not fit: after a smaller ttl it no longer does, and waiting for it would reset the machine.
        """
        plan = self._plan(ttl_s)
        if plan.timeout_s is None or plan.timeout_s == self._timeout_s \
                or not self._permitted(plan.timeout_s, valid_until):
            return
        try:
            self._set(plan.timeout_s, ttl_s)
        except (OSError, WatchdogError) as exc:
            self._say(why=str(exc), failed=True)
            return
        log.info("watchdog timeout changed", timeout_s=self._timeout_s, ttl_s=ttl_s)
        self._say(why=plan.why, failed=False)

    def _set(self, timeout_s: int, ttl_s: float) -> None:
        actual_s = self._device.set_timeout(timeout_s)
        self._last = self._clock.now()
        self._timeout_s = actual_s
        if actual_s > ttl_s * (1 - DRIFT) - 1:
            raise WatchdogError(f"asked for {timeout_s} s, the device took {actual_s} s: too long for ttl {ttl_s:g} s")

    def _keepalive(self) -> bool:
        try:
            self._device.keepalive()
        except OSError as exc:
            self._say(why=f"petting failed: {exc}", failed=True)
            return False
        self._last = self._clock.now()
        return True

    def _close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._device.close(stop=True)
            except OSError as exc:
                log.warning("watchdog could not be closed", why=str(exc))

    def _fail(self, why: str) -> None:
        self._failed_at = self._clock.now()
        self._say(why=why, failed=True)

    def _say(self, *, why: str, failed: bool) -> None:
        before = self.facts
        self.facts = WatchdogFacts(mode=self.mode, active=self._open, failed=failed and self.mode == "required",
                                   timeout_s=float(self._timeout_s) if self._open else 0.0, why=why)
        if failed and why != before.why:
            log.warning("watchdog cannot protect this node", mode=self.mode, why=why)

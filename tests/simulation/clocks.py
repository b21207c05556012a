"""What time is it on a host? Clocks that run at rates of their own, jump, or stand still (safety model 15).

`HostClock` fits pgha.clock.Clock. Rates are in parts per million of deviation: ±10,000 ppm is the 1 % that the safety
model allows for. A suspended host's boot clock runs on, its raw clock does not.
"""

from __future__ import annotations

from pgha.clock import Instant
from tests.simulation.scheduler import Scheduler

MILLION = 1_000_000
#: Epoch seconds of the moment at which the world began.
EPOCH_S = 1_750_000_000


class TrueClock:
    """Real time, which nobody in the world can read; the store's own clock runs by it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def now(self) -> Instant:
        t = self._scheduler.now_ns + 1
        return Instant(t, t)

    def wall_s(self) -> float:
        return EPOCH_S + self._scheduler.now_ns / 1e9


class HostClock:
    """The clocks of one host, since its last boot."""

    def __init__(self, scheduler: Scheduler, *, boot_ppm: int = 0, raw_ppm: int = 0) -> None:
        self._scheduler = scheduler
        self._boot_rate = MILLION + boot_ppm
        self._raw_rate = MILLION + raw_ppm
        self._since_ns = scheduler.now_ns
        self._boot_ns = self._raw_ns = 5 * 10**9
        self._wall_offset_s = 0.0
        self._suspended = False
        self.boots = 1

    def now(self) -> Instant:
        passed = self._scheduler.now_ns - self._since_ns
        raw = self._raw_ns if self._suspended else self._raw_ns + passed * self._raw_rate // MILLION
        return Instant(self._boot_ns + passed * self._boot_rate // MILLION, raw)

    def wall_s(self) -> float:
        return EPOCH_S + self._scheduler.now_ns / 1e9 + self._wall_offset_s

    def _fix(self) -> None:
        self._boot_ns, self._raw_ns = self.now()
        self._since_ns = self._scheduler.now_ns

    def set_rates(self, *, boot_ppm: int, raw_ppm: int) -> None:
        self._fix()
        self._boot_rate, self._raw_rate = MILLION + boot_ppm, MILLION + raw_ppm

    def jump_wall(self, seconds: float) -> None:
        self._wall_offset_s += seconds

    def suspend(self) -> None:
        self._fix()
        self._suspended = True

    def resume(self) -> None:
        self._fix()
        self._suspended = False

    def reboot(self) -> None:
        """Both clocks begin anew."""
        self._suspended = False
        self._since_ns = self._scheduler.now_ns
        self._boot_ns = self._raw_ns = 5 * 10**9
        self.boots += 1

    def true_ns_of(self, seconds: float) -> int:
        """How long a timer of so many seconds really takes here."""
        return round(seconds * 1e9) * MILLION // self._raw_rate

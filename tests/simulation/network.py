"""Who reaches whom, how late, and what gets lost. Names are nodes ("n1"), the store's members ("s1") and clients ("c1").

A link has a direction. Cutting is by pairs (one way), so partitions of any shape are possible. What is under way when a
link is cut still arrives; what is sent afterwards does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.simulation.scheduler import MILLISECOND, Scheduler


class Network:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._chance = scheduler.stream("network")
        self._cut: dict[tuple[str, str], int] = {}     # how many faults cut it now
        self._slow: dict[str, int] = {}                # extra ns to and from this name
        self._loss: dict[str, float] = {}              # share of what is lost to and from this name
        self.on_change: list[Callable[[], None]] = []

    def passes(self, source: str, target: str) -> bool:
        return source == target or (source, target) not in self._cut

    def both_ways(self, a: str, b: str) -> bool:
        return self.passes(a, b) and self.passes(b, a)

    def delay_ns(self, source: str, target: str) -> int | None:
        """How long a message sent now takes; None if it is lost."""
        if source == target:
            return 50_000
        if (source, target) in self._cut:
            return None
        for name in (source, target):
            share = self._loss.get(name)
            if share and self._chance.random() < share:
                return None
        extra = self._slow.get(source, 0) + self._slow.get(target, 0)
        return MILLISECOND // 5 + int(self._chance.random() * MILLISECOND) + extra

    def send(self, source: str, target: str, callback: Callable[..., None], *arguments: Any) -> bool:
        """Deliver, if it arrives; whether it will."""
        delay = self.delay_ns(source, target)
        if delay is None:
            return False
        self._scheduler.at(self._scheduler.now_ns + delay, callback, *arguments)
        return True

    # faults

    def cut(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """One way, from each to each."""
        for source in sources:
            for target in targets:
                if source != target:
                    self._cut[source, target] = self._cut.get((source, target), 0) + 1
        self._changed()

    def mend(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Undo one `cut` of the same pairs."""
        for source in sources:
            for target in targets:
                left = self._cut.get((source, target), 0) - 1
                if left > 0:
                    self._cut[source, target] = left
                else:
                    self._cut.pop((source, target), None)
        self._changed()

    def slow_down(self, name: str, extra_s: float) -> None:
        self._slow[name] = round(extra_s * 1e9)

    def lose(self, name: str, share: float) -> None:
        self._loss[name] = share

    def heal(self) -> None:
        self._cut.clear()
        self._slow.clear()
        self._loss.clear()
        self._changed()

    def _changed(self) -> None:
        for callback in self.on_change:
            callback()

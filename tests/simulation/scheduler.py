"""Virtual time: what happens next, and in which order. The only source of order and of chance in a simulation.

Time is an integer number of nanoseconds since the world began. Events of the same moment come in the order in which
they were asked for. Chance comes from streams that are named and seeded by (seed, name), so that a fault taken out of a
program changes nothing in what the other streams draw.

Level (a) runs the scheduler by its own loop (`run_until`). Level (b) pumps it from one trio task under a MockClock:
sleep until `next_due()`, then `run_due(now)`; `on_earlier` is called when something was asked for that is due before all
else, so that the sleeper wakes up.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

SECOND = 1_000_000_000
MILLISECOND = 1_000_000


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


class Event:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("at_ns", "callback", "arguments")

    def __init__(self, at_ns: int, callback: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
        self.at_ns = at_ns
        self.callback = callback
        self.arguments = arguments

    def cancel(self) -> None:
        self.callback = None
        self.arguments = ()


class Scheduler:
    """A heap of (time, sequence, event)."""

    def __init__(self, seed: int | str) -> None:
        self.seed = seed
        self.now_ns = 0
        self.events = 0                                    # how many have happened
        self.on_earlier: Callable[[], None] | None = None
        self._heap: list[tuple[int, int, Event]] = []
        self._sequence = 0
        self._streams: dict[str, Random] = {}

    @property
    def now_s(self) -> float:
        return self.now_ns / 1e9

    def stream(self, name: str) -> Random:
        """The chance of one kind; text seeds do not depend on PYTHONHASHSEED."""
        found = self._streams.get(name)
        if found is None:
            found = self._streams[name] = Random(f"{self.seed}/{name}")
        return found

    def at(self, at_ns: int, callback: Callable[..., None], *arguments: Any) -> Event:
        """At that moment, or now if it has passed."""
        at_ns = max(at_ns, self.now_ns)
        event = Event(at_ns, callback, arguments)
        self._sequence += 1
        earlier = self.on_earlier is not None and (not self._heap or at_ns < self._heap[0][0])
        heapq.heappush(self._heap, (at_ns, self._sequence, event))
        if earlier and self.on_earlier is not None:
            self.on_earlier()
        return event

    def after(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> Event:
        return self.at(self.now_ns + round(seconds * 1e9), callback, *arguments)

    def next_due(self) -> int | None:
        """When the next event is; None if there is none."""
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def run_due(self, now_ns: int) -> int:
        """Let everything happen that is due up to `now_ns`; how much it was. `now_ns` is then the time."""
        heap, done = self._heap, 0
        while heap and heap[0][0] <= now_ns:
            at_ns, _, event = heapq.heappop(heap)
            callback = event.callback
            if callback is None:
                continue
            self.now_ns = max(self.now_ns, at_ns)
            event.callback = None
            callback(*event.arguments)
            done += 1
        self.now_ns = max(self.now_ns, now_ns)
        self.events += done
        return done

    run_until = run_due

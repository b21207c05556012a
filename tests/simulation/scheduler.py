"""Virtual time: what happens next, and in which order. The only source of order and of chance in a simulation.

Time is an integer number of nanoseconds since the world began. Events of the same moment come in the order in which
they were asked for. Chance comes from streams that are named and seeded by (seed, name), so that a fault taken out of a
program changes nothing in what the other streams draw.

Level (a) runs the scheduler by its own loop (`run_due` up to the end). Level (b) asks for `next_due()` whenever every trio
task waits, and then calls `run_due` (`virtual.VirtualClock`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
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
    """A heap of (time, sequence, event) for what is to come, and a queue for what is due at once: more than a third of all.
    What the heap has for a moment was asked for before the moment came, and thus comes before what the queue has for it."""

    def __init__(self, seed: int | str) -> None:
        self.seed = seed
        self.now_ns = 0
        self.events = 0                                    # how many have happened
        self._heap: list[tuple[int, int, Event]] = []
        self._at_once: deque[Event] = deque()
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
        if at_ns <= self.now_ns:
            event = Event(self.now_ns, callback, arguments)
            self._at_once.append(event)
            return event
        event = Event(at_ns, callback, arguments)
        self._sequence += 1
        heapq.heappush(self._heap, (at_ns, self._sequence, event))
        return event

    def at_once(self, callback: Callable[..., None], *arguments: Any) -> Event:
        event = Event(self.now_ns, callback, arguments)
        self._at_once.append(event)
        return event

    def after(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> Event:
        return self.at(self.now_ns + round(seconds * 1e9), callback, *arguments)

    def next_due(self) -> int | None:
        """When the next event is; None if there is none."""
        heap, at_once = self._heap, self._at_once
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
        while at_once and at_once[0].callback is None:
            at_once.popleft()
        if at_once:
            return min(at_once[0].at_ns, heap[0][0]) if heap else at_once[0].at_ns
        return heap[0][0] if heap else None

    def run_due(self, now_ns: int, stop: Sequence[object] = ()) -> int:
        """Let everything happen that is due up to `now_ns`; how much it was. `now_ns` is then the time. Once there is
        something in `stop`, the moment is finished, and time goes no further."""
        heap, at_once, done = self._heap, self._at_once, 0
        while True:
            if at_once and not (heap and heap[0][0] <= at_once[0].at_ns):
                if at_once[0].at_ns > now_ns:
                    break
                event = at_once.popleft()
                callback = event.callback
                if callback is None:
                    continue
            elif heap and heap[0][0] <= now_ns:
                if stop and heap[0][0] > self.now_ns:
                    break
                at_ns, _, event = heapq.heappop(heap)
                callback = event.callback
                if callback is None:
                    continue
                self.now_ns = max(self.now_ns, at_ns)
            else:
                break
            event.callback = None
            callback(*event.arguments)
            done += 1
        if now_ns > self.now_ns and not stop:
            self.now_ns = now_ns
        self.events += done
        return done

    run_until = run_due

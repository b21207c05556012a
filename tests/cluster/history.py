"""What clients remember, and what follows from it: nobody wrote beside the primary, and how much was lost?

A line of a history: kind, node, id, timeline, position in the write-ahead log, life (start of the postmaster), stamp (the server's clock before the
commit), sent and acknowledged (the client's monotonic clock), acknowledged by wall clock. All times in microseconds. A line that begins with # notes a failure.
Server and client run on one machine, so stamps and wall clock acknowledgements are of one clock.

A *reign* is one life of one postmaster on one timeline. Reigns are ordered by their first acknowledgement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Ack(NamedTuple):
    """One acknowledged row."""

    kind: str
    node: str
    id: int
    timeline: int
    lsn: int
    life_us: int
    stamp_us: int
    sent_us: int
    ack_us: int
    ack_wall_us: int


class Reign(NamedTuple):
    """All acknowledged rows of one postmaster's life on one timeline."""

    node: str
    timeline: int
    life_us: int
    acks: int
    first_ack_wall_us: int
    last_ack_wall_us: int
    last_stamp_us: int

    def __str__(self) -> str:
        return f"{self.node} on timeline {self.timeline} (postmaster of {self.life_us % 10**9 / 1e6:.3f}, {self.acks} rows)"


class Breach(NamedTuple):
    """Something that must not be. `old` wrote beside another for `overlap_s`, if that is what it is."""

    text: str
    old: Reign | None = None
    overlap_s: float = 0.0


class Gap(NamedTuple):
    """The longest time without an acknowledgement, and when it began (monotonic)."""

    length_s: float
    began_us: int


class Verdict(NamedTuple):
    """`violations`: sentences, empty if all is well. `lost`: acknowledged rows that the final primary does not have."""

    acks: int
    reigns: tuple[Reign, ...]
    violations: tuple[str, ...]
    lost: tuple[Ack, ...]
    gap: Gap

    def __str__(self) -> str:
        lines = [f"{self.acks} rows acknowledged, {len(self.lost)} lost, longest gap {self.gap.length_s:.2f} s"]
        lines += [f"  {reign}" for reign in self.reigns]
        lines += [f"  VIOLATION: {violation}" for violation in self.violations]
        return "\n".join(lines)


def read(path: Path) -> list[Ack]:
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> list[Ack]:
    """A last line that was cut off by SIGKILL is left out."""
    acks = []
    for line in text.splitlines(keepends=True):
        fields = line.split()
        if line.endswith("\n") and fields[0] != "#":
            acks.append(Ack(fields[0], fields[1], *map(int, fields[2:])))
    return acks


def failures(path: Path) -> list[tuple[int, str]]:
    """Connections that failed or broke: when (monotonic, microseconds), and why."""
    lines = (line.split(maxsplit=2) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return [(int(fields[1]), fields[2] if len(fields) > 2 else "") for fields in lines]


def reigns_of(acks: Iterable[Ack]) -> tuple[Reign, ...]:
    groups: dict[tuple[str, int, int], list[Ack]] = defaultdict(list)
    for ack in acks:
        groups[ack.node, ack.timeline, ack.life_us].append(ack)
    reigns = [
        Reign(*key, len(rows), min(r.ack_wall_us for r in rows), max(r.ack_wall_us for r in rows), max(r.stamp_us for r in rows))
        for key, rows in groups.items()
    ]
    return tuple(sorted(reigns, key=lambda reign: reign.first_ack_wall_us))


def judge(acks: Sequence[Ack], present: set[int]) -> Verdict:
    """`present`: ids in the final primary's table."""
    reigns = reigns_of(acks)
    lost = tuple(ack for ack in acks if ack.id not in present)
    return Verdict(len(acks), reigns, tuple(breach.text for breach in breaches(reigns)), lost, longest_gap([a.ack_us for a in acks]))


def breaches(reigns: Sequence[Reign]) -> Iterable[Breach]:
    """Everything that a cluster with one writer at a time cannot have done."""
    for i, old in enumerate(reigns):
        for new in reigns[i + 1:]:
            excess_us = old.last_stamp_us - new.first_ack_wall_us
            if excess_us > 0:
                yield Breach(f"{old} acknowledged a row stamped {excess_us / 1e6:.3f} s after the first acknowledgement of {new}", old, excess_us / 1e6)
            elif old.node == new.node and (late_us := old.last_stamp_us - new.life_us) > 0 and old.life_us != new.life_us:
                yield Breach(f"{old} acknowledged a row stamped {late_us / 1e6:.3f} s after its successor {new} was started", old)
            if old.timeline > new.timeline:
                yield Breach(f"{new} began after {old}, on an older timeline", old)
    writers: dict[int, set[str]] = defaultdict(set)
    for reign in reigns:
        writers[reign.timeline].add(reign.node)
    for timeline, nodes in sorted(writers.items()):
        if len(nodes) > 1:
            yield Breach(f"timeline {timeline} was written by {' and '.join(sorted(nodes))}")


def longest_gap(moments_us: Sequence[int]) -> Gap:
    ordered = sorted(moments_us)
    pairs = zip(ordered, ordered[1:], strict=False)
    return max((Gap((b - a) / 1e6, a) for a, b in pairs), default=Gap(0.0, 0))

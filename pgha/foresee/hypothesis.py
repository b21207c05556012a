"""What is to be supposed: `NODE=down`, `dcs=down`, `NODE.lag=SIZE`, several of them at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

from msgspec import Struct

#: The store, in a hypothesis; a member of that name cannot be supposed to be down.
STORE = "dcs"
_UNITS = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})\s*([A-Za-z]{0,3})", re.ASCII)
_ALLOWED = "allowed: NODE=down, dcs=down, NODE.lag=SIZE (as 20MB)"


class NotAHypothesis(ValueError):
    """The text says nothing that can be supposed."""


class UnknownNode(ValueError):
    """It is about a member that does not exist."""


class Hypothesis(Struct, frozen=True, kw_only=True):
    """`what` down: the node's whole machine, at once and for good, or the store; lag: the node is `lag_bytes` behind the
    leader, and gets no nearer. `node` "" is the store."""

    what: Literal["down", "lag"]
    node: str = ""
    lag_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.node or STORE}=down" if self.what == "down" else f"{self.node}.lag={_size(self.lag_bytes)}"


def _size(size_bytes: int) -> str:
    """As it may be written: 20971520 → "20MB"."""
    for unit in ("TB", "GB", "MB", "kB"):
        whole, rest = divmod(size_bytes, _UNITS[unit.lower()])
        if whole and not rest:
            return f"{whole}{unit}"
    return str(size_bytes)


def parse(text: str) -> Hypothesis:
    """'n2.lag=20MB' → Hypothesis. Raises NotAHypothesis with what would be one."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name or not value:
        raise NotAHypothesis(f"{text[:100]!r} is no hypothesis; {_ALLOWED}")
    if value == "down":
        return Hypothesis(what="down", node="" if name == STORE else name)
    node, dot, which = name.rpartition(".")
    if dot and which == "lag" and node:
        size = _SIZE.fullmatch(value)
        unit = _UNITS.get(size[2].lower()) if size is not None else None
        if size is None or unit is None:
            raise NotAHypothesis(f"{text[:100]!r}: {value[:40]!r} is no size; allowed: a whole number with B, kB, MB, GB or TB")
        if int(size[1]) * unit >= 1 << 50:
            raise NotAHypothesis(f"{text[:100]!r}: more than any cluster lags; allowed: less than 1024TB")
        return Hypothesis(what="lag", node=node, lag_bytes=int(size[1]) * unit)
    raise NotAHypothesis(f"{text[:100]!r} is no hypothesis; {_ALLOWED}")


def parse_all(texts: Iterable[str], members: Collection[str]) -> tuple[Hypothesis, ...]:
    """All of them. Raises NotAHypothesis also where two contradict each other, UnknownNode for a name that no member has."""
    found: dict[tuple[str, str], Hypothesis] = {}
    for text in texts:
        one = parse(text)
        if one.node and one.node not in members:
            raise UnknownNode(f"{text[:100]!r}: no such member: {one.node[:100]}; there are {', '.join(sorted(members)) or 'none'}")
        if found.get((one.node, one.what), one) != one:
            raise NotAHypothesis(f"{text[:100]!r}: this node's lag was supposed already, to be something else")
        found[one.node, one.what] = one
    down = {one.node for one in found.values() if one.what == "down"}
    return tuple(one for one in found.values() if one.what == "down" or one.node not in down)

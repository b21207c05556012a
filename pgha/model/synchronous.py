"""What synchronous_standby_names demands of a commit, and what `/sync` promises of whoever may lead.

A *requirement* is the setting, parsed: a commit waits for `count` of `names`. A *promise* is `/sync`: among any
`quorum + 1` of `voters` there is one that has every acknowledged commit. Whether the one bears out the other is
`covers`. Priority mode is the case in which everybody is waited for and the quorum is 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from msgspec import Struct

#: Stands in synchronous_standby_names where the strict mode has nobody to wait for, so that commits wait. No member's name.
PLACEHOLDER = "__patroni_strict_sync_replica_placeholder__"

_TOKEN = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^\s(),"]+)|([(),]))')
#: What PostgreSQL's scanner takes without quotes, without being a keyword or a number.
_PLAIN = re.compile(r"[A-Za-z_\x80-\uffff][A-Za-z0-9_$\x80-\uffff]*")


class Promise(Struct, frozen=True, kw_only=True):
    """`voters`: names in lower case, since they are compared without regard to case; the leader is none of them."""

    voters: frozenset[str] = frozenset()
    quorum: int = 0

    def __str__(self) -> str:
        return f"{', '.join(sorted(self.voters)) or 'nobody'}" + (f" with quorum {self.quorum}" if self.quorum else "")


class Requirement(Struct, frozen=True, kw_only=True):
    """synchronous_standby_names. `count` 0: nothing is waited for. `anybody`: a `*` is among the names, so that whoever
    streams may be counted, members or not. `by_priority`: written as FIRST (or without a word), not ANY."""

    names: frozenset[str] = frozenset()
    count: int = 0
    by_priority: bool = True
    anybody: bool = False

    @property
    def guaranteed(self) -> int:
        """How many of `names` surely have an acknowledged commit."""
        return 0 if self.anybody else min(self.count, len(self.names))


@lru_cache(maxsize=64)
def parse_requirement(text: str) -> Requirement:
    """`n1`, `"n-1"`, `2 (a, b)`, `FIRST 2 (a, b)`, `ANY 1 (a, b)`, `*`, ''. What does not parse demands nothing that
    could be counted on."""
    words: list[str] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return Requirement(anybody=True)
        position = match.end()
        quoted, plain, mark = match.groups()
        words.append(quoted.replace('""', '"') if quoted is not None else plain or mark)
    by_priority, count, names = True, 1, [word for word in words if word not in "(),"]
    if "(" in words:
        head = words[:words.index("(")]
        names = [word for word in words[len(head):] if word not in "(),"]
        by_priority = not head or head[0].upper() != "ANY"
        count = int(head[-1]) if head and head[-1].isascii() and head[-1].isdigit() and len(head[-1]) < 6 else 0
    if not names:
        return Requirement(anybody=bool(words))
    anybody = "*" in names      # PostgreSQL takes it for a wildcard even in quotes
    return Requirement(names=frozenset(name.lower() for name in names if name != "*"), count=count, by_priority=by_priority, anybody=anybody)


def format_requirement(names: Iterable[str], count: int, *, by_priority: bool) -> str:
    """The setting's text, as the reference writes it: `a`, `2 (a,b)`, `ANY 1 (a,b)`; '' for nobody."""
    written = [name if _PLAIN.fullmatch(name) and name.upper() not in ("ANY", "FIRST") else '"' + name.replace('"', '""') + '"'
               for name in sorted(names)]
    if not written or count <= 0:
        return ""
    if by_priority:
        return written[0] if len(written) == 1 and count == 1 else f"{count} ({','.join(written)})"
    return f"ANY {count} ({','.join(written)})"


def covers(promise: Promise, requirement: Requirement) -> bool:
    """Is a commit that `requirement` let through surely on one of any quorum + 1 voters?

    It is on `count` of the names, of which at most those that are no voters can be without meaning for the vote. Without
    voters only the leader may lead, which has everything. (Compatibility spec 12.7 has the same for V and S inside each
    other: both together are at most q + n names.)
    """
    voters, outside = promise.voters, len(requirement.names - promise.voters)
    return not voters or max(0, requirement.guaranteed - outside) + promise.quorum + 1 > len(voters)


def may_promise(old: Promise, new: Promise, *, requirement: Requirement | None = None, confirmed: frozenset[str] = frozenset()) -> bool:
    """May `/sync` go from `old` to `new`? `requirement`: the one that every server process surely obeys since some
    moment (None: a change of it may not have reached all); `confirmed`: who has everything from before that moment.

    Either whatever `old` promised implies `new`; or commits since that moment are covered by `requirement`, and older
    ones by those who confirmed and what `old` says of the others: at most old.quorum of its voters lack a commit.
    """
    if not new.voters or new.quorum >= old.quorum + len(new.voters - old.voters):
        return True
    if requirement is None:
        return False
    doubtful = new.voters - confirmed
    lacking = len(doubtful - old.voters) + min(old.quorum, len(doubtful & old.voters))
    return new.quorum + 1 > lacking and covers(new, requirement)

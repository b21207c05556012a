"""The configuration store, as narrow as it can be: read, transact, watch, leases. One file a driver.

Every driver keeps the same contract (tests/dcs/test_contract.py runs against `memory` and the real servers):

* Keys are full paths ("/service/demo/pgha/lock"); values are bytes. Revisions are integers of the whole store and only
  grow; a key's revision is that of its last write.
* `read` is linearizable: what was committed before the call began is in the answer.
* `transact` is atomic: if every `Compare` holds, every `Put`/`Delete` is applied at one revision. A failed compare is
  an answer (`Outcome.succeeded` false, with the current entries of the keys asked for), not an error.
* Errors are typed (pgha.errors): DcsUnreachable means *unknown*: a write may have happened, or may still happen later.
  Nothing but an answered transaction says that a compare failed.
* Every call takes `deadline_s`, its whole time budget in seconds; it raises DcsUnreachable when that is used up, and
  being cancelled from outside leaves the driver usable.
* `Generation` lets the caller see that a store was restored or rebuilt: another cluster id, or a revision going back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from msgspec import Struct

#: compare against "the key does not exist"
ABSENT = 0


class Entry(Struct, frozen=True, kw_only=True):
    """One key as it stands. `revision`: of its last write. `lease`: 0 if it has none."""

    key: str
    value: bytes
    revision: int
    lease: int = 0


class Compare(Struct, frozen=True, kw_only=True):
    """Holds if the key's revision is `revision` (ABSENT: the key does not exist) and, if given, its value is `value`."""

    key: str
    revision: int | None = None
    value: bytes | None = None


class Put(Struct, frozen=True, kw_only=True):
    key: str
    value: bytes
    lease: int = 0


class Delete(Struct, frozen=True, kw_only=True):
    key: str


class Generation(Struct, frozen=True, kw_only=True):
    """Which store answered, and the highest revision it has told us of."""

    cluster_id: str = ""
    revision: int = 0


class Outcome(Struct, frozen=True, kw_only=True):
    """A transaction's answer. `revision`: of the write if it succeeded, else of the store when it was compared.

    `found`: the entries, as of that revision, of the keys listed in `read` (absent keys are not in it); given in
    both cases.
    """

    succeeded: bool
    revision: int
    found: dict[str, Entry] = {}


class Snapshot(Struct, frozen=True, kw_only=True):
    """All keys under a prefix, read together."""

    revision: int
    entries: dict[str, Entry]
    generation: Generation


class Change(Struct, frozen=True, kw_only=True):
    """What one revision changed. `entries[key]` is None for a key that was deleted (or whose lease ran out)."""

    revision: int
    entries: dict[str, Entry | None]


class Capacity(Struct, frozen=True, kw_only=True):
    """How full the store is (safety model 16). 0 = unknown."""

    used_bytes: int = 0
    quota_bytes: int = 0
    alarms: tuple[str, ...] = ()
    compact_revision: int = 0    # oldest revision that can still be read, as far as known


class Store(Protocol):
    """What a driver offers. Safe to use from several tasks at once."""

    @property
    def generation(self) -> Generation:
        """What the latest answers said; empty before the first."""
        ...

    @property
    def regressions(self) -> int:
        """How often the store was found to be another or an older one than it had been; it has grown before the call that
        noticed it returns."""
        ...

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        """All keys that start with `prefix`. A whole key is a prefix, too, also of longer ones: look up `entries[key]`."""
        ...

    async def transact(
        self,
        *,
        compares: Sequence[Compare],
        puts: Sequence[Put | Delete],
        read: Sequence[str] = (),
        deadline_s: float,
        attempt_s: float | None = None,
    ) -> Outcome:
        """One atomic step. Sent to one endpoint after another in attempts of `attempt_s` seconds until one answers.

        An attempt whose answer was lost may have committed: a later attempt of the same transaction then answers
        "compare failed", and `found` shows the caller its own write. Recognising it is the caller's business.
        `read` keys are answered at the same revision, whether it succeeded or not.
        """
        ...

    def watch(self, prefix: str, *, after_revision: int) -> AbstractAsyncContextManager[AsyncIterator[Change | None]]:
        """Changes under `prefix` after that revision, in order, none missing; None is a sign of life without a change
        (a driver that cannot give signs of life just does not).

        Raises Compacted if that history is gone, DcsUnreachable when the stream ends or cannot be opened: the
        caller reads again and opens a new one. A silent stream is the caller's to notice.
        """
        ...

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        """A new lease; the store may round the time up to its minimum. For member keys, never for the lock."""
        ...

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        """Keep a lease alive: the seconds it has from now. LeaseLost if the store does not know it."""
        ...

    async def revoke(self, lease: int, *, deadline_s: float) -> None:
        """End a lease and the keys under it; an unknown lease is fine."""
        ...

    async def capacity(self, *, deadline_s: float) -> Capacity:
        """How full the store is."""
        ...

    async def compact(self, revision: int, *, deadline_s: float) -> None:
        """Forget history older than `revision` (safety model 16)."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...

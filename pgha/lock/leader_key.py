"""This node's hold on the key `leader`: leased in a mixed cluster, so that a member of another make may take over when it goes.

In a pure cluster `leader` is written at a take-over and carries no lease: nobody of another make ever finds it free. In a
mixed one every renewal of the lock record also renews the lease, and compares `leader` as this process wrote it, so the
record is renewed only while the key stands (safety model 14).

Rules of this file:
* the lease is renewed before the record is sent, and after the moment from which the record's validity counts: the earlier
  of both ends is the record's (model.lock.licensed_until);
* a lease that the store does not know proves nothing by itself: the next transaction, which writes the key under a new one,
  compares the key at the revision that it had, and tells;
* in pause the key carries no lease: a paused record does not expire, so nothing else may.
"""

from __future__ import annotations

from pgha.dcs import ABSENT, Compare, Delete, Entry, Put, Store
from pgha.errors import LeaseLost


class LeaderKey:
    """What this process knows of `leader`. `revision` None: not known, then its value is compared."""

    def __init__(self, store: Store, *, path: str, name: str) -> None:
        self._store = store
        self.path = path
        self._value = name.encode()
        self.revision: int | None = None
        self._lease = 0             # under which the key is known to stand
        self._granted = 0           # the last lease that was granted to this process, …
        self._granted_ttl_s = 0.0   # … and for how long at a time

    async def lease(self, ttl_s: float, *, deadline_s: float) -> int:
        """A lease that lasts `ttl_s` from no earlier than this call. DcsError: nothing was renewed."""
        if self._granted and self._granted_ttl_s == ttl_s:
            try:
                await self._store.renew(self._granted, deadline_s=deadline_s)
                return self._granted
            except LeaseLost:
                pass
        self._granted, self._granted_ttl_s = await self._store.grant(ttl_s, deadline_s=deadline_s), ttl_s
        return self._granted

    def compare(self) -> Compare:
        """Holds while the key is as this process left it."""
        if self.revision is None:
            return Compare(key=self.path, value=self._value)
        return Compare(key=self.path, revision=self.revision, value=self._value if self.revision != ABSENT else None)

    def put(self, lease: int) -> Put:
        return Put(key=self.path, value=self._value, lease=lease)

    def delete(self) -> Delete:
        return Delete(key=self.path)

    def stands_under(self, lease: int) -> bool:
        """Is the key known to stand under that lease (0: under none) already?"""
        return self.revision not in (None, ABSENT) and self._lease == lease

    def written(self, lease: int, revision: int) -> None:
        """A transaction of this process has written it."""
        self._lease, self.revision = lease, revision

    def is_ours(self, entry: Entry | None) -> bool:
        """Could it be this process that has written `entry`? Under a lease of somebody else it is another agent of this name."""
        return entry is not None and entry.value == self._value and entry.lease in (0, self._lease, self._granted)

    def gone(self) -> None:
        """Nobody has it: the next transaction creates it."""
        self._lease, self.revision = 0, ABSENT

    def forget(self) -> None:
        """Whatever stands there is not known to be this process's."""
        self._lease, self.revision = 0, None

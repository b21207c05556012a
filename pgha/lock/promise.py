"""What has this node promised to a leader that cannot reach the store, and may it promise now? (safety model 12)

Accepting a failsafe ping means: no take-over of ours is sent before the leader's licence, which counts from its first
POST, has ended. So what is checked and what is promised must be one step: nothing here awaits.

Rules of this file:
* no promise while a take-over of ours may be under way, and none to an epoch that is over;
* a promise is written down before it is given: a restarted agent is bound by it, too. The file lies on tmpfs, beside
  the guard's, so that no disk can hang the answer; after a boot, when it is gone, one is assumed.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import DRIFT, Clock, Instant, remaining_s
from pgha.log import Log
from pgha.model.failsafe import Ping, Promise
from pgha.model.lock import Licence, LicenceState, LockRecord

log = Log("pgha.failsafe")

FILE = "promise.json"
#: A ping that asks for more than this many times the longest ttl that this node knows of is refused: anybody who reaches
#: the port could keep the cluster from failing over for as long. A leader whose new ttl is not known here yet is safe: it
#: is refused, and demotes itself.
LONGEST_IN_TTLS = 3.0


class Receiver(Struct, frozen=True, kw_only=True):
    """What it depends on whether this node may promise, at this moment.

    `leads`: its PostgreSQL is a primary, or may be one. `epoch`, `epoch_holder`: the highest that it has seen.
    `ttl_s`: what to assume of a ping that does not say, and what to measure one by that does: the largest of configured,
    remembered and 30 s.
    """

    name: str
    failsafe_mode: bool
    leads: bool
    licence: Licence
    epoch: int
    epoch_holder: str
    ttl_s: float


class Verdict(Struct, frozen=True, kw_only=True):
    """The HTTP answer, and the promise that it gives; None: refused."""

    status: int
    text: str
    promise: Promise | None = None


def judge(ping: Ping, node: Receiver, before: Promise | None, now: Instant) -> Verdict:
    """May this node promise?"""
    if not node.failsafe_mode:
        return Verdict(status=502, text="failsafe mode is off")
    if ping.to not in ("", node.name) or ping.name == node.name:
        return Verdict(status=409, text=f"this is {node.name}: the question was meant for another member")
    if node.leads or _holds(node.licence, now):
        return Verdict(status=500, text="Running as a leader")
    if node.licence.state is LicenceState.ACQUIRING:
        return Verdict(status=409, text="a take-over of this node's own is not settled")
    # A promise that is over says nothing any more: a store that was rebuilt counts from 1 again.
    epoch = max(node.epoch, before.epoch if before is not None and before.left_s(now) > 0 else 0)
    if ping.epoch is not None and ping.epoch < epoch:
        return Verdict(status=409, text=f"epoch {ping.epoch} is over: epoch {epoch} was seen")
    if ping.epoch is not None and ping.epoch == node.epoch and node.epoch_holder not in ("", ping.name):
        return Verdict(status=409, text=f"epoch {ping.epoch} is {node.epoch_holder}'s")
    ttl_s = node.ttl_s if ping.ttl_s is None else ping.ttl_s
    if not 0 < ttl_s <= LONGEST_IN_TTLS * node.ttl_s:
        return Verdict(status=400, text=f"ttl_s is {ttl_s:g}, allowed: more than 0, at most {LONGEST_IN_TTLS * node.ttl_s:g} ({LONGEST_IN_TTLS:g} times the ttl known here)")
    if before is not None:
        ttl_s = max(ttl_s, before.left_s(now) / (1 + DRIFT))        # a later promise never shortens an earlier one
    promise = Promise(name=ping.name, accepted_at=now, ttl_s=ttl_s, incarnation=ping.incarnation, epoch=epoch if ping.epoch is None else ping.epoch,
                      sequence=ping.sequence, conn_url=ping.conn_url, api_url=ping.api_url, slots=ping.slots)
    return Verdict(status=200, text="Accepted", promise=promise)


def _holds(licence: Licence, now: Instant) -> bool:
    return (licence.state in (LicenceState.HELD, LicenceState.RELEASING) and licence.valid_until is not None
            and remaining_s(licence.valid_until, now) > 0)


class _Written(Struct, frozen=True, kw_only=True):
    boot_id: str
    promise: Promise | None


class Promises:
    """Owner of the promise. `unknown_ttl_s`: for how long to keep one that may have been given before this boot; 0: none was.

    The file is written at the first start after a boot, so that its absence means just that.
    """

    def __init__(self, directory: Path, clock: Clock, *, boot_id: str, unknown_ttl_s: float) -> None:
        self._path = directory / FILE
        self._clock = clock
        self._boot_id = boot_id
        self.promise: Promise | None = self._resume(unknown_ttl_s)

    def _resume(self, unknown_ttl_s: float) -> Promise | None:
        now = self._clock.now()
        try:
            written = msgspec.json.decode(self._path.read_bytes(), type=_Written)
        except FileNotFoundError:
            assumed = Promise(name="", accepted_at=now, ttl_s=unknown_ttl_s) if unknown_ttl_s > 0 else None
            try:
                self._write(assumed)
            except OSError as error:
                log.warning("the failsafe promise cannot be written", path=str(self._path), why=error.strerror)
            return assumed
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("the promise of a former agent cannot be read: one is assumed", path=str(self._path), why=str(error))
            return Promise(name="", accepted_at=now, ttl_s=max(unknown_ttl_s, 30.0))
        # Instants of another boot mean nothing: then it counts in full from now.
        same_boot = written.promise is None or written.boot_id == self._boot_id
        return written.promise if same_boot or written.promise is None else replace(written.promise, accepted_at=now)

    def accept(self, ping: Ping, node: Receiver) -> Verdict:
        """Judge and promise, in one step. Never awaits."""
        verdict = judge(ping, node, self.promise, self._clock.now())
        if verdict.promise is None:
            return verdict
        try:
            self._write(verdict.promise)
        except OSError as error:
            return Verdict(status=503, text=f"the promise could not be kept: {error.strerror}")
        self.promise = verdict.promise
        return verdict

    def settle(self, record: LockRecord | None) -> None:
        """Its leader has written a later record: from then on records alone say who leads, also once another has the lock.
        (Else a promise would bind again beside the next leader's record, its own node's for one.)"""
        if self.promise is None or not self.promise.is_superseded_by(record):
            return
        self.promise = None
        try:
            self._write(None)
        except OSError as error:        # an agent that is restarted waits for longer, then
            log.warning("the failsafe promise that is over cannot be removed", path=str(self._path), why=error.strerror)

    def binding(self, record: LockRecord | None) -> Promise | None:
        """The promise that forbids to take `record` over now; None: nothing does."""
        self.settle(record)
        promise = self.promise
        return promise if promise is not None and promise.binds(record, self._clock.now()) else None

    def _write(self, promise: Promise | None) -> None:
        """On tmpfs: atomic for a killed agent, and nothing to sync."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            left = memoryview(msgspec.json.encode(_Written(boot_id=self._boot_id, promise=promise)))
            while left:
                left = left[os.write(descriptor, left):]
        finally:
            os.close(descriptor)
        temporary.replace(self._path)

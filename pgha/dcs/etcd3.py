"""The store in etcd (3.4 or newer), over its gRPC gateway: JSON over HTTP/1.1.

This file says what each call is in etcd's words; `etcd3_client.py` whom to ask and what to believe, `etcd3_watch.py`
how changes arrive, `etcd3_json.py` how etcd says things, `endpoints.py` how one server is asked. Facts behind it
(measured, etcd 3.4.23 and 3.5.16):

* A request held by a follower of a stopped leader ends after 7 s; attempts of 0.3 to 0.4 s elsewhere get through as
  soon as there is a new leader. Hence many short attempts, also with one endpoint only.
* Ranges and transactions are linearizable. Keep-alives are not: a cut-off leader acknowledges them for 1.8 s.
* A simple token is known to all members, each lets it lapse on its own after 300 s without use.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from pgha.dcs import Capacity, Change, Compare, Delete, Generation, Outcome, Put, Snapshot
from pgha.dcs import etcd3_json as wire
from pgha.dcs.endpoints import LookUp, look_up_addresses
from pgha.dcs.etcd3_client import CONFERENCE_S, Etcd3Client
from pgha.dcs.etcd3_json import encode, range_end
from pgha.dcs.etcd3_watch import open_watch
from pgha.errors import Compacted, DcsRefused, DcsUnreachable, LeaseLost
from pgha.log import Log

#: a compacted watch is cancelled by a loop that runs every 100 ms in etcd
COMPACT_PROBE_S = 0.4
#: what etcd uses when it is not told otherwise (--quota-backend-bytes); before 3.6 nobody can ask it
DEFAULT_QUOTA_BYTES = 2 << 30

_ranges = wire.Decoder(wire.RangeAnswer)
_transactions = wire.Decoder(wire.TransactionAnswer)
_grants = wire.Decoder(wire.GrantAnswer)
_keep_alives = wire.Decoder(wire.KeepAliveAnswer)
_plains = wire.Decoder(wire.PlainAnswer)
_alarms = wire.Decoder(wire.AlarmAnswer)


class Etcd3Store:
    """A `Store` (see pgha.dcs). Raises ConfigError for endpoints that are none; opens connections when needed."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        username: str | None = None,
        password: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        first_endpoint: int | None = None,
        look_up: LookUp = look_up_addresses,
        log: Log | None = None,
    ) -> None:
        """`endpoints`: full URLs. `ssl_context`: for https, with the client certificate if one is wanted (None: the
        system's authorities). `first_endpoint`: index of the one to begin with (None: any, so that the agents of a
        cluster spread). `look_up`: host and port to addresses, blocking, called in a thread."""
        self._log = log or Log("pgha.dcs.etcd3")
        self._client = Etcd3Client(
            endpoints, username=username, password=password, ssl_context=ssl_context, first_endpoint=first_endpoint,
            look_up=look_up, log=self._log)
        self._read_prefix = b"\0"
        self._compacted = 0

    def credentials(self, username: str | None, password: str | None) -> None:
        """Log in as this user from the next login on: whoever changed the password has made the former token worthless."""
        self._client.credentials(username, password)

    async def connect_with(self, ssl_context: ssl.SSLContext) -> None:
        """Every request from now on goes over connections made with this; a watch goes on with the one that it has."""
        await self._client.connect_with(ssl_context)

    @property
    def generation(self) -> Generation:
        """Cluster id and highest revision of the linearizable answers; lower than before only if `regressions` grew."""
        return Generation(cluster_id=self._client.known.cluster_id, revision=self._client.known.revision)

    @property
    def regressions(self) -> int:
        """How often the store was believed to be another one or an older one than it had been for this process. It
        has grown before the call that noticed it returns."""
        return self._client.known.era

    # reading and writing

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        key = prefix.encode()
        self._read_prefix = key or b"\0"
        body = encode({"key": key or b"\0", "range_end": range_end(key)})
        got = await self._client.call("/v3/kv/range", body, _ranges, deadline_s=deadline_s)
        return Snapshot(
            revision=got.header.revision, entries=wire.entries(got.kvs),
            generation=Generation(cluster_id=got.header.cluster_id, revision=got.header.revision),
        )

    async def transact(
        self,
        *,
        compares: Sequence[Compare],
        puts: Sequence[Put | Delete],
        read: Sequence[str] = (),
        deadline_s: float,
        attempt_s: float | None = None,
    ) -> Outcome:
        # etcd refuses a key that is written twice in one transaction; so does every driver
        assert len({put.key for put in puts}) == len(puts), [put.key for put in puts]
        ranges = [{"requestRange": {"key": key.encode()}} for key in read]
        body = encode({
            "compare": [part for compare in compares for part in wire.compare_parts(compare)],
            "success": [*(wire.operation(put) for put in puts), *ranges],
            "failure": ranges,
        })
        got = await self._client.call("/v3/kv/txn", body, _transactions, deadline_s=deadline_s, attempt_s=attempt_s)
        found = [kv for answer in got.responses if answer.response_range for kv in answer.response_range.kvs]
        return Outcome(succeeded=got.succeeded, revision=got.header.revision, found=wire.entries(found))

    # leases

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        """An attempt whose answer is lost leaves a lease that nobody renews; it goes by itself."""
        body = encode({"TTL": max(1, math.ceil(ttl_s))})
        return int((await self._client.call("/v3/lease/grant", body, _grants, deadline_s=deadline_s, linear=False)).id)

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        got = await self._client.call("/v3/lease/keepalive", encode({"ID": lease}), _keep_alives,
                               deadline_s=deadline_s, linear=False)
        if got.result.ttl_s <= 0:
            raise LeaseLost(f"lease {lease:x} is not known to the store")
        return float(got.result.ttl_s)

    async def revoke(self, lease: int, *, deadline_s: float) -> None:
        try:
            await self._client.call("/v3/lease/revoke", encode({"ID": lease}), _plains, deadline_s=deadline_s, linear=False)
        except LeaseLost:
            pass  # it is gone, which was asked for

    # capacity

    async def capacity(self, *, deadline_s: float) -> Capacity:
        """The fullest member counts, since the first one to reach its quota stops the cluster's writes. `used_bytes`
        includes free pages, as etcd's own quota does. `quota_bytes` is 0 (unknown) before etcd 3.6: use
        DEFAULT_QUOTA_BYTES unless the operator says better."""
        deadline = trio.current_time() + deadline_s
        alarms = await self._client.call("/v3/maintenance/alarm", encode({"action": "GET"}), _alarms, deadline_s=deadline_s,
                                  linear=False)
        answers = await self._client.ask_all(min(CONFERENCE_S, deadline - trio.current_time()))
        cluster_id = self._client.known.cluster_id
        mine = [status for status in answers.values() if not cluster_id or status.header.cluster_id == cluster_id]
        if not mine:
            raise DcsUnreachable("no endpoint told its status in time")
        with trio.move_on_after(max(0.0, min(COMPACT_PROBE_S, deadline - trio.current_time()))):
            await self._probe_compaction()
        quotas = [status.db_size_quota for status in mine if status.db_size_quota]
        return Capacity(
            used_bytes=max(status.db_size for status in mine), quota_bytes=min(quotas, default=0),
            alarms=tuple(sorted({alarm.alarm for alarm in alarms.alarms})), compact_revision=self._compacted,
        )

    async def compact(self, revision: int, *, deadline_s: float) -> None:
        """Done already is done."""
        try:
            await self._client.call("/v3/kv/compaction", encode({"revision": revision}), _plains, deadline_s=deadline_s,
                             linear=False)
        except Compacted:
            pass
        self._compacted = max(self._compacted, revision)

    async def _probe_compaction(self) -> None:
        """etcd tells its compact revision only to a watch that asks for something older; any other is silent, so the
        caller bounds this in time."""
        try:
            watch = await open_watch(self._client, self._read_prefix, b"", self._compacted)
            try:
                await anext(watch)
            finally:
                await watch.aclose()
        except Compacted as compacted:
            self._compacted = max(self._compacted, compacted.revision)
        except (DcsUnreachable, DcsRefused) as error:
            self._log.debug("compact revision not learned", why=error)

    # watching

    @asynccontextmanager
    async def watch(self, prefix: str, *, after_revision: int) -> AsyncIterator[AsyncIterator[Change | None]]:
        """Has its own connection. Enters once the store has confirmed the watch (at most WATCH_OPEN_S at each
        endpoint). The only sign of life that etcd gives by itself comes every 10 minutes."""
        key = prefix.encode()
        watch = await open_watch(self._client, key or b"\0", range_end(key), after_revision + 1)
        try:
            yield watch
        finally:
            await watch.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()

"""The store in etcd (3.4 or newer), over its gRPC gateway: JSON over HTTP/1.1.

Every call goes to the endpoint that answered last, and on each failure to the next one, in attempts that are bounded
on their own (`attempt_s`), the whole under `deadline_s`. Facts behind it (measured, etcd 3.4.23 and 3.5.16):

* A request held by a follower of a stopped leader ends after 7 s; attempts of 0.3 to 0.4 s elsewhere get through as
  soon as there is a new leader. Hence many short attempts, also with one endpoint only.
* Ranges and transactions are linearizable. Keep-alives are not: a cut-off leader acknowledges them for 1.8 s.
* A watch on a member that lost its quorum stays open and silent unless it is opened with the header `hasleader`.
* A simple token is known to all members, each lets it lapse on its own after 300 s without use.

What the store says of itself is checked in every answer (`_Known`): another cluster id, or a revision or raft term
lower than this process had seen before it asked, is either a strange or stale endpoint, which is then passed over, or
a store that was restored or rebuilt. All endpoints are asked which of the two it is (safety model 4).
"""

from __future__ import annotations

import itertools
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import trio

from pgha.dcs import Capacity, Change, Compare, Delete, Entry, Generation, Outcome, Put, Snapshot
from pgha.dcs import etcd3_json as wire
from pgha.dcs.endpoints import Endpoint, Lines, LookUp, NoAnswer, look_up_addresses, open_transport
from pgha.dcs.etcd3_json import Header, Meaning, encode, range_end
from pgha.errors import Compacted, ConfigError, DcsRefused, DcsUnreachable, LeaseLost
from pgha.log import Log

#: longest attempt at one endpoint when the caller names none
ATTEMPT_S = 1.0
#: pause when every endpoint has failed once, so that refused connections do not spin
ROUND_PAUSE_S = 0.05
#: a login costs the server a bcrypt (70 to 280 ms measured), so it gets more time than an attempt
LOGIN_S = 2.0
#: how long all endpoints are waited for when it must be settled which of them to believe
CONFERENCE_S = 0.5
#: for each endpoint, until it has confirmed a new watch
WATCH_OPEN_S = 1.0
#: a compacted watch is cancelled by a loop that runs every 100 ms in etcd
COMPACT_PROBE_S = 0.4
#: what etcd uses when it is not told otherwise (--quota-backend-bytes); before 3.6 nobody can ask it
DEFAULT_QUOTA_BYTES = 2 << 30

_HAS_LEADER = (b"Grpc-Metadata-hasleader", b"true")

_ranges = wire.decoder(wire.RangeAnswer)
_transactions = wire.decoder(wire.TransactionAnswer)
_grants = wire.decoder(wire.GrantAnswer)
_keep_alives = wire.decoder(wire.KeepAliveAnswer)
_plains = wire.decoder(wire.PlainAnswer)
_statuses = wire.decoder(wire.StatusAnswer)
_alarms = wire.decoder(wire.AlarmAnswer)
_tokens = wire.decoder(wire.TokenAnswer)
_watch_lines = wire.decoder(wire.WatchLine)


class _HasHeader(Protocol):
    @property
    def header(self) -> Header: ...


_A = TypeVar("_A", bound=_HasHeader)


class _Known(NamedTuple):
    """What linearizable answers have told us so far. `era` counts the changes of generation that we believed."""

    cluster_id: str = ""
    revision: int = 0
    raft_term: int = 0
    era: int = 0


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
        if not endpoints:
            raise ConfigError("etcd3: no endpoint is given")
        if ssl_context is None and any(url.startswith("https:") for url in endpoints):
            ssl_context = ssl.create_default_context()
        self._transport = open_transport(ssl_context)
        self._endpoints = [Endpoint(url, self._transport, look_up=look_up) for url in endpoints]
        self._preferred = random.randrange(len(endpoints)) if first_endpoint is None else first_endpoint
        self._credentials = encode({"name": username, "password": password or ""}) if username else None
        self._token: str | None = None  # "" when the store says that it wants none
        self._login = trio.Lock()
        self._known = _Known()
        self._conference = trio.Lock()
        self._seen_prefix = b"\0"
        self._compacted = 0
        self._log = log or Log("pgha.dcs.etcd3")

    @property
    def generation(self) -> Generation:
        """Cluster id and highest revision of the linearizable answers; lower than before only if `regressions` grew."""
        return Generation(cluster_id=self._known.cluster_id, revision=self._known.revision)

    @property
    def regressions(self) -> int:
        """How often the store was believed to be another one or an older one than it had been for this process. It
        has grown before the call that noticed it returns."""
        return self._known.era

    # reading and writing

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        key = prefix.encode()
        self._seen_prefix = key or b"\0"
        body = encode({"key": key or b"\0", "range_end": range_end(key)})
        got = await self._call("/v3/kv/range", body, _ranges, deadline_s=deadline_s)
        return Snapshot(
            revision=got.header.revision, entries=_entries(got.kvs),
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
            "compare": [part for compare in compares for part in _compare_parts(compare)],
            "success": [*(_operation(put) for put in puts), *ranges],
            "failure": ranges,
        })
        got = await self._call("/v3/kv/txn", body, _transactions, deadline_s=deadline_s, attempt_s=attempt_s)
        found = [kv for answer in got.responses if answer.response_range for kv in answer.response_range.kvs]
        return Outcome(succeeded=got.succeeded, revision=got.header.revision, found=_entries(found))

    # leases

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        """An attempt whose answer is lost leaves a lease that nobody renews; it goes by itself."""
        body = encode({"TTL": max(1, round(ttl_s))})
        return int((await self._call("/v3/lease/grant", body, _grants, deadline_s=deadline_s, linear=False)).id)

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        got = await self._call("/v3/lease/keepalive", encode({"ID": lease}), _keep_alives,
                               deadline_s=deadline_s, linear=False)
        if got.result.ttl_s <= 0:
            raise LeaseLost(f"lease {lease:x} is not known to the store")
        return float(got.result.ttl_s)

    async def revoke(self, lease: int, *, deadline_s: float) -> None:
        try:
            await self._call("/v3/lease/revoke", encode({"ID": lease}), _plains, deadline_s=deadline_s, linear=False)
        except LeaseLost:
            pass  # it is gone, which was asked for

    # capacity

    async def capacity(self, *, deadline_s: float) -> Capacity:
        """The fullest member counts, since the first one to reach its quota stops the cluster's writes. `used_bytes`
        includes free pages, as etcd's own quota does. `quota_bytes` is 0 (unknown) before etcd 3.6: use
        DEFAULT_QUOTA_BYTES unless the operator says better."""
        deadline = trio.current_time() + deadline_s
        alarms = await self._call("/v3/maintenance/alarm", encode({"action": "GET"}), _alarms, deadline_s=deadline_s,
                                  linear=False)
        answers = await self._ask_all(min(CONFERENCE_S, deadline - trio.current_time()))
        cluster_id = self._known.cluster_id
        mine = [status for status in answers.values() if not cluster_id or status.header.cluster_id == cluster_id]
        if not mine:
            raise DcsUnreachable("no endpoint told its status in time")
        with trio.move_on_after(min(COMPACT_PROBE_S, deadline - trio.current_time())):
            await self._probe_compaction()
        quotas = [status.db_size_quota for status in mine if status.db_size_quota]
        return Capacity(
            used_bytes=max(status.db_size for status in mine), quota_bytes=min(quotas, default=0),
            alarms=tuple(sorted({alarm.alarm for alarm in alarms.alarms})), compact_revision=self._compacted,
        )

    async def compact(self, revision: int, *, deadline_s: float) -> None:
        """Done already is done."""
        try:
            await self._call("/v3/kv/compaction", encode({"revision": revision}), _plains, deadline_s=deadline_s,
                             linear=False)
        except Compacted:
            pass
        self._compacted = max(self._compacted, revision)

    async def _probe_compaction(self) -> None:
        """etcd tells its compact revision only to a watch that asks for something older; any other is silent, so the
        caller bounds this in time."""
        try:
            async with self._watch(self._seen_prefix, b"", self._compacted) as watch:
                await anext(watch)
        except Compacted:
            pass  # noted in self._compacted
        except (DcsUnreachable, DcsRefused) as error:
            self._log.debug("compact revision not learned", why=error)

    # watching

    @asynccontextmanager
    async def watch(self, prefix: str, *, after_revision: int) -> AsyncIterator[AsyncIterator[Change | None]]:
        """Has its own connection. Enters once the store has confirmed the watch (at most WATCH_OPEN_S at each
        endpoint). The only sign of life that etcd gives by itself comes every 10 minutes."""
        key = prefix.encode()
        async with self._watch(key or b"\0", range_end(key), after_revision + 1) as watch:
            yield watch

    @asynccontextmanager
    async def _watch(self, key: bytes, end: bytes, start: int) -> AsyncIterator[_Watch]:
        create = {"key": key, "start_revision": max(start, 1), "progress_notify": True, "prev_kv": False}
        if end:
            create["range_end"] = end
        body = encode({"create_request": create})
        failures = {}
        for endpoint in self._in_order():
            try:
                watch = await self._open_watch(endpoint, body)
            except NoAnswer as no:
                failures[endpoint.name] = str(no)
                self._mark(endpoint, str(no))
                continue
            try:
                yield watch
            finally:
                await watch.aclose()
            return
        raise DcsUnreachable(f"no watch could be opened: {_listed(failures)}")

    async def _open_watch(self, endpoint: Endpoint, body: bytes) -> _Watch:
        for again in (False, True):
            token = await self._token_for(endpoint)
            with trio.move_on_after(WATCH_OPEN_S):
                lines = await endpoint.stream("/v3/watch", body, [_HAS_LEADER, *_authorization(token)])
                watch = _Watch(self, lines)
                try:
                    header = await watch.wait_created()
                    if header.cluster_id != self._known.cluster_id != "":
                        raise NoAnswer(f"belongs to cluster {header.cluster_id}, not {self._known.cluster_id}")
                    return watch
                except _LoginNeeded as need:
                    await watch.aclose()
                    if again or self._credentials is None:
                        raise DcsRefused(need.fault.message, code=need.fault.code) from None
                    self._forget_token(token)
                    continue
                except BaseException:
                    await watch.aclose()
                    raise
            endpoint.went_silent()
            raise NoAnswer(f"silent for {WATCH_OPEN_S:g} s")
        raise AssertionError("unreachable")

    def note_compacted(self, revision: int) -> None:
        """A watch was told that history before `revision` is gone."""
        self._compacted = max(self._compacted, revision)

    # asking

    async def _call(
        self, path: str, body: bytes, answers: msgspec.json.Decoder[_A], *,
        deadline_s: float, attempt_s: float | None = None, linear: bool = True,
    ) -> _A:
        """One answer from whichever endpoint gives a usable one first. `linear`: the call reads or writes through
        the quorum, so that what it says of the store's revision counts."""
        failures: dict[str, str] = {}
        attempt_s = attempt_s or min(ATTEMPT_S, deadline_s / len(self._endpoints))
        floor = self._known
        with trio.move_on_after(deadline_s):
            while True:
                for endpoint in self._in_order():
                    try:
                        answer = answers.decode(await self._exchange(endpoint, path, body, attempt_s))
                        if answer.header.cluster_id and not self._fits(answer.header, floor, linear=linear):
                            if floor.cluster_id and not linear:
                                raise NoAnswer(f"stale or strange: {_described(answer.header)}")
                            await self._settle(endpoint, answer.header, floor)
                    except NoAnswer as no:
                        failures[endpoint.name] = str(no)
                        self._mark(endpoint, str(no))
                        continue
                    except msgspec.DecodeError as error:
                        failures[endpoint.name] = f"not etcd's JSON: {error}"
                        self._mark(endpoint, failures[endpoint.name])
                        continue
                    if linear:
                        self._learn(answer.header)
                    self._mark(endpoint, "")
                    return answer
                await trio.sleep(ROUND_PAUSE_S)
        raise DcsUnreachable(f"no answer to {path} within {deadline_s:g} s: {_listed(failures) or 'no attempt ended'}")

    async def _exchange(self, endpoint: Endpoint, path: str, body: bytes, attempt_s: float) -> bytes:
        """The body of a good answer. NoAnswer: ask elsewhere; the typed errors are final."""
        for again in (False, True):
            token = await self._token_for(endpoint)
            status, got = await self._post(endpoint, path, body, attempt_s, token)
            fault = wire.fault_in(status, got)
            if fault is None:
                return got
            if fault.meaning is Meaning.LOGIN and self._credentials is not None and not again:
                self._forget_token(token)
                continue
            self._raise(endpoint, fault)
        raise AssertionError("unreachable")

    async def _post(self, endpoint: Endpoint, path: str, body: bytes, attempt_s: float,
                    token: str | None) -> tuple[int, bytes]:
        with trio.move_on_after(attempt_s):
            return await endpoint.post(path, body, _authorization(token))
        endpoint.went_silent()
        raise NoAnswer(f"silent for {attempt_s:g} s")

    def _raise(self, endpoint: Endpoint, fault: wire.Fault) -> None:
        """Always raises what an error answer means."""
        said = f"{endpoint.name}: {fault.message}"
        match fault.meaning:
            case Meaning.NEXT:
                raise NoAnswer(fault.message)
            case Meaning.LEASE_LOST:
                raise LeaseLost(said)
            case Meaning.COMPACTED:
                raise Compacted(self._compacted)
        self._mark(endpoint, fault.message)  # another endpoint may see it differently: the next call begins there
        raise DcsRefused(said, code=fault.code, no_space=fault.meaning is Meaning.NO_SPACE)

    def _in_order(self) -> list[Endpoint]:
        return self._endpoints[self._preferred:] + self._endpoints[:self._preferred]

    def _mark(self, endpoint: Endpoint, failing: str) -> None:
        """Remember whom to ask first, and say when an endpoint begins or ends to fail."""
        index = self._endpoints.index(endpoint)
        if failing:
            if not endpoint.failing:
                self._log.warning("etcd endpoint fails", endpoint=endpoint.name, why=failing)
            if index == self._preferred:
                self._preferred = (index + 1) % len(self._endpoints)
        else:
            if endpoint.failing:
                self._log.info("etcd endpoint answers again", endpoint=endpoint.name)
            self._preferred = index
        endpoint.failing = failing

    # authentication

    async def _token_for(self, endpoint: Endpoint) -> str | None:
        """The token to send; logs in where none is known. None: no credentials are configured."""
        if self._credentials is None or self._token is not None:
            return self._token
        async with self._login:
            if self._token is None:
                left_s = trio.current_effective_deadline() - trio.current_time()
                limit_s = min(LOGIN_S, max(0.5, left_s / len(self._endpoints)))
                status, body = await self._post(endpoint, "/v3/auth/authenticate", self._credentials, limit_s, None)
                fault = wire.fault_in(status, body)
                if fault is None:
                    self._token = _tokens.decode(body).token
                elif fault.meaning is Meaning.LOGIN_OFF:
                    self._log.warning("etcd has authentication switched off, a user name is configured")
                    self._token = ""
                else:
                    self._raise(endpoint, fault)
            return self._token

    def _forget_token(self, token: str | None) -> None:
        if self._token == token:  # else somebody has logged in since
            self._token = None

    # which store is this?

    def _fits(self, header: Header, floor: _Known, *, linear: bool = True) -> bool:
        """Does this agree with what was known when the call began (`floor`)? The revision of an answer that did not
        go through the quorum is that member's own, which may lag."""
        if header.cluster_id != self._known.cluster_id:
            return False
        if self._known.era != floor.era:
            return True
        return header.raft_term >= floor.raft_term and (header.revision >= floor.revision or not linear)

    def _learn(self, header: Header) -> None:
        known = self._known
        self._known = known._replace(cluster_id=header.cluster_id, revision=max(known.revision, header.revision),
                                     raft_term=max(known.raft_term, header.raft_term))

    async def _settle(self, endpoint: Endpoint, header: Header, floor: _Known) -> None:
        """An answer does not fit what was known: returns if it is to be believed, else raises NoAnswer."""
        async with self._conference:
            if self._fits(header, floor):
                return
            if self._known.era != floor.era or not floor.cluster_id:
                floor = self._known  # another task has settled something meanwhile
            answers = {endpoint.name: header}
            if len(self._endpoints) > 1:
                left_s = trio.current_effective_deadline() - trio.current_time()
                said = await self._ask_all(min(CONFERENCE_S, left_s / 2), majority_does=not floor.cluster_id)
                answers |= {name: status.header for name, status in said.items()}
            if not _believable(endpoint.name, header, answers, floor):
                others = _listed({name: _described(h) for name, h in answers.items() if name != endpoint.name})
                raise NoAnswer(f"passed over: {_described(header)}, known {floor[:3]}, others {others}")
            if floor.cluster_id:
                self._log.warning("etcd was rebuilt or restored", endpoint=endpoint.name,
                                  cluster_id=header.cluster_id, revision=header.revision, raft_term=header.raft_term,
                                  former_cluster_id=floor.cluster_id, former_revision=floor.revision,
                                  former_raft_term=floor.raft_term)
            self._known = _Known(header.cluster_id, header.revision, header.raft_term,
                                 floor.era + bool(floor.cluster_id))

    async def _ask_all(self, limit_s: float, *, majority_does: bool = False) -> dict[str, wire.StatusAnswer]:
        """The status of every endpoint that tells it within `limit_s`, or as soon as most of them belong together."""
        answers: dict[str, wire.StatusAnswer] = {}

        async def ask(endpoint: Endpoint) -> None:
            try:
                answers[endpoint.name] = _statuses.decode(
                    await self._exchange(endpoint, "/v3/maintenance/status", b"{}", limit_s))
            except (NoAnswer, DcsRefused, msgspec.DecodeError) as error:
                self._log.debug("etcd endpoint does not tell its status", endpoint=endpoint.name, why=error)
            if majority_does:
                ids = Counter(status.header.cluster_id for status in answers.values())
                if ids and max(ids.values()) * 2 > len(self._endpoints):
                    nursery.cancel_scope.cancel()

        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                for endpoint in self._endpoints:
                    nursery.start_soon(ask, endpoint)
        return answers

    async def aclose(self) -> None:
        await self._transport.aclose()


class _LoginNeeded(Exception):  # noqa: N818  (never leaves this file)
    def __init__(self, fault: wire.Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class _Watch:
    """The changes of one watch stream, in order. etcd sends all events of one revision in one line, unless it is asked
    for fragments (it is not); a line may hold several revisions while history is delivered."""

    def __init__(self, store: Etcd3Store, lines: Lines) -> None:
        self._store = store
        self._lines = lines
        self._ready: list[Change | None] = []

    async def wait_created(self) -> Header:
        """Until the store has confirmed the watch."""
        if self._lines.status != 200:
            fault = wire.fault_in(self._lines.status, await self._lines.rest())
            assert fault is not None, self._lines.status
            raise self._error(fault)
        while True:
            answer = await self._next_answer()
            if answer.created:
                return answer.header

    def __aiter__(self) -> _Watch:
        return self

    async def __anext__(self) -> Change | None:
        while not self._ready:
            try:
                answer = await self._next_answer()
            except NoAnswer as no:
                raise DcsUnreachable(f"watch: {no}") from no
            except _LoginNeeded as need:
                raise DcsUnreachable(f"watch: {need}") from need
            self._ready.extend(_changes(answer.events) if answer.events else [None])
            self._ready.reverse()
        return self._ready.pop()

    async def _next_answer(self) -> wire.WatchAnswer:
        line = await self._lines.next()
        try:
            got: wire.WatchLine = _watch_lines.decode(line)
        except msgspec.DecodeError as error:
            raise NoAnswer(f"not etcd's JSON: {error}") from error
        if got.error is not None:
            code = got.error.grpc_code or got.error.code
            raise self._error(wire.Fault(wire.meaning_of(code, got.error.message), code, got.error.message))
        if got.result is None:
            raise NoAnswer("an empty answer")
        if got.result.compact_revision:
            self._store.note_compacted(got.result.compact_revision)
            raise Compacted(got.result.compact_revision)
        if got.result.canceled:
            why = got.result.cancel_reason or "cancelled without a reason"
            raise self._error(wire.Fault(wire.meaning_of(0, why), 0, why))
        return got.result

    @staticmethod
    def _error(fault: wire.Fault) -> Exception:
        if fault.meaning in (Meaning.LOGIN, Meaning.FORBIDDEN):
            return _LoginNeeded(fault)
        if fault.meaning is Meaning.NEXT:
            return NoAnswer(fault.message)
        return DcsRefused(fault.message, code=fault.code)

    async def aclose(self) -> None:
        await self._lines.aclose()


def _believable(name: str, header: Header, answers: dict[str, Header], floor: _Known) -> bool:
    """Which store is the right one, when `name` said `header`? `answers`: what all endpoints say now.

    With nothing known before, the cluster of most of those that answer. Else the one known, as long as anybody else
    still speaks for it; else the new one, if all that answer agree on it.
    """
    ids = Counter(said.cluster_id for said in answers.values())
    if not floor.cluster_id:
        return ids[header.cluster_id] * 2 > ids.total()
    for other, said in answers.items():
        if (other != name and said.cluster_id == floor.cluster_id
                and said.revision >= floor.revision and said.raft_term >= floor.raft_term):
            return False
    return set(ids) == {header.cluster_id}


def _authorization(token: str | None) -> list[tuple[bytes, bytes]]:
    return [(b"Authorization", token.encode())] if token else []


def _compare_parts(compare: Compare) -> list[dict[str, Any]]:
    """etcd takes an absent key as revision 0, and as unequal to every value."""
    common: dict[str, Any] = {"key": compare.key.encode(), "result": "EQUAL"}
    parts = []
    if compare.revision is not None:
        parts.append({**common, "target": "MOD", "mod_revision": str(compare.revision)})
    if compare.value is not None:
        parts.append({**common, "target": "VALUE", "value": compare.value})
    return parts


def _operation(put: Put | Delete) -> dict[str, Any]:
    if isinstance(put, Delete):
        return {"requestDeleteRange": {"key": put.key.encode()}}
    return {"requestPut": {"key": put.key.encode(), "value": put.value, "lease": str(put.lease)}}


def _entries(kvs: Sequence[wire.KeyValue]) -> dict[str, Entry]:
    return {entry.key: entry for entry in map(_entry, kvs)}


def _entry(kv: wire.KeyValue) -> Entry:
    return Entry(key=_text(kv.key), value=kv.value, revision=kv.mod_revision, lease=kv.lease)


def _text(key: bytes) -> str:
    return key.decode(errors="replace")  # a key that is not UTF-8 is nobody's of ours


def _changes(events: Sequence[wire.Event]) -> list[Change]:
    return [
        Change(revision=revision, entries={
            _text(event.kv.key): None if event.type == "DELETE" else _entry(event.kv) for event in group})
        for revision, group in itertools.groupby(events, key=lambda event: event.kv.mod_revision)
    ]


def _described(header: Header) -> str:
    return f"cluster {header.cluster_id} revision {header.revision} term {header.raft_term}"


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())

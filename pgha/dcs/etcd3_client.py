"""Which endpoint is asked, and is its answer to be believed?

A call goes to the endpoint that answered last and on each failure to the next one, in attempts that are bounded on
their own, the whole under the caller's deadline. An endpoint on which a call was cut off, by its deadline or from
outside, is not the first one to be asked by the next call: else a stopped server and a short deadline would meet for
ever.

What the store says of itself is checked in every answer (`Known`): another cluster id, or a revision or raft term
lower than this process knew before it asked, is either a strange or stale endpoint, which is then passed over, or a
store that was restored or rebuilt. All endpoints are asked which of the two it is (safety model 4).
"""

from __future__ import annotations

import random
import ssl
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol, TypeVar

import trio

from pgha.dcs import etcd3_json as wire
from pgha.dcs.endpoints import Connections, Endpoint, LookUp, NoAnswer
from pgha.dcs.etcd3_json import Header, Meaning, encode
from pgha.errors import Compacted, ConfigError, DcsRefused, DcsUnreachable, LeaseLost
from pgha.log import Log

#: longest attempt at one endpoint when the caller names none
ATTEMPT_S = 1.0
#: pause when every endpoint has failed once, so that refused connections do not spin
ROUND_PAUSE_S = 0.05
#: a login costs the server a bcrypt (70 to 280 ms measured), so it gets more time than an attempt
LOGIN_S = 2.0
LOGIN_MINIMUM_S = 0.5
#: how long all endpoints are waited for when it must be settled which of them to believe; a call whose deadline is
#: shorter cannot settle it while one of them is silent
CONFERENCE_S = 0.5

_statuses = wire.Decoder(wire.StatusAnswer)
_tokens = wire.Decoder(wire.TokenAnswer)


class HasHeader(Protocol):
    @property
    def header(self) -> Header: ...


_A = TypeVar("_A", bound=HasHeader)


class Known(NamedTuple):
    """What linearizable answers have told us so far. `era` counts the changes of generation that we believed."""

    cluster_id: str = ""
    revision: int = 0
    raft_term: int = 0
    era: int = 0


class Etcd3Client:
    """Asks etcd. `known`: what its linearizable answers said."""

    def __init__(self, endpoints: Sequence[str], *, username: str | None, password: str | None,
                 ssl_context: ssl.SSLContext | None, first_endpoint: int | None, look_up: LookUp, log: Log) -> None:
        if not endpoints:
            raise ConfigError("etcd3: no endpoint is given")
        if ssl_context is None and any(url.startswith("https:") for url in endpoints):
            ssl_context = ssl.create_default_context()
        self._connections = [Connections(ssl_context)]      # new requests go over the last; the others are there until their answers end
        self.endpoints = [Endpoint(url, self._connections[-1], look_up=look_up) for url in endpoints]
        self.preferred = random.randrange(len(endpoints)) if first_endpoint is None else first_endpoint
        self._credentials = _login_body(username, password)
        self._token: str | None = None  # "" when the store says that it wants none
        self._login = trio.Lock()
        self.known = Known()
        self._conference = trio.Lock()
        self._log = log

    async def call(
        self, path: str, body: bytes, answers: wire.Decoder[_A], *,
        deadline_s: float, attempt_s: float | None = None, linear: bool = True,
    ) -> _A:
        """One answer from whichever endpoint gives a usable one first. `linear`: the call reads or writes through
        the quorum, so that what it says of the store's revision counts. Raises DcsUnreachable, and what an error
        answer means (DcsRefused, LeaseLost, Compacted)."""
        failures: dict[str, str] = {}
        attempt_s = attempt_s or min(ATTEMPT_S, max(0.0, deadline_s) / len(self.endpoints))
        floor = self.known
        asked: Endpoint | None = None
        try:
            with trio.move_on_after(max(0.0, deadline_s)):
                while True:
                    for endpoint in self.in_order():
                        asked = endpoint
                        try:
                            answer = answers.decode(await self._exchange(endpoint, path, body, attempt_s))
                            await self._check(endpoint, answer.header, floor, linear=linear)
                        except (NoAnswer, wire.NotUnderstood) as no:
                            failures[endpoint.name] = str(no)
                            self.mark(endpoint, str(no))
                            continue
                        asked = None
                        self.mark(endpoint, "")
                        return answer
                    asked = None
                    await trio.sleep(ROUND_PAUSE_S)
            if asked is not None:
                failures.setdefault(asked.name, "silent until the deadline")
        finally:
            if asked is not None:
                self.pass_over(asked)
        raise DcsUnreachable(f"no answer to {path} within {deadline_s:g} s: {_listed(failures)}")

    async def ask_all(self, limit_s: float, *, majority_does: bool = False) -> dict[str, wire.StatusAnswer]:
        """The status of every endpoint that tells it within `limit_s`, or as soon as most of them belong together."""
        answers: dict[str, wire.StatusAnswer] = {}

        async def ask(endpoint: Endpoint) -> None:
            try:
                answers[endpoint.name] = _statuses.decode(
                    await self._exchange(endpoint, "/v3/maintenance/status", b"{}", max(0.0, limit_s)))
            except (NoAnswer, DcsRefused, LeaseLost, Compacted, wire.NotUnderstood) as error:
                self._log.debug("etcd endpoint does not tell its status", endpoint=endpoint.name, why=error)
            if majority_does:
                ids = Counter(status.header.cluster_id for status in answers.values())
                if ids and max(ids.values()) * 2 > len(self.endpoints):
                    nursery.cancel_scope.cancel()

        with trio.move_on_after(max(0.0, limit_s)):
            async with trio.open_nursery() as nursery:
                for endpoint in self.endpoints:
                    nursery.start_soon(ask, endpoint)
        return answers

    async def connect_with(self, ssl_context: ssl.SSLContext) -> None:
        """Connections from now on are made with this. Open answers (a watch) go on."""
        former, new = self._connections[-1], Connections(ssl_context)
        self._connections.append(new)
        for endpoint in self.endpoints:
            endpoint.connect_by(new)
        await former.retire()
        self._connections = [each for each in self._connections if not each.closed]

    async def aclose(self) -> None:
        for connections in self._connections:
            await connections.aclose()

    # one endpoint

    async def _exchange(self, endpoint: Endpoint, path: str, body: bytes, attempt_s: float) -> bytes:
        """The body of a good answer. NoAnswer: ask elsewhere; the typed errors are final."""
        again = False
        while True:
            token = await self.token_for(endpoint)
            status, got = await self._post(endpoint, path, body, attempt_s, token)
            fault = wire.fault_in(status, got)
            if fault is None:
                return got
            if fault.meaning is not Meaning.LOGIN or again or not self.forget_token(token):
                self._raise(endpoint, fault)
            again = True

    async def _post(self, endpoint: Endpoint, path: str, body: bytes, attempt_s: float,
                    token: str | None) -> tuple[int, bytes]:
        with trio.move_on_after(attempt_s):
            return await endpoint.post(path, body, authorization(token))
        endpoint.went_silent()
        raise NoAnswer(f"silent for {attempt_s:g} s")

    def _raise(self, endpoint: Endpoint, fault: wire.Fault) -> NoReturn:
        """What an error answer means."""
        said = f"{endpoint.name}: {fault.message}"
        match fault.meaning:
            case Meaning.NEXT:
                raise NoAnswer(fault.message)
            case Meaning.LEASE_LOST:
                raise LeaseLost(said)
            case Meaning.COMPACTED:
                raise Compacted(0)
        self.pass_over(endpoint)  # another one may see it differently
        raise DcsRefused(said, code=fault.code, no_space=fault.meaning is Meaning.NO_SPACE)

    def in_order(self) -> list[Endpoint]:
        """All endpoints, first the one to ask first."""
        return self.endpoints[self.preferred:] + self.endpoints[:self.preferred]

    def pass_over(self, endpoint: Endpoint) -> None:
        """The next call begins elsewhere."""
        index = self.endpoints.index(endpoint)
        if index == self.preferred:
            self.preferred = (index + 1) % len(self.endpoints)

    def mark(self, endpoint: Endpoint, failing: str) -> None:
        """Remember whom to ask first, and say when an endpoint begins or ends to fail while others answer.

        If none answers, the store is away, and whoever asks says that, once."""
        endpoint.failing = failing
        if failing:
            self.pass_over(endpoint)
            return
        self.preferred = self.endpoints.index(endpoint)
        for other in self.endpoints:
            if other.failing and not other.told:
                other.told = True
                self._log.warning("etcd endpoint fails", endpoint=other.name, why=other.failing)
        if endpoint.told:
            endpoint.told = False
            self._log.info("etcd endpoint answers again", endpoint=endpoint.name)

    # authentication

    def credentials(self, username: str | None, password: str | None) -> None:
        """Others than before: the next request logs in with them."""
        body = _login_body(username, password)
        if body != self._credentials:
            self._credentials, self._token = body, None

    async def token_for(self, endpoint: Endpoint) -> str | None:
        """The token to send; logs in where none is known. None: no credentials are configured."""
        if self._credentials is None or self._token is not None:
            return self._token
        async with self._login:
            if self._token is None:
                limit_s = min(LOGIN_S, max(LOGIN_MINIMUM_S, _left_s() / len(self.endpoints)))
                status, body = await self._post(endpoint, "/v3/auth/authenticate", self._credentials, limit_s, None)
                fault = wire.fault_in(status, body)
                if fault is None:
                    try:
                        self._token = _tokens.decode(body).token
                    except wire.NotUnderstood as error:
                        raise NoAnswer(f"the token cannot be used: {error}") from error
                elif fault.meaning is Meaning.LOGIN_OFF:
                    self._log.warning("etcd has authentication switched off, a user name is configured")
                    self._token = ""
                else:
                    self._raise(endpoint, fault)
            return self._token

    def forget_token(self, token: str | None) -> bool:
        """That token was not accepted: is it worth while to try again?"""
        if self._token == token:  # else somebody has logged in since
            self._token = None
        return self._credentials is not None

    # which store is this?

    async def _check(self, endpoint: Endpoint, header: Header, floor: Known, *, linear: bool) -> None:
        """Take note of what an answer says of the store. NoAnswer: it is not to be believed."""
        if not header.cluster_id:
            return  # the few answers without a header say nothing of the store
        if not self._fits(header, floor, linear=linear):
            if floor.cluster_id and not linear:
                raise NoAnswer(f"stale or strange: {_described(header)}")
            await self._settle(endpoint, header, floor)
        if linear:
            known = self.known
            self.known = known._replace(revision=max(known.revision, header.revision),
                                        raft_term=max(known.raft_term, header.raft_term))

    def _fits(self, header: Header, floor: Known, *, linear: bool = True) -> bool:
        """Does this agree with what was known when the call began (`floor`)? The revision of an answer that did not
        go through the quorum is that member's own, which may lag."""
        if header.cluster_id != self.known.cluster_id:
            return False
        if self.known.era != floor.era:
            return True
        return header.raft_term >= floor.raft_term and (header.revision >= floor.revision or not linear)

    async def _settle(self, endpoint: Endpoint, header: Header, floor: Known) -> None:
        """An answer does not fit what was known: returns if it is to be believed, else raises NoAnswer."""
        async with self._conference:
            if self._fits(header, floor):
                return
            if self.known.era != floor.era or not floor.cluster_id:
                floor = self.known  # another task has settled something meanwhile
            answers = {endpoint.name: header}
            if len(self.endpoints) > 1:
                # always the whole time: were it cut short by the call's deadline, the others' silence would speak for
                # this endpoint. A deadline that is nearer ends the call instead, and nothing is settled.
                said = await self.ask_all(CONFERENCE_S, majority_does=not floor.cluster_id)
                answers |= {name: status.header for name, status in said.items()}
            if not believable(endpoint.name, header, answers, floor):
                others = _listed({name: _described(h) for name, h in answers.items() if name != endpoint.name})
                raise NoAnswer(f"passed over: {_described(header)}, known {floor[:3]}, others {others}")
            if floor.cluster_id:
                self._log.warning("etcd was rebuilt or restored", endpoint=endpoint.name,
                                  cluster_id=header.cluster_id, revision=header.revision, raft_term=header.raft_term,
                                  former_cluster_id=floor.cluster_id, former_revision=floor.revision,
                                  former_raft_term=floor.raft_term)
            self.known = Known(header.cluster_id, header.revision, header.raft_term,
                               floor.era + bool(floor.cluster_id))


def believable(name: str, header: Header, answers: dict[str, Header], floor: Known) -> bool:
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


def _login_body(username: str | None, password: str | None) -> bytes | None:
    return encode({"name": username, "password": password or ""}) if username else None


def authorization(token: str | None) -> list[tuple[bytes, bytes]]:
    """The header that carries a token."""
    return [(b"Authorization", token.encode())] if token else []


def _left_s() -> float:
    """Until the innermost deadline around us."""
    return trio.current_effective_deadline() - trio.current_time()


def _described(header: Header) -> str:
    return f"cluster {header.cluster_id} revision {header.revision} term {header.raft_term}"


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "none"

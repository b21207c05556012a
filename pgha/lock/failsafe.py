"""The failsafe rounds: the store is silent, so all who might take over are asked not to (safety model 12).

A task of its own beside the renewer, under the same mandate of the loop: it touches neither the store, nor SQL, nor the
disk. Whether a round is wanted, and whom to ask, the loop has said (`decide/failsafe.py`); here it is timed and sent.

Rules of this file:
* the clock is read before the first byte is sent: what the round gives counts from there;
* all must accept; one that does not answer is one that may take over;
* a round ends before the moment at which the orderly demotion begins, so that it costs nobody anything if it fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from urllib.parse import urlsplit

import trio

from pgha.clock import Clock, Deadline, earlier, remaining_s
from pgha.lock.renewer import Renewer, Round, Timing
from pgha.log import Log
from pgha.model.failsafe import FailsafeOrder
from pgha.model.lock import LicenceState, demote_at

log = Log("pgha.failsafe")

#: Between two questions to the same member.
AGAIN_S = 0.1
#: Less than this, and no answer is to be expected any more.
SHORTEST_POST_S = 0.05
#: No time to sleep for: a round may begin so much before it is due.
SOON_S = 0.001
LARGEST_ANSWER_BYTES = 4096


def round_s(ttl_s: float) -> float:
    """How long before the demotion a round begins: time for some attempts, and for an election in the store before it."""
    return min(5.0, 0.3 * ttl_s)


def post_s(ttl_s: float) -> float:
    """How long one question waits for its answer."""
    return min(2.0, max(0.2, 0.1 * ttl_s))


class Asker(Protocol):
    """The way to a member; the simulation has its own."""

    async def ask(self, api_url: str, body: bytes) -> str:
        """POST /failsafe. "" if it has accepted, else why not. The caller bounds the wait. Raises nothing."""
        ...


class Http(Protocol):
    """See machine.HttpClient."""

    async def request(self, method: str, url: str, *, body: bytes = b"", authorization: str = "", largest_bytes: int) -> tuple[int, bytes]:
        ...


class HttpAsker:
    """By HTTP, a connection for each question. `authorization`: gives the header's value, "" for none."""

    def __init__(self, http: Callable[[], AbstractAsyncContextManager[Http]], *, authorization: Callable[[], str]) -> None:
        self._http = http
        self._authorization = authorization

    async def ask(self, api_url: str, body: bytes) -> str:
        try:
            parts = urlsplit(api_url)
            given = self._authorization()
            also = {"authorization": given} if given else {}
            async with self._http() as client:
                status, text = await client.request("POST", f"{parts.scheme}://{parts.netloc}/failsafe", body=body, largest_bytes=LARGEST_ANSWER_BYTES, **also)
        except (ConnectionError, ValueError) as error:
            return str(error) or type(error).__name__
        if status == 200 and text.strip() == b"Accepted":
            return ""
        return f"{status} {text[:200].decode(errors='replace')}"


class Rounds:
    """`missing`: who did not accept in the last round, and why."""

    def __init__(self, *, renewer: Renewer, clock: Clock, timing: Callable[[], Timing], asker: Asker, conn_url: Callable[[], str], api_url: Callable[[], str],
                 wake: Callable[[], None]) -> None:
        self._renewer = renewer
        self._clock = clock
        self._timing = timing
        self._asker = asker
        self._conn_url = conn_url
        self._api_url = api_url
        self._wake_loop = wake
        self._order: FailsafeOrder | None = None
        self._news = trio.Event()
        self.missing: dict[str, str] = {}

    def give(self, order: FailsafeOrder | None) -> None:
        """The loop's word, once a pass."""
        if order != self._order:
            self._order = order
            self._news.set()

    def changed(self) -> None:
        """The licence or the mandate has changed."""
        self._news.set()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """A round whenever the licence comes near its end. Never returns."""
        task_status.started()
        while True:
            self._news = trio.Event()
            wait_s = self._next_in_s()
            if wait_s > 0:
                with trio.move_on_after(wait_s):
                    await self._news.wait()
                continue
            await self._round()
            await trio.sleep(AGAIN_S)

    def _limit(self) -> Deadline | None:
        """When the orderly demotion begins: a round must have ended by then. Sooner, if the fence waits for a confirmation."""
        licence = self._renewer.licence
        if licence.state is not LicenceState.HELD or licence.valid_until is None or licence.since is None:
            return None
        limit = demote_at(licence.valid_until, licence.ttl_s, since=licence.since, loop_wait_s=self._timing().loop_wait_s)
        return limit if self._renewer.confirm_by is None or licence.failing_since is None else earlier(limit, self._renewer.confirm_by)

    def _next_in_s(self) -> float:
        """Seconds until a round is due; 0 = now."""
        now, limit, mandate = self._clock.now(), self._limit(), self._renewer.mandate.until
        if self._order is None or limit is None:
            return 60.0
        left_s = remaining_s(limit, now)
        if left_s < SHORTEST_POST_S:
            return 60.0         # too late: it is being demoted
        if mandate is None or remaining_s(mandate, now) <= 0:
            return 0.2          # as the renewer: no mandate, no licence
        wait_s = left_s - round_s(self._renewer.licence.ttl_s)
        return min(60.0, wait_s) if wait_s > SOON_S else 0.0

    async def _round(self) -> None:
        order, limit = self._order, self._limit()
        begun = self._renewer.begin_round()
        if order is None or limit is None or begun is None:
            return
        asked = dict.fromkeys(order.members, "no answer in time")
        with trio.move_on_after(max(0.0, remaining_s(limit, self._clock.now()))):
            async with trio.open_nursery() as nursery:
                for name, url in order.members.items():
                    nursery.start_soon(self._persuade, name, url, begun, asked)
        missing = {name: why for name, why in asked.items() if why}
        # Whoever came meanwhile was not asked, and may be listed by now: the loop says so before it writes the list.
        asked_all = self._order is not None and self._order.members.keys() <= asked.keys()
        extended = not missing and asked_all and not self._is_over(begun) and self._renewer.extend(begun)
        if missing and not self._is_over(begun) and self.missing.keys() != missing.keys():
            log.warning("failsafe: not every member agrees that this node leads on", **{f"member_{name}": why for name, why in missing.items()})
        self.missing = {} if self._is_over(begun) and not extended else missing      # nobody was asked to the end
        if missing or extended:
            self._wake_loop()

    def _is_over(self, begun: Round) -> bool:
        """The licence was renewed or lost meanwhile: nothing is left to be asked.

        A renewal that was sent before the round began has a lower sequence; that the store has answered shows in the limit.
        """
        licence, limit = self._renewer.licence, self._limit()
        if limit is None or licence.epoch != begun.epoch or licence.sequence > begun.sequence:
            return True
        return remaining_s(limit, self._clock.now()) > round_s(licence.ttl_s) + SOON_S

    async def _persuade(self, name: str, url: str, begun: Round, asked: dict[str, str]) -> None:
        """Ask until it accepts; the round bounds it. `asked`: what it said last, "" once it has accepted."""
        body, wait_s = self._body(name, begun), post_s(begun.ttl_s)
        while not self._is_over(begun):
            why = f"no answer within {wait_s:.2f} s"
            with trio.move_on_after(wait_s):
                why = await self._asker.ask(url, body)
            asked[name] = why
            if not why:
                return
            await trio.sleep(AGAIN_S)

    def _body(self, name: str, begun: Round) -> bytes:
        me, slots = self._renewer.me, self._order.slots if self._order is not None else {}
        own = {"to": name, "epoch": begun.epoch, "incarnation": me.incarnation, "sequence": begun.sequence, "ttl_s": begun.ttl_s}
        return json.dumps({"name": me.name, "conn_url": self._conn_url(), "api_url": self._api_url(), "slots": slots or None, "pgha": own}).encode()

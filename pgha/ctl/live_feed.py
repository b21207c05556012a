"""What goes on in the cluster, heard from any member that answers, and from another one when it goes.

Events come over WebSocket; who leads and who follows is asked for again whenever something has happened, and every two
seconds. The store is needed only to find the first member, if the configured node's own agent does not answer.

A member that is asked again goes on after its last event, so nothing is missed. From another one, which has a log of its
own, only what is newer than the last event shown is taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, open_websocket_url

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import UNREACHABLE, End
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.output import plain
from pgha.ctl.settings import Settings
from pgha.ctl.store import Key, Store

#: the table is asked for again
LOOK_EVERY_S = 2.0
#: … and after an event, but not more often than this
LOOK_AGAIN_S = 0.2
#: a member that has not answered so many questions in a row is given up
SILENT_LOOKS = 2
ANSWER_S = 2.0
CONNECT_S = 3.0
#: between two rounds in which nobody answered
ROUND_S = 1.0
#: so many of them, and the store is asked whether there are others by now
STORE_ROUNDS = 10
#: the agent's view of the store is called old from here on
STORE_OLD_S = 15.0


class _Gone(Exception):
    """This member cannot be followed (any more)."""


class Feed:
    """`told`: called with each event; `changed`: whenever something else is to be shown. `kept`: begin with what the first
    member has kept, else with what happens from now on."""

    def __init__(self, settings: Settings, *, kinds: str, kept: bool, told: Callable[[dict[str, Any]], None], changed: Callable[[], None]) -> None:
        self._settings = settings
        self._kinds = kinds
        self._first = "0" if kept else ""
        self._told, self._changed = told, changed
        self._last_ids: dict[str, str] = {}     # by address
        self._newest = ""                       # moment of the newest event that was told
        self._addresses: dict[str, str] = {}    # address → name, of the members last seen
        self._news = trio.Event()
        self._system_identifier = ""
        self.cluster: Cluster | None = None
        self.node = ""              # whom we listen to; "": nobody
        self.address = ""
        self.store_age_s = 0.0      # since that member last heard of the store
        self.trouble = ""           # why the member before was given up, while there is no other

    async def run(self) -> None:
        """For ever, once somebody has answered; End(UNREACHABLE) if nobody does at first."""
        for lost in itertools.count():
            failures = []
            for address in await self._candidates(ask_store=lost % STORE_ROUNDS == STORE_ROUNDS - 1):
                try:
                    await self._follow(address)
                except _Gone as gone:
                    failures.append(str(gone))
                self.node = ""
                self.trouble = failures[-1]
                self._changed()
            if not self.address:
                raise End(UNREACHABLE, "no member's agent can be followed:\n  " + "\n  ".join(failures or [self.trouble or "none is known"]))
            await trio.sleep(ROUND_S)

    async def _candidates(self, *, ask_store: bool) -> list[str]:
        """The one we listened to last, if it may be back; the configured node's; the leader's; all others."""
        if ask_store or (not self._addresses and not await self._answers(self._settings.own_agent)):
            try:
                keys = await trio.to_thread.run_sync(_read, self._settings, abandon_on_cancel=True)
                self._note(clusters.understood(self._settings.scope, keys, quiet=True))
            except End as end:
                self.trouble = end.text.replace("\n", " ")
        leader = self.cluster.api_url(self.cluster.leader) if self.cluster else ""
        found = dict.fromkeys([self.address, self._settings.own_agent, leader, *self._addresses])
        return [address for address in found if address]

    async def _answers(self, address: str) -> bool:
        if not address:
            return False
        try:
            await self._look(address)
        except _Gone:
            return False
        return True

    # --- one member ----------------------------------------------------------------------------------------------------

    async def _follow(self, address: str) -> None:
        """Until it cannot be followed any more: _Gone says why."""
        why = ""
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._look(address)
                    after = self._last_ids.get(address, "0" if self.address else self._first)
                    async with open_websocket_url(self._url(address, after), self._tls(address), message_queue_size=200, connect_timeout=CONNECT_S, disconnect_timeout=0.5) as events:
                        nursery.start_soon(self._keep_looking, address)
                        await self._listen(address, events, only_newer=after == "0")
                except (_Gone, ConnectionClosed, HandshakeError, OSError, trio.BrokenResourceError, trio.TooSlowError) as failure:
                    why = _why(address, failure)
                nursery.cancel_scope.cancel()
        except* _Gone as gone:
            why = str(gone.exceptions[0])
        raise _Gone(why or f"{address} does not answer any more")

    async def _listen(self, address: str, events: WebSocketConnection, *, only_newer: bool) -> None:
        newest = self._newest if only_newer else ""
        while True:
            message = await events.get_message()
            try:
                event = json.loads(message)
                kind, at, mark = str(event["kind"]), str(event["at"]), str(event["id"])
            except (ValueError, TypeError, KeyError):
                raise _Gone(f"{address} tells something that is no event") from None
            if kind == "hello":
                if event.get("scope") != self._settings.scope:
                    raise _Gone(f"{address} belongs to the cluster {str(event.get('scope'))!r}")
                self.node, self.address, self.trouble = str(event.get("node")), address, ""
                self._newest = max(self._newest, at)
                self._changed()
            elif at > newest:
                self._newest = max(self._newest, at)
                self._told(event)
            self._last_ids[address] = mark
            self._news.set()

    # --- the table -----------------------------------------------------------------------------------------------------

    async def _keep_looking(self, address: str) -> None:
        silent = 0
        while True:
            with trio.move_on_after(LOOK_EVERY_S):
                await self._news.wait()
            self._news = trio.Event()
            try:
                await self._look(address)
                silent = 0
            except _Gone:
                silent += 1
                if silent >= SILENT_LOOKS:
                    raise
            await trio.sleep(LOOK_AGAIN_S)      # what happens together is looked at together

    async def _look(self, address: str) -> None:
        def ask() -> tuple[dict[str, Any], dict[str, Any], str]:
            body = agents.ask(self._settings, address, "GET", "/cluster", timeout_s=ANSWER_S).body
            decision = agents.ask(self._settings, address, "GET", "/pgha/decision", timeout_s=ANSWER_S)
            own = agents.ask(self._settings, address, "GET", "/patroni", timeout_s=ANSWER_S).body if not self._system_identifier else b"{}"
            return json.loads(body), json.loads(decision.body) if decision.status == 200 else {}, str(json.loads(own).get("database_system_identifier", ""))

        try:
            body, decision, system_identifier = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
            cluster = clusters.seen_by_agent(self._settings.scope, body, self._system_identifier or system_identifier)
            age_s = float(decision.get("age_s") or 0) + float((decision.get("ages_s") or {}).get("store_heard") or 0)
        except NoAnswer as silence:
            raise _Gone(str(silence)) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _Gone(f"{address} does not answer as a member's agent does") from None
        if body.get("scope") != self._settings.scope:
            raise _Gone(f"{address} belongs to the cluster {str(body.get('scope'))!r}")
        self._system_identifier = cluster.system_identifier
        self.store_age_s = age_s
        self._note(cluster)
        self._changed()

    def _note(self, cluster: Cluster) -> None:
        self.cluster = cluster
        # Who has left the table may come back, and may be the only one that does.
        self._addresses |= {address: name for name in cluster.members if (address := cluster.api_url(name)).startswith("http")}
        for address in list(self._addresses)[:-50]:
            del self._addresses[address]

    def _url(self, address: str, after: str) -> str:
        asked = [f"after={after}"] * bool(after) + [f"kinds={self._kinds}"] * bool(self._kinds)
        return f"{address.replace('http', 'ws', 1)}/pgha/events?{'&'.join(asked)}"

    def _tls(self, address: str) -> Any:
        return agents.context(self._settings.rest) if address.startswith("https") else None


def _read(settings: Settings) -> dict[str, Key]:
    return Store(settings.etcd).read(settings.root)


def _why(address: str, failure: Exception) -> str:
    match failure:
        case _Gone():
            return str(failure)
        case ConnectionRejected(status_code=404):
            return f"{address} has no events: another make, or an older version"
        case ConnectionRejected():
            return f"{address} refuses: {plain((failure.body or b'').decode(errors='replace'))[:200]} ({failure.status_code})"
        case ConnectionClosed() if failure.reason is not None:
            return f"{address} has ended the connection: {plain(str(failure.reason.reason or failure.reason.name))}"
    return f"{address} does not answer: {getattr(failure, 'strerror', None) or str(failure) or type(failure).__name__}"


def age_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"



"""What operators ask through REST, on its way to the loop (rest.requests.Requests).

Restarts and reloads become facts of the next observation, and are answered by the pass that deals with them.
Switchovers, failovers and configuration are writes to the store, from where every node sees them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from pgha.clock import Clock
from pgha.config.cluster import merge_patch, normalised
from pgha.config.judgement import Judgement, by_schema
from pgha.dcs import Compare, Put, Store
from pgha.dcs.keys import Keys, encode, loads
from pgha.errors import DcsError, DcsRefused
from pgha.log import Log
from pgha.model.cluster import ClusterView
from pgha.model.failsafe import Ping
from pgha.model.observation import Peer
from pgha.model.request import Request
from pgha.rest.requests import Answer

log = Log("pgha.rest")

#: Requests that wait for a pass; more are refused.
WAITING_AT_MOST = 16


class Inbox:
    """Owner of the requests that wait. `view()`: the cluster as seen; `wake()`: the loop; `look()`: at PostgreSQL's position."""

    def __init__(self, *, store: Store, keys: Keys, clock: Clock, view: Callable[[], ClusterView | None], wake: Callable[[], None],
                 look: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._view = view
        self._wake = wake
        self._look = look
        self.ask_others: Callable[[], Awaitable[dict[str, Peer]]] = _nobody_asked    # all other members, now: the agent, too
        self.accept: Callable[[Ping], tuple[Answer, int]] = _nobody_there     # who promises: the agent, once it is made
        self.judge: Callable[[dict[str, Any] | None, Any], Awaitable[Judgement]] = _by_schema       # who asks PostgreSQL, too: the agent, as above
        self.why: Callable[[str], Awaitable[Answer]] = _knows_nothing
        self.reread: Callable[[], Awaitable[tuple[str, ...]]] = _nothing_to_read       # the node's files again: what is wrong with them
        self._number = 0
        self._waiting: dict[int, Request] = {}
        self._answers: dict[int, Answer] = {}
        self._answered: dict[int, trio.Event] = {}

    # --- the loop's side -----------------------------------------------------------------------------------------------

    @property
    def requests(self) -> tuple[Request, ...]:
        """Those that no pass has dealt with yet, oldest first."""
        return tuple(self._waiting.values())

    def taken(self, number: int) -> None:
        """A pass has begun to carry this out: it is no fact of the next observation."""
        self._waiting.pop(number, None)

    def answer(self, number: int, status: int, text: str) -> None:
        """The outcome of a request; whoever waits for it is told."""
        self._waiting.pop(number, None)
        event = self._answered.get(number)
        if event is not None:
            self._answers[number] = Answer(status=status, text=text)
            event.set()

    # --- failsafe ------------------------------------------------------------------------------------------------------

    def failsafe(self, ping: Ping) -> tuple[Answer, int]:
        """See rest.requests.Requests."""
        return self.accept(ping)

    # --- REST's side ---------------------------------------------------------------------------------------------------

    def wake(self, why: str, epoch: int) -> None:
        view = self._view()
        if why == "observation asked":
            self._look()
            self._wake()        # a pass of now, whether or not there is news
        elif epoch < 0:
            self._look()        # no election: whoever asks compares positions, and the last look may be a loop_wait old
        elif view is not None and epoch >= view.epoch.number:
            self._wake()

    async def others(self) -> dict[str, Peer]:
        """See rest.requests.Requests."""
        return await self.ask_others()

    async def submit(self, kind: str, payload: Mapping[str, Any], *, deadline_s: float) -> Answer:
        """See rest.requests.Requests."""
        if kind == "reload":
            return await self._reload(deadline_s)
        if kind in ("restart", "cancel_restart", "reinitialize"):
            return await self._wait_for_pass(kind, dict(payload), deadline_s)
        write = _Write(deadline_s)
        try:
            with trio.fail_after(deadline_s):
                if kind in ("switchover", "failover"):
                    return await self._write_failover(payload, write)
                if kind == "cancel_switchover":
                    return await self._cancel(write)
                if kind in ("patch_config", "put_config"):
                    return await self._write_config(dict(payload), write, patch=kind == "patch_config")
                if kind == "check_config":
                    return await self._check_config(payload)
                if kind == "why_config":
                    return await self.why(str(payload["key"]))
        except DcsError as error:
            log.warning("request could not be written to the store", kind=kind, why=str(error))
            may_happen = write.begun and not isinstance(error, DcsRefused)
            return Answer(status=503, text=_FAILED.get(kind, "the store does not answer") + (_MAY_HAPPEN if may_happen else ""))
        except trio.TooSlowError:
            return Answer(status=503, text=_FAILED.get(kind, "the store does not answer in time") + (_MAY_HAPPEN if write.begun else ""))
        return Answer(status=501, text=f"{kind} is not supported")

    async def _reload(self, deadline_s: float) -> Answer:
        """As SIGHUP, and told what is wrong with the files. PostgreSQL reads its own in the next pass that can see to that."""
        with trio.move_on_after(deadline_s) as reading:
            problems = await self.reread()
        if reading.cancelled_caught:
            return Answer(status=503, text=f"the configuration was not read within {deadline_s:g} seconds; it may still happen")
        if problems:
            return Answer(status=400, text="configuration not reloaded: " + "\n".join(problems))
        return Answer(status=202, text="reload scheduled")

    async def _wait_for_pass(self, kind: Any, options: dict[str, Any], deadline_s: float) -> Answer:
        if len(self._waiting) >= WAITING_AT_MOST:
            return Answer(status=503, text="too many requests are waiting")
        if kind == "restart" and "schedule" not in options and any(r.kind == "restart" for r in self._waiting.values()):
            return Answer(status=503, text="restart already in progress")
        self._number += 1
        number, event = self._number, trio.Event()
        self._answered[number] = event
        self._waiting[number] = Request(id=number, kind=kind, at=self._clock.now(), options=options)
        self._wake()
        try:
            with trio.move_on_after(deadline_s):
                await event.wait()
            return self._answers.pop(number, None) or Answer(status=503, text=f"no outcome of the {kind} within {deadline_s:g} seconds" + _MAY_HAPPEN)
        finally:
            self._waiting.pop(number, None)
            self._answered.pop(number, None)
            self._answers.pop(number, None)

    async def _write_failover(self, payload: Mapping[str, Any], write: _Write) -> Answer:
        view = self._view()
        if view is None:
            return Answer(status=503, text=_FAILED["failover"])
        value = {k: payload[k] for k in ("leader", "member", "scheduled_at", "pgha") if payload.get(k)}
        outcome = await self._put("failover", encode(value), view.revision_of("failover"), write)
        if not outcome[0]:
            return Answer(status=503, text=_FAILED["failover"] + " (it was changed meanwhile)")
        return Answer(status=200, text="", revision=outcome[1])

    async def _cancel(self, write: _Write) -> Answer:
        view = self._view()
        if view is None or view.failover.empty:
            return Answer(status=404, text="no switchover is scheduled")
        done, revision = await self._put("failover", b"{}", view.revision_of("failover"), write)
        return Answer(status=200 if done else 409, text="scheduled switchover deleted" if done else "failover key was changed meanwhile", revision=revision)

    async def _write_config(self, change: dict[str, Any], write: _Write, *, patch: bool) -> Answer:
        path = self._keys.path("config")
        snapshot = await self._store.read(path, deadline_s=write.deadline_s)
        entry = snapshot.entries.get(path)
        if entry is None and patch:
            return Answer(status=503, text="there is no configuration in the store")
        try:
            old = loads(entry.value) if entry else {}
        except ValueError:
            old = {}
        if not isinstance(old, dict):
            old = {}
        new = merge_patch(old, change) if patch else change
        if new == old:
            return Answer(status=200, text=json.dumps(new), json=True)
        judged = await self.judge(old, new)
        if judged.problems:
            return Answer(status=400, text="\n".join(judged.problems))
        for warning in judged.warnings:
            log.warning("configuration changed by request", warning=warning)
        new = normalised(new)
        done, revision = await self._put("config", encode(new), entry.revision if entry else 0, write)
        if not done:
            return Answer(status=409 if patch else 502, text="the configuration was changed by somebody else meanwhile")
        return Answer(status=200, text=json.dumps(new), json=True, revision=revision)

    async def _check_config(self, asked: Mapping[str, Any]) -> Answer:
        """What would be wrong with `config`, in place of `old` (default: as seen in the store). Nothing is written."""
        view = self._view()
        old = asked.get("old", view.config if view is not None else None)
        judged = await self.judge(old if isinstance(old, dict) else None, asked["config"])
        restart = {name: {"old_value": was, "new_value": then} for name, (was, then) in judged.restart.items()}
        return Answer(status=200, json=True, text=json.dumps({
            "problems": judged.problems, "warnings": judged.warnings, "restart": restart, "asked": judged.asked, "postgres_version": judged.version}))

    async def _put(self, key: str, value: bytes, revision: int, write: _Write) -> tuple[bool, int]:
        path = self._keys.path(key)
        write.begun = True
        outcome = await self._store.transact(compares=[Compare(key=path, revision=revision)], puts=[Put(key=path, value=value)], read=[path], deadline_s=write.deadline_s)
        found = outcome.found.get(path)
        if not outcome.succeeded and found is not None and found.value == value and found.revision > revision:
            return True, found.revision      # an attempt whose answer was lost had written it
        return outcome.succeeded, outcome.revision


class _Write:
    """One request's write to the store. `begun`: from then on no answer does not mean that nothing was written."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.begun = False


#: Clients tell by it what is not known (ctl: exit code 4); after the reference's texts, which others match.
_MAY_HAPPEN = "; it may still happen"
_FAILED = {
    "switchover": "failed to write failover key into DCS",
    "failover": "failed to write failover key into DCS",
    "patch_config": "the configuration could not be written",
    "put_config": "the configuration could not be written",
}


async def _nobody_asked() -> dict[str, Peer]:
    return {}


async def _by_schema(old: dict[str, Any] | None, new: Any) -> Judgement:
    return by_schema(old, new)


async def _nothing_to_read() -> tuple[str, ...]:
    return ()


async def _knows_nothing(_key: str) -> Answer:
    return Answer(status=503, text="not yet")


def _nobody_there(_ping: Ping) -> tuple[Answer, int]:
    return Answer(status=503, text="not yet"), 0

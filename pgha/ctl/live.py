"""`ctl watch`: the cluster live. A table of the members and what happens, on a terminal; elsewhere what happens, line by line.

It listens to one member's agent (pgha/rest/stream.py) and goes over to another when that one goes. `--once` asks once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import warn
from pgha.ctl.ends import DONE, UNREACHABLE, USAGE, End
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.listing import shown
from pgha.ctl.live_words import KINDS, is_bad, line, moment, words
from pgha.ctl.output import plain
from pgha.ctl.settings import Settings

#: what is remembered for a screen
KEPT = 500
#: events that --once prints below the table
LAST = 20
#: a page has one event at least, and no more are kept
MOST_PAGES = 1000
#: the screen is written at most this often
DRAW_AGAIN_S = 0.1
_KIND_STYLES = {"lock": "note", "role": "cyan", "operation": "blue", "member": "good", "lag": "magenta", "configuration": "magenta"}


def run(settings: Settings, given: argparse.Namespace) -> int:
    kinds = _kinds(given.kinds)
    if given.once:
        return _once(settings, kinds=kinds, form=given.format)
    import trio

    on_screen = given.format == "table" and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    ended = _Ended()
    try:
        if on_screen:
            trio.run(_screen, settings, kinds, ended)
        else:
            trio.run(_lines, settings, kinds, given.format, ended)
    except BaseExceptionGroup as group:
        end = next((error for error in _leaves(group) if isinstance(error, End)), None)
        if end is None:
            raise
        raise end from None
    if ended.by is not None:
        signal.signal(ended.by, signal.SIG_DFL)
        os.kill(os.getpid(), ended.by)      # whoever sent it sees that it worked
    if ended.reader_gone:
        raise BrokenPipeError
    return DONE


def _kinds(text: str) -> str:
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise End(USAGE, f"--kinds: {plain(', '.join(unknown))}: there are {', '.join(sorted(KINDS))}")
    return ",".join(kinds)


class _Ended:
    """`by`: the signal, if it was one that ends a program by force. `reader_gone`: of the lines."""

    by: signal.Signals | None = None
    reader_gone = False


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


# --- line by line --------------------------------------------------------------------------------------------------------


async def _lines(settings: Settings, kinds: str, form: str, ended: _Ended) -> None:
    import trio

    from pgha.ctl.live_feed import Feed

    said = ""

    def told(event: dict[str, Any]) -> None:
        try:
            print(json.dumps(event) if form == "json" else line(event), flush=True)
        except BrokenPipeError:
            ended.reader_gone = True
            nursery.cancel_scope.cancel()

    def changed() -> None:
        nonlocal said
        now = f"following the events of {feed.node}" if feed.node else plain(feed.trouble)
        if now and now != said:
            said = now
            warn(now)

    feed = Feed(settings, kinds=kinds, kept=False, told=told, changed=changed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
            async for number in received:
                ended.by = signal.Signals(number) if number != signal.SIGINT else None
                nursery.cancel_scope.cancel()


# --- on a terminal -------------------------------------------------------------------------------------------------------


async def _screen(settings: Settings, kinds: str, ended: _Ended) -> None:
    import trio

    from pgha.ctl.live_feed import Feed
    from pgha.ctl.live_screen import DEADLY, Terminal

    terminal = Terminal(colours=not os.environ.get("NO_COLOR"))
    events: deque[dict[str, Any]] = deque(maxlen=KEPT)
    news = trio.Event()

    def wake(event: dict[str, Any] | None = None) -> None:
        if event is not None:
            events.append(event)
        news.set()

    def gone() -> None:
        """The terminal is not there any more; who holds it has been told, too, or will be."""
        ended.by = ended.by or signal.SIGHUP
        nursery.cancel_scope.cancel()

    feed = Feed(settings, kinds=kinds, kept=True, told=wake, changed=wake)

    async def draw() -> None:
        nonlocal news
        while True:
            news = trio.Event()
            try:
                await terminal.show(_rows(settings, feed, events, height=terminal.size()[1]))
            except OSError:
                gone()
            await trio.sleep(DRAW_AGAIN_S)      # what comes at once is shown at once
            await news.wait()

    async def keys() -> None:
        if not os.isatty(0):
            return
        while True:
            await trio.lowlevel.wait_readable(0)
            try:
                pressed = os.read(0, 100)
            except OSError:
                pressed = b""
            if not pressed:     # a terminal that has hung up says that it ends (Ctrl-D is a key here)
                gone()
                return
            if b"q" in pressed.lower():
                nursery.cancel_scope.cancel()
                return
            if b"\x0c" in pressed:              # Ctrl-L
                terminal.forget()
                wake()

    async def signals() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT, *DEADLY) as received:
            listening.set()
            async for number in received:
                if number == signal.SIGTSTP:
                    terminal.leave()
                    os.kill(os.getpid(), signal.SIGSTOP)        # here we stand until somebody says fg
                    terminal.enter()
                elif number in (signal.SIGWINCH, signal.SIGCONT):
                    terminal.forget()       # also if its size is the same again: what was cut off meanwhile is gone
                else:
                    ended.by = signal.Signals(number) if number != signal.SIGINT else None
                    nursery.cancel_scope.cancel()
                    return
                wake()

    listening = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(signals)
        await listening.wait()
        with terminal.taken():
            async with trio.open_nursery() as inner:
                inner.start_soon(feed.run)
                inner.start_soon(draw)
                inner.start_soon(keys)
    if feed.cluster is not None and ended.by is None:
        print(shown(feed.cluster))      # what was last seen stays


def _rows(settings: Settings, feed: Any, events: deque[dict[str, Any]], *, height: int) -> list[list[Any]]:
    """The whole screen."""
    from pgha.ctl.live_feed import STORE_OLD_S, age_words
    from pgha.ctl.live_screen import Part

    seen_by = f"seen by {plain(feed.node)}, {plain(feed.address)}" if feed.node else "nobody answers" if feed.cluster else "looking for a member"
    rows: list[list[Part]] = [[Part(f"pgha watch   {plain(settings.scope)}   ", "bold"), Part(seen_by, "" if feed.node else "bad")]]
    if feed.cluster is not None:
        for number, text in enumerate(shown(feed.cluster).split("\n")):
            rows.append([Part(text, "bold" if number == 1 else _style_of(text))])
    note = ""
    if not feed.node:
        note = plain(feed.trouble)
    elif feed.store_age_s > STORE_OLD_S:
        note = f"{feed.node} has not heard from the store for {age_words(feed.store_age_s)}: the table is as of then"
    rows += [[], [Part("Events", "bold"), *([Part(f"   {note}", "bad")] if note else [])]]
    room = max(1, height - len(rows) - 1)
    for event in list(events)[-room:]:
        kind = str(event.get("kind", "?"))
        rows.append([Part(f"{moment(event)}  {plain(str(event.get('node', '?'))):<8}  ", "dim"), Part(f"{plain(kind):<13}  ", "bad" if is_bad(event) else _KIND_STYLES.get(kind, "")),
                     Part(words(event), "bad" if is_bad(event) else "")])
    rows += [[] for _ in range(height - len(rows) - 1)]
    return [*rows[:height - 1], [Part("q or Ctrl-C: end", "dim")]] if height > 3 else rows


def _style_of(row: str) -> str:
    """Of a row of the table."""
    if any(f"| {state}" in row for state in ("stopped", "crashed", "unknown", "start failed", "restart failed", "stop failed")):
        return "bad"
    return "good" if "| Leader " in row or "| Standby Leader " in row else ""


# --- once ----------------------------------------------------------------------------------------------------------------


def _once(settings: Settings, *, kinds: str, form: str) -> int:
    """The table and the last events (json: all that are kept), from the first member that answers."""
    failures: list[str] = []
    for address in _addresses(settings, failures):
        try:
            events = _kept(settings, address, kinds=kinds, everything=form == "json")
        except NoAnswer as silence:
            failures.append(str(silence))
            continue
        if events is None:
            failures.append(f"{address} has no events of {settings.scope}")
            continue
        if form == "table":
            own = agents.get_json(settings, address, "/patroni")
            print(shown(clusters.seen_by_agent(settings.scope, agents.get_json(settings, address, "/cluster"), str(own.get("database_system_identifier", "")))))
        for event in events if form == "json" else events[-LAST:]:
            print(json.dumps(event) if form == "json" else line(event))
        return DONE
    raise End(UNREACHABLE, "no member's agent answers:\n  " + "\n  ".join(failures or ["none is known"]))


def _kept(settings: Settings, address: str, *, kinds: str, everything: bool) -> list[dict[str, Any]] | None:
    """The newest events, or page by page all that are kept; None if this is no agent of the cluster. NoAnswer."""
    events: list[dict[str, Any]] = []
    after: Any = "0" if everything else ""
    for _ in range(MOST_PAGES):
        asked = "&".join(f"{key}={value}" for key, value in (("after", after), ("kinds", kinds)) if value)
        answer = agents.ask(settings, address, "GET", f"/pgha/events{'?' + asked if asked else ''}")
        try:
            page = json.loads(answer.body) if answer.status == 200 else None
        except (ValueError, RecursionError):
            page = None
        if not isinstance(page, dict) or page.get("scope") != settings.scope or not isinstance(page.get("events"), list):
            return None
        events += [event for event in page["events"] if isinstance(event, dict)]
        after = page.get("more")
        if not everything or not isinstance(after, str) or not after.isascii() or not after.replace("-", "").isalnum():
            break
    return events


def _addresses(settings: Settings, failures: list[str]) -> Iterator[str]:
    """The configured node's, then, if that does not do, those that the store names."""
    if settings.own_agent:
        yield settings.own_agent
    try:
        cluster = clusters.read(settings)
    except End as end:
        failures.append(end.text)
        return
    for name in sorted(cluster.members, key=lambda name: name != cluster.leader):
        if (address := cluster.api_url(name)) and address != settings.own_agent:
            yield address

"""How does an event read as one line? For people; programs take the JSON."""

from __future__ import annotations

import time
from calendar import timegm
from typing import Any

from pgha.ctl.output import plain


def words(event: dict[str, Any]) -> str:
    """What has happened, without when and where. Events of a newer agent's kinds are shown as they are."""
    told = _WORDS.get(str(event.get("kind")))
    try:
        text = told(event) if told is not None else _raw(event)
    except (KeyError, TypeError, ValueError):
        text = _raw(event)
    return plain(text).replace("\n", " ")


def moment(event: dict[str, Any], *, date: bool = False) -> str:
    """When, in local time."""
    at = str(event.get("at", ""))
    try:
        seconds = timegm(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return plain(at)
    return time.strftime("%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S", time.localtime(seconds))


def line(event: dict[str, Any]) -> str:
    """With when, where and kind: for a log."""
    return f"{moment(event, date=True)} {plain(str(event.get('node', '?')))} {plain(str(event.get('kind', '?')))}: {words(event)}"


def is_bad(event: dict[str, Any]) -> bool:
    """Is it one that somebody should look at?"""
    match event.get("kind"):
        case "lock":
            return event.get("what") in ("lost", "late") or (event.get("what") == "holder" and not event.get("holder"))
        case "operation":
            return event.get("what") == "end" and not event.get("ok")
        case "lag":
            return bool(event.get("over"))
        case "member":
            return event.get("what") == "left"
    return event.get("kind") == "gap"


def _raw(event: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("id", "at", "node", "kind"))


def _agent(e: dict[str, Any]) -> str:
    return f"agent started, version {e['version']}" if e["what"] == "started" else "agent was told to stop"


def _decision(e: dict[str, Any]) -> str:
    return f"{e['situation']}{' (PAUSE)' if e['paused'] else ''}: {e['summary']}"


def _role(e: dict[str, Any]) -> str:
    timeline = f" on timeline {e['timeline']}" if e["timeline"] else ""
    was = f" (was {e['was_role']}, {e['was_state']})" if e["was_role"] else ""
    return f"{e['role']}, {e['state']}{timeline}{was}"


def _lock(e: dict[str, Any]) -> str:
    why = f": {e['why']}" if e["why"] else ""
    match e["what"]:
        case "taken":
            return f"{e['holder']} has taken the lock, epoch {e['epoch']}"
        case "released":
            return f"{e['holder']} has released the lock"
        case "lost":
            return f"{e['was']} has lost the lock{' to ' + e['holder'] if e['holder'] else ''}{why}"
        case "late":
            return f"{e['holder']} could not renew the lock for {e['age_s']:.1f} s{why}"
        case "renewed":
            return f"{e['holder']} has renewed the lock, late: after {e['age_s']:.1f} s"
    if not e["holder"]:
        return f"nobody holds the lock (before: {e['was']})" if e["was"] else "nobody holds the lock"
    return f"{e['holder']} holds the lock{' in pause' if e['why'] == 'paused' else ''}, epoch {e['epoch']}{' (before: ' + e['was'] + ')' if e['was'] else ''}"


def _size(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / 1024:.0f} KiB"


def _lag(e: dict[str, Any]) -> str:
    return f"{e['member']} is {_size(e['lag_bytes'])} behind{', limit ' + _size(e['limit_bytes']) if e['over'] else ': has caught up'}"


def _operation(e: dict[str, Any]) -> str:
    match e["what"]:
        case "begin":
            return f"{e['operation']} begins{': ' + e['detail'] if e['detail'] else ''}"
        case "progress":
            return f"{e['operation']}: {e['progress']}"
    return f"{e['operation']} {'has ended well' if e['ok'] else 'has failed'} after {e['took_s']:.1f} s{': ' + e['why'] if e['why'] else ''}"


def _configuration(e: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    changes = [f"{c['key']}: {shown(c['was'])} → {shown(c['now'])}" for c in e["changed"]]
    return "; ".join([*changes, *([f"{e['more']} more"] if e["more"] else [])])


def _member(e: dict[str, Any]) -> str:
    now, was = (", ".join(part for part in (e[f"{when}role"], e[f"{when}state"]) if part) for when in ("", "was_"))
    match e["what"]:
        case "joined":
            return f"{e['member']} has joined: {now}"
        case "left":
            return f"{e['member']} is gone (was {was})"
    timeline = f" on timeline {e['timeline']}" if e["timeline"] else ""
    return f"{e['member']}: {now}{timeline}{f' (was {was})' if was != now else ''}"


def _gap(e: dict[str, Any]) -> str:
    if e["reason"] == "dropped":
        return f"{e['missed']} events were forgotten before they could be read"
    return "the agent has been started anew: what it did before is not known"


_WORDS = {"agent": _agent, "decision": _decision, "role": _role, "lock": _lock, "lag": _lag, "operation": _operation, "configuration": _configuration,
          "member": _member, "gap": _gap}
#: what --kinds takes
KINDS = tuple(kind for kind in _WORDS if kind != "gap")

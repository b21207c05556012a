"""Which replication slots does the shared configuration keep: `slots` and `ignore_slots`? (compatibility spec 5.4 and 15)

Rules of this file:
* what cannot be used is named, and makes nothing less safe: an entry of `slots` that says nothing usable still keeps its
  name from being dropped, and as long as one of the two keys cannot be read at all, no slot is dropped.
* logical permanent slots are not kept by this version: our own writes refuse them by name, others' leave alone what exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from pgha.config.schema import nearest
from pgha.config.values import shown, type_name
from pgha.model.cluster import is_slot_name
from pgha.model.observation import SlotMatcher

ALIASES = ("permanent_replication_slots", "permanent_slots")
LOGICAL = "is a logical slot, which this version does not keep: it is neither made nor carried over a failover, and what exists is left alone"
_KEYS = ("type", "database", "plugin", "cluster_type")
_MATCHED = ("name", "type", "database", "plugin")
_TYPES = ("physical", "logical")
_CLUSTER_TYPES = ("primary", "standby")
#: So many faults in one table are enough to be told of.
_MOST_FAULTS = 20


class Slots(Struct, frozen=True, kw_only=True):
    """`permanent`: physical ones, which every node keeps. `left_alone`: never dropped. `readable`: is that all there is to know?"""

    permanent: tuple[str, ...] = ()
    left_alone: tuple[SlotMatcher, ...] = ()
    logical: tuple[str, ...] = ()
    readable: bool = True


def slots_of(raw: Any) -> Slots:
    """What the object of `/config` says of slots. Never fails."""
    if not isinstance(raw, dict):
        return Slots(readable=raw is None)
    tables = [raw[name] for name in ("slots", *ALIASES) if raw.get(name) is not None]
    matchers = raw.get("ignore_slots")
    entries = {name: value for table in reversed(tables) if isinstance(table, dict) for name, value in table.items() if isinstance(name, str)}
    listed = matchers if isinstance(matchers, list) else []
    usable = {name: value for name, value in entries.items() if not slot_fault(name, value)}
    logical = tuple(sorted(name for name, value in usable.items() if _type(value) == "logical"))
    permanent = tuple(sorted(n for n, value in usable.items() if n not in logical and _cluster_type(value) == "primary"))
    alone = [SlotMatcher(name=name) for name in sorted(entries) if name not in permanent]
    alone += [SlotMatcher(**{key: item[key] for key in _MATCHED if item.get(key) is not None}) for item in listed if not matcher_fault(item)]
    readable = all(isinstance(table, dict) for table in tables) and (matchers is None or isinstance(matchers, list)) and not any(map(matcher_fault, listed))
    return Slots(permanent=permanent, left_alone=tuple(alone), logical=logical, readable=readable)


def faults(raw: Any, *, strict: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, what is wrong) of the entries of both keys. `strict`: of our own writes, where what has no effect is refused, too.

    That one of the keys is no table, or no list of tables, is the schema's to say.
    """
    if not isinstance(raw, dict):
        return
    for key in ("slots", *ALIASES):
        table = raw.get(key)
        told = 0
        for name, value in table.items() if isinstance(table, dict) else ():
            fault = slot_fault(name, value, strict=strict)
            if fault and told < _MOST_FAULTS:
                told += 1
                yield (key, str(name)), fault if strict else f"{fault}; no slot of this name is made or dropped"
            elif not fault and _type(value) == "logical":
                yield (key, name), f"{LOGICAL}; allowed: leave it out" if strict else LOGICAL
    matchers = raw.get("ignore_slots")
    for number, item in enumerate(matchers[:_MOST_FAULTS] if isinstance(matchers, list) else ()):
        if isinstance(item, dict) and (fault := matcher_fault(item)):
            yield ("ignore_slots", str(number)), fault if strict else f"{fault}; no slot is dropped until this is put right"


def slot_fault(name: Any, value: Any, *, strict: bool = False) -> str:
    """What is wrong with one entry of `slots`; "" if nothing. null is a physical slot."""
    if not isinstance(name, str) or not is_slot_name(name):
        return "is no slot's name; allowed: 1 to 63 of a-z, 0-9 and _"
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"is {type_name(value)}; allowed: a table with {', '.join(_KEYS)}"
    for key, allowed in (("type", _TYPES), ("cluster_type", _CLUSTER_TYPES)):
        if value.get(key) is not None and value[key] not in allowed:
            return f"has {key} {shown(value[key])}; allowed: {' or '.join(allowed)}"
    for key in ("database", "plugin"):
        if value.get(key) is not None and (not isinstance(value[key], str) or not value[key]):
            return f"has {key} {shown(value[key])}; allowed: a name"
    if _type(value) == "logical" and not (value.get("database") and value.get("plugin")):
        return "is logical without database and plugin; allowed: both"
    return _unknown(value, _KEYS) if strict else ""


def matcher_fault(item: Any) -> str:
    """What is wrong with one entry of `ignore_slots`; "" if nothing. One without any key matches every slot."""
    if not isinstance(item, dict):
        return f"is {type_name(item)}; allowed: a table with {', '.join(_MATCHED)}"
    for key in _MATCHED:
        if item.get(key) is not None and (not isinstance(item[key], str) or not item[key]):
            return f"has {key} {shown(item[key])}; allowed: text"
    if item.get("type") is not None and item["type"] not in _TYPES:
        return f"has type {shown(item['type'])}; allowed: {' or '.join(_TYPES)}"
    return _unknown(item, _MATCHED)


def _unknown(table: dict[Any, Any], known: tuple[str, ...]) -> str:
    for key in table:
        if key not in known:
            close = nearest(str(key), list(known))
            return f"has {shown(str(key))}, which is unknown; {f'did you mean {close}?' if close else 'allowed: ' + ', '.join(known)}"
    return ""


def _type(value: Any) -> str:
    """A slot that names a database and a plugin is logical also without saying so."""
    if value is None:
        return "physical"
    implied = "logical" if value.get("database") and value.get("plugin") else "physical"
    return str(value.get("type") or implied)


def _cluster_type(value: Any) -> str:
    return str((value or {}).get("cluster_type") or "primary")

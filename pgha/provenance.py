"""Where does the value of a key come from, and since when, as far as this agent knows? (`pgha config why`)

What the store keeps is one value with one revision; which of its keys changed when is what this agent has seen since it began.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from pgha.config.judgement import in_our_words
from pgha.config.load import Effective
from pgha.config.schema import Path
from pgha.config.why import STORE, UnknownKey, parameter_value, why
from pgha.errors import PghaError
from pgha.model.gucs import Guc, GucFacts
from pgha.postgres.parameters import CONTROLLED
from pgha.rest.requests import Answer

#: Keys whose changes are remembered; a configuration has a few dozen.
MOST_KEYS = 10_000


class _Change(Struct, frozen=True):
    revision: int
    wall_s: float


class Provenance:
    """`effective()`: what counts now; `left_out()`: parameters that PostgreSQL refused; `facts()`: what PostgreSQL says of all."""

    def __init__(self, *, member: str, effective: Callable[[], Effective], sources: Mapping[Path, str], left_out: Callable[[], Mapping[str, str]],
                 facts: Callable[[], Awaitable[GucFacts]], wall_s: Callable[[], float]) -> None:
        self._member = member
        self._effective = effective
        self.sources = sources      # replaced on reload
        self._left_out = left_out
        self._facts = facts
        self._wall_s = wall_s
        self._config: Any = None
        self._mixed = False
        self._revision = 0
        self._leaves: dict[tuple[str, ...], Any] | None = None
        self._changes: dict[tuple[str, ...], _Change] = {}
        self._since_s = wall_s()

    def note(self, config: dict[str, Any], revision: int, *, mixed: bool) -> None:
        """The shared configuration was read from the store."""
        self._config, self._mixed, self._revision = config, mixed, revision
        before, self._leaves = self._leaves, dict(_leaves(config, ()))
        if before is None:
            return
        for path in before.keys() | self._leaves.keys():
            if before.get(path) != self._leaves.get(path) and len(self._changes) < MOST_KEYS:
                self._changes[path] = _Change(revision, self._wall_s())

    async def answer(self, key: str) -> Answer:
        """As JSON; 404 with the nearest key for one that is not known."""
        effective = self._effective()
        defaults = {name: rule.default for name, rule in CONTROLLED.items()}
        try:
            found = why(key, local=effective.local, sources=self.sources, dynamic=self._config, mixed=self._mixed, defaults=defaults)
            shared = next((layer.value for layer in found.layers if layer.layer == STORE), None)
            running, left_out = await self._running(found.key, shared)
        except UnknownKey as unknown:
            return Answer(status=404, text=str(unknown))
        return Answer(status=200, json=True, text=json.dumps({
            "member": self._member, **msgspec.to_builtins(found), "store": self._store(found.layers[0].path if found.layers else ()),
            "running": running, "left_out": left_out}))

    def _store(self, path: tuple[str, ...]) -> dict[str, Any]:
        below = [change for at, change in self._changes.items() if path and at[:len(path)] == path]
        last = max(below, key=lambda change: change.revision, default=None)
        return {"revision": self._revision, "watched_since": _moment(self._since_s),
                "changed": {"revision": last.revision, "seen_at": _moment(last.wall_s)} if last is not None else None}

    async def _running(self, key: str, shared: Any) -> tuple[dict[str, Any] | None, str]:
        """What PostgreSQL itself says of a parameter, and why it was left out. UnknownKey if PostgreSQL has none of that name."""
        name = key.removeprefix("postgresql.parameters.")
        if name == key:
            return None, ""
        left_out = self._left_out().get(name.lower(), "")
        try:
            facts = await self._facts()
        except (PghaError, OSError) as error:
            return {"why_not": str(error)}, left_out
        guc = facts.of.get(name.lower())
        if guc is None and "." not in name and not left_out and facts.running:
            raise UnknownKey(f"{key}: {in_our_words('unrecognized configuration parameter', name, facts)}")
        return (_shown(guc, shared) if guc is not None and facts.running else None), (in_our_words(left_out, name, facts) if left_out else "")


def _shown(guc: Guc, shared: Any) -> dict[str, Any]:
    return {"value": parameter_value(guc.name, guc.shown or guc.value, shared=shared), "source": guc.source, "file": guc.file, "line": guc.line, "context": guc.context,
            "pending_restart": guc.pending, "default": guc.default, "unit": guc.unit}


def _leaves(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, (*path, str(key)))]


def _moment(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="seconds")

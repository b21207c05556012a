"""PGHA_… variables: every key of the file has one, named as the reference's PATRONI_… (compatibility spec 5.3).

The name is the key's path in capitals, except that the three PostgreSQL users and the credentials of restapi and ctl
leave out "postgresql.authentication" and "authentication", and [pgha] leaves out itself:

    PGHA_SCOPE  PGHA_RESTAPI_LISTEN  PGHA_RESTAPI_USERNAME  PGHA_SUPERUSER_PASSWORD  PGHA_POSTGRESQL_BIN_DIR  PGHA_STATE_DIR

Lists are TOML, JSON or text with commas; tables are TOML ({a = 1}) or JSON.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from msgspec import Struct

from pgha.config.local import LocalConfig
from pgha.config.schema import Path, every_key, nearest
from pgha.config.values import Shape, printable, too_deep

PREFIX = "PGHA_"
#: A whole configuration, as TOML, in place of the file.
WHOLE = "PGHA_CONFIGURATION"
#: Not configuration: read by the pyz's bootstrap before anything else.
RESERVED = frozenset({"PGHA_CACHE"})


class Variable(Struct, frozen=True):
    """What one variable sets, and which sibling keys it replaces."""

    path: Path
    shape: Shape
    replaces: tuple[str, ...]


def variable_name(path: Path) -> str:
    """("restapi", "authentication", "username") → "PGHA_RESTAPI_USERNAME"."""
    match path:
        case ("postgresql", "authentication", user, *rest):
            parts = [user, *rest]
        case (("restapi" | "ctl") as section, "authentication", *rest):
            parts = [section, *rest]
        case ("pgha", *rest):
            parts = rest
        case _:
            parts = list(path)
    return PREFIX + "_".join(parts).upper()


@cache
def variables() -> dict[str, Variable]:
    """Every variable there is, by name."""
    out: dict[str, Variable] = {}
    for path, key, section in every_key(LocalConfig):
        siblings = {name for group in section.EXCLUSIVE if path[-1] in group for name in group} - {path[-1]}
        name = variable_name(path)
        assert name not in out, name
        out[name] = Variable(path, key.kind.shape, tuple(sorted(siblings)))
    return out


def overlay(raw: dict[str, Any], sources: dict[Path, str], environ: Mapping[str, str], problems: list[str]) -> frozenset[str]:
    """Lay the variables over `raw` (changed in place, as `sources` is). Returns the names that were consumed.

    An unknown variable is a problem, because it is most likely a misspelt one. Values are never shown.
    """
    consumed = set()
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in RESERVED:
            continue
        consumed.add(name)
        if name == WHOLE:
            continue
        variable = variables().get(name)
        if variable is None:
            close = nearest(name, [*variables(), WHOLE])
            problems.append(f"environment: {printable(name)}: unknown variable" + (f"; did you mean {close}?" if close else f"; allowed: {PREFIX} and a key's path in capitals"))
            continue
        try:
            value = parse(environ[name], variable.shape)
        except ValueError as error:
            problems.append(f"environment: {name}: {error}")
            continue
        _put(raw, variable, value)
        sources[variable.path] = f"environment {name}"
    return frozenset(consumed)


def _put(raw: dict[str, Any], variable: Variable, value: Any) -> None:
    table = raw
    for part in variable.path[:-1]:
        inner = table.get(part)
        # A section that is no table is reported by the schema; the variable cannot mend it.
        if inner is not None and not isinstance(inner, dict):
            return
        table[part] = table = dict(inner or {})
    for sibling in variable.replaces:
        table.pop(sibling, None)
    table[variable.path[-1]] = value


def parse(text: str, shape: Shape) -> Any:
    """A variable's text as the value that the file would have. ValueError says what is allowed (never the text)."""
    if shape == "scalar":
        return text
    opening = "[" if shape == "list" else "{"
    if text.lstrip().startswith(opening):
        for load in (json.loads, lambda t: tomllib.loads(f"value = {t}")["value"]):
            try:
                value = load(text)
            except (ValueError, RecursionError):  # both parsers recurse; a thousand brackets are no configuration
                continue
            if not too_deep(value):
                return value
        raise ValueError(f"is neither TOML nor JSON; allowed: a {shape} as TOML or JSON")
    if shape == "list":
        return [part.strip() for part in text.split(",") if part.strip()]
    raise ValueError('is no table; allowed: a table as TOML, {key = "value"}, or JSON')

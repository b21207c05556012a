"""Several values under one key: lists of texts, tables of texts, options of a program."""

from __future__ import annotations

import re
from typing import Any

from pgha.config.values import Kind, Wrong, shown, type_name


def texts(allowed: str = "a list of texts") -> Kind:
    """A list of texts, as tuple; one text counts as a list separated by commas."""
    def parse(value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return lines_of(value)
    return Kind(parse, allowed, shape="list")


def lines_of(value: Any) -> tuple[str, ...]:
    """A list of texts, as tuple. Raises Wrong naming the first item that is none."""
    if not isinstance(value, list):
        raise Wrong(f"is {type_name(value)}, not a list")
    for number, item in enumerate(value, 1):
        if not isinstance(item, str):
            raise Wrong(f"has {type_name(item)} as item {number}")
        if "\n" in item or "\0" in item:
            raise Wrong(f"has a line break or a NUL in item {number}")
    return tuple(value)


def lines(allowed: str) -> Kind:
    """A list of texts in which commas mean nothing (pg_hba)."""
    return Kind(lines_of, allowed, shape="list")


def mapping(allowed: str = "a table of texts") -> Kind:
    """Names to scalars, as dict of text."""
    def parse(value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise Wrong(f"is {type_name(value)}, not a table")
        for name, item in value.items():
            if isinstance(item, (dict, list)) or item is None:
                raise Wrong(f"has {type_name(item)} for {name}")
        return {name: item if isinstance(item, str) else shown(item) for name, item in value.items()}
    return Kind(parse, allowed, shape="table")


#: What frames an answer is for whoever writes it.
_FRAMING = frozenset({"connection", "content-encoding", "content-length", "content-type", "keep-alive", "trailer", "transfer-encoding", "upgrade"})


def headers() -> Kind:
    """Headers of HTTP answers, as dict of text. Nothing in them can start a line of its own, or change where an answer ends."""
    def parse(value: Any) -> dict[str, str]:
        found: dict[str, str] = mapping().parse(value)
        for name, item in found.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                raise Wrong(f"has {shown(name)}, which is no header's name")
            if name.lower() in _FRAMING:
                raise Wrong(f"has {name}, which pgha sets itself")
            if not re.fullmatch(r"[ -~]*", item):
                raise Wrong(f"has a character in {name} that is no printable ASCII")
        return found
    return Kind(parse, f"a table of headers, whose names are words with dashes and whose values are printable ASCII; not {', '.join(sorted(_FRAMING))}", shape="table")


def program_options(*forbidden: str, program: str) -> Kind:
    """Options of one of PostgreSQL's programs: a list of names and {name = value}, or a table; ((name, value | None), …)."""
    def parse(value: Any) -> tuple[tuple[str, str | None], ...]:
        if isinstance(value, dict):
            value = [{name: item} for name, item in value.items()]
        if not isinstance(value, list):
            raise Wrong(f"is {type_name(value)}, not a list")
        out: list[tuple[str, str | None]] = []
        for number, item in enumerate(value, 1):
            if isinstance(item, str):
                name, equals, rest = item.removeprefix("--").partition("=")
                out.append((name, rest if equals else None))
            elif isinstance(item, dict) and len(item) == 1:
                name, given = next(iter(item.items()))
                if isinstance(given, (dict, list)) or given is None:
                    raise Wrong(f"has {type_name(given)} for {name}")
                if given is False:
                    continue
                out.append((name, None if given is True else given if isinstance(given, str) else shown(given)))
            else:
                raise Wrong(f"has {type_name(item)} as item {number}, neither a name nor one {{name = value}}")
        for name, given in out:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise Wrong(f"has {shown(name)}, which is no long option's name")
            if name in forbidden:
                raise Wrong(f"has {name}, which pgha sets itself")
            if program == "pg_basebackup" and name == "compress" and not (given or "").startswith("server-"):
                raise Wrong("has compress, which needs the server's side here")
        return tuple(out)
    excluded = f"; not {', '.join(forbidden)}" if forbidden else ""
    if program == "pg_basebackup":
        excluded += "; compress only as server-…"
    return Kind(parse, f'long options of {program} without dashes, as ["data-checksums", {{encoding = "UTF8"}}]{excluded}', shape="list")

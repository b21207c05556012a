"""How results are printed: the reference's table, JSON, TSV, TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: "pretty" is the reference's word for table
FORMATS = ("table", "pretty", "json", "toml", "tsv")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class Column(NamedTuple):
    """`name`: in json, toml and tsv. `heading`: in the table, if another. `right`: aligned."""

    name: str
    heading: str = ""
    right: bool = False


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, title: str = "") -> str:
    """A table in the reference's layout, the title in its upper edge. Cells may have several lines."""
    headings = [column.heading or column.name for column in columns]
    cells = [[_cell(row.get(column.name)).split("\n") for column in columns] for row in rows]
    widths = [max([len(heading), *(len(line) for row in cells for line in row[i])]) for i, heading in enumerate(headings)]
    edge = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    top = edge
    if title:
        head = f"+ {title} "
        top = head + edge[len(head):] if len(head) < len(edge) else head + "+"

    def line(parts: Sequence[str]) -> str:
        aligned = (part.rjust(width) if column.right else part.ljust(width) for part, width, column in zip(parts, widths, columns, strict=True))
        return "| " + " | ".join(aligned) + " |"

    out = [top, line(headings), edge]
    for row in cells:
        height = max(len(cell) for cell in row)
        out += [line([cell[number] if number < len(cell) else "" for cell in row]) for number in range(height)]
    return "\n".join([*out, edge])


def records(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], form: str, *, toml_name: str = "members") -> str:
    """The rows as json, tsv or toml. What a row does not have is left out, in tsv it is an empty field."""
    present = [{c.name: row[c.name] for c in columns if row.get(c.name) not in (None, "")} for row in rows]
    if form == "json":
        return json.dumps(present)
    if form == "toml":
        return to_toml({toml_name: present})
    lines = ["\t".join(column.name for column in columns)]
    lines += ["\t".join(_cell(row.get(c.name)).replace("\n", ", ").replace("\t", " ") for c in columns) for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return "\n".join(plain(f"{key}: {json.dumps(item) if isinstance(item, (dict, list, bool)) else item}") for key, item in value.items())
    return plain(str(value))


def plain(text: str) -> str:
    """Names and states come from the store: they are shown to a terminal, and do not speak to it."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def say(text: str) -> None:
    """A line of result in which names and answers of others stand."""
    print(plain(text), flush=True)


def to_toml(value: Mapping[str, Any]) -> str:
    """JSON values as TOML, keys sorted, tables after plain values. TOML has no null: such a key is a comment."""
    lines: list[str] = []
    _toml_table(value, (), lines)
    return "\n".join(lines).strip("\n")


def _toml_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    later: list[tuple[str, Any]] = []
    for key in sorted(table):
        value = table[key]
        if isinstance(value, dict) or (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
            later.append((key, value))
        elif value is None:
            lines.append(f"# {_key(key)} is null")
        else:
            lines.append(f"{_key(key)} = {_scalar(value)}")
    for key, value in later:
        header = ".".join(_key(part) for part in (*path, key))
        for item in value if isinstance(value, list) else [value]:
            brackets = f"[[{header}]]" if isinstance(value, list) else f"[{header}]"
            lines += ["", brackets]
            _toml_table(item, (*path, key), lines)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # TOML's basic strings have JSON's escapes. They forbid a bare DEL besides; and what a terminal might obey is escaped as well.
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" if c <= "\uffff" else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(item) for item in value if item is not None) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_scalar(v)}" for k, v in value.items() if v is not None) + "}"
    return repr(value)

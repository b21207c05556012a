"""A table against a Struct: every mistake in one run, each naming file, key, what is wrong, what is allowed.

A `Section` is a frozen Struct whose fields are either sections themselves or annotated with a `Key`:

    class Etcd3(Section, frozen=True, kw_only=True):
        hosts: Annotated[tuple[Address, ...], Key(addresses(2379))] = ()

Every field has a default, so that a section can be built from whatever was right; `required` says what must be there.
Rules that need several keys are the business of local.py and cluster.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from msgspec import Struct

from pgha.config.values import Kind, Wrong, printable, type_name

Path = tuple[str, ...]


class Key:
    """How one key is written. `name`: if it differs from the attribute (units); `aliases`: older names."""

    __slots__ = ("aliases", "kind", "name", "required")

    def __init__(self, kind: Kind, *, name: str = "", aliases: tuple[str, ...] = (), required: bool = False) -> None:
        self.kind = kind
        self.name = name
        self.aliases = aliases
        self.required = required


class Section(Struct, frozen=True, kw_only=True):
    """A table of the configuration. `given`: the attributes that were written, as opposed to defaults."""

    given: frozenset[str] = frozenset()

    #: keys that are known but not to be used here, and what to do instead
    REFUSED: ClassVar[Mapping[str, str]] = {}
    #: sets of keys of which at most one may be given; an environment variable for one replaces the others
    EXCLUSIVE: ClassVar[tuple[tuple[str, ...], ...]] = ()
    #: tables whose names the operator chooses: those with a `command`; (the attribute that has them all, how one is read)
    CHOSEN: ClassVar[tuple[str, Kind] | None] = None


S = TypeVar("S", bound=Section)


class Field(Struct, frozen=True, kw_only=True):
    """One key of a section, as declared: either `key` or `section`."""

    attribute: str
    name: str
    key: Key | None = None
    section: type[Section] | None = None


@cache
def fields(kind: type[Section]) -> tuple[Field, ...]:
    """The keys of `kind`, in order of declaration."""
    out = []
    for attribute, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            key = next((a for a in get_args(hint)[1:] if isinstance(a, Key)), None)
            if key is not None:
                out.append(Field(attribute=attribute, name=key.name or attribute, key=key))
        elif isinstance(hint, type) and issubclass(hint, Section):
            out.append(Field(attribute=attribute, name=attribute, section=hint))
    return tuple(out)


def every_key(kind: type[Section], path: Path = ()) -> Iterator[tuple[Path, Key, type[Section]]]:
    """Path, key and section of every key below `kind`."""
    for field in fields(kind):
        if field.section is not None:
            yield from every_key(field.section, (*path, field.name))
        elif field.key is not None:
            yield (*path, field.name), field.key, kind


class Report:
    """What is collected while reading. `strict` false: values come from others, so they are repaired, not refused.

    `sources` tells where a path was written (its longest known beginning counts); `base` stands in for the rest.
    """

    def __init__(self, base: str, *, strict: bool = True, complete: bool = True, sources: Mapping[Path, str] | None = None) -> None:
        self.base = base
        self.strict = strict
        self.complete = complete
        self.sources = sources or {}
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def where(self, path: Path) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self.sources:
                return self.sources[path[:length]]
        return self.base

    def line(self, path: Path, what: str) -> str:
        return ": ".join(part for part in (self.where(path), dotted(path), what) if part)

    def problem(self, path: Path, what: str) -> None:
        self.problems.append(self.line(path, what))

    def warn(self, path: Path, what: str) -> None:
        self.warnings.append(self.line(path, what))


def dotted(path: Path) -> str:
    return printable(".".join(part if len(part) <= 2 * LONGEST_NAME else part[:2 * LONGEST_NAME] + "…" for part in path))


#: Names are compared letter by letter: nobody's key is longer.
LONGEST_NAME = 64
#: So many faults in one table are enough to be told of.
MOST_UNKNOWN = 20


def nearest(name: str, known: list[str]) -> str:
    """The known name closest to `name`, or "" if none is close."""
    if len(name) > LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    return next((k for k in known if close and k.lower() == close[0]), "")


def unknown_key(name: str, known: list[str]) -> str:
    """What to say about a key that nobody knows."""
    close = nearest(name, known)
    return f"unknown key; did you mean {close}?" if close else f"unknown key; allowed: {', '.join(sorted(known))}"


def read(kind: type[S], raw: Any, path: Path, report: Report) -> S:
    """`raw`, a table, as `kind`. What is wrong is reported, and its default stands in."""
    if not isinstance(raw, dict):
        report.problem(path, f"is {type_name(raw)}; allowed: a table")
        return kind()
    left = dict(raw)
    values: dict[str, Any] = {}
    given = {field.attribute for field in fields(kind) if field.section is not None and field.name in raw}
    for field in fields(kind):
        if field.section is not None:
            values[field.attribute] = read(field.section, left.pop(field.name, {}), (*path, field.name), report)
        elif _read_key(field, left, path, report, values):
            given.add(field.attribute)
    for group in kind.EXCLUSIVE:
        both = [f.name for f in fields(kind) if f.name in group and f.attribute in given]
        if len(both) > 1:
            report.problem((*path, both[0]), f"is given together with {' and '.join(both[1:])}; allowed: one of them")
    known = [f.name for f in fields(kind)]
    if kind.CHOSEN is not None:
        attribute, reading = kind.CHOSEN
        values[attribute] = {name: found for name in [n for n in left if is_chosen(kind, n, left[n])] if (found := _read_chosen(reading, left.pop(name), (*path, name), report)) is not None}
    for number, name in enumerate(left):
        if number >= MOST_UNKNOWN and report.strict:
            report.problem(path, f"has {len(left) - number} more keys that are not to be here; allowed: {', '.join(sorted(known))}")
            break
        if name in kind.REFUSED:
            report.problem((*path, name), kind.REFUSED[name])
        elif report.strict:
            report.problem((*path, str(name)), unknown_key(str(name), known))
    return kind(**values, given=frozenset(given))


def is_chosen(kind: type[Section], name: str, value: Any) -> bool:
    """Is it a table of a name that the operator has chosen?"""
    return kind.CHOSEN is not None and isinstance(value, dict) and "command" in value and name not in kind.REFUSED and all(name != f.name for f in fields(kind))


def _read_chosen(reading: Kind, value: Any, here: Path, report: Report) -> Any:
    try:
        return reading.parse(value)
    except Wrong as wrong:
        report.problem(here, f"{wrong.what}; allowed: {reading.allowed}")
        return None


def _read_key(field: Field, raw: dict[Any, Any], path: Path, report: Report, values: dict[str, Any]) -> bool:
    """Move one key, or its alias, out of `raw` into `values`. Was it written (rightly or wrongly)?"""
    key = field.key
    assert key is not None, field
    written = [name for name in (field.name, *key.aliases) if name in raw]
    if not written:
        if key.required and report.complete:
            report.problem((*path, field.name), f"is missing; allowed: {key.kind.allowed}")
        return False
    value = raw[written[0]]
    for name in written:
        del raw[name]
    here = (*path, written[0])
    if len(written) > 1 and report.strict:
        report.problem(here, f"is given together with {written[1]}, another name of it; allowed: one of them")
    if value is None:
        report.problem(here, f"is null; allowed: {key.kind.allowed}")
        return False
    try:
        values[field.attribute] = key.kind.parse(value)
    except Wrong as wrong:
        what = f"{wrong.what}; allowed: {key.kind.allowed}"
        if not report.strict and wrong.repaired is not None:
            values[field.attribute] = wrong.repaired
            what += "; the rest of it counts" if isinstance(wrong.repaired, dict) else f"; used instead: {wrong.repaired}"
        report.problem(here, what)
    return True

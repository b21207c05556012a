"""One value of the configuration: what may be written, and what it means.

A `Kind` turns what TOML, JSON or an environment variable gave into a typed value, or raises `Wrong`, which says what is
wrong without ever repeating a secret. Numbers may carry units, booleans be words (compatibility spec 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

from pgha.log import scrub

Shape = Literal["scalar", "list", "table"]


class Wrong(ValueError):
    """A value that cannot be used. `repaired`: what stands in for it where others wrote it (None: the default)."""

    def __init__(self, what: str, *, repaired: Any = None) -> None:
        self.what = printable(what)
        super().__init__(self.what)
        self.repaired = repaired


class Secret:
    """A password. Printing, formatting and encoding it give '***' or fail; only `reveal()` gives the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a secret is not to be copied out of the process")


class Kind:
    """How a value is read: `parse` (raises Wrong), `allowed` (for people), `shape` (how an environment variable is split)."""

    __slots__ = ("allowed", "parse", "secret", "shape")

    def __init__(self, parse: Callable[[Any], Any], allowed: str, *, shape: Shape = "scalar", secret: bool = False) -> None:
        self.parse = parse
        self.allowed = allowed
        self.shape = shape
        self.secret = secret


def printable(text: str) -> str:
    """`text` on one line, without control characters and halves of surrogates: it goes to terminals and logs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


#: deeper than any configuration; what is read from outside must not exhaust the stack
DEEPEST = 32


def too_deep(raw: Any) -> bool:
    """Is anything nested more than DEEPEST deep? Level by level, without recursion."""
    level = [raw]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def shown(value: Any) -> str:
    """`value` for an error message: its type if it is a container, no credentials, not too long."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str():
            text = printable(scrub(value).replace("\\", "\\\\").replace('"', '\\"'))
            if "@" in text:
                text = "***@" + text.rpartition("@")[2]
            return f'"{text[:80]}…"' if len(text) > 80 else f'"{text}"'
        case list() | tuple():
            return "a list"
        case dict():
            return "a table"
        case None:
            return "null"
        case _:
            return f"a {type(value).__name__}"


def type_name(value: Any) -> str:
    """The type only, where the value must not be shown."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- text ------------------------------------------------------------------------------------------------------------

def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong(f"is {type_name(value)}, not text")
    if not value:
        raise Wrong("is empty")
    if "\0" in value or "\n" in value:
        raise Wrong("contains a line break or a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Wrong("is not UTF-8") from None
    return value


def _secret(value: Any) -> Secret:
    return Secret(_text(value))


def text(allowed: str = "text") -> Kind:
    return Kind(_text, allowed)


def secret() -> Kind:
    return Kind(_secret, "text", secret=True)


def _path(value: Any) -> str:
    path = _text(value)
    if not path.startswith("/"):
        raise Wrong(f"is {shown(path)}, a relative path")
    return path.rstrip("/") or "/"


def path() -> Kind:
    return Kind(_path, "an absolute path")


def choice(*names: str, also: dict[Any, str] | None = None) -> Kind:
    """One of `names`; `also`: other spellings of them (false for "off")."""
    def parse(value: Any) -> str:
        if isinstance(value, str) and value.lower() in (n.lower() for n in names):
            return next(n for n in names if n.lower() == value.lower())
        for spelling, name in (also or {}).items():
            if type(value) is type(spelling) and value == spelling:
                return name
        if isinstance(value, str) and also:
            try:
                return also[boolean(value)]
            except (Wrong, KeyError):
                pass
        raise Wrong(f"is {shown(value)}")
    return Kind(parse, "one of " + ", ".join(names))


# --- booleans and numbers --------------------------------------------------------------------------------------------

_WORDS = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def boolean(value: Any) -> bool:
    """True for true, 1, "on", "yes", "true", "1"; False for their opposites. Raises Wrong."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    raise Wrong(f"is {shown(value)}")


def flag() -> Kind:
    return Kind(boolean, "true, false, on, off, yes or no")


_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*([A-Za-z]*)\s*")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
#: larger than any size or duration that can be meant, small enough for 64 bits and exact in a float of whole numbers
_LARGEST = 1 << 53
#: what a duration may be unless its key says less: ten years fit into nanoseconds of 64 bits
_LONGEST_S = 10 * 365 * 86400.0
_BYTES = {"B": 1, "kB": 1 << 10, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def _number(value: Any, units: dict[str, float] | dict[str, int]) -> float:
    """`value` in the base unit; Wrong if it is no number or its unit is none of `units`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Wrong(f"is {shown(value)}, not a number")
    if not isinstance(value, str):
        if isinstance(value, float) and not math.isfinite(value):
            raise Wrong(f"is {value}, not a number")
        if abs(value) > _LARGEST:
            raise Wrong("is far too large")
        return value
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise Wrong(f"is {shown(value)}, not a number")
    if len(match[1]) > len(str(_LARGEST)):
        raise Wrong(f"is {shown(value)}, far too long a number")
    if not match[2]:
        return float(match[1]) if "." in match[1] else int(match[1])
    if match[2] not in units:
        raise Wrong(f"is {shown(value)}, whose unit is none of {', '.join(units)}" if units else f"is {shown(value)}, not a plain number")
    return float(match[1]) * units[match[2]]


def plain(number: float) -> str:
    """A number as people write it: 86400, 0.25."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def _bounded(number: float, minimum: float | None, maximum: float | None, unit: str, typed: Any) -> Any:
    if minimum is not None and number < minimum:
        raise Wrong(f"is {plain(number)}{unit}, below the minimum", repaired=typed(minimum))
    if maximum is not None and number > maximum:
        raise Wrong(f"is {plain(number)}{unit}, above the maximum", repaired=typed(maximum))
    return typed(number)


def _range(minimum: float | None, maximum: float | None, unit: str) -> str:
    if maximum is not None:
        return f" from {plain(minimum or 0)}{unit} to {plain(maximum)}{unit}"
    return "" if minimum is None else f", at least {plain(minimum)}{unit}"


def integer(minimum: int | None = None, maximum: int | None = None) -> Kind:
    def parse(value: Any) -> int:
        number = _number(value, {})
        if number != int(number):
            raise Wrong(f"is {shown(value)}, not a whole number", repaired=int(number))
        return int(_bounded(number, minimum, maximum, "", int))
    return Kind(parse, "a whole number" + _range(minimum, maximum, ""))


def duration(minimum: float | None = None, maximum: float | None = None, *, whole: bool = False) -> Kind:
    """Seconds, as float. Units us, ms, s, min, h, d; without one: seconds. `whole`: no fractions of a second."""
    def parse(value: Any) -> float:
        number = _number(value, _SECONDS)
        if number > _LONGEST_S:
            raise Wrong(f"is {shown(value)}, more than ten years", repaired=float(maximum or _LONGEST_S))
        if whole and number != int(number):
            raise Wrong(f"is {shown(value)}, not whole seconds", repaired=float(max(int(number), minimum or 0)))
        return float(_bounded(number, minimum, maximum, " s", float))
    allowed = ("whole seconds" if whole else "seconds") + _range(minimum, maximum, " s") + ', or with a unit (ms, s, min, h, d), as "30s"'
    return Kind(parse, allowed)


def size(minimum: int | None = None) -> Kind:
    """Bytes, as int. Units B, kB, MB, GB, TB in powers of 1024; without one: bytes."""
    def parse(value: Any) -> int:
        number = _number(value, _BYTES)
        if number != int(number):
            raise Wrong(f"is {shown(value)}, not whole bytes", repaired=int(number))
        return int(_bounded(number, minimum, None, " bytes", int))
    return Kind(parse, "bytes" + _range(minimum, None, "") + ', or with a unit (kB, MB, GB, TB), as "1MB"')

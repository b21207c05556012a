"""PostgreSQL's parameters: what a server says of each, and what a text means as its value.

Facts come from pg_settings, or, without a running server, from `postgres --describe-config`, which tells neither units
nor choices (postgres/gucs.py).
"""

from __future__ import annotations

import re
from decimal import Decimal

from msgspec import Struct

SettingValue = str | int | float | bool


class Guc(Struct, frozen=True, kw_only=True):
    """One parameter. `vartype`: bool, integer, real, string, enum. `unit`, `minimum`, `maximum`, `choices`: empty if not told."""

    name: str
    vartype: str
    context: str
    unit: str = ""
    minimum: str = ""
    maximum: str = ""
    choices: tuple[str, ...] = ()
    #: pg_settings only: the value, where it comes from, and that a file says otherwise, which only a restart will apply
    value: str = ""
    shown: str = ""
    source: str = ""
    file: str = ""
    line: int = 0
    default: str = ""
    pending: bool = False


class GucFacts(Struct, frozen=True, kw_only=True):
    """Every parameter by its name in lower case. `running`: a server told it, else its program. `version`: 15; 0: unknown."""

    of: dict[str, Guc]
    version: int = 0
    running: bool = False


def setting_text(value: SettingValue) -> str:
    """A value from TOML or JSON as PostgreSQL is told it: true → "on", 100 → "100"."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


#: A parameter of text may hold anything; of these nobody can tell what else than a secret.
_SECRETIVE = re.compile(r"_command$|conninfo$|passw|passphrase|secret|token", re.IGNORECASE)


def may_hold_secrets(name: str) -> bool:
    """Commands and connection strings, and what sounds like one: values that are not for everybody who may ask."""
    return _SECRETIVE.search(name) is not None


def is_plain(guc: Guc | None) -> bool:
    """Its values are numbers or words of a fixed list: no secret can be among them."""
    return guc is not None and guc.vartype in ("bool", "integer", "real", "enum")


def truth(text: str) -> bool | None:
    """PostgreSQL's reading: unambiguous prefixes of true, false, yes, no; on, off; 1, 0."""
    word = text.strip().lower()
    if word in ("on", "1") or (word and ("true".startswith(word) or "yes".startswith(word))):
        return True
    if word in ("off", "of", "0") or (word and ("false".startswith(word) or "no".startswith(word))):
        return False
    return None


#: unit → (kind, size in the kind's base unit: bytes, or milliseconds)
UNITS: dict[str, tuple[str, Decimal]] = {
    "B": ("bytes", Decimal(1)), "kB": ("bytes", Decimal(1024)), "MB": ("bytes", Decimal(1024**2)),
    "GB": ("bytes", Decimal(1024**3)), "TB": ("bytes", Decimal(1024**4)),
    "us": ("ms", Decimal("0.001")), "ms": ("ms", Decimal(1)), "s": ("ms", Decimal(1000)), "min": ("ms", Decimal(60_000)),
    "h": ("ms", Decimal(3_600_000)), "d": ("ms", Decimal(86_400_000)),
}
#: No power of ten that a computation could not bear (1e999999999GB is a number, but not for long).
_QUANTITY = re.compile(r"\s*([+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]{1,4})?|\.[0-9]+))\s*([A-Za-z]*)\s*")
#: Longer texts are nobody's numbers, and costly: a million hexadecimal digits take a minute and a half.
_LONGEST_QUANTITY = 200


def _unit(text: str) -> tuple[str, Decimal] | None:
    """A unit of pg_settings, which may have a factor: "8kB" → ("bytes", 8192)."""
    match = re.fullmatch(r"(\d*)([A-Za-z]+)", text)
    if match is None or match[2] not in UNITS:
        return None
    kind, size = UNITS[match[2]]
    return kind, size * int(match[1] or 1)


def units_of(base_unit: str) -> tuple[str, ...]:
    """Which units a parameter of this one takes: "8kB" → B, kB, MB, GB, TB."""
    base = _unit(base_unit)
    return tuple(name for name, (kind, _) in UNITS.items() if base is not None and kind == base[0])


def parse_quantity(text: str, base_unit: str | None) -> Decimal | None:
    """A number in the setting's own unit: ("64MB", "8kB") → 8192, ("8192", "8kB") → 8192. None if it is none."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST_QUANTITY else None
    if match is None:
        return None
    if re.fullmatch(r"0[0-7]+", match[1]):
        number = Decimal(int(match[1], 8))      # file modes
    else:
        number = Decimal(int(match[1], 16)) if "x" in match[1].lower() else Decimal(match[1])
    if not match[2]:
        return number
    given, base = _unit(match[2]), _unit(base_unit) if base_unit else None
    if given is None or base is None or given[0] != base[0]:
        return None
    return number * given[1] / base[1]


def same_value(a: str, b: str, *, vartype: str, unit: str | None) -> bool:
    """Do two texts mean the same value of a setting of this pg_settings.vartype and unit?"""
    if a == b:
        return True
    if vartype == "bool":
        return (left := truth(a)) is not None and left == truth(b)
    if vartype == "integer":
        x, y = parse_quantity(a, unit), parse_quantity(b, unit)
        # PostgreSQL rounds a converted value to a whole number of its unit.
        return x is not None and y is not None and whole(x) == whole(y)
    if vartype == "real":
        x, y = parse_quantity(a, unit), parse_quantity(b, unit)
        return x is not None and x == y
    if vartype == "enum":
        return a.lower() == b.lower()
    return False


def whole(number: Decimal) -> Decimal:
    """Rounded as PostgreSQL rounds an integer parameter; what is far beyond all of them stays as it is."""
    return number.to_integral_value() if number.adjusted() < 24 else number

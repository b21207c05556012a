"""What is wrong with a change of the shared configuration, and what will it do to PostgreSQL on one member?

Two judges: the typed schema (cluster.py), and, for PostgreSQL's parameters, PostgreSQL itself: what its server says of each
(`refusal`), and what its program refuses (asked by act/vet.py). Only what a change changes is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from msgspec import Struct

from pgha.config.cluster import validate_change
from pgha.config.schema import nearest
from pgha.config.values import printable, shown
from pgha.log import scrub
from pgha.model.gucs import Guc, GucFacts, parse_quantity, truth, units_of, whole

#: Where `/config` has settings of PostgreSQL.
SECTIONS = ("parameters", "recovery_conf")
_UNKNOWN = "unrecognized configuration parameter"


class Judgement(Struct, frozen=True, kw_only=True):
    """Of one member. `asked`: who told of PostgreSQL's parameters: "server" (the running one), "program", "" (nobody).

    `restart`: what a restart will change once this is applied: parameter → (running value, wanted value).
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    restart: dict[str, tuple[str, str]] = {}
    asked: str = ""
    version: int = 0


def by_schema(old: dict[str, Any] | None, new: Any) -> Judgement:
    """Without PostgreSQL."""
    return Judgement(problems=tuple(validate_change(old, new)))


def changed_settings(old: Any, new: Any) -> dict[str, tuple[str, str]]:
    """PostgreSQL's settings that `new` sets to something else than `old`: lower-case name → (section, name as written)."""
    changed = {}
    for section in SECTIONS:
        before, after = _settings(old, section), _settings(new, section)
        for name, value in after.items():
            if name not in before or type(before[name]) is not type(value) or before[name] != value:
                changed[name.lower()] = (section, name)
    return changed


def _settings(config: Any, section: str) -> Mapping[str, Any]:
    postgresql = config.get("postgresql") if isinstance(config, dict) else None
    settings = postgresql.get(section) if isinstance(postgresql, dict) else None
    return settings if isinstance(settings, dict) else {}


def line(where: tuple[str, str], what: str) -> str:
    """A problem, as the schema's read."""
    return f"/config: postgresql.{where[0]}.{where[1]}: {what}"


def refusals(settings: Mapping[str, str], facts: GucFacts) -> dict[str, str]:
    """What the server's facts say against `settings`; what they do not know is left to the program, or to the extension.
    The program tells no units."""
    if not facts.running:
        return {}
    found = {}
    for name, value in settings.items():
        guc = facts.of.get(name.lower())
        if guc is not None and (why := refusal(value, guc)):
            found[name] = why
    return found


def in_our_words(why: str, name: str, facts: GucFacts) -> str:
    """The program's words, and for an unknown name the nearest that it knows."""
    version = f"PostgreSQL {facts.version}" if facts.version else "PostgreSQL"
    if not why.startswith(_UNKNOWN):
        return f"{version} refuses it: {printable(scrub(why))}"
    close = nearest(name, [guc.name for guc in facts.of.values()])
    return f"is no parameter of {version}" + (f"; did you mean {close}?" if close else "")


def refusal(text: str, guc: Guc) -> str:
    """What a server would say against this value, by its own row of pg_settings, with what is allowed; "" if nothing, or if only
    the program knows."""
    if guc.context == "internal":
        return "cannot be set: the server computes it; allowed: leave it out"
    if guc.vartype == "bool":
        return "" if truth(text) is not None else f"is {shown(text)}; allowed: on or off"
    if guc.vartype == "enum":
        if not guc.choices or text.lower() in (choice.lower() for choice in guc.choices) or truth(text) is not None:
            return ""       # some take also on and off, which the server does not list
        return f"is {shown(text)}; allowed: one of {', '.join(guc.choices)}"
    if guc.vartype in ("integer", "real"):
        return _out_of_range(text, guc)
    return ""


def _out_of_range(text: str, guc: Guc) -> str:
    units = units_of(guc.unit) if guc.unit else ()
    allowed = f"; allowed: a number{f' from {guc.minimum} to {guc.maximum}' if guc.minimum and guc.maximum else ''}"
    allowed += f", in {guc.unit} or with a unit ({', '.join(units)})" if units else ""
    number = parse_quantity(text, guc.unit or None)
    if number is None:
        return f"is {shown(text)}, which is no number of this kind{allowed}"
    if guc.vartype == "integer":
        number = whole(number)
    try:
        least, most = Decimal(guc.minimum or "-Infinity"), Decimal(guc.maximum or "Infinity")
    except ArithmeticError:
        return ""
    return "" if least <= number <= most else f"is {shown(text)}, out of range{allowed}"



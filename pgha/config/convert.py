"""What becomes of each key of a Patroni configuration: carried, changed, dropped, or missing here?

    carried   it stands in pgha.toml as it was
    changed   under another name or with another value, which means here what the old one meant there
    dropped   it has no meaning here, or had none there
    missing   pgha's schema does not know it, or not this value: whoever relies on it must know before they switch over

The schema decides (local.py, cluster.py): what it comes to know is carried from then on. Tables here hold only what the
schema cannot know: what a key meant to Patroni. "Key" means what is no table itself; each is in `lines` exactly once.

Rules of this file:
* nothing is left out without a line.
* no line shows a value of the file, whatever its key: commands hold credentials, and a line that lost its place may hold a
  password. Only values that are put in place of the file's are shown.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from pgha.config import gucs, slots, values
from pgha.config.cluster import BASEBACKUP, ClusterConfig, ClusterPostgresql, unsupported
from pgha.config.local import CLUSTER_WIDE, INITDB, Etcd3, LocalConfig, PostgresUser, no_sslpassword
from pgha.config.patroni_file import PatroniFile, leaves
from pgha.config.programs import command
from pgha.config.schema import Field, Path, Section, dotted, fields, is_chosen, nearest
from pgha.config.values import Kind, Wrong, boolean, plain, shown, type_name


class Fate(enum.Enum):
    """What became of a key."""

    CARRIED = "carried"
    CHANGED = "changed"
    DROPPED = "dropped"
    MISSING = "missing"


class Line(Struct, frozen=True, kw_only=True):
    """One key's fate. `key`: its path, and the variable that gave it; `to`: its new name, its new value, or name = value."""

    fate: Fate
    key: str
    to: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.fate.value:<8} {self.key}{f' → {self.to}' if self.to else ''}{f': {self.why}' if self.why else ''}"


class Conversion(Struct, frozen=True, kw_only=True):
    """pgha's configuration as TOML has it, what became of each key, and what is to be known of the whole."""

    raw: dict[str, Any]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def of(self, fate: Fate) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.fate is fate)


# --- what keys meant to Patroni --------------------------------------------------------------------------------------

_NO_POOL = "pgha has no thread pool"
_AS_THERE = "Patroni reads it only from the cluster's configuration, and so does pgha"
#: Keys without a meaning here, and why.
DROPPED: dict[Path, str] = {
    ("thread_pool_size",): _NO_POOL, ("thread_stack_size",): _NO_POOL, ("restapi", "thread_pool_size"): _NO_POOL,
    ("watchdog", "driver"): "there is one driver",
    ("log", "deduplicate_heartbeat_logs"): "there are no heartbeat lines; a line is written when a decision changes",
    ("log", "traceback_level"): "an operating error is one line; a traceback is a mistake of pgha's, and always logged",
    ("bootstrap", "users"): "Patroni 4 does not read it any more; post_bootstrap can make users",
    ("postgresql", "use_slots"): _AS_THERE,
    **{(name,): _AS_THERE for name, text in LocalConfig.REFUSED.items()
       if text == CLUSTER_WIDE and "slots" not in name.removeprefix("member_slots") and name != "pause"},
    **{("bootstrap", "dcs", "postgresql", name): "Patroni takes it only from a node's own file"
       for name, text in ClusterPostgresql.REFUSED.items() if "known only to the node" in text},
}
#: Switches whose off is what pgha does anyway.
OFF_IS_HERE: frozenset[Path] = frozenset({
    ("postgresql", "use_unix_socket_repl"), ("etcd3", "use_proxies"),
    ("bootstrap", "dcs", "postgresql", "use_unix_socket_repl"),
})
#: Names that Patroni still takes, and their successors.
RENAMED = {"create_replica_method": "create_replica_methods"}
#: What Patroni runs with where the cluster's value of a parameter that it controls is unusable (compatibility spec 5.5).
PARAMETER_DEFAULTS: dict[str, Any] = {
    "max_connections": 100, "max_wal_senders": 10, "wal_keep_segments": 8, "wal_keep_size": "128MB", "max_prepared_transactions": 0,
    "max_locks_per_transaction": 64, "max_replication_slots": 10, "max_worker_processes": 8, "wal_level": "replica",
    "track_commit_timestamp": "off", "wal_log_hints": "on", "hot_standby": "on",
}
#: Keys that name tables beside them.
METHODS: frozenset[Path] = frozenset({("postgresql", "create_replica_methods"), ("bootstrap", "dcs", "postgresql", "create_replica_methods"), ("bootstrap", "method")})
#: Numbers of the cluster's configuration in which Patroni takes no unit: what it runs with where one has one.
WITHOUT_UNIT: dict[str, int] = {"maximum_lag_on_failover": 1048576, "maximum_lag_on_syncnode": -1, "primary_start_timeout": 300, "primary_stop_timeout": 0}
#: Switches that are on for Patroni with any text that is not empty, whatever it says.
ON_BY_ANY_TEXT: frozenset[Path] = frozenset({
    *(("tags", name) for name in ("nofailover", "nosync", "noloadbalance", "clonefrom")),
    *((*at, name) for at in (("postgresql",), ("bootstrap", "dcs", "postgresql"))
      for name in ("use_pg_rewind", "remove_data_directory_on_rewind_failure", "remove_data_directory_on_diverged_timelines", "use_unix_socket")),
})
#: What Patroni takes in the place of etcd's `host`, if it is given. (Of url and hosts together it takes something of both.)
BEFORE_HOST = ("hosts", "url")
#: Keys whose empty text is no value to Patroni either, beside all paths and commands.
EMPTY_IS_NONE: frozenset[Path] = frozenset({("log", "dateformat")})
#: Names of levels that Python has twice.
SAME_LEVEL = {"WARN": "WARNING", "FATAL": "CRITICAL"}
_TIMING = ("ttl", "loop_wait", "retry_timeout")
ETCD_V2 = ("etcd: Patroni used etcd's v2 API, pgha uses v3, which does not see the keys that v2 wrote: "
           "before pgha takes this cluster over, let Patroni itself use etcd3")
BOOTSTRAP = ("bootstrap.dcs counts only when a cluster is made; an existing one's configuration is in the store, where pgha reads it "
             "(see `pgha ctl show-config`)")


def convert(source: PatroniFile) -> Conversion:
    """All of `source`. Never fails: what cannot be carried is missing."""
    return _Converter(source).all()


class _Converter:
    def __init__(self, source: PatroniFile) -> None:
        self._source = source
        self._out: dict[str, Any] = {}
        self._lines: list[Line] = []

    def all(self) -> Conversion:
        raw = dict(self._source.raw)
        old_etcd = raw.get("etcd")
        if isinstance(old_etcd, dict) and "etcd3" not in raw:
            del raw["etcd"]
            self._open(old_etcd, ("etcd",), ("etcd3",))
            self._section(Etcd3, old_etcd, ("etcd",), ("etcd3",))
        self._section(LocalConfig, raw, (), ())
        for path, variable in self._source.replaced.items():
            self._line(Fate.DROPPED, path, why=f"{variable} replaces what stands in the file")
        for variable in self._source.unknown:
            self._lines.append(Line(fate=Fate.MISSING, key=variable, why="no variable that is known"))
        notes = [note for note, applies in ((ETCD_V2, "etcd" not in raw and "etcd" in self._source.raw), (BOOTSTRAP, "dcs" in self._out.get("bootstrap", {}))) if applies]
        return Conversion(raw=self._out, lines=tuple(self._lines), notes=tuple(notes))

    # --- writing down ------------------------------------------------------------------------------------------------

    def _line(self, fate: Fate, path: Path, *, to: str = "", why: str = "") -> None:
        variable = self._source.variables.get(path)
        self._lines.append(Line(fate=fate, key=dotted(path) + (f" ({variable})" if variable else ""), to=to, why=why))

    def _all_lines(self, fate: Fate, path: Path, value: Any, why: str) -> None:
        for leaf in leaves(value, path):
            self._line(fate, leaf, why=why)

    def _set(self, to: Path, value: Any) -> None:
        table = self._out
        for part in to[:-1]:
            table = table.setdefault(part, {})
        table[to[-1]] = value

    def _carry(self, path: Path, to: Path, original: Any, value: Any, why: str = "", *, show: bool = False) -> None:
        """Put `value` at `to`, and say for each key of `original` whether that is what it was."""
        self._set(to, value)
        notes = [note for note in (why, "it is etcd's v3 API" if path[0] == "etcd" else "", "its present name" if path[-1] != to[-1] else "") if note]
        for leaf in leaves(original, path):
            renamed = dotted((*to, *leaf[len(path):])) if path != to else ""
            became = shown(value) if show else ""
            target = " = ".join(part for part in (renamed, became) if part)
            self._line(Fate.CHANGED if notes else Fate.CARRIED, leaf, to=target, why="; ".join(notes))

    # --- one table ---------------------------------------------------------------------------------------------------

    def _section(self, kind: type[Section], raw: dict[str, Any], path: Path, to: Path) -> None:
        names = {name: known for known in fields(kind) for name in (known.name, *(known.key.aliases if known.key else ()))}
        for name, value in raw.items():
            here = (*path, name)
            known = names.get(name) or names.get(RENAMED.get(name, ""))
            if known is None:
                self._unknown(kind, value, here, to, raw)
            elif value is None or (value == "" and known.key is not None and known.key.kind.allowed in _PATHS_AND_COMMANDS):
                self._line(Fate.DROPPED, here, why="is empty")
            elif known.section is not None:
                self._inner_section(known.section, value, here, (*to, known.name))
            elif here == ("bootstrap", "dcs") and isinstance(value, dict):
                self._open(value, here, here)
                self._cluster(value, here)
            elif other := _taken_instead(here, raw):
                self._all_lines(Fate.DROPPED, here, value, f"is given together with {other}, which Patroni takes in its place")
            elif other := self._given_with(kind, known, name, raw):
                self._all_lines(Fate.MISSING, here, value, f"is given together with {other}; allowed: one of them")
            else:
                self._key(kind, known, value, here, (*to, known.name))

    def _inner_section(self, kind: type[Section], value: Any, here: Path, to: Path) -> None:
        if isinstance(value, dict):
            self._open(value, here, to)
            self._section(kind, value, here, to)
        else:
            self._all_lines(Fate.MISSING, here, value, f"is {type_name(value)}; allowed: a table")

    def _open(self, value: dict[str, Any], here: Path, to: Path) -> None:
        """Begin a table. Also an empty one may mean something, as [bootstrap] does."""
        self._set(to, {})
        if not value:
            self._line(Fate.CARRIED, here)

    def _given_with(self, kind: type[Section], known: Field, name: str, raw: dict[str, Any]) -> str:
        """The key before `name` in `raw` that excludes it, or ""."""
        assert known.key is not None, known
        rivals = {known.name, *known.key.aliases, *(old for old, new in RENAMED.items() if new == known.name)}
        rivals |= {rival for group in kind.EXCLUSIVE if known.name in group for rival in group}
        for earlier, value in raw.items():
            if earlier == name:
                break
            if earlier in rivals and value is not None and not (kind is Etcd3 and _taken_instead(("etcd3", earlier), raw)):
                return earlier
        return ""

    def _unknown(self, kind: type[Section], value: Any, here: Path, to: Path, raw: dict[str, Any]) -> None:
        """A key that the schema has no place for."""
        name = here[-1]
        if value in (None, {}, []) or (value == "" and here in EMPTY_IS_NONE):
            self._line(Fate.DROPPED, here, why="is empty")
        elif here == ("postgresql", "name"):
            self._name(value, here)
        elif here in DROPPED:
            self._all_lines(Fate.DROPPED, here, value, DROPPED[here])
        elif (*to, name) in OFF_IS_HERE and _off(value):
            self._line(Fate.DROPPED, here, why="off is what pgha does")
        elif here == ("etcd",):
            self._all_lines(Fate.MISSING, here, value, "etcd3 is given, too; allowed: the one that is used")
        elif kind.CHOSEN is not None and is_chosen(kind, name, value):
            self._chosen(kind.CHOSEN[1], value, here, (*to, name))
        elif name in kind.REFUSED:
            self._all_lines(Fate.MISSING, here, value, kind.REFUSED[name].removesuffix("; allowed: leave it out"))
        elif _is_method(here, raw):
            self._all_lines(Fate.MISSING, here, value, "belongs to a method without a command; allowed: command, as an absolute path")
        else:
            close = nearest(name, [known.name for known in fields(kind)])
            self._all_lines(Fate.MISSING, here, value, "unknown key" + (f"; did you mean {close}?" if close else ""))

    def _name(self, value: Any, here: Path) -> None:
        """The member's, at a place where Patroni looks for it if there is none at the top."""
        if self._source.raw.get("name"):
            self._all_lines(Fate.DROPPED, here, value, "name is given at the top, which Patroni takes in its place")
        else:
            (known,) = (known for known in fields(LocalConfig) if known.name == "name")
            assert known.key is not None
            self._judged(known.key.kind, value, here, ("name",))

    # --- one key -----------------------------------------------------------------------------------------------------

    def _key(self, kind: type[Section], known: Field, value: Any, path: Path, to: Path) -> None:
        assert known.key is not None, known
        reading = known.key.kind
        if kind is ClusterConfig and known.name in unsupported(ClusterConfig.from_json({known.name: value}, patroni_member_present=False)[0]):
            self._all_lines(Fate.MISSING, path, value, "not supported yet by this version")
        elif kind is ClusterConfig and known.name == "ignore_slots" and (fault := next((f for _, f in slots.faults({"ignore_slots": value}, strict=True)), "")):
            self._all_lines(Fate.MISSING, path, value, f"has an entry that {_quotes_nothing(fault)}")
        elif kind is PostgresUser and known.name == "sslpassword" and (fault := self._no_sslpassword(to)):
            self._all_lines(Fate.MISSING, path, value, fault)
        elif reading.shape == "table" and isinstance(value, dict) and value:
            for name, item in value.items():
                self._item(reading, name, item, (*path, name), (*to, name))
        elif to in METHODS and (one := self._without_table(reading, value, path)):
            self._all_lines(Fate.MISSING, path, value, f"names {one} that has no table with a command in it; allowed: names of such tables, and what pgha itself can")
        elif kind is ClusterConfig and known.name in WITHOUT_UNIT and _has_unit(reading, value):
            self._carry(path, to, value, WITHOUT_UNIT[known.name], "has a unit, with which Patroni takes its default instead", show=True)
        elif without := self._without_effect(path, to):
            self._all_lines(Fate.DROPPED, path, value, f"has no effect without {without}")
        else:
            self._judged(reading, value, path, to)

    def _judged(self, reading: Kind, value: Any, path: Path, to: Path, *, name: str | None = None) -> None:
        """Carried if `reading` takes it, or takes what it plainly means; `name`: as an item of a table (None: for itself)."""
        if to in ON_BY_ANY_TEXT and isinstance(value, str) and value and _off(value):
            self._carry(path, to, value, True, "is text, which Patroni takes for true whatever it says", show=True)
            return
        faults = []
        for candidate, why in _spellings(value, secret=reading.secret, path=to):
            try:
                if fault := _not_for_toml(candidate):
                    raise Wrong(fault)
                reading.parse(candidate if name is None else {name: candidate})
            except Wrong as wrong:
                faults.append(f"{_quotes_nothing(wrong.what)}; allowed: {reading.allowed}")
                continue
            self._carry(path, to, value, candidate, why, show=why in _SHOWN)
            return
        self._all_lines(Fate.MISSING, path, value, faults[0])

    def _chosen(self, reading: Kind, value: dict[str, Any], path: Path, to: Path) -> None:
        """The table of a method, of a name of the operator's own."""
        for name, item in value.items():
            if item is None:
                self._line(Fate.DROPPED, (*path, name), why="is empty")
        self._judged(reading, {name: item for name, item in value.items() if item is not None}, path, to)

    def _item(self, reading: Kind, name: str, value: Any, path: Path, to: Path) -> None:
        """One entry of a table whose names are free: tags, parameters, loggers."""
        shared = path[:2] == ("bootstrap", "dcs")
        table, lower = path[-2], name.lower()
        if to[:-1] == ("bootstrap", "dcs", "slots") and (fault := next((f for _, f in slots.faults({"slots": {name: value}}, strict=True)), "")):
            self._all_lines(Fate.MISSING, path, value, _quotes_nothing(fault).removesuffix("; allowed: leave it out"))
        elif value is None and to[:-1] == ("bootstrap", "dcs", "slots"):
            self._carry(path, to, value, {"type": "physical"}, "an empty slot is a physical one", show=True)
        elif value is None:
            self._line(Fate.DROPPED, path, why="is empty")
        elif table == "parameters" and lower in gucs.FORCED:
            self._all_lines(Fate.DROPPED, path, value, "pgha sets it itself")
        elif table == "parameters" and lower in gucs.CONTROLLED and not shared:
            self._all_lines(Fate.DROPPED, path, value, "is the same on all nodes; " + _AS_THERE)
        elif table == "parameters" and shared and (fault := gucs.problem(name, value)):
            self._carry(path, to, value, PARAMETER_DEFAULTS[lower], f"{_quotes_nothing(fault)}; Patroni uses this instead", show=True)
        elif table == "loggers" and lower.split(".")[0] == "patroni":
            self._line(Fate.DROPPED, path, why="names a part of Patroni")
        elif table == "recovery_conf" and (lower.startswith("recovery_target") or lower in ("primary_conninfo", "primary_slot_name", "standby_mode")):
            self._all_lines(Fate.DROPPED, path, value, "Patroni sets it itself, and so does pgha")
        else:
            self._judged(reading, value, path, to, name=name)

    def _no_sslpassword(self, to: Path) -> str:
        users = self._source.raw["postgresql"]["authentication"]
        return no_sslpassword(to[-2], superuser_rewinds=not users.get("rewind"))

    def _without_table(self, reading: Kind, value: Any, path: Path) -> str:
        """Which method has no command of its own, by its place; "": all have one. (What cannot be read is `_judged`.)"""
        names: Any = ()
        for candidate, _ in _spellings(value, secret=False, path=path):
            try:
                names = reading.parse(candidate)
                break
            except Wrong:
                continue
        # A node's own table and the cluster's are one to Patroni, and here.
        places = (("bootstrap",),) if isinstance(names, str) else (("postgresql",), ("bootstrap", "dcs", "postgresql"))
        tables = {name for place in places for name, table in self._table(place).items() if isinstance(table, dict) and "command" in table}
        if isinstance(names, str):
            return "" if names in tables | {INITDB} else "a method"
        return next((f"a method (number {n})" for n, name in enumerate(names, 1) if name not in tables | {BASEBACKUP}), "")

    def _table(self, path: Path) -> dict[str, Any]:
        """What stands there in the file; empty if it is no table."""
        table: Any = self._source.raw
        for part in path:
            table = table.get(part) if isinstance(table, dict) else None
        return table if isinstance(table, dict) else {}

    def _without_effect(self, path: Path, to: Path) -> str:
        """What this key needs to mean anything, to Patroni as well, and has not got; or ""."""
        section = self._source.raw.get(path[0])
        if not isinstance(section, dict):
            return ""
        if to in (("etcd3", "cacert"), ("etcd3", "cert"), ("etcd3", "key")):
            return "" if str(section.get("url") or section.get("protocol")).lower().startswith("https") else "protocol: https"
        if to in (("restapi", "keyfile"), ("restapi", "keyfile_password"), ("restapi", "verify_client"), ("ctl", "keyfile"), ("ctl", "keyfile_password")):
            return "" if section.get("certfile") else "certfile"
        return ""

    # --- bootstrap.dcs -----------------------------------------------------------------------------------------------

    def _cluster(self, raw: dict[str, Any], at: Path) -> None:
        timing = {name: raw[name] for name in _TIMING if raw.get(name) is not None}
        unusable = {name: value for name, value in timing.items() if not _is_whole(value)}
        for name, value in unusable.items():
            self._all_lines(Fate.MISSING, (*at, name), value, "is no whole number of seconds, so that Patroni takes neither the timings nor postgresql of this table; allowed: a number")
        self._timing({name: value for name, value in timing.items() if name not in unusable}, at)
        self._section(ClusterConfig, {name: value for name, value in raw.items() if name not in timing}, at, at)

    def _timing(self, given: dict[str, Any], at: Path) -> None:
        """ttl, loop_wait and retry_timeout as Patroni uses them: raised to its minimum, and repaired to fit each other."""
        config, problems = ClusterConfig.from_json(given, patroni_member_present=True)
        used = {"ttl": config.ttl_s, "loop_wait": config.loop_wait_s, "retry_timeout": config.retry_timeout_s}
        defaults = ClusterConfig()
        implied = {name: int(value) for name, value in used.items() if name not in given and value != getattr(defaults, f"{name}_s")}
        for number, (name, value) in enumerate(given.items()):
            whole = int(used[name])
            beside = " and ".join(f"{other} = {plain(seconds)}" for other, seconds in implied.items()) if number == 0 else ""
            if value == whole and not beside:
                self._carry((*at, name), (*at, name), value, value)
            else:
                faults = [_quotes_nothing(problem).removeprefix("/config: ") for problem in problems]
                own = [fault for fault in faults if fault.startswith(f"{name}: ")] or [fault for fault in faults if "used instead" in fault]
                why = "; ".join(own) or "plain seconds"
                self._carry((*at, name), (*at, name), value, whole, f"{f'with {beside} beside it, ' if beside else ''}as Patroni takes it ({why})", show=value != whole)
        for name, seconds in implied.items():
            self._set((*at, name), seconds)


def _is_method(here: Path, raw: dict[str, Any]) -> bool:
    """Is this the table of a method for making a replica, or the cluster, that the same section names?"""
    methods = raw.get("create_replica_methods") or raw.get("create_replica_method") or () if here[-2:-1] == ("postgresql",) else raw.get("method")
    return here[-1] in ([methods] if isinstance(methods, str) else methods if isinstance(methods, (list, tuple)) else ())


def _quotes_nothing(what: str) -> str:
    """What is wrong with a value, without the value: `shown` has put it into quotes."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', '"…"', what)


def _off(value: Any) -> bool:
    try:
        return not boolean(value)
    except Wrong:
        return False


_PATHS_AND_COMMANDS = frozenset({values.path().allowed, command().allowed})
_EVERY_ADDRESS, _BRACKETS, _LEVEL = "no host is every address", "an IPv6 address stands in brackets", "the same level"
#: Whys of values that are put in place of others, and may be shown: addresses and levels.
_SHOWN = frozenset({_EVERY_ADDRESS, _BRACKETS, _LEVEL})


def _spellings(value: Any, *, secret: bool, path: Path) -> Iterator[tuple[Any, str]]:
    """`value`, and what it plainly means where the schema is stricter than Patroni: with why that is the same."""
    yield value, ""
    if type(value) in (int, float):
        yield str(value), "a number to YAML, perhaps not as it was typed (0123 is 83); Patroni, too, takes the number's digits for the text"
    elif not isinstance(value, str):
        return
    elif path[-1] in ("listen", "connect_address") and ":" in value:
        yield from _address(value, everywhere=path == ("restapi", "listen"))
    elif path[0] == "log" and value.upper() in SAME_LEVEL:
        yield SAME_LEVEL[value.upper()], _LEVEL
    elif value.endswith("\n") and not secret:
        yield value.rstrip("\n"), "without the line's end"


def _address(value: str, *, everywhere: bool) -> Iterator[tuple[str, str]]:
    """Hosts and port as Patroni takes them apart: the port is what follows the last colon. `everywhere`: no host is every
    address (to PostgreSQL it would be none)."""
    hosts, _, port = value.rpartition(":")
    if everywhere and not hosts:
        yield f"*:{port}", _EVERY_ADDRESS
    parts = [part.strip() for part in hosts.split(",")]
    if any(":" in part for part in parts):
        yield ",".join(f"[{part}]" if ":" in part and not part.startswith("[") else part for part in parts) + f":{port}", _BRACKETS


def _is_whole(value: Any) -> bool:
    """Does Patroni's int() take it?"""
    return (type(value) in (int, float) and math.isfinite(value)) or (isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,15}\s*", value) is not None)


def _has_unit(reading: Kind, value: Any) -> bool:
    """Is it a number with a unit, as the schema takes it?"""
    if not isinstance(value, str) or not value.strip()[-1:].isalpha():
        return False
    try:
        reading.parse(value)
    except Wrong:
        return False
    return True


def _taken_instead(here: Path, raw: dict[str, Any]) -> str:
    """The key of this table that Patroni takes, and not this one, or ""."""
    if here not in (("etcd", "host"), ("etcd3", "host")):
        return ""
    return next((other for other in BEFORE_HOST if raw.get(other) and (other != "url" or isinstance(raw[other], str))), "")


def _not_for_toml(value: Any) -> str:
    """Why TOML, or pgha, cannot have this value; "" if it can."""
    if isinstance(value, dict):
        return next(filter(None, map(_not_for_toml, [*value, *value.values()])), "")
    if isinstance(value, list):
        return next(filter(None, map(_not_for_toml, value)), "")
    if value is None:
        return "has an empty value in it"
    if type(value) not in (str, int, float, bool):
        return f"is {type_name(value)} to YAML; put it into quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return "is no finite number"
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return "is not UTF-8"
    return ""


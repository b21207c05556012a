"""PostgreSQL's settings: which the agent controls, how values compare, what waits for a restart.

Controlled settings go on the postmaster's command line, where neither ALTER SYSTEM nor any file can override them:
members must agree on them (hot standby refuses to run with less than its primary has), or the agent depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct

from pgha.model.gucs import (
    Guc,
    SettingValue,
    is_plain,
    may_hold_secrets,
    parse_quantity,
    same_value,
    setting_text,
    truth,
)
from pgha.model.rolling import STANDBY_AT_LEAST
from pgha.postgres.controldata import ControlData
from pgha.postgres.gucs import FileEntry


class Controlled(Struct, frozen=True, kw_only=True):
    """A controlled setting: its default, and how a value is said; "": it is not accepted, and the default replaces it."""

    default: str
    said: Callable[[str], str]


#: More than this PostgreSQL takes for none of them (2^18 - 1 backends, 2^31 - 1 locks).
_LARGEST = (1 << 31) - 1


def _at_least(minimum: int) -> Callable[[str], str]:
    def said(text: str) -> str:
        number = parse_quantity(text, None)
        return str(int(number)) if number is not None and minimum <= number <= _LARGEST and number == int(number) else ""
    return said


def _boolean(text: str) -> str:
    return {True: "on", False: "off", None: ""}[truth(text)]


#: In the reference's order of the command line. listen_addresses, port and cluster_name are given by the caller.
CONTROLLED: dict[str, Controlled] = {
    "wal_level": Controlled(default="replica", said=lambda t: t.lower() if t.lower() in ("replica", "logical") else ""),
    "hot_standby": Controlled(default="on", said=lambda t: "on" if truth(t) else ""),
    "max_connections": Controlled(default="100", said=_at_least(25)),
    "max_wal_senders": Controlled(default="10", said=_at_least(3)),
    "max_prepared_transactions": Controlled(default="0", said=_at_least(0)),
    "max_locks_per_transaction": Controlled(default="64", said=_at_least(32)),
    "track_commit_timestamp": Controlled(default="off", said=_boolean),
    "max_replication_slots": Controlled(default="10", said=_at_least(4)),
    "max_worker_processes": Controlled(default="8", said=_at_least(2)),
    "wal_log_hints": Controlled(default="on", said=_boolean),
}
FORCED_BY_CALLER = ("listen_addresses", "port", "cluster_name")
#: Never the user's: they name what the agent works on.
NEVER = frozenset({"data_directory", "config_file", "external_pid_file", "restart_after_crash"})

#: One segment of wal_keep_segments, as that setting's users meant it.
_SEGMENT_MB = 16


class Prepared(Struct, frozen=True, kw_only=True):
    """Settings, ready to be used. `notes`: what was replaced or dropped and why, one line each."""

    command_line: dict[str, str]
    file: dict[str, str]
    notes: tuple[str, ...] = ()
    raised: dict[str, tuple[str, str]] = {}   # standby rule: name → (configured, used)


def prepare(wanted: Mapping[str, SettingValue | None], *, forced: Mapping[str, str], control: ControlData | None = None) -> Prepared:
    """Split `wanted` (shared and local parameters, merged) into the command line and postgresql.conf.

    `forced`: listen_addresses, port, cluster_name. `control`, of a standby: values lower than what the primary had are
    raised (compatibility spec 5.5). A wanted value of None means: not set. What PostgreSQL itself would refuse (names of
    another version, for one) is not judged here: see gucs.refused.
    """
    values = {name.lower(): setting_text(value) for name, value in wanted.items() if value is not None}
    notes: list[str] = []
    if "wal_keep_segments" in values:
        segments = values.pop("wal_keep_segments")
        if "wal_keep_size" not in values and segments.isascii() and segments.isdigit() and len(segments) < 10:
            values["wal_keep_size"] = f"{int(segments) * _SEGMENT_MB}MB"
            notes.append(f"wal_keep_segments is taken as wal_keep_size = {values['wal_keep_size']}")
    command_line = dict(forced)
    for name, rule in CONTROLLED.items():
        value = rule.said(values.get(name, rule.default))
        if not value:
            notes.append(f"{name} = {values[name]!r} is not possible here: {rule.default!r} is used")
        command_line[name] = value or rule.default
    raised = _raise_for_standby(command_line, control) if control is not None else {}
    keep = values.setdefault("wal_keep_size", "128MB")
    if (kept := parse_quantity(keep, "MB")) is None or kept < _SEGMENT_MB:
        notes.append(f"wal_keep_size = {keep!r} is not possible here: '128MB' is used")
        values["wal_keep_size"] = "128MB"
    notes += [f"{name} is not the user's to set: ignored" for name in sorted(values) if name in NEVER]
    file = {name: value for name, value in (values | command_line).items() if name not in NEVER}
    return Prepared(command_line=command_line, file=file, notes=tuple(notes), raised=raised)


def _raise_for_standby(command_line: dict[str, str], control: ControlData) -> dict[str, tuple[str, str]]:
    raised = {}
    for name in STANDBY_AT_LEAST:
        needed: int = getattr(control, name)
        if int(command_line[name]) < needed:
            raised[name] = (command_line[name], str(needed))
            command_line[name] = str(needed)
    return raised


# What waits for a restart

def pending_restart(wanted: Mapping[str, str], running: Mapping[str, Guc], files: Mapping[str, FileEntry] | None = None) -> dict[str, tuple[str, str]]:
    """What a restart would change: name → (running value, wanted value), as people write them.

    That is every setting of context postmaster whose wanted value differs, and everything that PostgreSQL itself says
    is pending, because a file was changed behind the agent's back. `files` tells which value stands there ("?": nobody
    knows); what ALTER SYSTEM has written is read after our file and wins, except over the command line.
    """
    pending = {}
    entries = files or {}
    for name, setting in sorted(running.items()):
        entry, ours = entries.get(name), wanted.get(name)
        if name in CONTROLLED or name in FORCED_BY_CALLER:
            then = ours
        elif entry is not None and (entry.by_alter_system or ours is None):
            then = entry.value if setting.pending or ours is not None else None
        elif ours is not None and not (setting.pending and same_value(ours, setting.value, vartype=setting.vartype, unit=setting.unit or None)):
            then = ours
        elif entries:       # taken out of the files again, which PostgreSQL forgets to notice until it is restarted
            then = setting.default if setting.pending else None
        else:
            then = "?" if setting.pending else None
        if then is not None and setting.context == "postmaster" and not same_value(then, setting.value, vartype=setting.vartype, unit=setting.unit or None):
            pending[setting.name] = (setting.shown or setting.value, then) if is_plain(setting) or not may_hold_secrets(name) else ("***", "***")
    return pending


def overridden(wanted: Mapping[str, str], running: Mapping[str, Guc], files: Mapping[str, FileEntry]) -> dict[str, str]:
    """What ALTER SYSTEM says otherwise than the configuration: name → what that means, for people. Values only of those that
    cannot hold a secret: anybody who may send a change is told, and the journal."""
    said = {}
    for name, ours in wanted.items():
        entry, setting = files.get(name), running.get(name)
        if entry is None or setting is None or not entry.by_alter_system or same_value(entry.value, ours, vartype=setting.vartype, unit=setting.unit or None):
            continue
        if name in CONTROLLED or name in FORCED_BY_CALLER:
            to = f" to {entry.value}" if is_plain(setting) else ""
            said[name] = f"ALTER SYSTEM has set it{to}, without effect, since pgha sets it at the start; allowed: the cluster's configuration, and ALTER SYSTEM RESET {name}"
        elif is_plain(setting):
            said[name] = f"ALTER SYSTEM has set it to {entry.value}, which wins over the configuration's {ours} on this member; allowed: ALTER SYSTEM RESET {name}"
        else:
            said[name] = f"ALTER SYSTEM has set it to something else, which wins over the configuration on this member; allowed: ALTER SYSTEM RESET {name}"
    return said

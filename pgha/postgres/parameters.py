"""PostgreSQL's settings: which the agent controls, how values compare, what waits for a restart.

Controlled settings go on the postmaster's command line, where neither ALTER SYSTEM nor any file can override them:
members must agree on them (hot standby refuses to run with less than its primary has), or the agent depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation

from msgspec import Struct

from pgha.postgres.controldata import ControlData

SettingValue = str | int | float | bool


def _boolean(text: str) -> bool | None:
    """PostgreSQL's reading: unambiguous prefixes of true, false, yes, no; on, off; 1, 0."""
    word = text.strip().lower()
    if word in ("on", "1") or (word and ("true".startswith(word) or "yes".startswith(word))):
        return True
    if word in ("off", "of", "0") or (word and ("false".startswith(word) or "no".startswith(word))):
        return False
    return None


def setting_text(value: SettingValue) -> str:
    """A value from TOML or JSON as PostgreSQL is told it: true → "on", 100 → "100"."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


class Controlled(Struct, frozen=True, kw_only=True):
    """A controlled setting: its default, and which values are accepted (others are replaced by the default)."""

    default: str
    valid: Callable[[str], bool]


def _at_least(minimum: int) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(r"\d{1,9}", text) is not None and int(text) >= minimum


def _is_boolean(text: str) -> bool:
    return _boolean(text) is not None


#: In the reference's order of the command line. listen_addresses, port and cluster_name are given by the caller.
CONTROLLED: dict[str, Controlled] = {
    "wal_level": Controlled(default="replica", valid=lambda t: t in ("replica", "logical")),
    "hot_standby": Controlled(default="on", valid=lambda t: _boolean(t) is True),
    "max_connections": Controlled(default="100", valid=_at_least(25)),
    "max_wal_senders": Controlled(default="10", valid=_at_least(3)),
    "max_prepared_transactions": Controlled(default="0", valid=_at_least(0)),
    "max_locks_per_transaction": Controlled(default="64", valid=_at_least(32)),
    "track_commit_timestamp": Controlled(default="off", valid=_is_boolean),
    "max_replication_slots": Controlled(default="10", valid=_at_least(4)),
    "max_worker_processes": Controlled(default="8", valid=_at_least(2)),
    "wal_log_hints": Controlled(default="on", valid=_is_boolean),
}
FORCED_BY_CALLER = ("listen_addresses", "port", "cluster_name")
#: A standby must have at least what its primary had when it wrote the WAL being replayed (chapter 27.4.3).
STANDBY_AT_LEAST = (
    "max_connections", "max_prepared_transactions", "max_locks_per_transaction", "max_worker_processes", "max_wal_senders")
#: Never the user's: they name what the agent works on.
NEVER = frozenset({"data_directory", "config_file", "external_pid_file", "restart_after_crash"})

#: Recovery settings that a reload changes, from which major version on; recovery_target* always need a restart.
RELOADABLE_FROM = {"primary_conninfo": 13, "primary_slot_name": 13, "restore_command": 14}

#: Settings that came or went between 13 and 18: name → (first major version, last major version).
_VERSIONS: dict[str, tuple[int, int]] = {
    "wal_keep_segments": (0, 12), "promote_trigger_file": (12, 15), "vacuum_defer_cleanup_age": (0, 15),
    "operator_precedence_warning": (0, 13), "vacuum_cleanup_index_scale_factor": (11, 13), "stats_temp_directory": (0, 14),
    "db_user_namespace": (0, 16), "old_snapshot_threshold": (0, 16),
    "trace_recovery_messages": (0, 16),
    "in_hot_standby": (14, 99), "idle_session_timeout": (14, 99), "client_connection_check_interval": (14, 99),
    "compute_query_id": (14, 99), "huge_page_size": (14, 99), "log_recovery_conflict_waits": (14, 99),
    "min_dynamic_shared_memory": (14, 99), "recovery_init_sync_method": (14, 99), "remove_temp_files_after_crash": (14, 99),
    "track_wal_io_timing": (14, 99), "vacuum_failsafe_age": (14, 99), "vacuum_multixact_failsafe_age": (14, 99),
    "default_toast_compression": (14, 99), "enable_async_append": (14, 99), "enable_memoize": (14, 99),
    "ssl_crl_dir": (14, 99),
    "archive_library": (15, 99), "log_startup_progress_interval": (15, 99),
    "recovery_prefetch": (15, 99), "shared_memory_size": (15, 99), "stats_fetch_consistency": (15, 99),
    "wal_decode_buffer_size": (15, 99),
    "reserved_connections": (16, 99), "scram_iterations": (16, 99), "vacuum_buffer_usage_limit": (16, 99),
    "debug_parallel_query": (16, 99), "debug_io_direct": (16, 99), "createrole_self_grant": (16, 99),
    "icu_validation_level": (16, 99), "gss_accept_delegation": (16, 99), "enable_presorted_aggregate": (16, 99),
    "max_parallel_apply_workers_per_subscription": (16, 99), "send_abort_for_crash": (16, 99),
    "allow_alter_system": (17, 99), "summarize_wal": (17, 99), "wal_summary_keep_time": (17, 99),
    "sync_replication_slots": (17, 99), "synchronized_standby_slots": (17, 99), "transaction_timeout": (17, 99),
    "io_combine_limit": (17, 99), "event_triggers": (17, 99), "restrict_nonsystem_relation_kind": (17, 99),
    "huge_pages_status": (17, 99), "trace_connection_negotiation": (17, 99), "multixact_member_buffers": (17, 99),
    "multixact_offset_buffers": (17, 99), "notify_buffers": (17, 99), "serializable_buffers": (17, 99),
    "subtransaction_buffers": (17, 99), "transaction_buffers": (17, 99), "commit_timestamp_buffers": (17, 99),
    "max_notify_queue_pages": (17, 99), "enable_group_by_reordering": (17, 99),
    "io_method": (18, 99), "io_workers": (18, 99), "io_max_concurrency": (18, 99), "io_max_combine_limit": (18, 99),
    "idle_replication_slot_timeout": (18, 99), "max_active_replication_origins": (18, 99), "ssl_groups": (18, 99),
    "ssl_tls13_ciphers": (18, 99), "md5_password_warnings": (18, 99), "extension_control_path": (18, 99),
    "autovacuum_worker_slots": (18, 99), "autovacuum_vacuum_max_threshold": (18, 99), "vacuum_truncate": (18, 99),
    "track_cost_delay_timing": (18, 99), "file_copy_method": (18, 99), "oauth_validator_libraries": (18, 99),
    "enable_distinct_reordering": (18, 99), "enable_self_join_elimination": (18, 99), "log_lock_failures": (18, 99),
    "vacuum_max_eager_freeze_failure_rate": (18, 99),
}

#: One segment of wal_keep_segments, as that setting's users meant it.
_SEGMENT_MB = 16


def exists_in(name: str, major_version: int) -> bool:
    """Does this version know the setting? Unlisted names count as known: an extension's, or as old as all versions."""
    first, last = _VERSIONS.get(name, (0, 99))
    return first <= major_version <= last


class Prepared(Struct, frozen=True, kw_only=True):
    """Settings, ready to be used. `notes`: what was replaced or dropped and why, one line each."""

    command_line: dict[str, str]
    file: dict[str, str]
    notes: tuple[str, ...] = ()
    raised: dict[str, tuple[str, str]] = {}   # standby rule: name → (configured, used)


def prepare(
    wanted: Mapping[str, SettingValue | None], *, forced: Mapping[str, str], major_version: int,
    control: ControlData | None = None, standby: bool = False,
) -> Prepared:
    """Split `wanted` (shared and local parameters, merged) into the command line and postgresql.conf.

    `forced`: listen_addresses, port, cluster_name. `control` with `standby`: values lower than what the primary had are
    raised (compatibility spec 5.5). A wanted value of None means: not set.
    """
    values = {name.lower(): setting_text(value) for name, value in wanted.items() if value is not None}
    notes: list[str] = []
    if "wal_keep_segments" in values:
        segments = values.pop("wal_keep_segments")
        if "wal_keep_size" not in values and segments.isdigit():
            values["wal_keep_size"] = f"{int(segments) * _SEGMENT_MB}MB"
            notes.append(f"wal_keep_segments is taken as wal_keep_size = {values['wal_keep_size']}")
    command_line = dict(forced)
    for name, rule in CONTROLLED.items():
        value = values.get(name, rule.default)
        if not rule.valid(value):
            notes.append(f"{name} = {value!r} is not possible here: {rule.default!r} is used")
            value = rule.default
        command_line[name] = value
    raised = _raise_for_standby(command_line, control) if standby and control is not None else {}
    keep = values.setdefault("wal_keep_size", "128MB")
    if (kept := parse_quantity(keep, "MB")) is None or kept < _SEGMENT_MB:
        notes.append(f"wal_keep_size = {keep!r} is not possible here: '128MB' is used")
        values["wal_keep_size"] = "128MB"
    for name in sorted(values):
        if name in NEVER:
            notes.append(f"{name} is not the user's to set: ignored")
        elif not exists_in(name, major_version):
            notes.append(f"{name} does not exist in PostgreSQL {major_version}: ignored")
    file = {name: value for name, value in (values | command_line).items()
            if name not in NEVER and exists_in(name, major_version)}
    return Prepared(command_line=command_line, file=file, notes=tuple(notes), raised=raised)


def _raise_for_standby(command_line: dict[str, str], control: ControlData) -> dict[str, tuple[str, str]]:
    raised = {}
    for name in STANDBY_AT_LEAST:
        needed: int = getattr(control, name)
        if int(command_line[name]) < needed:
            raised[name] = (command_line[name], str(needed))
            command_line[name] = str(needed)
    return raised


# Comparing values

#: unit → (kind, size in the kind's base unit: bytes, or milliseconds)
_UNITS: dict[str, tuple[str, Decimal]] = {
    "B": ("bytes", Decimal(1)), "kB": ("bytes", Decimal(1024)), "MB": ("bytes", Decimal(1024**2)),
    "GB": ("bytes", Decimal(1024**3)), "TB": ("bytes", Decimal(1024**4)),
    "us": ("ms", Decimal("0.001")), "ms": ("ms", Decimal(1)), "s": ("ms", Decimal(1000)), "min": ("ms", Decimal(60_000)),
    "h": ("ms", Decimal(3_600_000)), "d": ("ms", Decimal(86_400_000)),
}
_QUANTITY = re.compile(r"\s*([+-]?(?:0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+))\s*([A-Za-z]*)\s*")


def _unit(text: str) -> tuple[str, Decimal] | None:
    """A unit of pg_settings, which may have a factor: "8kB" → ("bytes", 8192)."""
    match = re.fullmatch(r"(\d*)([A-Za-z]+)", text)
    if match is None or match[2] not in _UNITS:
        return None
    kind, size = _UNITS[match[2]]
    return kind, size * int(match[1] or 1)


def parse_quantity(text: str, base_unit: str | None) -> Decimal | None:
    """A number in the setting's own unit: ("64MB", "8kB") → 8192, ("8192", "8kB") → 8192. None if it is none."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    try:
        number = Decimal(int(match[1], 16)) if "x" in match[1].lower() else Decimal(match[1])
    except InvalidOperation:
        return None
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
        return (left := _boolean(a)) is not None and left == _boolean(b)
    if vartype == "integer":
        x, y = parse_quantity(a, unit), parse_quantity(b, unit)
        # PostgreSQL rounds a converted value to a whole number of its unit.
        return x is not None and y is not None and x.to_integral_value() == y.to_integral_value()
    if vartype == "real":
        x, y = parse_quantity(a, unit), parse_quantity(b, unit)
        return x is not None and x == y
    if vartype == "enum":
        return a.lower() == b.lower()
    return False


class RunningSetting(Struct, frozen=True, kw_only=True):
    """A row of pg_settings. `value` is in `unit`; `pending`: a file says otherwise and only a restart will apply it."""

    name: str
    value: str
    unit: str | None
    vartype: str
    context: str
    pending: bool
    shown: str = ""     # as SHOW would say it: "64MB"


SETTINGS_SQL = """SELECT name, setting, unit, vartype, context, pending_restart, current_setting(name, true)
FROM pg_settings WHERE pending_restart OR name = ANY ($1::text[])"""


def running_settings(rows: Iterable[tuple[str | None, ...]]) -> dict[str, RunningSetting]:
    """Rows of SETTINGS_SQL, by name in lower case."""
    settings = {}
    for name, value, unit, vartype, context, pending, shown in rows:
        assert name is not None
        settings[name.lower()] = RunningSetting(
            name=name, value=value or "", unit=unit or None, vartype=vartype or "string", context=context or "",
            pending=pending == "t", shown=shown or "")
    return settings


def settings_argument(names: Iterable[str]) -> str:
    """The parameter of SETTINGS_SQL: a text array."""
    return "{" + ",".join('"' + n.replace("\\", "\\\\").replace('"', '\\"') + '"' for n in names) + "}"


def pending_restart(wanted: Mapping[str, str], running: Mapping[str, RunningSetting]) -> dict[str, tuple[str, str]]:
    """What a restart would change: name → (running value, wanted value), as people write them.

    That is every setting of context postmaster whose wanted value differs, and everything that PostgreSQL itself says
    is pending: a file was changed behind the agent's back, and the value wanted is then not known here ("?").
    """
    pending = {}
    for name, setting in sorted(running.items()):
        if name in wanted:
            if setting.context == "postmaster" and not same_value(
                    wanted[name], setting.value, vartype=setting.vartype, unit=setting.unit):
                pending[setting.name] = (setting.shown or setting.value, wanted[name])
        elif setting.pending:
            pending[setting.name] = (setting.shown or setting.value, "?")
    return pending


def needs_restart(name: str, context: str, major_version: int) -> bool:
    """Does a change of this setting need a restart? `context` of pg_settings decides if known, else the table."""
    if context:
        return context == "postmaster"
    return major_version < RELOADABLE_FROM.get(name, 0) or name in CONTROLLED or name in FORCED_BY_CALLER

"""The configuration that the whole cluster shares: the JSON of `/config` (compatibility spec 5.2, 5.4).

Two ways in, because others write there, too:

* `ClusterConfig.from_json` takes whatever stands there. It never fails: what cannot be used is repaired as the spec
  says and named in the problems.
* `validate_change` judges what *we* are asked to write, strictly, and only what it changes.

pgha's own keys stand under "pgha", which the reference keeps and ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import field

from pgha.config import gucs, slots
from pgha.config.lists import lines, program_options, texts
from pgha.config.programs import ReplicaMethod, command, method_name, replica_method
from pgha.config.schema import Key, Path, Report, Section, fields, read
from pgha.config.values import (
    DEEPEST,
    Kind,
    Wrong,
    choice,
    duration,
    flag,
    integer,
    path,
    plain,
    size,
    text,
    too_deep,
    type_name,
)

OptionList = tuple[tuple[str, str | None], ...]

#: What the reference raises a lower ttl and retry_timeout to; they count while one of its members is present.
PATRONI_MINIMUM_TTL_S = 20.0
PATRONI_MINIMUM_RETRY_TIMEOUT_S = 3.0

#: the guard takes no deadline further away than a day (lock/protocol.py)
LONGEST_TIMING_S = 86400

LATER = "not supported yet by this version; allowed: leave it out"
_ONLY_LOCAL = "is known only to the node itself; allowed: in the node's own file"
_HBA = "a list of pg_hba.conf lines"
_IDENT = "a list of pg_ident.conf lines"


def _recovery_conf(value: Any) -> dict[str, Any]:
    fault = ""
    try:
        settings = gucs.parameters(value)
    except Wrong as wrong:
        if wrong.repaired is None:
            raise
        settings, fault = wrong.repaired, wrong.what
    own = [name for name in settings if name.lower().startswith("recovery_target") or name.lower() in ("primary_conninfo", "primary_slot_name", "standby_mode")]
    faults = [fault] * bool(fault) + [f"has {name}, which pgha sets itself" for name in own]
    if faults:
        raise Wrong("; ".join(faults), repaired={name: item for name, item in settings.items() if name not in own})
    return settings


BASEBACKUP = "basebackup"


def _replica_methods(value: Any) -> tuple[str, ...]:
    methods: tuple[str, ...] = texts().parse(value)
    if not methods:
        raise Wrong("names no method")
    for name in methods:
        try:
            method_name(name)
        except Wrong as wrong:
            raise Wrong(f"has an item that {wrong.what}") from None
    return tuple(dict.fromkeys(methods))


class Callbacks(Section, frozen=True, kw_only=True):
    """Commands that are told what has become of PostgreSQL: event, role and scope are their last arguments."""

    on_start: Annotated[str, Key(command())] = ""
    on_stop: Annotated[str, Key(command())] = ""
    on_restart: Annotated[str, Key(command())] = ""
    on_reload: Annotated[str, Key(command())] = ""
    on_role_change: Annotated[str, Key(command())] = ""


class SharedPostgresql(Section, frozen=True, kw_only=True):
    """The keys of `postgresql` that a node's file and `/config` may both have: the node's own win, `parameters` merge."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("rewind", "bin_name", "use_unix_socket_repl"), LATER),
        **dict.fromkeys((f"{key}_{role}" for key in ("parameters", "pg_hba", "pg_ident") for role in ("primary", "replica", "standby_leader")), LATER),
    }

    CHOSEN: ClassVar = ("methods", replica_method())

    methods: dict[str, ReplicaMethod] = field(default_factory=dict)     # [postgresql.NAME] of each NAME in create_replica_methods
    database: Annotated[str, Key(text())] = "postgres"
    bin_dir: Annotated[str, Key(path())] = ""
    use_unix_socket: Annotated[bool, Key(flag())] = False
    parameters: Annotated[dict[str, Any], Key(Kind(gucs.parameters, "a table of PostgreSQL's parameters", shape="table"))] = field(default_factory=dict)
    pg_hba: Annotated[tuple[str, ...], Key(lines(_HBA))] = ()
    pg_ident: Annotated[tuple[str, ...], Key(lines(_IDENT))] = ()
    recovery_conf: Annotated[dict[str, Any], Key(Kind(_recovery_conf, "restore_command, archive_cleanup_command, recovery_min_apply_delay and the like, without recovery_target*", shape="table"))] = field(default_factory=dict)
    basebackup: Annotated[OptionList, Key(program_options(
        "pgdata", "format", "wal-method", "xlog-method", "gzip", "version", "dbname", "host", "port", "username", "password",
        program="pg_basebackup"))] = ()
    create_replica_methods: Annotated[tuple[str, ...], Key(Kind(_replica_methods, "a list of basebackup and names of tables beside it that have a command, in the order in which they are tried", shape="list"))] = (BASEBACKUP,)
    callbacks: Callbacks = Callbacks()
    pre_promote: Annotated[str, Key(command())] = ""
    before_stop: Annotated[str, Key(command())] = ""
    pg_ctl_timeout_s: Annotated[float, Key(duration(1), name="pg_ctl_timeout")] = 60.0
    use_pg_rewind: Annotated[bool, Key(flag())] = False
    remove_data_directory_on_rewind_failure: Annotated[bool, Key(flag())] = False
    remove_data_directory_on_diverged_timelines: Annotated[bool, Key(flag())] = False
    krbsrvname: Annotated[str, Key(text())] = ""
    custom_conf: Annotated[str, Key(path())] = ""


def known_methods(postgresql: SharedPostgresql) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the methods for a copy that can be run, those that cannot); pg_basebackup if there would be none."""
    named = postgresql.create_replica_methods
    known = tuple(name for name in named if name == BASEBACKUP or name in postgresql.methods)
    return known or (BASEBACKUP,), tuple(name for name in named if name not in known)


class ClusterPostgresql(SharedPostgresql, frozen=True, kw_only=True):
    """`postgresql` in `/config`."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **SharedPostgresql.REFUSED,
        **dict.fromkeys(("connect_address", "proxy_address", "listen", "config_dir", "data_dir", "pgpass", "authentication"), _ONLY_LOCAL),
    }

    use_slots: Annotated[bool, Key(flag())] = True


class ClusterOwn(Section, frozen=True, kw_only=True):
    """`pgha` in `/config` (safety model 10, 14 and 16). `mixed` off: Patroni members may follow, never lead. `primary_hang_timeout_s` 0: not given, so min(ttl, 30) - 1.
    `store_quota_bytes` 0: as etcd says (3.6 and later), else its default of 2 GiB."""

    crash_handover_after_s: Annotated[float, Key(duration(0), name="crash_handover_after", aliases=("crash_handover_after_s",))] = 3.0
    primary_hang_timeout_s: Annotated[float, Key(duration(1), name="primary_hang_timeout", aliases=("primary_hang_timeout_s",))] = 0.0
    compaction: Annotated[bool, Key(flag())] = True
    store_quota_bytes: Annotated[int, Key(size(0), name="store_quota")] = 0
    mixed: Annotated[Literal["auto", "off"], Key(choice("auto", "off", also={False: "off", True: "auto"}))] = "auto"


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(f"is {type_name(value)}, not a table")
    return value


def _tables(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Wrong(f"is {type_name(value)}" if not isinstance(value, list) else "has an item that is no table")
    return tuple(value)


SynchronousMode = Literal["off", "on", "quorum"]


class ClusterConfig(Section, frozen=True, kw_only=True):
    """Effective values of `/config`. What later issues carry out is parsed, too, and named by `unsupported`."""

    ttl_s: Annotated[float, Key(duration(3, LONGEST_TIMING_S, whole=True), name="ttl")] = 30.0
    loop_wait_s: Annotated[float, Key(duration(1, LONGEST_TIMING_S, whole=True), name="loop_wait")] = 10.0
    retry_timeout_s: Annotated[float, Key(duration(1, LONGEST_TIMING_S, whole=True), name="retry_timeout")] = 10.0
    maximum_lag_on_failover_bytes: Annotated[int, Key(size(0), name="maximum_lag_on_failover")] = 1048576
    maximum_lag_on_syncnode_bytes: Annotated[int, Key(size(-1), name="maximum_lag_on_syncnode")] = -1
    max_timelines_history: Annotated[int, Key(integer(0))] = 0
    primary_start_timeout_s: Annotated[float, Key(duration(0), name="primary_start_timeout", aliases=("master_start_timeout",))] = 300.0
    primary_stop_timeout_s: Annotated[float, Key(duration(0), name="primary_stop_timeout", aliases=("master_stop_timeout",))] = 0.0
    primary_race_backoff_s: Annotated[float, Key(duration(0), name="primary_race_backoff")] = 0.0
    synchronous_mode: Annotated[SynchronousMode, Key(choice("off", "on", "quorum", also={False: "off", True: "on"}))] = "off"
    synchronous_mode_strict: Annotated[bool, Key(flag())] = False
    synchronous_node_count: Annotated[int, Key(integer(1))] = 1
    failsafe_mode: Annotated[bool, Key(flag())] = False
    check_timeline: Annotated[bool, Key(flag())] = False
    pause: Annotated[bool, Key(flag())] = False
    member_slots_ttl_s: Annotated[float, Key(duration(0), name="member_slots_ttl")] = 1800.0
    slots: Annotated[dict[str, Any], Key(Kind(_table, "a table of slots", shape="table"), aliases=slots.ALIASES)] = field(default_factory=dict)
    ignore_slots: Annotated[tuple[dict[str, Any], ...], Key(Kind(_tables, "a list of tables with name, type, database, plugin", shape="list"))] = ()
    standby_cluster: Annotated[dict[str, Any], Key(Kind(_table, "a table with host, port, primary_slot_name, restore_command and the like", shape="table"))] = field(default_factory=dict)
    postgresql: ClusterPostgresql = ClusterPostgresql()
    pgha: ClusterOwn = ClusterOwn()

    @staticmethod
    def from_json(raw: Any, *, patroni_member_present: bool) -> tuple[ClusterConfig, tuple[str, ...]]:
        """What `/config` means, and what had to be repaired (lines with key, fault and what is used instead)."""
        report = Report("/config", strict=False)
        config = read(ClusterConfig, {} if raw is None else raw, (), report)
        for key in unsupported(config):
            report.problem((key,), "not supported yet by this version; it has no effect")
        for entry, fault in slots.faults(raw, strict=False):
            report.problem(entry, fault)
        for name, value in config.postgresql.parameters.items():
            if wrong := gucs.problem(name, value):
                report.problem(("postgresql", "parameters", name), f"{wrong}; not used")
        mixed = patroni_member_present and config.pgha.mixed != "off"
        return _repaired(config, report, patroni_member_present=mixed), tuple(report.problems)

    @property
    def primary_hang_timeout_s(self) -> float:
        """How long a silent primary keeps its mandate (safety model 10)."""
        return self.pgha.primary_hang_timeout_s or min(self.ttl_s, 30.0) - 1.0


def _repaired(config: ClusterConfig, report: Report, *, patroni_member_present: bool) -> ClusterConfig:
    """The timing rule of spec 5.2: 1 + 2 * retry_timeout ≤ ttl, then loop_wait + 2 x retry_timeout ≤ ttl."""
    ttl, loop_wait, retry = config.ttl_s, config.loop_wait_s, config.retry_timeout_s
    if patroni_member_present:
        for key, value, minimum in (("ttl", ttl, PATRONI_MINIMUM_TTL_S), ("retry_timeout", retry, PATRONI_MINIMUM_RETRY_TIMEOUT_S)):
            if value < minimum:
                report.problem((key,), f"is {plain(value)} s, raised to {plain(minimum)} s because a Patroni member is present")
        ttl, retry = max(ttl, PATRONI_MINIMUM_TTL_S), max(retry, PATRONI_MINIMUM_RETRY_TIMEOUT_S)
    if loop_wait + 2 * retry > ttl:
        written = _timing(ttl, loop_wait, retry)
        if 1 + 2 * retry > ttl:
            loop_wait, retry = 1.0, float((ttl - 1) // 2)
        else:
            loop_wait = ttl - 2 * retry
        report.problem(("ttl",), f"{written}; used instead: loop_wait {plain(loop_wait)} s, retry_timeout {plain(retry)} s")
    assert loop_wait >= 1 and retry >= 1 and loop_wait + 2 * retry <= ttl, (ttl, loop_wait, retry)  # noqa: PT018  (one rule)
    return msgspec.structs.replace(config, ttl_s=ttl, loop_wait_s=loop_wait, retry_timeout_s=retry)


def _timing(ttl: float, loop_wait: float, retry: float) -> str:
    return f"loop_wait + 2 x retry_timeout is {plain(loop_wait)} + 2 x {plain(retry)} = {plain(loop_wait + 2 * retry)} s, more than ttl {plain(ttl)} s"


def unsupported(config: ClusterConfig) -> tuple[str, ...]:
    """Keys that are switched on but belong to a later version: saying so beats pretending."""
    return tuple(key for key, on in (
        ("standby_cluster", bool(config.standby_cluster)),
        ("primary_race_backoff", config.primary_race_backoff_s > 0),
    ) if on)


# --- what we write ourselves -----------------------------------------------------------------------------------------

def read_strictly(raw: Any, at: Path, report: Report) -> ClusterConfig:
    """`raw` as ClusterConfig, with every rule that our own writes obey. Problems are in `report`, below `at`."""
    config = read(ClusterConfig, raw, at, report)
    if config.loop_wait_s + 2 * config.retry_timeout_s > config.ttl_s:
        report.problem((*at, "ttl"), f"{_timing(config.ttl_s, config.loop_wait_s, config.retry_timeout_s)}; "
                       "allowed: a larger ttl, or smaller loop_wait and retry_timeout")
    for key in unsupported(config):
        report.problem((*at, key), "not supported yet by this version; allowed: leave it out or off")
    for entry, fault in slots.faults(raw, strict=True):
        report.problem((*at, *entry), fault)
    for name, value in config.postgresql.parameters.items():
        if wrong := gucs.problem(name, value):
            report.problem((*at, "postgresql", "parameters", name), wrong)
    return config


def validate_dynamic(raw: Any) -> list[str]:
    """Everything that is wrong with `raw` as a whole new `/config`; one line each."""
    report = Report("/config")
    if too_deep(raw):
        return [f"/config: is nested more than {DEEPEST} deep"]
    read_strictly(raw, (), report)
    return report.problems


def validate_change(old: dict[str, Any] | None, new: Any) -> list[str]:
    """What is wrong with replacing `old` by `new`: only faults that `old` did not have in the same words.

    So an operator can change one key although somebody else has written nonsense under another.
    """
    before = set(validate_dynamic(old or {}))
    return [problem for problem in validate_dynamic(new) if problem not in before]


_SCALARS = (str, int, float, bool)


def merge_patch(old: Any, patch: Any, *, depth: int = 0) -> Any:
    """`patch` laid over `old`: tables merge, null deletes, everything else replaces (compatibility spec 3.5).
    A value that reads the same ("30" for 30) is no change.

    `old` is not changed. What is nested deeper than DEEPEST replaces; `validate_dynamic` refuses it.
    """
    if not isinstance(patch, dict) or depth > DEEPEST:
        same = type(old) in _SCALARS and type(patch) in _SCALARS and str(old) == str(patch)
        return old if same else patch
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value, depth=depth + 1)
    return merged


def normalised(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` as it is written to the store: top-level numbers and booleans without units and words, which any reader takes."""
    out = dict(raw)
    for known in fields(ClusterConfig):
        if known.key is None or known.key.kind.shape != "scalar" or known.name not in raw:
            continue
        try:
            value = known.key.kind.parse(raw[known.name])
        except Wrong:
            continue
        if known.name == "synchronous_mode":
            value = {"off": False, "on": True}.get(value, value)
        out[known.name] = int(value) if isinstance(value, float) and value == int(value) else value
    return out



"""Files and environment → Loaded; Loaded and `/config` → Effective (the layers of compatibility spec 5.1).

    built-in defaults  <  /config  <  the node's file(s)  <  PGHA_… variables

`load` raises one ConfigError with every problem found.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from pgha.config import gucs
from pgha.config.cluster import ClusterConfig, SharedPostgresql, known_methods
from pgha.config.environment import WHOLE, overlay
from pgha.config.local import LocalConfig, Postgresql
from pgha.config.rules import finish, secret_paths
from pgha.config.schema import Path, Report, dotted, fields, read
from pgha.config.slots import slots_of
from pgha.config.values import printable, too_deep
from pgha.errors import ConfigError
from pgha.model.observation import Settings

#: Nobody's configuration is larger; somebody's mistyped path may be.
FILE_LIMIT_BYTES = 4 << 20


class Loaded(Struct, frozen=True, kw_only=True):
    """A node's configuration. `consumed_env`: variables to remove from os.environ, so that nobody inherits them. `sources`: what
    set each key, a file's name or "environment NAME".

    Whoever reloads passes the same environment again: keep a copy of it.
    """

    local: LocalConfig
    warnings: tuple[str, ...]
    consumed_env: frozenset[str]
    sources: dict[Path, str] = {}


class Effective(Struct, frozen=True, kw_only=True):
    """What counts, all layers together. `problems`: what in `/config` was repaired or is ignored."""

    local: LocalConfig
    cluster: ClusterConfig
    postgresql: Postgresql
    settings: Settings
    problems: tuple[str, ...] = ()

    @property
    def use_slots(self) -> bool:
        return self.cluster.postgresql.use_slots


# --- the node's own --------------------------------------------------------------------------------------------------

def load(where: str | os.PathLike[str], environ: Mapping[str, str], *, purpose: Literal["agent", "ctl"] = "agent") -> Loaded:
    """Read a file, or a directory of *.toml in the order of their names, laid over each other; then the environment.

    For ctl only what ctl needs has to be there; the rest may be empty. Raises ConfigError with all problems.
    """
    raw: dict[str, Any] = {}
    sources: dict[Path, str] = {}
    problems: list[str] = []
    warnings: list[str] = []
    base = f"environment {WHOLE}" if WHOLE in environ else os.fspath(where)
    if WHOLE in environ:
        _add(environ[WHOLE].encode("utf-8", "surrogateescape"), base, raw, sources, problems)
    else:
        for file in _files(FilePath(where), problems):
            _read_file(file, raw, sources, problems, warnings)
    unread = bool(problems)
    consumed = overlay(raw, sources, environ, problems)
    report = Report(base, complete=purpose == "agent" and not unread, sources=sources)
    local = read(LocalConfig, raw, (), report)
    # What follows from several keys is worth asking only if all of them could be read.
    local = local if unread else finish(local, report)
    if problems or report.problems:
        raise ConfigError(*problems, *report.problems)
    return Loaded(local=local, warnings=(*warnings, *report.warnings), consumed_env=consumed, sources=sources)


def _files(where: FilePath, problems: list[str]) -> list[FilePath]:
    """The files to read, in order."""
    try:
        if not stat.S_ISDIR(where.stat().st_mode):
            return [where]
        found = sorted(p for p in where.iterdir() if p.suffix == ".toml" and not p.name.startswith("."))
    except OSError as error:
        problems.append(f"{where}: cannot be read ({error.strerror}); allowed: a TOML file, or a directory with *.toml")
        return []
    if not found:
        problems.append(f"{where}: holds no *.toml; allowed: a TOML file, or a directory with *.toml")
    return found


def _read_file(file: FilePath, raw: dict[str, Any], sources: dict[Path, str], problems: list[str], warnings: list[str]) -> None:
    try:
        with file.open("rb") as f:
            mode = os.fstat(f.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                problems.append(f"{file}: is no file; allowed: a TOML file, or a directory with *.toml")
                return
            content = f.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        problems.append(f"{file}: cannot be read ({error.strerror}); allowed: a TOML file, or a directory with *.toml")
        return
    if len(content) > FILE_LIMIT_BYTES:
        problems.append(f"{file}: is larger than {FILE_LIMIT_BYTES >> 20} MiB; allowed: a TOML file")
        return
    table = _add(content, str(file), raw, sources, problems)
    secrets = secret_paths(table)
    if secrets and mode & stat.S_IROTH:
        names = ", ".join(dotted(path) for path in secrets)
        warnings.append(f"{file}: is readable by everybody (mode {stat.S_IMODE(mode):04o}) and holds {names}; allowed: chmod o= {file}, or password_file")


def _add(content: bytes, name: str, raw: dict[str, Any], sources: dict[Path, str], problems: list[str]) -> dict[str, Any]:
    """Lay one TOML text over `raw`; it is returned alone, too."""
    deep = f"{name}: is nested too deeply; allowed: TOML as `pgha config sample` shows it"
    try:
        table = tomllib.loads(content.decode())
    except RecursionError:  # the parser recurses
        problems.append(deep)
        return {}
    except UnicodeDecodeError as error:
        problems.append(f"{name}: is not UTF-8 (byte {error.start}); allowed: TOML in UTF-8")
        return {}
    except ValueError as error:     # TOMLDecodeError, and what int() says of digits without end
        problems.append(printable(f"{name}: is no valid TOML: {str(error)[:300]}"))
        return {}
    if too_deep(table):     # "a.a.a.a = 1" nests without the parser's recursion
        problems.append(deep)
        return {}
    _merge(raw, table, (), name, sources)
    return table


def _merge(into: dict[str, Any], table: dict[str, Any], path: Path, name: str, sources: dict[Path, str]) -> None:
    for key, value in table.items():
        here = (*path, key)
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                sources[here] = name
            _merge(into[key], value, here, name, sources)
        else:
            into[key] = value
            sources[here] = name


# --- together with the cluster's -------------------------------------------------------------------------------------

def effective(local: LocalConfig, dynamic: Any, *, patroni_member_present: bool = False) -> Effective:
    """All layers together. `dynamic`: the JSON of `/config`, or None where there is none yet. Never fails."""
    cluster, problems = ClusterConfig.from_json(dynamic, patroni_member_present=patroni_member_present)
    postgresql = _layered(local.postgresql, cluster)
    methods, unknown = known_methods(postgresql)
    problems += tuple(f"postgresql.create_replica_methods: {name} is left out, since there is no table [postgresql.{name}] with a command" for name in unknown)
    kept = slots_of(dynamic)
    settings = Settings(
        ttl_s=cluster.ttl_s, loop_wait_s=cluster.loop_wait_s, retry_timeout_s=cluster.retry_timeout_s,
        maximum_lag_on_failover_bytes=cluster.maximum_lag_on_failover_bytes, check_timeline=cluster.check_timeline,
        primary_start_timeout_s=cluster.primary_start_timeout_s, primary_stop_timeout_s=cluster.primary_stop_timeout_s,
        primary_hang_timeout_s=cluster.primary_hang_timeout_s, crash_handover_after_s=cluster.pgha.crash_handover_after_s,
        member_slots_ttl_s=cluster.member_slots_ttl_s, max_timelines_history=cluster.max_timelines_history, pause=cluster.pause,
        failsafe_mode=cluster.failsafe_mode, synchronous_mode=cluster.synchronous_mode, synchronous_mode_strict=cluster.synchronous_mode_strict,
        synchronous_node_count=cluster.synchronous_node_count, maximum_lag_on_syncnode_bytes=cluster.maximum_lag_on_syncnode_bytes,
        use_pg_rewind=postgresql.use_pg_rewind, use_slots=cluster.postgresql.use_slots,
        remove_data_directory_on_rewind_failure=postgresql.remove_data_directory_on_rewind_failure,
        remove_data_directory_on_diverged_timelines=postgresql.remove_data_directory_on_diverged_timelines,
        has_bootstrap_section="bootstrap" in local.given, tags=local.tags, mixed=patroni_member_present and cluster.pgha.mixed != "off",
        may_compact_store=cluster.pgha.compaction, store_quota_bytes=cluster.pgha.store_quota_bytes,
        permanent_slots=kept.permanent, ignored_slots=kept.left_alone, may_drop_slots=kept.readable,
        replica_methods=methods, leaderless_methods=tuple(name for name in methods if name in postgresql.methods and postgresql.methods[name].no_leader),
        overwriting_methods=tuple(name for name in methods if name in postgresql.methods and postgresql.methods[name].keep_data),
        pre_promote_s=local.pgha.pre_promote_timeout_s if postgresql.pre_promote else 0.0,
        before_stop_s=local.pgha.before_stop_timeout_s if postgresql.before_stop else 0.0,
        watchdog_required=local.watchdog.mode == "required",
        postgres_host=postgresql.connect_address.host, postgres_port=postgresql.connect_address.port,
    )
    return Effective(local=local, cluster=cluster, postgresql=postgresql, settings=settings, problems=problems)


def _layered(local: Postgresql, cluster: ClusterConfig) -> Postgresql:
    """The node's keys over the cluster's; `parameters` merge, and those that pgha controls come from the cluster only."""
    shared = cluster.postgresql
    values: dict[str, Any] = {}
    for field in fields(SharedPostgresql):
        name = field.attribute
        if name in shared.given and name not in local.given:
            values[name] = getattr(shared, name)
    values["methods"] = {**shared.methods, **local.methods}
    ours = {k: v for k, v in shared.parameters.items() if not gucs.problem(k, v)}
    mine = {k: v for k, v in local.parameters.items() if k.lower() not in gucs.CONTROLLED}
    values["parameters"] = {**{k: v for k, v in ours.items() if k.lower() not in {m.lower() for m in mine}}, **mine}
    return replace(local, **values)


def needs_new_agent(old: LocalConfig, new: LocalConfig) -> tuple[str, ...]:
    """Keys that make this node who it is: a reload cannot change them, only another start can."""
    def identity(local: LocalConfig) -> dict[str, str]:
        return {
            "scope": local.scope, "namespace": local.namespace, "name": local.name, "postgresql.data_dir": local.postgresql.data_dir,
            "pgha.state_dir": local.pgha.state_dir, "pgha.runtime_dir": local.pgha.runtime_dir,
        }
    before, after = identity(old), identity(new)
    return tuple(key for key in before if before[key] != after[key])

"""How PostgreSQL is to be configured here and now: the effective configuration, and whom it follows.

Files and command line are derived anew at each start and each change; the only memory is whom to follow, whether the
server is frozen for an election, whom commits wait for, and what the primary's limits were at the last start.

Rules of this file:
* passwords go into a passfile (0600) for whatever reads arguments or files, and into memory for our own connections;
* `write_*` are file work, meant for a thread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pgha.config.load import Effective
from pgha.config.local import PostgresUser
from pgha.log import Log
from pgha.model.action import Source
from pgha.model.gucs import SettingValue, may_hold_secrets, setting_text
from pgha.model.rolling import STANDBY_AT_LEAST
from pgha.postgres import files
from pgha.postgres.controldata import ControlData
from pgha.postgres.initdb import Options
from pgha.postgres.parameters import Prepared, prepare
from pgha.postgres.processes import read_postmaster_pid

log = Log("pgha.act")

WhichUser = Literal["superuser", "replication", "rewind"]
Conninfo = dict[str, str | int]

#: How long a standby waits before it tries its upstream again. PostgreSQL's 5 s is the whole of a switchover's tail:
#: after the upstream was re-pointed it fails once more often than not, since the new primary is just being promoted.
RETRY_INTERVAL = "500ms"
#: Each try runs restore_command, too, which may be an expensive program.
RETRY_INTERVAL_WITH_RESTORE = "1s"
#: Where PostgreSQL puts its socket if nobody says otherwise; Debian's build says otherwise.
_DEFAULT_SOCKET_DIRS = ("/var/run/postgresql", "/tmp")  # noqa: S108  (PostgreSQL's own default)
#: A line of ours in postgresql.conf (files.postgresql_conf).
_WRITTEN = re.compile(r"^(primary_conninfo|primary_slot_name) = '((?:[^']|'')*)'$", re.MULTILINE)

#: In the state directory. A few kilobytes.
STARTED_WITH = "started_with.json"
LARGEST_STARTED_BYTES = 1 << 20

NAMES = "synchronous_standby_names"
_NAMES_WRITTEN = re.compile(rf"^{NAMES} = '((?:[^']|'')*)'$", re.MULTILINE)


class Wanted:
    """`effective()`: the configuration as it is now. `passfile`: written by us, outside the data directory, as is `started_file`:
    the settings with which PostgreSQL has last started (None: only this agent remembers them)."""

    def __init__(self, *, effective: Callable[[], Effective], passfile: Path, started_file: Path | None = None) -> None:
        self._effective = effective
        self._passfile = Path(effective().local.postgresql.pgpass or passfile)
        self._upstream: Source | None = None
        self._slot_name = ""
        self._frozen = False
        self._told = False      # whom to follow; until then a restarted agent keeps what its predecessor wrote
        self._control: ControlData | None = None
        self._notes: tuple[str, ...] = ()
        self._unreadable = ""
        self._vetted: dict[str, str] = {}       # what PostgreSQL's own program has looked at …
        self._left_out: dict[str, str] = {}     # … and what it refused of that, and why
        self._started_file = started_file
        self._started: dict[str, str] | None = _read_started(started_file)
        self._failed: dict[str, str] | None = None      # what was configured when the last start failed
        self._failed_why = ""
        self._data_dir = Path(effective().local.postgresql.data_dir)
        self.config_dir = Path(effective().local.postgresql.config_dir or self._data_dir)
        self._names: str | None = self._names_found()
        self._names_told = self._names is None

    # --- whom to follow ------------------------------------------------------------------------------------------------

    def follow(self, upstream: Source | None, slot_name: str) -> None:
        """From the next write on; this also ends a freeze."""
        self._upstream, self._slot_name, self._frozen, self._told = upstream, slot_name, False, True

    def freeze(self) -> None:
        """No upstream and no restore_command, until `follow` or the end of the promotion."""
        self._frozen = True

    def no_longer_frozen(self) -> None:
        """As a primary it follows nobody in any case."""
        self._upstream, self._slot_name, self._frozen, self._told = None, "", False, True

    @property
    def upstream(self) -> Source | None:
        return self._upstream

    @property
    def frozen(self) -> bool:
        return self._frozen

    # --- synchronous standbys ------------------------------------------------------------------------------------------

    def set_names(self, names: str | None) -> None:
        """synchronous_standby_names from the next write on, whatever else that write is for; None: the operator's own."""
        self._names, self._names_told = names, True

    @property
    def names(self) -> str | None:
        return self._names

    @property
    def names_told(self) -> bool:
        """False while a restarted agent keeps what its predecessor wrote: a running primary's commits wait by it."""
        return self._names_told

    def names_are_overridden(self) -> bool:
        """Does ALTER SYSTEM say something else, which would win?"""
        try:
            text = (self._data_dir / "postgresql.auto.conf").read_text(errors="replace")
        except OSError:
            return False
        return self._names is not None and re.search(rf"^\s*{NAMES}\b", text, re.MULTILINE | re.IGNORECASE) is not None

    def _names_found(self) -> str | None:
        """synchronous_standby_names in the file of a former agent, if it is not simply the operator's own."""
        own = str(next((v for k, v in self._parameters().items() if k.lower() == NAMES), ""))
        try:
            text = (self.config_dir / "postgresql.conf").read_text(errors="replace")
        except OSError:
            return None
        found = _NAMES_WRITTEN.search(text)
        written = found[1].replace("''", "'").replace("\\\\", "\\") if found else ""
        return None if written == own else written

    # --- connections -----------------------------------------------------------------------------------------------------

    def local_conninfo(self) -> Conninfo:
        """To the server of this data directory as superuser, for our own connections. `host` may be a name."""
        postgresql = self._effective().postgresql
        where: Conninfo = {"host": postgresql.listen.local_host, "port": postgresql.listen.port}
        if postgresql.use_unix_socket:
            where["host"] = self._socket_dir()
        return {**where, **self._own_login("superuser"), "dbname": postgresql.database}

    def _socket_dir(self) -> str:
        running = read_postmaster_pid(self._data_dir)
        if running is not None and running.socket_dir:
            return running.socket_dir
        given = str(self._parameters().get("unix_socket_directories", "")).split(",")[0].strip()
        return given or next((d for d in _DEFAULT_SOCKET_DIRS if Path(d).is_dir()), "/tmp")  # noqa: S108  (as above)

    def source_conninfo(self, source: Source, which: WhichUser) -> Conninfo:
        """To another member, for our own connections."""
        out: Conninfo = {"host": source.host, "port": source.port, **self._own_login(which), "application_name": self._name}
        return out | ({"replication": "true"} if which == "replication" else {"dbname": self._effective().postgresql.database})

    def program_conninfo(self, source: Source, which: WhichUser) -> Conninfo:
        """To another member, for programs: the password is in the passfile (`write_passfile` first)."""
        name, _ = self.user(which)
        out: Conninfo = {"host": source.host, "port": source.port, "user": name, "passfile": str(self._passfile),
                         # not the member's name: pg_basebackup's WAL stream confirms, and would pass for a synchronous standby
                         "application_name": f"pgha_copy_{self._name}", **self.keywords(which)}
        return out if which == "replication" else out | {"dbname": self._effective().postgresql.database}

    def keywords(self, which: WhichUser) -> dict[str, str]:
        """How this user connects, in libpq's keywords: the same for our own connections, programs and the walreceiver. No secret is among them."""
        postgresql = self._effective().postgresql
        user: PostgresUser = getattr(postgresql.authentication, which)
        return user.keywords() | ({"krbsrvname": postgresql.krbsrvname} if postgresql.krbsrvname else {})

    def _own_login(self, which: WhichUser) -> Conninfo:
        user: PostgresUser = getattr(self._effective().postgresql.authentication, which)
        out: Conninfo = {"user": user.username, **self.keywords(which)}
        if user.password:
            out["password"] = user.password.reveal()
        if user.sslpassword:
            out["sslpassword"] = user.sslpassword.reveal()
        return out

    @property
    def _name(self) -> str:
        return self._effective().local.name

    def user(self, which: WhichUser) -> tuple[str, str | None]:
        """(name, password)."""
        user: PostgresUser = getattr(self._effective().postgresql.authentication, which)
        return user.username, user.password.reveal() or None

    # --- settings --------------------------------------------------------------------------------------------------------

    @property
    def passfile(self) -> Path:
        return self._passfile

    def effective(self) -> Effective:
        return self._effective()

    def _parameters(self) -> dict[str, SettingValue]:
        return dict(self._effective().postgresql.parameters)

    def prepared(self, *, standby: bool = True) -> Prepared:
        """Everything but recovery settings, split into command line and file. `standby` false: not raised to the primary's limits."""
        parameters: Mapping[str, SettingValue] = self._parameters()
        if standby and self._falls_back() and self._started is not None:
            parameters = self._started
        done = _prepare(self._effective(), parameters, names=self._names, control=self._control if standby else None, left_out=self._stays_out)
        if standby and done.notes != self._notes:
            self._notes = done.notes
            for note in done.notes:
                log.warning("PostgreSQL setting", note=note)
        return done

    def command_line(self, said: ControlData, *, standby: bool = True) -> dict[str, str]:
        """For the start of the server whose pg_control is `said`; a standby gets at least its primary's limits."""
        self._control = said if standby else None
        return self.prepared().command_line

    def settings(self) -> dict[str, str]:
        """What the running server should have, by lower-case name: for comparing with pg_settings. A standby that needs more
        than that for its primary's sake waits for a restart until it does not (compatibility spec 5.5)."""
        return self.prepared(standby=False).file

    # --- what PostgreSQL would refuse --------------------------------------------------------------------------------------

    def to_vet(self, effective: Effective | None = None) -> dict[str, str]:
        """Everything that somebody has configured (`effective`: would configure), and that PostgreSQL has to make sense of."""
        counts = effective or self._effective()
        own = {name.lower(): setting_text(value) for name, value in counts.postgresql.recovery_conf.items()}
        return {**own, **_prepare(counts, dict(counts.postgresql.parameters)).file}

    @property
    def vetted(self) -> dict[str, str]:
        """What `to_vet` was when the program last looked at it."""
        return self._vetted

    def leave_out(self, looked_at: dict[str, str], refused: dict[str, str]) -> None:
        """Of `looked_at` the program refuses these, and would not start with them: they stay out until they say something else."""
        self._vetted = looked_at
        for name, why in refused.items():
            if name not in self._left_out:
                log.warning("PostgreSQL does not take a setting: it is left out", name=name, why=why)
        for name in self._left_out.keys() - refused.keys():
            log.info("a setting that was left out is taken again, or gone", name=name)
        self._left_out = dict(refused)

    @property
    def left_out(self) -> dict[str, str]:
        """By name in lower case: why."""
        changed = self._changed() if self._falls_back() else {}
        return {**dict.fromkeys(changed, f"PostgreSQL did not start with it: {self._failed_why}"), **self._left_out}

    # --- what PostgreSQL does not start with, although each value is possible ----------------------------------------------

    def note_started(self) -> None:
        """PostgreSQL has started: what it was given is good, and is what counts should it not start with something else."""
        now = self._started_with()
        if now == self._started:
            return
        self._started = now
        if self._started_file is not None:
            try:
                files.write_if_changed(self._started_file, json.dumps(now, sort_keys=True), mode=0o600)
            except OSError as error:    # no reason to end a server that runs
                log.warning("the settings with which PostgreSQL has started could not be kept", why=f"{error.filename}: {error.strerror}")

    def started_is_news(self) -> bool:
        """Is there anything for `note_started` to write?"""
        return self._started_with() != self._started

    def _started_with(self) -> dict[str, str]:
        now = {name: value for name, value in self.prepared().file.items() if name != NAMES or self._names is None}
        if self._control is not None:       # not what a standby had for its primary's sake
            now |= {name: value for name, value in self.prepared(standby=False).file.items() if name in STANDBY_AT_LEAST and not self._falls_back()}
        return now

    def did_not_start(self, why: str) -> None:
        """PostgreSQL ended instead of starting. If its settings are others than when it last did, those count next time: a
        shared_buffers beyond the machine's memory is no reason to be without a server. If it does not start with those
        either, it was something else, and what is configured is tried again."""
        if self._falls_back():
            self._failed = None
        elif self._started is not None and (changed := self._changed()):
            self._failed, self._failed_why = self.to_vet(), _last_words(why)
            log.warning("PostgreSQL did not start with changed settings: the next start is with those of the last one that it did start with",
                        changed=", ".join(name if may_hold_secrets(name) else f"{name}: {old} → {new}" for name, (old, new) in changed.items()), why=self._failed_why)

    def try_configured(self) -> None:
        """An operator asks for a restart: with what is configured."""
        self._failed = None

    def _falls_back(self) -> bool:
        return self._failed is not None and self._started is not None and self._failed == self.to_vet()

    def _changed(self) -> dict[str, tuple[str, str]]:
        """Name → (as it last started, as configured), for those that differ."""
        started, now = self._started or {}, self.prepared(standby=False).file
        own = NAMES if self._names is not None else ""
        return {name: (started.get(name, "not set"), now.get(name, "not set")) for name in sorted(started.keys() | now.keys())
                if started.get(name) != now.get(name) and name != own}

    @property
    def _stays_out(self) -> dict[str, str]:
        """Name → the value that was refused."""
        return {name: self._vetted[name] for name in self._left_out}

    def recovery(self) -> dict[str, str]:
        """primary_conninfo and its companions; both sources of WAL are empty while frozen."""
        effective = self._effective()
        own = {name: setting_text(value) for name, value in effective.postgresql.recovery_conf.items() if self._stays_out.get(name.lower()) != setting_text(value)}
        out = {"primary_conninfo": "", "primary_slot_name": "", **own}
        if self._frozen:
            return {**out, "restore_command": ""}
        if not self._told:
            return out | self._written()
        if self._upstream is not None:
            out["primary_conninfo"] = files.conninfo_text(files.primary_conninfo(
                host=self._upstream.host, port=self._upstream.port, user=self.user("replication")[0], application_name=self._name,
                passfile=self._passfile, dbname=effective.postgresql.database, options=self.keywords("replication")))
            out["primary_slot_name"] = self._slot_name
        return out

    def _written(self) -> dict[str, str]:
        """primary_conninfo and primary_slot_name as a former agent wrote them."""
        try:
            text = (self.config_dir / "postgresql.conf").read_text(errors="replace")
        except OSError:
            return {}
        return {name: value.replace("''", "'").replace("\\\\", "\\") for name, value in _WRITTEN.findall(text)}

    # --- files -----------------------------------------------------------------------------------------------------------

    def write_passfile(self) -> bool:
        """The passwords of the three users, for whichever member: re-pointing needs no rewrite. True if it changed."""
        lines = []
        for which in ("replication", "rewind", "superuser"):
            name, password = self.user(which)
            if password:
                line = files.pgpass_line(host="*", port="*", user=name, password=password)
                if line not in lines:
                    lines.append(line)
        return files.write_pgpass(self._passfile, lines)

    def write_running(self) -> bool:
        """Write what has changed; True if a reload has something to read."""
        changed = self.write_passfile()
        postgresql = self._effective().postgresql
        given = {name.lower() for name in postgresql.parameters}
        changed |= files.write_postgresql_conf(self.config_dir, self.prepared().file, self.recovery(), include=self._included())
        if postgresql.pg_hba and "hba_file" not in given:
            changed |= files.write_hba(self.config_dir, postgresql.pg_hba)
        if postgresql.pg_ident and "ident_file" not in given:
            changed |= files.write_ident(self.config_dir, postgresql.pg_ident)
        return changed

    def _included(self) -> str:
        """The operator's own file: custom_conf, if it can be read. A file that is missing would keep PostgreSQL from starting."""
        given = self._effective().postgresql.custom_conf
        readable = not given or os.access(given, os.R_OK)
        if not readable and given != self._unreadable:
            log.warning("postgresql.custom_conf cannot be read: postgresql.base.conf is included in its place", custom_conf=given)
        self._unreadable = "" if readable else given
        return given if given and readable else files.BASE_CONF

    def write_stopped(self, said: ControlData, *, standby: bool = True) -> None:
        """Before a start: the same, and nothing in postgresql.auto.conf may win over it."""
        self._control = said if standby else None
        if restored := files.restore_configuration(self.config_dir, self._data_dir):
            log.info("restored configuration files from their copies", names=restored)
        ours = files.RECOVERY_PARAMETERS if self._names is None else (*files.RECOVERY_PARAMETERS, NAMES)
        if removed := files.clean_auto_conf(self._data_dir, ours):
            log.info("removed settings that are pgha's from postgresql.auto.conf", names=removed)
        self.write_running()
        if self.config_dir != self._data_dir:
            files.save_configuration(self.config_dir, self._data_dir)

    def bootstrap_hba(self) -> None:
        """A new cluster's pg_hba.conf: initdb's own lines, then bootstrap.pg_hba, unless postgresql.pg_hba says it all."""
        effective = self._effective()
        if effective.local.bootstrap.pg_hba and not effective.postgresql.pg_hba:
            path = self.config_dir / "pg_hba.conf"
            files.write_file(path, (path.read_text() if path.exists() else "") + "".join(f"{line}\n" for line in effective.local.bootstrap.pg_hba))


def _last_words(why: str) -> str:
    """Of a server's log: the last line that says why it ended."""
    lines = [line for line in why.strip().splitlines() if line.strip()]
    fatal = [line for line in lines if "FATAL:" in line or "PANIC:" in line]
    return ((fatal or lines or ["it ended"])[-1])[-300:]


def _read_started(path: Path | None) -> dict[str, str] | None:
    """None if there is nothing of use."""
    try:
        found = json.loads(files.read_beginning(path, LARGEST_STARTED_BYTES)) if path is not None else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else None


def _prepare(effective: Effective, parameters: Mapping[str, SettingValue], *, names: str | None = None, control: ControlData | None = None,
             left_out: Mapping[str, str] | None = None) -> Prepared:
    """`left_out`: name → the value with which it is left out."""
    listen = effective.postgresql.listen
    wanted = dict(parameters)
    if "wal_retrieve_retry_interval" not in {name.lower() for name in wanted}:
        wanted["wal_retrieve_retry_interval"] = RETRY_INTERVAL_WITH_RESTORE if effective.postgresql.recovery_conf.get("restore_command") else RETRY_INTERVAL
    if names is not None:
        wanted = {name: value for name, value in wanted.items() if name.lower() != NAMES} | {NAMES: names}
    forced = {"listen_addresses": ",".join(listen.hosts), "port": str(listen.port), "cluster_name": effective.local.scope}
    done = prepare(wanted, forced=forced, control=control)
    out = {name for name, value in (left_out or {}).items() if name not in forced and done.file.get(name) == value}
    return prepare({name: value for name, value in wanted.items() if name.lower() not in out}, forced=forced, control=control) if out else done


def options_of(given: Sequence[tuple[str, str | None]]) -> Options:
    """A program's options from the configuration, as postgres/ takes them."""
    return [name if value is None else {name: value} for name, value in given]

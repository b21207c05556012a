"""One node of a test bed: its configuration file, its agent, its guard, its PostgreSQL, and what can be done to them."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w

from pgha.demo.processes import Process, identify, pgha_of, postgres_of, process_of, signal_all, spawn
from pgha.demo.programs import Program

if TYPE_CHECKING:
    import psycopg

_REST_S = 2.0


class Profile(NamedTuple):
    """The three times of the dynamic configuration, in seconds."""

    ttl: int
    loop_wait: int
    retry_timeout: int


FAST = Profile(ttl=5, loop_wait=1, retry_timeout=1)
DEFAULT = Profile(ttl=30, loop_wait=10, retry_timeout=10)


class Settings(NamedTuple):
    """What all nodes of a bed have in common. `user`: who runs them, None for ourselves."""

    program: Program
    bin_dir: Path
    scope: str
    password: str
    profile: Profile
    etcd_hosts: tuple[str, ...]
    user: str | None
    dynamic: Mapping[str, Any]


class Answer(NamedTuple):
    """What an agent's REST server said. `body` is decoded JSON if it was JSON, else text."""

    status: int
    body: Any


class Node:
    """A pgha node under `directory`; `runtime` is its directory on tmpfs."""

    def __init__(self, name: str, address: str, *, ports: tuple[int, int], directory: Path, runtime: Path, settings: Settings) -> None:
        self.name = name
        self.address = address
        self.port, self.rest_port = ports
        self.directory = directory
        self.runtime = runtime
        self.settings = settings
        self.tags: dict[str, Any] = {}
        self.agent: subprocess.Popen[bytes] | None = None
        self._meant_to_run = False

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    @property
    def config_path(self) -> Path:
        return self.directory / "pgha.toml"

    @property
    def log_path(self) -> Path:
        return self.directory / "agent.log"

    def configuration(self) -> dict[str, Any]:
        """What pgha.toml holds."""
        s = self.settings
        where = str(self.directory)
        return {
            "scope": s.scope, "namespace": "/service/", "name": self.name,
            "restapi": {"listen": f"{self.address}:{self.rest_port}", "connect_address": f"{self.address}:{self.rest_port}"},
            "etcd3": {"hosts": list(s.etcd_hosts)},
            "bootstrap": {
                "dcs": {
                    **s.profile._asdict(), "maximum_lag_on_failover": 1048576, **s.dynamic,
                    "postgresql": {"use_pg_rewind": True, "use_slots": True, "parameters": {
                        "max_connections": 100, "max_wal_senders": 10, "max_replication_slots": 10,
                        "wal_keep_size": "128MB", "wal_log_hints": "on"}},
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
            },
            "postgresql": {
                "listen": f"{self.address}:{self.port}", "connect_address": f"{self.address}:{self.port}",
                "data_dir": str(self.data_dir), "bin_dir": str(s.bin_dir), "pgpass": f"{where}/pgpass",
                "authentication": {
                    "superuser": {"username": "postgres", "password": s.password},
                    "replication": {"username": "replicator", "password": s.password},
                    "rewind": {"username": "rewinder", "password": s.password},
                },
                "pg_hba": ["local all all trust", "host replication replicator 127.0.0.0/8 scram-sha-256",
                           "host all all 127.0.0.0/8 scram-sha-256"],
                "parameters": {
                    "unix_socket_directories": str(self.runtime), "shared_buffers": "32MB", "max_wal_size": "256MB",
                    "dynamic_shared_memory_type": "mmap",  # in the data directory, so that nothing is left after SIGKILL
                    "logging_collector": "on", "log_directory": where, "log_filename": "postgresql.log",
                    "log_line_prefix": "%m [%p] ", "log_timezone": "UTC", "log_rotation_age": "0", "log_rotation_size": "0",
                },
            },
            **({"tags": self.tags} if self.tags else {}),
            "pgha": {"state_dir": f"{where}/state", "runtime_dir": str(self.runtime)},
        }

    def write_configuration(self) -> None:
        """(Re)write pgha.toml; a running agent reads it on SIGHUP."""
        for place in (self.directory, self.runtime):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._give(place)
        new = self.config_path.with_suffix(".new")
        new.write_bytes(tomli_w.dumps(self.configuration()).encode())
        new.chmod(0o600)
        self._give(new)
        new.replace(self.config_path)

    def _give(self, path: Path) -> None:
        if self.settings.user is not None:
            shutil.chown(path, self.settings.user, self.settings.user)

    # -- the agent

    def start_agent(self) -> None:
        """Start `pgha run`; a former one must have ended."""
        assert self.agent is None or self.agent.poll() is not None, f"the agent of {self.name} is still running"
        self.write_configuration()
        program = self.settings.program
        self.agent = spawn([*program.argv, "run", str(self.config_path)], log=self.log_path, directory=self.directory,
                           user=self.settings.user, environment=program.environment)
        self._meant_to_run = True

    @property
    def ended_by_itself(self) -> int | None:
        """The exit code of an agent that nobody here ended; None while all is as it should be."""
        return self.agent.poll() if self._meant_to_run and self.agent is not None else None

    @property
    def agent_process(self) -> Process | None:
        """None when it is not running."""
        return None if self.agent is None else process_of(self.agent)

    def signal_agent(self, number: signal.Signals) -> bool:
        """False if it is not running."""
        if number in {signal.SIGTERM, signal.SIGINT, signal.SIGKILL}:
            self._meant_to_run = False
        process = self.agent_process
        return process is not None and process.send(number)

    def stop_agent(self, timeout_s: float = 60) -> int:
        """SIGTERM, wait, and give its exit code; TimeoutExpired if it does not end."""
        assert self.agent is not None
        self.signal_agent(signal.SIGTERM)
        return self.agent.wait(timeout_s)

    def kill_agent(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal_agent(signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait(10)

    # -- the guard

    def guards(self) -> list[Process]:
        """The guard process of this data directory (a list, since two would be a finding)."""
        return pgha_of("guard", self.config_path)

    # -- PostgreSQL

    def postmaster(self) -> Process | None:
        """The living postmaster that postmaster.pid names."""
        try:
            first = (self.data_dir / "postmaster.pid").read_text(encoding="utf-8").splitlines()[0]
            process = identify(int(first))
        except (OSError, ValueError, IndexError):
            return None
        return process if process in postgres_of(self.data_dir) else None

    def postgres(self) -> list[Process]:
        """All living processes of PostgreSQL's in this data directory."""
        return postgres_of(self.data_dir)

    def signal_postgres(self, number: signal.Signals) -> None:
        """To every process of PostgreSQL's, the postmaster first, until no process is there that did not get it."""
        done: set[Process] = set()
        postmaster = self.postmaster()
        if postmaster is not None and postmaster.send(number):
            done.add(postmaster)
        while fresh := [p for p in self.postgres() if p not in done]:
            signal_all(fresh, number)
            done.update(fresh)

    def quit_postgres(self) -> None:
        """Immediate shutdown, also of a frozen one; unlike SIGKILL it lets PostgreSQL free its shared memory."""
        postmaster = self.postmaster()
        if postmaster is not None:
            postmaster.send(signal.SIGQUIT)
        signal_all(self.postgres(), signal.SIGCONT)

    # -- talking to them

    def get(self, path: str, timeout_s: float = _REST_S) -> Answer | None:
        """None if the agent did not answer in time."""
        return self.request("GET", path, timeout_s=timeout_s)

    def request(self, method: str, path: str, body: Any = None, *, timeout_s: float = _REST_S) -> Answer | None:
        return self._exchange(http.client.HTTPConnection(self.address, self.rest_port, timeout=timeout_s), method, path, body)

    @staticmethod
    def _exchange(connection: http.client.HTTPConnection, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer | None:
        """One request over `connection`, which is closed then. None if there was no answer."""
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        try:
            return Answer(response.status, json.loads(text))
        except ValueError:
            return Answer(response.status, text)

    def patroni(self) -> dict[str, Any]:
        """GET /patroni; empty if there was no answer."""
        answer = self.get("/patroni")
        return answer.body if answer is not None and isinstance(answer.body, dict) else {}

    def says_primary(self) -> bool:
        """Its agent holds the lock, and its PostgreSQL runs as a primary."""
        answer = self.get("/primary")
        if answer is None or answer.status != 200 or not isinstance(answer.body, dict):
            return False
        return bool(answer.body.get("role") == "primary" and answer.body.get("state") == "running")

    def dsn(self) -> str:
        """Without the password, which is in the bed's pgpass file."""
        return f"host={self.address} port={self.port} user=postgres dbname=postgres"

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A connection as superuser, in autocommit. psycopg.OperationalError if that does not work within 2 s."""
        import psycopg

        return psycopg.connect(self.dsn(), password=self.settings.password, autocommit=True,
                               **{"connect_timeout": 2, "sslmode": "disable", "gssencmode": "disable", **options})

    def ask(self, query: str) -> Any:
        """The first column of the first row, or None."""
        with self.connect() as connection:
            row = connection.execute(query).fetchone()
            return None if row is None else row[0]

    def log_tail(self, lines: int = 40) -> str:
        """The end of the agent's log."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - 200 * lines))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

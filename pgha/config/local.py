"""This node's configuration: the keys of patroni.yml, in TOML (compatibility spec 5.6), and pgha's own in [pgha].

Attributes carry their unit (`pg_ctl_timeout_s`), keys do not (`pg_ctl_timeout = "1min"`). Passwords are `Secret`s.
What depends on several keys is in rules.py; load.py puts both together.

A key of the reference that this version does not carry out is refused by name (REFUSED), never silently dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import field

from pgha.config.addresses import Address, Listen, address, addresses, bracketed, listen, url
from pgha.config.cluster import LATER, OptionList, SharedPostgresql
from pgha.config.lists import headers, lines, mapping, program_options, texts
from pgha.config.programs import BootstrapMethod, bootstrap_method, command, method_name
from pgha.config.schema import Key, Section
from pgha.config.values import (
    Kind,
    Secret,
    Wrong,
    boolean,
    choice,
    duration,
    flag,
    integer,
    path,
    secret,
    shown,
    text,
    type_name,
)
from pgha.model.cluster import Tags

CLUSTER_WIDE = "belongs to the whole cluster, not to this file; allowed: bootstrap.dcs before the first start, `pgha ctl edit-config` after it"
INITDB = "initdb"
#: Programs and the walreceiver would have to get it in arguments, or in primary_conninfo, which PostgreSQL shows and logs.
NO_SSLPASSWORD = ("is not supported, since pg_basebackup, pg_rewind and the walreceiver cannot be given it secretly; "
                  "allowed: an sslkey without a passphrase that only the agent's user can read")
NO_SSLPASSWORD_TO_REWIND = "is given, but without a rewind user it is the superuser who rewinds, and pg_rewind cannot be given it secretly; allowed: rewind.username, or an sslkey without a passphrase that only the agent's user can read"
NO_THREADS = "has no meaning, since pgha has no thread pool; allowed: leave it out"


class Credentials(Section, frozen=True, kw_only=True):
    """A user name and a password, for REST and ctl. `password` is already read if it came from `password_file`."""

    EXCLUSIVE: ClassVar = (("password", "password_file"),)

    username: Annotated[str, Key(text())] = ""
    password: Annotated[Secret, Key(secret())] = Secret("")
    password_file: Annotated[str, Key(path())] = ""


class PostgresUser(Section, frozen=True, kw_only=True):
    """How one of pgha's PostgreSQL users connects. libpq's connection keywords; "" = libpq's default.

    `sslpassword`: only of a superuser who does not rewind (`no_sslpassword`), for pgha's own connections.
    """

    EXCLUSIVE: ClassVar = (("password", "password_file"),)

    username: Annotated[str, Key(text())] = ""
    password: Annotated[Secret, Key(secret())] = Secret("")
    password_file: Annotated[str, Key(path())] = ""
    sslmode: Annotated[str, Key(choice("disable", "allow", "prefer", "require", "verify-ca", "verify-full"))] = ""
    sslkey: Annotated[str, Key(path())] = ""
    sslpassword: Annotated[Secret, Key(secret())] = Secret("")
    sslcert: Annotated[str, Key(path())] = ""
    sslrootcert: Annotated[str, Key(text("a path, or system"))] = ""
    sslcrl: Annotated[str, Key(path())] = ""
    sslcrldir: Annotated[str, Key(path())] = ""
    sslnegotiation: Annotated[str, Key(choice("postgres", "direct"))] = ""
    gssencmode: Annotated[str, Key(choice("disable", "prefer", "require"))] = ""
    channel_binding: Annotated[str, Key(choice("disable", "prefer", "require"))] = ""

    def keywords(self) -> dict[str, str]:
        """libpq's keywords for everything but user and passwords: no secret is among them."""
        names = ("sslmode", "sslkey", "sslcert", "sslrootcert", "sslcrl", "sslcrldir", "sslnegotiation", "gssencmode", "channel_binding")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def no_sslpassword(user: str, *, superuser_rewinds: bool) -> str:
    """Why this user may have no sslpassword; "" if it may."""
    if user == "superuser":
        return NO_SSLPASSWORD_TO_REWIND if superuser_rewinds else ""
    return NO_SSLPASSWORD


class Authentication(Section, frozen=True, kw_only=True):
    """`rewind` without a username: the superuser rewinds."""

    superuser: PostgresUser = PostgresUser()
    replication: PostgresUser = PostgresUser()
    rewind: PostgresUser = PostgresUser()


class Postgresql(SharedPostgresql, frozen=True, kw_only=True):
    """[postgresql]: what `/config` may say too (SharedPostgresql), and what only this node can know."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **SharedPostgresql.REFUSED,
        "use_slots": CLUSTER_WIDE.replace("bootstrap.dcs", "bootstrap.dcs.postgresql"),
    }

    listen: Annotated[Listen, Key(listen(5432), required=True)] = Listen()
    connect_address: Annotated[Address, Key(address(5432))] = Address()
    proxy_address: Annotated[Address, Key(address(5432))] = Address()
    data_dir: Annotated[str, Key(path(), required=True)] = ""
    config_dir: Annotated[str, Key(path())] = ""
    pgpass: Annotated[str, Key(path())] = ""
    authentication: Authentication = Authentication()


class RestApi(Section, frozen=True, kw_only=True):
    REFUSED: ClassVar = {"thread_pool_size": NO_THREADS}

    listen: Annotated[Listen, Key(listen(8008), required=True)] = Listen()
    connect_address: Annotated[Address, Key(address(8008))] = Address()
    authentication: Credentials = Credentials()
    certfile: Annotated[str, Key(path())] = ""
    keyfile: Annotated[str, Key(path())] = ""
    keyfile_password: Annotated[Secret, Key(secret())] = Secret("")
    cafile: Annotated[str, Key(path())] = ""
    ciphers: Annotated[str, Key(text("an OpenSSL cipher list"))] = ""
    verify_client: Annotated[str, Key(choice("none", "optional", "required"))] = "none"
    allowlist: Annotated[tuple[str, ...], Key(texts("a list of addresses, networks (CIDR) and host names"))] = ()
    allowlist_include_members: Annotated[bool, Key(flag())] = False
    http_extra_headers: Annotated[dict[str, str], Key(headers())] = field(default_factory=dict)
    https_extra_headers: Annotated[dict[str, str], Key(headers())] = field(default_factory=dict)
    request_queue_size: Annotated[int, Key(integer(0, 4096))] = 128      # the reference's 5 is a single thread's
    server_tokens: Annotated[str, Key(choice("Original", "Minimal", "ProductOnly"))] = "Original"

    @property
    def tls(self) -> bool:
        return bool(self.certfile)

    @property
    def base_url(self) -> str:
        """Where others reach it: "http://host:8008"."""
        return f"{'https' if self.tls else 'http'}://{self.connect_address}"


class Etcd3(Section, frozen=True, kw_only=True):
    """[etcd3]: one of host, hosts, url. `endpoints` has them all as URLs."""

    REFUSED: ClassVar = dict.fromkeys(("srv", "srv_suffix", "proxy", "use_proxies"), "not supported yet by this version; allowed: host, hosts or url")
    EXCLUSIVE: ClassVar = (("host", "hosts", "url"), ("password", "password_file"))

    host: Annotated[Address, Key(address(2379))] = Address()
    hosts: Annotated[tuple[Address, ...], Key(addresses(2379))] = ()
    url: Annotated[str, Key(url("http", "https", default_port=2379))] = ""
    protocol: Annotated[str, Key(choice("http", "https"))] = "http"
    username: Annotated[str, Key(text())] = ""
    password: Annotated[Secret, Key(secret())] = Secret("")
    password_file: Annotated[str, Key(path())] = ""
    cacert: Annotated[str, Key(path())] = ""
    cert: Annotated[str, Key(path())] = ""
    key: Annotated[str, Key(path())] = ""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """"http://10.0.0.1:2379", … in the order given."""
        if self.url:
            return (self.url,)
        return tuple(f"{self.protocol}://{bracketed(a.host)}:{a.port}" for a in (self.hosts or ((self.host,) if self.host else ())))


def _dcs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(f"is {type_name(value)}, not a table")
    return value


class Bootstrap(Section, frozen=True, kw_only=True):
    """[bootstrap]: used once, by the node that makes the cluster. `dcs` becomes `/config` (see `cluster.normalised`)."""

    REFUSED: ClassVar = {"users": "has been removed from the reference; allowed: a post_bootstrap script"}
    EXCLUSIVE: ClassVar = (("post_bootstrap", "post_init"),)
    CHOSEN: ClassVar = ("methods", bootstrap_method())

    dcs: Annotated[dict[str, Any], Key(Kind(_dcs, "the cluster's keys", shape="table"))] = field(default_factory=dict)
    method: Annotated[str, Key(Kind(method_name, "initdb, or the name of a table beside it that has a command"))] = INITDB
    methods: dict[str, BootstrapMethod] = field(default_factory=dict)      # [bootstrap.NAME] of the NAME in `method`
    initdb: Annotated[OptionList, Key(program_options("pgdata", "nosync", "pwfile", "sync-only", "version", program="initdb"))] = ()
    pg_hba: Annotated[tuple[str, ...], Key(lines("a list of pg_hba.conf lines"))] = ()
    post_bootstrap: Annotated[str, Key(command())] = ""
    post_init: Annotated[str, Key(command())] = ""


def _margin(value: Any) -> int:
    return int(duration(-1, whole=True).parse(value))


class Watchdog(Section, frozen=True, kw_only=True):
    """[watchdog]: always local. `safety_margin_s` -1: half of ttl."""

    REFUSED: ClassVar = {"driver": "has no meaning, since there is one driver; allowed: leave it out"}

    mode: Annotated[Literal["off", "automatic", "required"], Key(choice("off", "automatic", "required", also={False: "off"}))] = "automatic"
    device: Annotated[str, Key(path())] = "/dev/watchdog"
    safety_margin_s: Annotated[int, Key(Kind(_margin, "whole seconds, or -1 for half of ttl"), name="safety_margin")] = 5


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _loggers(value: Any) -> dict[str, str]:
    levels = mapping().parse(value)
    for name, level in levels.items():
        if level.upper() not in _LEVELS:
            raise Wrong(f"has {shown(level)} for {name}")
    return {name: level.upper() for name, level in levels.items()}


#: What every JSON line has (log.py).
_OWN_FIELDS = ("time", "level", "event", "traceback")


def _static_fields(value: Any) -> dict[str, str]:
    found: dict[str, str] = mapping().parse(value)
    if own := [name for name in found if name in _OWN_FIELDS]:
        raise Wrong(f"has {own[0]}, which pgha sets itself")
    return found


class LogConfig(Section, frozen=True, kw_only=True):
    """[log]: to standard error, which systemd hands to the journal. `static_fields`: of JSON lines."""

    REFUSED: ClassVar = {
        **dict.fromkeys(("traceback_level", "format", "dateformat"), LATER),
        **dict.fromkeys(("dir", "mode", "file_num", "file_size"), "is not supported, since pgha writes to standard error; allowed: leave it out (systemd: StandardError=append:FILE)"),
        "deduplicate_heartbeat_logs": "has no meaning, since pgha logs no heartbeats; allowed: leave it out",
    }

    type: Annotated[Literal["plain", "json"], Key(choice("plain", "json"))] = "plain"
    level: Annotated[str, Key(choice(*_LEVELS))] = "INFO"
    max_queue_size: Annotated[int, Key(integer(1))] = 1000      # lines that whoever reads them has not taken yet
    loggers: Annotated[dict[str, str], Key(Kind(_loggers, f"a table of logger = level, levels {', '.join(_LEVELS)}", shape="table"))] = field(default_factory=dict)
    static_fields: Annotated[dict[str, str], Key(Kind(_static_fields, f"a table of texts; not {', '.join(_OWN_FIELDS)}", shape="table"))] = field(default_factory=dict)


class Ctl(Section, frozen=True, kw_only=True):
    """[ctl]: how `pgha ctl`, and agents among themselves, call REST; restapi's own credentials stand in for missing ones."""

    authentication: Credentials = Credentials()
    insecure: Annotated[bool, Key(flag())] = False
    cacert: Annotated[str, Key(path())] = ""
    certfile: Annotated[str, Key(path())] = ""
    keyfile: Annotated[str, Key(path())] = ""
    keyfile_password: Annotated[Secret, Key(secret())] = Secret("")


class Own(Section, frozen=True, kw_only=True):
    """[pgha]: what the reference does not have. "" = the default of directories.py.

    `guard`: who starts the guard process: the agent, or a service of its own ("service", under systemd).
    `event_readers`: who may follow GET /pgha/events at once; never more than a quarter of the files that the agent may open.
    `…_timeout_s`: how long one of the operator's programs may take before it is ended by force.
    """

    state_dir: Annotated[str, Key(path())] = ""
    runtime_dir: Annotated[str, Key(path())] = ""
    guard: Annotated[Literal["agent", "service"], Key(choice("agent", "service"))] = "agent"
    event_readers: Annotated[int, Key(integer(0, 10_000))] = 100
    callback_timeout_s: Annotated[float, Key(duration(1, 86400), name="callback_timeout")] = 60.0
    pre_promote_timeout_s: Annotated[float, Key(duration(1, 86400), name="pre_promote_timeout")] = 60.0
    before_stop_timeout_s: Annotated[float, Key(duration(1, 86400), name="before_stop_timeout")] = 60.0


_FLAG_TAGS = ("nofailover", "nosync", "noloadbalance", "clonefrom", "nostream")
_PRIORITY_TAGS = ("failover_priority", "sync_priority")


def _tags(value: Any) -> Tags:
    """Tags as they are published: flags equal to their default are left out, others keep their type (spec 6)."""
    if not isinstance(value, dict):
        raise Wrong(f"is {type_name(value)}, not a table")
    raw: dict[str, Any] = {}
    for name, item in value.items():
        if name in _FLAG_TAGS:
            try:
                on = boolean(item)
            except Wrong as wrong:
                raise Wrong(f"has {name}, which {wrong.what}") from None
            if on or f"{'failover' if name == 'nofailover' else 'sync'}_priority" in value:
                raw[name] = on
        elif name in _PRIORITY_TAGS:
            try:
                raw[name] = integer().parse(item)
            except Wrong as wrong:
                raise Wrong(f"has {name}, which {wrong.what}") from None
        elif isinstance(item, (dict, list)) or item is None or (name == "replicatefrom" and not isinstance(item, str)):
            raise Wrong(f"has {type_name(item)} for {name}")
        elif type(item) not in (bool, int, float, str):
            raise Wrong(f"has {type_name(item)} for {name}, which has no place in JSON")
        else:
            raw[name] = item
    return Tags.of(raw)


def _name(value: Any) -> str:
    name: str = text().parse(value)
    if not re.fullmatch(r"[^/\s\x00-\x1f\x7f]+", name) or name in (".", "..") or name == "__patroni_strict_sync_replica_placeholder__":
        raise Wrong(f"is {shown(name)}")
    if len(name.encode()) > 200:
        raise Wrong("is longer than 200 bytes")
    return name


def _namespace(value: Any) -> str:
    parts = [part for part in text().parse(value).split("/") if part]
    if not parts or any(re.search(r"[\s\x00-\x1f\x7f]", part) for part in parts):
        raise Wrong(f"is {shown(value)}")
    return "/".join(parts)


_OTHER_STORE = "not supported yet by this version; allowed: etcd3"


class LocalConfig(Section, frozen=True, kw_only=True):
    """One node's file(s) and environment, checked. `namespace` without slashes at its ends; keys: `prefix`."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("etcd", "consul", "zookeeper", "exhibitor", "kubernetes", "raft"), _OTHER_STORE),
        "citus": LATER, "thread_pool_size": NO_THREADS, "thread_stack_size": NO_THREADS,
        **dict.fromkeys((
            "ttl", "loop_wait", "retry_timeout", "maximum_lag_on_failover", "maximum_lag_on_syncnode", "max_timelines_history",
            "primary_start_timeout", "master_start_timeout", "primary_stop_timeout", "master_stop_timeout", "primary_race_backoff",
            "synchronous_mode", "synchronous_mode_strict", "synchronous_node_count", "failsafe_mode", "check_timeline", "pause",
            "member_slots_ttl", "slots", "permanent_slots", "permanent_replication_slots", "ignore_slots", "standby_cluster",
        ), CLUSTER_WIDE),
    }

    scope: Annotated[str, Key(Kind(_name, "text without slashes and spaces"), required=True)] = ""
    namespace: Annotated[str, Key(Kind(_namespace, "path of names, as service or /db/service/"))] = "service"
    name: Annotated[str, Key(Kind(_name, "text without slashes and spaces, unique in the cluster"), required=True)] = ""
    restapi: RestApi = RestApi()
    etcd3: Etcd3 = Etcd3()
    bootstrap: Bootstrap = Bootstrap()
    postgresql: Postgresql = Postgresql()
    watchdog: Watchdog = Watchdog()
    tags: Annotated[Tags, Key(Kind(_tags, "true or false for flags, whole numbers for priorities, a member's name for replicatefrom; any other tag: text, number or boolean", shape="table"))] = Tags()
    log: LogConfig = LogConfig()
    ctl: Ctl = Ctl()
    pgha: Own = Own()

    @property
    def prefix(self) -> str:
        """"/service/demo/": what all keys of this cluster begin with."""
        return f"/{self.namespace}/{self.scope}/"

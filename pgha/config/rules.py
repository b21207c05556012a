"""Which keys depend on one another? Defaults that follow from other keys, password files, and rules over several keys.

A file of rules, not of keys: each function takes the configuration and returns it completed, or reports.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container
from pathlib import Path as FilePath
from typing import Any, TypeVar

from msgspec.structs import replace

from pgha.config import gucs
from pgha.config.addresses import Address
from pgha.config.cluster import known_methods, read_strictly
from pgha.config.local import (
    INITDB,
    Credentials,
    Ctl,
    Etcd3,
    LocalConfig,
    Postgresql,
    PostgresUser,
    RestApi,
    no_sslpassword,
)
from pgha.config.schema import Path, Report, every_key
from pgha.config.values import Secret, shown

#: A password file holds one line; anything longer is the wrong file.
PASSWORD_FILE_LIMIT_BYTES = 4096

E = TypeVar("E", Credentials, Etcd3)


def finish(local: LocalConfig, report: Report) -> LocalConfig:
    """`local` with everything that follows from it; what contradicts itself is reported."""
    _tags(local, report)
    _private_keys(local, report)
    _key_of_a_certificate(local.ctl, "ctl", report)
    method = local.bootstrap.method
    if method != INITDB and method not in local.bootstrap.methods:
        report.problem(("bootstrap", "method"), f"is {shown(method)}; allowed: initdb, or a name that has a table with a command, here [bootstrap.{method}]")
    of_all = read_strictly(local.bootstrap.dcs, ("bootstrap", "dcs"), report).postgresql.methods if "dcs" in local.bootstrap.given else {}
    return replace(
        local, restapi=_restapi(local.restapi, report), etcd3=_etcd3(local, report), postgresql=_postgresql(local, of_all, report),
        ctl=replace(local.ctl, authentication=_with_password(local.ctl.authentication, ("ctl", "authentication"), report)),
    )


def _connect_address(section: RestApi | Postgresql, at: str, report: Report) -> Address:
    """What others connect to: as given, else the only address that is listened on."""
    listen = section.listen
    if "connect_address" in section.given or not listen:
        return section.connect_address
    if listen.everywhere or len(listen.hosts) != 1:
        if report.complete:
            report.problem((at, "connect_address"), f"is missing, and listen ({listen}) does not tell it; allowed: one host:port that the other nodes can reach")
        return section.connect_address
    return Address(listen.hosts[0], listen.port)


def _restapi(rest: RestApi, report: Report) -> RestApi:
    _key_of_a_certificate(rest, "restapi", report)
    if rest.verify_client != "none" and not (rest.cafile and rest.certfile):
        report.problem(("restapi", "verify_client"), f"is {rest.verify_client}, which needs certfile and cafile; allowed: none without them")
    return replace(
        rest, connect_address=_connect_address(rest, "restapi", report),
        authentication=_with_password(rest.authentication, ("restapi", "authentication"), report),
    )


def _key_of_a_certificate(section: RestApi | Ctl, at: str, report: Report) -> None:
    for key in ("keyfile", "keyfile_password"):
        if getattr(section, key) and not section.certfile:
            report.problem((at, key), "is given without certfile; allowed: both or none")


def _etcd3(local: LocalConfig, report: Report) -> Etcd3:
    etcd = local.etcd3
    if "etcd3" not in local.given:
        report.problem(("etcd3",), 'is missing; allowed: a table with host, hosts or url, as hosts = ["10.0.0.1:2379"]')
        return etcd
    if not etcd.given & {"host", "hosts", "url"}:
        report.problem(("etcd3", "hosts"), 'is missing; allowed: host, hosts or url, as hosts = ["10.0.0.1:2379"]')
    if etcd.url and "protocol" in etcd.given and not etcd.url.startswith(etcd.protocol + ":"):
        report.problem(("etcd3", "protocol"), f"is {etcd.protocol}, but url says otherwise; allowed: leave it out")
    tls = (etcd.url or etcd.protocol).startswith("https")
    for key in ("cacert", "cert", "key"):
        if getattr(etcd, key) and not tls:
            report.problem(("etcd3", key), 'is given, but protocol is http; allowed: protocol = "https"')
    if etcd.key and not etcd.cert:
        report.problem(("etcd3", "key"), "is given without cert; allowed: both or none")
    return _with_password(etcd, ("etcd3",), report)


def _postgresql(local: LocalConfig, of_all: Container[str], report: Report) -> Postgresql:
    """`of_all`: methods whose tables are the cluster's."""
    postgres = local.postgresql
    for name in postgres.parameters:
        lower = name.lower()
        if lower == "data_directory":
            report.problem(("postgresql", "parameters", name), "is set by pgha itself; allowed: postgresql.data_dir")
        elif lower in gucs.CONTROLLED:
            remedy = "leave it out" if lower in gucs.FORCED else "bootstrap.dcs.postgresql.parameters before the first start, `pgha ctl edit-config` after it"
            report.warn(("postgresql", "parameters", name), f"is the same on all nodes, so it is ignored here; allowed: {remedy}")
    if "create_replica_methods" in postgres.given:
        _, unknown = known_methods(postgres)
        for name in unknown:
            if name in of_all:
                report.warn(("postgresql", "create_replica_methods"), f"names {shown(name)}, whose table is in bootstrap.dcs: an existing cluster has it only if its /config does")
            else:
                report.problem(("postgresql", "create_replica_methods"), f"names {shown(name)}; allowed: basebackup, and names that have a table with a command, here [postgresql.{name}]")
        for name in postgres.methods:
            if name not in postgres.create_replica_methods:
                report.warn(("postgresql", name), "has no effect, since create_replica_methods does not name it; allowed: leave it out, or name it")
    if postgres.data_dir == "/":
        report.problem(("postgresql", "data_dir"), 'is "/"; allowed: a directory of its own')
    for key in ("state_dir", "runtime_dir"):
        directory = getattr(local.pgha, key)
        if directory and postgres.data_dir and FilePath(directory).is_relative_to(postgres.data_dir):
            report.problem(("pgha", key), "lies in postgresql.data_dir, from where a clone would copy it; allowed: a directory outside")
    users = postgres.authentication
    at = ("postgresql", "authentication")
    superuser = _user(users.superuser, (*at, "superuser"), report)
    replication = _user(users.replication, (*at, "replication"), report)
    if "username" not in replication.given and report.complete:
        report.problem((*at, "replication", "username"), "is missing; allowed: the user for streaming, as replicator")
    superuser = superuser if superuser.username else replace(superuser, username="postgres")
    rewind = _user(users.rewind, (*at, "rewind"), report)
    for name, user in (("superuser", superuser), ("replication", replication), ("rewind", rewind)):
        if user.sslpassword and (why := no_sslpassword(name, superuser_rewinds=not users.rewind.given)):
            report.problem((*at, name, "sslpassword"), why)
    return replace(
        postgres, connect_address=_connect_address(postgres, "postgresql", report),
        config_dir=postgres.config_dir or postgres.data_dir,
        authentication=replace(users, superuser=superuser, replication=replication, rewind=rewind if rewind.username else superuser),
    )


def _user(user: PostgresUser, path: Path, report: Report) -> PostgresUser:
    password = _password(user.password, user.password_file, (*path, "password_file"), report)
    if user.given and "username" not in user.given and path[-1] == "rewind":
        report.problem((*path, "username"), "is missing, but other keys are there; allowed: a username with them, or none at all (then the superuser rewinds)")
    return replace(user, password=password)


def _with_password(section: E, at: Path, report: Report) -> E:
    """`section` with its password read; a user name and a password need each other."""
    missing = "password" if not section.given & {"password", "password_file"} else "username" if "username" not in section.given else ""
    if missing and section.given & {"username", "password", "password_file"}:
        report.problem((*at, missing), "is missing; allowed: username and password, or neither")
    return replace(section, password=_password(section.password, section.password_file, (*at, "password_file"), report))


def _password(given: Secret, file: str, path: Path, report: Report) -> Secret:
    """The password, read from its file if it has one: the first line, without its end."""
    if not file or given:  # both given: reported already
        return given
    try:
        with open(file, "rb") as f:  # noqa: PTH123  (the descriptor is asked for its mode, too)
            if os.fstat(f.fileno()).st_mode & stat.S_IROTH:
                report.warn(path, f"{file} is readable by everybody; allowed: chmod o= {file}")
            content = f.read(PASSWORD_FILE_LIMIT_BYTES + 1)
        text = content.decode().rstrip("\r\n")
    except OSError as error:
        report.problem(path, f"{file} cannot be read ({error.strerror}); allowed: a file that holds the password alone")
        return given
    except UnicodeDecodeError:
        report.problem(path, f"{file} is not UTF-8; allowed: a file that holds the password alone")
        return given
    if not text or "\n" in text or "\0" in text or len(content) > PASSWORD_FILE_LIMIT_BYTES:
        report.problem(path, f"{file} is empty, or holds more than one line; allowed: a file that holds the password alone")
        return given
    return Secret(text)


def _tags(local: LocalConfig, report: Report) -> None:
    raw = local.tags.raw
    for flag, priority in (("nofailover", "failover_priority"), ("nosync", "sync_priority")):
        if flag in raw and priority in raw and bool(raw[flag]) != (raw[priority] <= 0):
            report.warn(("tags", flag), f"contradicts {priority} = {raw[priority]}, and wins; allowed: one of the two")


def _private_keys(local: LocalConfig, report: Report) -> None:
    """Whoever reads a key file can be this node. Whether it is there at all is asked by whoever uses it."""
    users = local.postgresql.authentication
    files: dict[Path, str] = {
        ("restapi", "keyfile"): local.restapi.keyfile or local.restapi.certfile, ("ctl", "keyfile"): local.ctl.keyfile or local.ctl.certfile,
        ("etcd3", "key"): local.etcd3.key or local.etcd3.cert,
        **{("postgresql", "authentication", name, "sslkey"): getattr(users, name).sslkey for name in ("superuser", "replication", "rewind")},
    }
    for path, file in files.items():
        try:
            if file and os.stat(file).st_mode & stat.S_IROTH and _holds_a_key(file):  # noqa: PTH116  (as above)
                report.warn(path, f"{file} is readable by everybody; allowed: chmod o= {file}")
        except OSError:
            continue
    for name in ("superuser", "replication", "rewind"):
        user: PostgresUser = getattr(users, name)
        try:
            if user.sslkey and not user.sslpassword and _has_a_passphrase(user.sslkey):     # OpenSSL would ask the agent's terminal for it
                report.warn(("postgresql", "authentication", name, "sslkey"), f"{user.sslkey} has a passphrase, which nobody will give; allowed: a key without one that only the agent's user can read")
        except OSError:
            continue


def _holds_a_key(file: str) -> bool:
    """A certificate alone may be read by everybody; its file may hold the key, too."""
    return b"PRIVATE KEY-----" in _beginning(file)


def _has_a_passphrase(file: str) -> bool:
    """In either of PEM's ways: PKCS #8, and the older one with headers."""
    text = _beginning(file)
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in text or b"Proc-Type: 4,ENCRYPTED" in text


def _beginning(file: str) -> bytes:
    with open(file, "rb") as f:  # noqa: PTH123  (as above)
        return f.read(1 << 20)


def secret_paths(raw: dict[str, Any]) -> list[Path]:
    """The paths in `raw` that hold a password in plain text."""
    found = []
    for path, key, _section in every_key(LocalConfig):
        value: Any = raw
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if key.kind.secret and value is not None:
            found.append(path)
    return found

"""What does ctl need to know, and where from? A few keys of the node's TOML, PGHA_… variables, the command line.

Only these keys are read and only their types are checked here: `pgha config check` judges the whole file. Standard
library only, like all of ctl that runs for every command (start-up time).
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pgha.ctl.ends import USAGE, End

#: looked for in this order when neither -c nor PGHACTL_CONFIG_FILE says
DEFAULT_FILES = ("~/.config/pgha/ctl.toml", "/etc/pgha.toml", "/etc/pgha/pgha.toml")
DEFAULT_NAMESPACE = "service"

#: variable → where its value goes; the last part may be "password_file"
_VARIABLES = {
    "PGHA_SCOPE": ("scope",), "PGHA_NAMESPACE": ("namespace",), "PGHA_NAME": ("name",),
    **{f"PGHA_ETCD3_{key.upper()}": ("etcd3", key) for key in
       ("host", "hosts", "url", "protocol", "username", "password", "password_file", "cacert", "cert", "key")},
    **{f"PGHA_RESTAPI_{key.upper()}": ("restapi", key) for key in ("listen", "connect_address", "certfile", "keyfile", "keyfile_password", "cafile")},
    **{f"PGHA_CTL_{key.upper()}": ("ctl", key) for key in ("insecure", "cacert", "certfile", "keyfile", "keyfile_password")},
    **{f"PGHA_{section.upper()}_{key.upper()}": (section, "authentication", key) for section in ("restapi", "ctl")
       for key in ("username", "password", "password_file")},
}
#: what stands in the file itself and is secret
_SECRETS = (("etcd3", "password"), *((section, "authentication", "password") for section in ("restapi", "ctl")),
            ("ctl", "keyfile_password"), ("restapi", "keyfile_password"))
#: private keys; without one of its own, a certificate's file may hold it
_KEYS = (("ctl", "keyfile"), ("ctl", "certfile")), (("restapi", "keyfile"), ("restapi", "certfile")), (("etcd3", "key"), ("etcd3", "cert"))
_EXCLUSIVE = {"host": ("hosts", "url"), "hosts": ("host", "url"), "url": ("host", "hosts"), "password": ("password_file",), "password_file": ("password",)}


class Etcd(NamedTuple):
    """How to reach the store. `endpoints`: URLs without a path."""

    endpoints: tuple[str, ...] = ()
    username: str = ""
    password: str = ""
    cacert: str = ""
    cert: str = ""
    key: str = ""

    def __repr__(self) -> str:
        return f"Etcd({self.endpoints}, username={self.username!r}, password=***)"


class Rest(NamedTuple):
    """How to talk to agents. `own_url`: the configured node's own API, "" if none is configured."""

    own_url: str = ""
    username: str = ""
    password: str = ""
    insecure: bool = False
    cacert: str = ""
    certfile: str = ""
    keyfile: str = ""
    keyfile_password: str = ""
    server: tuple[str, str, str] = ("", "", "")     #: the same three of the node's own API, shown where ctl has none of its own

    def __repr__(self) -> str:
        return f"Rest({self.own_url!r}, username={self.username!r}, password=***)"


class Settings(NamedTuple):
    """`warnings`: of passwords and keys that everybody can read."""

    scope: str
    namespace: str
    name: str
    etcd: Etcd
    rest: Rest
    elsewhere: bool = False      #: the command line (or DCS_URL) names another store, or another cluster than the configured node's
    warnings: tuple[str, ...] = ()

    @property
    def own_agent(self) -> str:
        """The API of the configured node's agent, if it may be asked about this cluster; else ""."""
        return "" if self.elsewhere else self.rest.own_url

    def of(self, scope: str) -> Settings:
        """The same for another cluster in the same store and namespace."""
        return self._replace(scope=scope, elsewhere=self.elsewhere or scope != self.scope)

    @property
    def root(self) -> str:
        """"/service/demo/": what all keys of the cluster begin with."""
        parts = [part for part in (*self.namespace.split("/"), *self.scope.split("/")) if part]
        return "/" + "/".join(parts) + "/"


def load(*, config_file: str | None, scope: str | None, dcs_url: str | None, environ: Mapping[str, str], insecure: bool = False, otherwise: str | None = None) -> Settings:
    """Read it all. `otherwise`: the scope if neither `scope` nor the configuration says it. End(USAGE) names file, key and what is wrong."""
    tables, source, exposed = _read(config_file, environ)
    raw = _Raw(tables, source, exposed)
    for variable, path in _VARIABLES.items():
        if environ.get(variable):
            raw.put(path, environ[variable], variable)
    etcd = _etcd(raw, dcs_url or environ.get("DCS_URL"))
    listen = raw.text("restapi", "connect_address") or raw.text("restapi", "listen").replace("*", "127.0.0.1")
    own_url = ""
    if listen:
        own_url = f"{'https' if raw.text('restapi', 'certfile') else 'http'}://{listen if ':' in listen.rpartition(']')[2] else listen + ':8008'}"
    credentials = raw.credentials("ctl", "authentication")
    if not credentials[0]:
        credentials = raw.credentials("restapi", "authentication")
    rest = Rest(own_url, *credentials, insecure=insecure or raw.flag("ctl", "insecure"), cacert=raw.text("ctl", "cacert") or raw.text("restapi", "cafile"),
                certfile=raw.text("ctl", "certfile"), keyfile=raw.text("ctl", "keyfile"), keyfile_password=raw.text("ctl", "keyfile_password"),
                server=(raw.text("restapi", "certfile"), raw.text("restapi", "keyfile"), raw.text("restapi", "keyfile_password")))
    found = scope or raw.text("scope") or otherwise
    if not found:
        raise End(USAGE, f'{raw.source}: scope is not set (which cluster?); allowed: --scope NAME, scope = "NAME", PGHA_SCOPE, or the name as first argument')
    elsewhere = bool(dcs_url or environ.get("DCS_URL")) or found != (raw.text("scope") or found)
    return Settings(found, raw.text("namespace") or DEFAULT_NAMESPACE, raw.text("name"), etcd, rest, elsewhere, (*raw.exposed, *_exposed_keys(raw)))


def _exposed_keys(raw: _Raw) -> list[str]:
    """Whoever reads a key file can be who it is for. Whether it is there at all is said by whoever uses it."""
    found = []
    for own, with_certificate in _KEYS:
        file = raw.text(*own) or raw.text(*with_certificate)
        try:
            if file and os.stat(file).st_mode & stat.S_IROTH and b"PRIVATE KEY-----" in _contents(file)[0]:  # noqa: PTH116  (as above)
                found.append(raw.readable_by_everybody(own, file))
        except OSError:
            continue
    return found


def _etcd(raw: _Raw, dcs_url: str | None) -> Etcd:
    username, password = raw.credentials("etcd3")
    files = (raw.text("etcd3", "cacert"), raw.text("etcd3", "cert"), raw.text("etcd3", "key"))
    if dcs_url:
        scheme, hosts = _split_url(dcs_url if "://" in dcs_url else f"etcd3://{dcs_url}")
        if scheme not in ("etcd3", "http", "https"):
            raise End(USAGE, f"-d {dcs_url}: the store {scheme!r} is not supported by this version; allowed: etcd3://HOST:PORT")
        if scheme == "etcd3":
            scheme = "https" if files[0] else "http"
    elif raw.get("etcd3", "url"):
        scheme, hosts = _split_url(raw.text("etcd3", "url"))
    else:
        scheme, hosts = raw.text("etcd3", "protocol") or "http", raw.texts("etcd3", "hosts") or raw.texts("etcd3", "host")
    endpoints = tuple(f"{scheme}://{host if ':' in host.rpartition(']')[2] else host + ':2379'}" for host in hosts if host)
    if not endpoints:
        other = next((name for name in ("etcd", "consul", "zookeeper") if raw.get(name) is not None), None)
        why = f"the store [{other}] is not supported by this version" if other else "no store is configured"
        raise End(USAGE, f"{raw.source}: {why}; allowed: etcd3.host, etcd3.hosts or etcd3.url, PGHA_ETCD3_…, or -d etcd3://HOST:PORT")
    return Etcd(endpoints, username, password, *files)


def _split_url(url: str) -> tuple[str, list[str]]:
    """'etcd3://user@a:1,b:2/x' → ('etcd3', ['a:1', 'b:2'])."""
    scheme, _, rest = url.partition("://")
    return scheme, rest.partition("/")[0].rpartition("@")[2].split(",")


def _read(config_file: str | None, environ: Mapping[str, str]) -> tuple[dict[str, Any], str, list[str]]:
    """The file's tables, its name for messages, and warnings of secrets in it that everybody can read."""
    if environ.get("PGHA_CONFIGURATION"):
        return _parse(environ["PGHA_CONFIGURATION"].encode(), "environment PGHA_CONFIGURATION"), "environment PGHA_CONFIGURATION", []
    named = config_file or environ.get("PGHACTL_CONFIG_FILE")
    path = named or next((p for p in map(os.path.expanduser, DEFAULT_FILES) if os.path.isfile(p)), None)  # noqa: PTH113  (pathlib takes 10 ms to load)
    if path is None:
        return {}, "no configuration file (-c)", []
    raw: dict[str, Any] = {}
    exposed: list[str] = []
    try:
        files = sorted(f"{path}/{f}" for f in os.listdir(path) if f.endswith(".toml")) if os.path.isdir(path) else [path]  # noqa: PTH112, PTH208  (as above)
        for file in files:
            content, mode = _contents(file)
            table = _parse(content, file)
            secrets = ", ".join(".".join(key) for key in _SECRETS if _has(table, key)) if mode & stat.S_IROTH else ""
            if secrets:
                exposed.append(f"{file}: is readable by everybody (mode {stat.S_IMODE(mode):04o}) and holds {secrets}; allowed: chmod o= {file}, or password_file")
            _merge(raw, table)
    except OSError as error:
        raise End(USAGE, f"{path}: cannot be read: {error.strerror or error}") from None
    return raw, path, exposed


def _contents(file: str) -> tuple[bytes, int]:
    """And the file's mode."""
    with open(file, "rb") as opened:  # noqa: PTH123  (as above)
        return opened.read(), os.fstat(opened.fileno()).st_mode


def _has(table: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        table = table.get(part) if isinstance(table, dict) else None
    return table is not None


def _parse(content: bytes, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise End(USAGE, f"{source}: is not TOML: {error}") from None


def _merge(into: dict[str, Any], table: dict[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class _Raw:
    """The tables, read by path with their types checked."""

    def __init__(self, tables: dict[str, Any], source: str, exposed: list[str]) -> None:
        self.tables = tables
        self.source = source
        self.exposed = exposed      # warnings, more of them as files are read
        self._from: dict[tuple[str, ...], str] = {}

    def put(self, path: tuple[str, ...], value: str, source: str) -> None:
        table = self.tables
        for part in path[:-1]:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                raise End(USAGE, f"{self.source}: {part}: is not a table")
            table = inner
        for rival in _EXCLUSIVE.get(path[-1], ()):
            table.pop(rival, None)
        table[path[-1]] = value
        self._from[path] = source

    def get(self, *path: str) -> Any:
        value: Any = self.tables
        for part in path:
            if not isinstance(value, dict):
                raise self._wrong(path[:1], "is not a table")
            value = value.get(part)
            if value is None:
                return None
        return value

    def text(self, *path: str) -> str:
        value = self.get(*path)
        if value is None:
            return ""
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise self._wrong(path, "is not text")
        return str(value)

    def texts(self, *path: str) -> list[str]:
        """A list, or text with commas, or a list in JSON (from a variable)."""
        value = self.get(*path)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                raise self._wrong(path, "is not a list") from None
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(path, "is not a list of HOST:PORT")
        return value

    def flag(self, *path: str) -> bool:
        value = self.get(*path)
        if value in (None, False, True):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "on", "yes", "1", "false", "off", "no", "0"):
            return value.lower() in ("true", "on", "yes", "1")
        raise self._wrong(path, "is not true or false")

    def credentials(self, *path: str) -> tuple[str, str]:
        password = self.text(*path, "password")
        file = self.text(*path, "password_file")
        if file and not password:
            try:
                content, mode = _contents(file)
                password = content.decode().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise self._wrong((*path, "password_file"), f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
            if mode & stat.S_IROTH:
                self.exposed.append(self.readable_by_everybody((*path, "password_file"), file))
        return self.text(*path, "username"), password

    def readable_by_everybody(self, path: tuple[str, ...], file: str) -> str:
        return self._at(path, f"{file} is readable by everybody; allowed: chmod o= {file}")

    def _wrong(self, path: tuple[str, ...], why: str) -> End:
        return End(USAGE, self._at(path, why))

    def _at(self, path: tuple[str, ...], what: str) -> str:
        return f"{self._from.get(path, self.source)}: {'.'.join(path)}: {what}"


def environment() -> Mapping[str, str]:
    return os.environ

"""What does a Patroni configuration say? Its YAML, with the PATRONI_… variables laid over it (compatibility spec 5.1, 5.3).

PyYAML reads it, because Patroni has it read by PyYAML: so a value means here what it meant there (YAML 1.1: `off` is
false, 0700 is 448, an alias stands for what its anchor names). Two things that Patroni passes over are refused: a key that
is given twice, and a key that is no text.

Rules of this file:
* no error ever repeats the text, since any line may hold a password: file, line and column say where.
* PyYAML is optional (`pip install pgha[import]`; the archive has it), so it is imported when a file is read, and only here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

from msgspec import Struct

from pgha.config.schema import Path
from pgha.config.values import DEEPEST, printable
from pgha.errors import ConfigError

PREFIX = "PATRONI_"
#: A whole configuration in place of the file.
WHOLE = "PATRONI_CONFIGURATION"
#: Nobody's patroni.yml is larger, and the reader is a slow one.
FILE_LIMIT_BYTES = 1 << 20
#: What aliases may unfold a file to.
MOST_VALUES = 50_000

_MAP, _SEQUENCE, _TEXT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "merge"))


class PatroniFile(Struct, frozen=True, kw_only=True):
    """File and variables together. `variables`: which variable said what stands at a path; `unknown`: those that say nothing.

    `replaced`: keys of the file that are gone because a variable put another kind of value above them, and which.
    """

    raw: dict[str, Any]
    variables: dict[Path, str]
    replaced: dict[Path, str]
    unknown: tuple[str, ...]


def read_patroni(where: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> PatroniFile:
    """Read a file, or a directory of *.yml and *.yaml in the order of their names; without one, PATRONI_CONFIGURATION."""
    raw: dict[str, Any] = {}
    if where is None:
        if WHOLE not in environ:
            raise ConfigError(f"no file is given, and {WHOLE} is not set; allowed: the path of a patroni.yml")
        raw = parse(environ[WHOLE].encode("utf-8", "surrogateescape"), WHOLE)
    else:
        if WHOLE in environ:
            raise ConfigError(f"{WHOLE} is set, and {os.fspath(where)} is given; allowed: one of them")
        for file in _files(FilePath(where)):
            _merge(raw, parse(_content(file), str(file)))
    return _with_variables(raw, environ)


def _files(where: FilePath) -> list[FilePath]:
    try:
        found = sorted(file for file in where.iterdir() if file.suffix in (".yml", ".yaml")) if where.is_dir() else [where]
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}); allowed: a YAML file, or a directory with *.yml") from None
    if not found:
        raise ConfigError(f"{where}: holds no *.yml; allowed: a YAML file, or a directory with *.yml")
    return found


def _content(file: FilePath) -> bytes:
    try:
        with file.open("rb") as f:
            content = f.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); allowed: a YAML file, or a directory with *.yml") from None
    if len(content) > FILE_LIMIT_BYTES:
        raise ConfigError(f"{file}: is larger than {FILE_LIMIT_BYTES >> 20} MiB; allowed: a Patroni configuration")
    return content


def _merge(into: dict[str, Any], table: dict[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


# --- YAML ------------------------------------------------------------------------------------------------------------

def _pyyaml() -> ModuleType:
    try:
        import yaml  # noqa: PLC0415  (optional: only who imports a Patroni file needs it)
    except ImportError:
        raise ConfigError("PyYAML is not installed, which reads Patroni's files; allowed: pip install 'pgha[import]', or pgha.pyz, which has it") from None
    module: ModuleType = yaml
    return module


def parse(content: bytes, name: str) -> dict[str, Any]:
    """One YAML text, which must be a table or empty. `name` says where it stands."""
    yaml = _pyyaml()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 (byte {error.start}); allowed: YAML in UTF-8") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        value = None if node is None else _Values(yaml, loader, name).of(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f'{name}: {place}is no valid YAML; allowed: what Patroni reads (text that begins with one of * & ! % @ ` or holds ": " stands in quotes)') from None
    except yaml.YAMLError:
        raise ConfigError(f"{name}: holds a character that YAML does not allow; allowed: printable text") from None
    except RecursionError:  # the parser recurses
        raise ConfigError(f"{name}: is nested too deeply; allowed: a Patroni configuration") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: is no table; allowed: a Patroni configuration")
    return value


class _Values:
    """PyYAML's nodes → values, with their lines at hand and a bound on what aliases unfold to."""

    def __init__(self, yaml: ModuleType, loader: Any, name: str) -> None:
        self._yaml = yaml
        self._loader = loader
        self._name = name
        self._left = MOST_VALUES
        self._flattened: set[int] = set()

    def of(self, node: Any, depth: int) -> Any:
        self._left -= 1
        if depth > DEEPEST or self._left < 0:
            raise self._wrong(node, "is nested too deeply, or its aliases unfold to too much", "a Patroni configuration")
        if isinstance(node, self._yaml.MappingNode) and node.tag == _MAP:
            return self._table(node, depth)
        if isinstance(node, self._yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self.of(item, depth + 1) for item in node.value]
        if not isinstance(node, self._yaml.ScalarNode):
            raise self._wrong(node, "has a tag that Patroni's files do not have", "a plain table or list")
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError):
            # Looks like a date or a number, or has a tag that says so, and is none: 2026-99-99, !!bool perhaps. PyYAML's own
            # exceptions for these would show the text.
            raise self._wrong(node, "is no value that YAML knows", "text in quotes") from None

    def _table(self, node: Any, depth: int) -> dict[str, Any]:
        if id(node) not in self._flattened:  # an alias leads here again, and then "<<" has been replaced by what it stands for
            self._flattened.add(id(node))
            first: dict[str, Any] = {}
            for key, _ in node.value:
                if key.tag == _MERGE:
                    continue
                if not isinstance(key, self._yaml.ScalarNode) or key.tag != _TEXT:
                    raise self._wrong(key, "has a key that is no text (YAML takes on, off, yes and no for true and false)", "the key in quotes")
                if key.value in first:
                    raise self._wrong(key, f"gives a key again that line {first[key.value].start_mark.line + 1} has", "one of the two (Patroni takes the later one, silently)")
                first[key.value] = key
            self._loader.flatten_mapping(node)
        return {key.value: self.of(value, depth + 1) for key, value in node.value}

    def _wrong(self, node: Any, what: str, allowed: str) -> ConfigError:
        return ConfigError(f"{self._name}: line {node.start_mark.line + 1}: {what}; allowed: {allowed}")


# --- PATRONI_… -------------------------------------------------------------------------------------------------------

_PLAIN = {
    "": "name namespace scope thread_pool_size thread_stack_size",
    "log": "type level traceback_level format dateformat static_fields max_queue_size dir mode file_size file_num loggers deduplicate_heartbeat_logs",
    "restapi": "listen connect_address certfile keyfile keyfile_password cafile ciphers verify_client allowlist allowlist_include_members "
               "http_extra_headers https_extra_headers request_queue_size server_tokens",
    "ctl": "insecure cacert certfile keyfile keyfile_password",
    "postgresql": "listen connect_address proxy_address config_dir data_dir pgpass bin_dir",
    "citus": "group database",
}
_USER = "username password sslmode sslkey sslpassword sslcert sslrootcert sslcrl sslcrldir sslnegotiation gssencmode channel_binding"
_STORES = ("etcd3", "etcd", "consul", "zookeeper", "exhibitor", "kubernetes", "raft")
_LISTS = frozenset({"hosts", "allowlist", "checks", "service_tags"})
_TABLES = frozenset({"loggers", "static_fields", "http_extra_headers", "https_extra_headers", "auth_data", "labels"})


def _known() -> Iterator[tuple[str, Path]]:
    """Every variable with a name of its own, and the path that it sets; the stores' and programs' follow a pattern."""
    for section, names in _PLAIN.items():
        for name in names.split():
            yield PREFIX + "_".join(filter(None, (section, name))).upper(), (section, name) if section else (name,)
    for section in ("restapi", "ctl"):
        for name in ("username", "password"):
            yield f"{PREFIX}{section}_{name}".upper(), (section, "authentication", name)
    for user in ("superuser", "replication", "rewind"):
        for name in _USER.split():
            yield f"{PREFIX}{user}_{name}".upper(), ("postgresql", "authentication", user, name)


_VARIABLES: dict[str, Path] = dict(_known())


def variable_path(name: str) -> Path | None:
    """What a variable sets; None: nothing that is known."""
    if name in _VARIABLES:
        return _VARIABLES[name]
    if match := re.fullmatch(rf"{PREFIX}({'|'.join(_STORES).upper()})_([A-Z0-9_]+)", name):
        return match[1].lower(), match[2].lower()
    if match := re.fullmatch(rf"{PREFIX}POSTGRESQL_BIN_([A-Z0-9_]+)", name):
        return "postgresql", "bin_name", match[1].lower()
    return None


def _with_variables(raw: dict[str, Any], environ: Mapping[str, str]) -> PatroniFile:
    file = PatroniFile(raw=raw, variables={}, replaced={}, unknown=tuple(printable(name) for name in sorted(environ)
                                                                                  if _meant(name) and environ[name] and variable_path(name) is None))
    for name in sorted(environ):
        path = variable_path(name) if _meant(name) else None
        if path is not None and (environ[name] or _empty_counts(path)):
            _put(file, path, _variable(name, environ[name], path[-1]), name)
    return file


def _empty_counts(path: Path) -> bool:
    """Does an empty variable replace what stands in the file? Only a store's does, but for its user and its switches."""
    return path[0] in _STORES and path[-1] not in ("username", "password", "use_proxies", *_LISTS)


def _meant(name: str) -> bool:
    return name.startswith(PREFIX) and name != WHOLE


def _variable(name: str, text: str, key: str) -> Any:
    """The text as the file would have the value: lists and tables are YAML, with or without their brackets."""
    kind, opening, closing = (list, "[", "]") if key in _LISTS else (dict, "{", "}") if key in _TABLES else (str, "", "")
    if kind is str:
        return text
    stripped = text.strip()
    inside = stripped if stripped.startswith((opening, "- ")) else f"{opening}{stripped}{closing}"
    block = "\n".join(f"  {line}" for line in inside.splitlines())
    try:
        value = parse(f"value:\n{block}\n".encode("utf-8", "surrogateescape"), name)["value"]
    except ConfigError:
        value = None
    if not isinstance(value, kind):
        raise ConfigError(f"environment {name}: is no {'list' if kind is list else 'table'}; allowed: YAML, as {opening}…{closing}")
    return value


def _put(file: PatroniFile, path: Path, value: Any, name: str) -> None:
    """Lay one variable's value over the file: tables merge, anything else replaces."""
    table = file.raw
    for depth, part in enumerate(path[:-1], 1):
        if not isinstance(table.get(part), dict):
            if table.get(part) is not None:
                file.replaced[path[:depth]] = name
            table[part] = {}
        table = table[part]
    old = table.get(path[-1])
    if isinstance(value, dict) and isinstance(old, dict) and value:
        for key, item in value.items():
            _put(file, (*path, key), item, name)
        return
    if isinstance(old, dict) or (isinstance(value, dict) and old is not None):
        file.replaced.update(dict.fromkeys(set(leaves(old, path)) - set(leaves(value, path)), name))
    table[path[-1]] = value
    file.variables.update(dict.fromkeys(leaves(value, path), name))


def leaves(value: Any, path: Path) -> Iterator[Path]:
    """The paths of everything in `value` that is no table, or an empty one: what a report calls keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path

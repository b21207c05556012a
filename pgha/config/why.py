"""Which value counts for a key, which layer does it come from, and what lies under it? (compatibility spec 5.1)

    default  <  /config in the store  <  the node's file(s)  <  PGHA_… variables        controlled: pgha's own, or the store's only

Rules of this file: no secret is ever shown, whichever layer it comes from; nothing here reads anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from pgha.config import gucs
from pgha.config.cluster import ClusterConfig
from pgha.config.load import effective
from pgha.config.local import LocalConfig
from pgha.config.schema import Field, Key, Path, Section, every_key, fields, nearest
from pgha.config.values import Secret
from pgha.log import scrub
from pgha.model.gucs import may_hold_secrets

DEFAULT, STORE, FILE, ENVIRONMENT, CONTROLLED = "default", "store", "file", "environment", "pgha"
#: Tables whose own keys are anybody's.
_PARAMETERS = ("postgresql", "parameters")
_SECRET_KEYS = ("passw", "secret", "token")


class Layer(Struct, frozen=True, kw_only=True):
    """One layer's value. `where`: "/config", a file's name, "environment NAME"; `path`: the key as it is written there."""

    layer: str
    value: Any
    where: str = ""
    path: tuple[str, ...] = ()


class Why(Struct, frozen=True, kw_only=True):
    """`layers`: those that say something, the one that counts first. `notes`: what else is to be known."""

    key: str
    value: Any
    layers: tuple[Layer, ...] = ()
    notes: tuple[str, ...] = ()
    secret: bool = False


class UnknownKey(ValueError):
    """There is no such key; the text says which is near."""


def why(key: str, *, local: LocalConfig, sources: Mapping[Path, str], dynamic: Any, mixed: bool = False, defaults: Mapping[str, str] | None = None) -> Why:
    """`dynamic`: the JSON of `/config`, or None. `defaults`: of the parameters that pgha controls. UnknownKey."""
    path = _path(key)
    ours, theirs = _find(LocalConfig, path), _find(ClusterConfig, path)
    if ours is None and theirs is None:
        raise UnknownKey(_unknown(path))
    known = (ours or theirs)
    assert known is not None
    counts = effective(local, dynamic, patroni_member_present=mixed)
    if path[:2] == _PARAMETERS and len(path) == 3:
        return _parameter(path, local=local, sources=sources, dynamic=dynamic, problems=counts.problems, defaults=defaults or {})
    layers = []
    if ours is not None:
        layers += _own(ours, path, local, sources)
    if theirs is not None:
        layers += _stored(theirs, path, dynamic)
    holder: Section = counts.local if theirs is None else counts.cluster
    if path[0] == "postgresql" and ours is not None:
        holder = msgspec.structs.replace(counts.local, postgresql=counts.postgresql)
    value = _value(holder, known, path)
    default = _value(LocalConfig() if ours is not None and theirs is None else ClusterConfig(), known, path)
    if default is not None or not layers:
        layers.append(Layer(layer=DEFAULT, value=default))
    # The timing rule is one rule of three keys, and named after one.
    named = "ttl" if path[0] in ("loop_wait", "retry_timeout") else ".".join(path)
    notes = [problem for problem in counts.problems if f" {named}:" in problem]
    if layers[0].layer == DEFAULT and default != value:
        notes.append("nobody has set it: it follows from other keys")
    notes += _bootstrap_note(path, local, sources) if theirs is not None else []
    secret, private = known.key.kind.secret, path[1:2] == ("recovery_conf",) and may_hold_secrets(path[-1])
    return Why(key=".".join(path), value=shown_value(value, secret=secret or (private and layers[0].layer != STORE)), secret=secret, notes=tuple(notes),
               layers=tuple(msgspec.structs.replace(layer, value=shown_value(layer.value, secret=secret or (private and layer.layer != STORE))) for layer in layers))


# --- parameters of PostgreSQL ------------------------------------------------------------------------------------------

def _parameter(path: Path, *, local: LocalConfig, sources: Mapping[Path, str], dynamic: Any, problems: tuple[str, ...], defaults: Mapping[str, str]) -> Why:
    name = path[2].lower()
    written = _named(local.postgresql.parameters, name)
    shared = _named(_inside(dynamic, _PARAMETERS), name)
    layers, notes = [], [problem for problem in problems if f".parameters.{name}:" in problem.lower()]
    refused = bool(notes)
    if name in gucs.FORCED:
        layers.append(Layer(layer=CONTROLLED, value=None))
        notes.append("pgha sets it itself, at each start; what a file or the store says is ignored")
    own = Layer(layer=_layer_of(sources, (*_PARAMETERS, *written[:1])), value=written[1], where=_source(sources, (*_PARAMETERS, written[0])), path=(*_PARAMETERS, written[0])) if written else None
    if own is not None and name not in gucs.CONTROLLED:
        layers.append(own)
    if shared and not refused and name not in gucs.FORCED:
        layers.append(Layer(layer=STORE, value=shared[1], where="/config", path=(*_PARAMETERS, shared[0])))
    if name in gucs.CONTROLLED and name not in gucs.FORCED:
        layers.append(Layer(layer=DEFAULT, value=defaults.get(name)))
        notes.append("the same on all nodes: only the store's value counts, and pgha gives it on the command line, where ALTER SYSTEM cannot change it")
    if own is not None and name in gucs.CONTROLLED:
        notes.append(f"{own.where} sets it, too, which is ignored")
    if not layers:
        layers.append(Layer(layer=DEFAULT, value=None))
        notes.append("nobody has configured it: PostgreSQL's own default counts")
    notes += _bootstrap_note(path, local, sources)
    shared_value = shared[1] if shared else None
    said = tuple(msgspec.structs.replace(layer, value=parameter_value(name, layer.value, shared=shared_value)) for layer in layers)
    return Why(key=".".join(path), value=said[0].value, notes=tuple(notes), layers=said)


def _named(table: Any, name: str) -> tuple[str, Any] | None:
    """The entry of this name, in whatever case it is written."""
    if not isinstance(table, Mapping):
        return None
    return next(((key, value) for key, value in table.items() if isinstance(key, str) and key.lower() == name), None)


# --- keys of the schema ------------------------------------------------------------------------------------------------

def _path(key: str) -> Path:
    parts = [part.strip() for part in key.strip().split(".")]
    if "" in parts:
        raise UnknownKey(f"{key!r} is no key; allowed: names with dots between them, as postgresql.parameters.work_mem")
    for table in (_PARAMETERS, ("postgresql", "recovery_conf")):
        if tuple(parts[:2]) == table and len(parts) > 2:
            return (*table, ".".join(parts[2:]))      # a parameter's own name may have a dot
    return tuple(parts)


class _Found(Struct, frozen=True):
    """`attributes`: the way through the sections; `rest`: below the key, in a table."""

    key: Key
    attributes: tuple[str, ...]
    length: int


def _find(kind: type[Section], path: Path) -> _Found | None:
    """The key of the schema that `path` is, or is below."""
    attributes: tuple[str, ...] = ()
    for number, part in enumerate(path):
        field = _field(kind, part)
        if field is None:
            return None
        attributes += (field.attribute,)
        if field.key is not None:
            inside = number + 1 < len(path)
            return None if inside and field.key.kind.shape != "table" else _Found(field.key, attributes, number + 1)
        assert field.section is not None, field
        kind = field.section
    return None


def _field(kind: type[Section], name: str) -> Field | None:
    return next((f for f in fields(kind) if f.name == name or (f.key is not None and name in f.key.aliases)), None)


def _unknown(path: Path) -> str:
    known = [".".join(p) for kind in (LocalConfig, ClusterConfig) for p, _, _ in every_key(kind)]
    key = ".".join(path)
    below = sorted({name.removeprefix(key + ".").partition(".")[0] for name in known if name.startswith(key + ".")})
    if below:
        return f"{key} is a table; allowed: one of its keys, {key}.… with {', '.join(below)}"
    close = nearest(key, known) or nearest(path[-1], sorted({name.rpartition(".")[2] for name in known}))
    return f"{key}: unknown key" + (f"; did you mean {close}?" if close else "")


def _value(holder: Section, found: _Found, path: Path) -> Any:
    """None: nothing is said."""
    value: Any = holder
    for attribute in found.attributes:
        value = getattr(value, attribute, None)
    if not value and not isinstance(value, (bool, int, float)):
        return None
    return _inside(plain_value(value), path[found.length:])


def _own(found: _Found, path: Path, local: LocalConfig, sources: Mapping[Path, str]) -> list[Layer]:
    """What the node's file or environment says."""
    where = _source(sources, path)
    if not where:
        return []
    return [Layer(layer=_layer_of(sources, path), value=_value(local, found, path), where=where, path=path)]


def _stored(found: _Found, path: Path, dynamic: Any) -> list[Layer]:
    for name in (path[found.length - 1], *found.key.aliases):
        written = (*path[:found.length - 1], name, *path[found.length:])
        value = _inside(dynamic, written)
        if value is not None:
            return [Layer(layer=STORE, value=value, where="/config", path=written)]
    return []


def _inside(value: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _source(sources: Mapping[Path, str], path: Path) -> str:
    """Who set it: its own entry, or that of something below or of the list around it."""
    if path in sources:
        return sources[path]
    return next((where for at, where in sources.items() if at[:len(path)] == path), "") or (sources.get(path[:-1], "") if sources.get(path[:-1], "").startswith("environment ") else "")


def _layer_of(sources: Mapping[Path, str], path: Path) -> str:
    return ENVIRONMENT if _source(sources, path).startswith("environment ") else FILE


def _bootstrap_note(path: Path, local: LocalConfig, sources: Mapping[Path, str]) -> list[str]:
    if _inside(local.bootstrap.dcs, path) is None:
        return []
    return [f"bootstrap.dcs in {_source(sources, ('bootstrap', 'dcs')) or 'the file'} says {shown_value(_inside(local.bootstrap.dcs, path), secret=may_hold_secrets(path[-1]))}: that counted once, when the cluster was made"]


def parameter_value(name: str, value: Any, *, shared: Any = None) -> Any:
    """A parameter's value, as far as it is for everybody who may ask: a command of this node's own file, or of ALTER SYSTEM,
    is not; what the store says is what GET /config answers."""
    return shown_value(value, secret=may_hold_secrets(name) and value != shared)


# --- what is shown -----------------------------------------------------------------------------------------------------

def plain_value(value: Any) -> Any:
    """As JSON has it: addresses and the like as text."""
    if value is None or isinstance(value, (bool, int, str, Secret)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(k): plain_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return plain_value(value.raw) if hasattr(value, "raw") else str(value)


def shown_value(value: Any, *, secret: bool = False) -> Any:
    """Without secrets: of a key that is one, in keys that sound like one, and inside connection strings."""
    if isinstance(value, Secret) or (secret and value not in (None, "")):
        return "***" if value else ""
    if isinstance(value, dict):
        return {k: shown_value(v, secret=any(word in str(k).lower() for word in _SECRET_KEYS) or may_hold_secrets(str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [shown_value(item) for item in value]
    return scrub(value) if isinstance(value, str) else value

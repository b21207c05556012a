"""`pgha config why KEY`: which value counts, which layer it comes from, where and since when; from the node's agent if it answers,
else from the files and the store as this command finds them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from pgha.config.load import Loaded, load
from pgha.config.places import line_of
from pgha.config.why import ENVIRONMENT, FILE, STORE, UnknownKey, why
from pgha.ctl import agents
from pgha.ctl.ends import DONE, USAGE, End, code_of
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.output import plain
from pgha.ctl.settings import DEFAULT_FILES, Settings
from pgha.ctl.settings import load as ctl_settings
from pgha.ctl.store import Store
from pgha.errors import ConfigError
from pgha.postgres.parameters import CONTROLLED

_WORDS = {"default": "the default", "pgha": "pgha itself", STORE: "/config in the store"}


def explain(keys: Sequence[str], *, config_file: str | None, environ: Mapping[str, str], as_json: bool) -> tuple[int, str, list[str]]:
    """Exit code, what to print, and what to say beside it on standard error. ConfigError for a file that is wrong."""
    where = config_file or environ.get("PGHACTL_CONFIG_FILE") or next((p for p in map(os.path.expanduser, DEFAULT_FILES) if Path(p).is_file()), "")
    if not where and "PGHA_CONFIGURATION" not in environ:
        raise ConfigError(f"no configuration file; allowed: -c FILE, PGHACTL_CONFIG_FILE, {' or '.join(DEFAULT_FILES)}")
    loaded = load(where, environ, purpose="ctl")
    said: list[str] = []
    try:
        settings = ctl_settings(config_file=where, scope=None, dcs_url=None, environ=environ)
        found = [_one(key, settings, loaded, said) for key in keys]
    except End as end:
        return end.code, "", end.text.splitlines()
    lines = list(dict.fromkeys(said))
    if as_json:
        return DONE, json.dumps(found if len(found) > 1 else found[0]), lines
    return DONE, "\n".join(plain(line) for one in found for line in shown(one)), lines


def _one(key: str, settings: Settings, loaded: Loaded, said: list[str]) -> dict[str, Any]:
    here, failure = None, ""
    answer = _from_agent(key, settings)
    if isinstance(answer, str):
        said.append(f"the agent does not answer ({answer}): as the files and the store say it, with the environment of this command")
        dynamic, revision, failure = _from_store(settings)
        answer = {"member": settings.name, "store": {"revision": revision}, "running": None, "left_out": "", **_local(key, loaded, dynamic)}
        if failure:
            said.append(f"{failure}: what the cluster's configuration says is not known")
    else:
        here = _local(key, loaded, None)
    layers = answer.get("layers") or []
    for layer in layers:
        if layer.get("layer") == FILE:
            layer.update(_place(layer))
    mine = next((layer for layer in (here or {}).get("layers", ()) if layer["layer"] == FILE), None)
    theirs = next((layer for layer in layers if layer.get("layer") == FILE), None)
    if here is not None and not any(layer.get("layer") == ENVIRONMENT for layer in layers) and (mine or {}).get("value") != (theirs or {}).get("value"):
        said.append(f"{key}: the file says {_text((mine or {}).get('value'))} now, which the agent has not read; allowed: pgha ctl reload {settings.name}")
    return answer


def _from_agent(key: str, settings: Settings) -> dict[str, Any] | str:
    """The answer, or why there is none. End(USAGE) for a key that is not known."""
    try:
        answer = agents.ask(settings, settings.rest.own_url, "POST", "/pgha/config/why", body={"key": key}, timeout_s=12.0)
    except NoAnswer as failure:
        return str(failure)
    text = answer.body.decode(errors="replace")
    if answer.status == 404:
        raise End(USAGE, text)
    try:
        value = json.loads(text) if answer.status == 200 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        if answer.status in (401, 403):
            raise End(code_of(answer.status, text), f"the agent refuses: {text}")
        return f"status {answer.status}"
    return value


def _from_store(settings: Settings) -> tuple[Any, int, str]:
    """The shared configuration, its revision, and why it is not known."""
    try:
        key = Store(settings.etcd).read(settings.root + "config").get("")
        return (json.loads(key.value), key.revision, "") if key is not None else (None, 0, "")
    except End as end:
        return None, 0, end.text
    except (ValueError, RecursionError):
        return None, 0, "/config in the store is not JSON"


def _local(key: str, loaded: Loaded, dynamic: Any) -> dict[str, Any]:
    try:
        found = why(key, local=loaded.local, sources=loaded.sources, dynamic=dynamic, defaults={name: rule.default for name, rule in CONTROLLED.items()})
    except UnknownKey as unknown:
        raise End(USAGE, str(unknown)) from None
    value: dict[str, Any] = msgspec.to_builtins(found)
    return value


def _place(layer: dict[str, Any]) -> dict[str, Any]:
    """Line and age of a file's entry, as the file is now."""
    path = Path(str(layer.get("where", "")))
    try:
        line = line_of(path.read_text(), tuple(layer.get("path") or ()))
        changed_at = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except (OSError, ValueError):
        return {}
    return {"line": line, "file_changed_at": changed_at} if line else {"file_changed_at": changed_at}


# --- for people --------------------------------------------------------------------------------------------------------

def shown(answer: dict[str, Any]) -> list[str]:
    """One key's lines."""
    layers = [layer for layer in answer.get("layers") or () if isinstance(layer, dict)]
    running = answer.get("running") or {}
    value = answer.get("value")
    if value is None and "value" in running:
        value = running["value"]
    lines = [f"{answer.get('key')} = {_text(value)}"]
    lines += [f"  {'from' if number == 0 else 'over'}  {_layer(layer, answer, with_value=number > 0)}" for number, layer in enumerate(layers)]
    if answer.get("left_out"):
        lines.append(f"  left out by {answer.get('member')}: {answer['left_out']}")
    if "value" in running:
        place = f" of {running['file']} line {running['line']}" if running.get("file") else ""
        lines.append(f"  PostgreSQL on {answer.get('member')} has {_text(running['value'])} ({running.get('source')}{place}; changed {_applied(running)})")
    return lines + [f"  note  {note}" for note in answer.get("notes") or ()]


def _applied(running: Mapping[str, Any]) -> str:
    now = ", and one is pending" if running.get("pending_restart") else ""
    return {"postmaster": "by a restart only", "sighup": "by a reload", "internal": "never"}.get(str(running.get("context")), "by a reload, and in a session") + now


def _layer(layer: Mapping[str, Any], answer: Mapping[str, Any], *, with_value: bool) -> str:
    kind = str(layer.get("layer"))
    text = _WORDS.get(kind, str(layer.get("where")))
    if kind == FILE and layer.get("line"):
        text += f" line {layer['line']}"
    if kind == FILE and layer.get("file_changed_at"):
        text += f" (file changed {layer['file_changed_at']})"
    if kind == STORE and not with_value:
        text += f" ({_since(answer.get('store') or {}, str(answer.get('member')))})"
    return f"{text}: {_text(layer.get('value'))}" if with_value else text


def _since(store: Mapping[str, Any], member: str) -> str:
    changed = store.get("changed")
    if isinstance(changed, dict):
        return f"changed at revision {changed.get('revision')}, seen by {member} at {changed.get('seen_at')}"
    watched = store.get("watched_since")
    return f"revision {store.get('revision')}" + (f", this key unchanged since {member} began at {watched}" if watched else "")


def _text(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


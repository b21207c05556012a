"""A good configuration, and ways to make it another: tests say only what differs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pgha.config.load import Loaded, load
from pgha.errors import ConfigError

#: every password in these tests; none of them may ever be shown
PASSWORDS = {name: f"hush-{name}-hush" for name in ("superuser", "replication", "rewind", "rest", "ctl", "etcd", "sslpassword", "keyfile")}

GOOD: dict[str, Any] = {
    "scope": "demo",
    "name": "n1",
    "restapi": {"listen": "10.0.0.1:8008", "authentication": {"username": "admin", "password": PASSWORDS["rest"]}},
    "etcd3": {"hosts": ["10.0.0.9:2379"]},
    "bootstrap": {"dcs": {"ttl": 30}},
    "postgresql": {
        "listen": "10.0.0.1:5432", "data_dir": "/srv/pg/data",
        "authentication": {
            "superuser": {"username": "postgres", "password": PASSWORDS["superuser"]},
            "replication": {"username": "replicator", "password": PASSWORDS["replication"]},
        },
    },
}


def changed(path: str, value: Any, base: dict[str, Any] = GOOD) -> dict[str, Any]:
    """`base` with one key set (None: removed)."""
    out = copy.deepcopy(base)
    table = out
    *parents, last = path.split(".")
    for part in parents:
        table = table.setdefault(part, {})
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value
    return out


def write(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(raw))
    path.chmod(0o600)
    return path


def loaded(where: Path, raw: dict[str, Any], environ: dict[str, str] | None = None, **options: Any) -> Loaded:
    return load(write(where / "pgha.toml", raw), environ or {}, **options)


def problems(where: Path, raw: dict[str, Any], environ: dict[str, str] | None = None) -> list[str]:
    """The problems of `raw`, with the file's name as FILE; none is an error of the test."""
    with pytest.raises(ConfigError) as caught:
        loaded(where, raw, environ)
    return [problem.replace(os.fspath(where / "pgha.toml"), "FILE") for problem in caught.value.problems]

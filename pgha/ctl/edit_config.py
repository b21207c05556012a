"""`ctl edit-config`: change the cluster's dynamic configuration: validated, shown as a difference, written only if nobody
else has changed it in between."""

from __future__ import annotations

import argparse
import difflib
import json
from typing import Any

from pgha.ctl import cluster as clusters
from pgha.ctl.ends import DONE, FAILED, USAGE, End
from pgha.ctl.output import to_toml
from pgha.ctl.prompt import confirm
from pgha.ctl.settings import Settings
from pgha.ctl.store import Store


def run(settings: Settings, given: argparse.Namespace) -> int:
    # msgspec comes with it, so only here
    from pgha.config.cluster import merge_patch, normalised, validate_change

    changes = [change(text, parameter=False) for text in given.set] + [change(text, parameter=True) for text in given.pg]
    if not changes:
        raise End(USAGE, "nothing to change; allowed: -s KEY=VALUE, -p PARAMETER=VALUE (null takes a key away)")
    cluster = clusters.read(settings)
    key = cluster.keys.get("config")
    if key is not None and cluster.config is None:
        raise End(FAILED, "the configuration in the store is not a JSON object; it is not changed")
    old = cluster.config or {}
    new: dict[str, Any] = old
    for path, value in changes:
        patch: Any = value
        for part in reversed(path):
            patch = {part: patch}
        new = merge_patch(new, patch)
    problems = validate_change(old, new)
    if problems:
        raise End(USAGE, "\n".join(problems))
    new = normalised(new)
    difference = list(difflib.unified_diff(to_toml(old).splitlines(), to_toml(new).splitlines(), lineterm=""))
    if not difference:
        print("Not changed")
        return DONE
    print("\n".join(difference), flush=True)
    confirm("Apply these changes?", force=given.force)
    value = json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()
    if not Store(settings.etcd).write(settings.root + "config", value, if_revision=key.revision if key else 0):
        raise End(FAILED, "Config modification aborted due to concurrent changes")
    print("Configuration changed")
    return DONE


def change(text: str, *, parameter: bool) -> tuple[tuple[str, ...], Any]:
    """'postgresql.parameters.work_mem=8MB' → (path, value). End(USAGE) if it has no key or no "="."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name or "" in name.split("."):
        raise End(USAGE, f"{text!r} is not KEY=VALUE")
    if parameter:
        return ("postgresql", "parameters", name), parsed(value)
    parts = name.split(".")
    if parts[:2] == ["postgresql", "parameters"] and len(parts) > 2:
        # a parameter's own name may have a dot (pg_stat_statements.max)
        parts = [*parts[:2], ".".join(parts[2:])]
    return tuple(parts), parsed(value)


def parsed(text: str) -> Any:
    """JSON if it is (numbers, true, null, lists, objects), else the text as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()

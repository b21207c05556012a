"""`ctl edit-config`: change the cluster's dynamic configuration: validated, shown as a difference, written only if nobody
else has changed it in between."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.config_check import Checked, check, restart_plan, shown_restarts
from pgha.ctl.ends import DONE, FAILED, USAGE, End
from pgha.ctl.output import plain, to_toml
from pgha.ctl.prompt import confirm, wanted
from pgha.ctl.settings import Settings
from pgha.ctl.store import Store
from pgha.model.rolling import said

#: the largest file that is read
_FILE_BYTES = 1 << 20


def run(settings: Settings, given: argparse.Namespace) -> int:
    # msgspec comes with it, so only here
    from pgha.config.cluster import merge_patch, normalised, validate_change

    changes = [change(text, parameter=False) for text in given.set] + [change(text, parameter=True) for text in given.pg]
    whole, patch = (None if path is None else _table(_read(path), path) for path in (given.replace, given.apply))
    by_hand = not changes and whole is None and patch is None
    if by_hand and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise End(USAGE, "nothing to change, and there is no terminal for an editor; allowed: -s KEY=VALUE, -p PARAMETER=VALUE (null takes a key "
                         "away), --apply FILE, --replace FILE")
    cluster = clusters.read(settings)
    key = cluster.keys.get("config")
    if key is not None and cluster.config is None and whole is None:
        raise End(FAILED, "the configuration in the store is not a JSON object; it is not changed (allowed: --replace)")
    old = cluster.config or {}
    checked: Checked | None = None

    def problems_of(config: dict[str, Any]) -> Sequence[str]:
        """By the schema; if that finds nothing, and PostgreSQL's settings change, by the agents and their PostgreSQL."""
        nonlocal checked
        checked = None
        found = validate_change(old, config)
        if not found and isinstance(config.get("postgresql"), dict) and config["postgresql"] != old.get("postgresql"):
            checked = check(settings, cluster, old, normalised(config))
            found = checked.problems
        return found

    text = ""      # the file with what was made in an editor
    if by_hand:
        new, text = edited(old, problems_of)
    else:
        new = old if whole is None else merge_patch({}, whole)      # without nulls
        for path, value in ([((), patch)] if patch is not None else []) + changes:
            for part in reversed(path):
                value = {part: value}      # noqa: PLW2901  (the same change, seen from further up)
            new = merge_patch(new, value)
        problems = problems_of(new)
        if problems:
            raise End(USAGE, "\n".join(problems))
    needed = True
    try:
        needed = not _apply(settings, given, cluster, normalised(new), checked)
    finally:
        if text and needed:
            clusters.warn(f"the text is in {text}")
        elif text:
            os.unlink(text)  # noqa: PTH108  (pathlib takes 10 ms to load)
    return DONE


def _apply(settings: Settings, given: argparse.Namespace, cluster: Cluster, new: dict[str, Any], checked: Checked | None) -> bool:
    """Show it, ask, write it. True: it stands in the store; False: nothing was to be changed. End if it was not changed."""
    old, key = cluster.config or {}, cluster.keys.get("config")
    difference = list(difflib.unified_diff(to_toml(old).splitlines(), to_toml(new).splitlines(), lineterm=""))
    if not difference and cluster.config is not None:
        print("Not changed")
        return True
    if not given.quiet:
        print("\n".join(coloured(difference, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))), flush=True)
    if checked is not None:
        tell(checked)
    if given.dry_run:
        print(f"edit-config of cluster {settings.scope}: would be done, once it is confirmed (dry run: nothing is changed)")
        print("  1. ctl  write: the shared configuration, unless somebody else has changed it until then")
        print(f"  2. {', '.join(cluster.members) or 'every member'}  reload: the files are written, and PostgreSQL is told to read them again")
        if checked is not None and checked.restart:
            _tell_restarts(cluster, checked, "What would wait for a restart then:")
        return False
    confirm("Apply these changes?", force=given.force)
    value = json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()
    if not Store(settings.etcd).write(settings.root + "config", value, if_revision=key.revision if key else 0):
        raise End(FAILED, "Config modification aborted due to concurrent changes")
    print("Configuration changed")
    if checked is not None and checked.restart and not given.quiet:
        _tell_restarts(cluster, checked, "Waiting for a restart:")
    return True


def _tell_restarts(cluster: Cluster, checked: Checked, title: str) -> None:
    plan = restart_plan(cluster, checked)
    print("\n".join((title, *(f"  {plain(line)}" for line in shown_restarts(checked.restart)))))
    order = f", in this order: {said(plan.steps, cluster.leader)} ({plan.because})" if plan.because else ""
    print(f"`pgha ctl restart --pending` does that{order}")


def tell(checked: Checked) -> None:
    """What is doubtful, and who did not answer, on standard error."""
    for line in checked.warnings:
        clusters.warn(f"warning: {line}")
    if not checked.asked:
        clusters.warn("no agent answers, so that PostgreSQL has not checked its parameters; what it does not take, each member will leave out and log")
    for line in checked.unheard:
        clusters.warn(f"not asked: {line}")


def _read(path: str) -> str:
    """Of a file, or of standard input ("-")."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            content = file.read(_FILE_BYTES + 1)
        if len(content) > _FILE_BYTES:
            raise End(USAGE, f"{path}: is longer than {_FILE_BYTES} bytes")
        return content.decode()
    except OSError as error:
        raise End(USAGE, f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise End(USAGE, f"{path}: is not UTF-8") from None


def _table(text: str, path: str) -> dict[str, Any]:
    """TOML, or a JSON object (only JSON can say null, which takes a key away). End(USAGE) says what is wrong."""
    try:
        if text.lstrip().startswith("{"):
            value: Any = json.loads(text)
        else:
            value = tomllib.loads(text)
        json.dumps(value, allow_nan=False)      # TOML has moments and numbers without end, the store has not
    except (TypeError, ValueError, RecursionError) as error:
        raise End(USAGE, f"{path}: is neither TOML nor a JSON object that can be stored: {error}") from None
    assert isinstance(value, dict), "both begin with a table"
    if not value:
        raise End(USAGE, f"{path}: holds nothing")      # a file that somebody forgot to write is no wish for defaults
    return value


def edited(old: dict[str, Any], problems_of: Callable[[dict[str, Any]], Sequence[str]]) -> tuple[dict[str, Any], str]:
    """What the operator makes of it in $VISUAL or $EDITOR, again until it is valid or given up; and the file of it, which is kept
    until it is stored."""
    import shlex
    import subprocess
    import tempfile

    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    descriptor, path = tempfile.mkstemp(prefix="pgha-config-", suffix=".toml")      # mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(to_toml(old) + "\n")
    while True:
        try:
            code = subprocess.call([*shlex.split(editor), path])
        except (OSError, ValueError) as error:
            os.unlink(path)  # noqa: PTH108  (pathlib takes 10 ms to load)
            raise End(USAGE, f"the editor {editor!r} does not start: {error}; allowed: VISUAL, EDITOR") from None
        if code != 0:
            raise End(FAILED, f"the editor {editor!r} ended with {code}: nothing was changed; the text is in {path}")
        try:
            new = _table(_read(path), path)
            problems = problems_of(new)
        except End as end:
            problems = [end.text]
        if not problems:
            return new, path
        print("\n".join(f"pgha: {plain(problem)}" for problem in problems), file=sys.stderr)
        if not wanted("Edit it again?"):
            raise End(USAGE, f"nothing was changed; the text is in {path}")


def coloured(difference: Sequence[str], *, colours: bool) -> list[str]:
    """The lines of a difference for a terminal: what goes is red, what comes is green."""
    plain_lines = [plain(line) for line in difference]
    if not colours:
        return plain_lines
    code = {"-": "31", "+": "32", "@": "36"}
    return [f"\033[{code[line[0]]}m{line}\033[0m" if line[:1] in code and not line.startswith(("---", "+++")) else line for line in plain_lines]


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

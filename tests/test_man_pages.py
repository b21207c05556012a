"""The man pages say what the code does: every key with what is allowed and its default, every option, every endpoint; and mandoc has nothing to say."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgha.__main__ import main
from pgha.clock import Instant
from pgha.config import directories
from pgha.config.cluster import ClusterConfig
from pgha.config.local import _FLAG_TAGS, _PRIORITY_TAGS, LocalConfig, Postgresql
from pgha.config.schema import Field, Section, every_key, fields
from pgha.ctl import parser
from pgha.decide.common import stop_timeout_s
from pgha.model.lock import Identity
from pgha.model.observation import Observation, Settings
from pgha.rest import routes
from pgha.rest.requests import Changes

MAN = Path(__file__).parents[1] / "man"
PAGES = sorted(MAN.iterdir())
USERS = ("superuser", "replication", "rewind")
#: Answered for the sake of the reference's clients, and of no use to a reader.
UNSPOKEN = {"citus", "mpp", "sigterm"}


def entries(page: str, macro: str) -> dict[str, str]:
    """What follows each `.It MACRO name`, as one line of text."""
    found: dict[str, str] = {}
    name = None
    for line in (MAN / page).read_text().splitlines():
        if line.startswith(f".It {macro} "):
            name = line[len(f".It {macro} "):]
            assert name not in found, f"{page}: {name} is there twice"
            found[name] = ""
        elif re.match(r"\.(It|El|Sh|Ss)\b", line):
            name = None
        elif name is not None:
            found[name] += " " + line.removeprefix("\\&").replace("\\e", "\\")
    return {name: " ".join(text.split()) for name, text in found.items()}


def as_written(text: str) -> str:
    return " ".join(text.replace("…", "...").split())


def default(section: type[Section], field: Field) -> str:
    """As a reader would write it; "" where there is none to speak of."""
    value: Any = getattr(section(), field.attribute)
    assert field.key is not None
    if field.key.kind.secret or (not value and not isinstance(value, bool | int | float)) or isinstance(value, dict):
        return ""
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def keys() -> dict[str, tuple[Field, type[Section]]]:
    """Every key as the page names it: those of a node, then those that only the cluster has."""
    found: dict[str, tuple[Field, type[Section]]] = {}
    for kind in (LocalConfig, ClusterConfig):
        for path, key, section in every_key(kind):
            name = ".".join(path)
            for user in USERS:
                name = name.replace(f"authentication.{user}.", "authentication.USER.")
            if name != "tags":
                found.setdefault(name, (next(f for f in fields(section) if f.key is key), section))
    return found


def test_every_key_is_in_its_page_and_no_other() -> None:
    tags = {f"tags.{name}" for name in (*_FLAG_TAGS, *_PRIORITY_TAGS, "replicatefrom")}
    assert set(entries("pgha.toml.5", "Va")) == {*keys(), *tags}


@pytest.mark.parametrize("name", keys())
def test_a_key_s_range_and_default_are_the_code_s(name: str) -> None:
    said, (field, section) = entries("pgha.toml.5", "Va")[name], keys()[name]
    assert field.key is not None
    assert f"Allowed: {as_written(field.key.kind.allowed)}." in said
    value = FOLLOWS[name][0] if name in FOLLOWS else default(section, field)
    assert ("Required." in said) == field.key.required
    if value:
        assert f"Default: {value}." in said
    for alias in field.key.aliases:
        assert alias in said


def node() -> LocalConfig:
    return LocalConfig(scope="s", name="n", postgresql=Postgresql(data_dir="/d"))


#: Defaults that follow from something else: as the page says it, what the code makes of it, and what that is to be.
FOLLOWS: dict[str, tuple[str, Callable[[], object], object]] = {
    "pgha.primary_hang_timeout": ("ttl less 1 s, at most 29 s", lambda: [ClusterConfig(ttl_s=ttl_s).primary_hang_timeout_s for ttl_s in (3.0, 30.0, 31.0, 600.0)], [2, 29, 29, 29]),
    "pgha.state_dir": ("$STATE_DIRECTORY, else the data directory with .pgha behind its name",
                       lambda: [str(directories.state_dir(node(), environ)) for environ in ({"STATE_DIRECTORY": "/x"}, {})], ["/x", "/d.pgha"]),
    "pgha.runtime_dir": ("$RUNTIME_DIRECTORY, else below /dev/shm",
                         lambda: [str(directories.runtime_dir(node(), environ))[:8] for environ in ({"RUNTIME_DIRECTORY": "/x"}, {})], ["/x", "/dev/shm"]),
    "postgresql.pgpass": ("pgpass in the state directory", lambda: str(directories.pgpass(node(), {})), "/d.pgha/pgpass"),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_a_default_that_follows_from_something_else_is_the_code_s(name: str) -> None:
    _, of_the_code, wanted = FOLLOWS[name]
    assert of_the_code() == wanted


def test_a_stop_without_a_limit_has_the_limit_that_the_page_says() -> None:
    me = Identity(name="n", node_id="i", incarnation="r")
    limit_s = stop_timeout_s(Observation(now=Instant(1, 1), wall_s=1.0, number=1, me=me, settings=Settings(primary_stop_timeout_s=0.0)))
    assert f" 0: {limit_s:g} s. " in entries("pgha.toml.5", "Va")["primary_stop_timeout"]


def commands() -> dict[str, argparse.ArgumentParser]:
    return next(dict(action.choices) for action in parser()._actions if isinstance(action, argparse._SubParsersAction))


def described(page: str, chapter: str) -> set[str]:
    """The options that a subsection of a page describes."""
    text = (MAN / page).read_text()
    inside = re.search(rf"^\.Ss {re.escape(chapter)}$(.*?)(?=^\.S[sh] )", text, re.MULTILINE | re.DOTALL)
    assert inside is not None, f"{page} has no subsection {chapter}"
    items = [line for line in inside[1].splitlines() if line.startswith(".It ")]
    return {"-" + flag.replace("\\-", "-") for line in items for flag in re.findall(r"Fl (\S+)", line)}


def test_every_command_of_ctl_has_its_subsection() -> None:
    text = (MAN / "pgha-ctl.1").read_text()
    assert re.findall(r"^\.Ss (.*)$", text.partition(".Sh COMMANDS")[2], re.MULTILINE) == list(commands())


@pytest.mark.parametrize("command", commands())
def test_every_option_of_a_ctl_command_is_described(command: str) -> None:
    has = {option for action in commands()[command]._actions for option in action.option_strings
           if action.dest not in ("help", "config_file", "scope", "dcs_url", "insecure")}
    assert described("pgha-ctl.1", command) == has


def test_the_common_options_of_ctl_are_described() -> None:
    head = (MAN / "pgha-ctl.1").read_text().partition(".Sh COMMANDS")[0]
    options = {option for action in parser()._actions for option in action.option_strings}
    assert {"-" + flag.replace("\\-", "-") for flag in re.findall(r"\.It.*?Fl (\S+)|Fl (\S+)", head) for flag in flag if flag} >= options


@pytest.mark.parametrize("words", [["run"], ["guard"], ["leave"], ["config", "check"], ["config", "sample"], ["config", "import"], ["config", "why"], ["demo"], ["replay"]])
def test_every_option_of_a_command_is_in_the_synopsis(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        main([*words, "--help"])
    except SystemExit:
        pass
    usage = capsys.readouterr().out
    wanted = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage)) - {"--help"}
    text = (MAN / "pgha.1").read_text()
    written = {flag.replace("\\-", "-") for flag in re.findall(r"Fl (\\-\S+)", text)}
    assert {option.removeprefix("-") for option in wanted} <= written
    assert f".Cm {' '.join(words)}" in text


def test_every_endpoint_is_described() -> None:
    text = (MAN / "pgha.1").read_text()
    described = re.findall(r"^\.It (GET|POST|PUT|PATCH|DELETE) (\S+)", text, re.MULTILINE)
    reads = {path.strip("/").partition("/")[0] for method, path in described if method == "GET"}
    assert reads >= routes._GET
    nobody: Any = None
    changes = {(method, name) for method, name in Changes(nobody, nobody, wall_s=lambda: 0.0)._routes if name not in UNSPOKEN}
    assert changes == {(method, path.strip("/").partition("/")[0]) for method, path in described if method != "GET"}


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_has_nothing_to_say_and_80_columns_are_enough(page: Path) -> None:
    lint = subprocess.run(["mandoc", "-T", "lint", str(page)], capture_output=True, text=True, check=False, timeout=30)
    assert lint.stdout + lint.stderr == ""
    shown = subprocess.run(["mandoc", "-T", "utf8", "-O", "width=80", str(page)], capture_output=True, text=True, check=True, timeout=30).stdout
    plain = re.sub(r".\x08", "", shown)
    assert [line for line in plain.splitlines() if len(line) > 80] == []

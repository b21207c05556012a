"""The operator's own programs: a command, and a method, which is a table with a command (compatibility spec 17, 20)."""

from __future__ import annotations

import re
import shlex
from typing import Any

from msgspec import Struct

from pgha.config.values import Kind, Wrong, boolean, shown, text, type_name

Arguments = tuple[tuple[str, str], ...]


class ReplicaMethod(Struct, frozen=True, kw_only=True):
    """How a copy is made. `arguments`: (key, value) of each further key, given to the command as --key=value."""

    command: str
    no_params: bool = False     # the command gets none of our own arguments
    no_leader: bool = False     # it needs no running server to copy from
    keep_data: bool = False     # it works on what is there already
    arguments: Arguments = ()

    @property
    def in_place(self) -> bool:
        """It cannot be told where to write, or wants what is there: so it writes to the data directory itself."""
        return self.no_params or self.keep_data


class BootstrapMethod(Struct, frozen=True, kw_only=True):
    """How a new cluster's data is made. `recovery_conf`: recovery settings, with a target or without: then it is recovered first."""

    command: str
    no_params: bool = False
    keep_existing_recovery_conf: bool = False
    recovery_conf: dict[str, str] = {}
    arguments: Arguments = ()


def _command(value: Any) -> str:
    line: str = text().parse(value)
    try:
        words = shlex.split(line)
    except ValueError:
        raise Wrong("has a quote that is not closed") from None
    if not words or not words[0]:
        raise Wrong("is empty")
    return line


def command() -> Kind:
    """A program and its arguments, as a shell would split them; no shell runs it."""
    return Kind(_command, "a command: a program and its arguments")


_METHOD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def method_name(value: Any) -> str:
    """The name of a method's table."""
    name: str = text().parse(value)
    if not _METHOD_NAME.fullmatch(name):
        raise Wrong(f"is {shown(name)}, which is no name of a method")
    return name


def _argument(name: str, value: Any) -> str:
    """As the reference's scripts get it: Python's words for booleans."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)):
        return shown(value)
    if not isinstance(value, str):
        raise Wrong(f"has {type_name(value)} for {name}")
    if "\n" in value or "\0" in value:
        raise Wrong(f"has a line break or a NUL in {name}")
    return value


def _read(value: Any, *, flags: tuple[str, ...], reserved: tuple[str, ...] = ()) -> tuple[str, dict[str, bool], Arguments]:
    """(command, flags, arguments) of a method's table."""
    if not isinstance(value, dict):
        raise Wrong(f"is {type_name(value)}, not a table")
    if "command" not in value:
        raise Wrong("has no command")
    found = {}
    for name in flags:
        try:
            found[name] = boolean(value.get(name, False))
        except Wrong as wrong:
            raise Wrong(f"has {name}, which {wrong.what}") from None
    try:
        line = _command(value["command"])
    except Wrong as wrong:
        raise Wrong(f"has a command that {wrong.what}") from None
    rest = {name: item for name, item in value.items() if name not in ("command", *flags, *reserved)}
    for name in rest:
        if not name or not name.isprintable() or "=" in name or " " in name:
            raise Wrong(f"has {shown(name)}, which is no argument's name")
    return line, found, tuple((name, _argument(name, item)) for name, item in rest.items())


def _replica_method(value: Any) -> ReplicaMethod:
    line, flags, arguments = _read(value, flags=("no_params", "no_leader", "keep_data"))
    return ReplicaMethod(command=line, arguments=arguments, **flags)


def replica_method() -> Kind:
    return Kind(_replica_method, "a table with command, and no_params, no_leader, keep_data (true or false) or arguments of the command", shape="table")


#: What pgha sets itself while it recovers.
_OWN_RECOVERY = ("primary_conninfo", "primary_slot_name", "standby_mode", "hot_standby")


def _bootstrap_method(value: Any) -> BootstrapMethod:
    line, flags, arguments = _read(value, flags=("no_params", "keep_existing_recovery_conf"), reserved=("recovery_conf",))
    conf = value.get("recovery_conf", {})
    if not isinstance(conf, dict):
        raise Wrong(f"has recovery_conf, which is {type_name(conf)}, not a table")
    settings = {}
    for name, item in conf.items():
        if not name.replace("_", "").isalnum() or not name.isascii():
            raise Wrong(f"has {shown(name)} in recovery_conf, which is no parameter's name")
        if name in _OWN_RECOVERY:
            raise Wrong(f"has {name} in recovery_conf, which pgha sets itself")
        settings[name] = "on" if item is True else "off" if item is False else _argument(name, item)
    if settings.get("recovery_target_action", "promote") != "promote":
        raise Wrong("has a recovery_target_action that does not make a primary of it; allowed: promote")
    if flags["keep_existing_recovery_conf"] and settings:
        # As in the reference, where what the command leaves counts then.
        settings = {}
    return BootstrapMethod(command=line, arguments=arguments, recovery_conf=settings, **flags)


def bootstrap_method() -> Kind:
    return Kind(_bootstrap_method, "a table with command, and no_params, keep_existing_recovery_conf (true or false), recovery_conf (a table) or arguments of the command", shape="table")

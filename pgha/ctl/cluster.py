"""The cluster as ctl sees it: its keys, read and understood as far as they can be; what cannot is named, not fatal."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

from pgha.ctl.ends import FAILED, UNREACHABLE, USAGE, End
from pgha.ctl.output import plain
from pgha.ctl.settings import Settings
from pgha.ctl.store import Key, Store
from pgha.model.overview import overview

#: what --role takes; "primary": a leader that takes writes
ROLES = ("leader", "primary", "standby-leader", "replica", "any")


class Cluster(NamedTuple):
    """`body`: as GET /cluster shows it. `members`: the member keys' objects. `keys` is empty if it came from an agent."""

    scope: str
    leader: str
    members: dict[str, dict[str, Any]]
    body: dict[str, Any]
    config: dict[str, Any] | None
    history: list[list[Any]]
    system_identifier: str
    keys: dict[str, Key]

    def api_url(self, name: str) -> str:
        """Where a member's agent is reached, without a path; "" if it does not say."""
        url = self.members.get(name, {}).get("api_url")
        return url.rpartition("/")[0] if isinstance(url, str) and url.endswith("/patroni") else (url or "") if isinstance(url, str) else ""


def read(settings: Settings) -> Cluster:
    """From the store. End(UNREACHABLE) if it cannot be reached."""
    return understood(settings.scope, Store(settings.etcd).read(settings.root))


def read_or_ask(settings: Settings, *, more: str = "") -> Cluster:
    """From the store, or if that is down, as the configured node's agent last saw it (and say so), if it is of this cluster.
    `more`: what of an agent is to be asked besides, "config" or "history"."""
    from pgha.ctl import agents

    try:
        return read(settings)
    except End as end:
        agent = settings.own_agent
        if end.code != UNREACHABLE or not agent:
            raise
        try:
            body = agents.get_json(settings, agent, "/cluster")
            own = agents.get_json(settings, agent, "/patroni")
            config = agents.get_json(settings, agent, "/config") if more == "config" else None
            history = agents.get_rows(settings, agent, "/history") if more == "history" else []
        except End as second:
            raise End(UNREACHABLE, f"{end.text}\nand no agent either: {second.text}") from None
        if body.get("scope") != settings.scope:
            raise End(UNREACHABLE, f"{end.text}\nand the agent at {agent} is of another cluster: {body.get('scope')!r}") from None
        warn(f"{end.text}\nshowing what the agent at {agent} last saw")
        return seen_by_agent(settings.scope, body, str(own.get("database_system_identifier", "")))._replace(config=config, history=history)


def seen_by_agent(scope: str, body: dict[str, Any], system_identifier: str) -> Cluster:
    """From an agent's GET /cluster."""
    members = [m for m in body.get("members", ()) if isinstance(m, dict) and isinstance(m.get("name"), str) and m["name"]]
    leader = next((m["name"] for m in members if m.get("role") in ("leader", "standby_leader")), "")
    return Cluster(scope, leader, {m["name"]: m for m in members}, {**body, "members": members}, None, [], system_identifier, {})


def understood(scope: str, keys: dict[str, Key], *, quiet: bool = False, whatever: bool = False) -> Cluster:
    """A cluster from its raw keys. Values that do not parse count as absent and are named on standard error, unless
    `quiet`. End if they are no cluster's, unless `whatever`."""
    reader = _Reader(keys, quiet=quiet)
    members = {name.removeprefix("members/"): reader.member(name) for name in sorted(keys) if name.startswith("members/") and name != "members/"}
    if not whatever and not members and "initialize" not in keys and "config" not in keys:
        raise End(FAILED, f"there is no cluster {scope!r} in the store")
    lock = reader.object("pgha/lock")
    status = reader.json("status")
    optime = status.get("optime") if isinstance(status, dict) else status
    optimes = [n for n in (optime, (lock or {}).get("lsn")) if isinstance(n, int) and not isinstance(n, bool)]
    leader = _leader(keys, lock, reader)
    config = reader.object("config")
    history = reader.json("history")
    if history is not None and not (isinstance(history, list) and all(isinstance(row, list) and len(row) >= 2 for row in history)):
        reader.warn("history: is not a list of rows; treated as absent")
        history = None
    body = overview(scope=scope, leader=leader, members=members, optime=max(optimes, default=0), sync=reader.object("sync") or {},
                    failover=reader.failover(), config=config or {})
    initialize = keys["initialize"].value.decode(errors="replace") if "initialize" in keys else ""
    return Cluster(scope, leader, members, body, config, history or [], initialize, keys)


def _leader(keys: dict[str, Key], lock: dict[str, Any] | None, reader: _Reader) -> str:
    """Who holds the lock. In a pure pgha cluster `leader` stays when its lock is released (safety model 2), so the lock
    record decides; where members of another make take part the key is leased, and its presence is the lock."""
    named = keys["leader"].value.decode(errors="replace") if "leader" in keys else ""
    if named and keys["leader"].lease:
        return named
    if lock is None:
        if named and "pgha/lock" not in keys:
            reader.warn(f"nobody holds the lock; it was last held by {named}")
            return ""
        return named
    holder = str(lock.get("holder") or named)
    if lock.get("mode") == "released":
        reader.warn(f"nobody holds the lock; {holder} has released it")
        return ""
    if f"members/{holder}" not in keys:
        reader.warn(f"the lock was last held by {holder}, which has no member key any more: it is down, or cannot reach the store")
    return holder


class _Reader:
    def __init__(self, keys: dict[str, Key], *, quiet: bool) -> None:
        self._keys = keys
        self._quiet = quiet

    def warn(self, text: str) -> None:
        if not self._quiet:
            warn(text)

    def json(self, name: str) -> Any:
        if name not in self._keys:
            return None
        try:
            return json.loads(self._keys[name].value)
        except (ValueError, RecursionError):
            self.warn(f"{name}: is not JSON; treated as absent")
            return None

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.json(name)
        if value is None or isinstance(value, dict):
            return value
        self.warn(f"{name}: is not a JSON object; treated as absent")
        return None

    def member(self, name: str) -> dict[str, Any]:
        value = self._keys[name].value
        if value.startswith(b"postgres"):       # the reference's form before JSON
            conn_url, _, api_url = value.decode(errors="replace").partition("?application_name=")
            return {"conn_url": conn_url, "api_url": api_url}
        return self.object(name) or {}

    def failover(self) -> dict[str, Any]:
        value = self._keys["failover"].value if "failover" in self._keys else b""
        if value and not value.lstrip().startswith(b"{"):
            leader, _, candidate = value.decode(errors="replace").partition(":")
            return {"leader": leader.strip(), "member": candidate.strip()}
        return (self.object("failover") or {}) if value else {}


def warn(text: str) -> None:
    print(f"pgha: {plain(text)}", file=sys.stderr)


def members_named(cluster: Cluster, names: list[str]) -> list[str]:
    """The members meant, each once: all, if none is named. End if there is none of that name."""
    return known(cluster, without_scope(cluster, names), scope_named=names[:1] == [cluster.scope]) or list(cluster.members)


def known(cluster: Cluster, names: list[str], *, scope_named: bool) -> list[str]:
    """These members. End if one is none; that says, unless the cluster was named, that the first may have been meant for that."""
    if unknown := [name for name in names if name not in cluster.members]:
        other = f"; nor is {names[0]} the cluster's name, which is {cluster.scope} (another cluster: --scope {names[0]})" if not scope_named and unknown[0] == names[0] else ""
        raise End(USAGE, f"no such member: {', '.join(unknown)}; there are {', '.join(cluster.members) or 'none'}{other}")
    return list(dict.fromkeys(names))


def without_scope(cluster: Cluster, names: list[str]) -> list[str]:
    """The names of members among those after a command: the cluster's own may stand in front, as the reference's commands have
    it. End if that is a member's, too, for one is not all."""
    scope = cluster.scope
    if names[:1] != [scope]:
        return names
    if scope in cluster.members and names[1:2] != [scope]:
        raise End(USAGE, f"{scope} is the cluster's name, and a member's; allowed: {scope} {scope} for that member, --scope {scope} and no name for all")
    return names[1:]


def chosen(cluster: Cluster, names: list[str], *, role: str) -> list[str]:
    """The members meant, replicas first, those of another role left out."""
    of_role = {member["name"] for member in cluster.body["members"] if is_role(member, role)}
    return sorted((name for name in members_named(cluster, names) if name in of_role), key=lambda name: (name == cluster.leader, name))


def is_role(member: dict[str, Any], role: str) -> bool:
    """Is a member (as GET /cluster has it) what --role says?"""
    own = member.get("role")
    match role:
        case "any":
            return True
        case "leader":
            return own in ("leader", "standby_leader")
        case "primary":
            return own == "leader"
        case "standby-leader":
            return own == "standby_leader"
        case _:
            return own not in ("leader", "standby_leader")

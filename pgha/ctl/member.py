"""Which member does a role or a name mean, and where is its PostgreSQL? For `dsn` and `query`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from pgha.ctl.cluster import ROLES, Cluster, is_role
from pgha.ctl.ends import FAILED, USAGE, End

#: a name or an address that is one word in a connection string
_HOST = re.compile(r"[\w.:%-]+")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-r", "--role", choices=ROLES, help="of a member that is this (default: leader); primary: a leader that takes writes")
    parser.add_argument("-m", "--member", metavar="NAME", help="of this member")
    parser.add_argument("--any", action="store_true", help="of any member: --role any")


def one_option(given: argparse.Namespace) -> None:
    """End(USAGE) if more than one says which member."""
    if given.member is not None and given.role is not None:
        raise End(USAGE, "--role and --member are mutually exclusive options")
    if given.any and (given.member is not None or given.role not in (None, "any")):
        raise End(USAGE, f"--any and {'--member' if given.member is not None else '--role'} are mutually exclusive options")


def meant(cluster: Cluster, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Members as GET /cluster has them, each with a host, the most suitable first: who runs before who does not, then by
    name. End if there is none."""
    role = "any" if given.any or given.member is not None else given.role or "leader"
    known = [m for m in cluster.body["members"] if given.member in (None, m["name"]) and is_role(m, role) and _has_address(m)]
    if not known:
        raise End(FAILED, f"Can not find a suitable member: {_why(cluster, given.member, role)}")
    return sorted(known, key=lambda m: (m.get("state") not in ("running", "streaming", "in archive recovery"), m["name"]))


def _has_address(member: dict[str, Any]) -> bool:
    host, port = member.get("host"), member.get("port")
    return isinstance(host, str) and _HOST.fullmatch(host) is not None and isinstance(port, int) and 0 < port < 65536


def _why(cluster: Cluster, name: str | None, role: str) -> str:
    if name is not None:
        return f"{name} publishes no address" if name in cluster.members else f"no such member: {name}; there are {', '.join(cluster.members) or 'none'}"
    return "no member publishes an address" if role == "any" else f"nobody with an address is {role}"

"""Which status does a health check get, and why? Pure: path, query and facts in, status and reason out.

The paths and their order are the reference's (compatibility spec 3.2): load balancers all over the world are
configured with them. Paths are matched by substring, the first hit wins; `/sync`, `/quorum` and their kin are exact.

Rules of this file: no clock. Whether the lock is held and whether the loop still runs depends on the moment of the
request, so the caller evaluates both and puts them into the facts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from msgspec import Struct

#: what counts as "no limit" for ?lag=
UNLIMITED = 1 << 63

_LAG_UNITS = {"b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
#: Applied to stripped text, and no two parts can match the same character: linear, whatever a client sends. 18 digits are
#: more than any position has.
_LAG = re.compile(r"([+-]?\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", re.ASCII)


class HealthFacts(Struct, frozen=True, kw_only=True):
    """All that a status code may depend on.

    `state`: PostgreSQL's state in the words of the compatibility spec 1.10. `role`: "primary" or "replica" by recovery
    state, "standby_leader" for the holder in a standby cluster; the agent's own word while there is no server.
    LSNs are integers, None: not known. `lock_held` and `loop_alive` are of the moment of the request.
    """

    state: str = "unknown"
    role: str = "replica"
    lock_held: bool = False
    loop_alive: bool = True
    standby_cluster: bool = False
    dcs_seen: bool = False             # a view of the cluster is cached
    paused: bool = False
    failsafe_active: bool = False
    sync_standby: bool = False         # named in /sync, not in quorum mode
    quorum_standby: bool = False       # named in /sync in quorum mode
    replication_state: str = ""        # "streaming", "in archive recovery" or ""
    tags: dict[str, Any] = {}
    optime: int | None = None          # the leader's position as last written to /status
    latest_end_lsn: int | None = None  # the leader's position as the walreceiver last heard it
    received_lsn: int | None = None
    replayed_lsn: int | None = None
    maximum_lag_bytes: int = 1 << 20   # maximum_lag_on_failover: the limit of /readiness if the request names none


class Verdict(NamedTuple):
    """`holds` 200, otherwise 503; `why` says what was decisive."""

    status: int
    why: str


def _verdict(ok: bool, why: str) -> Verdict:  # noqa: FBT001  (the one thing that it is about)
    return Verdict(200 if ok else 503, why)


def parse_lag(text: str | None) -> int | None:
    """'16kB' → 16384, '1048576' → 1048576, '1.5MB' → 1572864; None if it cannot be read (then there is no limit)."""
    match = _LAG.fullmatch((text or "").strip())
    if match is None:
        return None
    unit = _LAG_UNITS.get(match[2].lower() or "b")
    return None if unit is None else round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def leader_position(facts: HealthFacts) -> int | None:
    """The newest position of the leader that this node has heard of, by either way."""
    known = [lsn for lsn in (facts.optime, facts.latest_end_lsn) if lsn is not None]
    return max(known) if known else None


def holds_lock(facts: HealthFacts) -> Verdict:
    """The lock, with time left on it. Paused and without any view of the store, PostgreSQL's role stands in for it."""
    if not facts.dcs_seen and facts.paused:
        return _verdict(facts.role in ("primary", "standby_leader"), f"paused and the store not seen: by role, {facts.role}")
    return _verdict(facts.lock_held, "holds the lock" if facts.lock_held else "does not hold the lock, or its time is over")


def is_primary(facts: HealthFacts) -> Verdict:
    if facts.standby_cluster:
        return _verdict(False, "this is a standby cluster")
    return holds_lock(facts)


def is_standby_leader(facts: HealthFacts) -> Verdict:
    if not facts.standby_cluster:
        return _verdict(False, "this is not a standby cluster")
    if facts.role not in ("replica", "standby_leader"):
        return _verdict(False, f"role is {facts.role}")
    return holds_lock(facts)


def is_replica(facts: HealthFacts, query: Mapping[str, str]) -> Verdict:
    """Fit to serve reads: every condition that fails is named."""
    obstacles = []
    if facts.tags.get("noloadbalance"):
        obstacles.append("tag noloadbalance is set")
    if facts.role != "replica":
        obstacles.append(f"role is {facts.role}")
    if facts.state != "running":
        obstacles.append(f"state is {facts.state}")
    if facts.standby_cluster and facts.lock_held:
        obstacles.append("leads the standby cluster")
    wanted_state = query.get("replication_state")
    if wanted_state is not None and facts.replication_state != wanted_state:
        obstacles.append(f"replication state is {facts.replication_state or 'none'}, wanted {wanted_state}")
    limit = parse_lag(query.get("lag"))
    leader = leader_position(facts)
    if limit is not None and leader is not None and leader > (facts.replayed_lsn or 0) + limit:
        obstacles.append(f"lag {leader - (facts.replayed_lsn or 0)} bytes, limit {limit} bytes")
    return _verdict(not obstacles, "; ".join(obstacles) or "a running replica")


def has_tags(facts: HealthFacts, query: Mapping[str, str]) -> Verdict:
    """Every ?tag_key=value of the request equals the node's tag; values that are not strings compare as lower-case text."""
    for parameter, wanted in query.items():
        if parameter.startswith("tag_"):
            value = facts.tags.get(parameter[4:])
            text = value if isinstance(value, str) else str(value).lower()
            if value is None or text != wanted:
                return _verdict(False, f"tag {parameter[4:]} is {'absent' if value is None else text}, wanted {wanted}")
    return _verdict(True, "")


def _either(first: Verdict, second: Verdict) -> Verdict:
    return first if first.status == 200 else second


def _both(first: Verdict, second: Verdict) -> Verdict:
    return second if first.status == 200 else first


def _writable(facts: HealthFacts) -> Verdict:
    """Rules 1 and 3: whoever leads, here or in a standby cluster."""
    return is_standby_leader(facts) if facts.standby_cluster else is_primary(facts)


def _exact(path: str, query: Mapping[str, str], facts: HealthFacts) -> Verdict:
    """Rules 7 to 11: exact paths, answered only from a known cluster."""
    synchronous = _verdict(facts.sync_standby, "synchronous standby" if facts.sync_standby else "not a synchronous standby")
    quorum = _verdict(facts.quorum_standby, "quorum standby" if facts.quorum_standby else "not a quorum standby")
    replica = is_replica(facts, query)
    match path:
        case _ if not facts.dcs_seen:
            return _verdict(False, "the cluster has not been seen in the store")
        case "/sync" | "/synchronous":
            return _both(synchronous, replica)
        case "/quorum":
            return _both(quorum, replica)
        case "/async" | "/asynchronous":
            neither = not facts.sync_standby and not facts.quorum_standby
            return _both(_verdict(neither, "an asynchronous standby" if neither else "a synchronous or quorum standby"), replica)
        case "/read-only-quorum":
            return _either(_writable(facts), _both(quorum, replica))
        case "/read-only-sync" | "/read-only-synchronous":
            return _either(_writable(facts), _both(synchronous, replica))
        case _:
            return _verdict(False, "no health check has this path")


def answer(path: str, query: Mapping[str, str], facts: HealthFacts) -> Verdict:
    """The status of a health path. `query`: the first value of each parameter, decoded."""
    if path == "/":
        path = "/primary"
    if "standby_leader" in path or "standby-leader" in path:
        return is_standby_leader(facts)
    if "leader" in path:
        return holds_lock(facts)
    if "master" in path or "primary" in path or "read-write" in path:
        return is_primary(facts)
    if "replica" in path:
        verdict = is_replica(facts, query)
    elif "read-only" in path and "sync" not in path and "quorum" not in path:
        verdict = _either(_writable(facts), is_replica(facts, query))
    elif "health" in path:
        verdict = _verdict(facts.state == "running", f"state is {facts.state}")
    else:
        verdict = _exact(path, query, facts)
    return _both(verdict, has_tags(facts, query))


def liveness(facts: HealthFacts) -> Verdict:
    """Does the loop still decide? Paused, nobody should be restarted for it."""
    if facts.paused:
        return _verdict(True, "paused")
    return _verdict(facts.loop_alive, "the loop runs" if facts.loop_alive else "the loop has not decided for too long")


def readiness(query: Mapping[str, str], facts: HealthFacts) -> Verdict:
    """May clients be sent here, for a rolling update? The leader, or a replica that streams close enough behind it."""
    if facts.lock_held:
        return _verdict(True, "holds the lock")
    if facts.state != "running":
        return _verdict(False, f"state is {facts.state}")
    if facts.replication_state != "streaming":
        return _verdict(False, f"replication state is {facts.replication_state or 'none'}")
    if not facts.dcs_seen and facts.latest_end_lsn is None:
        return _verdict(facts.failsafe_active, "leader's position not known, failsafe " + ("active" if facts.failsafe_active else "not active"))
    limit = parse_lag(query.get("lag"))
    limit = facts.maximum_lag_bytes if limit is None else limit
    mine = facts.received_lsn if query.get("mode") == "write" else facts.replayed_lsn
    lag = max(0, (leader_position(facts) or 0) - (mine or 0))
    return _verdict(lag <= limit, f"lag {lag} bytes, limit {limit} bytes")

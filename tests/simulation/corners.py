"""Programs for what chance seldom finds: each reaches the (rule, outcome) that it is named after. `--coverage` runs them first."""

from __future__ import annotations

from typing import Any

from tests.simulation.faults import Step
from tests.simulation.simulation import Options


def _corner(seed: int, *steps: tuple[float, str, dict[str, Any], float], ttl: int = 5, nodes: int = 3, draws: int = 1) -> Options:
    return Options(seed=seed, draws=draws, nodes=nodes, ttl=ttl, faults=len(steps), for_s=200.0, program=tuple(Step(*s) for s in steps))


_LEADER = {"node": "leader"}

CORNERS: dict[tuple[str, str], Options] = {
    # An agent that is told to stop while it copies.
    ("busy.still_wanted", "refuses"): _corner(
        1, (130.0, "slow programs", {"node": "n3", "value": 40.0}, 60.0), (131.0, "data wiped", {"node": "n3", "state_too": False}, 0.0), (150.0, "stop agent", {"node": "n3"}, 10.0)),
    # Agents that die while the cluster is made.
    ("empty.bootstrap_was_ended", "refuses"): _corner(1, *((1.6, "kill agent", {"node": n, "again_s": 0.2}, 0.0) for n in ("n1", "n2", "n3"))),
    # A leader whose data was replaced by what it was two promotions ago.
    ("restart.data_is_not_behind_record", "refuses"): _corner(
        1, (130.0, "data backed up", _LEADER, 0.0), (135.0, "switchover", {"kind": "switchover", "candidate": ""}, 0.0),
        (150.0, "switchover", {"kind": "switchover", "candidate": ""}, 0.0), (200.0, "data from backup", {**_LEADER, "state_too": False}, 0.0), ttl=30, nodes=2),
    # Watchdogs are required (so is this seed's world), and none can be opened when the leader dies.
    ("promotion.watchdog_is_usable", "refuses"): _corner(
        4, *((130.0, "watchdog fails", {"node": n}, 25.0) for n in ("n1", "n2", "n3")), (132.0, "power", _LEADER, 40.0), draws=2),
    # … and none that its successor counted on, when it holds the lock and is about to promote.
    ("leading.watchdog_is_ready", "refuses"): _corner(4, (132.0, "power", _LEADER, 40.0), (136.5, "watchdog fails", {"node": "n2"}, 25.0), draws=2),
    # … and its guard is killed.
    ("leading.guard_answers", "refuses"): _corner(4, (132.0, "power", _LEADER, 40.0), (137.0, "kill guard", {"node": "n2"}, 0.0), draws=2),
    # … and its PostgreSQL stands still: it holds the lock for nothing.
    ("leading.lock_is_of_use", "refuses"): _corner(4, (132.0, "power", _LEADER, 40.0), (137.0, "freeze postgres", {"node": "n2"}, 40.0), draws=2),
    ("switchover.names_somebody_in_pause", "refuses"): _corner(
        1, (125.0, "pause", {}, 70.0), *((140.0 + 5 * i, "key written", {"key": "failover", "value": f'{{"leader":"n{i}","member":null}}'}, 0.0) for i in (1, 2, 3))),
    # The only one left has another cluster's data, and the store does not say whose the cluster is.
    ("promotion.system_is_ours", "refuses"): _corner(
        1, *((130.0, "data of another cluster", {"node": n}, 60.0) for n in ("n1", "n2")), (135.0, "power", _LEADER, 40.0), (136.0, "key deleted", {"key": "initialize"}, 0.0), nodes=2),
    # Somebody promises more in `/sync` than commits wait for.
    ("synchronous.promise_is_covered", "refuses"): _corner(
        4, (130.0, "key written", {"key": "sync", "value": '{"leader":"n3","quorum":0,"sync_standby":"n3,n2,n1"}'}, 0.0), draws=2),
    # The store goes back to when this node led; meanwhile it was being rewound, and that has failed half way.
    ("restart.is_whole", "refuses"): _corner(
        1, (130.0, "store backup", {}, 0.0), (131.0, "programs fail", _LEADER, 120.0), (132.0, "partition", {**_LEADER, "shape": "from_all", "some": [], "members": []}, 20.0),
        (165.0, "store restored", {"how": "backup", "which": 0.0, "new_id": False}, 0.0)),
    # Another cluster's data, while nothing can be written to a store that has lost `/initialize`.
    ("broken.same_system", "refuses"): _corner(
        1, (130.0, "data of another cluster", {"node": "n3"}, 60.0), (132.0, "key deleted", {"key": "initialize"}, 0.0), (132.0, "store out of space", {}, 20.0), ttl=30),
}
CORNERS["restart.timeline_is_current", "refuses"] = CORNERS["restart.data_is_not_behind_record", "refuses"]

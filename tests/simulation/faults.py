"""What goes wrong, and what operators do meanwhile: programs of (when, what, with what) that serialise.

A fault has a begin and, unless it is over at once, an end. A program is drawn from a seed by `draw`; `build/simulate
--minimise` takes steps out of it, and regressions/ keep what was left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any

from msgspec import Struct

from tests.simulation.clocks import EPOCH_S
from tests.simulation.postgres import START_LSN, Branch, DataDir, contains
from tests.simulation.store import MEMBERS


class Step(Struct, frozen=True):
    """`for_s` 0: over at once."""

    at_s: float
    fault: str
    with_: dict[str, Any] = {}
    for_s: float = 0.0


#: No more nodes than so many, however many join.
MOST_NODES = 8
Begin = Callable[[Any, dict[str, Any]], None]


class Kind(Struct, frozen=True):
    """`draw(random, names, ttl_s)` → parameters; `lasts`: (least, most) seconds. Weight 0: for programs that are written by hand.
    `since`: in random programs from this version of the draw on."""

    weight: float
    draw: Callable[[Random, list[str], float], dict[str, Any]]
    begin: Begin
    end: Begin | None = None
    lasts: tuple[float, float] = (0.0, 0.0)
    since: int = 1


def _who(random: Random, names: list[str]) -> str:
    """A node, or whoever leads at that moment: the interesting one."""
    return "leader" if random.random() < 0.55 else names[int(random.random() * len(names))]


def _node(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    return {"node": _who(random, names)}


def _none(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    return {}


def _member(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    return {"member": MEMBERS[int(random.random() * 3)]}


def _partition(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    shape = random.choice(("from_all", "from_store", "from_peers", "to_store", "from_store_one_way", "from_clients", "split"))
    some = [n for n in names if random.random() < 0.5]
    return {"node": _who(random, names), "shape": shape, "some": some, "members": [m for m in MEMBERS if random.random() < 0.5]}


def _sides(sim: Any, with_: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    node = [with_["at"]]
    peers = [n for n in sim.names if n != with_["at"]]
    everybody = [*sim.names, *MEMBERS, "client"]
    match with_["shape"]:
        case "from_all":
            rest = [n for n in everybody if n != with_["at"]]
            return [(node, rest), (rest, node)]
        case "from_store":
            return [(node, list(MEMBERS)), (list(MEMBERS), node)]
        case "to_store":
            return [(node, list(MEMBERS))]
        case "from_store_one_way":
            return [(list(MEMBERS), node)]
        case "from_peers":
            return [(node, peers), (peers, node)]
        case "from_clients":
            return [(node, ["client"]), (["client"], node)]
        case _:
            left = [*with_["some"], *with_["members"]]
            right = [n for n in everybody if n not in left]
            return [(left, right), (right, left)]


def _cut(sim: Any, with_: dict[str, Any]) -> None:
    with_["sides"] = _sides(sim, with_)
    for sources, targets in with_["sides"]:
        sim.network.cut(sources, targets)


def _mend(sim: Any, with_: dict[str, Any]) -> None:
    for sources, targets in with_["sides"]:
        sim.network.mend(sources, targets)


def _process(what: str, which: str) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        host = sim.hosts[with_["at"]]
        for name in which.split("+"):
            owner = host.agent if name == "agent" else host.guard
            if owner is None or not owner.process.alive:
                continue
            if what == "freeze":
                owner.process.freeze()
            elif what == "thaw" and not host.suspended:
                owner.process.thaw()
        host.note_bare()
    return do


def _kill_agent(sim: Any, with_: dict[str, Any]) -> None:
    sim.hosts[with_["at"]].kill_agent(restart_after_s=with_["again_s"])


def _kill_both(sim: Any, with_: dict[str, Any]) -> None:
    host = sim.hosts[with_["at"]]
    host.kill_agent(restart_after_s=with_["again_s"])
    host.kill_guard()
    host.note_bare()


def _instance(method: str, **arguments: Any) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        getattr(sim.instances[with_["at"]], method)(**arguments)
    return do


def _attribute(name: str, value: Any, of: str = "instance") -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        target = sim.instances[with_["at"]] if of == "instance" else sim.store
        setattr(target, name, with_.get("value", value) if value is None else value)
    return do


def _hang_sql(on: bool) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        server = sim.instances[with_["at"]].server
        if on and server is not None:
            server.hung = True
            with_["server"] = server
        elif not on and with_.get("server") is not None:
            with_["server"].hung = False
    return do


def _restore(sim: Any, with_: dict[str, Any]) -> None:
    saved = None if with_["how"] == "empty" or not sim.store.backups else sim.store.backups[int(with_["which"] * len(sim.store.backups))]
    if saved is None and sim.store.backups and with_["how"] != "empty":
        saved = sim.store.backups[-1]
    sim.store_replaced()
    sim.store.restore(saved, new_id=with_["new_id"])


def _switchover(sim: Any, with_: dict[str, Any]) -> None:
    leader = sim.leader()
    if leader is None:
        return
    value: dict[str, Any] = {}
    if with_["kind"] == "switchover":
        value["leader"] = leader
    if with_["candidate"]:
        value["member"] = with_["candidate"]
    if value and value.get("member") != leader:
        sim.operator_asks_failover(json.dumps(value).encode(), manual=with_["kind"] == "failover")


def _configure(sim: Any, with_: dict[str, Any]) -> None:
    sim.change_config(with_["change"])


def _draw_config(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    ttl, loop_wait, retry = random.choice(((30, 10, 10), (20, 5, 5), (5, 1, 2), (3, 1, 1), (10, 2, 4)))
    change: dict[str, Any] = random.choice((
        {"ttl": ttl, "loop_wait": loop_wait, "retry_timeout": retry}, {"ttl": ttl, "loop_wait": loop_wait, "retry_timeout": retry},
        {"maximum_lag_on_failover": random.choice((0, 1048576, 10485760))}, {"check_timeline": random.random() < 0.5}, {"primary_stop_timeout": random.choice((0, 1, 10))},
        {"maximum_lag_on_syncnode": random.choice((-1, 0, 100000))},
        {"primary_start_timeout": random.choice((0, 3, 30, 300))},
        {"synchronous_mode": random.choice((True, "quorum", False))}, {"synchronous_mode": random.choice((True, "quorum", False))},
        {"failsafe_mode": random.random() < 0.5}, {"synchronous_mode_strict": random.random() < 0.5}, {"synchronous_node_count": random.choice((1, 2, 3))}))
    return {"change": change}


def _ask(kind: str) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        agent = sim.hosts[with_["at"]].agent
        if agent is not None and agent.process.alive:
            agent.request(kind)
    return do


def _reinitialize(sim: Any, with_: dict[str, Any]) -> None:
    agent = sim.hosts[with_["at"]].agent
    if agent is not None and agent.process.alive:
        agent.request("reinitialize", force=with_["force"], from_leader=with_["from_leader"])


def soon(sim: Any, in_s: float) -> str:
    return datetime.fromtimestamp(EPOCH_S + sim.scheduler.now_s + in_s, UTC).isoformat()


def _schedule_switchover(sim: Any, with_: dict[str, Any]) -> None:
    """As patronictl writes it, or somebody by hand."""
    value = {"leader": sim.leader(), "member": with_["candidate"], "scheduled_at": soon(sim, with_["in_s"]) if with_["in_s"] is not None else with_["text"]}
    sim.operator_asks_failover(json.dumps({k: v for k, v in value.items() if v}).encode(), manual=False)


def _flush_switchover(sim: Any, with_: dict[str, Any]) -> None:
    if with_["flushed"] and sim.view().failover.scheduled_at:
        sim.operator_asks_failover(b"{}", manual=False)


def _schedule_restart(sim: Any, with_: dict[str, Any]) -> None:
    agent = sim.hosts[with_["at"]].agent
    if agent is not None and agent.process.alive:
        agent.request("restart", schedule=soon(sim, with_["in_s"]), **with_["on"])


def _flush_restart(sim: Any, with_: dict[str, Any]) -> None:
    agent = sim.hosts[with_["at"]].agent
    if with_["flushed"] and agent is not None and agent.process.alive:
        agent.request("cancel_restart")


def _cancel_waits(sim: Any, with_: dict[str, Any]) -> None:
    """Clients, or their timeouts, cancel the wait for a synchronous standby: a WARNING, which is no acknowledgement."""
    server = sim.instances[with_["at"]].server
    if server is not None:
        waiting, server.waiting = server.waiting, []
        for _, answered in waiting:
            answered("warned")


def _holder_dies_in_pause(sim: Any, with_: dict[str, Any]) -> None:
    """Its host goes down, and an operator who has looked says so, and who is to follow."""
    sim.change_config({"pause": True})

    def dies() -> None:
        record = sim.lock_record()
        name = record.holder if record is not None and record.mode == "paused" else ""
        if name in sim.names and sim.hosts[name].up:
            with_["holder"] = name
            sim.hosts[name].power_off()
            sim.scheduler.after(with_["said_after_s"], said)

    def said() -> None:
        record, host = sim.lock_record(), sim.hosts[with_["holder"]]
        if record is None or record.mode != "paused" or record.node_id != host.node_id or host.up or with_["candidate"] in ("", host.name):
            return
        down = {"holder": record.holder, "incarnation": record.incarnation, "sequence": record.sequence}
        sim.operator_asks_failover(json.dumps({"member": with_["candidate"], "pgha": {"holder_is_down": down}}).encode(), manual=True)

    sim.scheduler.after(12.0, dies)


def _holder_comes_back(sim: Any, with_: dict[str, Any]) -> None:
    if with_.get("holder"):
        sim.hosts[with_["holder"]].power_on()
    sim.change_config({"pause": False})


def _stop_agent(sim: Any, with_: dict[str, Any]) -> None:
    host = sim.hosts[with_["at"]]
    host.wanted = False
    if host.agent is not None and host.agent.process.alive:
        host.agent.stop()


def _start_agent(sim: Any, with_: dict[str, Any]) -> None:
    host = sim.hosts[with_["at"]]
    host.wanted = True
    host.start_agent()


def _all_hosts(method: str) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        for host in sim.hosts.values():
            getattr(host, method)()
    return do


def _store(method: str, *arguments: Any) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        getattr(sim.store, method)(*(with_[a[1:]] if isinstance(a, str) and a.startswith("$") else a for a in arguments))
    return do


def _all_down(down: bool) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        for member in MEMBERS:
            sim.store.set_down(member, down)
    return do


def _delete_key(sim: Any, with_: dict[str, Any]) -> None:
    sim.store_tampered()
    sim.store.delete(sim.path(with_["key"]))


def _write_key(sim: Any, with_: dict[str, Any]) -> None:
    sim.store_tampered()
    sim.store.put(sim.path(with_["key"]), with_["value"].encode())


def _no_space(on: bool) -> Begin:
    def do(sim: Any, with_: dict[str, Any]) -> None:
        sim.store.world.quota_bytes = 1 if on else 0
    return do


def _again(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    return {"node": _who(random, names), "again_s": random.choice((0.2, 1.0, 3.0, 10.0, 60.0))}


def _by_hand(sim: Any, with_: dict[str, Any]) -> None:
    """The distribution's service, or a person, starts PostgreSQL behind the agent's back."""
    instance = sim.instances[with_["at"]]
    if not instance.lives and sim.hosts[with_["at"]].up:
        instance.start()


def _may_be_spared(sim: Any, host: Any) -> bool:
    """May this node's data go? Not the only copy; nor what was promised to be kept, by whom nobody can do without."""
    others = [i.dir for n, i in sim.instances.items() if n != host.name and i.dir.content == "valid" and i.dir.branch is not None
              and not sim.hosts[n].tags.get("nofailover") and not sim.hosts[n].gone]      # who may not lead cannot bring the cluster back
    mine = host.instance.dir
    if sim.store_config().get("synchronous_mode"):
        return False    # who was promised to hold a commit must not lose it by hand: then nobody may lead, until somebody says so
    if mine.branch is None or not any(contains(d.branch, d.lsn, mine.branch, mine.lsn) for d in others if d.branch is not None):
        return False
    view = sim.view()
    # By /sync nobody else may lead: without its data people have to say what is to be lost.
    return not (view.sync.leader == host.name and not view.sync.members)


def _replace_data(how: str) -> Begin:
    """Somebody replaces the data of a stopped node: by nothing, by what it held some time ago, by another cluster's. Never the only copy."""
    def do(sim: Any, with_: dict[str, Any]) -> None:
        host = sim.hosts[with_["at"]]
        instance = host.instance
        if how == "note":
            if instance.dir.content == "valid" and not instance.dir.rewind_marker:
                host.saved_data = instance.dir.copy()
                host.saved_data.state = "in production" if instance.accepting else "in archive recovery"
                host.saved_data.min_recovery_lsn, host.saved_data.min_recovery_timeline = instance.dir.lsn, instance.dir.timeline
            return
        saved = getattr(host, "saved_data", None)
        if not _may_be_spared(sim, host) or (how == "backup" and saved is None):
            return
        record = sim.lock_record()
        if with_.get("state_too") and record is not None and record.mode == "paused" and record.node_id == host.node_id:
            return      # it does not expire, and whose it is comes back as nobody who may end it: then people have to say that the holder is down
        host.power_off()
        instance.dir = with_["foreign"] = _another_clusters() if how == "foreign" else DataDir() if how == "wiped" else saved.copy()
        if with_.get("state_too"):
            host.remembered, host.cached_config = None, None
            host.node_id = f"{host.node_id}+"
        host.reset()
        sim.scheduler.after(6.0, host.power_on)
    return do


def _another_clusters() -> DataDir:
    branch = Branch(1, None, START_LSN)
    branch.end = START_LSN + 5000
    return DataDir(content="valid", system_identifier="7400000000000000001", branch=branch, lsn=branch.end, control_timeline=1, checkpoint_lsn=START_LSN,
                   standby_signal=True, state="shut down in recovery")


def _foreign_goes(sim: Any, with_: dict[str, Any]) -> None:
    """Somebody reads the log, and moves it away."""
    host = sim.hosts[with_["at"]]
    if host.gone or with_.get("foreign") is None or host.instance.dir.system_identifier != with_["foreign"].system_identifier:
        return
    host.power_off()
    host.instance.dir = DataDir()
    host.reset()
    sim.scheduler.after(6.0, host.power_on)


def _edit_tags(sim: Any, with_: dict[str, Any]) -> None:
    """The local configuration is edited, and the agent started again."""
    host = sim.hosts[with_["at"]]
    if host.gone:
        return
    with_["before"] = dict(host.tags)
    host.tags = {**host.tags, **with_["tags"]}
    sim.equip(host)
    host.kill_agent(restart_after_s=0.5)


def _tags_back(sim: Any, with_: dict[str, Any]) -> None:
    host = sim.hosts[with_["at"]]
    if host.gone:
        return
    host.tags = {k: v for k, v in host.tags.items() if k not in with_["tags"]} | {k: v for k, v in with_["before"].items() if k in with_["tags"]}
    sim.equip(host)
    host.kill_agent(restart_after_s=0.5)


def _join(sim: Any, with_: dict[str, Any]) -> None:
    if len(sim.names) < MOST_NODES:
        sim.join(f"n{len(sim.hosts) + 1}")


def _leave(sim: Any, with_: dict[str, Any]) -> None:
    """Its agent is stopped in good order; half a minute later it is gone for good, unless it is needed."""
    host = sim.hosts[with_["at"]]
    if len(sim.names) < 3 or not host.up:
        return
    host.wanted = False
    if host.agent is not None and host.agent.process.alive:
        host.agent.stop()


def _left(sim: Any, with_: dict[str, Any]) -> None:
    host = sim.hosts[with_["at"]]
    if host.gone or host.wanted:
        return
    listed = set(sim.view().failsafe) - {host.name}
    led = sim.lock_record()
    if host.instance.lives or len(sim.names) < 3 or not _may_be_spared(sim, host) or (sim.view().failsafe and not listed) or (led is not None and led.node_id == host.node_id):
        host.wanted = True
        host.start_agent()
        return
    sim.leave(host)


def _data(random: Random, names: list[str], ttl_s: float) -> dict[str, Any]:
    return {"node": _who(random, names), "state_too": random.random() < 0.3}


KINDS: dict[str, Kind] = {
    "partition": Kind(10, _partition, _cut, _mend, (1.0, 90.0)),
    "freeze agent": Kind(4, _node, _process("freeze", "agent"), _process("thaw", "agent"), (1.0, 70.0)),
    "freeze guard": Kind(3, _node, _process("freeze", "guard"), _process("thaw", "guard"), (1.0, 70.0)),
    "kill agent": Kind(5, _again, _kill_agent),
    "kill guard": Kind(3, _node, lambda sim, w: sim.hosts[w["at"]].kill_guard()),
    "kill agent and guard": Kind(1, _again, _kill_both),
    "freeze agent and guard": Kind(0.7, _node, _process("freeze", "agent+guard"), _process("thaw", "agent+guard"), (1.0, 60.0)),
    "stop agent": Kind(2, _node, _stop_agent, _start_agent, (5.0, 60.0)),
    "kill postmaster": Kind(4, _node, _instance("kill_postmaster")),
    "kill postgres": Kind(4, _node, lambda sim, w: sim.instances[w["at"]].kill_all() and None),
    "crash": Kind(4, _node, _instance("crash")),
    "freeze postmaster": Kind(2, _node, _instance("freeze", everything=False), _instance("thaw"), (1.0, 60.0)),
    "freeze postgres": Kind(3, _node, _instance("freeze", everything=True), _instance("thaw"), (1.0, 60.0)),
    "hang sql": Kind(2, _node, _hang_sql(True), _hang_sql(False), (1.0, 60.0)),
    "waits cancelled": Kind(1, _node, _cancel_waits),
    "start by hand": Kind(1, _node, _by_hand),
    "power": Kind(4, _node, lambda sim, w: sim.hosts[w["at"]].power_off(), lambda sim, w: sim.hosts[w["at"]].power_on(), (3.0, 120.0)),
    "power everywhere": Kind(0.6, _none, _all_hosts("power_off"), _all_hosts("power_on"), (3.0, 60.0)),
    "suspend host": Kind(1, _node, lambda sim, w: sim.hosts[w["at"]].suspend(clocks=True), lambda sim, w: sim.hosts[w["at"]].resume(), (1.0, 60.0)),
    "pause guest": Kind(1, _node, lambda sim, w: sim.hosts[w["at"]].suspend(clocks=False), lambda sim, w: sim.hosts[w["at"]].resume(), (1.0, 60.0)),
    "wall clock jumps": Kind(1.5, lambda r, n, t: {"node": _who(r, n), "by_s": r.choice((-3600.0, -5.0, 2.0, 60.0, 86400.0))},
                             lambda sim, w: sim.hosts[w["at"]].clock.jump_wall(w["by_s"])),
    "slow start": Kind(2, lambda r, n, t: {"node": _who(r, n), "value": r.choice((1.0, 5.0, 20.0))}, _attribute("slow_start_s", None),
                       _attribute("slow_start_s", 0.0), (20.0, 120.0)),
    "slow stop": Kind(2, lambda r, n, t: {"node": _who(r, n), "value": r.choice((1.0, 5.0, 20.0))}, _attribute("slow_stop_s", None),
                      _attribute("slow_stop_s", 0.0), (20.0, 120.0)),
    "slow programs": Kind(1.5, lambda r, n, t: {"node": _who(r, n), "value": r.choice((10.0, 40.0))}, _attribute("work_s", None), _attribute("work_s", 0.0),
                          (20.0, 120.0)),
    "programs fail": Kind(1.5, _node, _attribute("fail_programs", True), _attribute("fail_programs", False), (20.0, 120.0)),
    "disk full": Kind(1.5, _node, _attribute("disk_full", True), _attribute("disk_full", False), (5.0, 90.0)),
    "disk hangs": Kind(1.5, _node, _attribute("disk_hung", True), _attribute("disk_hung", False), (2.0, 60.0)),
    "no room for a copy": Kind(0.7, _node, _attribute("no_room", True), _attribute("no_room", False), (30.0, 200.0)),
    "lag": Kind(2, lambda r, n, t: {"node": n[int(r.random() * len(n))], "by_s": r.choice((0.05, 0.3, 2.0))},
                lambda sim, w: sim.network.slow_down(w["at"], w["by_s"]), lambda sim, w: sim.network.slow_down(w["at"], 0.0), (5.0, 60.0)),
    "loss": Kind(2, lambda r, n, t: {"node": n[int(r.random() * len(n))], "share": r.choice((0.05, 0.3))},
                 lambda sim, w: sim.network.lose(w["at"], w["share"]), lambda sim, w: sim.network.lose(w["at"], 0.0), (5.0, 60.0)),
    "data wiped": Kind(1.5, _data, _replace_data("wiped")),
    "data backed up": Kind(1, _data, _replace_data("note")),
    "data from backup": Kind(1.5, _data, _replace_data("backup")),
    "data of another cluster": Kind(0.7, _node, _replace_data("foreign"), _foreign_goes, (10.0, 90.0)),
    "watchdog fails": Kind(0.7, _node, lambda sim, w: setattr(sim.hosts[w["at"]].device, "broken", True),
                           lambda sim, w: setattr(sim.hosts[w["at"]].device, "broken", False), (5.0, 120.0)),
    # the store
    "store election": Kind(3, lambda r, n, t: {"seconds": 1.0 + 2.0 * r.random()}, _store("elect", "$seconds")),
    "store member down": Kind(2, _member, _store("set_down", "$member", True), _store("set_down", "$member", False), (1.0, 60.0)),
    "store member hangs": Kind(2, _member, _store("set_hung", "$member", True), _store("set_hung", "$member", False), (7.0, 30.0)),
    "store down": Kind(1.5, _none, _all_down(True), _all_down(False), (2.0, 90.0)),
    "answers lost": Kind(2, lambda r, n, t: {"value": r.choice((0.2, 0.6, 1.0))}, _attribute("lose_answers", None, "store"),
                         _attribute("lose_answers", 0.0, "store"), (2.0, 30.0)),
    "requests lost": Kind(1, lambda r, n, t: {"value": r.choice((0.2, 0.6))}, _attribute("lose_requests", None, "store"),
                          _attribute("lose_requests", 0.0, "store"), (2.0, 30.0)),
    "slow answers": Kind(2, lambda r, n, t: {"value": r.choice((0.3, 1.0, 7.0))}, _attribute("slow_s", None, "store"), _attribute("slow_s", 0.0, "store"), (2.0, 30.0)),
    "silent watch": Kind(2, _node, lambda sim, w: sim.store.silence_watches(w["at"], silent=True),
                         lambda sim, w: sim.store.silence_watches(w["at"], silent=False), (5.0, 60.0)),
    "lease lost": Kind(1.5, lambda r, n, t: {"index": r.random()}, _store("lose_lease", "$index")),
    "key deleted": Kind(1.5, lambda r, n, t: {"key": r.choice(("pgha/lock", "pgha/lock", "leader", "status", "history", "config", "initialize", "pgha/epoch"))}, _delete_key),
    "key written": Kind(0, _none, _write_key),
    "store out of space": Kind(1, _none, _no_space(True), _no_space(False), (2.0, 60.0)),
    "store compacts": Kind(0.5, _none, lambda sim, w: sim.store.world.compact(sim.store.world.revision)),
    "store backup": Kind(1, _none, _store("backup")),
    "store restored": Kind(0.8, lambda r, n, t: {"how": r.choice(("backup", "backup", "empty")), "which": r.random(), "new_id": r.random() < 0.5}, _restore),
    # operators
    "switchover": Kind(6, lambda r, n, t: {"kind": r.choice(("switchover", "switchover", "failover")), "candidate": r.choice((*n, "")) }, _switchover),
    "restart": Kind(2, _node, _ask("restart")),
    "reload": Kind(0.7, _node, _ask("reload")),
    "reinitialize": Kind(3, lambda r, n, t: {"node": _who(r, n) if r.random() < 0.2 else n[int(r.random() * len(n))], "force": r.random() < 0.3, "from_leader": r.random() < 0.5},
                         _reinitialize, since=3),
    "switchover scheduled": Kind(3, lambda r, n, t: {"candidate": r.choice((*n, "")), "in_s": r.choice((1.0, 5.0, 30.0, -5.0, -60.0, None)), "text": r.choice(("soon", "2025-06-15T15:06:40", 5)),
                                                     "flushed": r.random() < 0.3}, _schedule_switchover, _flush_switchover, (0.5, 40.0), since=3),
    "restart scheduled": Kind(2, lambda r, n, t: {"node": _who(r, n), "in_s": r.choice((1.0, 5.0, 30.0)), "on": r.choice(({}, {}, {"role": "primary"}, {"role": "replica"}, {"restart_pending": True}, {"postgres_version": r.choice(("14", "16"))})), "flushed": r.random() < 0.3},
                              _schedule_restart, _flush_restart, (0.5, 40.0), since=3),
    "tags": Kind(1.5, lambda r, n, t: {"node": _who(r, n), "tags": r.choice(({"nofailover": True}, {"nosync": True}, {"failover_priority": 3}, {"clonefrom": True},
                                                                           {"replicatefrom": n[int(r.random() * len(n))]}, {"noloadbalance": True}))},
                 _edit_tags, _tags_back, (10.0, 150.0)),
    "node joins": Kind(1.5, _none, _join),
    "node leaves": Kind(1.5, _node, _leave, _left, (25.0, 40.0)),
    "configuration": Kind(3, _draw_config, _configure),
    "holder dies in pause": Kind(0.8, lambda r, n, t: {"candidate": n[int(r.random() * len(n))], "said_after_s": r.choice((2.0, 15.0, 40.0))}, _holder_dies_in_pause,
                                 _holder_comes_back, (60.0, 150.0)),
    "pause": Kind(2, _none, lambda sim, w: sim.change_config({"pause": True}), lambda sim, w: sim.change_config({"pause": False}), (5.0, 120.0)),
}


def draw_early(seed: int, names: list[str]) -> list[Step]:
    """A birth that is disturbed, now and then."""
    random = Random(f"{seed}/early")
    if random.random() > 0.15:
        return []
    steps = []
    for _ in range(random.choice((1, 2, 3))):
        name = random.choice(("kill agent", "kill agent", "power", "store election", "kill guard", "programs fail"))
        with_ = {"node": names[int(random.random() * len(names))]} if name != "store election" else {"seconds": 1.0 + random.random()}
        if name == "kill agent":
            with_["again_s"] = random.choice((0.2, 3.0))
        lasts = round(3.0 + 12.0 * random.random(), 2) if KINDS[name].end is not None else 0.0
        steps.append(Step(round(0.3 + 7.0 * random.random() ** 2, 3), name, with_, lasts))
    return sorted(steps, key=lambda s: s.at_s)


def draw(seed: int, names: list[str], *, ttl_s: float, from_s: float, for_s: float, faults: int, draws: int = 2) -> list[Step]:
    """A program of so many faults, at random times, some of them close together.

    Most programs have a few kinds only: what comes of three kinds that meet again and again is found sooner than among all.
    """
    random = Random(f"{seed}/program")
    kinds = [name for name, kind in KINDS.items() if kind.weight and kind.since <= draws]
    if random.random() < 0.7:
        kinds = sorted(random.sample(kinds, random.choice((3, 5, 8, 12))))
    weights = [KINDS[k].weight for k in kinds]
    steps = []
    at_s = from_s
    gap_s = for_s / max(1, faults)
    for _ in range(faults):
        name = random.choices(kinds, weights)[0]
        kind = KINDS[name]
        least, most = kind.lasts
        lasts = 0.0 if kind.end is None else round(least + (most - least) * random.random() ** 2, 2)
        steps.append(Step(round(at_s, 3), name, kind.draw(random, names, ttl_s), lasts))
        # Half of them in quick succession, so that they overlap.
        at_s += gap_s * (0.1 * random.random() if random.random() < 0.4 else 0.6 + 2.0 * random.random())
    return steps

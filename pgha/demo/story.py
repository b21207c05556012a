"""What the demo shows, step by step, and times: a cluster comes up, its primary dies, another takes over, it comes back."""

from __future__ import annotations

import shlex
import signal
import time
from typing import NamedTuple

from pgha.demo.bed import Bed
from pgha.demo.node import Node
from pgha.demo.programs import Program
from pgha.demo.screen import Screen, table
from pgha.demo.watchers import TABLE, LockWatcher, MembersWatcher, Writer

_BOOTSTRAP_S = 120
_ROWS_S = 30
_FAILOVER_S = 30      # beside the lock's ttl
_REJOIN_S = 90
_ROWS = 200


class Phase(NamedTuple):
    """One line of the closing table; `since` says what the seconds are counted from."""

    name: str
    seconds: float
    since: str


def tell(bed: Bed, screen: Screen) -> None:
    """The whole story. BedTimeout if something does not happen; then nothing of it is claimed."""
    began_s = time.monotonic()
    phases: list[Phase] = []
    screen.say(f"Starting etcd and {len(bed.nodes)} nodes on {bed.network}.*, files in {bed.directory}")
    writer = Writer(bed)
    with MembersWatcher(bed) as members, LockWatcher(bed) as lock:
        screen.show(members, writer)
        bed.start()
        old = bed.wait_healthy(_BOOTSTRAP_S)
        phases.append(Phase("cluster up, all standbys streaming", time.monotonic() - began_s, "the start"))
        screen.say(f"  {phases[-1].seconds:6.2f} s  one primary, {old.name}; the others stream from it")
        with old.connect() as connection:
            connection.execute(TABLE)
        with writer:
            final = _through_the_failover(bed, screen, phases, old=old, lock=lock, writer=writer)
        _conclude(bed, screen, phases, final, writer)


def _through_the_failover(bed: Bed, screen: Screen, phases: list[Phase], *, old: Node, lock: LockWatcher, writer: Writer) -> Node:
    """Kill the primary under the writer, and bring its node back. The primary at the end."""
    bed.wait(lambda: len(writer.written) >= _ROWS, _ROWS_S, f"{_ROWS} rows written")

    screen.say(f"\nkill -9 for the agent of {old.name} and for its PostgreSQL, while rows are written:")
    killed_s = time.monotonic()
    old.signal_agent(signal.SIGKILL)
    old.signal_postgres(signal.SIGKILL)
    old.kill_agent()
    new = _fail_over(bed, screen, phases, old=old, killed_s=killed_s, lock=lock, writer=writer)

    screen.say(f"\nThe agent of {old.name} is started again; it has to find its place as a standby of {new.name}:")
    returned_s = time.monotonic()
    old.start_agent()
    final = bed.wait_healthy(_REJOIN_S)
    phases.append(Phase("all standbys streaming again", time.monotonic() - returned_s, "its agent's start"))
    screen.say(f"  {phases[-1].seconds:6.2f} s  {final.name} is the primary, all others stream from it")
    return final


def _fail_over(bed: Bed, screen: Screen, phases: list[Phase], *, old: Node, killed_s: float, lock: LockWatcher, writer: Writer) -> Node:
    limit_s = bed.profile.ttl + _FAILOVER_S
    moments: list[tuple[float, str]] = []
    taken = bed.wait(lambda: lock.taken_after(killed_s, other_than=old.name), limit_s, "another node takes the lock")
    screen.say(f"  {taken.at_s - killed_s:6.2f} s  {taken.holder} has taken the lock")
    renewed = lock.last_renewal_of(old.name)
    if renewed is not None:
        moments.append((renewed.at_s + renewed.ttl_s, f"the lock of {old.name} has run out, {renewed.ttl_s:g} s after its last renewal"))
    moments.append((taken.at_s, f"{taken.holder} has taken the lock"))
    new = bed.wait_leader(other_than=old, timeout_s=limit_s)
    moments.append((time.monotonic(), f"{new.name} says that it is the primary"))
    first = bed.wait(lambda: writer.first_on_another(old.name, killed_s), limit_s, "a row written to the new primary")
    moments.append((first.at_s, f"first row acknowledged by {first.node}"))
    screen.say(f"  {first.at_s - killed_s:6.2f} s  first row acknowledged by {first.node}")
    phases.extend(Phase(name, at_s - killed_s, "the kill") for at_s, name in sorted(moments))
    return new


def _conclude(bed: Bed, screen: Screen, phases: list[Phase], final: Node, writer: Writer) -> None:
    with final.connect() as connection:
        present = {row[0] for row in connection.execute("SELECT id FROM demo_rows").fetchall()}
    acknowledged = {w.id for w in list(writer.written)}
    lost = len(acknowledged - present)
    screen.say()
    screen.final_table()
    screen.say()
    for line in table(("Phase", "Seconds", "counted from"), [(p.name, f"{p.seconds:.2f}", p.since) for p in phases]):
        screen.say(line)
    screen.say(f"\n{len(acknowledged)} rows acknowledged, {lost} of them lost. Replication is asynchronous here: what the primary acknowledged "
               f"in its\nlast moment and no standby had received is lost with it: at most maximum_lag_on_failover (1 MiB) and what was "
               f"written since\nits position was last published.")
    assert bed.healthy() is not None, "all streamed a moment ago"


def farewell(bed: Bed, program: Program) -> list[str]:
    """How to use and how to end a cluster that is left running."""
    passwords = bed.directory / "pgpass"
    passwords.touch(mode=0o600)
    passwords.write_text("".join(f"{n.address}:{n.port}:*:postgres:{bed.settings.password}\n" for n in bed.nodes), encoding="utf-8")
    haproxy = bed.directory / "haproxy.cfg"
    haproxy.write_text(_haproxy(bed), encoding="utf-8")
    environment = "".join(f"{k}={shlex.quote(v)} " for k, v in program.environment.items())
    pgha = environment + shlex.join(program.argv)
    hosts = ",".join(n.address for n in bed.nodes)
    return [
        "The cluster goes on running. As the user that runs it:", "",
        f'  PGPASSFILE={passwords} psql "host={hosts} port={bed.nodes[0].port} user=postgres dbname=postgres target_session_attrs=read-write"',
        *(f'  PGPASSFILE={passwords} psql "{n.dsn()}"    # {n.name}' for n in bed.nodes), "",
        f"  {pgha} ctl -c {bed.nodes[0].config_path} list",
        f"  {pgha} ctl -c {bed.nodes[0].config_path} switchover",
        f"  {pgha} ctl -c {bed.nodes[0].config_path} explain n1", "",
        f"  haproxy -f {haproxy}    # writes on {bed.network}.31:5000, reads on {bed.network}.31:5001:", "",
        *(f"    {line}" for line in haproxy.read_text(encoding="utf-8").splitlines()), "",
        "To end it and remove its files:", "",
        f"  {pgha} demo --stop {bed.directory}",
    ]


def _haproxy(bed: Bed) -> str:
    def part(name: str, port: int, check: str) -> list[str]:
        return [
            f"listen {name}", f"    bind {bed.network}.31:{port}", f"    option httpchk GET {check}", "    http-check expect status 200",
            "    default-server inter 1s fall 2 rise 1 on-marked-down shutdown-sessions",
            *(f"    server {n.name} {n.address}:{n.port} check port {n.rest_port}" for n in bed.nodes), "",
        ]

    return "\n".join([
        "defaults", "    mode tcp", "    timeout connect 2s", "    timeout client 30m", "    timeout server 30m", "    timeout check 2s", "",
        *part("writes", 5000, "/primary"), *part("reads", 5001, "/replica"),
    ])

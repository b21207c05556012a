"""What can go wrong: each fault is a context, from its beginning until it has healed.

A fault is planned with a role (`primary` or `replica`), and finds out only when it begins who plays it. The text
that the context gives says what was really done.

Rules of this file: what a fault began it ends, also when something raised; what only a healthy cluster lets be undone is
left to `bed.after_healing`. A killed agent is started again at the end of its fault, as if its unit had RestartSec of
that long.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg
from chaos_bed import ChaosBed, Host
from chaos_network import Cut

from pgha.demo.etcd import EtcdMember
from pgha.demo.processes import Process, signal_all

_COMMAND_S = 30
_CALL_S = 3.0


class Fault(NamedTuple):
    """`touches`: what it takes away, and no other fault may take at the same time. Of agent and guard only one may be taken
    away at a time (more is not promised to be survived), except by the faults that say that they take both.

    `primary_only`: it makes sense nowhere else. `exposes`: nothing but a device protects, what happens is measured.
    `longest_ttl`: how long at most it lasts, as a multiple of ttl. `weight`: how often it is chosen.
    """

    kind: str
    make: Callable[[ChaosBed, Host, random.Random], contextlib.AbstractContextManager[str]]
    touches: frozenset[str] = frozenset()
    longest_ttl: float = 3.0
    weight: int = 2
    exposes: bool = False
    primary_only: bool = False


FAULTS: dict[str, Fault] = {}
AGENT, GUARD, DISK, ETCD = frozenset({"agent"}), frozenset({"guard"}), frozenset({"disk"}), frozenset({"etcd"})


def together(one: Fault, other: Fault) -> bool:
    """May both happen at a time? (Who waits for a hanging disk does not die of SIGKILL either: no kill beside that.)"""
    either = AGENT | GUARD
    return one is not other and not one.touches & other.touches and not (one.touches & either and other.touches & either)


def fault(kind: str, *, touches: frozenset[str] = frozenset(), longest_ttl: float = 3.0, weight: int = 2,
          exposes: bool = False, primary_only: bool = False) -> Callable[[Callable[[ChaosBed, Host, random.Random], Iterator[str]]], None]:
    def register(make: Callable[[ChaosBed, Host, random.Random], Iterator[str]]) -> None:
        FAULTS[kind] = Fault(kind, contextlib.contextmanager(make), touches, longest_ttl, weight, exposes, primary_only)

    return register


# -- the network


def _others(bed: ChaosBed, host: Host) -> tuple[str, ...]:
    return tuple(node.address for node in bed.nodes if node is not host)


def _store(bed: ChaosBed) -> tuple[str, ...]:
    return tuple(member.address for member in bed.etcd.members)


@fault("cut off from everything", weight=4)
def _(bed, host, chance):
    with bed.net.cut(Cut(host.name)):
        yield host.name


@fault("cut off from etcd")
def _(bed, host, chance):
    with bed.net.cut(Cut(host.name, _store(bed))):
        yield host.name


@fault("cut off from its peers")
def _(bed, host, chance):
    with bed.net.cut(Cut(host.name, _others(bed, host))):
        yield host.name


@fault("cut off one way")
def _(bed, host, chance):
    direction = chance.choice(("out", "in"))
    whom = chance.choice(((), _store(bed), _others(bed, host)))
    with bed.net.cut(Cut(host.name, whom, direction)):
        yield f"{host.name}, what goes {direction}, {'all' if not whom else 'etcd' if whom == _store(bed) else 'peers'}"


@fault("packets lost")
def _(bed, host, chance):
    percent = chance.choice((10, 30, 60))
    with bed.net.cut(Cut(host.name, percent=percent)):
        yield f"{host.name}, {percent} % each way"


@fault("etcd's members cut apart")
def _(bed, host, chance):
    alone = chance.sample(bed.etcd.members, chance.choice((1, 2)))  # 2: all three apart, no quorum
    cuts = [Cut(member.name, tuple(other.address for other in bed.etcd.members if other is not member)) for member in alone]
    with bed.net.cut(*cuts):
        yield ", ".join(member.name for member in alone)


@fault("one etcd member and the primary on one side", primary_only=True)
def _(bed, host, chance):
    member = chance.choice(bed.etcd.members)
    far = (*_others(bed, host), *(other.address for other in bed.etcd.members if other is not member))
    with bed.net.cut(Cut(host.name, far), Cut(member.name, far)):
        yield f"{host.name} and {member.name}"


# -- etcd


def _etcd_leader(bed: ChaosBed, chance: random.Random) -> EtcdMember:
    return bed.etcd.leader() or chance.choice(bed.etcd.members)


@fault("etcd leader killed", touches=ETCD)
def _(bed, host, chance):
    member = _etcd_leader(bed, chance)
    member.stop(signal.SIGKILL)
    try:
        yield member.name
    finally:
        bed.etcd.start(member)


@fault("etcd leader stopped", touches=ETCD)
def _(bed, host, chance):
    member = _etcd_leader(bed, chance)
    member.send(signal.SIGSTOP)
    try:
        yield member.name
    finally:
        member.send(signal.SIGCONT)


@fault("all etcd killed", touches=ETCD)
def _(bed, host, chance):
    bed.etcd.stop(signal.SIGKILL)
    try:
        yield "all three"
    finally:
        bed.etcd.start()


@fault("all etcd stopped", touches=ETCD)
def _(bed, host, chance):
    for member in bed.etcd.members:
        member.send(signal.SIGSTOP)
    try:
        yield "all three"
    finally:
        for member in bed.etcd.members:
            member.send(signal.SIGCONT)


# -- agent and guard


def _start(host: Host) -> None:
    """As its unit would; it may run again already after a reset."""
    with host.switch:
        if host.agent is None or host.agent.poll() is not None:
            host.start_agent()


@fault("agent killed", touches=AGENT | DISK)
def _(bed, host, chance):
    host.kill_agent()
    try:
        yield host.name
    finally:
        _start(host)


@fault("agent killed, back at once", touches=AGENT | DISK, longest_ttl=0.2)
def _(bed, host, chance):
    host.kill_agent()
    _start(host)
    yield host.name


@fault("agent stopped", touches=AGENT, weight=4)
def _(bed, host, chance):
    host.signal_agent(signal.SIGSTOP)
    try:
        yield host.name
    finally:
        host.signal_agent(signal.SIGCONT)
        _start(host)


@fault("guard killed", touches=GUARD)
def _(bed, host, chance):
    signal_all(host.guards(), signal.SIGKILL)
    yield host.name


@fault("guard stopped", touches=GUARD, weight=4)
def _(bed, host, chance):
    guards = host.guards()
    signal_all(guards, signal.SIGSTOP)
    try:
        yield host.name
    finally:
        signal_all(guards, signal.SIGCONT)


@fault("agent and guard killed", touches=AGENT | GUARD | DISK, exposes=True, primary_only=True)
def _(bed, host, chance):
    kill_agent_and_guard(host)
    try:
        yield host.name
    finally:
        _start(host)


def kill_agent_and_guard(host: Host) -> None:
    """Neither gets to start the other again."""
    both = [p for p in (host.agent_process, *host.guards()) if p is not None]
    signal_all(both, signal.SIGSTOP)
    host.signal_agent(signal.SIGKILL)
    signal_all(both, signal.SIGKILL)
    host.kill_agent()


# -- PostgreSQL


@fault("postmaster killed")
def _(bed, host, chance):
    _send(host.postmaster(), signal.SIGKILL)
    yield host.name


@fault("postmaster stopped")
def _(bed, host, chance):
    yield from _stopped(host.name, [p for p in (host.postmaster(),) if p])


@fault("all of PostgreSQL stopped")
def _(bed, host, chance):
    yield from _stopped(host.name, host.postgres())


def _stopped(name: str, processes: list[Process]) -> Iterator[str]:
    signal_all(processes, signal.SIGSTOP)
    try:
        yield name
    finally:
        signal_all(processes, signal.SIGCONT)


@fault("one backend killed", primary_only=True)
def _(bed, host, chance):
    pid = _a_backend(host)
    if pid:
        os.kill(pid, signal.SIGKILL)
    yield f"{host.name}, {pid or 'no client there'}"


@fault("one backend stopped", primary_only=True)
def _(bed, host, chance):
    """It may hold a lock that all others need, and does not die of a shutdown."""
    pid = _a_backend(host)
    try:
        if pid:
            os.kill(pid, signal.SIGSTOP)
        yield f"{host.name}, {pid or 'no client there'}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            if pid and any(p.pid == pid for p in host.postgres()):
                os.kill(pid, signal.SIGCONT)


def _a_backend(host: Host) -> int:
    """A client that writes; 0: there is none."""
    try:
        with host.connect() as connection:
            row = connection.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() "
                                     "AND query LIKE 'INSERT%' ORDER BY random() LIMIT 1").fetchone()
    except psycopg.Error:
        return 0
    return int(row[0]) if row else 0


def _send(process: Process | None, number: signal.Signals) -> None:
    if process is not None:
        process.send(number)


# -- the machine


@fault("power lost", touches=AGENT | GUARD | DISK)
def _(bed, host, chance):
    host.lose_power()
    try:
        yield host.name
    finally:
        _start(host)


@fault("power lost everywhere", touches=AGENT | GUARD | DISK | ETCD, longest_ttl=1.0)
def _(bed, host, chance):
    """Everything at once, and everything comes back at once."""
    everybody = [p for each in bed.hosts for p in each.processes()]
    for member in bed.etcd.members:
        member.send(signal.SIGKILL)
    signal_all(everybody, signal.SIGKILL)
    for each in bed.hosts:
        each.lose_power()
    bed.etcd.stop(signal.SIGKILL)
    try:
        yield "all"
    finally:
        bed.etcd.start()
        for each in bed.hosts:
            _start(each)


@fault("disk full", touches=DISK)
def _(bed, host, chance):
    ballast = host.fill_disk()
    try:
        yield host.name
    finally:
        ballast.unlink(missing_ok=True)


@fault("disk hangs", touches=DISK)
def _(bed, host, chance):
    """Every write waits, and cannot be killed. (Slow ones need dm-delay, which is in no kernel here.)"""
    _fsfreeze("-f", host)
    try:
        yield host.name
    finally:
        _fsfreeze("-u", host)


@fault("disk stutters", touches=DISK)
def _(bed, host, chance):
    """As a storage network does that is about to fail: it hangs for half a second, again and again. Done by a child, which ends when
    its input does, after a thaw: killed in the middle of a freeze, which goes on in the kernel, it would leave the disk frozen."""
    loop = f'while fsfreeze -f "{host.disk}"; sleep 0.5; fsfreeze -u "{host.disk}"; read -r -t 0.2; [ $? -gt 128 ]; do :; done'
    child = subprocess.Popen(["bash", "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, start_new_session=True)
    assert child.stdin is not None
    try:
        yield host.name
    finally:
        child.stdin.close()
        child.wait(_COMMAND_S)


def _fsfreeze(what: str, host: Host) -> None:
    subprocess.run(["fsfreeze", what, host.disk], check=True, timeout=_COMMAND_S, env={"PATH": "/usr/sbin:/sbin"})


@fault("wall clock jumps")
def _(bed, host, chance):
    """The agent's (chaos_agent.py)."""
    seconds = chance.choice((-86400, -60, -7, 7, 60, 86400))
    clock = bed.clock_of(host)
    try:
        clock.write_text(f"{seconds:+d}\n", encoding="utf-8")
        yield f"{host.name}, {seconds:+d} s"
    finally:
        clock.write_text("+0\n", encoding="utf-8")


# -- what people do meanwhile


@fault("an operator switches over", longest_ttl=0.5)
def _(bed, host, chance):
    leader = bed.leader() or host
    answer = leader.request("POST", "/switchover", {"leader": leader.name}, timeout_s=_CALL_S)
    yield f"from {leader.name}: {answer.status if answer else 'no answer yet'}"


@fault("an operator restarts PostgreSQL", longest_ttl=0.5)
def _(bed, host, chance):
    answer = host.request("POST", "/restart", {}, timeout_s=_CALL_S)
    yield f"{host.name}: {answer.status if answer else 'no answer yet'}"


@fault("an operator changes ttl", longest_ttl=2.0)
def _(bed, host, chance):
    before = bed.profile.ttl
    ttl = chance.choice((before + 5, before * 2, max(5, before - 10)))
    answer = host.request("PATCH", "/config", {"ttl": ttl}, timeout_s=_CALL_S)
    bed.after_healing.append(lambda: _until_answered(bed, {"ttl": before}))
    yield f"to {ttl} by {host.name}: {answer.status if answer else 'no answer yet'}"


@fault("an operator pauses")
def _(bed, host, chance):
    answer = host.request("PATCH", "/config", {"pause": True}, timeout_s=_CALL_S)
    bed.after_healing.append(lambda: _until_answered(bed, {"pause": None}))
    yield f"by {host.name}: {answer.status if answer else 'no answer yet'}"


def _until_answered(bed: ChaosBed, change: dict[str, object]) -> None:
    """The former settings are back, by whoever can write them."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for host in bed.hosts:
            answer = host.request("PATCH", "/config", change, timeout_s=_CALL_S)
            if answer is not None and answer.status == 200:
                return
        bed.supervise()
        time.sleep(0.5)
    raise AssertionError(f"nobody takes {change} for a minute")

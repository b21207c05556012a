"""The stories that a DBA would ask about. A story is its docstring, and what happens when; the rest is pgha's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from tests.scenarios.stage import Stage
from tests.simulation.store import MEMBERS


class Story(Struct, frozen=True):
    """`tell(stage)` makes things happen; `stage` are the arguments of Stage."""

    name: str
    text: str
    tell: Callable[[Stage], None]
    stage: dict[str, Any]

    def play(self) -> tuple[Stage, str]:
        stage = Stage(**self.stage)
        self.tell(stage)
        return stage, stage.end()


STORIES: list[Story] = []


def story(**stage: Any) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    def keep(tell: Callable[[Stage], None]) -> Callable[[Stage], None]:
        STORIES.append(Story(tell.__name__, tell.__doc__ or "", tell, stage))
        return tell
    return keep


@story()
def primary_host_dies(s: Stage) -> None:
    """The host of the primary dies, the best standby takes over, the old primary returns.

    Nobody can know at once that n1 is dead: its record in the store is respected for its whole ttl of 30 s, and 1 % for
    clocks. Then both standbys stop streaming, compare what they have, and the better one takes the lock.
    """
    s.until(10)
    s.happens("the host of n1 loses its power", s.hosts["n1"].power_off)
    s.until(60)
    s.happens("the power of n1 returns", s.hosts["n1"].power_on)
    s.until(90)


@story()
def scheduled_switchover(s: Stage) -> None:
    """A switchover is scheduled, with patronictl for one: the leader sees the time come.

    What stands in the store becomes a switchover for now when its time has come by the leader's clock. So the standbys judge what
    they see in the store, not what their own clocks say. One that nobody can read would be removed, and nothing would happen.
    """
    s.until(10)
    s.happens("a switchover from n1 to n3 is scheduled in 20 s", lambda: s.schedules("n1", "n3", in_s=20.0))
    s.until(60)
    s.happens("a switchover is scheduled that names no time zone", lambda: s.schedules("n3", "n1", at="2030-01-01T03:00:00"))
    s.until(70)


@story()
def replica_reinitialised(s: Stage) -> None:
    """An operator has a replica copied anew; on the leader that is refused, and a copy is given up when nobody leads.

    The leader's PostgreSQL is asked who it is first. The old data is kept until the copy streams: when the leader dies in the
    middle of the second copy, n2 goes on with what it had, and takes part in the election.
    """
    s.until(10)
    s.happens("n2 is to be reinitialised", s.reinitializes, "n2")
    s.until(40)
    s.happens("n1, which leads, is to be reinitialised", s.reinitializes, "n1")
    s.until(45)
    s.instances["n2"].work_s = 60.0
    s.happens("n2 is to be reinitialised once more; a copy takes a minute now", s.reinitializes, "n2")
    s.until(50)
    s.happens("the host of n1 loses its power", s.hosts["n1"].power_off)
    s.until(110)
    s.instances["n2"].work_s = 0.0
    s.happens("the power of n1 returns", s.hosts["n1"].power_on)
    s.until(150)


@story()
def agent_killed(s: Stage) -> None:
    """The agent of the primary is killed and started again in time: nobody notices.

    PostgreSQL does not depend on the agent's process. The guard, a process of its own, holds the deadline; the new agent
    has no licence, but finds its node's own record, and adopts the running primary by a committed write before the deadline.
    """
    s.until(10)
    s.happens("the agent of n1 is killed; systemd starts it again after 3 s", lambda: s.hosts["n1"].kill_agent(restart_after_s=3.0))
    s.until(60)


@story()
def agent_frozen(s: Stage) -> None:
    """The agent of the primary freezes for a minute. There is no watchdog device.

    It cannot renew, and cannot demote either. The guard ends PostgreSQL before the licence does; only then may another
    node take over. When the agent thaws, the world has moved on, and it joins as a standby.
    """
    s.until(10)
    s.happens("the agent of n1 freezes (SIGSTOP, a stuck hypervisor, swapping)", s.freeze, "n1")
    s.until(70)
    s.happens("the agent of n1 thaws", s.thaw, "n1")
    s.until(100)


@story()
def postgres_crashes(s: Stage) -> None:
    """PostgreSQL crashes on the primary: it is started in place.

    The agent lives and holds the lock, so this is no failover: no new timeline, nothing lost, and writes are back after
    crash recovery.
    """
    s.until(10)
    s.happens("a backend of n1 is killed (OOM): PostgreSQL ends, since restart_after_crash is off under pgha", s.instances["n1"].crash)
    s.until(40)


@story()
def crash_without_return(s: Stage) -> None:
    """PostgreSQL crashes on the primary and its recovery takes ten minutes: the lock is handed over.

    After crash_handover_after_s (3 s) the agent looks whether a standby has everything that n1 has: then waiting for the
    recovery gains nothing, and the lock is given away. n1 goes on recovering, as a standby.
    """
    s.until(10)
    s.instances["n1"].slow_start_s = 600.0
    s.happens("PostgreSQL of n1 crashes; its recovery will take ten minutes", s.instances["n1"].crash)
    s.until(60)


@story()
def postgres_hangs(s: Stage) -> None:
    """PostgreSQL of the primary hangs: it lives, and answers nothing.

    A server that gives no sign of life for primary_hang_timeout (29 s) is useless, and may come back at any moment: it is
    killed, and the lock is released. With a lock that was released nobody has to wait for a ttl.
    """
    s.until(10)
    s.happens("every process of PostgreSQL on n1 freezes (storage that does not answer)", lambda: s.instances["n1"].freeze(everything=True))
    s.until(80)


@story()
def store_away(s: Stage) -> None:
    """etcd is away for longer than the ttl, failsafe_mode is off.

    The primary cannot renew. It has no way to know whether the others can reach etcd, so it stops accepting writes before
    its record would have expired for others. All go on serving reads. When etcd answers again, the record has stood for
    longer than its ttl, and an election decides.
    """
    s.until(10)
    s.happens("all members of etcd are down", lambda: s.store_is(down=True))
    s.until(80)
    s.happens("etcd is back", lambda: s.store_is(down=False))
    s.until(110)


@story(config={"failsafe_mode": True})
def store_away_failsafe(s: Stage) -> None:
    """etcd is away for longer than the ttl, failsafe_mode is on.

    The primary asks every other member to promise that it will not take over. While all of them do, it goes on. When one
    more is gone, nobody can promise for it: it may be with an etcd that n1 does not see, so n1 stops accepting writes.
    """
    s.until(10)
    s.happens("all members of etcd are down", lambda: s.store_is(down=True))
    s.until(100)
    s.happens("the network of n3 is cut, too", s.isolate, "n3", "n1", "n2")
    s.until(150)
    s.happens("the network of n3 heals, etcd is still away", s.reconnect, "n3", "n1", "n2")
    s.until(170)
    s.happens("etcd is back", lambda: s.store_is(down=False))
    s.until(200)


@story()
def primary_cut_off(s: Stage) -> None:
    """The primary is cut off from etcd and from the other nodes. Some clients still reach it.

    n1 demotes itself before its record expires for the others. What its clients wrote meanwhile nobody else has: that is
    the bounded loss of asynchronous replication, and it is stated. When the network heals, n1 is rewound.
    """
    s.until(10)
    s.happens("the network of n1 is cut: no etcd, no n2, no n3", s.isolate, "n1", *MEMBERS, "n2", "n3")
    s.until(70)
    s.happens("the network of n1 heals", s.reconnect, "n1", *MEMBERS, "n2", "n3")
    s.until(100)


@story()
def planned_switchover(s: Stage) -> None:
    """A planned switchover to n3.

    `pgha ctl switchover --leader n1 --candidate n3 --force`. n1 ends its sessions, waits until n3 has everything, and
    releases the lock with its final position; n3 takes it at once.
    """
    s.until(10)
    s.happens("an operator asks for a switchover to n3", s.asks, "n1", "n3")
    s.until(40)


@story()
def switchover_refused(s: Stage) -> None:
    """A switchover is refused, because the candidate lags.

    A switchover may not lose anything and may not take long: a candidate that is further behind than
    maximum_lag_on_failover is refused, with both numbers. Nothing else happens.
    """
    s.until(10)
    s.happens("replication to n3 stalls; the application writes 1 MB/s", s.stall, "n3")
    s.clients.bytes = 100_000
    s.until(30)
    s.happens("an operator asks for a switchover to n3", s.asks, "n1", "n3")
    s.until(40)
    s.happens("replication to n3 goes on", s.go_on, "n3")
    s.until(50)
    s.happens("the operator asks again", s.asks, "n1", "n3")
    s.until(70)


@story()
def everybody_lags(s: Stage) -> None:
    """The primary dies, and every standby is too far behind: no automatic failover; an operator accepts the loss.

    maximum_lag_on_failover (1 MiB) says how much may be lost without asking anybody. Beyond that the cluster waits for
    n1, or for `pgha ctl failover --candidate n2`.
    """
    s.until(10)
    s.happens("replication stalls to n2 and n3; the application writes 1 MB/s", s.stall, "n2", "n3")
    s.clients.bytes = 100_000
    s.until(30)
    s.clients.bytes = 1000
    s.happens("the host of n1 loses its power", s.hosts["n1"].power_off)
    s.until(80)
    s.happens("an operator decides: failover to n2, whatever is lost", s.asks, "", "n2")
    s.until(100)
    s.happens("the power of n1 returns", s.hosts["n1"].power_on)
    s.until(130)


@story()
def diverged_and_rewound(s: Stage) -> None:
    """The old primary returns with commits that nobody else has: pg_rewind.

    n1 wrote for a second after its replication had stalled, and died. Its data goes on behind the point where n2's
    timeline begins: it cannot follow as it is.
    """
    s.until(10)
    s.happens("replication stalls to n2 and n3", s.stall, "n2", "n3")
    s.until(11)
    s.happens("the host of n1 loses its power", s.hosts["n1"].power_off)
    s.until(60)
    s.happens("the power of n1 returns", s.hosts["n1"].power_on)
    s.until(90)


@story(config={"postgresql": {"use_pg_rewind": False}})
def rewind_impossible(s: Stage) -> None:
    """The old primary returns with diverged data, and pg_rewind is off: it stays down until an operator allows a copy.

    The data of n1 is no longer the cluster's, but it may be somebody's: pgha removes a diverged data directory only
    where the configuration allows it.
    """
    s.until(10)
    s.happens("replication stalls to n2 and n3", s.stall, "n2", "n3")
    s.until(11)
    s.happens("the host of n1 loses its power", s.hosts["n1"].power_off)
    s.until(60)
    s.happens("the power of n1 returns", s.hosts["n1"].power_on)
    s.until(90)
    s.happens("an operator switches postgresql.remove_data_directory_on_diverged_timelines on",
              lambda: s.configure(postgresql={"remove_data_directory_on_diverged_timelines": True}))
    s.until(120)


@story()
def pause(s: Stage) -> None:
    """Pause: a dead primary is left alone; then resume.

    In pause pgha starts, stops and promotes nothing by itself. After resume it does what it would have done.
    """
    s.until(10)
    s.happens("an operator asks for a pause (pgha ctl pause)", lambda: s.configure(pause=True))
    s.until(40)
    s.happens("PostgreSQL of n1 crashes", s.instances["n1"].crash)
    s.until(110)
    s.happens("an operator ends the pause (pgha ctl resume)", lambda: s.configure(pause=False))
    s.until(140)


@story(config={"synchronous_mode": True})
def synchronous_failover(s: Stage) -> None:
    """synchronous_mode: the primary dies; the asynchronous standby is ahead in name only, the synchronous one takes over.

    Replication to the synchronous n2 stalls, so commits wait; n3 receives them, but nobody has acknowledged them. When n1
    dies, n3 has more WAL, and n2 has every commit that a client was told of.
    """
    s.until(10)
    s.happens("replication to n2, the synchronous standby, stalls", s.stall, "n2")
    s.until(11)
    s.happens("the host of n1 loses its power", s.hosts["n1"].power_off)
    s.until(60)
    s.happens("the power of n1 returns", s.hosts["n1"].power_on)
    s.until(90)


@story(config={"synchronous_mode": True})
def synchronous_standby_dies(s: Stage) -> None:
    """synchronous_mode: the synchronous standbys die one after the other; the set shrinks, and writes go on.

    Without strict mode availability goes first: when no standby is left, /sync says so before the primary goes on alone,
    so that nobody takes over who lacks what is acknowledged then.
    """
    s.until(10)
    s.happens("the host of n2, the synchronous standby, loses its power", s.hosts["n2"].power_off)
    s.until(100)
    s.happens("the host of n3 loses its power, too", s.hosts["n3"].power_off)
    s.until(190)
    s.happens("the power of n3 returns", s.hosts["n3"].power_on)
    s.until(220)


@story(nodes=2, config={"synchronous_mode": True, "synchronous_mode_strict": True})
def synchronous_strict(s: Stage) -> None:
    """synchronous_mode_strict: the only synchronous standby dies, and commits wait.

    Strict mode prefers to wait: no commit is acknowledged that only one node has.
    """
    s.until(10)
    s.happens("the host of n2 loses its power", s.hosts["n2"].power_off)
    s.until(100)
    s.happens("the power of n2 returns", s.hosts["n2"].power_on)
    s.until(130)


@story()
def store_restored(s: Stage) -> None:
    """etcd is restored from a backup: nobody believes it for a while.

    The backup is from the time before a switchover. It says that n1 leads, which was true then. A record in a store that
    has gone back in time proves nothing: it is believed only after it has stood for as long as any licence could last. It does
    end n2's licence, which has no record any more: nobody accepts writes meanwhile.
    """
    s.until(5)
    s.happens("etcd is backed up", s.store.backup)
    s.until(10)
    s.happens("an operator asks for a switchover to n2", s.asks, "n1", "n2")
    s.until(40)
    s.happens("etcd is restored from that backup", s.restore)
    s.until(130)


@story()
def lock_key_deleted(s: Stage) -> None:
    """Somebody deletes the lock key in etcd by hand.

    An absent record proves nothing, neither for the holder nor for the others: n1, still licensed, writes it anew.
    """
    s.until(10)
    s.happens("an operator deletes /service/sim/pgha/lock", s.delete, "pgha/lock")
    s.until(40)


@story()
def ttl_lowered(s: Stage) -> None:
    """ttl is lowered from 30 to 5 s; the second time the answer to the write that says so is lost.

    Done in peace nobody notices. Then the store has the record with ttl 5, so others will take it after 5 s; n1 does not know whether its write arrived. A
    write that may shorten the licence counts from its first byte: n1 stops in time for either.
    """
    s.until(10)
    s.happens("an operator sets ttl 5, loop_wait 1, retry_timeout 2: nobody notices", lambda: s.configure(ttl=5, loop_wait=1, retry_timeout=2))
    s.until(30)
    s.happens("and back: ttl 30, loop_wait 10, retry_timeout 10", lambda: s.configure(ttl=30, loop_wait=10, retry_timeout=10))
    s.until(50)
    s.happens("once more ttl 5, loop_wait 1, retry_timeout 2", lambda: s.configure(ttl=5, loop_wait=1, retry_timeout=2))
    s.until(50.001)
    s.happens("1 ms later nothing that etcd sends reaches n1 any more", s.network.cut, MEMBERS, ["n1"])
    s.until(80)
    s.happens("the network heals", s.network.mend, MEMBERS, ["n1"])
    s.until(100)


@story()
def power_comes_back(s: Stage) -> None:
    """The power fails for all nodes, and comes back for all at once.

    The record in etcd still names n1. Its node knows its own record, and takes it up without an election.
    """
    s.until(10)
    s.happens("power fails everywhere", s.all_hosts, "power_off")
    s.until(130)
    s.happens("power is back everywhere", s.all_hosts, "power_on")
    s.until(160)


@story()
def foreign_data(s: Stage) -> None:
    """A node comes back with the data directory of another cluster.

    Somebody restored the wrong volume on n3. Its system identifier is not the cluster's: pgha starts nothing and removes
    nothing, and says so. With the directory moved away it is copied anew.
    """
    s.until(10)
    s.happens("the host of n3 loses its power", s.hosts["n3"].power_off)
    s.until(20)
    s.happens("n3 returns with the data of another cluster", s.replaced_volume, "n3")
    s.until(50)
    s.happens("an operator moves the data directory away", s.move_away, "n3")
    s.until(80)

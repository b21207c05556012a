"""What is promised, judged from the model's own truth: one class a promise (safety model 1).

`Truth` is what the world tells: who accepts commits, who became primary from where, what was acknowledged, which data
directories went. Checkers listen to it, and say what was broken with the facts. They know nothing of pgha's beliefs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """`at_s`: virtual time."""

    checker: str
    at_s: float
    text: str


class Truth:
    """The world's news, for those who judge. Each checker may have a method of the same name."""

    def __init__(self) -> None:
        self.checkers: list[Any] = []

    def _tell(self, method: str, *arguments: Any) -> None:
        for checker in self.checkers:
            listener = getattr(checker, method, None)
            if listener is not None:
                listener(*arguments)

    def accepting(self, instance: Any, now: bool) -> None:
        self._tell("accepting", instance, now)

    def becomes_primary(self, instance: Any, how: str) -> None:
        self._tell("becomes_primary", instance, how)

    def forked(self, instance: Any) -> None:
        self._tell("forked", instance)

    def mixed(self, instance: Any, upstream: Any) -> None:
        self._tell("mixed", instance, upstream)

    def started_half_rewound(self, instance: Any) -> None:
        self._tell("started_half_rewound", instance)

    def acknowledged(self, instance: Any, branch: Any, lsn: int) -> None:
        self._tell("acknowledged", instance, branch, lsn)

    def removed(self, instance: Any, data: Any) -> None:
        self._tell("removed", instance, data)

    def reads(self, instance: Any, lsn: int) -> None:
        self._tell("reads", instance, lsn)

    def slot_dropped(self, instance: Any, name: str) -> None:
        self._tell("slot_dropped", instance, name)


class Checker:
    """One promise. `world`: what to report to, and the truth about hosts and store."""

    def __init__(self, world: Any) -> None:
        self.world = world

    def broken(self, text: str) -> None:
        self.world.violation(type(self).__name__, text)

    @property
    def now_s(self) -> float:
        now: float = self.world.scheduler.now_s
        return now


#: Agent or guard that has just come back needs a moment to act.
COMES_BACK_S = 0.3


def out_of_action(world: Any, name: str) -> bool:
    host = world.hosts[name]
    return not host.protected or (host.bare_since_ns and world.scheduler.now_ns - host.bare_since_ns < COMES_BACK_S * 1e9)


class OnePrimary(Checker):
    """Never two nodes accept commits at one instant. With agent and guard of one of them out of action, it is an exposure.

    With members of another make: no node of ours is a second writer (safety model 14). One that accepts has ended before one of
    theirs begins, but where the key `leader` was taken from under it; none begins while one of theirs accepts that it could
    have asked. What two of theirs do is theirs.
    """

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.accepting_now: dict[str, float] = {}

    def accepting(self, instance: Any, now: bool) -> None:
        if not now:
            self.accepting_now.pop(instance.name, None)
            return
        others = [n for n in self.accepting_now if n != instance.name]
        self.accepting_now[instance.name] = self.now_s
        if not others:
            return
        bare = [n for n in (*others, instance.name) if self._bare(n)]
        text = f"{instance.name} begins to accept commits while {', '.join(others)} does"
        if excuse := self._of_another_make(instance.name, others):
            self.world.exposure("OnePrimary", f"{text}; {excuse}")
        elif bare:
            self.world.exposure("OnePrimary", f"{text}; neither agent nor guard of {', '.join(bare)} could act")
        else:
            self.broken(text)

    def _bare(self, name: str) -> bool:
        return not self.world.is_patroni(name) and out_of_action(self.world, name)

    def _of_another_make(self, begins: str, others: list[str]) -> str:
        """Why a node of ours has broken no promise; "" if it has, or none of theirs takes part."""
        world = self.world
        theirs = [n for n in others if world.is_patroni(n)]
        if world.is_patroni(begins):
            if len(theirs) == len(others):
                return "both are Patroni members"
            if world.view().leader != begins:
                return "that Patroni member has not the key leader"       # it was frozen, or was started again
            return "the key leader was taken from under its holder" if world.leader_was_tampered() else ""
        if len(theirs) < len(others) or not theirs:
            return ""
        return "" if any(world.could_be_asked(begins, n) for n in theirs) else "that Patroni member could not be asked"


class NothingPromisedIsLost(Checker):
    """A commit that was acknowledged in a synchronous mode is on every later primary."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.branches: list[Any] = []

    def acknowledged(self, instance: Any, branch: Any, lsn: int) -> None:
        if self.world.promises(instance):
            if not branch.promised:
                self.branches.append(branch)
            branch.promised = max(branch.promised, lsn)

    def becomes_primary(self, instance: Any, how: str) -> None:
        from tests.simulation.postgres import contains

        data = instance.dir
        for branch in self.branches:
            if not contains(data.branch, data.lsn, branch, branch.promised):
                if self.world.promise_is_void():
                    branch.promised = 0
                    continue
                self.broken(f"{instance.name} becomes primary ({how}) at {data.lsn} on timeline {data.timeline} without what was acknowledged up to "
                            f"{branch.promised} on timeline {branch.number}")
                branch.promised = 0
        self.branches = [b for b in self.branches if b.promised]


class LossIsBounded(Checker):
    """Asynchronous: at a failover only so much is lost as was written since the last published position, and
    maximum_lag_on_failover; and nothing that is older than a partitioned primary may have gone on for."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.previous: Any = None       # the branch of the last primary
        self.lost_bytes = 0
        self.losses = 0
        self.unguarded: set[tuple[Any, int]] = set()     # (branch, lsn), acknowledged while neither agent nor guard could act

    def acknowledged(self, instance: Any, branch: Any, lsn: int) -> None:
        if out_of_action(self.world, instance.name):
            self.unguarded.add((branch, lsn))

    def becomes_primary(self, instance: Any, how: str) -> None:
        from tests.simulation.postgres import common

        data, world = instance.dir, self.world
        before, self.previous = self.previous, data.branch
        if world.patronis:
            return          # what a Patroni member last published, and what it may lose, is not known here
        if before is None or data.bootstrap_mark == "making" or not before.acknowledged or data.branch.root is not before.root:
            return
        at, lsn = common(data.branch, data.lsn, before, before.end)
        told = before.acknowledged[-1][0] if at is before else before.end
        if at is before and told <= lsn:
            return
        lost = [(n, t) for n, t in before.acknowledged if at is not before or n > lsn]
        if not lost:
            return
        self.losses += 1
        self.lost_bytes += lost[-1][0] - (lsn if at is before else before.fork_lsn)
        if world.loss_is_permitted():
            return
        published, at_s, limit = *world.published_before(instance), world.maximum_lag()
        if at is before and min(published, before.end) - lsn > limit:
            self.broken(f"{instance.name} becomes primary ({how}) at {lsn}, {min(published, before.end) - lsn} bytes behind the published position "
                        f"{published}, limit {limit}")
        unpublished = [t / 1e9 for n, t in lost if n > published]
        if unpublished and at_s and unpublished[0] < at_s - world.publication_is_old_by_s():
            self.broken(f"{instance.name} becomes primary ({how}) without a commit that was acknowledged at {unpublished[0]:.1f} s: the position published "
                        f"at {at_s:.1f} s, {published}, does not hold it")
        late = [(n, t / 1e9) for n, t in lost if n > published and at_s and t / 1e9 > at_s + world.longest_ttl_s * 1.02 + 1.0]
        if late and not world.may_go_on_without_store():
            guarded = [t for n, t in late if (before, n) not in self.unguarded]
            text = (f"{instance.name} becomes primary ({how}) without a commit that was acknowledged at {guarded[-1] if guarded else late[-1][1]:.1f} s, more than "
                    f"a ttl after the last publication at {at_s:.1f} s")
            if guarded:
                self.broken(text)
            else:
                world.exposure("LossIsBounded", f"{text}, while neither agent nor guard could act there")


class PromotesUnderTheLock(Checker):
    """Nobody leaves recovery, or starts out of it, but while his host's licence is valid on its own clock, and the store says so."""

    def becomes_primary(self, instance: Any, how: str) -> None:
        from pgha.clock import remaining_s

        if instance.dir.bootstrap_mark == "making":
            return          # for nobody to connect to
        if self.world.is_patroni(instance.name):
            return
        host, world = self.world.hosts[instance.name], self.world
        left_s = remaining_s(host.valid_until, host.clock.now()) if host.valid_until is not None else -1.0
        if left_s <= 0:
            if self._bare(host):
                world.exposure("PromotesUnderTheLock", f"{instance.name} becomes primary ({how}) while neither agent nor guard could act")
                return
            self.broken(f"{instance.name} becomes primary ({how}) without a valid licence ({left_s:.2f} s left)")
            return
        record = world.lock_record()
        if record is not None and record.node_id != host.node_id and not world.store_was_tampered(60.0):
            self.broken(f"{instance.name} becomes primary ({how}) while the store says that {record.holder} holds the lock")
        leader = world.view().leader if world.patronis else instance.name
        if leader != instance.name and not world.leader_was_tampered():
            self.broken(f"{instance.name} becomes primary ({how}) while the key leader names {leader or 'nobody'}")

    def _bare(self, host: Any) -> bool:
        return not host.protected


class TimelinesAreTold(Checker):
    """Timelines only grow, no number is used twice, and `/history` tells them truly."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.used: dict[int, Any] = {}
        self.first: Any = None

    def becomes_primary(self, instance: Any, how: str) -> None:
        branch = instance.dir.branch
        if instance.dir.bootstrap_mark != "making":
            self.first = self.first or branch.root
            if self.first is not branch.root:
                self.broken(f"{instance.name} becomes primary ({how}) with another cluster's data ({instance.dir.system_identifier})")
        at = branch
        while at is not None:
            if at.unseen:
                self.broken(f"{instance.name} becomes primary ({how}) with what a recovery in single-user mode has written on timeline {at.number}, where another has written, too")
                at.unseen = False
            at = at.parent
        if how != "promotion":
            return
        other = self.used.get(branch.number)
        if other is not None and other is not branch and not self.world.store_was_replaced():
            self._say(instance, f"{instance.name} promotes to timeline {branch.number}, which another promotion has used")
        self.used[branch.number] = branch

    def _say(self, instance: Any, text: str) -> None:
        """A Patroni member claims no timeline, and knows of no claim."""
        if self.world.patronis:
            self.world.exposure("TimelinesAreTold", text)
        else:
            self.broken(text)

    def forked(self, instance: Any) -> None:
        if self.world.is_patroni(instance.name) or not self.world.hosts[instance.name].protected:
            self.world.exposure("TimelinesAreTold", f"{instance.name} writes timeline {instance.dir.timeline} where another has written already")
            return
        self.broken(f"{instance.name} writes timeline {instance.dir.timeline} where another has written already")

    def mixed(self, instance: Any, upstream: Any) -> None:
        if self.world.is_patroni(instance.name):
            self.world.exposure("TimelinesAreTold", f"{instance.name}, a Patroni member, streams from {upstream.name} although it has rows of its own")
            return
        self.broken(f"{instance.name} streams from {upstream.name} although it has rows of its own: it serves what is nobody's history")

    def started_half_rewound(self, instance: Any) -> None:
        self.broken(f"{instance.name} is started although a rewind of it was begun and not ended")

    def settled(self, primary: Any) -> None:
        view = self.world.view()
        told = [(e.timeline, e.lsn) for e in view.history or ()]
        true = [(r.timeline, r.switch_lsn) for r in primary.dir.branch.history()]
        if primary.dir.timeline > 1 and told != true[-len(told):] if told else primary.dir.timeline > 1:
            self.broken(f"/history says {told[-3:]}, the primary's timelines are {true[-3:]}")


class NewestCopyStays(Checker):
    """No data directory is deleted while it is the only one that holds what the last primary acknowledged. (What a former
    one acknowledges beside it, with agent and guard out of action, is an exposure, and is lost in any case.)"""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.newest: Any = None         # (branch, lsn)
        self.primary: Any = None

    def acknowledged(self, instance: Any, branch: Any, lsn: int) -> None:
        if instance is self.primary or self.primary is None:
            self.newest = (branch, lsn)

    def becomes_primary(self, instance: Any, how: str) -> None:
        self.primary = instance
        self.newest = (instance.dir.branch, instance.dir.lsn)

    def removed(self, instance: Any, data: Any) -> None:
        from tests.simulation.postgres import contains

        if self.newest is None or data.branch is None or not contains(data.branch, data.lsn, *self.newest):
            return
        for other in self.world.instances.values():
            for copy in (other.dir, *other.aside):
                if copy is not data and copy.content == "valid" and copy.branch is not None and contains(copy.branch, copy.lsn, *self.newest):
                    return
        self.broken(f"{instance.name} deletes the only copy that has everything up to {self.newest[1]} on timeline {self.newest[0].number}")


class ReaderGoesOn(Checker):
    """Whoever reads by a permanent slot goes on where it was, whoever leads now: unless the slot was made there after it had
    passed, no server lets go of what the reader has not got, and none drops the slot."""

    def reads(self, instance: Any, lsn: int) -> None:
        from tests.simulation.reader import SLOT

        kept, begin = instance.slots[SLOT], instance.dir.slots_begin[SLOT]
        if begin <= lsn < kept:
            self.broken(f"{instance.name} keeps WAL for the slot {SLOT} from {kept} only, its reader is at {lsn}; the slot was made at {begin}")

    def slot_dropped(self, instance: Any, name: str) -> None:
        if name in (self.world.store_config().get("slots") or {}) and not self.world.store_was_tampered(60.0):
            self.broken(f"{instance.name} drops the permanent slot {name}")


class NoFlapping(Checker):
    """At most one role change per fault (its begin and its end are two)."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.changes = 0

    def becomes_primary(self, instance: Any, how: str) -> None:
        if instance.dir.bootstrap_mark != "making":
            self.changes += 1

    def judge(self, edges: int) -> None:
        if self.changes > edges + 1 and not self.world.patronis:
            self.broken(f"{self.changes} times somebody became primary, after {edges} faults and ends of faults")


class TrafficIsBounded(Checker):
    """A calm cluster asks the store no more than its budget."""

    def judge(self, requests: int, seconds: float, nodes: int, ttl_s: float, loop_wait_s: float) -> None:
        # The leader: a renewal and a status; everybody: a position in the member key, the lease; the watch's checks.
        per_s = 1 / min(loop_wait_s, ttl_s / 3) + 1 / loop_wait_s + nodes * (1 / loop_wait_s + 1 / (0.4 * ttl_s) + 1 / (2.5 * min(loop_wait_s, ttl_s / 3) + 1)) + 0.2
        allowed = per_s * seconds * 1.25 + 10
        if requests > allowed and not self.world.patronis:
            self.broken(f"{requests} requests in {seconds:.0f} calm seconds of {nodes} nodes, ttl {ttl_s:g}, loop_wait {loop_wait_s:g}; budget {allowed:.0f}")


class ComesBack(Checker):
    """Once faults have ended, one primary, and every member streaming from it, within a stated time."""

    def judge(self, why_not: str, within_s: float) -> None:
        if why_not:
            self.broken(f"{within_s:g} s after the last fault has ended: {why_not}")


ALL = (OnePrimary, NothingPromisedIsLost, LossIsBounded, PromotesUnderTheLock, TimelinesAreTold, NewestCopyStays, ReaderGoesOn, NoFlapping, TrafficIsBounded, ComesBack)

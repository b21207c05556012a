"""The agent's side of the fence: a real guard, a real PostgreSQL, a real renewer on a store in memory, real time."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from guard_world import CLOCK, GuardProcess, Node, Writer, late_s

from pgha.clock import Instant, SystemClock, remaining_s
from pgha.dcs import ABSENT, Put
from pgha.dcs.keys import EPOCH, LOCK, Keys, encode, parse_lock
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.errors import GuardError
from pgha.lock import recipe
from pgha.lock.fence import MINIMUM_TO_ARM_S, Fence
from pgha.lock.guard_client import GuardClient, GuardStatus
from pgha.lock.renewer import Renewer, Timing
from pgha.model.action import AcquireLock
from pgha.model.decision import Mandate
from pgha.model.lock import Identity, LicenceState, LockRecord, fence_at

pytestmark = pytest.mark.postgres

KEYS = Keys("service", "demo")


class Clock(SystemClock):
    """The machine's clocks, with a wall clock that can be set."""

    wall_offset_s = 0.0

    def wall_s(self) -> float:
        return super().wall_s() + self.wall_offset_s


class Agent:
    """What of an agent fences: renewer, guard client and fence, with the loop's word given by the test."""

    def __init__(self, node: Node, guard: GuardProcess, *, ttl_s: float, loop_wait_s: float) -> None:
        self.world = MemoryWorld()
        self.store = MemoryStore(self.world)
        self.timing = Timing(ttl_s=ttl_s, loop_wait_s=loop_wait_s)
        self.wakes = 0
        self.clock = Clock()
        self.client = GuardClient(guard.runtime, incarnation="two", started_ns=guard.started_ns + 1, data_dir=node.data)
        self.renewer = Renewer(store=self.store, keys=KEYS, me=Identity(name="a", node_id="id-a", incarnation="two"), clock=self.clock,
                               timing=lambda: self.timing, changed=lambda: self.fence.changed())
        self.fence = Fence(renewer=self.renewer, guard=self.client, directory=recipe.DataDirectory(node.data), clock=self.clock, wake=self._wake)
        self.renewer.narrower = self.fence
        self.mandate(60)

    def _wake(self) -> None:
        self.wakes += 1

    def mandate(self, for_s: float) -> None:
        self.renewer.give_mandate(Mandate(kind="running", until=CLOCK.now().plus_s(for_s)), number=1)
        self.fence.changed()

    async def acquire(self) -> None:
        await self.renewer.acquire(AcquireLock(lock_revision=ABSENT, lock_value=b"", epoch_revision=ABSENT, epoch_number=0), deadline_s=1)

    @property
    def fence_at(self) -> Instant:
        licence = self.renewer.licence
        assert licence.valid_until is not None
        return fence_at(licence.valid_until, licence.ttl_s)

    @property
    def record(self) -> LockRecord:
        return parse_lock(self.world.read(KEYS.path(LOCK)).entries[KEYS.path(LOCK)].value)

    def cut(self) -> Instant:
        """The store is out of reach from now on; when the fence falls."""
        self.store.link(requests_pass=False, answers_pass=False)
        return self.fence_at


def with_agent(node: Node, guard: GuardProcess, main: Callable[[Agent], Awaitable[None]], *, ttl_s: float = 3.0, loop_wait_s: float = 1.0) -> None:
    async def body() -> None:
        agent = Agent(node, guard, ttl_s=ttl_s, loop_wait_s=loop_wait_s)
        try:
            with trio.fail_after(25):
                async with trio.open_nursery() as nursery:
                    await nursery.start(agent.renewer.run)
                    await nursery.start(agent.fence.run)
                    await main(agent)
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await agent.client.aclose()

    if guard.process is None:
        guard.start()
    trio.run(body)


async def until(holds: Callable[[], Any], within_s: float) -> float:
    """Wait for a fact; seconds that it took."""
    begun = trio.current_time()
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(0.003)
    return trio.current_time() - begun


async def told(agent: Agent) -> GuardStatus:
    return await agent.client.status(deadline_s=2)


def frozen(guard: GuardProcess) -> None:
    os.kill(guard.process.pid, signal.SIGSTOP)


def thawed(guard: GuardProcess) -> None:
    os.kill(guard.process.pid, signal.SIGCONT)


def ended_in_order(node: Node) -> bool:
    return "database system is shut down" in (node.base / "log").read_text()


# --- arming ----------------------------------------------------------------------------------------------------------


def test_nothing_is_armed_without_a_licence_and_a_guard_that_knows_it(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        with pytest.raises(GuardError, match="no licence to accept writes: none"):
            await agent.fence.armed()
        assert (await told(agent)).state == "idle"
        assert agent.fence.mode == "unknown"
        await agent.acquire()
        await agent.fence.armed()
        status = await told(agent)
        assert (status.state, status.fence_at, status.sequence) == ("armed", agent.fence_at, agent.renewer.licence.sequence)
        assert (agent.fence.mode, agent.fence.facts.reachable, agent.fence.facts.fence_at) == ("armed", True, agent.fence_at)

    with_agent(node, guard, main)


def test_a_guard_that_does_not_answer_forbids_the_promotion(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        frozen(guard)
        with pytest.raises(GuardError, match="no acknowledgement within"):
            await agent.fence.armed()
        assert agent.fence.mode == "unknown"
        guard.kill()
        with pytest.raises(GuardError):
            await agent.fence.armed()
        assert agent.fence.mode == "unknown"

    with_agent(node, guard, main)


def test_a_licence_that_ends_soon_arms_nothing(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        agent.cut()
        await until(lambda: remaining_s(agent.fence_at, CLOCK.now()) < MINIMUM_TO_ARM_S, 5)
        with pytest.raises(GuardError, match="ends too soon"):
            await agent.fence.armed()
        assert (agent.fence.mode, (await told(agent)).state) == ("unknown", "idle")

    with_agent(node, guard, main, ttl_s=2.0)


def test_every_renewal_is_passed_on_and_the_primary_outlives_its_first_licence(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        first = agent.fence_at
        seen = []
        while remaining_s(first, CLOCK.now()) > -0.5:
            await until(lambda: agent.renewer.licence.sequence > len(seen) + 1, 3)
            await trio.sleep(0.1)
            status = await told(agent)
            assert status.fence_at == agent.fence_at
            seen.append(status.sequence)
        assert seen == sorted(set(seen))
        assert len(seen) >= 3
        assert node.processes()
        assert node.sql("select 1") == [(1,)]

    with_agent(node, guard, main)


# --- the deadline ----------------------------------------------------------------------------------------------------


def test_clients_are_ended_in_order_half_a_second_before(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        deadline = agent.cut()
        frozen(guard)                                            # it is the agent's own hand
        assert await until(lambda: not node.processes(), 4) > 0
        assert -0.6 < late_s(deadline, CLOCK.now()) < 0
        await until(lambda: agent.fence.mode == "unknown", 1)
        assert agent.renewer.licence.state is LicenceState.NONE, "an ended licence is claimed no longer"
        assert agent.wakes >= 1

    with_agent(node, guard, main)
    thawed(guard)
    assert ended_in_order(node)


def test_what_does_not_end_in_order_is_killed_at_the_deadline(node: Node, guard: GuardProcess):
    """A stopped postmaster hears no SIGINT, and its backends go on committing."""
    server = node.start()
    writer = Writer(node)

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        os.kill(server, signal.SIGSTOP)
        deadline = agent.cut()
        frozen(guard)
        await until(lambda: not node.processes(), 4)
        assert -0.01 < late_s(deadline, CLOCK.now()) < 0.3
        last = await trio.to_thread.run_sync(writer.join)
        assert -0.3 < late_s(deadline, last) < 0.1, "served until the fence, and not after"

    with_agent(node, guard, main)
    thawed(guard)


def test_another_ones_record_ends_everything_at_once(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        others = LockRecord(holder="z", node_id="id-z", incarnation="z", sequence=1, ttl_s=3.0)
        agent.world.transact([], [Put(key=KEYS.path(LOCK), value=encode(others))])
        await until(lambda: agent.renewer.licence.state is LicenceState.LOST, 2)
        await until(lambda: not node.processes(), 0.5)
        await until(lambda: agent.fence.mode == "unknown", 1)
        assert agent.record == others

    with_agent(node, guard, main)


def test_a_clock_jump_that_nothing_confirms_fences_after_a_second(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        writer = Writer(node)
        agent.clock.wall_offset_s += 3600
        await until(lambda: agent.renewer.confirm_by is None and agent.renewer.licence.sequence > 1, 3)     # noticed, and confirmed at once
        assert writer.acknowledged
        agent.clock.wall_offset_s -= 3600
        agent.cut()
        await until(lambda: agent.renewer.confirm_by is not None, 2)
        due = agent.renewer.confirm_by
        await until(lambda: not node.processes(), 3)
        ended = writer.join()
        assert -0.2 < late_s(due, ended) < 0.3, "long before the licence would have ended"
        assert not agent.renewer.mandate.until or remaining_s(agent.renewer.mandate.until, CLOCK.now()) > 0

    with_agent(node, guard, main, ttl_s=30.0, loop_wait_s=10.0)


def test_after_the_fence_a_standby_is_left_alone(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        agent.cut()
        await until(lambda: agent.fence.mode == "unknown", 5)
        node.server.wait(2)
        agent.store.link()
        node.signal_file()
        await agent.fence.standby()
        assert ((await told(agent)).state, agent.fence.mode) == ("standby", "standby")
        node.launch()
        await until(lambda: "accept read-only connections" in (node.base / "log").read_text(), 8)
        await trio.sleep(0.5)
        assert node.server.poll() is None

    with_agent(node, guard, main)


# --- the mandate -----------------------------------------------------------------------------------------------------


def test_a_lapsed_mandate_ends_writes_in_order_and_gives_the_lock_back(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        agent.renewer.position = (4711, 1)      # as each pass of the loop says it anew
        await agent.fence.armed()
        agent.mandate(0.5)
        wakes = agent.wakes
        await until(lambda: not node.processes(), 3)
        await until(lambda: agent.record.mode == "released", 1)
        assert (agent.record.lsn, agent.record.timeline) == (4711, 1)
        assert not node.processes(), "released only when nothing can write"
        await until(lambda: agent.wakes > wakes, 1)
        assert (agent.fence.mode, agent.renewer.licence.state) == ("unknown", LicenceState.NONE)
        assert agent.renewer.licence.valid_until is None

    with_agent(node, guard, main, ttl_s=10.0)
    assert ended_in_order(node)


def test_a_lapsed_mandate_ends_a_server_that_hangs_within_two_seconds(node: Node, guard: GuardProcess):
    server = node.start()
    writer = Writer(node)

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        os.kill(server, signal.SIGSTOP)
        agent.mandate(0.3)
        took_s = await until(lambda: not node.processes(), 5)
        assert 1.5 < took_s < 2.9
        assert agent.record.mode == "held", "while it lived"
        await until(lambda: agent.record.mode == "released", 1)
        assert late_s(CLOCK.now(), await trio.to_thread.run_sync(writer.join)) < 0

    with_agent(node, guard, main, ttl_s=12.0)


def test_nothing_is_armed_while_a_lapse_ends_writes(node: Node, guard: GuardProcess):
    """A start that was decided before would bring up a primary whose lock is about to be given back."""
    server = node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        os.kill(server, signal.SIGSTOP)     # so that ending it takes its time
        agent.mandate(0.1)
        await trio.sleep(0.6)
        agent.mandate(60)                   # a loop that decides again does not undo it
        assert node.processes()
        with pytest.raises(GuardError, match="mandate has lapsed"):
            await agent.fence.armed()
        await until(lambda: agent.record.mode == "released", 5)

    with_agent(node, guard, main, ttl_s=12.0)


def test_a_lapse_in_an_outage_ends_writes_and_the_record_expires(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        agent.store.link(requests_pass=False)
        agent.mandate(0.3)
        await until(lambda: not node.processes(), 3)
        await until(lambda: agent.fence.mode == "unknown", 1)
        await until(lambda: agent.renewer.licence.state is LicenceState.RELEASING, 1)
        await trio.sleep(2.5)
        assert agent.record.mode == "held"
        agent.store.link()
        await trio.sleep(0.7)
        assert agent.record.sequence <= 2, "never renewed again"

    with_agent(node, guard, main, ttl_s=10.0)


# --- what the guard is told, in which order --------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["standby", "offline"])
def test_a_renewal_never_overtakes_what_ended_the_licence_to_write(node: Node, guard: GuardProcess, what: str):
    node.signal_file()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        frozen(guard)
        sequence = agent.renewer.licence.sequence
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.fence.standby if what == "standby" else lambda: agent.fence.offline(20))
            await until(lambda: agent.renewer.licence.sequence > sequence, 0.45)
            await trio.sleep(0.02)                               # the fence wants to pass it on, and waits its turn
            thawed(guard)
        assert agent.fence.mode == what
        for _ in range(3):                                       # neither that one nor later ones arm
            sequence = agent.renewer.licence.sequence
            await until(lambda s=sequence: agent.renewer.licence.sequence > s, 1)
            status = await told(agent)
            assert (status.state, status.sequence) == (what, 1)

    with_agent(node, guard, main, ttl_s=1.2, loop_wait_s=0.2)


def test_a_shorter_licence_is_confirmed_by_the_guard_before_it_is_sent(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        before = (await told(agent)).fence_at
        agent.cut()                                              # the shorter record cannot even arrive
        agent.timing = Timing(ttl_s=5.0, loop_wait_s=1.0)
        agent.mandate(50)
        await until(lambda: agent.renewer.licence.failing_since is not None, 6)
        status = await told(agent)
        assert status.fence_at is not None
        assert before is not None
        assert remaining_s(before, status.fence_at) > 10, "30 s of ttl before, 5 s now"
        assert remaining_s(status.fence_at, CLOCK.now()) < 5
        assert remaining_s(agent.fence_at, CLOCK.now()) < 5
        assert agent.record.ttl_s == 30.0

    with_agent(node, guard, main, ttl_s=30.0, loop_wait_s=1.0)


def test_without_the_guards_word_the_licence_is_not_shortened(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        frozen(guard)
        sequence = agent.renewer.licence.sequence
        agent.timing = Timing(ttl_s=5.0, loop_wait_s=1.0)
        agent.mandate(50)
        await until(lambda: agent.renewer.licence.sequence > sequence, 3)
        assert agent.record.ttl_s == 30.0
        thawed(guard)
        await until(lambda: agent.record.ttl_s == 5.0, 3)
        await trio.sleep(0.1)
        status = await told(agent)
        assert status.fence_at is not None
        assert late_s(agent.fence_at, status.fence_at) <= 0, "never later than ours"

    with_agent(node, guard, main, ttl_s=30.0)


def test_a_licence_shortened_while_it_is_being_armed_is_known_to_the_guard(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        shorter = CLOCK.now().plus_s(5)
        confirmed_at: list[float] = []
        frozen(guard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.fence.armed)
            await trio.sleep(0.1)

            async def narrow() -> None:
                await agent.fence.narrow(shorter, 5.0, sequence=1)
                confirmed_at.append(trio.current_time())

            nursery.start_soon(narrow)
            await trio.sleep(0.1)
            thawed_at = trio.current_time()
            thawed(guard)
        assert confirmed_at[0] >= thawed_at, "nobody has confirmed it: the guard was frozen"

    with_agent(node, guard, main, ttl_s=30.0, loop_wait_s=10.0)


def test_a_deadline_is_told_under_its_own_sequence(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        sequence = agent.renewer.licence.sequence
        async with agent.fence._speaking:                        # something else is being said to the guard
            await until(lambda: agent.renewer.licence.sequence == sequence + 2, 3)
        await trio.sleep(0.1)
        status = await told(agent)
        assert agent.renewer.licence.sequence == sequence + 2
        assert (status.sequence, status.fence_at) == (sequence + 2, agent.fence_at)

    with_agent(node, guard, main, loop_wait_s=0.5)


def test_a_dead_guard_is_noticed_and_the_next_one_told(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        guard.kill()
        wakes = agent.wakes
        await until(lambda: not agent.fence.facts.reachable, 2)
        assert agent.fence.facts.why
        assert agent.wakes == wakes + 1
        guard.launch()
        await until(lambda: agent.fence.facts.reachable, 5)
        await trio.sleep(0.1)
        status = await told(agent)
        assert (status.state, status.fence_at, status.sequence) == ("armed", agent.fence_at, agent.renewer.licence.sequence)
        await trio.sleep(2.5)
        assert node.processes(), "it was no fault of PostgreSQL's"

    with_agent(node, guard, main)


# --- an agent that comes back ----------------------------------------------------------------------------------------


def found_running(agent: Agent, status: GuardStatus) -> None:
    agent.fence.adopt(status, primary=True)
    agent.fence.changed()


def test_a_primary_that_was_found_runs_until_its_former_fence_and_no_longer(node: Node, guard: GuardProcess):
    node.start()
    guard.start()
    deadline = guard.arm(1.5)

    async def main(agent: Agent) -> None:
        found_running(agent, await told(agent))
        frozen(guard)
        assert agent.fence.adopted_until == deadline
        assert agent.renewer.licence.state is LicenceState.NONE, "it grants nothing"
        await trio.sleep(0.5)
        assert node.processes()
        await until(lambda: not node.processes(), 2)
        assert -0.6 < late_s(deadline, CLOCK.now()) < 0.3

    with_agent(node, guard, main)
    thawed(guard)


def test_a_primary_that_was_found_goes_on_under_a_licence_of_its_own(node: Node, guard: GuardProcess):
    node.start()
    guard.start()
    deadline = guard.arm(1.5)

    async def main(agent: Agent) -> None:
        found_running(agent, await told(agent))
        await agent.acquire()
        assert agent.fence.adopted_until is None
        await until(lambda: agent.fence.facts.fence_at == agent.fence_at, 1)
        await trio.sleep(max(0.0, remaining_s(deadline, CLOCK.now())) + 0.5)
        assert node.sql("select pg_is_in_recovery()") == [(False,)]
        assert (await told(agent)).state == "armed"

    with_agent(node, guard, main)


def test_a_primary_whose_guard_has_latched_is_ended_at_once(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(0.1)

    async def main(agent: Agent) -> None:
        await trio.sleep(0.2)
        status = await told(agent)
        assert (status.state, status.fence_at) == ("latched", None)
        frozen(guard)
        node.launch()
        await until(node.processes, 2)
        found_running(agent, status)
        await until(lambda: not node.processes(), 1)

    with_agent(node, guard, main)
    thawed(guard)


def test_a_take_over_that_is_not_settled_grants_nothing(node: Node, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        agent.store.link(answers_pass=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acquire_unsettled, agent)
            await until(lambda: agent.renewer.licence.state is LicenceState.ACQUIRING, 1)
            with pytest.raises(GuardError, match="no licence to accept writes: acquiring"):
                await agent.fence.armed()
            await until(lambda: EPOCH in str(agent.world.read(KEYS.root).entries), 1)
            agent.store.link()
        await until(lambda: agent.renewer.licence.state is LicenceState.HELD, 2)
        await agent.fence.armed()

    with_agent(node, guard, main)


def test_who_gives_the_lock_back_arms_nothing(node: Node, guard: GuardProcess):
    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        agent.cut()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(release_unanswered, agent)
            await until(lambda: agent.renewer.licence.state is LicenceState.RELEASING, 1)
            with pytest.raises(GuardError, match="no licence to accept writes: releasing"):
                await agent.fence.armed()

    with_agent(node, guard, main)


async def release_unanswered(agent: Agent) -> None:
    from pgha.errors import DcsUnreachable

    with pytest.raises((DcsUnreachable, trio.TooSlowError)):
        await agent.renewer.release(lsn=1, timeline=1, deadline_s=0.5)


async def acquire_unsettled(agent: Agent) -> None:
    from pgha.errors import DcsUnreachable

    with pytest.raises(DcsUnreachable):
        await agent.acquire()

"""The failsafe rounds beside a real renewer, in virtual time: when they begin, what they give, and that one silence is enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from lock_world import Node, TrioClock, delete, others_record, run, write
from msgspec.structs import replace

from pgha.clock import remaining_s
from pgha.dcs.keys import LOCK, parse_lock
from pgha.dcs.memory import MemoryWorld
from pgha.lock.failsafe import HttpAsker, Rounds, post_s, round_s
from pgha.lock.promise import Promises, Receiver
from pgha.machine import http
from pgha.model.decision import Mandate
from pgha.model.failsafe import FailsafeOrder, Ping
from pgha.model.lock import Licence, LicenceState, demote_at, fence_at

MEMBERS = {"b": "http://b:8008/patroni", "c": "http://c:8008/patroni"}


class Members:
    """The others: each answers in its time, by its own rule (else it accepts)."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, dict]] = []
        self.says: dict[str, Callable[[], str]] = {}
        self.takes_s = dict.fromkeys(MEMBERS, 0.01)

    async def ask(self, api_url: str, body: bytes) -> str:
        ping = json.loads(body)
        name = ping["pgha"]["to"]
        assert MEMBERS[name] == api_url
        self.asked.append((trio.current_time(), ping))
        await trio.sleep(self.takes_s[name])
        return self.says[name]() if name in self.says else ""


class Leader(Node):
    """Holds the lock of a fresh cluster; the store can be taken away."""

    def __init__(self, *, ttl_s: float) -> None:
        super().__init__(MemoryWorld(TrioClock()), ttl_s=ttl_s, loop_wait_s=min(10.0, ttl_s / 5))
        self.members = Members()
        self.rounds = Rounds(renewer=self.renewer, clock=self.clock, timing=lambda: self.timing, asker=self.members, conn_url=lambda: "postgres://a:5432/postgres",
                             api_url=lambda: "http://a:8008/patroni", wake=lambda: None)
        self.rounds.give(FailsafeOrder(members=MEMBERS, slots={"b": 7}))

    def _changed(self) -> None:
        super()._changed()
        if hasattr(self, "rounds"):
            self.rounds.changed()

    def left_s(self) -> float:
        until = self.licence.valid_until
        return remaining_s(until, self.clock.now()) if self.licence.state is LicenceState.HELD and until is not None else 0.0

    async def lose_store(self) -> None:
        """Until the licence comes from a round."""
        self.store.link(up=False)
        while not self.licence.by_failsafe:
            await trio.sleep(0.01)

    def demotion_in_s(self) -> float:
        licence = self.licence
        return remaining_s(demote_at(licence.valid_until, licence.ttl_s, since=licence.since, loop_wait_s=self.timing.loop_wait_s), self.clock.now())


def story(steps, *, ttl_s: float = 5.0) -> None:
    async def main() -> None:
        node = Leader(ttl_s=ttl_s)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.renewer.run)
            await nursery.start(node.rounds.run)
            await node.renewer.acquire(node.take(), deadline_s=2)
            node.mandate()
            await steps(node)
            nursery.cancel_scope.cancel()
    run(main)


def test_nobody_is_asked_while_the_store_answers():
    async def steps(node: Leader) -> None:
        await trio.sleep(100)
        assert node.members.asked == []
        assert not node.licence.by_failsafe
    story(steps)


@pytest.mark.parametrize("ttl_s", [3.0, 4.0, 5.0, 10.0, 30.0, 60.0])
def test_without_the_store_it_leads_on_and_never_comes_to_its_demotion(ttl_s):
    async def steps(node: Leader) -> None:
        await trio.sleep(ttl_s)
        node.store.link(up=False)
        for _ in range(1000):
            await trio.sleep(ttl_s / 50)
            assert node.demotion_in_s() > 0
        assert node.licence.by_failsafe
        node.store.link(up=True)
        await trio.sleep(5)
        assert not node.licence.by_failsafe
        assert node.record.sequence == node.licence.sequence
    story(steps, ttl_s=ttl_s)


def test_what_a_round_gives_counts_from_its_first_post():
    async def steps(node: Leader) -> None:
        node.members.takes_s = {"b": 0.3, "c": 0.1}
        await node.lose_store()
        first_s = node.members.asked[0][0]
        assert node.left_s() == pytest.approx(4.95 - (trio.current_time() - first_s), abs=0.001)
        assert trio.current_time() - first_s >= 0.3
        assert node.licence.since == node.clock.now().plus_s(first_s - trio.current_time())
    story(steps)


def test_a_ping_says_whose_for_whom_and_for_how_long():
    async def steps(node: Leader) -> None:
        node.store.link(up=False)
        await trio.sleep(5)
        pings = {ping["pgha"]["to"]: ping for _, ping in node.members.asked}
        assert set(pings) == {"b", "c"}
        own = pings["b"]["pgha"]
        assert {k: v for k, v in pings["b"].items() if k != "pgha"} == {"name": "a", "conn_url": "postgres://a:5432/postgres", "api_url": "http://a:8008/patroni", "slots": {"b": 7}}
        assert (own["epoch"], own["incarnation"], own["ttl_s"]) == (1, "run-a-1", 5.0)
        sequences = [ping["pgha"]["sequence"] for _, ping in node.members.asked]
        assert sequences == sorted(sequences)
        assert sequences[0] > node.record.sequence
    story(steps)


@pytest.mark.parametrize("answer", ["500 Running as a leader", "502 failsafe mode is off", "connection refused"])
def test_one_that_does_not_accept_is_enough(answer):
    async def steps(node: Leader) -> None:
        node.members.says["c"] = lambda: answer
        node.store.link(up=False)
        await trio.sleep(20)
        assert node.left_s() <= 0
        assert node.rounds.missing == {"c": answer}
        assert not any(licence.by_failsafe for _, licence in node.history)
    story(steps)


def test_one_that_is_silent_is_enough_and_is_asked_as_often_as_there_is_time_for():
    async def steps(node: Leader) -> None:
        node.members.takes_s["c"] = 1e9
        node.store.link(up=False)
        demotion_s = trio.current_time() + node.demotion_in_s()
        await trio.sleep(20)
        assert node.left_s() <= 0
        asked = [at_s for at_s, ping in node.members.asked if ping["pgha"]["to"] == "c"]
        assert len(asked) == 3
        assert max(asked) < demotion_s
        assert [ping["pgha"]["to"] for _, ping in node.members.asked].count("b") == 1, "who has accepted is not asked again in that round"
    story(steps)


def test_one_that_accepts_at_the_second_try_is_in_time():
    async def steps(node: Leader) -> None:
        answers = iter(["connection refused", ""])
        node.members.says["b"] = lambda: next(answers, "")
        node.store.link(up=False)
        await trio.sleep(5)
        assert node.licence.by_failsafe
    story(steps)


@pytest.mark.parametrize("arrives", [False, True])
def test_a_pause_that_was_wanted_when_the_store_went_away_is_in_force_only_once_it_is_known_to_be_committed(arrives):
    """Whether its record has arrived or not: the licence has an end, the others are asked, and then pause is committed."""
    async def steps(node: Leader) -> None:
        node.store.lose_answers = int(arrives)
        if not arrives:
            node.store.link(up=False)
        node.timing = replace(node.timing, paused=True)
        node.mandate(1e5)       # the loop has seen it
        await trio.sleep(0.1)
        node.store.link(up=False)
        assert node.record.mode == ("paused" if arrives else "held")
        for _ in range(300):
            await trio.sleep(0.1)
            assert node.demotion_in_s() > 0
            assert not node.licence.endless
        assert node.licence.by_failsafe
        assert {ping["pgha"]["sequence"] > node.record.sequence for _, ping in node.members.asked} == {True}, "so that the promises bind beside it"
        node.store.link(up=True)
        await trio.sleep(5)
        assert (node.licence.endless, node.licence.by_failsafe, node.record.mode) == (True, False, "paused")
        assert node.record.sequence == node.licence.sequence, "later than any round, so that the guard takes it"
    story(steps)


def test_a_leader_whose_store_went_back_leads_on_by_the_others_word_until_its_old_record_is_deleted():
    """Its own old record proves nothing (it may be another store than the others see), so it is never renewed by itself.
    Deleting the key, an operator says that this store is the one."""
    async def steps(node: Leader) -> None:
        saved = node.world.save()
        await trio.sleep(20)
        node.world.restore(saved)
        await trio.sleep(60)
        assert node.licence.by_failsafe
        assert "it was restored" in node.licence.failing_why
        assert node.left_s() > 0
        delete(node.world, LOCK)
        await trio.sleep(5)
        assert (node.licence.by_failsafe, node.licence.failing_why) == (False, "")
        assert node.record.sequence == node.licence.sequence
    story(steps)


def test_without_a_mandate_or_an_order_nobody_is_asked():
    for without in ("mandate", "order"):
        async def steps(node: Leader, without: str = without) -> None:
            if without == "order":
                node.rounds.give(None)
            else:
                node.renewer.give_mandate(Mandate(), number=2)
            node.store.link(up=False)
            await trio.sleep(20)
            assert node.members.asked == []
        story(steps)


def test_whoever_comes_during_a_round_is_asked_before_anything_is_given():
    """It may be listed in /failsafe already: the list is written after the loop has given the order."""
    async def steps(node: Leader) -> None:
        node.rounds.give(FailsafeOrder(members={"b": MEMBERS["b"]}))
        node.members.takes_s["b"] = 0.15
        node.members.says["c"] = lambda: "409 not now"
        node.store.link(up=False)
        while not node.members.asked:
            await trio.sleep(0.01)
        node.rounds.give(FailsafeOrder(members=MEMBERS))
        await trio.sleep(5)
        assert "c" in {ping["pgha"]["to"] for _, ping in node.members.asked}
        assert not node.licence.by_failsafe
        assert node.left_s() <= 0
    story(steps)


def test_who_was_silent_is_forgotten_when_the_store_is_back():
    """Else the next demotion, for whatever reason, would be told with an old obstacle."""
    async def steps(node: Leader) -> None:
        node.members.takes_s["c"] = 99
        node.store.link(up=False)
        while not node.members.asked:
            await trio.sleep(0.01)
        await trio.sleep(0.8)
        node.store.link(up=True)
        await trio.sleep(5)
        assert node.licence.state is LicenceState.HELD
        assert node.rounds.missing == {}
    story(steps)


def test_a_round_that_is_under_way_when_the_store_answers_gives_nothing_more():
    """Else the agent said "continue to run because failsafe mode is enabled" once more, between two words of the store."""
    async def steps(node: Leader) -> None:
        node.members.takes_s = {"b": 0.1, "c": 0.1}
        await node.lose_store()
        given = node.licence.sequence
        through = node.store.transact

        async def slow(**request):
            """The first renewal of after the silence is answered just after the next round has begun."""
            asked = len(node.members.asked)
            while parse_lock(request["puts"][0].value).sequence > given and len(node.members.asked) == asked:
                await trio.sleep(0.001)
            return await through(**request)
        node.store.transact = slow
        node.store.link(up=True)
        while node.licence.by_failsafe:
            await trio.sleep(0.01)
        node.store.transact = through
        assert node.licence.sequence < node.members.asked[-1][1]["pgha"]["sequence"], "the round began after the renewal was sent"
        sequence, heard = node.licence.sequence, len(node.history)
        await trio.sleep(5)
        assert node.licence.sequence > sequence
        assert not any(licence.by_failsafe for _, licence in node.history[heard:])
    story(steps)


def test_a_member_alone_asks_nobody_and_leads_on():
    async def steps(node: Leader) -> None:
        node.rounds.give(FailsafeOrder())
        node.store.link(up=False)
        await trio.sleep(60)
        assert node.licence.by_failsafe
        assert node.left_s() > 0
    story(steps)


def test_anothers_record_ends_it_as_soon_as_it_is_seen():
    async def steps(node: Leader) -> None:
        node.store.link(up=False)
        await trio.sleep(10)
        assert node.licence.by_failsafe
        write(node.world, LOCK, others_record())
        node.store.link(up=True)
        await trio.sleep(1)
        assert node.licence.state is LicenceState.LOST
        await trio.sleep(30)
        assert node.licence.state is LicenceState.LOST
    story(steps)


def test_a_jump_of_the_wall_clock_is_confirmed_by_a_round():
    async def steps(node: Leader) -> None:
        node.store.link(up=False)
        await trio.sleep(10)
        node.clock.wall_offset_s += 100
        for _ in range(300):
            await trio.sleep(0.01)
            assert not node.renewer.confirm_failed()
        assert node.renewer.confirm_by is None
    story(steps)


def test_the_guard_is_told_later_sequences_only():
    async def steps(node: Leader) -> None:
        for up in (False, True, False, True):
            node.store.link(up=up)
            await trio.sleep(12)
        held = [licence for _, licence in node.history if licence.state is LicenceState.HELD]
        sequences = [licence.sequence for licence in held]
        assert sequences == sorted(sequences)
        ends: dict[int, set] = {}
        for licence in held:
            ends.setdefault(licence.sequence, set()).add(fence_at(licence.valid_until, licence.ttl_s))
        assert all(len(each) == 1 for each in ends.values()), "under one sequence the end never moves"
    story(steps)


def test_a_round_has_time_for_more_than_one_question():
    for ttl_s in (3.0, 5.0, 10.0, 30.0, 3600.0):
        assert round_s(ttl_s) >= 2 * post_s(ttl_s)


# --- leader and members together ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("ttl_s", [3.0, 5.0, 30.0])
def test_the_promises_outlast_what_they_give(tmp_path: Path, ttl_s: float):
    """Real rounds, real promises, every delay: at no moment is the licence valid when some member's promise is over."""
    async def steps(node: Leader) -> None:
        keepers = {name: Promises(_made(tmp_path / f"{name}-{ttl_s}"), node.clock, boot_id="boot", unknown_ttl_s=0.0) for name in MEMBERS}

        async def ask(api_url: str, body: bytes) -> str:
            raw = json.loads(body)
            name = raw["pgha"]["to"]
            await trio.sleep(0.03 if name == "b" else 0.001)
            verdict = keepers[name].accept(Ping(name=raw["name"], **{k: raw["pgha"][k] for k in ("to", "epoch", "incarnation", "sequence", "ttl_s")}),
                                           Receiver(name=name, failsafe_mode=True, leads=False, licence=Licence(), epoch=1, epoch_holder="a", ttl_s=30.0))
            await trio.sleep(0.05)
            return "" if verdict.promise else verdict.text
        node.members.ask = ask
        node.store.link(up=False)
        for _ in range(500):
            await trio.sleep(ttl_s / 40)
            if node.licence.by_failsafe:
                for keeper in keepers.values():
                    assert keeper.promise.left_s(node.clock.now()) > node.left_s() > 0
        assert node.licence.by_failsafe
    story(steps, ttl_s=ttl_s)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# --- by HTTP -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("answer", "why"), [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nlsn: 5\r\n\r\nAccepted", ""),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "200 ok"),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 19\r\n\r\nRunning as a leader", "500 Running as a leader"),
    (b"nonsense\r\n\r\n", "illegal status line"),
    (b"", "Server disconnected"),
])
def test_only_200_and_accepted_is_yes(answer, why):
    async def main() -> None:
        got = []

        async def serve(stream) -> None:
            async with stream:
                data = b""
                while b"}" not in data:
                    data += await stream.receive_some(65536)
                got.append(data)
                if answer:
                    await stream.send_all(answer)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, serve, 0)
            port = listeners[0].socket.getsockname()[1]
            said = await HttpAsker(lambda: http(False), authorization=lambda: "Basic dTpw").ask(f"http://127.0.0.1:{port}/patroni", b'{"name": "a"}')
            nursery.cancel_scope.cancel()
        assert got[0].startswith(b"POST /failsafe HTTP/1.1\r\n")
        assert b"authorization: basic dTpw\r\n" in got[0].replace(b"Authorization: Basic", b"authorization: basic")
        assert (said == "") is (why == ""), said
        assert why in said
    trio.run(main)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/patroni", "http://[::1", "nonsense", ""])
def test_a_member_that_cannot_be_asked_is_a_no(url):
    async def main() -> None:
        assert await HttpAsker(lambda: http(False), authorization=lambda: "").ask(url, b"{}")
    trio.run(main)

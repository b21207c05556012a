"""Many who ask at once, or who wait, take neither the loop nor the places from those on whom the cluster depends.

Counted in rounds of trio's scheduler and in places, not in time.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing
from rest_world import NOW, app_for, ask, published, replaced, serving, talk

from pgha.events import EventLog
from pgha.model.decision import Vote
from pgha.rest.parked import Parked
from pgha.rest.requests import Answer
from pgha.rest.server import Limits
from pgha.rest.stream import Readers
from pgha.rest.wire import Request, Response

PING = {"name": "n2", "conn_url": "", "api_url": "", "slots": {}}
LONG = ["/cluster", "/history", "/config", "/failsafe", "/metrics", "/pgha/decision", "/pgha/observation", "/pgha/events"]
VOTE_OF_7 = Vote(epoch=7, timeline=2, lsn=5)


def run(function: Any) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await function()

    trio.run(bounded)


def app_with_all() -> Any:
    app, board, inbox, clock = app_for(published(primary=False, history=[[n, n, "no recovery target specified"] for n in range(1, 50)], failsafe={"n1": "http://n1/"}))
    app.readers = Readers(EventLog(run="run", node="n2", scope="bench"), clock=clock, at_most=lambda: 9)
    return app, board, inbox, clock


class Rounds(trio.abc.Instrument):
    """Counts the rounds: everybody who is ready has one turn in each."""

    def __init__(self) -> None:
        self.number = 0

    def after_io_wait(self, timeout: float) -> None:
        self.number += 1


async def crowd(app: Any, requests: list[Request]) -> list[tuple[int, Response]]:
    """All asked in one round: in which each was answered, and the answers."""
    answered: list[tuple[int, Response]] = []
    rounds = Rounds()

    async def one(request: Request) -> None:
        response = await app.handle(request)
        answered.append((rounds.number, response))

    trio.lowlevel.add_instrument(rounds)
    async with trio.open_nursery() as asking:
        for request in requests:
            asking.start_soon(one, request)
    trio.lowlevel.remove_instrument(rounds)
    return answered


@pytest.mark.parametrize("path", LONG)
def test_of_a_crowd_that_wants_long_answers_one_is_served_a_round(path: str) -> None:
    async def main() -> None:
        app, *_ = app_with_all()
        for _ in range(2):      # also when the page is there already: the sending takes its time, too
            answered = await crowd(app, [Request(method="GET", path=path)] * 40)
            assert {response.status for _, response in answered} == {200}
            assert len({number for number, _ in answered}) == 40

    run(main)


def test_different_long_answers_share_the_one_turn() -> None:
    async def main() -> None:
        app, *_ = app_with_all()
        answered = await crowd(app, [Request(method="GET", path=path) for path in LONG for _ in range(5)])
        assert len({number for number, _ in answered}) == 5 * len(LONG)

    run(main)


def test_a_vote_and_a_failsafe_ping_do_not_wait_for_the_crowd() -> None:
    async def main() -> None:
        app, _, inbox, _ = app_with_all()
        inbox.answers["failsafe"] = Answer(status=200, text="Accepted")
        body = json.dumps(PING).encode()
        urgent = [Request(method="GET", path="/pgha/vote", query={"epoch": "7"}),
                  Request(method="POST", path="/failsafe", body=body, headers={"content-length": str(len(body))})]
        answered = await crowd(app, [Request(method="GET", path="/pgha/observation")] * 100 + urgent)
        first = min(number for number, _ in answered)
        of_urgent = [number - first for number, response in answered if response.body == b"Accepted" or b'"candidate"' in response.body[:200]]
        assert len(of_urgent) == 2
        assert max(of_urgent) <= 2

    run(main)


@pytest.mark.parametrize("path", ["/cluster", "/history", "/config", "/pgha/decision", "/pgha/observation"])
def test_all_who_are_given_one_publication_are_given_the_same_object(path: str) -> None:
    async def main() -> None:
        app, board, _, clock = app_with_all()
        before = await crowd(app, [Request(method="GET", path=path)] * 10)
        clock.go_on(2.5)
        before += await crowd(app, [Request(method="GET", path=path)] * 10)
        assert len({id(response.body) for _, response in before}) == 1
        assert all(len(response.tail) < 40 for _, response in before)
        ages_s = {json.loads(response.content).get("age_s") for _, response in before} if path.startswith("/pgha/") else {0.0, 2.5}
        assert ages_s == {0.0, 2.5}
        config = {"ttl": 77}
        board.publish(replaced(published(primary=False, number=2, config=config, history=[[1, 7, "another"]], members__n3=None), wall_s=1.0))
        after = (await app.handle(Request(method="GET", path=path))).content
        assert after != before[0][1].content, "a new publication is shown at once"

    run(main)


# --- who waits ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", ["/pgha/vote?wait=2&epoch=999999999", "/pgha/observation?fresh"])
def test_strangers_that_wait_leave_places_for_everybody_else(target: str) -> None:
    """All 16 places asked to wait in, and more: three quarters of them are free at once."""
    async def main() -> None:
        app, _, inbox, clock = app_with_all()
        inbox.answers["failsafe"] = Answer(status=200, text="Accepted")
        clock.go_on(8.0)        # the last pass is no fresh one
        async with serving(app, limits=Limits(connections=16)) as address, trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(talk, address, f"GET {target} HTTP/1.0\r\n\r\n".encode())       # some are evicted before they are heard
            while len(inbox.woken) < 16:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(app._votes) <= 2
            assert len(app._looks) <= 1
            assert (await ask(address, "POST", "/failsafe", PING))[0] == 200
            for path in ("/pgha/vote?epoch=1", "/cluster", "/pgha/observation"):
                assert (await ask(address, "GET", path))[0] == 200
            nursery.cancel_scope.cancel()

    run(main)


def test_a_peer_s_vote_is_waited_for_though_strangers_wait_and_theirs_end() -> None:
    async def main() -> None:
        app, board, *_ = app_with_all()
        app.has_places(24)      # three of them for votes
        got: dict[str, int] = {}

        async def wait(who: str, epoch: int) -> None:
            answer = await app.handle(Request(method="GET", path="/pgha/vote", query={"wait": "2", "epoch": str(epoch)}))
            got[who] = json.loads(answer.content)["epoch"]

        async with trio.open_nursery() as nursery:
            for name in ("first", "second", "third"):
                nursery.start_soon(wait, name, 999_999_999)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(wait, "peer", 7)
            await trio.testing.wait_all_tasks_blocked()
            assert got == {"first": -1}, "who has waited longest is answered with what is known"
            board.publish(published(primary=False, number=2, vote=VOTE_OF_7))
            await trio.testing.wait_all_tasks_blocked()
            assert got == {"first": -1, "peer": 7}
            nursery.cancel_scope.cancel()
        assert len(app._votes) == 0

    run(main)


def test_what_is_known_already_ends_nobody_s_wait() -> None:
    async def main() -> None:
        first = published(primary=False, vote=VOTE_OF_7)
        _, board, *_ = app_for(first)
        parked = Parked(board)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: parked.until(lambda _: False, at_most_s=20.0))
            await trio.testing.wait_all_tasks_blocked()
            assert await parked.until(lambda now: now.vote.epoch >= 7, at_most_s=2.0) is first
            assert await parked.until(lambda _: False, at_most_s=0.0) is first
            assert len(parked) == 1
            nursery.cancel_scope.cancel()

    run(main)


def test_many_who_wait_for_a_pass_are_all_answered_by_it() -> None:
    async def main() -> None:
        app, board, _, clock = app_with_all()
        app.has_places(512)
        clock.go_on(8.0)
        answers: list[Response] = []

        async def look() -> None:
            answers.append(await app.handle(Request(method="GET", path="/pgha/observation", query={"fresh": "1"})))

        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            assert (len(answers), len(app._looks)) == (0, 32)
            value: Any = published(primary=False)
            seen = replaced(value.observation, now=NOW.plus_s(8.0), number=7, postgres=replaced(value.observation.postgres, row_at=NOW.plus_s(8.0)))
            board.publish(replaced(value, at=NOW.plus_s(8.0), observation=seen))
        assert {json.loads(answer.content)["observation"]["number"] for answer in answers} == {7}
        assert len({id(answer.body) for answer in answers}) == 1

    run(main)


def test_a_patroni_leader_is_told_a_position_of_now() -> None:
    """It judges by GET /patroni whether a member may take over: its own answers are of now, too."""
    async def main() -> None:
        app, board, inbox, clock = app_with_all()       # of a cluster of Patroni's
        app.has_places(512)
        clock.go_on(8.0)
        assert app.quick(b"GET /patroni", keep_alive=False) is None
        answers: list[Response] = []

        async def look() -> None:
            answers.append(await app.handle(Request(method="GET", path="/patroni", query={})))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            assert (answers, inbox.woken) == ([], [("observation asked", -1)])
            value: Any = published(primary=False)
            row = replaced(value.observation.postgres.row, received_lsn=0x9000000, replayed_lsn=0x9000000)
            board.publish(replaced(published(primary=False, row=row), at=NOW.plus_s(8.0), observation=replaced(
                value.observation, now=NOW.plus_s(8.0), postgres=replaced(value.observation.postgres, row=row, row_at=NOW.plus_s(8.0)))))
        assert json.loads(answers[0].content)["xlog"]["received_location"] == 0x9000000

    run(main)

"""Files are read again one reading at a time, and whoever asks hears of one that began after the asking."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pgha.reread import Reread


class Files:
    def __init__(self) -> None:
        self.state, self.readings, self.reading = "first", 0, 0
        self.goes_on = trio.Event()

    async def read(self) -> tuple[str, ...]:
        self.readings, self.reading = self.readings + 1, self.reading + 1
        assert self.reading == 1, "one at a time"
        found = self.state
        await self.goes_on.wait()
        self.reading -= 1
        return (found,)


def test_who_asks_during_a_reading_is_served_by_the_next_together_with_others():
    async def main() -> None:
        files = Files()
        reread = Reread(files.read)
        heard: list[tuple[str, str]] = []

        async def ask(name: str) -> None:
            (found,) = await reread.outcome()
            heard.append((name, found))

        async with trio.open_nursery() as nursery:
            await nursery.start(reread.run)
            async with trio.open_nursery() as askers:
                askers.start_soon(ask, "a")
                await trio.testing.wait_all_tasks_blocked()
                files.state = "second"
                askers.start_soon(ask, "b")
                askers.start_soon(ask, "c")
                reread.ask()
                await trio.testing.wait_all_tasks_blocked()
                assert files.readings == 1
                files.goes_on.set()
            nursery.cancel_scope.cancel()
        assert sorted(heard) == [("a", "first"), ("b", "second"), ("c", "second")]
        assert files.readings == 2, "the second for all who asked meanwhile, a signal among them"

    trio.run(main)


def test_who_stops_waiting_does_not_end_the_reading():
    async def main() -> None:
        files = Files()
        reread = Reread(files.read)
        async with trio.open_nursery() as nursery:
            await nursery.start(reread.run)
            with trio.CancelScope() as impatient:
                async with trio.open_nursery() as asker:
                    asker.start_soon(reread.outcome)
                    await trio.testing.wait_all_tasks_blocked()
                    impatient.cancel()
            assert (files.readings, files.reading) == (1, 1)
            files.goes_on.set()
            await trio.testing.wait_all_tasks_blocked()
            assert (files.readings, files.reading) == (1, 0)
            assert await reread.outcome() == ("first",)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_reading_that_fails_unexpectedly_is_not_swallowed():
    async def fails() -> tuple[str, ...]:
        raise KeyError("a fault of ours")

    async def main() -> None:
        reread = Reread(fails)
        reread.ask()
        await reread.run()

    with pytest.raises(KeyError):
        trio.run(main)

"""Which callback is told what, in which order; that none waits for another's sake, and that the newest role is never lost."""

from __future__ import annotations

import pytest
import trio
from agent_world import run

from pgha.act.callbacks import EVENTS, FAREWELL_S, MOST_WAITING, Call, Callbacks, queued
from pgha.errors import PostgresTimeout
from pgha.postgres.programs import Completed


class Scripts:
    """Every script takes `takes_s`, or as long as is said of its event; what ran, and when."""

    def __init__(self, takes_s=0.0, **of_event):
        self.takes_s, self.of_event = takes_s, of_event
        self.begun, self.ended, self.at_once, self.most_at_once = [], [], 0, 0

    async def __call__(self, argv, *, deadline_s, spare_background, env, **more):
        event = argv[-3]
        assert spare_background
        self.begun.append((trio.current_time(), list(argv)))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            with trio.move_on_after(deadline_s):
                await trio.sleep(self.of_event.get(event, self.takes_s))
                self.ended.append(event)
                return Completed(exit_code=0, stdout="", stderr="")
            raise PostgresTimeout("too slow")
        finally:
            self.at_once -= 1

    def told(self):
        return [tuple(argv[-3:-1]) for _, argv in self.begun]


def callbacks(scripts, *, only=EVENTS, limit_s=60.0):
    return Callbacks(run=scripts, commands=lambda: dict.fromkeys(only, "/bin/tell 'it all'"), limit_s=lambda: limit_s, scope="demo")


def call(event, role="primary"):
    return Call(event=event, role=role)


QUEUES = [
    # what waits, what comes, what waits then, what is left out
    ("the first", (), call("on_start"), "on_start", ""),
    ("in order", (call("on_stop"),), call("on_start", "replica"), "on_stop on_start", ""),
    ("a role that has changed again", (call("on_role_change", "replica"), call("on_stop")), call("on_role_change"), "on_stop on_role_change", "on_role_change"),
    ("one reload is enough", (call("on_reload"), call("on_role_change")), call("on_reload"), "on_role_change on_reload", "on_reload"),
    ("too many", (call("on_role_change"), *(call("on_start"),) * (MOST_WAITING - 1)), call("on_stop"), "on_role_change" + " on_start" * (MOST_WAITING - 2) + " on_stop", "on_start"),
    ("the newest role change is not the one that goes", (call("on_start"),) * MOST_WAITING, call("on_role_change"), "on_start " * (MOST_WAITING - 1) + "on_role_change", "on_start"),
]


@pytest.mark.parametrize(("waiting", "new", "then", "left_out"), [pytest.param(*row[1:], id=row[0]) for row in QUEUES])
def test_queue(waiting, new, then, left_out):
    kept, gone = queued(waiting, new)
    assert " ".join(c.event for c in kept) == then
    assert " ".join(c.event for c, _ in gone) == left_out
    assert kept[-1] == new and len(kept) <= MOST_WAITING


STORIES = [
    # what happens, what is told
    ("a new cluster, a reload, a restart, an end", "started(primary) reloaded restarted(primary) stopped", "on_start:primary on_reload:primary on_restart:primary on_stop:primary"),
    ("a standby takes over", "started(replica) promoted", "on_start:replica on_role_change:primary"),
    ("its promotion fails, and it starts again", "started(replica) promoted started(replica)", "on_start:replica on_role_change:primary on_role_change:replica"),
    ("a switchover, seen by who leaves", "started(primary) stopped started(replica)", "on_start:primary on_stop:primary on_role_change:replica"),
    ("a crash of the primary", "started(primary) started(primary)", "on_start:primary on_start:primary"),
    ("a promotion that came to nothing", "started(replica) promoted stopped started(replica)", "on_start:replica on_role_change:primary on_stop:primary on_role_change:replica"),
    ("the agent was started beside a running server", "seen(primary) seen(primary)", "on_start:primary"),
    ("what was started is not told again when it is seen", "started(replica) seen(replica)", "on_start:replica"),
    ("promoted by hand", "seen(replica) seen(primary)", "on_start:replica on_role_change:primary"),
]


@pytest.mark.parametrize(("happens", "told"), [pytest.param(*row[1:], id=row[0]) for row in STORIES])
def test_what_is_told(happens, told):
    async def main():
        scripts = Scripts()
        them = callbacks(scripts)
        async with them.running():
            for word in happens.split():
                name, _, role = word.rstrip(")").partition("(")
                getattr(them, name)(*([role] if role else []))
                await trio.sleep(1)     # virtual: each is done before the next comes
        assert " ".join(f"{event}:{role}" for event, role in scripts.told()) == told
        assert all(argv[:2] == ["/bin/tell", "it all"] and argv[-1] == "demo" for _, argv in scripts.begun)
    run(main)


def test_only_what_is_configured_is_run():
    async def main():
        scripts = Scripts()
        them = callbacks(scripts, only=["on_role_change"])
        async with them.running():
            them.started("replica")
            them.promoted()
        assert scripts.told() == [("on_role_change", "primary")]
    run(main)


def test_one_that_hangs_is_ended_at_its_limit_and_ends_no_other():
    async def main():
        scripts = Scripts(1.0, on_start=1e6)
        them = callbacks(scripts, limit_s=20.0)
        async with them.running():
            them.started("replica")
            await trio.sleep(1)
            before_s = trio.current_time()
            them.promoted()
            them.reloaded()
            assert trio.current_time() == before_s      # whoever tells does not wait
            await trio.sleep(40)
            assert [round(at) for at, _ in scripts.begun] == [0, 20, 21]
            assert scripts.ended == ["on_role_change", "on_reload"] and scripts.most_at_once == 1
    run(main)


@pytest.mark.parametrize(("takes_s", "limit_s", "ended", "within_s"), [(5, 60, ["on_stop"], 5), (1e6, 10, [], 10), (1e6, 3600, [], FAREWELL_S)])
def test_the_agents_end_waits_for_what_runs_and_not_for_ever(takes_s, limit_s, ended, within_s):
    async def main():
        scripts = Scripts(takes_s)
        them = callbacks(scripts, limit_s=limit_s)
        async with them.running():
            them.role = "primary"
            them.stopped()
        assert scripts.ended == ended
        assert trio.current_time() <= within_s + 0.1 and scripts.at_once == 0
    run(main)


def test_an_error_of_the_agent_ends_them():
    async def main():
        scripts = Scripts(1e6)
        them = callbacks(scripts)
        with pytest.raises(ExceptionGroup) as caught:
            async with them.running():
                them.started("primary")
                await trio.sleep(1)
                raise RuntimeError("a mistake")
        assert caught.group_contains(RuntimeError) and scripts.at_once == 0
        assert trio.current_time() < 2
    run(main)

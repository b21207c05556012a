"""`ctl watch`: on a real terminal (a pty), as lines, and once; against the real REST server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from ctl_world import World
from rest_world import GOLDEN, WALL_S, ClockAt, Inbox, published
from terminal import Model, OnTerminal

from pgha.ctl.ends import DONE, UNREACHABLE, USAGE
from pgha.ctl.live_screen import fitted, width
from pgha.ctl.live_words import KINDS, line, words
from pgha.events import EventLog
from pgha.model import event as events_
from pgha.model.event import AgentEvent, LockEvent, RoleEvent
from pgha.rest.published import Board
from pgha.rest.routes import App
from pgha.rest.stream import Readers
from pgha.rest.tls import make_context

RECORDED = json.loads((GOLDEN / "steady.json").read_text())


class Agent:
    """The real REST server with the recorded cluster's answers, in a thread; `happens` adds an event."""

    def __init__(self, start: Callable[..., tuple[str, int]], *, node: str = "n1", run: str = "r1", scope: str = "bench", ssl_context: Any = None) -> None:
        self.log = EventLog(run=run, node=node, scope=scope)
        self.board = Board(published())
        self.app = App(self.board, Inbox(), clock=ClockAt(), readers=Readers(self.log, clock=ClockAt(), at_most=lambda: 100))
        self._token: Any = None
        application = self

        class Entered(App):
            async def handle(self, request: Any) -> Any:
                application._token = trio.lowlevel.current_trio_token()
                return await super().handle(request)

        self.app.__class__ = Entered
        self.address = start(self.app, ssl_context=ssl_context)
        self.url = f"http{'s' if ssl_context else ''}://{self.address[0]}:{self.address[1]}"

    def happens(self, event: Any, *, wall_s: float = WALL_S) -> None:
        if self._token is None:
            self.log.add(event, wall_s=wall_s)      # nobody has asked yet
        else:
            trio.from_thread.run_sync(lambda: self.log.add(event, wall_s=wall_s), trio_token=self._token)


@pytest.fixture
def agent(world: World, start_agent: Callable[..., tuple[str, int]]) -> Iterator[Agent]:
    """The configured node's own."""
    world.load("steady")
    agent = Agent(start_agent)
    world.extra = f'[restapi]\nlisten = "{agent.address[0]}:{agent.address[1]}"\n'
    world.write_config()
    yield agent


def argv(world: World, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pgha", "ctl", "-c", str(world.config), "watch", *arguments]


def state(text: str) -> RoleEvent:
    return RoleEvent(role="primary", state=text, timeline=2, was_role="", was_state="")


# --- on a terminal ---------------------------------------------------------------------------------------------------------


def test_the_screen(world: World, agent: Agent) -> None:
    agent.happens(AgentEvent(what="started", version="0.1.0"))
    agent.happens(LockEvent(what="taken", holder="n1", epoch=3))
    with OnTerminal(argv(world)) as terminal:
        text = terminal.until(lambda t: "n1 has taken the lock, epoch 3" in t and "| n1 " in t, "table and events")
        print(text)
        lines = text.split("\n")
        assert len(lines) == 30
        assert lines[0] == f"pgha watch   bench   seen by n1, {agent.url}"
        assert lines[1].startswith("+ Cluster: bench (")
        assert lines[2].split("|")[1].strip() == "Member"
        assert [row.split("|")[1].strip() for row in lines if row.startswith("| n")] == ["n1", "n2", "n3"]
        assert lines[-1] == "q or Ctrl-C: end"
        assert terminal.model.colours
        assert terminal.model.cursor_hidden
        for number in range(60):
            agent.happens(state(f"state{number}"))
        text = terminal.until(lambda t: "state59" in t, "the last event")
        rows = text.split("\n")
        assert rows[-2].endswith("primary, state59 on timeline 2")
        assert [row for row in rows if "state" in row] == [row for row in rows[-2 - 19:-1] if "state" in row], "the last ones, the newest below, as many as there is room for"
        assert lines[:8] == rows[:8], "the table stands where it stood"
        terminal.type(b"q")
        assert terminal.end() == DONE
        assert terminal.is_given_back()
        assert "+ Cluster: bench" in terminal.model.text(), "what was seen last stays, as list has it"
        assert terminal.model.wrong == []
        assert terminal.model.cleared == 1, "only at the beginning: nothing flickers"


def test_little_is_written_when_little_changes(world: World, agent: Agent) -> None:
    """Over ssh every byte counts, and a row that is the same is not written again."""
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "| n1 " in t, "the table")
        while terminal.read(1.0):
            pass
        terminal.written.clear()
        while terminal.read(2.5):
            pass
        assert terminal.written == [], "nothing has changed"
        agent.happens(state("x1"))
        terminal.until(lambda t: "x1" in t, "the event")
        assert sum(len(data) for data in terminal.written) < 150
        assert terminal.model.wrong == []


def test_a_resize_draws_the_new_size_and_nothing_else(world: World, agent: Agent) -> None:
    for number in range(30):
        agent.happens(state(f"state{number}"))
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "state29" in t and "| n1 " in t, "the screen")
        for columns, rows in ((60, 15), (140, 50), (20, 5), (10, 2), (1, 1), (200, 12), (100, 30)):
            terminal.resize(columns, rows)
            while terminal.read(0.5):
                pass
            text = terminal.model.text()
            assert len(text.split("\n")) == rows
            assert all(width(row) < max(columns, 2) for row in text.split("\n")), text
            if rows >= 12 and columns >= 60:
                assert text.split("\n")[-1] == "q or Ctrl-C: end"
                assert text.startswith("pgha watch   bench")
        assert terminal.model.wrong == []
        for _ in range(20):
            terminal.resize(90, 20)
            terminal.resize(100, 30)
        while terminal.read(0.5):
            pass
        # In between it may have drawn for a size that was gone already; what counts is what stands there in the end.
        rows = terminal.model.text().split("\n")
        assert rows[0].startswith("pgha watch   bench")
        assert rows[-2].endswith("primary, state29 on timeline 2")
        assert rows[-1] == "q or Ctrl-C: end"
        assert terminal.model.cleared == 1


@pytest.mark.parametrize(("how", "code"), [(b"q", 0), (b"\x03", 0), (signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (b"\x1c", -signal.SIGQUIT)])
def test_however_it_ends_the_terminal_is_given_back(world: World, agent: Agent, how: bytes | signal.Signals, code: int) -> None:
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "| n1 " in t, "the table")
        assert not terminal.is_given_back()
        if isinstance(how, bytes):
            terminal.type(how)
        else:
            terminal.signal(how)
        assert terminal.end() == code
        assert terminal.is_given_back()
        assert terminal.model.wrong == []


def test_also_when_it_breaks(world: World, agent: Agent) -> None:
    """A defect of ours: its traceback stands on the screen that was there before."""
    broken = "import pgha.ctl.live as l\ndef rows(*a, **k): raise ZeroDivisionError('a defect')\nl._rows = rows\nimport sys\nfrom pgha.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    with OnTerminal([sys.executable, "-c", broken, *argv(world)[3:]], rows=60, columns=200) as terminal:
        assert terminal.end() == 1
        assert terminal.is_given_back()
        assert "ZeroDivisionError: a defect" in terminal.model.text()


def test_stopped_and_continued(world: World, agent: Agent) -> None:
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "| n1 " in t, "the table")
        terminal.signal(signal.SIGTSTP)
        until_s = time.monotonic() + 10
        while not (terminal.is_given_back() and stopped(terminal.process.pid)):
            assert time.monotonic() < until_s
            terminal.read(0.05)
        terminal.signal(signal.SIGCONT)
        terminal.until(lambda t: "| n1 " in t and terminal.model.alternate is not None, "the screen again")
        agent.happens(state("after"))
        terminal.until(lambda t: "after" in t, "what happens")
        terminal.type(b"\x0c")
        terminal.type(b"q")
        assert terminal.end() == 0
        assert terminal.is_given_back()


def test_a_terminal_that_takes_nothing_holds_up_nobody(world: World, agent: Agent) -> None:
    """A dead ssh: the agent goes on, and we end when we are told to."""
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "| n1 " in t, "the table")
        for number in range(400):
            agent.happens(state(f"{number:03d}" * 30))
            time.sleep(0.005)       # so that it is drawn again and again
        assert urllib.request.urlopen(f"{agent.url}/primary", timeout=5).status == 200
        terminal.signal(signal.SIGTERM)
        assert terminal.process.wait(10) < 0, "by a signal"
        assert terminal.settings == terminal.before


def test_a_terminal_that_goes_away_ends_it(world: World, agent: Agent) -> None:
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "| n1 " in t, "the table")
        terminal.hang_up()
        agent.happens(state("x"))
        assert terminal.process.wait(10) == -signal.SIGHUP


def stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


def test_what_others_wrote_does_not_speak_to_the_terminal(world: World, agent: Agent) -> None:
    member = json.loads(world.get("members/n2"))
    member["replication_state"] = "\x1b[2J\x07evil\x9b"
    agent.board.publish(published(members__n2=member))
    agent.happens(state("\x1b[31mred\r\n\x07 名前 \u202e"))
    with OnTerminal(argv(world)) as terminal:
        text = terminal.until(lambda t: "red" in t and "evil" in t, "both")
        assert "\\x1b[31mred\\r \\x07 名前 \\u202e" in text
        assert "\\x1b[2J\\x07evil\\x9b" in text
        assert terminal.model.wrong == []
        assert terminal.model.cleared == 1


def test_a_member_that_has_not_heard_from_the_store_says_so(world: World, agent: Agent) -> None:
    agent.happens(state("x"))
    with OnTerminal(argv(world)) as terminal:
        assert "not heard" not in terminal.until(lambda t: "| n1 " in t and "x on" in t, "the screen")
        agent.app.clock.go_on(40)  # type: ignore[attr-defined]
        terminal.until(lambda t: "n1 has not heard from the store for 40 s: the table is as of then" in t, "a note")
        assert terminal.model.wrong == []


def test_without_colours(world: World, agent: Agent) -> None:
    with OnTerminal(argv(world), environment={**os.environ, "NO_COLOR": "1"}) as terminal:
        terminal.until(lambda t: "| n1 " in t, "the table")
        assert not terminal.model.colours


# --- going over to another member --------------------------------------------------------------------------------------------


def test_another_member_is_followed_when_one_goes_and_the_store_is_away(world: World, agent: Agent, start_agent: Callable[..., tuple[str, int]], tmp_path: Any) -> None:
    other = Agent(start_agent, node="n2", run="r2")
    raw = json.loads(world.get("members/n2"))
    agent.board.publish(published(members__n2={**raw, "api_url": f"{other.url}/patroni"}))
    world.write_config()
    world.config.write_text(world.config.read_text().replace(world.etcd.urls[0].removeprefix("http://"), "127.0.0.1:9"))
    agent.happens(state("first"), wall_s=WALL_S)
    other.happens(state("long ago"), wall_s=WALL_S - 100)
    other.happens(state("meanwhile"), wall_s=WALL_S + 100)
    with OnTerminal(argv(world)) as terminal:
        terminal.until(lambda t: "seen by n1" in t and "first" in t, "n1's events")
        trio.from_thread.run_sync(lambda: agent.app.__class__ and _end(agent), trio_token=agent._token)
        text = terminal.until(lambda t: "seen by n2" in t and "meanwhile" in t, "n2's events")
        assert "first" in text
        assert "long ago" not in text, "only what is newer than what was shown"
        other.happens(state("now"), wall_s=WALL_S + 200)
        terminal.until(lambda t: "now on" in t, "what happens on n2")
        assert terminal.model.wrong == []


def _end(agent: Agent) -> None:
    """From here on this agent refuses everybody."""
    for reader in list(agent.app.readers._readers):  # type: ignore[union-attr]
        reader._close(1001, "the agent stops")

    class Gone(App):
        def upgrade(self, request: Any) -> Any:
            from pgha.rest.wire import text_response

            return text_response(503, "gone")

    agent.app.__class__ = Gone


# --- lines and once ----------------------------------------------------------------------------------------------------------


class Lines:
    """`ctl watch` with its output in a pipe."""

    def __init__(self, world: World, *arguments: str) -> None:
        self.process = subprocess.Popen(argv(world, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def following(self, node: str) -> None:
        assert self.process.stderr is not None
        assert self.process.stderr.readline() == f"pgha: following the events of {node}\n"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        code = self.process.wait(10)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def test_lines_for_a_pipe(world: World, agent: Agent) -> None:
    agent.happens(state("before"))
    lines = Lines(world)
    lines.following("n1")
    agent.happens(state("now"))
    assert lines.line().endswith(" n1 role: primary, now on timeline 2\n")
    assert lines.end() == DONE


def test_json_has_one_event_a_line(world: World, agent: Agent) -> None:
    lines = Lines(world, "--format", "json", "--kinds", "lock,agent")
    lines.following("n1")
    agent.happens(state("now"))
    agent.happens(LockEvent(what="taken", holder="n1", epoch=3))
    assert json.loads(lines.line()) == {"id": "r1-2", "at": "2026-11-23T00:46:48.500Z", "node": "n1", "kind": "lock", "what": "taken", "holder": "n1", "was": "", "epoch": 3, "age_s": None,
                                        "why": ""}
    assert lines.end(signal.SIGTERM) == -signal.SIGTERM


def test_nobody_reads_the_lines_any_more(world: World, agent: Agent) -> None:
    lines = Lines(world)
    lines.following("n1")
    assert lines.process.stdout is not None
    assert lines.process.stderr is not None
    lines.process.stdout.close()
    until_s = time.monotonic() + 10
    while lines.process.poll() is None:
        assert time.monotonic() < until_s
        agent.happens(state("x"))
        time.sleep(0.05)
    assert lines.process.returncode == 1
    assert "Traceback" not in lines.process.stderr.read()
    lines.process.stderr.close()


def test_once(world: World, agent: Agent) -> None:
    for number in range(25):
        agent.happens(state(f"s{number}"))
    code, out, err = world.ctl("watch", "--once")
    assert (code, err) == (DONE, "")
    assert out.startswith("+ Cluster: bench (")
    assert [text.rpartition("primary, ")[2] for text in out.splitlines()[7:]] == [f"s{n} on timeline 2" for n in range(5, 25)]
    code, out, _ = world.ctl("watch", "--once", "-f", "json")
    assert [json.loads(text)["id"] for text in out.splitlines()] == [f"r1-{n}" for n in range(1, 26)]
    assert world.ctl("watch", "--once", "-f", "json", "--kinds", "lock")[:2] == (DONE, "")
    for _ in range(450):
        agent.happens(state("s"))
    code, out, _ = world.ctl("watch", "--once", "-f", "json", "--kinds", "role")
    assert [json.loads(text)["id"] for text in out.splitlines()] == [f"r1-{n}" for n in range(1, 476)], "page by page"


def test_once_by_a_member_that_the_store_names(world: World, start_agent: Callable[..., tuple[str, int]]) -> None:
    world.load("steady")
    agent = Agent(start_agent, node="n3")
    for name in ("n1", "n2"):
        world.agent_at(name, ("127.0.0.1", 9))
    world.agent_at("n3", agent.address)
    agent.happens(state("here"))
    code, out, _ = world.ctl("watch", "--once")
    assert code == DONE
    assert "n3 role: primary, here" in out


def test_nobody_answers(world: World) -> None:
    world.load("steady")
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, ("127.0.0.1", 9))
    for arguments in (("watch", "--once"), ("watch", "-f", "json")):
        code, out, err = world.ctl(*arguments)
        assert (code, out) == (UNREACHABLE, "")
        assert "Connection refused" in err
    world.delete("members/n1")
    code, _, err = world.ctl("watch", "--kinds", "lock,nonsense")
    assert code == USAGE
    assert "nonsense: there are agent, configuration, decision, lag, lock, member, operation, role" in err


def test_another_clusters_agent_is_not_followed(world: World, agent: Agent) -> None:
    for arguments in (("--once",), ("-f", "json")):
        code, out, err = world.ctl("--scope", "other", "watch", *arguments)
        assert code == UNREACHABLE
        assert out == ""


def test_over_tls_with_a_clients_certificate(world: World, start_agent: Callable[..., tuple[str, int]], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=n1",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    agent = Agent(start_agent, ssl_context=make_context(certfile=str(cert), keyfile=str(key), cafile=str(cert), verify_client="required"))
    world.load("steady")
    agent.happens(state("before"))
    listen = f'[restapi]\nlisten = "{agent.address[0]}:{agent.address[1]}"\ncertfile = "{cert}"\n[ctl]\ncacert = "{cert}"\n'
    world.extra = f'{listen}certfile = "{cert}"\nkeyfile = "{key}"\n'
    code, out, _ = world.ctl("watch", "--once")
    assert (code, out.splitlines()[-1].endswith("n1 role: primary, before on timeline 2")) == (DONE, True)
    lines = Lines(world)
    lines.following("n1")
    agent.happens(state("now"))
    assert lines.line().endswith(" n1 role: primary, now on timeline 2\n")
    assert lines.end() == DONE
    world.extra = listen        # without its certificate nobody is let in
    for arguments in (("--once",), ("-f", "json")):
        assert world.ctl("watch", *arguments)[0] == UNREACHABLE


# --- words -------------------------------------------------------------------------------------------------------------------


def test_every_kind_has_words_and_is_known_to_both_sides() -> None:
    assert set(KINDS) == set(events_.KINDS)
    kinds = {cls.__struct_config__.tag for cls in events_.Event.__subclasses__()}
    assert kinds == {*KINDS, "hello", "gap"}


@pytest.mark.parametrize(("event", "text"), [
    ({"kind": "decision", "situation": "leading", "summary": "no action", "paused": True}, "leading (PAUSE): no action"),
    ({"kind": "role", "role": "primary", "state": "running", "timeline": 2, "was_role": "replica", "was_state": "running"}, "primary, running on timeline 2 (was replica, running)"),
    ({"kind": "lock", "what": "lost", "holder": "n2", "was": "n1", "why": ""}, "n1 has lost the lock to n2"),
    ({"kind": "lock", "what": "late", "holder": "n1", "age_s": 3.04, "why": "no answer"}, "n1 could not renew the lock for 3.0 s: no answer"),
    ({"kind": "lock", "what": "holder", "holder": "", "was": "n1", "why": ""}, "nobody holds the lock (before: n1)"),
    ({"kind": "lock", "what": "holder", "holder": "n2", "was": "n1", "why": "", "epoch": 4}, "n2 holds the lock, epoch 4 (before: n1)"),
    ({"kind": "lag", "member": "n2", "over": True, "lag_bytes": 5 << 20, "limit_bytes": 1 << 20}, "n2 is 5.0 MiB behind, limit 1.0 MiB"),
    ({"kind": "lag", "member": "n2", "over": False, "lag_bytes": 100 << 10, "limit_bytes": 1 << 20}, "n2 is 100 KiB behind: has caught up"),
    ({"kind": "operation", "what": "end", "operation": "Clone", "ok": False, "took_s": 9.0, "why": "no space"}, "Clone has failed after 9.0 s: no space"),
    ({"kind": "configuration", "changed": [{"key": "ttl", "was": 30, "now": 20}, {"key": "pause", "was": None, "now": True}], "more": 0}, "ttl: 30 → 20; pause: not set → true"),
    ({"kind": "member", "what": "left", "member": "n1", "was_role": "replica", "was_state": "streaming", "role": "", "state": ""}, "n1 is gone (was replica, streaming)"),
    ({"kind": "gap", "reason": "dropped", "missed": 7}, "7 events were forgotten before they could be read"),
    ({"kind": "novelty", "id": "x", "at": "y", "node": "z", "depth": 3}, "depth 3"),
    ({"kind": "lock", "what": "late"}, "what late"),
    ({"kind": "decision", "situation": "a\nb", "summary": "\x1b", "paused": False}, "a b: \\x1b"),
])
def test_words(event: dict[str, Any], text: str) -> None:
    assert words(event) == text
    assert line({**event, "at": "2026-11-23T00:46:48.500Z", "node": "n1"}).endswith(f"n1 {event['kind']}: {words(event)}")


@pytest.mark.parametrize(("text", "columns", "shown"), [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("abc", 0, ""), ("名前だ", 6, "名前だ"), ("名前だ", 5, "名前…"), ("名前だ", 4, "名…"), ("e\u0301e\u0301", 2, "e\u0301e\u0301")])
def test_what_does_not_fit_is_cut(text: str, columns: int, shown: str) -> None:
    assert fitted(text, columns) == shown
    assert width(shown) <= columns


def test_the_model_sees_what_is_wrong() -> None:
    for wrong in (b"\n" * 5, b"x" * 11, b"\x07", b"\x1b[5;5R", b"\x1b]0;title\x07", b"\xff\xff\xff\xff"):
        model = Model(10, 4)
        model.feed(b"\x1b[?1049h" + wrong)
        assert model.wrong, wrong

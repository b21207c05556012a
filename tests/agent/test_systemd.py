"""What systemd is told: over a real datagram socket, to none, and never waiting; and whether the journal listens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgha.systemd import LONGEST_STATUS, Notifier, journal_listens, notify, status, watchdog_every_s, with_priority

ROOT = Path(__file__).parents[2]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        yield sock


@pytest.fixture
def notifier(listener: socket.socket, tmp_path: Path) -> Notifier:
    listener.bind(str(tmp_path / "notify"))
    return Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})


def heard(listener: socket.socket) -> list[str]:
    """Every datagram that has arrived."""
    listener.setblocking(False)
    out = []
    try:
        while True:
            out.append(listener.recv(10_000).decode())
    except BlockingIOError:
        return out


@pytest.mark.parametrize("abstract", [False, True])
def test_what_is_said_arrives(listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool):
    name = f"pgha-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    listener.bind("\0" + name if abstract else name)
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
    assert notify("READY=1")
    assert notify("STATUS=größer")
    assert heard(listener) == ["READY=1", "STATUS=größer"]


@pytest.mark.parametrize("where", [None, "", "/nowhere/notify", "x" * 300, "@"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, where: str | None):
    if where is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", where)
    assert notify("READY=1") is False
    Notifier({} if where is None else {"NOTIFY_SOCKET": where}).say("READY=1")


def test_a_full_queue_delays_nobody(listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listener.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    begun = time.monotonic()
    assert not all(notify("WATCHDOG=1") for _ in range(10_000))
    assert time.monotonic() - begun < 5
    assert listener.recv(100) == b"WATCHDOG=1"
    assert notify("WATCHDOG=1"), "as soon as there is room"


@pytest.mark.parametrize(("said", "sent"), [
    pytest.param(["READY=1\nSTATUS=a", "READY=1\nSTATUS=a"], ["READY=1\nSTATUS=a"], id="once"),
    pytest.param(["READY=1\nSTATUS=a", "READY=1\nSTATUS=b"], ["READY=1\nSTATUS=a", "STATUS=b"], id="what has changed"),
    pytest.param(["READY=1\nSTATUS=a", "STOPPING=1\nSTATUS=a", "STOPPING=1\nSTATUS=b"], ["READY=1\nSTATUS=a", "STOPPING=1", "STATUS=b"], id="stopping"),
    pytest.param(["READY=1", "WATCHDOG=1", "WATCHDOG=1"], ["READY=1", "WATCHDOG=1", "WATCHDOG=1"], id="a sign of life is always news"),
])
def test_only_what_is_new_is_sent(notifier: Notifier, listener: socket.socket, said: list[str], sent: list[str]):
    for state in said:
        notifier.say(state)
    assert heard(listener) == sent


def test_a_reload_is_over_with_the_next_ready(notifier: Notifier, listener: socket.socket):
    """With the clock that Type=notify-reload compares: a READY=1 is that of this reload only if its time is later."""
    notifier.say("READY=1\nSTATUS=a")
    for _ in range(2):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        notifier.say("RELOADING=1")
        notifier.say("READY=1\nSTATUS=a")
        reloading, ready = heard(listener)[-2:]
        first, usec = reloading.split("\n")
        assert (first, ready) == ("RELOADING=1", "READY=1")
        assert before <= int(usec.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_what_a_full_queue_did_not_take_is_said_later(notifier: Notifier, listener: socket.socket, tmp_path: Path):
    """A lost READY=1 would have systemd end an agent that is well."""
    while notify("WATCHDOG=1", str(tmp_path / "notify")):
        pass
    notifier.say("READY=1\nSTATUS=a")
    assert "READY=1" not in "".join(heard(listener))
    notifier.say("READY=1\nSTATUS=b")
    assert heard(listener) == ["READY=1\nSTATUS=b"]


@pytest.mark.parametrize(("text", "line"), [
    ("no action. I am (n1), the leader with the lock", "STATUS=no action. I am (n1), the leader with the lock"),
    ("following n2\nREADY=1\x1b[31m", "STATUS=following n2 READY=1 [31m"),
    ("größer", "STATUS=größer"),
    ("x" * 5000, "STATUS=" + "x" * LONGEST_STATUS),
])
def test_a_status_is_one_line(text: str, line: str):
    assert status(text) == line


@pytest.mark.parametrize(("environ", "every_s"), [
    ({}, None),
    ({"WATCHDOG_USEC": "60000000"}, 30.0),
    ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
    ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
    ({"WATCHDOG_USEC": "0"}, None),
    ({"WATCHDOG_USEC": "soon"}, None),
])
def test_how_often_systemd_wants_a_sign_of_life(environ: dict[str, str], every_s: float | None):
    assert watchdog_every_s(environ) == every_s


# --- the journal -----------------------------------------------------------------------------------------------------

LOGS = """
import logging, sys
from pgha.log import Log, set_up
set_up(level="DEBUG", form=sys.argv[1], static={"scope": "demo"})
log = Log("pgha.test")
log.debug("d"); log.info("promoted", timeline=8); log.warning("w", why="a\\nb"); log.error("e"); logging.getLogger("x").critical("c")
try:
    raise ValueError("no")
except ValueError:
    log.exception("failed")
"""
GUARD_LOGS = """
from pgha.lock.guard_system import Log
log = Log()
log("INFO", "guard_runs", why="no server runs"); log("ERROR", "fenced", why="a\\nb")
log.flush(5)
"""


def lines_of(script: str, *arguments: str, journal: bool) -> list[str]:
    """What a process writes whose standard error is a stream socket, as the journal's is; `journal`: and is said to be it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        found = os.fstat(theirs.fileno())
        stream = f"{found.st_dev}:{found.st_ino if journal else found.st_ino + 1}"
        subprocess.run([sys.executable, "-c", script, *arguments], stderr=theirs, env={"PYTHONPATH": str(ROOT), "JOURNAL_STREAM": stream}, timeout=30, check=True)
        theirs.close()
        text = b""
        while chunk := ours.recv(65536):
            text += chunk
    return text.decode().splitlines()


def test_the_journal_gets_priorities_and_no_time():
    lines = lines_of(LOGS, "plain", journal=True)
    assert lines[:5] == ["<7>DEBUG d", "<6>INFO promoted timeline=8", r'<4>WARNING w why="a\nb"', "<3>ERROR e", "<2>CRITICAL c"]
    assert lines[5] == "<3>ERROR failed"
    assert lines[-1] == "<3>ValueError: no"
    assert all(line.startswith("<3>") for line in lines[5:]), "each line is an entry of its own"


def test_json_in_the_journal():
    lines = lines_of(LOGS, "json", journal=True)
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>", "<3>"]
    event = json.loads(lines[1].removeprefix("<6>"))
    assert event.pop("time")
    assert event == {"level": "INFO", "event": "promoted", "scope": "demo", "timeline": 8}
    assert "ValueError: no" in json.loads(lines[-1].removeprefix("<3>"))["traceback"], "one line"


@pytest.mark.parametrize("form", ["plain", "json"])
def test_who_only_inherits_the_variable_writes_as_ever(form: str):
    """A child of a service whose output goes to a file, or a shell below one."""
    assert not [line for line in lines_of(LOGS, form, journal=False) if line.startswith("<")]
    if form == "plain":
        assert lines_of(LOGS, form, journal=False)[1].endswith(" INFO promoted timeline=8")


def test_the_guards_own_log():
    assert lines_of(GUARD_LOGS, journal=True) == ['<6>INFO guard_runs why="no server runs"', r'<3>ERROR fenced why="a\nb"']
    timed = lines_of(GUARD_LOGS, journal=False)
    assert [line[23:] for line in timed] == [' INFO guard_runs why="no server runs"', r' ERROR fenced why="a\nb"']


def test_a_wrong_configuration_is_an_error_to_the_journal(tmp_path: Path):
    script = f"import sys; from pgha.__main__ import main; main(['run', {str(tmp_path / 'none.toml')!r}])"
    lines = lines_of(script, journal=True)
    assert lines
    assert all(line.startswith("<3>pgha: ") for line in lines), lines


@pytest.mark.parametrize("stream", ["", "8", "8:", ":", "a:b", "0:0"])
def test_no_journal(stream: str):
    assert not journal_listens({"JOURNAL_STREAM": stream})
    assert not journal_listens({"JOURNAL_STREAM": stream}, descriptor=10_000)


def test_a_level_of_somebody_elses_is_a_notice():
    assert with_priority("a\nb", "NOTICE") == "<5>a\n<5>b"

"""What is logged: one line an event, and no secret, whoever put it into which text."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgha.log import Log, scrub, set_up

ROOT = Path(__file__).parents[2]
SECRET = "geheim"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(act, *, form: str = "plain", **more) -> str:
    out = io.StringIO()
    set_up(stream=out, form=form, **more)
    act(Log("pgha.test"))
    return out.getvalue()


KEPT_SECRET = [
    "host=db user=u password=geheim dbname=x", "password='geheim' host=db", r"password='ge\'geheim' host=db", "PASSWORD=geheim", "sslpassword=geheim",
    "postgres://u:geheim@db:5432/x", "postgresql://u:geheim@[::1]/x", "http://admin:geheim@10.0.0.1:8008/patroni", "postgres://:geheim@db/x", "postgres://db/x?password=geheim&sslmode=require",
    "two: postgres://a:geheim@x/ and postgres://b:geheim@y/", "PGPASSWORD=geheim psql",
]
LEAKS = [
    "host=db password = geheim", "host=db password= 'geheim'", '{"password": "geheim"}', "{'password': 'geheim'}", "postgres://u:ge@geheim@db/x", "postgres://u:ge/geheim@db/x",
    'password="x geheim"', "password='it''s geheim'", "Authorization: Basic geheim",
]


@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize("text", [*KEPT_SECRET, *(pytest.param(text) for text in LEAKS)])
def test_no_secret_gets_out(text: str, form: str):
    def fail(log: Log) -> None:
        log.info("connecting", conninfo=text)
        event = f"connecting to {text}"
        log.warning(event)
        try:
            raise OSError(f"could not connect: {text}")
        except OSError:
            log.exception("no connection", why=text)

    out = logged(fail, form=form)
    assert SECRET not in out
    assert "no connection" in out
    assert SECRET not in scrub(text)


@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize("key", ["password", "PASSWD", "superuser_password", "token", "ctl_secret", "private_key", "keyfile_password"])
def test_what_a_key_calls_secret_is_never_shown(key: str, form: str):
    out = logged(lambda log: log.info("set", **{key: SECRET, "other": 5}), form=form)
    assert SECRET not in out
    assert "***" in out


@pytest.mark.parametrize("case", ["nested", "in a list", "foreign"])
def test_other_ways_out(case: str):
    def act(log: Log) -> None:
        if case == "nested":
            log.info("configuration", authentication={"replication": {"username": "r", "password": SECRET}})
        elif case == "in a list":
            log.info("connecting", all=[r"password='ge\'geheim' host=db"])
        else:
            logging.getLogger("psycopg").warning("lost the connection to %s", "host=db password=geheim")

    assert SECRET not in logged(act)


def test_a_chained_exception_is_scrubbed_as_a_whole():
    def act(log: Log) -> None:
        try:
            try:
                raise ValueError("password=geheim")
            except ValueError as error:
                raise OSError("postgres://u:geheim@db/x") from error
        except OSError:
            log.exception("failed")

    out = logged(act)
    assert SECRET not in out
    assert "ValueError: password=***" in out
    assert "The above exception was the direct cause" in out


def test_what_is_no_secret_is_kept():
    for text in ("host=db user=u dbname=x", "http://10.0.0.1:8008/patroni", "postgres://db:5432/x", "passfile=/run/pgpass", "10:30:00 a@b"):
        assert scrub(text) == text


def test_a_plain_line():
    out = logged(lambda log: log.info("promoted", timeline=8, took_s=1.23456, why="a b", empty="", text='say "x"', lines="a\nb"))
    assert out.count("\n") == 1, "one event, one line"
    assert out.rstrip().endswith(r'INFO promoted timeline=8 took_s=1.235 why="a b" empty="" text="say \"x\"" lines="a\nb"')


def test_a_json_line():
    line = json.loads(logged(lambda log: log.info("promoted", timeline=8, ok=True, none=None, what=OSError("x")), form="json", static={"node": "a"}))
    assert line.pop("time")
    assert line == {"level": "INFO", "event": "promoted", "node": "a", "timeline": 8, "ok": True, "none": None, "what": "x"}


def test_levels():
    def act(log: Log) -> None:
        log.debug("d")
        log.info("i")
        logging.getLogger("httpx").info("noise")
        Log("pgha.other").debug("wanted")

    out = logged(act, loggers={"pgha.other": "DEBUG"})
    logging.getLogger("pgha.other").setLevel(logging.NOTSET)
    assert [word for word in ("d\n", " i\n", "noise", "wanted") if word in out.replace("wanted\n", "wanted ")] == [" i\n", "wanted"]


# --- who does not read ------------------------------------------------------------------------------------------------

STUCK = """
import sys, time
from pgha.log import Log, set_up
for _ in range(2):
    set_up(max_lines=1000)      # a reload goes on with the same thread
log = Log("pgha.test")
begun = time.monotonic()
for number in range(5000):
    log.info("a line", number=number, filling="x" * 100)
print(time.monotonic() - begun, flush=True)
sys.stdin.readline()
import logging, threading
logging.getLogger().handlers[0].flush()
log.warning("read again")
print([t.name for t in threading.enumerate()], flush=True)
"""


def test_a_log_that_nobody_reads_delays_nobody():
    """A pipe holds 64 KiB: what follows is kept up to a bound, then counted."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    assert float(process.stdout.readline()) < 5
    out, err = process.communicate("\n", timeout=30)
    lines = err.splitlines()
    numbers = [int(line.split("number=")[1].split()[0]) for line in lines if "number=" in line]
    assert numbers == sorted(numbers)
    assert numbers[:1000] == list(range(1000))
    assert lines[-1].endswith("WARNING read again"), "also what was said just before the end"
    lost = [int(line.split("lines=")[1]) for line in lines if "lines of the log were lost" in line]
    assert len(numbers) + sum(lost) == 5000
    assert lost
    assert out.strip() == "['MainThread', 'log']"


def test_a_standard_error_that_is_closed_ends_nobody():
    script = "import os\nfrom pgha.log import Log, set_up\nset_up(max_lines=10)\nos.close(2)\nfor _ in range(20): Log('a').info('a')\nprint('on')"
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=30, env={"PYTHONPATH": str(ROOT)}, check=True).stdout == "on\n"


def test_a_logger_that_is_named_no_more_is_as_the_others_again():
    """A reload: DEBUG for one logger was meant for a while."""
    set_up(stream=io.StringIO(), loggers={"pgha.rest": "DEBUG", "httpx": "DEBUG"})
    assert (logging.getLogger("pgha.rest").level, logging.getLogger("httpx").level) == (logging.DEBUG, logging.DEBUG)
    set_up(stream=io.StringIO(), loggers={"pgha.dcs": "ERROR"})
    assert (logging.getLogger("pgha.rest").level, logging.getLogger("httpx").level) == (logging.NOTSET, logging.WARNING)
    set_up(stream=io.StringIO())
    assert logging.getLogger("pgha.dcs").level == logging.NOTSET

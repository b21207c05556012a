"""What is logged: one line an event, and no secret, whoever put it into which text."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from pgha.log import Log, scrub, set_up

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

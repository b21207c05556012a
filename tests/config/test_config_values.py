"""One value: what may be written, what it means, and that a secret stays one."""

from __future__ import annotations

import copy
import pickle

import msgspec
import pytest

from pgha.config.addresses import Address, Listen, address, addresses, listen, url
from pgha.config.lists import program_options, texts
from pgha.config.values import Secret, Wrong, boolean, choice, duration, integer, shown, size


@pytest.mark.parametrize(("kind", "value", "means"), [
    (duration(), 30, 30.0), (duration(), "30", 30.0), (duration(), "30s", 30.0), (duration(), "1min", 60.0), (duration(), " 2 h ", 7200.0),
    (duration(), "1.5s", 1.5), (duration(), "250ms", 0.25), (duration(), "1d", 86400.0), (duration(whole=True), "2000ms", 2.0), (duration(), 0, 0.0),
    (size(), "1MB", 1 << 20), (size(), "2kB", 2048), (size(), 1048576, 1048576), (size(), "1GB", 1 << 30), (size(-1), -1, -1),
    (integer(), "7", 7), (integer(), 7.0, 7),
    (choice("off", "on", "quorum", also={False: "off", True: "on"}), True, "on"), (choice("off", "on", also={False: "off", True: "on"}), "no", "off"),
    (choice("off", "automatic", also={False: "off"}), False, "off"), (choice("INFO", "DEBUG"), "debug", "DEBUG"),
    (texts(), "a, b,,c", ("a", "b", "c")), (texts(), ["a,b"], ("a,b",)),
    (program_options(program="initdb"), ["data-checksums", {"encoding": "UTF8"}, "--locale=C"], (("data-checksums", None), ("encoding", "UTF8"), ("locale", "C"))),
    (program_options(program="pg_basebackup"), {"max-rate": "100M", "compress": "server-gzip", "verbose": True}, (("max-rate", "100M"), ("compress", "server-gzip"), ("verbose", None))),
    (listen(5432), "a,b:5433", Listen(("a", "b"), 5433)), (listen(5432), "*:1", Listen(("*",), 1)), (listen(5432), "[::1]", Listen(("::1",), 5432)),
    (listen(5432), "127.0.0.1,[fe80::1%eth0]:6000", Listen(("127.0.0.1", "fe80::1%eth0"), 6000)), (listen(8008), "host_1.example", Listen(("host_1.example",), 8008)),
    (address(5432), "[2001:DB8::1]:5433", Address("2001:db8::1", 5433)),
    (addresses(2379), "a:1, b", (Address("a", 1), Address("b", 2379))), (addresses(2379), ["a:1"], (Address("a", 1),)),
    (url("http", "https", default_port=2379), "https://etcd.example", "https://etcd.example:2379"),
])
def test_means(kind, value, means):
    parsed = kind.parse(value)
    assert parsed == means
    assert type(parsed) is type(means)


@pytest.mark.parametrize(("kind", "value", "what"), [
    (duration(), "30 parsec", 'is "30 parsec", whose unit is none of us, ms, s, min, h, d'), (duration(), True, "is true, not a number"),
    (duration(3), 2, "is 2 s, below the minimum"), (duration(1, 60), "2min", "is 120 s, above the maximum"), (duration(), "", 'is "", not a number'),
    (duration(), float("nan"), "is nan, not a number"), (duration(), float("inf"), "is inf, not a number"), (duration(), 10**400, "is far too large"),
    (duration(), "9" * 5000, "far too long a number"), (duration(whole=True), "1.5s", 'is "1.5s", not whole seconds'), (duration(), "12000d", "more than ten years"),
    (duration(), [30], "is a list, not a number"), (size(0), -1, "is -1 bytes, below the minimum"), (size(), "0.3B", "not whole bytes"),
    (integer(), "1MB", 'is "1MB", not a plain number'), (integer(), 1.5, "is 1.5, not a whole number"), (integer(1), 0, "is 0, below the minimum"),
    (choice("a", "b"), "c", 'is "c"'), (choice("a"), {}, "is a table"),
    (texts(), ["a", 1], "has a number as item 2"), (texts(), 5, "is a number, not a list"), (texts(), ["a\nb"], "has a line break or a NUL in item 1"),
    (program_options("pgdata", program="initdb"), [{"pgdata": "/x"}], "has pgdata, which pgha sets itself"),
    (program_options(program="initdb"), [{"a": 1, "b": 2}], "has a table as item 1, neither a name nor one {name = value}"),
    (program_options(program="initdb"), ["-k"], "which is no long option's name"),
    (program_options(program="pg_basebackup"), ["compress=gzip"], "has compress, which needs the server's side here"),
    (listen(5432), "::1:5432", "in which an IPv6 address lacks its brackets"), (listen(5432), "a:0", "whose port is no number from 1 to 65535"),
    (listen(5432), "a:65536", "whose port is no number"), (listen(5432), "a:", "whose port is no number"), (listen(5432), "[::g]:1", 'in which "[::g]" is no IPv6 address'),
    (listen(5432), "a,,b", 'in which "" is no host'), (listen(5432), "a b", 'in which "a b" is no host'), (listen(5432), 5432, "is a number, not text"),
    (address(5432), "0.0.0.0:5432", "which is no address that others can reach"), (address(5432), "a,b", "several hosts"),
    (addresses(2379), [], "is empty"), (addresses(2379), ["a,b:1"], "which is no single host"), (addresses(2379), [5], "is a number, not text"),
    (url("http", default_port=1), "ftp://a", 'is "ftp://a"'), (url("http", default_port=1), "http://a:x", "is no URL"),
    (url("http", default_port=1), "http://u:hush@a", "has credentials in it"),
])
def test_is_wrong(kind, value, what):
    with pytest.raises(Wrong) as caught:
        kind.parse(value)
    assert what in caught.value.what
    assert "hush" not in caught.value.what


@pytest.mark.parametrize(("words", "means"), [((True, 1, "on", "Yes", "TRUE", "1"), True), ((False, 0, "off", "No", "false", "0"), False)])
def test_booleans_may_be_words(words, means):
    assert {boolean(word) for word in words} == {means}


@pytest.mark.parametrize("value", ["y", 2, None, "", [], 1.0])
def test_booleans_are_nothing_else(value):
    with pytest.raises(Wrong):
        boolean(value)


def test_listen_knows_how_this_machine_reaches_it():
    assert [Listen(hosts, 1).local_host for hosts in [("*",), ("0.0.0.0",), ("10.0.0.1", "127.0.0.1"), ("::",), ("10.0.0.1",), ()]] == \
        ["127.0.0.1", "127.0.0.1", "127.0.0.1", "::1", "10.0.0.1", ""]
    assert str(Listen(("::1", "a"), 5)) == "[::1],a:5"
    assert str(Address("::1", 5)) == "[::1]:5"


def test_a_secret_shows_itself_to_nobody_who_does_not_ask():
    secret = Secret("hush")
    assert secret.reveal() == "hush"
    for text in (str(secret), repr(secret), f"{secret}", str([secret]), str({"a": secret})):
        assert "hush" not in text
    for leak in (lambda: msgspec.json.encode(secret), lambda: pickle.dumps(secret), lambda: copy.deepcopy(secret)):
        with pytest.raises(TypeError):
            leak()
    assert secret == Secret("hush") != Secret("other")
    assert not Secret("")


def test_shown_hides_credentials():
    assert shown("postgres://me:hush@host/db") == '"***@host/db"'
    assert "hush" not in shown("host=a password=hush")
    assert len(shown("x" * 1000)) < 100

"""How each of the three users connects is the same for our own connections, for programs and for the walreceiver; secrets only for our own."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from act_bed import Bed
from psycopg.conninfo import conninfo_to_dict

from pgha.act.wanted import Wanted
from pgha.config.load import effective
from pgha.config.local import LocalConfig, PostgresUser
from pgha.config.rules import finish
from pgha.config.schema import Key, Report, fields, read
from pgha.model.action import Source

SOURCE = Source(name="n2", host="10.0.0.2", port=5433)
#: Every keyword that the schema has, with a value that needs quoting where one may.
KEYWORDS = {"sslmode": "verify-full", "sslkey": "/k 'x", "sslcert": "/c", "sslrootcert": "/r & =", "sslcrl": "/l", "sslcrldir": "/d", "sslnegotiation": "postgres",
            "gssencmode": "disable", "channel_binding": "require"}
NO_KEYWORDS = {"username", "password", "password_file", "sslpassword"}


@pytest.fixture
def wanted(bed: Bed) -> Wanted:
    data_dir = bed.path / "n1" / "data"
    data_dir.mkdir(parents=True)
    user = {"password": "hush", **KEYWORDS}
    raw: dict[str, Any] = {
        "scope": "s", "name": "n1", "etcd3": {"host": "127.0.0.1:1"}, "restapi": {"listen": "127.0.0.1:1"},
        "postgresql": {"listen": "127.0.0.1:1", "data_dir": str(data_dir), "krbsrvname": "pg", "authentication": {
            "superuser": {"username": "su", "sslpassword": "hush", **user}, "replication": {"username": "rep", **user}, "rewind": {"username": "rew", **user}}},
    }
    report = Report("test")
    local = finish(read(LocalConfig, raw, (), report), report)
    assert not report.problems
    return Wanted(effective=lambda: effective(local, None), passfile=data_dir.parent / "pgpass")


def test_every_keyword_of_the_schema_is_tried_here() -> None:
    assert {field.name for field in fields(PostgresUser) if isinstance(field.key, Key)} == NO_KEYWORDS | KEYWORDS.keys()


@pytest.mark.parametrize("which", ["superuser", "replication", "rewind"])
def test_the_same_keywords_for_everybody_and_secrets_for_none_but_us(wanted: Wanted, which: Any) -> None:
    same = {**KEYWORDS, "krbsrvname": "pg"}
    own, local, program = wanted.source_conninfo(SOURCE, which), wanted.local_conninfo(), wanted.program_conninfo(SOURCE, which)
    for conninfo in (own, local, program):
        assert same.items() <= conninfo.items()
    assert (own["password"], own.get("sslpassword")) == ("hush", "hush" if which == "superuser" else None)
    assert "hush" not in repr(program)


def test_the_walreceiver_connects_as_the_replication_user_does(wanted: Wanted) -> None:
    wanted.follow(SOURCE, "")
    text = wanted.recovery()["primary_conninfo"]
    parts = conninfo_to_dict(text) if psycopg.pq.version() >= 170000 else conninfo_to_dict(text.replace("sslnegotiation=postgres", ""))
    assert {k: v for k, v in KEYWORDS.items() if k != "sslnegotiation"}.items() | {("krbsrvname", "pg"), ("user", "rep")} <= parts.items()
    assert "sslnegotiation=postgres" in text and "hush" not in text

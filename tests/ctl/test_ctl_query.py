"""`ctl query`: SQL on the member that is meant, its results in every format, passwords never where others see them."""

from __future__ import annotations

import ast
import json
import os
import pty
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ctl_world import World

from pgha.ctl.query import Result, shown

ROOT = Path(__file__).parents[2]


@pytest.fixture
def at_postgres(world: World, postgres: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> World:
    """n1, the leader, is a real PostgreSQL; n2 and n3 answer nothing."""
    world.load("steady")
    for name, address in (("n1", "{}:{}".format(*postgres)), ("n2", "127.0.0.1:1"), ("n3", "127.0.0.1:1")):
        raw = json.loads(world.get(f"members/{name}"))
        world.put(f"members/{name}", {**raw, "conn_url": f"postgres://{address}/postgres"}, leased=True)
    for variable in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PGUSER", "postgres")
    monkeypatch.setenv("PGPASSWORD", "geheim")
    return world


pytestmark = [pytest.mark.etcd, pytest.mark.postgres]


@pytest.mark.parametrize(("arguments", "out", "err"), [
    (["-c", "SELECT 1 AS a, 'x' AS b"], "a\tb\n1\tx\n", ""),
    (["-c", "SELECT 1 AS a, NULL AS b", "--delimiter", ";"], "a;b\n1;\n", ""),
    (["-c", "SELECT E'two\\nlines\\tand\\x1b[31m' AS a"], "a\ntwo\\nlines\\tand\\x1b[31m\n", ""),
    (["-c", "SELECT 1 AS a; SELECT 2 AS b"], "a\n1\n\nb\n2\n", ""),
    (["-c", "SELECT 1.50 AS a, 7 AS b, 'x' AS a", "--format", "table"], "+------+---+---+\n|    a | b | a |\n+------+---+---+\n| 1.50 | 7 | x |\n+------+---+---+\n", ""),
    (["-c", "SET application_name TO 'x'"], "", "SET\n"),
    (["-c", "DO $$BEGIN RAISE NOTICE 'hear me'; END$$"], "", "NOTICE:  hear me\nDO\n"),
    (["-c", "SELECT current_user, current_database()", "-d", "template1"], "current_user\tcurrent_database\npostgres\ttemplate1\n", ""),
    (["-c", "SELECT 1 AS a", "-m", "n1"], "a\n1\n", ""),
    (["-c", "SELECT 1 AS a", "--any"], "a\n1\n", ""),
    (["-c", "SELECT count(*) AS a FROM pg_stat_activity WHERE application_name = 'pgha ctl' AND query LIKE '%geheim%'"], "a\n1\n", ""),
])
def test_results_go_to_standard_output_and_all_else_to_standard_error(at_postgres: World, arguments: list[str], out: str, err: str) -> None:
    assert at_postgres.ctl("query", *arguments) == (0, out, err)


EVERYTHING = ("SELECT true AS bool, 7 AS int, 9007199254740993 AS bigint, 1.5::float8 AS float, 'NaN'::float8 AS nan, 1.50 AS numeric, "
              "'{\"a\": [1]}'::jsonb AS json, NULL AS none, 'text' AS text, 'again' AS text")


def test_json_has_numbers_truth_and_null_as_such(at_postgres: World) -> None:
    code, out, _ = at_postgres.ctl("query", "--format", "json", "-c", EVERYTHING)
    assert code == 0
    expected = {"bool": True, "int": 7, "bigint": 9007199254740993, "float": 1.5, "nan": "NaN", "numeric": "1.50", "json": {"a": [1]},
                "none": None, "text": "text", "text_2": "again"}
    assert json.loads(out) == [expected]
    code, out, _ = at_postgres.ctl("query", "--format", "toml", "-c", EVERYTHING + "; SELECT 1 AS a")
    assert tomllib.loads(out) == {"rows": [{k: v for k, v in expected.items() if v is not None}], "rows_2": [{"a": 1}]}


def test_a_script_from_a_file_or_standard_input(at_postgres: World, tmp_path: Path) -> None:
    script = tmp_path / "script.sql"
    script.write_text("CREATE TEMPORARY TABLE t (x int);\nINSERT INTO t VALUES (1), (2);\nSELECT sum(x) AS sum, '100%' AS percent FROM t;\n")
    assert at_postgres.ctl("query", "-f", str(script)) == (0, "sum\tpercent\n3\t100%\n", "CREATE TABLE\nINSERT 0 2\n")
    done = in_a_process(at_postgres, "query", "-f", "-", stdin="SELECT 'ü' AS x")
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\nü\n", "")


@pytest.mark.parametrize(("arguments", "code", "err"), [
    (["-c", "SELECT * FROM nothing"], 1, 'ERROR, SQLSTATE: 42P01\npgha: relation "nothing" does not exist\npgha: LINE 1: SELECT * FROM nothing'),
    (["-c", "COPY pg_database TO STDOUT"], 1, "COPY cannot be used"),
    (["-c", "SELECT pg_terminate_backend(pg_backend_pid())"], 4, "the connection was lost, and whether it was done is not known: terminating connection"),
    (["-c", "SELECT 1", "-U", "nobody"], 1, "No connection to role leader is available:\npgha:   n1: connection failed: "),
    (["-c", "SELECT 1", "-r", "replica"], 5, "No connection to role replica is available:\npgha:   n2: connection failed: "),
    (["-c", "SELECT 1", "-m", "n2"], 5, "No connection to member n2 is available:\npgha:   n2: connection failed: "),
    (["-c", "SELECT 1", "-m", "n1", "-r", "leader"], 2, "--role and --member are mutually exclusive options"),
    (["-c", "SELECT 1", "-f", "x"], 2, "--file and --command are mutually exclusive options"),
    ([], 2, "You need to specify either --command or --file"),
    (["-c", "SELECT 1", "--format", "json", "--delimiter", ","], 2, "--delimiter is for --format tsv, not for json"),
    (["-c", "SELECT 1", "--password"], 2, "there is no terminal to ask for the password on; allowed: --password-file FILE, PGPASSWORD, PGPASSFILE"),
    (["-c", "SELECT 1", "--password-file", "/nonexistent"], 2, "/nonexistent: cannot be read: No such file or directory"),
    (["-f", "/dev/zero"], 2, "/dev/zero: is longer than 67108864 bytes"),
])
def test_failures_are_told_apart(at_postgres: World, arguments: list[str], code: int, err: str) -> None:
    got, out, errors = at_postgres.ctl("query", *arguments)
    assert (got, out) == (code, "")
    assert err in errors
    assert "geheim" not in errors


def test_what_is_meant_for_a_replica_never_reaches_a_primary(at_postgres: World, postgres: tuple[str, int]) -> None:
    """The store says that it is a replica, the server that it is not."""
    raw = json.loads(at_postgres.get("members/n2"))
    at_postgres.put("members/n2", {**raw, "conn_url": "postgres://{}:{}/postgres".format(*postgres)}, leased=True)
    code, out, err = at_postgres.ctl("query", "-r", "replica", "-c", "SELECT 1")
    assert (code, out) == (5, "")
    assert "n2: is not in recovery, although it does not lead" in err
    assert at_postgres.ctl("query", "-m", "n2", "-c", "SELECT 1 AS a")[:2] == (0, "a\n1\n")


def test_several_statements_are_one_transaction(at_postgres: World) -> None:
    assert at_postgres.ctl("query", "-c", "CREATE TABLE half (x int); SELECT 1/0")[0] == 1
    assert at_postgres.ctl("query", "-c", "SELECT to_regclass('half') IS NULL AS gone") == (0, "gone\nt\n", "")


def test_the_password_comes_from_a_file_that_nobody_else_reads(at_postgres: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", "/nonexistent")
    code, _, err = at_postgres.ctl("query", "-c", "SELECT 1")
    assert code == 1
    assert "password" in err
    file = tmp_path / "password"
    file.write_text("geheim\n")
    file.chmod(0o640)
    code, _, err = at_postgres.ctl("query", "-c", "SELECT 1", "--password-file", str(file))
    assert (code, err) == (2, f"pgha: {file}: others may read or write it (mode 0640); allowed: 0600\n")
    file.chmod(0o600)
    assert at_postgres.ctl("query", "-c", "SELECT 1 AS a", "--password-file", str(file)) == (0, "a\n1\n", "")
    passfile = tmp_path / "pgpass"
    passfile.write_text("*:*:*:*:geheim\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    assert at_postgres.ctl("query", "-c", "SELECT 1 AS a")[:2] == (0, "a\n1\n")


def program(world: World, *arguments: str) -> list[str]:
    world.write_config()
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pgha.ctl import main; sys.exit(main(sys.argv[1:]))",
            "-c", str(world.config), *arguments]


def in_a_process(world: World, *arguments: str, stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program(world, *arguments), input=stdin, capture_output=True, text=True, timeout=30, check=False)


def test_a_typed_password_is_not_shown(at_postgres: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGPASSWORD")
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(program(at_postgres, "query", "-c", "SELECT 1 AS a", "--password"), stdin=theirs, stdout=subprocess.PIPE,
                              stderr=theirs, start_new_session=True) as process:
            screen = b""
            while b"Password: " not in screen:
                screen += os.read(ours, 1024)
            os.write(ours, b"geheim\n")
            out, _ = process.communicate(timeout=30)
            os.set_blocking(ours, False)
            try:
                screen += os.read(ours, 65536)
            except BlockingIOError:
                pass
    finally:
        os.close(ours)
        os.close(theirs)
    assert (process.returncode, out) == (0, b"a\n1\n"), screen
    assert b"geheim" not in screen


def test_only_query_loads_psycopg() -> None:
    """It costs 100 ms, and every other command goes without."""
    found: set[str] = set()
    for path in (ROOT / "pgha/ctl").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "psycopg" or name.startswith("pgha.postgres") for name in names):
                found.add(path.name)
    assert found == {"query.py"}


@pytest.mark.parametrize(("results", "form", "out"), [
    ([], "json", ""), ([], "tsv", ""), ([], "table", ""), ([], "toml", ""),
    ([Result(("a",), (25,), [])], "json", "[]"),
    ([Result(("a",), (25,), [])], "tsv", "a"),
    ([Result((), (), [()])], "json", "[{}]"),
    ([Result(("a", "a_2", "a"), (25, 25, 25), [("1", "2", "3")])], "json", '[{"a": "1", "a_2": "2", "a_3": "3"}]'),
])
def test_odd_results(results: Any, form: str, out: str) -> None:
    assert shown(results, form) == out

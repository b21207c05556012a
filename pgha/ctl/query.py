"""`ctl query`: one SQL script on the leader, or on another member; its results on standard output, all else on standard error.

The only command of ctl that loads psycopg. Passwords come by prompt, file, or libpq's own ways (PGPASSWORD, PGPASSFILE,
~/.pgpass), never from arguments. Each time anew: when watching, the next look asks the store who leads now.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import FAILED, UNKNOWN, UNREACHABLE, USAGE, End
from pgha.ctl.member import meant, one_option
from pgha.ctl.output import Column, plain, table, to_toml
from pgha.ctl.prompt import secret
from pgha.ctl.settings import Settings
from pgha.ctl.watch import repeated

if TYPE_CHECKING:
    import psycopg

#: for each member that is tried
CONNECT_S = 5
#: the largest script and password file that are read
_SCRIPT_BYTES, _PASSWORD_BYTES = 64 << 20, 64 << 10
_DATABASE = re.compile(r"\w+://[^/?#]*/([\w.-]+)")

# Types by their numbers, which are part of PostgreSQL's catalogue and do not change.
_BOOL, _INTEGERS, _FLOATS, _NUMERIC, _JSON = 16, (20, 21, 23, 26), (700, 701), 1700, (114, 3802)


class Result(NamedTuple):
    """What one statement returned; values as PostgreSQL writes them, null as None."""

    columns: tuple[str, ...]
    types: tuple[int, ...]
    rows: list[tuple[str | None, ...]]


def run(settings: Settings, given: argparse.Namespace) -> int:
    one_option(given)
    if given.file is not None and given.command_text is not None:
        raise End(USAGE, "--file and --command are mutually exclusive options")
    if given.delimiter is not None and given.format != "tsv":
        raise End(USAGE, f"--delimiter is for --format tsv, not for {given.format}")
    script = _script(given)
    options = {name: value for name, value in (("user", given.username), ("dbname", given.dbname), ("password", _password(given))) if value}

    def look() -> str:
        cluster = clusters.read_or_ask(settings)
        with _connected(cluster, given, options) as connection:
            return shown(_results(connection, script), given.format, delimiter=given.delimiter or "\t")

    return repeated(given.watch, look, clear=False)


def _script(given: argparse.Namespace) -> bytes:
    if given.command_text is not None:
        script: bytes = given.command_text.encode(errors="surrogateescape")
    elif given.file is not None:
        script = _contents(given.file, _SCRIPT_BYTES)
    else:
        raise End(USAGE, "You need to specify either --command or --file")
    if b"\0" in script:
        raise End(USAGE, "SQL has no NUL characters: nothing was sent")
    return script


def _password(given: argparse.Namespace) -> str | None:
    if given.password:
        return secret("Password: ", allowed="--password-file FILE, PGPASSWORD, PGPASSFILE")
    if given.password_file is None:
        return None      # libpq looks where it always does
    try:
        return _contents(given.password_file, _PASSWORD_BYTES, private=True).decode().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError:
        raise End(USAGE, f"{given.password_file}: is not UTF-8") from None


def _contents(path: str, limit: int, *, private: bool = False) -> bytes:
    """Of a file, or of standard input ("-"). `private`: nobody else may be able to read it."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            mode = os.fstat(file.fileno()).st_mode
            if private and stat.S_ISREG(mode) and mode & 0o077:
                raise End(USAGE, f"{path}: others may read or write it (mode {stat.S_IMODE(mode):04o}); allowed: 0600")
            content = file.read(limit + 1)
    except OSError as error:
        raise End(USAGE, f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > limit:
        raise End(USAGE, f"{path}: is longer than {limit} bytes")
    return content


def _connected(cluster: Cluster, given: argparse.Namespace, options: dict[str, str]) -> psycopg.Connection[Any]:
    """To the first member that is what was asked for, by its own word, too. End if there is none."""
    import psycopg

    failures = []
    refused = False
    for member in meant(cluster, given):
        where: dict[str, Any] = {"dbname": os.environ.get("PGDATABASE") or _database(cluster, member["name"]), **options}
        try:
            connection = psycopg.connect(host=member["host"], port=member["port"], connect_timeout=CONNECT_S, client_encoding="utf8",
                                         fallback_application_name="pgha ctl", autocommit=True, **where)
        except psycopg.Error as error:
            failures.append(f"{member['name']}: {_one_line(error)}")
            refused = refused or "FATAL" in str(error) or "no password supplied" in str(error)
            continue
        connection.add_notice_handler(lambda notice: print(plain(f"{notice.severity}:  {notice.message_primary}"), file=sys.stderr))
        wrong = _not_as_thought(connection, member, by_name=given.member is not None)
        if not wrong:
            return connection
        connection.close()
        failures.append(f"{member['name']}: {wrong}")
    which = f"member {given.member}" if given.member is not None else f"role {'any' if given.any else given.role or 'leader'}"
    raise End(FAILED if refused else UNREACHABLE, f"No connection to {which} is available:\n  " + "\n  ".join(failures))


def _not_as_thought(connection: psycopg.Connection[Any], member: dict[str, Any], *, by_name: bool) -> str:
    """Why this PostgreSQL is not what the store says of it; "" if it is, or nobody asked. A write meant for the leader goes
    nowhere else, and what is meant for a replica burdens no primary."""
    if by_name:
        return ""
    import psycopg

    try:
        row = connection.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone()
    except psycopg.Error as error:
        return _one_line(error)
    in_recovery = row is not None and bool(row[0])
    if in_recovery == (member.get("role") != "leader"):
        return ""
    return "is in recovery, although it leads" if in_recovery else "is not in recovery, although it does not lead"


def _database(cluster: Cluster, name: str) -> str:
    """The database in the address that the member publishes."""
    match = _DATABASE.match(str(cluster.members.get(name, {}).get("conn_url")))
    return match[1] if match else "postgres"


def _results(connection: psycopg.Connection[Any], script: bytes) -> list[Result]:
    """Run it all: several statements are one transaction, unless they say otherwise. End if one fails."""
    import psycopg

    cursor = connection.cursor()
    try:
        cursor.execute(script)      # without parameters it goes as it is
        results = []
        more: bool | None = True
        while more:
            if cursor.description is None:
                print(cursor.statusmessage or "", file=sys.stderr)
            else:
                results.append(_result(cursor))
            more = cursor.nextset()
    except psycopg.Error as error:
        if connection.closed:
            raise End(UNKNOWN, f"the connection was lost, and whether it was done is not known: {_one_line(error)}") from None
        raise End(FAILED, f"ERROR, SQLSTATE: {error.sqlstate or 'none'}\n{plain(str(error))}") from None
    return results


def _result(cursor: psycopg.Cursor[Any]) -> Result:
    got = cursor.pgresult
    assert got is not None
    width = range(got.nfields)
    values = [[got.get_value(row, column) for column in width] for row in range(got.ntuples)]
    return Result(tuple((got.fname(c) or b"").decode(errors="replace") for c in width), tuple(got.ftype(c) for c in width),
                  [tuple(None if v is None else bytes(v).decode(errors="replace") for v in row) for row in values])


def shown(results: Sequence[Result], form: str, *, delimiter: str = "\t") -> str:
    """The whole output, without the last newline."""
    if form == "toml":
        return to_toml({f"rows{f'_{n}' if n > 1 else ''}": _objects(result) for n, result in enumerate(results, start=1)})
    if form == "json":
        return "\n".join(json.dumps(_objects(result)) for result in results)
    return "\n\n".join(_tsv(result, delimiter) if form == "tsv" else _table(result) for result in results)


def _objects(result: Result) -> list[dict[str, Any]]:
    names = _unique(result.columns)
    return [{name: _value(text, kind) for name, text, kind in zip(names, row, result.types, strict=True)} for row in result.rows]


def _value(text: str | None, kind: int) -> Any:
    """Truth values, whole numbers, floating-point numbers and JSON as such; all else, numeric too, to the digit as text."""
    if text is None:
        return None
    if kind == _BOOL:
        return text == "t"
    if kind in _INTEGERS:
        return int(text)
    if kind in _FLOATS and text not in ("NaN", "Infinity", "-Infinity"):
        return float(text)
    return json.loads(text) if kind in _JSON else text


def _table(result: Result) -> str:
    names = _unique(result.columns)
    right = (*_INTEGERS, *_FLOATS, _NUMERIC)
    columns = [Column(name, plain(heading), right=kind in right) for name, heading, kind in zip(names, result.columns, result.types, strict=True)]
    return table(columns, [dict(zip(names, row, strict=True)) for row in result.rows])


def _tsv(result: Result, delimiter: str) -> str:
    return "\n".join(delimiter.join(_field(value) for value in row) for row in (result.columns, *result.rows))


def _field(value: str | None) -> str:
    """One line, and nothing that a terminal would obey. Null is empty, as it is for an empty text: JSON tells them apart."""
    return plain((value or "").replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t"))


def _unique(columns: Sequence[str]) -> list[str]:
    """A name for each: the second of a name gets _2, so that none takes another's place in an object."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def _one_line(error: Exception) -> str:
    return plain(" ".join(str(error).split()))

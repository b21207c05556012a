"""One client that always writes to its own node, and remembers what was acknowledged.

Run as a process of its own: `writer.py KIND OUT SPEC`, SPEC = JSON with dsn, node, number, rate; password in PGPASSWORD.
It writes one line for each acknowledged row, at once (`history.py` has the format), and one that begins with # for each
connection that failed or broke. It ends at SIGTERM, or by SIGKILL at any moment: a row whose line is missing simply
counts as not acknowledged.

    plain      one INSERT a time, `rate` per second
    pipeline   a pipeline kept full (PostgreSQL goes on reading from its input buffer, whatever happens around it);
               acknowledged = the Sync after the row was answered, since that is its commit
    procedure  a DO block that commits in a loop; acknowledged = a NOTICE that was raised after the COMMIT

A commit that was answered together with the warning that its wait for a synchronous standby was cancelled counts as not
acknowledged. With `names` (address → node) in SPEC the client roams: the connection string names several nodes, and each
row is of the node that took it.

A frozen server is waited for without end: what it acknowledges after its thaw is exactly what must not exist.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import psycopg
from psycopg import pq

RETRY_S = 0.02

#: Not reachable, going down or coming up, a standby, a standby that has not got the table yet; else it is our mistake.
UNAVAILABLE = (psycopg.OperationalError, psycopg.InternalError, psycopg.errors.UndefinedTable)

PIPELINE_DEPTH = 2000
PROCEDURE_ROUNDS = 100000

#: What PostgreSQL says when a wait for a synchronous standby was given up: committed here, perhaps nowhere else.
CANCELLED_WAIT = re.compile(r"cancell?ing (the )?wait for synchronous replication")

#: The timeline is that of the write-ahead log which this row goes to; stamp and position precede the commit.
INSERT = """INSERT INTO traffic (id, stamp) VALUES ({}, clock_timestamp())
RETURNING (extract(epoch FROM stamp) * 1e6)::bigint, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int,
    (pg_current_wal_insert_lsn() - '0/0')::bigint"""
LIFE = "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1e6)::bigint"
PROCEDURE = """DO $$
DECLARE at timestamptz; line int; position bigint;
BEGIN
  FOR i IN 1 .. {rounds} LOOP
    at := clock_timestamp();
    INSERT INTO traffic (id, stamp) VALUES ({base} + i, at);
    line := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int;
    position := pg_current_wal_insert_lsn() - '0/0';
    COMMIT;
    RAISE NOTICE 'committed % % % %', {base} + i, (extract(epoch FROM at) * 1e6)::bigint, line, position;
  END LOOP;
END $$"""


class Writer:
    """`number` keeps ids apart: each writer has its own million of millions."""

    def __init__(self, kind: str, out: TextIO, spec: dict[str, Any]) -> None:
        self.kind = kind
        self.out = out
        self.dsn: str = spec["dsn"]
        self.node: str = spec["node"]
        self.interval_s = 1 / spec["rate"]
        self.next_id = spec["number"] * 10**12 + 1
        self.names: dict[str, str] = spec.get("names", {})
        self.life = 0
        self.wait_was_cancelled = False

    def acknowledged(self, row: int, stamp_us: int, timeline: int, lsn: int, sent_ns: int) -> None:
        ack_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        if self.wait_was_cancelled:
            self.wait_was_cancelled = False
            self.out.write(f"# {ack_ns // 1000} cancelled-wait row {row}\n")
            return
        self.out.write(f"{self.kind} {self.node} {row} {timeline} {lsn} {self.life} {stamp_us} {sent_ns // 1000} {ack_ns // 1000} {wall_ns // 1000}\n")

    def heard(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        """A warning comes before the answer to the commit that it is about."""
        if CANCELLED_WAIT.search(diagnostic.message_primary or ""):
            self.wait_was_cancelled = True

    def run(self) -> None:
        work = {"plain": self.plain, "pipeline": self.pipeline, "procedure": self.procedure}[self.kind]
        while True:
            try:
                with psycopg.connect(self.dsn, autocommit=True, connect_timeout=2, sslmode="disable", gssencmode="disable") as connection:
                    self.node = self.names.get(connection.info.host, self.node)
                    self.wait_was_cancelled = False
                    connection.add_notice_handler(self.heard)
                    self.life = connection.execute(LIFE).fetchone()[0]
                    work(connection)
            except psycopg.errors.ReadOnlySqlTransaction:
                time.sleep(RETRY_S)
            except UNAVAILABLE as error:
                self.out.write(f"# {time.monotonic_ns() // 1000} {type(error).__name__} {' '.join(str(error).split())[:200]}\n")
                time.sleep(RETRY_S)

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def plain(self, connection: psycopg.Connection[Any]) -> None:
        due = time.monotonic()
        while True:
            row, sent_ns = self.new_id(), time.monotonic_ns()
            try:
                stamp_us, timeline, lsn = connection.execute(INSERT.format("%s"), (row,)).fetchone()
            except psycopg.errors.ReadOnlySqlTransaction:
                time.sleep(RETRY_S)
                continue
            self.acknowledged(row, stamp_us, timeline, lsn, sent_ns)
            due = max(due + self.interval_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def pipeline(self, connection: psycopg.Connection[Any]) -> None:
        """By libpq's own calls: each row its own Sync, `PIPELINE_DEPTH` of them on the way."""
        server = connection.pgconn
        server.nonblocking = 1
        server.enter_pipeline_mode()
        query = INSERT.format("$1").encode()
        waiting: list[tuple[int, int]] = []
        row: tuple[int, int, int] | None = None
        while True:
            while len(waiting) < PIPELINE_DEPTH:
                fresh = self.new_id()
                server.send_query_params(query, [str(fresh).encode()])
                server.pipeline_sync()
                waiting.append((fresh, time.monotonic_ns()))
            unsent = server.flush()
            select.select([server.socket], [server.socket] if unsent else [], [])
            server.consume_input()
            while waiting and not server.is_busy():
                result = server.get_result()
                if result is None:
                    continue  # the end of one query's results
                if result.status == pq.ExecStatus.TUPLES_OK:
                    row = (int(result.get_value(0, 0) or 0), int(result.get_value(0, 1) or 0), int(result.get_value(0, 2) or 0))
                elif result.status == pq.ExecStatus.PIPELINE_SYNC:
                    number, sent_ns = waiting.pop(0)
                    if row is not None:
                        self.acknowledged(number, *row, sent_ns)
                    row = None
                elif result.status in {pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.PIPELINE_ABORTED}:
                    if result.error_field(pq.DiagnosticField.SQLSTATE) == b"25006":
                        raise psycopg.errors.ReadOnlySqlTransaction("on a standby")
                    row = None
            if server.status != pq.ConnStatus.OK:
                raise psycopg.OperationalError("the connection broke")

    def procedure(self, connection: psycopg.Connection[Any]) -> None:
        sent_ns = time.monotonic_ns()

        def notice(diagnostic: psycopg.errors.Diagnostic) -> None:
            found = re.fullmatch(r"committed (\d+) (\d+) (\d+) (\d+)", diagnostic.message_primary or "")
            if found:
                self.acknowledged(int(found[1]), int(found[2]), int(found[3]), int(found[4]), sent_ns)

        connection.add_notice_handler(notice)
        base = self.next_id
        self.next_id += PROCEDURE_ROUNDS
        connection.execute(PROCEDURE.format(base=base, rounds=PROCEDURE_ROUNDS).encode())


def main() -> None:
    kind, out, spec = sys.argv[1:]
    # Python runs handlers between its own instructions only; the deadline of whoever started us is the last resort
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with Path(out).open("a", buffering=1) as file:
        Writer(kind, file, json.loads(spec)).run()


def _end_with_parent(parent: int) -> None:
    """A writer whose test was killed must not go on for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()

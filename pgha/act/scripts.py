"""Run one of the operator's programs: within its time, its words in the log, and without anything that is only the agent's.

Rules of this file:
* Its environment has none of our variables, nor what systemd gave the agent alone; it has a process group of its own,
  and nothing to read from. At its limit the whole group gets SIGTERM, a second later SIGKILL.
* Its output is somebody's, and may be endless: so many lines of such a length are logged, the rest is counted.
* It never raises but for a cancel: that a program failed is an answer.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

import trio
from msgspec import Struct

from pgha.errors import PostgresTimeout, PostgresUnreachable
from pgha.log import Log
from pgha.postgres.programs import Run, clean_environment

log = Log("pgha.script")

#: So much of what one run says is logged.
MOST_LINES = 100
LONGEST_LINE = 500


class Ended(Struct, frozen=True, kw_only=True):
    """How it ended. `exit_code` None: it could not be started, or had to be killed: `why`. `last_line`: of what it said."""

    exit_code: int | None
    why: str = ""
    last_line: str = ""
    took_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def __str__(self) -> str:
        said = f": {self.last_line}" if self.last_line and not self.ok else ""
        return (self.why or f"exit code {self.exit_code}") + said


class Lines:
    """Output in whatever pieces it comes → lines in the log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = {"stdout": b"", "stderr": b""}
        self._count = 0
        self.last = ""

    def reader(self, stream: str) -> Callable[[bytes], None]:
        def read(chunk: bytes) -> None:
            *lines, rest = (self._rest[stream] + chunk).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > LONGEST_LINE * 4:
                lines, rest = [*lines, rest], b""
            self._rest[stream] = rest
            for line in lines:
                self._say(line)
        return read

    def end(self) -> None:
        for rest in self._rest.values():
            self._say(rest)
        if self._count > MOST_LINES:
            log.warning("script said more than is logged", script=self._name, lines=self._count, logged=MOST_LINES)

    def _say(self, raw: bytes) -> None:
        line = raw[:LONGEST_LINE * 4].decode(errors="replace").strip()
        if not line:
            return
        self.last = line[:LONGEST_LINE] + ("…" if len(line) > LONGEST_LINE else "")
        self._count += 1
        if self._count <= MOST_LINES:
            log.info("script says", script=self._name, line=self.last)


def command_of(text: str) -> list[str]:
    """The words of a command of the configuration, which has checked that it has any."""
    return shlex.split(text)


async def run_script(name: str, argv: Sequence[str], *, run: Run, limit_s: float, env: Mapping[str, str] | None = None,
                     spare_background: bool = False, dies_with_us: bool = False) -> Ended:
    """`name`: what it is for, as the log calls it. `env`: what it gets beside the agent's own environment, cleaned."""
    lines = Lines(name)
    began_s = trio.current_time()
    exit_code: int | None = None
    why = ""
    try:
        done = await run(argv, deadline_s=limit_s, env=clean_environment(env), on_output=lines.reader("stdout"), on_error_output=lines.reader("stderr"),
                         spare_background=spare_background, dies_with_us=dies_with_us)
        exit_code = done.exit_code
    except PostgresTimeout:
        why = f"ended by force, since it had not ended after {limit_s:g} s"
    except (PostgresUnreachable, OSError) as error:
        why = str(error)
    finally:
        lines.end()
    if exit_code is not None and exit_code < 0:
        why = f"killed by signal {-exit_code}"
    return Ended(exit_code=exit_code, why=why, last_line=lines.last, took_s=trio.current_time() - began_s)

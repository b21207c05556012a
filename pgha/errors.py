"""Every error that crosses a module border, on one page. The type says whose fault it is and what may be done.

    PghaError
    ├── ConfigError         the operator's: says file, key, remedy; exit 2; nothing was changed
    ├── DcsError            the store's
    │   ├── DcsUnreachable  nobody answered in time, or nobody who can serve: unknown, try again
    │   ├── DcsRefused      answered, but will not do it (auth, quota, malformed): unknown as to the lock, report it
    │   ├── Compacted       a watch asked for history that is gone: read again, watch from there
    │   └── LeaseLost       a lease of ours (member key, never the lock) is gone: grant a new one
    ├── PostgresError       PostgreSQL's
    │   ├── PostgresUnreachable   no connection, or it broke
    │   ├── PostgresTimeout       no answer by the deadline
    │   ├── QueryFailed           answered with an SQL error (sqlstate)
    │   └── CommandFailed         one of its programs exited non-zero (program, exit code, last lines)
    ├── GuardError          the guard process did not acknowledge: no licence may be used
    ├── OperationFailed     an operation of act/ could not be completed; the next pass decides anew
    └── Refused             a request is understood and will not be done (all reasons)

"Compare failed" is not an error: it is the answer of a transaction (`dcs.Outcome`).
"""

from __future__ import annotations


class PghaError(Exception):
    """Base of everything that pgha raises on purpose."""


class ConfigError(PghaError):
    """One or more mistakes in configuration. `problems`: each one line naming file, key, what is wrong, what is allowed."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DcsError(PghaError):
    """The configuration store did not do what was asked."""


class DcsUnreachable(DcsError):
    """No endpoint answered usefully before the deadline. A write may or may not have happened."""


class DcsRefused(DcsError):
    """The store answered and declined for a reason that is not a failed compare. `code` is the store's own."""

    def __init__(self, message: str, *, code: int = 0, no_space: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.no_space = no_space


class Compacted(DcsError):
    """The watch's start revision has been compacted away; `revision` is the oldest that is left."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"history before revision {revision} is compacted")
        self.revision = revision


class LeaseLost(DcsError):
    """The store does not know this lease any more."""


class PostgresError(PghaError):
    """PostgreSQL, or one of its programs, did not do what was asked."""


class PostgresUnreachable(PostgresError):
    """No connection could be made, or an existing one broke. `sqlstate` if the server said one (57P03 = starting up)."""

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class PostgresTimeout(PostgresError):
    """No answer by the deadline: the server is slow, hung or stopped."""


def is_unreached(error: BaseException) -> bool:
    """Does it say that there was no server to speak with, not even one that refuses?"""
    return isinstance(error, PostgresTimeout) or (isinstance(error, PostgresUnreachable) and not error.sqlstate)


class QueryFailed(PostgresError):
    """The server answered with an error."""

    def __init__(self, message: str, *, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class CommandFailed(PostgresError):
    """A program of PostgreSQL's exited non-zero. Its last output lines are kept, secrets are not among them."""

    def __init__(self, program: str, exit_code: int, output: str) -> None:
        super().__init__(f"{program} exited with {exit_code}: {output.strip()[-2000:]}")
        self.program = program
        self.exit_code = exit_code
        self.output = output


class GuardError(PghaError):
    """The guard did not acknowledge. Whoever asked may not use what it asked for."""


class GuardSilent(GuardError):
    """The guard is there, but has not answered in time: it is stuck, or the machine is that busy."""


class OperationFailed(PghaError):
    """An operation could not be completed; the text is for people. `final`: the same again cannot help, another way must.
    `overdue`: a server has not stopped, or does not accept writes after its start, within the time that it was given."""

    def __init__(self, message: str = "", *, final: bool = False, overdue: bool = False) -> None:
        super().__init__(message)
        self.final, self.overdue = final, overdue


class Refused(PghaError):
    """Understood, and will not be done."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons

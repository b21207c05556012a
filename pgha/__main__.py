"""argv → what to do. Each command imports what it needs, so that `ctl`, `guard` and `--version` start quickly.

Exit codes of every command: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused (the reasons are printed),
4 outcome unknown, 5 nothing reachable. Operating errors are one clear line each; a traceback is a mistake of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pgha import __version__
from pgha.errors import ConfigError, DcsUnreachable, PghaError, PostgresUnreachable, Refused

if TYPE_CHECKING:
    import argparse

DONE, FAILED, USAGE, REFUSED, UNKNOWN, UNREACHABLE = range(6)

_USAGE = """\
usage: pgha COMMAND …

  run CONFIG                         the agent of one node: keep PostgreSQL running and the lock honest
  guard CONFIG …                     the process that fences when the agent cannot (the agent starts it, or systemd)
  leave CONFIG                       in pause, with the agent stopped: leave the running PostgreSQL to another agent
  config check CONFIG                every mistake of a configuration file, in one run
  config why KEY …                   which value of a key counts, where it comes from, and since when
  config sample                      print a configuration to start from
  config import [PATRONI_YML] …      make pgha.toml from a Patroni configuration, and say what becomes of each key
  ctl [-c CONFIG] …                  look at a cluster and change it; `pgha ctl --help`
  demo …                             a real three-node cluster on this machine, and a failover to watch
  replay FILE                        decide again on a recorded observation, and print the decision
  --version, --help

exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused, 4 outcome unknown, 5 nothing reachable
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. `argv` without the program's name; None: this process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "--version":
        print(f"pgha {__version__}")
        return DONE
    if command in ("--help", "-h"):
        print(_USAGE, end="")
        return DONE
    known = _COMMANDS.get(command)
    if known is None:
        why = f"no such command: {command}\n\n" if command else ""
        print(f"{why}{_USAGE}", end="", file=sys.stderr)
        return USAGE
    try:
        return known(rest)
    except PghaError as error:
        _complain(*(error.problems if isinstance(error, ConfigError) else (str(error),)))
        return _exit_code(error)
    except KeyboardInterrupt:
        return 130  # what a shell reports for SIGINT
    except BrokenPipeError:
        # The reader left (`| head`). What is still buffered must not raise again when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _complain(*lines: str) -> None:
    """To standard error; to the journal as errors."""
    from pgha.systemd import journal_listens, with_priority

    text = "\n".join(f"pgha: {line}" for line in lines)
    print(with_priority(text, "ERROR") if journal_listens(os.environ) else text, file=sys.stderr)


def _exit_code(error: PghaError) -> int:
    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, Refused):
        return REFUSED
    if isinstance(error, (DcsUnreachable, PostgresUnreachable)):
        return UNREACHABLE
    return FAILED


def _parser(command: str, does: str) -> argparse.ArgumentParser:
    import argparse

    return argparse.ArgumentParser(prog=f"pgha {command}", description=does, allow_abbrev=False)


def _run(arguments: list[str]) -> int:
    parser = _parser("run", "The agent of one node.")
    parser.add_argument("config", metavar="CONFIG", help="pgha.toml of this node")
    given = parser.parse_args(arguments)
    from pgha import agent

    return agent.main(given.config)


_GUARD_USAGE = """\
usage: pgha guard CONFIG [--data-dir DIR] [--runtime-dir DIR] [--agent-lock FILE] [--cgroup DIR] [--alone-s SECONDS]

Fences one data directory when its agent cannot. Started by the agent, or by systemd as a service of its own (pgha.guard
is "service"). It ends when the agent says so, or when for --alone-s (60 s; infinity: never) no agent has been there and
no server. --data-dir, --runtime-dir and --agent-lock: as CONFIG says, if they are not given.
"""

_GUARD_PLACES = ("--data-dir", "--runtime-dir", "--agent-lock")


def _guard(arguments: list[str]) -> int:
    """By hand: argparse alone would take a tenth of the guard's memory, and the configuration much more."""
    if "--help" in arguments or "-h" in arguments:
        print(_GUARD_USAGE, end="")
        return DONE
    if not arguments or arguments[0].startswith("-"):
        print(_GUARD_USAGE, end="", file=sys.stderr)
        return USAGE
    config, options = arguments[0], arguments[1:]
    given = {option.partition("=")[0] for option in options}
    missing = [name for name in _GUARD_PLACES if name not in given]
    if missing:
        # Read here, said to a successor in this very process: what reading has taken up is given back.
        found = dict(zip(_GUARD_PLACES, _guard_places(config), strict=True))
        ourselves = sys.orig_argv[1:len(sys.orig_argv) - len(sys.argv[1:])]
        os.execv(sys.executable, [sys.executable, *ourselves, "guard", *arguments, *(f"{name}={found[name]}" for name in missing)])  # noqa: S606  (no shell is the point)
    from pgha.lock import guard

    return guard.main(options)


def _guard_places(config: str) -> tuple[str, str, str]:
    """Data directory, runtime directory, agent's lock.

    A mistake in the configuration, which a running agent refuses to load, must not keep its guard from coming back: then
    the guard before it in $RUNTIME_DIRECTORY says where it worked.
    """
    from pgha.config.directories import AGENT_LOCK, guard_places
    from pgha.lock.guard_system import former_data_dir

    try:
        return guard_places(config, os.environ)
    except ConfigError as error:
        runtime_dir = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        data_dir = former_data_dir(runtime_dir) if runtime_dir else None
        if data_dir is None:
            raise
        _complain(*error.problems, f"guarding {data_dir} as before")
        return data_dir, runtime_dir, f"{runtime_dir}/{AGENT_LOCK}"


def _config(arguments: list[str]) -> int:
    parser = _parser("config", "The configuration file of a node.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="every mistake, in one run", allow_abbrev=False)
    check.add_argument("config", metavar="CONFIG")
    actions.add_parser("sample", help="print a configuration to start from", allow_abbrev=False)
    take = actions.add_parser("import", help="make pgha.toml from a Patroni configuration", allow_abbrev=False,
                              description="Say what becomes of each key of a Patroni configuration, with the PATRONI_ variables of the environment "
                                          "laid over it, and write pgha.toml.")
    take.add_argument("patroni", metavar="PATRONI_YML", nargs="?", help="a file, or a directory with *.yml (default: $PATRONI_CONFIGURATION)")
    take.add_argument("-o", "--output", metavar="FILE", default="pgha.toml", help="what to write, with mode 0600 (default: pgha.toml)")
    take.add_argument("--accept-missing", action="store_true", help="write also if there are keys that pgha does not support; they are left out")
    take.add_argument("--force", action="store_true", help="replace FILE if it is there")
    take.add_argument("--dry-run", action="store_true", help="report only, write nothing")
    reason = actions.add_parser("why", help="which value of a key counts, and where it comes from", allow_abbrev=False,
                                description="Say which value of a key counts on this node, which layer it comes from (default, /config in the store, file, "
                                            "environment, or pgha itself), where it was set, and since when. Asks the node's agent, if it answers.")
    reason.add_argument("keys", metavar="KEY", nargs="+", help="with dots, as ttl or postgresql.parameters.work_mem")
    reason.add_argument("-c", "--config-file", metavar="FILE", help="pgha.toml of this node (default: as pgha ctl)")
    reason.add_argument("--json", action="store_true", help="the whole answer as JSON: an object, or an array for several keys")
    chosen = parser.parse_args(arguments)
    if chosen.action == "why":
        from pgha.why import explain

        code, text, beside = explain(chosen.keys, config_file=chosen.config_file, environ=os.environ, as_json=chosen.json)
        for line in beside:
            print(f"pgha: {line}", file=sys.stderr)
        if text:
            print(text)
        return code
    if chosen.action == "sample":
        from pgha.config.sample import sample

        print(sample(), end="")
        return DONE
    if chosen.action == "import":
        from pgha.config.takeover import import_patroni

        import_patroni(chosen.patroni, chosen.output, os.environ, accept_missing=chosen.accept_missing, force=chosen.force, dry_run=chosen.dry_run,
                       say=print, warn=lambda line: print(f"pgha: {line}", file=sys.stderr))
        return DONE
    from pgha.config.check import check as judge
    from pgha.postgres.gucs import refused_here

    code, text = judge(chosen.config, os.environ, ask=refused_here)
    print(text, file=sys.stderr if code else sys.stdout)
    return code


def _ctl(arguments: list[str]) -> int:
    from pgha.ctl import main as ctl

    return ctl(arguments)


def _demo(arguments: list[str]) -> int:
    from pgha.demo import main as demo

    return demo(arguments)


def _leave(arguments: list[str]) -> int:
    parser = _parser("leave", "Leave the running PostgreSQL of this node to another agent (the way back to Patroni): end the guard, and forget what it "
                              "knew. Say pause and stop the agent first.")
    parser.add_argument("config", metavar="CONFIG", help="pgha.toml of this node")
    given = parser.parse_args(arguments)
    from pgha.leave import leave

    print(leave(given.config, os.environ))
    return DONE


def _replay(arguments: list[str]) -> int:
    parser = _parser("replay", "Decide again on a recorded pass (an observation and the memory before it), and print the decision.")
    parser.add_argument("file", metavar="FILE", help='JSON: {"observation": …, "memory": …}')
    given = parser.parse_args(arguments)
    from pgha.replay import replay

    print(replay(given.file))
    return DONE


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "guard": _guard,
    "leave": _leave,
    "config": _config,
    "ctl": _ctl,
    "demo": _demo,
    "replay": _replay,
}


if __name__ == "__main__":
    sys.exit(main())

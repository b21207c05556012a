"""`pgha ctl`: look at a cluster and change it. Standard library only, so that it starts at once.

Results, and what is done on which member, go to standard output; questions, warnings and refusals to standard error. Exit codes: ends.py.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any

from pgha.ctl.cluster import ROLES
from pgha.ctl.ends import USAGE, End
from pgha.ctl.member import options as member_options
from pgha.ctl.output import FORMATS, plain
from pgha.ctl.watch import options as watch_options

_DRY_RUN = "say what would happen, in which order, and what would refuse; change nothing (exit code 0: it would be done, 3: refused)"


def main(argv: Sequence[str]) -> int:
    """Run one command of ctl; `argv` without "pgha ctl". Returns the exit code."""
    try:
        given = parser().parse_args(list(argv))
    except SystemExit as ended:        # argparse has printed why
        return ended.code if isinstance(ended.code, int) else USAGE
    from pgha.ctl.settings import environment, load

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # whatever others wrote, and wherever it is printed
    try:
        settings = None
        if given.command != "version" or given.members:
            scope, otherwise = _scope(given)
            settings = load(config_file=given.config_file, scope=scope, otherwise=otherwise, dcs_url=given.dcs_url, environ=environment(), insecure=given.insecure)
            for warning in settings.warnings:
                print(f"pgha: warning: {plain(warning)}", file=sys.stderr)
        return _run(given, settings)
    except End as end:
        print("\n".join(f"pgha: {line}" for line in plain(end.text).split("\n")), file=sys.stderr)
        return end.code
    except EOFError:
        print("pgha: aborted: nothing was changed", file=sys.stderr)
        return USAGE


def _scope(given: argparse.Namespace) -> tuple[str | None, str | None]:
    """Which cluster, if the command line says so: in front of the command, or after it as the reference has it. The second is
    what counts only where no cluster is configured."""
    named: str | list[str] | None = getattr(given, "cluster", None)
    names = [named] if isinstance(named, str) else named or []
    if given.scope and any(name != given.scope for name in names):
        raise End(USAGE, f"which cluster: {' '.join(names)} or --scope {given.scope}?")
    if isinstance(named, str):
        return named, None
    return given.scope, next(iter(names or getattr(given, "members", [])), None)


class _Intermixed(argparse.ArgumentParser):
    """Of one command: its options may stand in front of its arguments, behind and between them, as the reference has it."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def _run(given: argparse.Namespace, settings: object) -> int:
    from importlib import import_module

    # A module named list would hide the builtin in this package.
    module = {"failover": "switchover", "list": "listing", "resume": "pause", "watch": "live"}.get(given.command, given.command.replace("-", "_"))
    code: int = import_module(f"pgha.ctl.{module}").run(settings, given)
    return code


def parser() -> argparse.ArgumentParser:
    def options(parser: argparse.ArgumentParser, *, default: object, short: bool = True) -> argparse.ArgumentParser:
        parser.add_argument(*["-c"] * short, "--config-file", metavar="FILE", default=default, help="pgha.toml of a node, or a file with scope and [etcd3]")
        parser.add_argument("--scope", metavar="NAME", default=default, help="which cluster (default: as configured)")
        parser.add_argument(*["-d"] * short, "--dcs-url", metavar="URL", default=default, help="the store, as etcd3://HOST:PORT")
        parser.add_argument("-k", "--insecure", action="store_true", default=default or False, help="do not check the certificates of the agents' API (as ctl.insecure)")
        return parser

    top = options(argparse.ArgumentParser(prog="pgha ctl", description="Look at a cluster and change it.", allow_abbrev=False), default=None)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Intermixed)

    def command(name: str, does: str, *, form: str | None = None, forms: Sequence[str] = FORMATS, cluster: bool = True, several: bool = False) -> argparse.ArgumentParser:
        # The common options may stand on either side of the command; -c and -d after query are its own, as the reference has them.
        parser = options(commands.add_parser(name, help=does, description=does, allow_abbrev=False), default=argparse.SUPPRESS, short=name != "query")
        if several:
            parser.add_argument("cluster", nargs="*", metavar="CLUSTER", help="which clusters (default: the configured one)")
        elif cluster:
            parser.add_argument("cluster", nargs="?", metavar="CLUSTER", help="which cluster, as --scope says it, too")
        if form is not None:
            parser.add_argument("-f", "--format", default=form, choices=forms, metavar="FORMAT", help=f"{', '.join(forms)} (default: {form})")
        return parser

    listing = command("list", "who leads, who follows, how far behind (in MiB)", form="table", several=True)
    listing.add_argument("-e", "--extended", action="store_true", help="all columns, also those in which nobody has anything")
    listing.add_argument("-t", "--timestamp", action="store_true", help="the time above the table")
    watch_options(listing)

    watch_options(command("topology", "the members as a tree: who streams from whom, by the tag replicatefrom", several=True))

    live = command("watch", "the cluster live: its members, and what happens on them, until q or Ctrl-C", form="table", forms=("table", "json"))
    live.add_argument("--once", action="store_true", help="print it once, with the last events (json: all that are kept)")
    live.add_argument("--kinds", metavar="KIND,…", default="", help="only events of these kinds: agent, configuration, decision, lag, lock, member, operation, role")

    member_options(command("dsn", "a connection string for a member's PostgreSQL: host and port"))

    query = command("query", "run SQL on the leader, or on another member")
    query.add_argument("-c", "--command", dest="command_text", metavar="SQL", help="what to run; several statements are one transaction")
    query.add_argument("-f", "--file", metavar="FILE", help="run what this file holds; - is standard input")
    member_options(query)
    query.add_argument("-U", "--username", metavar="USER", help="the database user (default: PGUSER, else the user of this process)")
    query.add_argument("-d", "--dbname", metavar="NAME", help="the database (default: PGDATABASE, else the one in the member's address)")
    passwords = query.add_mutually_exclusive_group()
    passwords.add_argument("--password", action="store_true", help="ask for the password (default: PGPASSWORD, PGPASSFILE or ~/.pgpass)")
    passwords.add_argument("--password-file", metavar="FILE", help="its first line is the password; nobody else may read it")
    query.add_argument("--format", default="tsv", choices=FORMATS, metavar="FORMAT", help=f"{', '.join(FORMATS)} (default: tsv)")
    query.add_argument("--delimiter", metavar="TEXT", help="between the columns of tsv (default: a tab)")
    watch_options(query)

    switchover = command("switchover", "let another member lead, while the leader is well")
    switchover.add_argument("--leader", "--primary", metavar="NAME", help="the leader to replace (default: the present one)")
    switchover.add_argument("--scheduled", metavar="WHEN", help="now, or a moment as 2026-01-31T03:00:00+01:00")
    failover = command("failover", "let this member lead, also without a leader")
    for parser in (switchover, failover):
        parser.add_argument("--candidate", metavar="NAME", help="who is to lead")
        parser.add_argument("--force", action="store_true", help="do not ask")
    failover.add_argument("--holder-is-down", action="store_true",
                          help="you state that the leader of a paused cluster is down and cannot write: its lock does not expire by itself")

    restart = command("restart", "restart PostgreSQL on members, the leader last", cluster=False)
    restart.add_argument("--any", action="store_true", help="only one of the members, a replica if there is one among them")
    restart.add_argument("--pending", action="store_true", help="only members with a pending restart")
    restart.add_argument("--pg-version", metavar="VERSION", help="only members that run a lower version of PostgreSQL, as 16.4")
    restart.add_argument("--timeout", metavar="SECONDS", help="how long the start may take")
    restart.add_argument("--scheduled", metavar="WHEN", help="now, or a moment as 2026-01-31T03:00:00+01:00; conditions count then")
    flush = command("flush", "take back scheduled restarts, or the scheduled switchover", cluster=False)
    reinit = command("reinit", "let members throw their data away and copy it anew", cluster=False)
    reinit.add_argument("members", nargs="*", metavar="MEMBER", help="which replicas (the cluster's name may stand in front)")
    reinit.add_argument("--from-leader", action="store_true", help="copy the leader, and no other member")
    reinit.add_argument("--wait", action="store_true", help="until PostgreSQL runs on the copy, however long that takes")
    reinit.add_argument("--force", action="store_true", help="do not ask, and cancel what the member is doing")
    for parser in (restart, command("reload", "let agents read their configuration again", cluster=False), flush):
        parser.add_argument("members", nargs="*", metavar="MEMBER", help="default: all (the cluster's name may stand in front)")
        parser.add_argument("--role", "-r", choices=ROLES, default="any", help="only members that are this; primary: a leader that takes writes")
        parser.add_argument("--force", action="store_true", help="do not ask")
    flush.add_argument("target", choices=("restart", "switchover"), help="restart: the members' scheduled ones; switchover: the cluster's")

    for parser in (switchover, failover, restart, reinit):
        parser.add_argument("--dry-run", action="store_true", help=_DRY_RUN)

    for name, does in (("pause", "switch automatic failover off"), ("resume", "switch automatic failover on again")):
        command(name, does).add_argument("--wait", action="store_true", help="until every member has seen it")

    command("remove", "take all keys of a cluster out of the store, after three questions; data stays", form="table").add_argument(
        "--dry-run", action="store_true", help=_DRY_RUN)
    command("show-config", "the cluster's dynamic configuration", form="toml", forms=("toml", "json"))
    edit = command("edit-config", "change the cluster's dynamic configuration; without options in $VISUAL or $EDITOR")
    edit.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="a key, with dots; null takes it away")
    edit.add_argument("-p", "--pg", action="append", default=[], metavar="PARAMETER=VALUE", help="a parameter of PostgreSQL")
    edit.add_argument("--apply", metavar="FILE", help="change what this file holds (TOML or JSON; - is standard input); null in JSON takes a key away")
    edit.add_argument("--replace", metavar="FILE", help="let what this file holds (as --apply) be the whole configuration")
    edit.add_argument("-q", "--quiet", action="store_true", help="do not show what changes")
    edit.add_argument("--force", action="store_true", help="do not ask")
    edit.add_argument("--dry-run", action="store_true", help=_DRY_RUN)

    command("history", "each timeline that ended, and who led the next", form="table")
    explain = command("explain", "what a node decided last, why, and on which facts; or what all would decide if …", form="table", forms=("table", "json"), cluster=False)
    explain.add_argument("node", nargs="?", metavar="NODE", help="default: the configured node, else the leader; with --if: all")
    explain.add_argument("--if", dest="suppose", action="append", default=[], metavar="WHAT",
                         help="what would happen if: NODE=down, dcs=down or NODE.lag=SIZE (as 20MB); several together; nothing is changed")
    explain.add_argument("--json", action="store_true", help="the whole decision as JSON")
    command("version", "of this program; with members, of theirs and PostgreSQL's", cluster=False).add_argument(
        "members", nargs="*", metavar="MEMBER", help="whose, too (default: only this program's; the cluster's name may stand in front)")
    return top


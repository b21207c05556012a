"""Where are the programs of others that tests run against pgha? build/clients (build/setup calls it) made them.

`patroni()`, `patronictl()` and `check_patroni()` give the path of an executable. Whoever starts them as a user who may
not enter this checkout (postgres, when it lies in root's home) takes a copy that anybody may run: `copied_to`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

CLIENTS = Path(__file__).resolve().parents[2] / "var/clients"


def patroni() -> Path:
    """Patroni's agent: `patroni CONFIG.yml`."""
    return _executable("patroni", "patroni")


def patronictl() -> Path:
    return _executable("patroni", "patronictl")


def check_patroni() -> Path:
    return _executable("check_patroni", "check_patroni")


def copied_to(place: Path, program: Path) -> Path:
    """The same program from a copy of its environment below `place` (made once), with the interpreter of the copy."""
    original = program.parents[1]
    copy = place / original.name
    if not copy.exists():
        shutil.copytree(original, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "pip", "setuptools"))
        copy.chmod(0o755)
        for script in (copy / "bin").iterdir():
            if script.is_file() and not script.is_symlink():
                text = script.read_bytes()
                script.write_bytes(text.replace(str(original).encode(), str(copy).encode(), 1))
    return copy / "bin" / program.name


def _executable(environment: str, name: str) -> Path:
    path = CLIENTS / environment / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run build/setup")
    return path

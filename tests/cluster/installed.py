"""pgha as user postgres can start it: a fresh archive, copied to where that user can read it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pgha.demo.programs import Program

ROOT = Path(__file__).parents[2]
USER = "postgres"


def install(place: Path, *, sources: bool = False) -> Program:
    """Into `place`, which is made. `sources`: not the archive but this checkout, run by this interpreter."""
    place.mkdir()
    if sources:
        shutil.copytree(ROOT / "pgha", place / "pgha", ignore=shutil.ignore_patterns("__pycache__"))
        return Program((sys.executable, "-m", "pgha"), {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"})
    archive = ROOT / "dist/pgha.pyz"
    newest = max(p.stat().st_mtime for folder in ("pgha", "build") for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc")
    if not archive.exists() or archive.stat().st_mtime < newest:
        subprocess.run([ROOT / "build/pyz"], check=True, timeout=300)
    copy = Path(shutil.copy(archive, place / "pgha.pyz"))
    copy.chmod(0o644)
    cache = place / "cache"
    cache.mkdir(mode=0o700)
    shutil.chown(cache, USER, USER)
    return Program(("/usr/bin/python3", "-IS", str(copy)), {"PGHA_CACHE": str(cache)})

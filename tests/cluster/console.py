"""`pgha ctl` as an operator of a bed runs it."""

from __future__ import annotations

import subprocess

from pgha.demo.bed import Bed
from pgha.demo.processes import CLEAN_ENVIRONMENT, as_user

DONE, FAILED, USAGE, REFUSED, UNKNOWN, UNREACHABLE = range(6)


def ctl(bed: Bed, *arguments: str, answers: str = "") -> tuple[int, str, str]:
    """With the first node's configuration; the database's password is in the environment."""
    program = bed.settings.program
    environment = {**CLEAN_ENVIRONMENT, **program.environment, "PGUSER": "postgres", "PGPASSWORD": bed.settings.password}
    done = subprocess.run([*program.argv, "ctl", "-c", str(bed.nodes[0].config_path), *arguments], input=answers, capture_output=True,
                          text=True, timeout=120, check=False, cwd="/", env=environment, **as_user("postgres"))
    print(f"ctl {' '.join(arguments)} → {done.returncode}\n{done.stdout}{done.stderr}")
    assert bed.settings.password not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr

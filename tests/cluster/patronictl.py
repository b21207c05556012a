"""The real patronictl, as its users run it: a YAML file that names the same etcd, and texts to be read."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from pgha.demo.bed import Bed
from pgha.demo.processes import CLEAN_ENVIRONMENT
from tests.clients.patroni_env import patronictl

_numbers = itertools.count(1)


class Said(NamedTuple):
    """What one call printed, and its exit code."""

    code: int
    out: str
    err: str


class PatroniCtl:
    """`more`: what the configuration file has beside scope, namespace and etcd."""

    def __init__(self, bed: Bed, **more: Any) -> None:
        self.bed = bed
        self._config = bed.directory / f"patroni.{next(_numbers)}.yml"
        wanted = {"scope": bed.settings.scope, "namespace": "/service/", "etcd3": {"hosts": list(bed.etcd.endpoints)}, **more}
        self._config.write_text(json.dumps(wanted), encoding="utf-8")     # JSON is YAML

    def command(self, *arguments: str) -> list[str]:
        return [str(patronictl()), "-c", str(self._config), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**CLEAN_ENVIRONMENT, "LC_ALL": "C.UTF-8", "PGUSER": "postgres", "PGPASSWORD": self.bed.settings.password, "PGDATABASE": "postgres"}

    def ask(self, *arguments: str, answers: str = "", environment: dict[str, str] | None = None) -> Said:
        """Whatever comes of it; `answers`: what is typed."""
        done = subprocess.run(self.command(*arguments), input=answers, capture_output=True, text=True, timeout=120, check=False,
                              cwd=self.bed.directory, env={**self.environment, **(environment or {})})
        print(f"patronictl {' '.join(arguments)} → {done.returncode}\n{done.stdout}{done.stderr}")
        return Said(done.returncode, done.stdout, done.stderr)

    def __call__(self, *arguments: str, answers: str = "") -> str:
        """Its standard output; it must have ended with 0."""
        said = self.ask(*arguments, answers=answers)
        assert said.code == 0, said
        return said.out

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self("list", "-f", "json", *arguments))
        return found

    def members(self) -> dict[str, dict[str, Any]]:
        return {row["Member"]: row for row in self.rows()}


def write_file(bed: Bed, name: str, content: str) -> Path:
    """A file of the operator's."""
    path = bed.directory / name
    path.write_text(content, encoding="utf-8")
    return path

"""What an agent knows of where a value comes from: since when, and what PostgreSQL says."""

from __future__ import annotations

import json
from typing import Any

import trio

from pgha.config.load import Effective, effective
from pgha.config.local import LocalConfig
from pgha.errors import PostgresUnreachable
from pgha.model.gucs import Guc, GucFacts
from pgha.provenance import Provenance

WORK_MEM = Guc(name="work_mem", vartype="integer", context="user", unit="kB", value="4096", shown="4MB", source="configuration file", file="/data/postgresql.conf", line=9, default="4096")


class Scene:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.config: dict[str, Any] = {"ttl": 30, "postgresql": {"parameters": {"work_mem": "4MB"}}}
        self.left_out: dict[str, str] = {}
        self.answers: GucFacts | None = GucFacts(of={"work_mem": WORK_MEM}, version=15, running=True)
        self.provenance = Provenance(member="n1", effective=self._effective, sources={}, left_out=lambda: self.left_out, facts=self._facts, wall_s=lambda: self.now_s)

    def _effective(self) -> Effective:
        return effective(LocalConfig(), self.config)

    async def _facts(self) -> GucFacts:
        if self.answers is None:
            raise PostgresUnreachable("it does not run")
        return self.answers

    def note(self, revision: int) -> None:
        self.provenance.note(self.config, revision, mixed=False)

    def ask(self, key: str) -> tuple[int, Any]:
        async def main() -> tuple[int, Any]:
            answer = await self.provenance.answer(key)
            return answer.status, json.loads(answer.text) if answer.json else answer.text

        return trio.run(main)


def test_since_when_is_what_was_seen_to_change() -> None:
    scene = Scene()
    scene.note(7)
    began = "1970-01-12T13:46:40+00:00"
    assert scene.ask("ttl")[1]["store"] == {"revision": 7, "watched_since": began, "changed": None}
    scene.now_s += 60
    scene.config = {"ttl": 31, "postgresql": {"parameters": {"work_mem": "4MB"}}}
    scene.note(9)
    status, found = scene.ask("ttl")
    assert (status, found["member"], found["value"], found["layers"][0]["layer"]) == (200, "n1", 31, "store")
    assert found["store"] == {"revision": 9, "watched_since": began, "changed": {"revision": 9, "seen_at": "1970-01-12T13:47:40+00:00"}}
    assert scene.ask("postgresql.parameters.work_mem")[1]["store"]["changed"] is None
    scene.config = {"postgresql": {"parameters": {}}}
    scene.note(11)
    assert scene.ask("ttl")[1]["value"] == 30
    assert scene.ask("ttl")[1]["layers"][0]["layer"] == "default"


def test_what_postgresql_says_of_a_parameter() -> None:
    scene = Scene()
    scene.note(7)
    found = scene.ask("postgresql.parameters.work_mem")[1]
    assert found["running"] == {"value": "4MB", "source": "configuration file", "file": "/data/postgresql.conf", "line": 9, "context": "user",
                                "pending_restart": False, "default": "4096", "unit": "kB"}
    assert scene.ask("postgresql.parameters.wrok_mem") == (404, "postgresql.parameters.wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?")
    scene.left_out = {"wrok_mem": 'unrecognized configuration parameter "wrok_mem"'}
    scene.config["postgresql"]["parameters"]["wrok_mem"] = 1
    assert scene.ask("postgresql.parameters.wrok_mem")[1]["left_out"] == "is no parameter of PostgreSQL 15; did you mean work_mem?"
    assert scene.ask("postgresql.parameters.some.extension")[1]["running"] is None
    scene.answers = None
    assert scene.ask("postgresql.parameters.work_mem")[1]["running"] == {"why_not": "it does not run"}
    assert scene.ask("tll") == (404, "tll: unknown key; did you mean ttl?")

"""Which cluster and which members the words after a command mean, wherever its options stand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ctl_world import World
from test_ctl_odd_values import Agent

from pgha.ctl import main

pytestmark = pytest.mark.etcd


@pytest.fixture
def without_a_scope(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name the store and nothing else."""
    monkeypatch.setenv("PGHA_NAMESPACE", world.namespace)
    monkeypatch.setenv("PGHACTL_CONFIG_FILE", "/dev/null")
    return ["-d", "etcd3://" + world.etcd.urls[0].removeprefix("http://")]


@pytest.fixture
def agents(world: World, start_agent: Any) -> None:
    world.load("steady")
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, start_agent(Agent({"server_version": 150020, "pgha": {"version": "0.1.0"}})))


def done_on(out: str) -> list[str]:
    return sorted(name for name in ("n1", "n2", "n3", "bench") if any(f"member {name}" in line or line.startswith(f"{name}: ") for line in out.splitlines()))


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize(("words", "members"), [
    ("restart bench n2 --force", "n2"), ("restart n2 --force n3", "n2 n3"), ("restart --force bench n2", "n2"), ("restart bench --role replica --force n2", "n2"),
    ("restart bench --force", "n1 n2 n3"), ("restart --force", "n1 n2 n3"), ("restart n2 --timeout 60 --force", "n2"), ("restart n1 --force -r replica n2", "n2"),
    ("reload bench --force n2", "n2"), ("reload n2 -r any n3 --force", "n2 n3"), ("reinit bench --force n2", "n2"), ("reinit n2 --from-leader n3 --force", "n2 n3"),
    ("flush bench --force restart", "n1 n2 n3"), ("flush n2 --force n3 restart", "n2 n3"), ("flush bench n2 -r replica restart --force", "n2"),
    ("version bench n2", "n2"), ("version n2 --insecure n3", "n2 n3"), ("version bench", "n1 n2 n3"),
])
def test_options_stand_anywhere_and_the_cluster_in_front(world: World, words: str, members: str) -> None:
    code, out, err = world.ctl(*words.split())
    assert (code, err) == (0, "")
    assert done_on(out) == members.split()


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize("words", ["restart bench n2 --force", "reload bench --force n2", "reinit bench n2 --force", "flush bench --force n2 restart", "version bench n2"])
def test_the_first_word_is_the_cluster_where_none_is_configured(world: World, without_a_scope: list[str], words: str) -> None:
    assert main([*without_a_scope, *words.split()]) == 0
    assert done_on(world.capsys.readouterr().out) == ["n2"]
    assert main([*without_a_scope, *words.replace("bench ", "").split()]) == 1
    assert "there is no cluster '" in world.capsys.readouterr().err
    assert main([*without_a_scope, "restart", "--force"]) == 2
    assert "scope is not set" in world.capsys.readouterr().err


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize(("words", "said"), [
    ("restart other n2 --force", "no such member: other; there are n1, n2, n3; nor is other the cluster's name, which is bench (another cluster: --scope other)"),
    ("reload other --force", "no such member: other; there are n1, n2, n3; nor is other the cluster's name, which is bench (another cluster: --scope other)"),
    ("reinit other n2 --force", "no such member: other; there are n1, n2, n3; nor is other the cluster's name, which is bench (another cluster: --scope other)"),
    ("flush other restart", "no such member: other; there are n1, n2, n3; nor is other the cluster's name, which is bench (another cluster: --scope other)"),
    ("version other", "no such member: other; there are n1, n2, n3; nor is other the cluster's name, which is bench (another cluster: --scope other)"),
    ("restart bench other --force", "no such member: other; there are n1, n2, n3"),
    ("restart n2 other --force", "no such member: other; there are n1, n2, n3"),
])
def test_a_word_that_is_neither_is_named(world: World, words: str, said: str) -> None:
    code, out, err = world.ctl(*words.split())
    assert (code, err) == (2, f"pgha: {said}\n")
    assert done_on(out) == []


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize(("words", "members"), [
    ("restart bench", None), ("restart bench n2", None), ("restart bench bench", "bench"), ("restart n2 bench", "bench n2"), ("restart bench bench n2", "bench n2"),
    ("reinit bench", None), ("reinit bench bench", "bench"), ("reinit n2", "n2"), ("version bench", None), ("version bench bench", "bench"),
])
def test_a_member_that_is_called_as_its_cluster_is_not_guessed_at(world: World, start_agent: Any, words: str, members: str | None) -> None:
    world.put("members/bench", json.loads(world.get("members/n3")), leased=True)
    world.agent_at("bench", start_agent(Agent({"pgha": {"version": "0.1.0"}})))
    code, out, err = world.ctl(*words.split(), *(["--force"] if not words.startswith("version") else []))
    if members is None:
        assert (code, err) == (2, "pgha: bench is the cluster's name, and a member's; allowed: bench bench for that member, --scope bench and no name for all\n")
    else:
        assert (code, err) == (0, "")
    assert done_on(out) == (members or "").split()


@pytest.mark.parametrize("words", ["restart --nonsense n1", "restart n1 --role nobody n2", "flush bench --force", "flush restart now", "restart n1 --timeout", "list a --nonsense b"])
def test_what_is_no_option_is_refused_as_ever(world: World, words: str) -> None:
    code, out, err = world.ctl(*words.split())
    assert (code, out) == (2, "")
    assert "error: " in err

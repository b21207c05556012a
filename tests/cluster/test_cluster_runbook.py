"""man/pgha-runbook.7 on a real cluster: its commands are run as they stand there, and print what it says they print.

A chapter is a story: what happens to the cluster before it, and its commands in their order. What only a host of one's
own can do (packages, units, a reboot) stands in ELSEWHERE with the reason, or is done to the bed in its place. A command
that is in neither place is run; one that fails, or does not print what the page shows, fails the test.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pgha.demo.bed import Bed
from pgha.demo.node import FAST, Node
from pgha.demo.processes import as_user
from pgha.demo.programs import find_etcd, find_postgres

pytestmark = pytest.mark.cluster

PAGE = Path(__file__).parents[2] / "man/pgha-runbook.7"
#: What cannot be run on a test machine, by how it begins.
ELSEWHERE = {
    "echo 'create_main_cluster": "changes the machine's packages' configuration; build/setup does the same",
    "apt-get": "build/setup installs the packages",
    "systemctl mask": "tests/systemd does it in a booted system of its own",
    "systemctl stop 'postgresql": "the same",
    "install ": "the same",
    "pgha config sample": "run by tests/config; here the bed has its own configuration",
    "editor": "is done by hand",
    "chown": "the bed's file has its owner already",
    "systemctl daemon-reload": "tests/systemd",
    "journalctl": "tests/systemd",
    "df ": "says something of the machine",
    "(restore": "is a tool of the reader's",
    "mv /var": "is done to the bed's directory in the story",
    "pgha config import": "tests/config and the takeover test run it on real files",
    "systemctl disable --now patroni": "the takeover test has a real Patroni",
    "systemctl enable --now patroni": "the same",
    "pgha leave": "the takeover test does it on the way back",
    "patronictl": "the same",
}


class Command(NamedTuple):
    prompt: str
    text: str
    shown: list[str]


def chapters() -> dict[str, list[Command]]:
    """Every command of the page, and what it shows of its output, by chapter."""
    found: dict[str, list[Command]] = {}
    chapter, literal = "", False
    for line in PAGE.read_text().replace("\\e", "\\").splitlines():
        if line.startswith(".Sh "):
            chapter = line[4:]
        elif line.startswith(".Bd -literal"):
            literal = True
        elif line.startswith(".Ed"):
            literal = False
        elif literal and line[:2] in ("$ ", "# "):
            found.setdefault(chapter, []).append(Command(line[0], line[2:], []))
        elif literal:
            commands = found[chapter]
            before = commands[-1]
            open_quote = before.text.count('"') % 2 or before.text.endswith("\\")
            if open_quote and not before.shown:
                commands[-1] = before._replace(text=before.text.removesuffix("\\").rstrip() + " " + line.strip())
            else:
                before.shown.append(line)
    return found


def alike(line: str) -> str:
    """Without what differs from run to run: numbers, positions, widths."""
    line = re.sub(r"\b[0-9A-F]+/[0-9A-F]+\b", "#", line)
    line = re.sub(r"(?<![a-z])\d+(\.\d+)*", "#", line)
    return re.sub(r"[\s#]*#[\s#]*|\s+", lambda m: " # " if "#" in m[0] else " ", line).strip()


def is_printed(shown: list[str], output: str, scope: str) -> None:
    """Each shown line is there, in this order. "..." at its end, or its beginning, is what is left out."""
    lines = [alike(line) for line in output.splitlines()]
    at = 0
    for show in shown:
        if show.strip() == "...":
            continue
        wanted = alike(show.replace("orders", scope).strip().removeprefix("...").removesuffix("..."))
        starts, ends = not show.lstrip().startswith("..."), not show.rstrip().endswith("...")
        while at < len(lines):
            line = lines[at]
            at += 1
            if line == wanted if starts and ends else line.startswith(wanted) if starts else line.endswith(wanted) if ends else wanted in line:
                break
        else:
            raise AssertionError(f"the page shows {show!r} (as {wanted!r}), which was not printed:\n{output}")


class Databases(Bed):
    """Its nodes are named as in the page."""

    def new_node(self, name: str, address: str, **more: Any) -> Node:
        return Node(f"db{name[1:]}", address, **more)


class Reader:
    """Who follows the page: a `pgha` in PATH, the configuration where it is looked for, names and addresses as on the bed."""

    def __init__(self, bed: Bed, place: Path) -> None:
        self.bed = bed
        self.place = place
        place.mkdir()
        program = bed.settings.program
        shim = place / "pgha"
        shim.write_text(f'#!/bin/sh\nexec {shlex.join(program.argv)} "$@"\n')
        shim.chmod(0o755)

    def adapted(self, text: str) -> str:
        for node in self.bed.nodes:
            text = text.replace(f"10.0.0.{node.name[2:]}:8008", f"{node.address}:{node.rest_port}")
        text = re.sub(r"--endpoints=\S+", f"--endpoints={self.bed.etcd.members[0].endpoint}", text)
        return text.replace("orders", self.bed.settings.scope).replace("/etc/pgha.toml", str(self.bed.nodes[0].config_path))

    def run(self, command: Command, typed: str = "") -> None:
        bed = self.bed
        environment = {"PATH": f"{self.place}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent", "PGHACTL_CONFIG_FILE": str(bed.nodes[0].config_path),
                       "PGUSER": "postgres", "PGPASSWORD": bed.settings.password, "ETCDCTL_API": "3", "LANG": "C.UTF-8", **bed.settings.program.environment}
        done = subprocess.run(["/bin/sh", "-c", self.adapted(command.text)], env=environment, capture_output=True, text=True, input=typed, timeout=120,
                              check=False, cwd="/", **as_user("postgres"))
        output = done.stdout + done.stderr
        print(f"$ {command.text} → {done.returncode}\n{output}")
        assert done.returncode == 0, f"{command.text}: {output}"
        is_printed(command.shown, output, bed.settings.scope)


Stories = dict[str, Callable[["Story"], None]]


class Story:
    """One chapter: its commands are run, or done to the bed by whatever `instead` says for them."""

    def __init__(self, reader: Reader, chapter: str) -> None:
        self.reader, self.bed = reader, reader.bed
        self.commands = chapters()[chapter]

    def led_by(self, name: str) -> Node:
        """This node leads, and all others stream; whatever a story that failed has left is mended first."""
        for node in self.bed.nodes:
            if node.agent_process is None:
                node.start_agent()
        leader = self.bed.wait_healthy(40)
        if leader.name != name:
            assert leader.request("POST", "/switchover", {"leader": leader.name, "candidate": name}, timeout_s=30)
        self.bed.wait(lambda: (found := self.bed.healthy()) and found.name == name, 40, f"{name} leads")
        # the page's tables show what every member publishes of itself
        self.bed.wait(lambda: all((self.bed.etcd.value(self.bed.key(f"members/{n.name}")) or {}).get("replication_state") == "streaming" for n in self.bed.nodes if n.name != name),
                      20, "all replicas publish that they stream")
        return self.bed.node(name)

    def read(self, instead: dict[str, Callable[[], Any]], *, typed: str = "") -> None:
        left = dict(instead)
        for command in self.commands:
            begins = next((word for word in left if command.text.startswith(word)), None)
            if begins is not None:
                left.pop(begins)()
            elif not any(command.text.startswith(word) for word in ELSEWHERE):
                self.reader.run(command, typed)
        assert not left, f"the page does not say any more: {', '.join(left)}"


@pytest.fixture(scope="module")
def reader(program, bench, all_beds):
    all_beds.end()
    bed = Databases(bench / "runbook", program, etcd_program=find_etcd(), bin_dir=find_postgres(), user="postgres", profile=FAST)
    try:
        bed.start()
        bed.wait_healthy(90)
        yield Reader(bed, bench / "runbook-reader")
    finally:
        bed.close()
        shutil.rmtree(bench / "runbook-reader")


def first_questions(story: Story) -> None:
    story.led_by("db1")
    story.read({})


def first_install(story: Story) -> None:
    story.led_by("db1")
    story.read({"systemctl enable --now pgha": lambda: None})


def maintenance(story: Story) -> None:
    old = story.led_by("db1")

    def back() -> None:
        old.start_agent()
        assert story.bed.wait_healthy(60).name == "db2"

    story.read({"systemctl stop pgha": lambda: (story.bed.wait_healthy(30), old.stop_agent()), "reboot": back})


def primary_died(story: Story) -> None:
    old = story.led_by("db2")
    tagged(story, "db3", {"nofailover": True})      # so that the page can say who leads
    old.kill_agent()
    old.signal_postgres(signal.SIGKILL)
    assert story.bed.wait_leader(other_than=old, timeout_s=30).name == "db1"
    story.read({"pgha ctl explain db2": lambda: None})      # it is the dead one here
    old.start_agent()
    tagged(story, "db3", {})
    story.bed.wait_healthy(60)


def tagged(story: Story, name: str, tags: dict[str, Any]) -> None:
    node = story.bed.node(name)
    node.tags = tags
    node.write_configuration()
    node.signal_agent(signal.SIGHUP)
    story.bed.wait(lambda: (story.bed.etcd.value(story.bed.key(f"members/{name}")) or {}).get("tags", {}) == tags, 20, f"{name} publishes its tags")


def replica_will_not_rejoin(story: Story) -> None:
    story.led_by("db1")
    story.read({})
    story.bed.wait_healthy(60)


def etcd_lost_its_quorum(story: Story) -> None:
    leader = story.led_by("db1")
    bed = story.bed
    assert leader.request("PATCH", "/config", {"failsafe_mode": True}).status == 200
    bed.wait(lambda: len(bed.etcd.value(bed.key("failsafe")) or {}) == 3, 20, "all members are in the key failsafe")

    def away() -> None:
        bed.etcd.stop()
        bed.wait(lambda: leader.patroni().get("failsafe_mode_is_active"), 30, "the leader goes on in failsafe mode")

    story.read({"etcdctl": away})
    bed.etcd.start()
    bed.wait(bed.etcd.ready, 20, "etcd answers")
    story.led_by("db1")
    bed.wait(lambda: leader.request("PATCH", "/config", {"failsafe_mode": None}).status == 200, 20, "it takes writes again")


def disk_full(story: Story) -> None:
    story.led_by("db1")
    story.read({})


def split_network(story: Story) -> None:
    story.led_by("db1")
    story.read({})


def replacing_a_host(story: Story) -> None:
    story.led_by("db1")
    gone = story.bed.node("db3")

    def stop() -> None:
        gone.stop_agent()
        story.bed.wait(lambda: not story.bed.etcd.get(story.bed.key("members/db3")), 20, "its member key is gone")

    story.read({"systemctl disable --now pgha": stop})
    gone.start_agent()
    story.bed.wait_healthy(60)


def changing_parameters(story: Story) -> None:
    story.led_by("db1")
    bed = story.bed
    listing = next(i for i, command in enumerate(story.commands) if command.text == "pgha ctl list")
    before, after = story.commands[:listing], story.commands[listing:]
    story.commands = before
    story.read({})
    bed.wait(lambda: all((bed.etcd.value(bed.key(f"members/{n.name}")) or {}).get("pending_restart") for n in bed.nodes), 20, "all members want a restart")
    story.commands = after[:2]
    story.read({})
    story.led_by("db1")
    story.commands = after[2:]
    story.read({})


def upgrading(story: Story) -> None:
    leader = story.led_by("db1")
    started = leader.patroni()["postmaster_start_time"]

    def restart() -> None:
        for node in story.bed.nodes:
            node.stop_agent()
            node.start_agent()
            story.bed.wait(lambda node=node: node.patroni().get("state") == "running", 30, "its agent has taken PostgreSQL over")

    story.read({"systemctl restart pgha-guard": lambda: None, "systemctl restart pgha": restart})
    assert leader.patroni()["postmaster_start_time"] == started


def from_patroni_and_back(story: Story) -> None:
    """With pgha's own commands; the nodes change hands in the takeover test."""
    story.led_by("db1")
    nothing = {"systemctl enable --now pgha": lambda: None, "systemctl disable --now pgha": lambda: None}
    story.read({**nothing, "pgha ctl edit-config": lambda: None})
    assert story.bed.leader()
    story.bed.leader().request("PATCH", "/config", {"pause": None})


def restoring(story: Story) -> None:
    """Last, since the cluster is another one after it."""
    leader, bed = story.led_by("db1"), story.bed
    others = [node for node in bed.nodes if node is not leader]
    leader.ask("CREATE TABLE IF NOT EXISTS restored (n int)") if False else None

    def stop() -> None:
        for node in (*others, leader):
            node.stop_agent()
        bed.wait(lambda: not bed.etcd.get(bed.key("members/")), 20, "no member is left")

    def restore() -> None:
        """The leader's own data, as a backup that was recovered to the end."""
        leader.data_dir.rename(leader.directory / "before")
        shutil.copytree(leader.directory / "before", leader.data_dir, symlinks=True)
        subprocess.run(["chown", "-R", "postgres:postgres", str(leader.data_dir)], check=True)

    def start() -> None:
        leader.start_agent()
        bed.wait_leader(timeout_s=60)
        for node in others:
            node.data_dir.rename(node.directory / "before")
            node.start_agent()
        bed.wait_healthy(90)

    story.read({"systemctl stop pgha": stop, "mv /var": restore, "systemctl start pgha": start}, typed=f"{bed.settings.scope}\nYes I am aware\n")


STORIES: Stories = {
    "DESCRIPTION": first_questions,
    "FIRST INSTALL ON THREE HOSTS WITH ETCD AND HAPROXY": first_install,
    "PLANNED MAINTENANCE OF A HOST": maintenance,
    "THE PRIMARY DIED": primary_died,
    "A REPLICA WILL NOT REJOIN": replica_will_not_rejoin,
    "ETCD LOST ITS QUORUM": etcd_lost_its_quorum,
    "DISK FULL": disk_full,
    "SPLIT NETWORK": split_network,
    "REPLACING A HOST": replacing_a_host,
    "CHANGING PARAMETERS THAT NEED A RESTART": changing_parameters,
    "UPGRADING PGHA": upgrading,
    "FROM PATRONI, AND BACK": from_patroni_and_back,
    "RESTORING FROM BACKUP": restoring,
}


def test_every_chapter_has_a_story():
    assert set(chapters()) == set(STORIES)


@pytest.mark.parametrize("chapter", STORIES)
def test_the_runbook_s_commands_do_what_it_says(reader, chapter):
    try:
        STORIES[chapter](Story(reader, chapter))
    except BaseException:
        for node in reader.bed.nodes:
            print(f"\n--- the end of {node.log_path}\n{node.log_tail(60)}")
        raise

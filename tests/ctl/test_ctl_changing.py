"""Commands that change something: refused before it begins, done and reported, or honestly unknown."""

from __future__ import annotations

import json
import os
import pty
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ctl_world import World
from rest_world import Inbox, app_for, published

from pgha.clock import SystemClock
from pgha.ctl import main
from pgha.ctl.cluster import read
from pgha.ctl.ends import code_of
from pgha.ctl.settings import load
from pgha.ctl.switchover import outcome
from pgha.rest.access import Access
from pgha.rest.published import Board
from pgha.rest.requests import Answer
from pgha.rest.routes import App
from pgha.rest.tls import make_context


class Loop(Inbox):
    """The agents' loops, as far as ctl sees them: a request for a switchover is carried out in the store."""

    def __init__(self, world: World, *, refusal: str = "") -> None:
        super().__init__()
        self.world = world
        self.board = Board(published())
        self.refusal = refusal

    async def submit(self, kind: str, payload: Mapping[str, Any], *, deadline_s: float) -> Answer:
        self.asked.append((kind, dict(payload)))
        if kind not in ("switchover", "failover"):
            return self.answers[kind]
        if self.refusal:
            self.board.publish(published(number=2, refusal=self.refusal))
        else:
            leader = payload.get("member", "n2")
            self.world.put("leader", leader.encode(), leased=True)
            self.board.publish(published(number=2, held=False, leader=leader.encode()))
        return Answer(status=200, text="", revision=9)


def app_of(loop: Loop, *, access: Access | None = None) -> App:
    return App(loop.board, loop, clock=SystemClock(), access=access)


# --- switchover ----------------------------------------------------------------------------------------------------------

@pytest.mark.etcd
@pytest.mark.parametrize(("arguments", "asked", "text"), [
    (("switchover", "--force", "--candidate", "n3"), ("switchover", {"leader": "n1", "member": "n3"}), 'Successfully switched over to "n3"'),
    (("switchover", "--force", "--leader", "n1"), ("switchover", {"leader": "n1"}), 'Successfully switched over to "n2"'),
    (("failover", "--force", "--candidate", "n3"), ("failover", {"member": "n3"}), 'Successfully failed over to "n3"'),
])
def test_a_switchover_is_asked_of_the_leader_and_its_outcome_shown(world: World, start_agent: Any, arguments: tuple[str, ...], asked: Any, text: str) -> None:
    world.load("steady")
    loop = Loop(world)
    world.agent_at("n1", start_agent(app_of(loop)))
    code, out, err = world.ctl(*arguments)
    assert (code, err) == (0, "")
    assert loop.asked == [asked]
    assert out.startswith("Current cluster topology\n+ Cluster: bench (7711161683783831200) ")
    assert text in out
    assert out.count("+ Cluster:") == 2


@pytest.mark.etcd
def test_a_failed_switchover_says_why(world: World, start_agent: Any) -> None:
    world.load("steady")
    world.agent_at("n1", start_agent(app_of(Loop(world, refusal="n2: lag 2 MiB, limit 1 MiB"))))
    code, _, err = world.ctl("switchover", "--force")
    assert code == 1
    assert "Switchover failed, details: 503, Switchover failed: n2: lag 2 MiB, limit 1 MiB" in err


@pytest.mark.etcd
@pytest.mark.parametrize(("prepare", "arguments", "code", "text"), [
    ({}, ("switchover", "--force", "--candidate", "nobody"), 3, "member nobody does not exist in cluster bench or is tagged as nofailover"),
    ({}, ("switchover", "--force", "--candidate", "n1"), 3, "member n1 is already the leader"),
    ({}, ("switchover", "--force", "--leader", "n2"), 3, "member n2 is not the leader of cluster bench; n1 is"),
    ({}, ("failover", "--force"), 3, "failover could be performed only to a specific candidate"),
    ({}, ("switchover", "--candidate", "n2"), 2, "there is no terminal to ask on; allowed: --force"),
    ({}, ("switchover",), 2, "there is no terminal to ask on"),
    ({"leader": None}, ("switchover", "--force"), 3, "this cluster has no leader; allowed: failover --candidate NAME"),
    ({"members/n2": {"tags": {"nofailover": True}}}, ("switchover", "--force", "--candidate", "n2"), 3, "is tagged as nofailover"),
    ({"members/n2": None, "members/n3": None}, ("switchover", "--force"), 3, "no candidates found to switchover to"),
])
def test_what_cannot_be_is_refused_before_anybody_is_asked(world: World, prepare: dict[str, Any], arguments: tuple[str, ...], code: int, text: str) -> None:
    world.load("steady")
    for name, value in prepare.items():
        world.delete(name)
        if value is not None:
            world.put(name, value, leased=True)
    got, _, err = world.ctl(*arguments)
    assert got == code
    assert text in err
    assert json.loads(world.get("failover")) == {}


@pytest.mark.etcd
def test_a_refusal_of_the_agent_exits_with_3(world: World, start_agent: Any) -> None:
    world.load("steady")
    loop = Loop(world)
    loop.board.publish(published(etcd=None, leader=b"n3", held=False))      # the agent knows better who leads
    world.agent_at("n1", start_agent(app_of(loop)))
    code, _, err = world.ctl("switchover", "--force")
    assert code == 3
    assert "Switchover failed, details: 412, leader name does not match" in err


@pytest.mark.etcd
def test_credentials_are_sent_and_their_absence_reported(world: World, start_agent: Any) -> None:
    world.load("steady")
    world.agent_at("n1", start_agent(app_of(Loop(world), access=Access(username="u", password="p"))))
    assert world.ctl("switchover", "--force")[0] == 3
    world.extra = '[restapi.authentication]\nusername = "u"\npassword = "x"\n'
    code, _, err = world.ctl("switchover", "--force")
    assert code == 3
    assert "401, not authenticated" in err
    world.extra += '[ctl.authentication]\nusername = "u"\npassword = "p"\n'
    assert world.ctl("switchover", "--force")[0] == 0


@pytest.mark.etcd
def test_without_an_agent_the_request_is_written_to_the_store(world: World) -> None:
    world.load("steady")
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, ("127.0.0.1", 1))

    def carry_out() -> None:
        give_up_at = time.monotonic() + 20
        while json.loads(world.get("failover")) != {"leader": "n1", "member": "n2"} and time.monotonic() < give_up_at:
            pass      # each round is a question to etcd
        world.put("leader", b"n2", leased=True)

    agents = threading.Thread(target=carry_out, daemon=True)
    agents.start()
    code, out, err = world.ctl("switchover", "--force", "--candidate", "n2")
    agents.join(10)
    assert code == 0
    assert 'Successfully switched over to "n2"' in out
    assert "no agent can be asked; writing the request to the store" in err


@pytest.mark.etcd
def test_a_lost_answer_is_looked_up_in_the_store_and_nothing_sent_twice(world: World) -> None:
    world.load("steady")
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.agent_at("n1", server.getsockname())

        def take_and_hang_up() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                world.put("leader", b"n3", leased=True)

        thread = threading.Thread(target=take_and_hang_up, daemon=True)
        thread.start()
        code, out, _ = world.ctl("switchover", "--force", "--candidate", "n2")
        thread.join(10)
    assert code == 0
    assert 'Switched over to "n3" instead of "n2"' in out
    assert json.loads(world.get("failover")) == {}          # ctl wrote nothing itself


@pytest.mark.etcd
@pytest.mark.parametrize(("before", "then", "written", "text"), [
    (b"{}", None, False, "Switchover status unknown after 1 seconds; operation may still be in progress"),       # nobody has written anything yet
    (None, None, False, "Switchover status unknown after 1 seconds; operation may still be in progress"),
    (b"{}", b"{}", False, "Switchover failed"),      # it was written, and taken back
    (None, b"{}", False, "Switchover failed"),
    (b"{}", b'{"leader":"n1"}', False, "Switchover status unknown after 1 seconds; operation may still be in progress"),
    (b"{}", None, True, "Switchover failed"),
    (None, None, True, "Switchover failed"),
])
def test_that_a_request_has_failed_is_said_only_if_it_was_there(world: World, before: bytes | None, then: bytes | None, written: bool, text: str) -> None:  # noqa: FBT001  (the columns of the table)
    world.load("steady")
    world.put("failover", before) if before is not None else world.delete("failover")
    world.write_config()
    settings = load(config_file=str(world.config), scope=None, dcs_url=None, environ={})
    cluster = read(settings)
    if then is not None:
        world.put("failover", then)
    assert outcome(settings, cluster, "switchover", "n2", 1.0, written=written) == (503, text)
    assert code_of(503, text) == (1 if text == "Switchover failed" else 4)


# --- restart, reload -----------------------------------------------------------------------------------------------------

@pytest.mark.etcd
def test_members_are_restarted_one_after_the_other_the_leader_last(world: World, start_agent: Any) -> None:
    world.load("steady")
    order: list[str] = []

    class Noting(Inbox):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        async def submit(self, kind: str, payload: Mapping[str, Any], *, deadline_s: float) -> Answer:
            order.append(f"{kind} {self.name} {dict(payload)}")
            if self.name == "n3" and kind == "restart":
                return Answer(status=503, text="restart failed")
            return Answer(status=200, text="restarted successfully") if kind == "restart" else Answer(status=202, text="reload scheduled")

    for name in ("n1", "n2", "n3"):
        app, *_ = app_for(published())
        noting = Noting(name)
        app.requests, app.changes._requests = noting, noting
        world.agent_at(name, start_agent(app))
    code, out, err = world.ctl("restart", "bench", "--force", "--timeout", "30")
    assert code == 1
    assert out.endswith("Success: restart on member n2\nSuccess: restart on member n1\n")
    assert "Failed: restart for member n3, status code=503, (restart failed)" in err
    assert order == [f"restart {name} {{'timeout_s': 30.0}}" for name in ("n2", "n3", "n1")]
    order.clear()
    assert world.ctl("restart", "n2", "--force")[0] == 0
    assert world.ctl("restart", "--role", "leader", "--force")[0] == 0
    raw = json.loads(world.get("members/n2"))
    world.put("members/n2", {**raw, "pending_restart": True}, leased=True)
    assert world.ctl("restart", "--role", "replica", "--any", "--pending", "--force")[0] == 0
    assert order == ["restart n2 {}", "restart n1 {}", "restart n2 {}"]
    order.clear()
    code, out, _ = world.ctl("reload", "--force")
    assert code == 0
    assert "Reload request received for member n1 and will be processed within 1 seconds\n" in out
    assert len(order) == 3
    assert world.ctl("restart", "nobody", "--force")[:1] == (2,)
    assert world.ctl("restart", "n2")[0] == 2
    assert world.ctl("restart", "n2", "--force", "--timeout", "soon")[0] == 3
    world.agent_at("n2", ("127.0.0.1", 1))
    assert world.ctl("restart", "n2", "--force")[0] == 5
    assert world.ctl("reload", "n2", "--force")[0] == 5


# --- edit-config ---------------------------------------------------------------------------------------------------------

@pytest.mark.etcd
def test_configuration_is_changed_and_the_difference_shown(world: World) -> None:
    world.load("steady")
    code, out, err = world.ctl("edit-config", "--force", "-s", "ttl=21", "-p", "work_mem=8MB", "-p", "pg_stat_statements.max=500", "-s", "failsafe_mode=null")
    assert code == 0
    assert err.startswith("pgha: no agent answers")      # so that PostgreSQL was not asked
    assert "-ttl = 20\n+ttl = 21\n" in out
    assert '+work_mem = "8MB"' in out
    assert out.endswith("Configuration changed\n")
    config = json.loads(world.get("config"))
    assert config["ttl"] == 21
    assert config["postgresql"]["parameters"]["pg_stat_statements.max"] == 500
    assert config["postgresql"]["parameters"]["max_connections"] == 60
    assert "failsafe_mode" not in config
    assert world.ctl("edit-config", "--force", "-s", "ttl=21") == (0, "Not changed\n", "")


@pytest.mark.etcd
@pytest.mark.parametrize(("arguments", "code", "text"), [
    (("-s", "ttl=0"), 2, "ttl"),
    (("-s", "ttl=x"), 2, "ttl"),
    (("-s", "tttl=20"), 2, "tttl"),
    (("-s", "ttl"), 2, "'ttl' is not KEY=VALUE"),
    (("-s", ".a=1"), 2, "is not KEY=VALUE"),
    ((), 2, "nothing to change"),
])
def test_a_wrong_change_changes_nothing(world: World, arguments: tuple[str, ...], code: int, text: str) -> None:
    world.load("steady")
    before = world.get("config")
    got, _, err = world.ctl("edit-config", "--force", *arguments)
    assert got == code
    assert text in err
    assert world.get("config") == before


@pytest.mark.etcd
def test_without_force_and_terminal_nothing_is_changed(world: World) -> None:
    world.load("steady")
    before = world.get("config")
    code, out, err = world.ctl("edit-config", "-s", "ttl=21")
    assert code == 2
    assert "+ttl = 21" in out
    assert "allowed: --force" in err
    assert world.get("config") == before


@pytest.mark.etcd
def test_an_unreadable_configuration_is_not_overwritten(world: World) -> None:
    world.load("steady")
    world.put("config", b"{broken")
    assert world.ctl("edit-config", "--force", "-s", "ttl=21")[0] == 1
    assert world.get("config") == b"{broken"


@pytest.mark.etcd
def test_a_compare_that_fails_is_reported(world: World) -> None:
    from pgha.ctl.settings import Etcd
    from pgha.ctl.store import Store

    world.load("steady")
    store = Store(Etcd(tuple(world.etcd.urls)))
    revision = store.read(world.root)["config"].revision
    assert store.write(world.root + "config", b"{}", if_revision=revision) is True
    assert store.write(world.root + "config", b'{"a":1}', if_revision=revision) is False
    assert store.write(world.root + "new", b"x", if_revision=0) is True
    assert world.get("config") == b"{}"


# --- failover to who is not synchronous ------------------------------------------------------------------------------------

LOSES = "pgha: warning: n3 is an asynchronous node: a failover to it may lose commits\n"


@pytest.mark.etcd
@pytest.mark.parametrize(("arguments", "sync", "warned"), [
    (("failover", "--candidate", "n3"), {}, True),
    (("failover", "--candidate", "n2"), {}, False),
    (("failover", "--candidate", "n3"), {"sync_standby": "n2,N3"}, False),
    (("failover", "--candidate", "n3"), {"leader": "n3"}, False),          # the leader that is gone
    (("failover", "--candidate", "n3"), {"leader": None}, False),          # empty
    (("switchover", "--candidate", "n3"), {}, False),                      # waits for it to have everything
])
def test_a_failover_that_may_lose_commits_says_so(world: World, start_agent: Any, arguments: tuple[str, ...], sync: dict[str, Any], warned: bool) -> None:  # noqa: FBT001  (the columns of the table)
    world.load("synchronous")
    world.put("sync", {"leader": "n1", "quorum": 0, "sync_standby": "n2", **sync})
    world.agent_at("n1", start_agent(app_of(Loop(world))))
    code, _, err = world.ctl(*arguments, "--dry-run")
    assert (LOSES in err) is warned
    code, _, err = world.ctl(*arguments, "--force")
    assert (code, err) == (0, LOSES if warned else "")
    world.put("leader", b"n1", leased=True)
    world.put("config", {"synchronous_mode": False})
    assert LOSES not in world.ctl(*arguments, "--dry-run")[2]


@pytest.mark.etcd
@pytest.mark.parametrize(("typed", "code", "asked"), [(b"n\n", 3, 1), (b"y\nn\n", 3, 2), (b"y\ny\n", 0, 2)])
def test_on_a_terminal_a_failover_that_may_lose_commits_is_asked_for_twice(world: World, start_agent: Any, typed: bytes, code: int, asked: int) -> None:
    world.load("synchronous")
    world.agent_at("n1", start_agent(app_of(Loop(world))))
    got, _, err = on_a_terminal(world, typed, "failover", "--candidate", "n3")
    assert got == code, err
    questions = ["Are you sure you want to failover to the asynchronous node n3? [y/N]: ", "Are you sure you want to failover cluster bench, demoting current leader n1? [y/N]: "]
    assert [question in err for question in questions] == [number < asked for number in range(2)]


# --- TLS -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and a certificate for 127.0.0.1 that serves both sides."""
    path = tmp_path_factory.mktemp("certificates")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=path, check=True, capture_output=True, timeout=30)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test-ca")
    (path / "node.ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=node")
    openssl("x509", "-req", "-in", "node.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "node.ext", "-out", "node.crt")
    return path


@pytest.mark.etcd
def test_agents_are_asked_over_tls_with_a_client_certificate(world: World, start_agent: Any, certificates: Path) -> None:
    world.load("steady")
    context = make_context(certfile=f"{certificates}/node.crt", keyfile=f"{certificates}/node.key", cafile=f"{certificates}/ca.crt", verify_client="optional")
    host, port = start_agent(app_of(Loop(world), access=Access(require_cert=True)), ssl_context=context)
    raw = json.loads(world.get("members/n1"))
    world.put("members/n1", {**raw, "api_url": f"https://{host}:{port}/patroni"}, leased=True)
    code, _, err = world.ctl("explain", "n1")
    assert code == 5
    assert "certificate verify failed" in err.lower() or "self-signed" in err.lower() or "certificate_verify_failed" in err.lower()
    assert world.ctl("explain", "-k", "n1")[0] == 0
    world.extra = "[ctl]\ninsecure = true\n"
    assert world.ctl("explain", "n1")[0] == 0
    world.extra = f'[ctl]\ncacert = "{certificates}/ca.crt"\n'
    assert world.ctl("explain", "n1")[0] == 0
    code, _, err = world.ctl("switchover", "--force")
    assert code == 3
    assert "403, client certificate required" in err
    world.extra += f'certfile = "{certificates}/node.crt"\nkeyfile = "{certificates}/node.key"\n'
    assert world.ctl("switchover", "--force")[0] == 0


@pytest.mark.etcd
@pytest.mark.parametrize("by", ["file", "environment"])
def test_the_node_s_own_certificate_is_shown_where_ctl_has_none(world: World, start_agent: Any, certificates: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    world.load("steady")
    server = make_context(certfile=f"{certificates}/node.crt", keyfile=f"{certificates}/node.key", cafile=f"{certificates}/ca.crt", verify_client="optional")
    host, port = start_agent(app_of(Loop(world), access=Access(require_cert=True)), ssl_context=server)
    raw = json.loads(world.get("members/n1"))
    world.put("members/n1", {**raw, "api_url": f"https://{host}:{port}/patroni"}, leased=True)
    subprocess.run(["openssl", "rsa", "-aes256", "-passout", "pass:geheim", "-in", certificates / "node.key", "-out", certificates / f"{by}.key"],
                   check=True, capture_output=True, timeout=30)
    own = {"cafile": f"{certificates}/ca.crt", "certfile": f"{certificates}/node.crt", "keyfile": f"{certificates}/{by}.key", "keyfile_password": "geheim"}
    if by == "file":
        world.extra = "[restapi]\n" + "".join(f'{key} = "{value}"\n' for key, value in own.items())
    else:
        for key, value in own.items():
            monkeypatch.setenv(f"PGHA_RESTAPI_{key.upper()}", value)
    assert world.ctl("switchover", "--force")[0] == 0
    world.extra += f'[ctl]\ncertfile = "{certificates}/nothing.crt"\n'       # its own counts, also where it does not work
    code, _, err = world.ctl("explain", "n1")
    assert (code, "nothing.crt: No such file or directory" in err) == (2, True)


@pytest.mark.etcd
@pytest.mark.parametrize(("file", "contents"), [("missing.key", None), ("broken.key", "no key")])
def test_a_certificate_of_the_node_that_cannot_be_used_is_done_without_and_said_once(world: World, start_agent: Any, certificates: Path, file: str, contents: str | None) -> None:
    world.load("steady")
    server = make_context(certfile=f"{certificates}/node.crt", keyfile=f"{certificates}/node.key", cafile=f"{certificates}/ca.crt", verify_client="optional")
    host, port = start_agent(app_of(Loop(world), access=Access(require_cert=True)), ssl_context=server)
    for name in ("n1", "n2"):
        world.put(f"members/{name}", {**json.loads(world.get(f"members/{name}")), "api_url": f"https://{host}:{port}/patroni"}, leased=True)
    if contents is not None:
        (certificates / file).write_text(contents)
    world.extra = f'[restapi]\ncafile = "{certificates}/ca.crt"\ncertfile = "{certificates}/node.crt"\nkeyfile = "{certificates}/{file}"\n'
    code, out, err = world.ctl("version", "n1", "n2")
    assert code == 0
    assert out.count("pgha 0.1.0") == 2
    assert err.count("agents are asked without a client certificate (ctl.certfile and ctl.keyfile: one that this user may read)\n") == len(err.splitlines()) == 1
    assert f"{certificates}/{file}" in err


@pytest.mark.etcd
def test_the_store_is_read_over_tls(certificates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from etcd_server import EtcdCluster

    trust = ssl.create_default_context(cafile=f"{certificates}/ca.crt")
    trust.load_cert_chain(certificates / "node.crt", certificates / "node.key")
    arguments = ("--cert-file", f"{certificates}/node.crt", "--key-file", f"{certificates}/node.key", "--client-cert-auth",
                 "--trusted-ca-file", f"{certificates}/ca.crt")
    with EtcdCluster(1, *arguments, scheme="https", ssl_context=trust) as cluster:
        file = tmp_path / "pgha.toml"
        head = f'scope = "bench"\n[etcd3]\nprotocol = "https"\nhosts = ["127.0.0.1:1", "{cluster.urls[0].removeprefix("https://")}"]\ncacert = "{certificates}/ca.crt"\n'
        file.write_text(f'{head}cert = "{certificates}/node.crt"\nkey = "{certificates}/node.key"\n')
        assert main(["-c", str(file), "list"]) == 1
        assert "there is no cluster 'bench'" in capsys.readouterr().err
        file.write_text(head)
        assert main(["-c", str(file), "list"]) == 5
        assert "no etcd endpoint answers" in capsys.readouterr().err


# --- a terminal ----------------------------------------------------------------------------------------------------------

@pytest.mark.etcd
@pytest.mark.parametrize(("typed", "code", "ttl"), [(b"y\n", 0, 21), (b"n\n", 3, 20), (b"\n", 3, 20), (b"\x04", 2, 20)])
def test_on_a_terminal_it_asks_and_does_what_is_answered(world: World, typed: bytes, code: int, ttl: int) -> None:
    world.load("steady")
    got, out, err = on_a_terminal(world, typed, "edit-config", "-s", "ttl=21")
    assert got == code, (out, err)
    assert "Apply these changes? [y/N]: " in err
    assert json.loads(world.get("config"))["ttl"] == ttl
    assert ("aborted: nothing was changed" in err) is (code != 0)


def on_a_terminal(world: World, typed: bytes, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of ctl that is typed this."""
    world.write_config()
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from pgha.ctl import main; sys.exit(main(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen([sys.executable, "-c", program, "-c", str(world.config), *arguments],
                              stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            os.write(ours, typed)
            out, err = process.communicate(timeout=30)
    finally:
        os.close(ours)
        os.close(theirs)
    return process.returncode, out.decode(), err.decode()

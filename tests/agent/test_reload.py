"""SIGHUP: what only another start can change stays as it was in every place that reads it, and is named."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from agent_world import ETCD3, POSTGRESQL, TrioClock, local, run, text

from pgha.agent import APPLY_AGAIN_S, Agent
from pgha.as_started import as_started
from pgha.config.load import load
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.errors import PostgresUnreachable
from pgha.model.action import ApplyConfiguration

TLS = 'certfile = "/c.crt"\nkeyfile = "/c.key"\ncafile = "/ca.crt"\nverify_client = "optional"'


@pytest.mark.parametrize(("before", "after", "named"), [
    (text(), text(restapi='certfile = "/c"'), ["restapi.certfile"]),
    (text(restapi=TLS), text(), ["restapi.certfile"]),
    (text(), text().replace(":8008", ":8009"), ["restapi.listen"]),
    (text(), text(restapi=TLS + '\nconnect_address = "10.0.0.9:8009"').replace(":8008", ":8009"), ["restapi.listen", "restapi.certfile"]),
    (text(), text(restapi="request_queue_size = 7"), ["restapi.request_queue_size"]),
    (text(), text(restapi='server_tokens = "Minimal"'), ["restapi.http_extra_headers, https_extra_headers, server_tokens"]),
    (text(), text(etcd3='hosts = ["10.0.0.3"]\nusername = "u"\npassword = "p"'), ["etcd3 (none of the former endpoints is left)"]),
    (text(), text(etcd3=ETCD3 + '\nprotocol = "https"\ncacert = "/ca"'), ["etcd3 (none of the former endpoints is left)"]),
    (text(), text(etcd3='hosts = ["10.0.0.2", "10.0.0.3"]'), ["etcd3.hosts, url or protocol"]),
    (text(), text(postgresql='listen = "127.0.0.1:5433"'), ["postgresql.listen"]),
    (text(), text(postgresql=POSTGRESQL + '\nbin_dir = "/b"\npgpass = "/p"\nconfig_dir = "/e"'), ["postgresql.bin_dir", "postgresql.config_dir", "postgresql.pgpass"]),
    (text(), text(more='[watchdog]\nmode = "required"\ndevice = "/dev/watchdog1"'), ["watchdog"]),
    (text(), text(more='[pgha]\nguard = "service"'), ["pgha.guard"]),
])
def test_what_only_another_start_can_change_stays_and_is_named(before: str, after: str, named: list[str]) -> None:
    running = local(before)
    kept, said = as_started(running, local(after))
    assert [line.removesuffix(": the change takes effect at the agent's next start") for line in said] == named
    for section in ("restapi", "etcd3", "postgresql", "watchdog", "pgha", "ctl"):
        for key in getattr(running, section).__struct_fields__:
            if key != "given" and "password" not in key and key != "authentication":
                assert getattr(getattr(kept, section), key) == getattr(getattr(running, section), key), key
    assert as_started(kept, local(after))[1] == said       # for as long as the file says something else


@pytest.mark.parametrize(("before", "after"), [
    (text(), text(restapi='connect_address = "10.0.0.9:8008"')),
    (text(restapi=TLS), text(restapi=TLS.replace("/c.crt", "/new.crt").replace("optional", "none"))),
    (text(), text(etcd3=ETCD3 + '\nusername = "u"\npassword = "p"')),
    (text(), text(postgresql=POSTGRESQL + '\nconnect_address = "10.0.0.9:5432"')),
    (text(), text(more='[ctl]\ncertfile = "/c"')),
    (text(more='[ctl]\ncertfile = "/c"'), text(more='[ctl]\ncertfile = "/d"')),
    (text(more='[ctl]\ncertfile = "/c"'), text()),
])
def test_everything_else_counts_at_once(before: str, after: str) -> None:
    new = local(after)
    assert as_started(local(before), new) == (new, ())


def test_a_user_and_a_password_are_taken_while_the_store_is_the_same() -> None:
    """An endpoint more, and a password that was changed, in one file: without the password the agent would lose its store."""
    kept, said = as_started(local(text(etcd3=ETCD3 + '\nusername = "u"\npassword = "one"')),
                            local(text(etcd3='hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]\nusername = "u"\npassword = "two"')))
    assert (len(kept.etcd3.endpoints), kept.etcd3.password.reveal(), len(said)) == (2, "two", 1)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the agent logs, also after a reload has set logging up anew."""
    root, own = logging.getLogger(), logging.getLogger("pgha")
    handlers, level = list(root.handlers), root.level
    own.addHandler(caplog.handler)
    root.removeHandler(caplog.handler)
    yield caplog
    own.removeHandler(caplog.handler)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:      # noqa: S108  (the runtime directory has to be on tmpfs)
        yield Path(path)


def test_the_agent_takes_nothing_of_such_a_change_and_warns_as_at_its_start(tmp_path: Path, on_tmpfs: Path, said: pytest.LogCaptureFixture) -> None:
    file, secret = tmp_path / "pgha.toml", tmp_path / "password"
    secret.write_text("geheim\n")
    secret.chmod(0o644)

    def write(*, more: str = "", **parts: str) -> None:
        file.write_text(text(data_dir=str(tmp_path / "data"), more=f'{more}\n[pgha]\nruntime_dir = "{on_tmpfs}"', **parts))

    async def main() -> None:
        write()
        world = MemoryWorld()
        agent = Agent(load(file, {}), path=str(file), environ={}, clock=TrioClock(), store=lambda _: MemoryStore(world))
        published = (agent._api_url(), agent._conn_url(), agent.wanted.local_conninfo(), agent.settings.watchdog_required)
        write(restapi=f'certfile = "/c"\n[restapi.authentication]\nusername = "u"\npassword_file = "{secret}"', postgresql='listen = "127.0.0.1:5433"',
              more='[watchdog]\nmode = "required"\n[tags]\nnofailover = true')
        assert await agent._read_again() == ()
        assert (agent._api_url(), agent._conn_url(), agent.wanted.local_conninfo(), agent.settings.watchdog_required) == published
        assert agent.settings.tags.raw == {"nofailover": True}
        assert [(r.getMessage(), r.facts["problem"].partition(":")[0]) for r in said.records if hasattr(r, "facts") and "problem" in r.facts] == [
            ("reload", "restapi.certfile"), ("reload", "postgresql.listen"), ("reload", "watchdog"), ("configuration", str(file))]
        assert f"{secret} is readable by everybody" in said.records[-2].facts["problem"]      # type: ignore[attr-defined]

    trio.run(main)        # in real time: it reads files in a thread


def test_a_reload_that_could_not_be_given_to_postgresql_is_given_again(tmp_path: Path, on_tmpfs: Path) -> None:
    """Also when nothing of ours has changed: its certificate may have. And whatever the node was doing when it was asked for."""
    file = tmp_path / "pgha.toml"
    file.write_text(text(data_dir=str(tmp_path / "data"), more=f'[pgha]\nruntime_dir = "{on_tmpfs}"'))

    async def at_once(work: Callable[[], Any], **_: Any) -> Any:
        return work()

    async def main() -> None:
        agent = Agent(load(file, {}), path=str(file), environ={}, clock=TrioClock(), store=lambda _: MemoryStore(MemoryWorld()))
        agent._applied = agent._to_apply()
        agent.surface._in_thread = at_once      # virtual time does not wait for threads
        fails, applied = True, list[bool]()

        async def quick(action: ApplyConfiguration, _deadline_s: float) -> None:
            applied.append(action.force)
            if fails:
                raise PostgresUnreachable("not now")

        agent.actor.quick = quick       # type: ignore[method-assign,assignment]
        assert not agent._settings_now().configuration_changed
        assert await agent._read_again() == ()
        assert agent._settings_now().configuration_changed
        with pytest.raises(PostgresUnreachable):
            await agent._quick(ApplyConfiguration())
        assert not agent._settings_now().configuration_changed, "not at once"
        await trio.sleep(APPLY_AGAIN_S)
        assert agent._settings_now().configuration_changed
        fails = False
        await agent._quick(ApplyConfiguration())
        await trio.sleep(APPLY_AGAIN_S)
        assert not agent._settings_now().configuration_changed
        await agent._quick(ApplyConfiguration())        # because a parameter has changed
        assert applied == [True, True, False]

    run(main)

"""Who may reach an agent follows its members and its files; what cannot be read is named and changes nothing."""

from __future__ import annotations

import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import agent_world
import pytest
import trio
import trio.testing
from msgspec.structs import replace
from trio.testing import MockClock

from pgha.config.addresses import Address
from pgha.config.local import LocalConfig
from pgha.dcs.etcd3 import Etcd3Store
from pgha.errors import ConfigError, PostgresUnreachable
from pgha.model.cluster import ClusterView, Member
from pgha.postgres.connection import resolve
from pgha.reread import Reread
from pgha.rest.access import Access
from pgha.rest.refusals import AGAIN_S, Refusals
from pgha.rest.tls import make_context
from pgha.rest.wire import Request
from pgha.surface import ASK_AGAIN_S, ASK_ANEW_S, Surface


def local(restapi: str = "", etcd3: str = "", more: str = "") -> LocalConfig:
    return agent_world.local(agent_world.text(restapi=restapi, etcd3=f'host = "127.0.0.1"\n{etcd3}', more=more))


class View:
    """What is published: members at these hosts."""

    def __init__(self, *hosts: str) -> None:
        self.view = ClusterView(members={host: Member(name=host, api_url=f"http://{host}:8008/patroni") for host in hosts})


def allowed(access: Access, peer: str) -> bool:
    return access.refuses(Request(method="POST", path="/reload", peer=peer)) is None


@pytest.mark.parametrize(("restapi", "hosts", "may", "may_not"), [
    ("", ["10.0.0.1"], ["192.0.2.1", "10.0.0.1"], []),
    ('allowlist = ["10.0.1.0/24"]', ["10.0.0.1"], ["10.0.1.7"], ["10.0.0.1"]),
    ('allowlist = ["10.0.1.0/24"]\nallowlist_include_members = true', ["10.0.0.1", "10.0.0.2"], ["10.0.1.7", "10.0.0.1", "10.0.0.2"], ["10.0.0.3"]),
    ("allowlist_include_members = true", ["10.0.0.1", "localhost"], ["10.0.0.1", "127.0.0.1"], ["10.0.0.3"]),
    ("allowlist_include_members = true", [], [], ["10.0.0.1"]),
    ("allowlist_include_members = true", ["10.0.0.1", "no.such.name.invalid"], ["10.0.0.1"], ["10.0.0.3"]),
    ("allowlist_include_members = true", ["10.0.0.1", "node9..example.com", "x" * 64 + ".example.com", "n_1é.x", "-é"], ["10.0.0.1"], ["10.0.0.3"]),
])
def test_members_and_listed_addresses_are_allowed(restapi: str, hosts: list[str], may: list[str], may_not: list[str]) -> None:
    async def main() -> None:
        surface = Surface(local(restapi))
        await surface.listen()
        taken: list[Access] = []
        async with trio.open_nursery() as nursery:
            seen = trio.Event()

            async def changed(_: object) -> View:
                seen.set()
                return await trio.sleep_forever()      # type: ignore[return-value]

            nursery.start_soon(surface.keep_members, lambda: View(*hosts), changed, taken.append)
            with trio.fail_after(20):
                await seen.wait()
            nursery.cancel_scope.cancel()
        access = taken[-1] if taken else surface.access
        assert [allowed(access, peer) for peer in may] == [True] * len(may)
        assert [allowed(access, peer) for peer in may_not] == [False] * len(may_not)

    trio.run(main)


@pytest.mark.parametrize("host", ["node9..example.com", "x" * 64 + ".example.com", "n_1é.x", "-é"])
def test_what_is_no_name_is_an_error_that_is_known(host: str) -> None:
    """Python's codec for names raises UnicodeError, which is no OSError; in the store stands whatever somebody wrote."""
    with pytest.raises(PostgresUnreachable, match="it is no host name|cannot resolve"):
        trio.run(partial(resolve, host, deadline_s=5.0))


@pytest.mark.parametrize("address", ["node9..example.com:8008", "x" * 64 + ":8008", ".example.com"])
def test_an_address_with_a_label_that_no_name_has_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no host"):
        local(f'connect_address = "{address}"')


def test_a_member_that_leaves_loses_its_right_and_a_view_without_members_takes_none() -> None:
    async def main() -> None:
        surface = Surface(local("allowlist_include_members = true"))
        await surface.listen()
        views = [View("10.0.0.1", "10.0.0.2"), View(), View("10.0.0.2")]
        rights: list[tuple[bool, bool]] = []

        async def changed(_: object) -> View:
            rights.append((allowed(surface.access, "10.0.0.1"), allowed(surface.access, "10.0.0.2")))
            if not views:
                raise EOFError
            return views.pop(0)

        with pytest.raises(EOFError):
            await surface.keep_members(lambda: views.pop(0), changed, lambda _: None)
        assert rights == [(True, True), (True, True), (False, True)]

    trio.run(main)


def test_a_silent_name_server_takes_no_right_away_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses once known go on counting; a name without an answer is asked for until there is one."""
    known = {"n1.x": "10.0.0.1", "n2.x": "10.0.0.2"}
    silent = False

    def look_up(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if silent or name not in known:
            raise OSError("no answer")
        return [(0, 0, 0, "", (known[name], 0))]

    monkeypatch.setattr("pgha.rest.access.socket.getaddrinfo", look_up)

    async def main() -> None:
        nonlocal silent
        surface = Surface(local("allowlist_include_members = true"))
        await surface.listen()
        rights: list[list[bool]] = []

        async def changed(_: object) -> View:
            nonlocal silent
            rights.append([allowed(surface.access, f"10.0.0.{n}") for n in (1, 2, 3)])
            match len(rights):
                case 1:
                    silent = True
                case 2:
                    silent, known["n3.x"] = False, "10.0.0.3"
                    await trio.sleep(ASK_AGAIN_S + 1)
                case 3:
                    raise EOFError
            return View("n1.x", "n2.x", "n3.x")

        with pytest.raises(EOFError):
            await surface.keep_members(lambda: View("n1.x", "n2.x"), changed, lambda _: None)
        assert rights == [[True, True, False], [True, True, False], [True, True, True]]

    trio.run(main, clock=MockClock(autojump_threshold=0.1))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tls")
    for name in ("old", "new"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key",
                        "-out", f"{name}.crt", "-subj", f"/CN={name}", "-days", "2"], cwd=place, check=True, capture_output=True, timeout=30)
    return place


def test_a_reload_replaces_what_it_can_read_and_names_what_it_cannot(certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    def with_files(name: str, password: str) -> LocalConfig:
        file = certificates / name
        return local(f'certfile = "{file}.crt"\nkeyfile = "{file}.key"\nciphers = "DEFAULT"',
                     f'protocol = "https"\nusername = "u"\npassword = "{password}"', f'[restapi.authentication]\nusername = "u"\npassword = "{password}"\n')

    async def main() -> None:
        surface = Surface(with_files("old", "one"))
        store = surface.open_store(with_files("old", "one"))
        assert isinstance(store, Etcd3Store)
        listen = await surface.listen()
        assert listen.tls is surface.tls is not None
        before, header = listen.tls.context, surface.authorization()
        await surface.reload(with_files("new", "two"))
        assert listen.tls.context is not before
        assert surface.access.password == "two"
        assert surface.authorization() != header
        assert store._client._credentials is not None
        assert b"two" in store._client._credentials
        assert not caplog.records
        kept = listen.tls.context
        await surface.reload(with_files("gone", "three"))
        assert listen.tls.context is kept
        assert surface.access.password == "three"       # one thing's trouble does not keep the others from being taken
        assert [(r.getMessage(), r.facts["problem"].partition(": ")[0]) for r in caplog.records] == [     # type: ignore[attr-defined]
            ("certificate not reloaded", "restapi.certfile"), ("client certificate not reloaded", "restapi.certfile")]
        await store.aclose()

    trio.run(main)


@pytest.mark.parametrize(("restapi", "etcd3", "named"), [
    ('certfile = "/gone"', "", "restapi.certfile: cannot use /gone"),
    ("", 'protocol = "https"\ncacert = "/gone"', "etcd3.cacert: cannot use /gone"),
    ("", 'protocol = "https"\ncert = "/gone"', "etcd3: cert or key cannot be used"),
])
def test_a_file_that_is_not_there_ends_the_start(restapi: str, etcd3: str, named: str) -> None:
    async def main() -> None:
        given = local(restapi, etcd3)
        surface = Surface(given)
        surface.open_store(given)
        await surface.listen()

    with pytest.raises(ConfigError, match=named):
        trio.run(main)


def test_a_key_with_a_password_that_is_missing_does_not_ask_the_terminal(certificates: Path) -> None:
    locked = certificates / "locked.key"
    subprocess.run(["openssl", "ec", "-in", "old.key", "-aes256", "-passout", "pass:x", "-out", str(locked)], cwd=certificates, check=True, capture_output=True, timeout=30)
    with pytest.raises(ConfigError, match="etcd3: cert or key"):
        surface = local("", f'protocol = "https"\ncert = "{certificates / "old.crt"}"\nkey = "{locked}"')
        Surface(surface).open_store(surface)


def test_refusals_are_named_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        refusals = Refusals()
        for _ in range(1000):
            refusals.note("10.0.0.1", "not authenticated", path="/restart")
        refusals.note("10.0.0.1", "Access is denied")
        refusals.note("10.0.0.2", "not authenticated")
        await trio.sleep(AGAIN_S + 1)
        refusals.note("10.0.0.1", "not authenticated", path="/restart")
        assert [(r.facts["peer"], r.facts["why"], r.facts.get("more_since")) for r in caplog.records] == [     # type: ignore[attr-defined]
            ("10.0.0.1", "not authenticated", None), ("10.0.0.1", "Access is denied", None), ("10.0.0.2", "not authenticated", None),
            ("10.0.0.1", "not authenticated", 999)]
        for n in range(10_000):
            refusals.note(f"10.1.{n >> 8}.{n & 255}", "not authenticated")
        assert len(refusals._said) <= 256

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_context_for_peers_shows_our_certificate_and_checks_no_name(certificates: Path) -> None:
    for given in (f'certfile = "{certificates / "old.crt"}"\nkeyfile = "{certificates / "old.key"}"', ""):
        context = Surface(local(given))._peers
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)


async def shown_to(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    """The certificate that a client with this context shows to that server."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        outer = trio.SSLStream(ours, client, server_hostname="peer")
        inner = trio.SSLStream(theirs, server, server_side=True)
        nursery.start_soon(outer.do_handshake)
        await inner.do_handshake()
        return inner.getpeercert(binary_form=True)


def test_a_client_certificate_that_a_reload_brings_is_shown(certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Turning on mutual TLS node by node: ctl.certfile first, on nodes that have no certificate yet."""
    def with_certificate(name: str) -> LocalConfig:
        return local(more=f'[ctl]\ncertfile = "{certificates / name}.crt"\nkeyfile = "{certificates / name}.key"\n')

    async def main() -> None:
        server = make_context(certfile=str(certificates / "old.crt"), keyfile=str(certificates / "old.key"), cafile=str(certificates / "new.crt"), verify_client="optional")
        surface = Surface(local())
        await surface.listen()
        assert await shown_to(server, surface._peers) is None
        await surface.reload(with_certificate("gone"))
        assert [r.facts["problem"].partition(" with")[0] for r in caplog.records] == [f"ctl.certfile: cannot use {certificates}/gone.crt"]     # type: ignore[attr-defined]
        assert await shown_to(server, surface._peers) is None
        await surface.reload(with_certificate("new"))
        assert await shown_to(server, surface._peers) == ssl.PEM_cert_to_DER_cert((certificates / "new.crt").read_text())

    trio.run(main)


@pytest.fixture
def unfit(certificates: Path, tmp_path: Path) -> Callable[[str], dict[str, Path]]:
    """new.crt with a key that is no good for it, as while somebody puts both there one after the other."""
    def with_key(kind: str) -> dict[str, Path]:
        key = (certificates / "new.key").read_bytes()
        content = {"another's": (certificates / "old.key").read_bytes(), "half": key[:len(key) // 2], "empty": b"", "gone": None}[kind]
        if content is not None:
            (tmp_path / "the.key").write_bytes(content)
        return {"certfile": certificates / "new.crt", "keyfile": tmp_path / "the.key"}
    return with_key


@pytest.mark.parametrize("kind", ["another's", "half", "empty", "gone"])
def test_a_key_that_does_not_fit_leaves_the_certificate_in_use_as_it_was(certificates: Path, caplog: pytest.LogCaptureFixture, unfit: Callable[[str], dict[str, Path]], kind: str) -> None:
    def given(certfile: Path, keyfile: Path) -> LocalConfig:
        return local(f'certfile = "{certfile}"\nkeyfile = "{keyfile}"', f'protocol = "https"\ncert = "{certfile}"\nkey = "{keyfile}"\ncacert = "{certificates / "old.crt"}"')

    async def main() -> None:
        old = given(certificates / "old.crt", certificates / "old.key")
        server = make_context(certfile=str(certificates / "old.crt"), keyfile=str(certificates / "old.key"), cafile=str(certificates / "old.crt"), verify_client="required")
        surface = Surface(old)
        store = surface.open_store(old)
        await surface.listen()
        await surface.reload(given(**unfit(kind)))
        assert sorted(r.facts["problem"].partition(":")[0] for r in caplog.records) == ["etcd3", "restapi.certfile", "restapi.certfile"]     # type: ignore[attr-defined]
        assert surface._etcd_tls is not None
        surface._etcd_tls.check_hostname = False
        shown = ssl.PEM_cert_to_DER_cert((certificates / "old.crt").read_text())
        assert [await shown_to(server, context) for context in (surface._peers, surface._etcd_tls)] == [shown, shown]
        await store.aclose()

    trio.run(main)


def test_a_disk_that_hangs_during_a_reload_holds_up_nobody(certificates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the loop, not what else the reload brings, and not the next reload, which brings another path."""
    monkeypatch.setattr("pgha.surface.FILES_S", 0.2)

    def given(cacert: Path, password: str) -> LocalConfig:
        return local('allowlist = ["10.0.0.1"]', f'protocol = "https"\ncacert = "{cacert}"', f'[restapi.authentication]\nusername = "u"\npassword = "{password}"\n')

    async def main() -> None:
        surface = Surface(given(certificates / "old.crt", "one"))
        store = surface.open_store(given(certificates / "old.crt", "one"))
        await surface.listen()
        os.mkfifo(tmp_path / "hangs")
        reread = Reread(partial(again, surface, iter([given(tmp_path / "hangs", "two"), given(certificates / "new.crt", "three")])))
        async with trio.open_nursery() as nursery:
            await nursery.start(reread.run)
            for password in ("two", "three"):
                with trio.fail_after(10):
                    await reread.outcome()
                assert surface.access.password == password
            nursery.cancel_scope.cancel()
        assert [r.facts["problem"] for r in caplog.records] == ["their files could not be read within 0.2 s"]     # type: ignore[attr-defined]
        for _ in range(2):      # the thread reads it, and OpenSSL reads it: let both come to an end
            os.close(os.open(tmp_path / "hangs", os.O_WRONLY))
        await store.aclose()

    async def again(surface: Surface, configurations: Iterator[LocalConfig]) -> tuple[str, ...]:
        await surface.reload(next(configurations))
        return ()

    trio.run(main)


PASSWORD = '[restapi.authentication]\nusername = "u"\npassword = "p"\n'
LIST = 'allowlist = ["10.0.0.0/8"]'
STRICT = 'certfile = "{new}.crt"\nkeyfile = "{new}.key"\ncafile = "{new}.crt"\nverify_client = "required"'
PLAIN = 'certfile = "{new}.crt"\nkeyfile = "{new}.key"'


@pytest.mark.parametrize(("before", "after", "in_the_end"), [
    (("", PASSWORD), (LIST, ""), 403),
    ((LIST, ""), ("", PASSWORD), 401),
    ((PLAIN, PASSWORD), (STRICT, ""), 403),
    # The certificate that would be asked for cannot be loaded: what was asked for before still is.
    ((PLAIN, PASSWORD), (STRICT.replace('cafile = "{new}.crt"', 'cafile = "{new}.gone"'), ""), 401),
    ((f"{PLAIN}\n{LIST}", ""), (STRICT.replace('cafile = "{new}.crt"', 'cafile = "{new}.gone"'), ""), 403),
    (("", PASSWORD), ("", ""), None),
], ids=str)
def test_a_reload_is_never_open_to_everybody_meanwhile(certificates: Path, before: tuple[str, str], after: tuple[str, str], in_the_end: int | None) -> None:
    """What replaces a protection is in force before that one goes."""
    stranger = Request(method="POST", path="/restart", peer="203.0.113.9")

    def given(restapi: str, more: str) -> LocalConfig:
        return local(restapi.format(new=certificates / "new"), more=more)

    def status(access: Access) -> int | None:
        refusal = access.refuses(stranger)
        return None if refusal is None else refusal.status

    async def main() -> None:
        surface = Surface(given(*before))
        await surface.listen()
        taken = [status(surface.access)]
        await surface.reload(given(*after), lambda access: taken.append(status(access)))
        assert taken[-1] == in_the_end == status(surface.access)
        assert all(taken[:-1]), taken

    trio.run(main)


def test_a_password_that_openssl_does_not_take_is_named(certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    locked = certificates / "closed.key"
    subprocess.run(["openssl", "ec", "-in", "old.key", "-aes256", "-passout", "pass:x", "-out", str(locked)], cwd=certificates, check=True, capture_output=True, timeout=30)

    async def main() -> None:
        surface = Surface(local())
        await surface.listen()
        await surface.reload(local(f'certfile = "{certificates / "old.crt"}"\nkeyfile = "{locked}"\nkeyfile_password = "{"x" * 2000}"'))
        (problem,) = (r.facts["problem"] for r in caplog.records)     # type: ignore[attr-defined]
        assert problem == f"restapi.certfile: cannot use {certificates / 'old.crt'} with {locked}: password cannot be longer than 1024 bytes"

    trio.run(main)


def test_names_that_a_reload_brings_while_members_are_looked_up_count(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"member": ("10.0.0.9", 0.2), "old": ("10.0.0.1", 0.0), "fast": ("10.0.0.2", 0.0), "slow": ("10.0.0.3", 0.5)}
    looked_up = threading.Event()

    def look_up(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        address, takes_s = addresses[name]
        if name == "member":
            looked_up.set()
        time.sleep(takes_s)
        return [(0, 0, 0, "", (address, 0))]

    monkeypatch.setattr("pgha.rest.access.socket.getaddrinfo", look_up)

    async def main() -> None:
        surface = Surface(local('allowlist = ["old"]\nallowlist_include_members = true'))
        await surface.listen()
        surface._ask_listed_at = 0.0        # it is time to ask again

        async def changed(_: object) -> View:
            await trio.sleep_forever()
            raise AssertionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(surface.keep_members, lambda: View("member"), changed, lambda _: None)
            assert await trio.to_thread.run_sync(looked_up.wait, 10)
            await surface.reload(local('allowlist = ["fast", "slow"]\nallowlist_include_members = true'))
            assert [allowed(surface.access, f"10.0.0.{n}") for n in (1, 2, 3, 9)] == [False, True, True, True]
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(("before", "after", "asks"), [
    ("", 'certfile = "{new}.crt"\nkeyfile = "{new}.key"\ncafile = "{new}.crt"\nverify_client = "optional"', False),
    ('certfile = "{new}.crt"\nkeyfile = "{new}.key"\ncafile = "{new}.crt"\nverify_client = "optional"', "", True),
    # The context that says whether clients are asked could not be made: the former goes on, and what it asks for.
    ('certfile = "{old}.crt"\nkeyfile = "{old}.key"', 'certfile = "{old}.gone"\ncafile = "{new}.crt"\nverify_client = "optional"', False),
    ('certfile = "{old}.crt"\nkeyfile = "{old}.key"', 'certfile = "{old}.crt"\nkeyfile = "{old}.key"\ncafile = "{new}.crt"\nverify_client = "optional"', True),
])
def test_a_certificate_is_required_where_the_listener_asks_for_one(certificates: Path, before: str, after: str, asks: bool) -> None:  # noqa: FBT001
    files = {name: certificates / name for name in ("old", "new")}

    async def main() -> None:
        surface = Surface(local(before.format(**files)))
        await surface.listen()
        await surface.reload(local(after.format(**files)))
        assert surface.access.require_cert is asks

    trio.run(main)


def test_of_two_reloads_the_later_one_counts_and_a_password_waits_for_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        asked.set()
        answer.wait(10)
        return [(0, 0, 0, "", ("10.9.9.9", 0))]

    monkeypatch.setattr("pgha.rest.access.socket.getaddrinfo", look_up)

    def with_password(password: str, allowlist: str) -> LocalConfig:
        return local(f'allowlist = ["{allowlist}"]', more=f'[restapi.authentication]\nusername = "u"\npassword = "{password}"\n')

    async def main() -> None:
        surface = Surface(local())
        await surface.listen()
        taken: list[str] = []

        def take(access: Access) -> None:
            taken.append(access.password)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(surface.reload, with_password("first", "slow.example.com"), take)
            assert await trio.to_thread.run_sync(asked.wait, 10)
            assert set(taken) == {"first"}
            before = len(taken)
            await surface.reload(with_password("second", "10.0.0.0/8"), take)
            answer.set()
        assert set(taken[before:]) == {"second"}
        assert surface.access.password == "second"
        assert (allowed_by_list(surface.access, "10.1.1.1"), allowed_by_list(surface.access, "192.0.2.1")) == (True, False)

    trio.run(main)


def allowed_by_list(access: Access, peer: str) -> bool:
    refusal = access.refuses(Request(method="POST", path="/reload", peer=peer))
    return refusal is None or refusal.status != 403


@pytest.mark.parametrize("given", ["allowlist_include_members = true", 'allowlist = ["n1.x"]', 'allowlist = ["n1.x", "gone.x"]\nallowlist_include_members = true'])
@pytest.mark.parametrize("by_reload", [False, True])
def test_a_name_is_looked_up_again_and_again(monkeypatch: pytest.MonkeyPatch, given: str, by_reload: bool) -> None:  # noqa: FBT001
    """A machine that moved is let in before long, at once after SIGHUP; a name server that fails takes nobody's right away."""
    known = {"n1.x": "10.0.0.1"}

    def look_up(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if name not in known:
            raise OSError("no answer")
        return [(0, 0, 0, "", (known[name], 0))]

    monkeypatch.setattr("pgha.rest.access.socket.getaddrinfo", look_up)

    async def main() -> None:
        surface = Surface(local(given))
        await surface.listen()
        rights: list[tuple[bool, bool]] = []

        async def changed(_: object) -> View:
            rights.append((allowed(surface.access, "10.0.0.1"), allowed(surface.access, "10.0.0.2")))
            match len(rights):
                case 1:
                    known["n1.x"] = "10.0.0.2"
                    if by_reload:
                        await surface.reload(local(given))
                    else:
                        await trio.sleep(ASK_ANEW_S + 1)
                case 2:
                    known.clear()
                    await trio.sleep(ASK_ANEW_S + 1)
                case 3:
                    raise EOFError
            return View("n1.x")

        with pytest.raises(EOFError):
            await surface.keep_members(lambda: View("n1.x"), changed, lambda _: None)
        assert rights == [(True, False), (False, True), (False, True)]

    trio.run(main, clock=MockClock(autojump_threshold=0.1))


@pytest.mark.parametrize(("given", "backlog"), [("", 128), ("request_queue_size = 0", 128), ("request_queue_size = 1", 1), ("request_queue_size = 4096", 4096)])
def test_a_queue_of_no_length_is_the_default_one(given: str, backlog: int) -> None:
    async def main() -> None:
        assert (await Surface(local(given)).listen()).backlog == backlog

    trio.run(main)


def test_addresses_are_asked_of_nobody() -> None:
    async def main() -> None:
        surface = Surface(local('allowlist = ["10.0.1.0/24"]\nallowlist_include_members = true'))
        await surface.listen()
        taken: list[Access] = []
        times = iter(range(5))

        async def changed(_: object) -> View:
            await trio.sleep(ASK_ANEW_S + 1)
            if next(times, None) is None:
                raise EOFError
            return View("10.0.0.1")

        with pytest.raises(EOFError):
            await surface.keep_members(lambda: View("10.0.0.1"), changed, taken.append)
        assert len(taken) == 1

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, and a server's certificate (for 127.0.0.1) of each."""
    place = tmp_path_factory.mktemp("authorities")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    (place / "names").write_text("subjectAltName = IP:127.0.0.1\n")
    for name in ("one", "two"):
        for words in (["req", "-x509", *key, "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.crt", "-subj", f"/CN={name} ca", "-days", "2"],
                      ["req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"],
                      ["x509", "-req", "-in", f"{name}.csr", "-CA", f"{name}-ca.crt", "-CAkey", f"{name}-ca.key", "-CAcreateserial", "-out", f"{name}.crt",
                       "-days", "2", "-extfile", "names"]):
            subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True, timeout=30)
    return place


def test_an_authority_of_etcd_that_a_reload_takes_away_is_trusted_no_more(authorities: Path, caplog: pytest.LogCaptureFixture) -> None:
    """one → one and two → two, as authorities are changed in practice; then a file that is half written, which changes nothing."""
    one, two = ((authorities / f"{name}-ca.crt").read_text() for name in ("one", "two"))
    cacert = authorities / "cacert.crt"

    contexts = {name: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for name in ("one", "two")}
    for name, context in contexts.items():
        context.load_cert_chain(authorities / f"{name}.crt", authorities / f"{name}.key")
    shown, spoke, seen = "one", list[bool](), trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, contexts[shown], server_side=True)
        try:
            await tls.do_handshake()
            spoke.append(bool(await tls.receive_some()))       # who does not trust us says so instead of asking
        except trio.BrokenResourceError:
            spoke.append(False)
        seen.set()
        await trio.aclose_forcefully(stream)

    async def trusts(store: Etcd3Store, name: str) -> bool:
        nonlocal shown, seen
        shown, seen = name, trio.Event()
        spoke.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(store.read, "/x", deadline_s=30.0))
            with trio.fail_after(20):
                await seen.wait()
            nursery.cancel_scope.cancel()
        return spoke[0]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            given = local("", f'protocol = "https"\ncacert = "{cacert}"')
            given = replace(given, etcd3=replace(given.etcd3, host=Address("127.0.0.1", listeners[0].socket.getsockname()[1])))
            cacert.write_text(one)
            surface = Surface(given)
            store = surface.open_store(given)
            assert isinstance(store, Etcd3Store)
            await surface.listen()
            found = []
            for content in (one, one + two, two, two[:100]):
                cacert.write_text(content)
                await surface.reload(given)
                found.append((await trusts(store, "one"), await trusts(store, "two")))
            assert found == [(True, False), (True, True), (False, True), (False, True)]
            assert [r.getMessage() for r in caplog.records if "problem" in getattr(r, "facts", {})] == ["client certificate not reloaded"]
            assert len(store._client._connections) == 1      # those of former authorities are closed
            await store.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)

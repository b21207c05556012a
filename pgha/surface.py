"""Who may reach this agent over its REST API, and as whom does it reach its store and its peers?

All of it comes from the node's own configuration: certificates, keys, user names, passwords, allowlist. `reload` takes
it anew while the agent runs (SIGHUP): what new connections need is replaced, one by one, and what cannot be read is
named and changes nothing, so that a half-written certificate never takes the API away. (What only another start can
change is as it was already: as_started.) A context that is in use is never touched, but replaced: OpenSSL takes a
certificate before it sees that the key does not fit. And files are read in a thread: their disk may hang.

`restapi.allowlist_include_members` adds the addresses of the members' api_urls; names are resolved, again and again,
beside the agent's work (`keep_members`), and a name server that is silent leaves what was known.
"""

from __future__ import annotations

import base64
import hashlib
import math
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import trio
from msgspec.structs import replace

from pgha import COMPATIBLE_VERSION, __version__
from pgha.config.local import LocalConfig
from pgha.dcs import Store
from pgha.dcs.etcd3 import Etcd3Store
from pgha.errors import ConfigError
from pgha.log import Log
from pgha.machine import Machine
from pgha.model.cluster import ClusterView
from pgha.rest.access import Access, Names, Network
from pgha.rest.listen import Listen
from pgha.rest.tls import Tls, load_certificate, make_context, server_headers, why

log = Log("pgha.surface")

#: A name without an answer is asked for again after this time.
ASK_AGAIN_S = 10.0
#: Names that have one are asked for again after this time: they may mean another machine by now.
ASK_ANEW_S = 45.0
#: A disk that has not given certificates and keys within this time hangs: the former go on.
FILES_S = 5.0
#: Connections that the kernel keeps where `restapi.request_queue_size` is 0.
DEFAULT_BACKLOG = 128


class Published(Protocol):
    """What `keep_members` follows: published.Board's value."""

    @property
    def view(self) -> ClusterView | None: ...


class _Contexts(NamedTuple):
    """What a reload has read: None is not wanted, or not to be had (`problems`: what that is, and why)."""

    rest: ssl.SSLContext | None
    peers: ssl.SSLContext | None
    etcd: ssl.SSLContext | None
    etcd_files: bytes
    problems: list[tuple[str, str]]


class Surface:
    """`access`, `tls`: of this node's REST API, replaced by `reload`. Raises ConfigError for files that cannot be used."""

    def __init__(self, local: LocalConfig, *, in_thread: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync) -> None:
        self._local = local
        self._in_thread = in_thread
        self._peers = _peer_context(local)
        self._etcd_tls: ssl.SSLContext | None = None
        self._etcd_files = b""       # what they held
        self._stores: list[Etcd3Store] = []
        self._listed: tuple[Network, ...] | None = None     # what the allowlist names
        self._listed_names, self._member_names = Names("restapi.allowlist"), Names("a member's api_url")
        self._members: tuple[Network, ...] = ()
        self._ask_listed_at = self._ask_members_at = 0.0
        self._headers = _headers(local)
        self.access = Access()
        self.tls: Tls | None = None

    # --- as whom it reaches others -------------------------------------------------------------------------------------

    def open_store(self, local: LocalConfig) -> Store:
        """One connection to the store; each caller has its own. All present the same certificate."""
        etcd = local.etcd3
        if self._etcd_tls is None and any(url.startswith("https:") for url in etcd.endpoints):
            self._etcd_files = _digest(local)
            self._etcd_tls = _etcd_context(local)
        store = Etcd3Store(etcd.endpoints, username=etcd.username or None, password=etcd.password.reveal() or None, ssl_context=self._etcd_tls)
        self._stores.append(store)
        return store

    def peers(self, machine: Machine) -> Callable[[], AbstractAsyncContextManager[Any]]:
        """HTTP clients for other members: their certificates are not verified, as among the reference's agents (compatibility spec 3.6)."""
        return lambda: machine.http(self._peers)

    def authorization(self) -> str:
        """The header's value for what changes something at a peer: `ctl.authentication`, else this node's own; "" for none."""
        for given in (self._local.ctl.authentication, self._local.restapi.authentication):
            if given.username:
                return "Basic " + base64.b64encode(f"{given.username}:{given.password.reveal()}".encode()).decode()
        return ""

    # --- who may reach it ----------------------------------------------------------------------------------------------

    async def listen(self) -> Listen:
        """Where the REST server listens, and how. `access` is known from now on."""
        rest = self._local.restapi
        if rest.tls:
            self.tls = Tls(_rest_context(self._local))
        self._take_credentials()
        await self._take_listed(self._local)
        return Listen(addresses=[(host, rest.listen.port) for host in rest.listen.hosts], headers=self._headers,
                      backlog=rest.request_queue_size or DEFAULT_BACKLOG, tls=self.tls)

    def _take_credentials(self, *, removal: bool = True) -> None:
        """User and password; and a certificate where the listener asks for one, whatever the configuration says meanwhile.
        Not `removal`: a password that is no longer asked for still is."""
        given = self._local.restapi.authentication
        self.access = replace(self.access, require_cert=self.tls is not None and self.tls.context.verify_mode is not ssl.CERT_NONE)
        if given.username or removal:
            self.access = replace(self.access, username=given.username, password=given.password.reveal())

    async def _take_listed(self, local: LocalConfig) -> None:
        """The addresses of local's allowlist, unless a reload has brought another while the name server was asked."""
        rest = local.restapi
        listed = await self._listed_names.networks(rest.allowlist) if rest.allowlist else None
        if self._local is local:
            self._listed = listed
            self._ask_listed_at = _again_at(self._listed_names)
            self._allow()

    def _allow(self) -> None:
        """Listed addresses and members together; None, everybody, only where neither is asked for."""
        with_members = self._local.restapi.allowlist_include_members
        networks = None if self._listed is None and not with_members else (*(self._listed or ()), *(self._members if with_members else ()))
        self.access = replace(self.access, networks=networks)

    async def keep_members(self, now: Callable[[], Published], changed: Callable[[Any], Awaitable[Any]], take: Callable[[Access], None]) -> None:
        """Follow the members' addresses, and what names mean, for as long as the agent runs. `take`: who gets each new Access."""
        known: frozenset[str] = frozenset()
        published = now()
        while True:
            view = published.view
            if self._local.restapi.allowlist_include_members and view is not None:
                hosts = frozenset(host for member in view.members.values() if (host := _host(member.api_url)))
                # A view without members is one that tells nothing: whoever was a member stays allowed until others are.
                if hosts and (hosts != known or trio.current_time() >= self._ask_members_at):
                    self._members, known = await self._member_names.networks(sorted(hosts)), hosts
                    self._ask_members_at = _again_at(self._member_names)
                    self._allow()
                    take(self.access)
            if self._local.restapi.allowlist and trio.current_time() >= self._ask_listed_at:
                await self._take_listed(self._local)
                take(self.access)
            published = await changed(published)

    # --- SIGHUP --------------------------------------------------------------------------------------------------------

    async def reload(self, local: LocalConfig, take: Callable[[Access], None] = lambda _: None) -> None:
        """Take what `local` says from now on. What cannot be read is logged, and the former goes on. `take`: as above."""
        self._local = local
        for store in self._stores:
            store.credentials(local.etcd3.username or None, local.etcd3.password.reveal() or None)
        # A password that was changed counts now, a certificate once its disk has answered, a list once its names are known. What
        # is no longer asked for goes last: what is to stand in its place must be there first.
        self._take_credentials(removal=False)
        take(self.access)
        found: _Contexts | None = None
        with trio.move_on_after(FILES_S):
            found = await self._in_thread(partial(self._read_files, local), abandon_on_cancel=True)
        if self._local is not local:
            return              # another reload has come meanwhile, and takes it all
        if found is None:
            log.error("certificates not reloaded", problem=f"their files could not be read within {FILES_S:g} s")
        else:
            for what, problem in found.problems:
                log.error(what, problem=problem)
            await self._take_contexts(found)
        self._take_credentials(removal=False)
        take(self.access)
        self._ask_members_at = 0.0
        rest = local.restapi
        lists = bool(rest.allowlist) or rest.allowlist_include_members
        as_wanted = self.tls is None or not rest.tls or (found is not None and found.rest is not None)
        if as_wanted or lists:
            await self._take_listed(local)
        if self._local is local:
            self._take_credentials(removal=as_wanted)
        take(self.access)
        if not as_wanted and ((self.access.username and not rest.authentication.username) or (self.access.networks is not None and not lists)):
            log.error("the REST API still asks for what it asked for before", problem="without its new certificate it may be open to everybody")

    def _read_files(self, local: LocalConfig) -> _Contexts:
        """In a thread. Whether the listener has TLS, and the store, was settled at the start."""
        problems: list[tuple[str, str]] = []

        def made(what: str, make: Callable[[], ssl.SSLContext], *, wanted: bool = True) -> ssl.SSLContext | None:
            try:
                return make() if wanted else None
            except ConfigError as error:
                problems.append((what, str(error)))
                return None

        rest = made("certificate not reloaded", partial(_rest_context, local), wanted=self.tls is not None and local.restapi.tls)
        peers = made("client certificate not reloaded", partial(_peer_context, local))
        # Before the context is made: should the files change in between, the next reload makes another one.
        files = _digest(local) if self._etcd_tls is not None else b""
        etcd = made("client certificate not reloaded", partial(_etcd_context, local), wanted=files != self._etcd_files)
        return _Contexts(rest, peers, etcd, files, problems)

    async def _take_contexts(self, found: _Contexts) -> None:
        if self.tls is not None and found.rest is not None:
            self.tls.context = found.rest
        self._peers = found.peers or self._peers
        if found.etcd is not None:
            self._etcd_tls, self._etcd_files = found.etcd, found.etcd_files
            for store in self._stores:
                await store.connect_with(found.etcd)


def _again_at(names: Names) -> float:
    """When they are to be asked for again."""
    if names.unresolved:
        return trio.current_time() + ASK_AGAIN_S
    return trio.current_time() + ASK_ANEW_S if names.has_names else math.inf


def _host(api_url: str) -> str:
    try:
        return urlsplit(api_url).hostname or ""
    except ValueError:
        return ""


def _peer_context(local: LocalConfig) -> ssl.SSLContext:
    """Shows `ctl.certfile`, or `restapi.certfile` in its place; also there where there is none to show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    section, given = ("ctl", local.ctl) if local.ctl.certfile else ("restapi", local.restapi)
    if given.certfile:
        load_certificate(context, certfile=given.certfile, keyfile=given.keyfile, keyfile_password=given.keyfile_password.reveal(), section=section)
    return context


def _etcd_context(local: LocalConfig) -> ssl.SSLContext:
    etcd = local.etcd3
    try:
        context = ssl.create_default_context(cafile=etcd.cacert or None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"etcd3.cacert: cannot use {etcd.cacert}: {why(error)}") from error
    try:
        if etcd.cert:
            context.load_cert_chain(etcd.cert, etcd.key or None, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(f"etcd3: cert or key cannot be used: {why(error)}") from error
    return context


def _digest(local: LocalConfig) -> bytes:
    """Of what etcd's three files hold. One that cannot be read is named by whoever uses it."""
    digest = hashlib.sha256()
    for path in (local.etcd3.cacert, local.etcd3.cert, local.etcd3.key):
        try:
            content = Path(path).read_bytes() if path else b""
        except (OSError, ValueError):
            content = b"?"
        digest.update(b"%d:" % len(content) + content)
    return digest.digest()


def _rest_context(local: LocalConfig) -> ssl.SSLContext:
    rest = local.restapi
    return make_context(certfile=rest.certfile, keyfile=rest.keyfile, keyfile_password=rest.keyfile_password.reveal(), cafile=rest.cafile, ciphers=rest.ciphers,
                        verify_client=rest.verify_client)


def _headers(local: LocalConfig) -> dict[str, str]:
    rest = local.restapi
    extra = {**rest.http_extra_headers, **(rest.https_extra_headers if rest.tls else {})}
    return {**server_headers(rest.server_tokens, version=__version__, compatible=COMPATIBLE_VERSION), **extra}

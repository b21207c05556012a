"""Who may reach this agent over its REST API, and as whom does it reach its store and its peers?

All of it comes from the node's own configuration: certificates, keys, user names, passwords, allowlist. `reload` takes
it anew while the agent runs (SIGHUP): what new connections need is replaced, one by one, and what cannot be read is
named and changes nothing, so that a half-written certificate never takes the API away. (What only another start can
change is as it was already: as_started.)

`restapi.allowlist_include_members` adds the addresses of the members' api_urls; names are resolved, again and again,
beside the agent's work (`keep_members`), and a name server that is silent leaves what was known.
"""

from __future__ import annotations

import base64
import ipaddress
import math
import ssl
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol
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
from pgha.rest.tls import Tls, load_certificate, make_context, server_headers

log = Log("pgha.surface")

#: A name without an answer is asked for again after this time.
ASK_AGAIN_S = 10.0
#: Names that have one are asked for again after this time: they may mean another machine by now.
ASK_ANEW_S = 45.0
#: Connections that the kernel keeps where `restapi.request_queue_size` is 0.
DEFAULT_BACKLOG = 128


class Published(Protocol):
    """What `keep_members` follows: published.Board's value."""

    @property
    def view(self) -> ClusterView | None: ...


class Surface:
    """`access`, `tls`: of this node's REST API, replaced by `reload`. Raises ConfigError for files that cannot be used."""

    def __init__(self, local: LocalConfig) -> None:
        self._local = local
        self._peers = _peer_context(local)
        self._etcd_tls: ssl.SSLContext | None = None
        self._etcd_authorities = b""
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
            self._etcd_tls, self._etcd_authorities = _etcd_context(local), _authorities(local)
        store = Etcd3Store(etcd.endpoints, username=etcd.username or None, password=etcd.password.reveal() or None, ssl_context=self._etcd_tls)
        self._stores.append(store)
        return store

    def peers(self, machine: Machine) -> Callable[[], AbstractAsyncContextManager[Any]]:
        """HTTP clients for other members: their certificates are not verified, as among the reference's agents (compatibility spec 3.6)."""
        return partial(machine.http, self._peers)

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

    def _take_credentials(self) -> None:
        """User and password; and a certificate where the listener asks for one, whatever the configuration says meanwhile."""
        given = self._local.restapi.authentication
        self.access = replace(self.access, username=given.username, password=given.password.reveal(),
                              require_cert=self.tls is not None and self.tls.context.verify_mode is not ssl.CERT_NONE)

    async def _take_listed(self, local: LocalConfig) -> None:
        """The addresses of local's allowlist, unless a reload has brought another while the name server was asked."""
        rest = local.restapi
        listed = await self._listed_names.networks(rest.allowlist) if rest.allowlist else None
        if self._local is local:
            self._listed = listed
            self._ask_listed_at = _again_at(self._listed_names, rest.allowlist)
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
            view, local = published.view, self._local
            if local.restapi.allowlist_include_members and view is not None:
                hosts = frozenset(host for member in view.members.values() if (host := _host(member.api_url)))
                # A view without members is one that tells nothing: whoever was a member stays allowed until others are.
                if hosts and (hosts != known or trio.current_time() >= self._ask_members_at):
                    self._members, known = await self._member_names.networks(sorted(hosts)), hosts
                    self._ask_members_at = _again_at(self._member_names, hosts)
                    self._allow()
                    take(self.access)
            if local.restapi.allowlist and trio.current_time() >= self._ask_listed_at:
                await self._take_listed(local)
                take(self.access)
            published = await changed(published)

    # --- SIGHUP --------------------------------------------------------------------------------------------------------

    async def reload(self, local: LocalConfig, take: Callable[[Access], None] = lambda _: None) -> None:
        """Take what `local` says from now on. What cannot be read is logged, and the former goes on. `take`: as above."""
        before, self._local = self._local, local
        if self.tls is not None and local.restapi.tls:
            try:
                self.tls.context = _rest_context(local)
            except ConfigError as error:
                log.error("certificate not reloaded", problem=str(error))
        self._reload_client(lambda: _present_to_peers(self._peers, local))
        self._reload_client(lambda: self._reload_etcd(before, local))
        for store in self._stores:
            store.credentials(local.etcd3.username or None, local.etcd3.password.reveal() or None)
        # A password that was changed counts now, a list once its names are known: a name server may take its time.
        self._take_credentials()
        take(self.access)
        self._ask_members_at = 0.0
        await self._take_listed(local)
        take(self.access)

    def _reload_etcd(self, before: LocalConfig, local: LocalConfig) -> None:
        """A certificate is loaded into the context that is there. Other authorities need another one, since none forgets anything."""
        if self._etcd_tls is None:
            return
        authorities = _authorities(local)
        if authorities == self._etcd_authorities and (local.etcd3.cert or not before.etcd3.cert):
            _present_to_etcd(self._etcd_tls, local)
            return
        self._etcd_tls, self._etcd_authorities = _etcd_context(local), authorities
        for store in self._stores:
            store.trust(self._etcd_tls)

    @staticmethod
    def _reload_client(load: Callable[[], None]) -> None:
        try:
            load()
        except ConfigError as error:
            log.error("client certificate not reloaded", problem=str(error))


def _again_at(names: Names, items: Collection[str]) -> float:
    """When they are to be asked for again. What is an address already needs nobody to tell."""
    if names.unresolved:
        return trio.current_time() + ASK_AGAIN_S
    return trio.current_time() + ASK_ANEW_S if any(not _is_network(item) for item in items) else math.inf


def _is_network(item: str) -> bool:
    try:
        ipaddress.ip_network(item, strict=False)
    except ValueError:
        return False
    return True


def _host(api_url: str) -> str:
    try:
        return urlsplit(api_url).hostname or ""
    except ValueError:
        return ""


def _peer_context(local: LocalConfig) -> ssl.SSLContext:
    """Also where there is no certificate to show yet: a reload may bring one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _present_to_peers(context, local)
    return context


def _present_to_peers(context: ssl.SSLContext, local: LocalConfig) -> None:
    """`ctl.certfile`, or `restapi.certfile` in its place."""
    section, given = ("ctl", local.ctl) if local.ctl.certfile else ("restapi", local.restapi)
    if given.certfile:
        load_certificate(context, certfile=given.certfile, keyfile=given.keyfile, keyfile_password=given.keyfile_password.reveal(), section=section)


def _etcd_context(local: LocalConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=local.etcd3.cacert or None)
    except OSError as error:
        raise _no_cacert(local, error) from error
    _present_to_etcd(context, local)
    return context


def _present_to_etcd(context: ssl.SSLContext, local: LocalConfig) -> None:
    etcd = local.etcd3
    try:
        if etcd.cert:
            context.load_cert_chain(etcd.cert, etcd.key or None, password="")
    except OSError as error:
        raise ConfigError(f"etcd3: cert or key cannot be used: {error.strerror or error}") from error


def _authorities(local: LocalConfig) -> bytes:
    """Of etcd, as they stand in the file; empty: the system's."""
    try:
        return Path(local.etcd3.cacert).read_bytes() if local.etcd3.cacert else b""
    except OSError as error:
        raise _no_cacert(local, error) from error


def _no_cacert(local: LocalConfig, error: OSError) -> ConfigError:
    return ConfigError(f"etcd3.cacert: cannot use {local.etcd3.cacert}: {error.strerror or error}")


def _rest_context(local: LocalConfig) -> ssl.SSLContext:
    rest = local.restapi
    return make_context(certfile=rest.certfile, keyfile=rest.keyfile, keyfile_password=rest.keyfile_password.reveal(), cafile=rest.cafile, ciphers=rest.ciphers,
                        verify_client=rest.verify_client)


def _headers(local: LocalConfig) -> dict[str, str]:
    rest = local.restapi
    extra = {**rest.http_extra_headers, **(rest.https_extra_headers if rest.tls else {})}
    return {**server_headers(rest.server_tokens, version=__version__, compatible=COMPATIBLE_VERSION), **extra}

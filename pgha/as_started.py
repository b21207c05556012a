"""Which keys count as they did when the agent started, whatever a reload brings?

Those of what is built once: sockets, the store's endpoints, the watchdog's device, how PostgreSQL listens. `as_started` puts
their running values back, so that nobody who reads the configuration afterwards takes half of such a change: an agent that
published https:// while its listener is plain, or looked for PostgreSQL at a port that it will have after its next start,
would cut itself off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec.structs import replace

from pgha.config.local import Etcd3, LocalConfig, Watchdog


class _Fixed(NamedTuple):
    """`keeps`: of that section, put back together. `when`: (running, new); None: one of them differs."""

    key: str
    section: str
    keeps: tuple[str, ...]
    when: Callable[[LocalConfig, LocalConfig], bool] | None = None


def _attributes(section: type[Any]) -> tuple[str, ...]:
    return tuple(name for name in section.__struct_fields__ if name != "given")


#: In this order: what an earlier row has put back differs no more.
_FIXED = (
    _Fixed("restapi.listen", "restapi", ("listen", "connect_address"), lambda old, new: old.restapi.listen != new.restapi.listen),
    _Fixed("restapi.certfile", "restapi", ("certfile", "keyfile", "keyfile_password", "cafile", "ciphers", "verify_client"),
           lambda old, new: old.restapi.tls != new.restapi.tls),
    _Fixed("restapi.request_queue_size", "restapi", ("request_queue_size",)),
    _Fixed("restapi.http_extra_headers, https_extra_headers, server_tokens", "restapi", ("http_extra_headers", "https_extra_headers", "server_tokens")),
    # A user and a password that come with another store belong to that one; with the same, they are changed there, too.
    _Fixed("etcd3 (none of the former endpoints is left)", "etcd3", _attributes(Etcd3), lambda old, new: not set(old.etcd3.endpoints) & set(new.etcd3.endpoints)),
    _Fixed("etcd3.hosts, url or protocol", "etcd3", ("host", "hosts", "url", "protocol"), lambda old, new: old.etcd3.endpoints != new.etcd3.endpoints),
    _Fixed("postgresql.listen", "postgresql", ("listen", "connect_address"), lambda old, new: old.postgresql.listen != new.postgresql.listen),
    _Fixed("postgresql.bin_dir", "postgresql", ("bin_dir",)),
    _Fixed("postgresql.config_dir", "postgresql", ("config_dir",)),
    _Fixed("postgresql.pgpass", "postgresql", ("pgpass",)),
    _Fixed("watchdog", "watchdog", _attributes(Watchdog)),
    _Fixed("pgha.guard", "pgha", ("guard",)),
)


def as_started(running: LocalConfig, new: LocalConfig) -> tuple[LocalConfig, tuple[str, ...]]:
    """`new` with what only another start can change as it is in `running`; and what was put back, to be said."""
    problems = []
    for fixed in _FIXED:
        old, wanted = getattr(running, fixed.section), getattr(new, fixed.section)
        if fixed.when(running, new) if fixed.when is not None else any(getattr(old, name) != getattr(wanted, name) for name in fixed.keeps):
            new = replace(new, **{fixed.section: replace(wanted, **{name: getattr(old, name) for name in fixed.keeps})})
            problems.append(f"{fixed.key}: the change takes effect at the agent's next start")
    return new, tuple(problems)

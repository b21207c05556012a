"""Hosts as network namespaces on one bridge, and what can be cut between them.

Every namespace is named `pgha-chaos-<tag>-<host>`; the bridge has one of its own, so that nothing of this is seen
outside. Host `ct` is the one that looks: no cut concerns it, it can always talk to everybody.

Rules of this file: a namespace belongs to a thread, not to the process; `inside` gives it back in any case. The whole
rule set of a host is written at once, in one transaction of nftables.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

PREFIX = "pgha-chaos-"
NETWORK = "10.213.77"
CONTROL = "ct"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_COMMAND_S = 20
_libc = ctypes.CDLL(None, use_errno=True)

Direction = Literal["both", "out", "in"]


class Cut(NamedTuple):
    """What `host` does not send to (out) or hear from (in) these addresses; none: everybody. `percent` of the packets."""

    host: str
    addresses: tuple[str, ...] = ()
    direction: Direction = "both"
    percent: int = 100


class Network:
    """All hosts of one run; `hosts` maps names to the last number of their addresses."""

    def __init__(self, tag: str, hosts: dict[str, int]) -> None:
        self.prefix = f"{PREFIX}{tag}-"
        self.hosts = {CONTROL: 1, **hosts}
        self._cuts: list[Cut] = []

    def address(self, host: str) -> str:
        return f"{NETWORK}.{self.hosts[host]}"

    def namespace(self, host: str) -> str:
        return f"{self.prefix}{host}"

    def set_up(self) -> None:
        bridge = f"{self.prefix}bridge"
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for host in self.hosts:
            here = self.namespace(host)
            _ip("netns", "add", here)
            _ip("-n", here, "link", "set", "lo", "up")
            _ip("-n", here, "link", "add", "eth0", "type", "veth", "peer", "name", f"v-{host}", "netns", bridge)
            _ip("-n", here, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", here, "link", "set", "eth0", "up")
            _ip("-n", bridge, "link", "set", f"v-{host}", "master", "br0")
            _ip("-n", bridge, "link", "set", f"v-{host}", "up")

    def remove(self) -> None:
        remove_namespaces(self.prefix)

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread, and what it starts meanwhile, is on that host."""
        with _namespace(_NAMESPACES / self.namespace(host)):
            yield

    # -- cuts

    @contextlib.contextmanager
    def cut(self, *cuts: Cut) -> Iterator[None]:
        """For as long as the context lasts; cuts that overlap add up."""
        self._change(cuts, add=True)
        try:
            yield
        finally:
            self._change(cuts, add=False)

    def _change(self, cuts: Iterable[Cut], *, add: bool) -> None:
        cuts = list(cuts)
        for cut in cuts:
            if add:
                self._cuts.append(cut)
            else:
                self._cuts.remove(cut)
        for host in dict.fromkeys(cut.host for cut in cuts):
            with self.inside(host):
                subprocess.run(["nft", "-f", "-"], input=self._rules(host), text=True, check=True, timeout=_COMMAND_S)

    def _rules(self, host: str) -> str:
        control = self.address(CONTROL)
        chains = []
        for name, hook, device, field, direction in (("leaves", "output", "oif", "daddr", "out"), ("arrives", "input", "iif", "saddr", "in")):
            lines = [f"type filter hook {hook} priority 0; policy accept;", f"{device} lo accept", f"ip {field} {control} accept"]
            for cut in self._cuts:
                if cut.host == host and cut.direction in ("both", direction):
                    whom = [f"ip {field} {{ {', '.join(cut.addresses)} }}"] if cut.addresses else []
                    some = [f"numgen random mod 100 < {cut.percent}"] if cut.percent < 100 else []
                    lines.append(" ".join([*whom, *some, "drop"]))
            chains.append(f"chain {name} {{\n  " + "\n  ".join(lines) + "\n}")
        return "table inet chaos\ndelete table inet chaos\ntable inet chaos {\n" + "\n".join(chains) + "\n}\n"


@contextlib.contextmanager
def _namespace(path: Path) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def remove_namespaces(prefix: str) -> None:
    for path in sorted(_NAMESPACES.glob(f"{prefix}*")) if _NAMESPACES.is_dir() else []:
        _ip("netns", "del", path.name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_COMMAND_S)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

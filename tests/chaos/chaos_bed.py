"""A cluster whose nodes and etcd members are hosts of their own: a network namespace, a disk, perhaps a watchdog each.

Rules of this file: everything outside a directory of ours is named `pgha-chaos-<tag>`, and whoever uses a tag holds
a lock on it. `sweep` removes whatever has such a name and no living owner; a frozen disk is thawed before anything
else, since nobody who waits for it can be killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from chaos_network import CONTROL, NETWORK, PREFIX, Network, remove_namespaces
from installed import USER, install

from pgha.demo.bed import Bed, BedTimeout, Claim, end_processes_of, end_remembered
from pgha.demo.etcd import EtcdMember
from pgha.demo.node import FAST, Node, Profile, Settings
from pgha.demo.processes import Process, signal_all, spawn
from pgha.demo.programs import Program, find_etcd, find_postgres

T = TypeVar("T")

HERE = Path(__file__).parent
_SHARED = Path("/dev/shm")
_DISK_BYTES = 2 << 30  # sparse, on tmpfs
_COMMAND_S = 30
_RESTART_S = 1.0       # as a unit file has it
_BOOT_S = 3.0
_DEVICE_POLL_S = 0.005


def why_not() -> str:
    """ "" if all of this can work here."""
    if os.getuid() != 0:
        return "network namespaces, disks and user postgres take root"
    for program in ("ip", "nft", "mkfs.ext4", "fsfreeze"):
        if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            return f"{program} is not installed (build/setup does that)"
    return ""


class HostMember(EtcdMember):
    """An etcd member on its own host."""

    network: Network

    def start(self, program: str, initial_cluster: str, token: str, user: str | None) -> None:
        with self.network.inside(self.name):
            super().start(program, initial_cluster, token, user)


class Host(Node):
    """A node on its own host. `disk` holds data and state, nothing else; logs and sockets are elsewhere."""

    network: Network
    programs: ChaosPrograms
    with_watchdog = False

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        #: Starting and losing power exclude each other: the watchdog device has a thread of its own.
        self.switch = threading.RLock()
        #: When a device has reset it (monotonic); None: not, or it is up again.
        self.reset_at_s: float | None = None

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    @property
    def data_dir(self) -> Path:
        return self.disk / "data"

    def configuration(self) -> dict[str, Any]:
        found = super().configuration()
        found["postgresql"]["listen"] = f"*:{self.port}"     # a host has it all to itself, also an address that moves
        found["postgresql"]["pg_hba"] = ["local all all trust", f"host replication replicator {NETWORK}.0/24 scram-sha-256",
                                         f"host all all {NETWORK}.0/24 scram-sha-256", "host all all 127.0.0.1/32 scram-sha-256"]
        found["pgha"]["state_dir"] = str(self.disk / "state")
        if self.with_watchdog:
            found["watchdog"] = {"mode": "required", "device": str(self.watchdog)}
        return found

    @property
    def watchdog(self) -> Path:
        return self.directory / "watchdog"

    def start_agent(self) -> None:
        with self.switch:
            self._start_agent()

    def _start_agent(self) -> None:
        assert self.agent is None or self.agent.poll() is not None, f"the agent of {self.name} is still running"
        self.write_configuration()
        archive, environment = self.programs.for_host(self)
        with self.network.inside(self.name):
            self.agent = spawn([*archive, "run", str(self.config_path)], log=self.log_path, directory=self.directory,
                               user=self.settings.user, environment=environment)
        self._meant_to_run = True
        self.reset_at_s = None

    # -- the disk

    def mount(self) -> None:
        self.disk.mkdir(parents=True)
        image = self.directory / "disk.img"
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        _command("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", str(image))
        _command("mount", "-o", "loop,discard", str(image), str(self.disk))
        if self.with_watchdog:
            os.mknod(self.watchdog, 0o020666, os.makedev(1, 3))  # /dev/null's; chaos_agent.py answers for it
            self.watchdog.chmod(0o666)
        for place in (self.directory, self.disk):
            shutil.chown(place, USER, USER)

    def fill_disk(self) -> Path:
        """Nothing is left; the file that has it all."""
        ballast = self.disk / "ballast"
        with ballast.open("wb") as file:
            size = 0
            while (free := os.fstatvfs(file.fileno()).f_bfree * os.fstatvfs(file.fileno()).f_bsize) > 0:
                step = max(free // 2, 4096)
                try:
                    os.posix_fallocate(file.fileno(), size, step)
                except OSError:
                    break
                size += step
        return ballast

    # -- its processes

    def processes(self) -> list[Process]:
        """PostgreSQL, guard and agent: all that a power failure ends."""
        return [*self.postgres(), *self.guards(), *([self.agent_process] if self.agent_process else [])]

    def lose_power(self) -> None:
        """All of them, and what the next boot would not find: the runtime directory."""
        with self.switch:
            self.signal_agent(signal.SIGKILL)  # also says that this was us
            while self.processes():
                signal_all(self.processes(), signal.SIGKILL)
            if self.agent is not None:
                self.agent.wait(10)
            shutil.rmtree(self.runtime, ignore_errors=True)


class ChaosPrograms:
    """pgha for each host: the archive, and with a device or a clock of its own chaos_agent.py before it."""

    def __init__(self, place: Path, program: Program, *, clocks: bool) -> None:
        self.program = program
        self.clocks = clocks
        self.launcher = Path(shutil.copy(HERE / "chaos_agent.py", place / "chaos_agent.py"))
        self.launcher.chmod(0o644)

    def for_host(self, host: Host) -> tuple[list[str], dict[str, str]]:
        argv, environment = list(self.program.argv), dict(self.program.environment)
        if self.clocks or host.with_watchdog:
            argv.insert(-1, str(self.launcher))
        if host.with_watchdog:
            environment["CHAOS_WATCHDOG"] = str(host.watchdog)
        if self.clocks:
            clock = self.clock_of(host)
            clock.write_text("+0\n", encoding="utf-8")
            environment["CHAOS_CLOCK"] = str(clock)
        return argv, environment

    def clock_of(self, host: Host) -> Path:
        return host.directory / "clock"


class Device(threading.Thread):
    """The hardware half of the watchdogs: when a count has run out, the whole node is gone at once."""

    def __init__(self, hosts: list[Host]) -> None:
        super().__init__(name="watchdogs", daemon=True)
        self.hosts = hosts
        self.fired: list[tuple[str, int]] = []
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(_DEVICE_POLL_S):
            for host in self.hosts:
                if self._ran_out(host):
                    signal_all(host.postgres(), signal.SIGKILL)
                    self.fired.append((host.name, time.monotonic_ns() // 1000))
                    host.lose_power()
                    self._reset(host)
                    host.reset_at_s = time.monotonic()

    def _count(self, host: Host) -> Path:
        return host.watchdog.with_name(f"{host.watchdog.name}.count")

    def _ran_out(self, host: Host) -> bool:
        try:
            (at_ns,) = struct.unpack("q", self._count(host).read_bytes())
        except (OSError, struct.error):
            return False
        return at_ns != 0 and time.monotonic_ns() >= at_ns

    def _reset(self, host: Host) -> None:
        """A reset machine's device does not count."""
        self._count(host).write_bytes(struct.pack("q", 0))

    def stop(self) -> None:
        self._end.set()
        self.join()


class _Held:
    """The claim on a network of namespaces: nothing but its existence."""

    def close(self) -> None:
        pass


class ChaosBed(Bed):
    """Three nodes and three etcd members, each a host; and a host `cl` for clients. Use as a context, on host `ct`."""

    def __init__(self, tag: str, directory: Path, program: Program, *, profile: Profile = FAST, dynamic: dict[str, Any] | None = None,
                 nodes: int = 3, watchdog: bool = False, clocks: bool = False) -> None:
        hosts = {**{f"n{i + 1}": 11 + i for i in range(nodes)}, **{f"etcd{i + 1}": 21 + i for i in range(3)}, "cl": 31}
        self.net = Network(tag, hosts)
        self._watchdog = watchdog
        self._programs = ChaosPrograms(directory.parent, program, clocks=clocks)
        #: (node, exit code, monotonic µs) of agents that ended without being told to.
        self.ended: list[tuple[str, int, int]] = []
        #: What is still to be undone once the last fault has ended.
        self.after_healing: list[Callable[[], None]] = []
        self._restart_at_s: dict[str, float] = {}
        super().__init__(directory, program, etcd_program=find_etcd(), bin_dir=find_postgres(), nodes=nodes, etcd_members=3, profile=profile,
                         user=USER, dynamic=dynamic)
        self.remember()
        self.hosts: list[Host] = [node for node in self.nodes if isinstance(node, Host)]
        self.device = Device(self.hosts) if watchdog else None

    def claim_network(self, etcd_members: int) -> tuple[Claim, str, int]:
        return _Held(), NETWORK, 0

    def new_member(self, name: str, address: str, client_port: int, directory: Path, log: Path) -> EtcdMember:
        member = HostMember(name, address, client_port, directory, log)
        member.network = self.net
        return member

    def new_node(self, name: str, address: str, *, ports: tuple[int, int], directory: Path, runtime: Path, settings: Settings) -> Node:
        host = Host(name, address, ports=ports, directory=directory, runtime=runtime, settings=settings)
        host.network, host.programs, host.with_watchdog = self.net, self._programs, self._watchdog
        return host

    @property
    def clocks(self) -> bool:
        return self._programs.clocks

    def clock_of(self, host: Host) -> Path:
        return self._programs.clock_of(host)

    def start(self) -> None:
        for host in self.hosts:
            host.mount()
        if self.device is not None:
            self.device.start()
        super().start()

    def close(self, *, remove: bool = True) -> None:
        if self.device is not None and self.device.is_alive():
            self.device.stop()
        thaw_below(self.directory)
        for member in self.etcd.members:
            member.send(signal.SIGCONT)
        super().close(remove=False)
        unmount_below(self.directory)
        for host in self.hosts:
            (host.directory / "disk.img").unlink(missing_ok=True)
        if remove:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- what an init system does

    def supervise(self) -> None:
        """Restart agents that ended by themselves, a second later, and remember that they did; and hosts that were reset."""
        now = time.monotonic()
        for host in self.hosts:
            if host.reset_at_s is not None and now >= host.reset_at_s + _BOOT_S:
                host.start_agent()
            code = host.ended_by_itself
            if code is None:
                self._restart_at_s.pop(host.name, None)
            elif host.name not in self._restart_at_s:
                self._restart_at_s[host.name] = now + _RESTART_S
                self.ended.append((host.name, code, round(now * 1e6)))
            elif now >= self._restart_at_s[host.name]:
                del self._restart_at_s[host.name]
                host.start_agent()

    def wait(self, condition: Callable[[], T | None], timeout_s: float, what: str, *, every_s: float = 0.1) -> T:
        """As in every bed, but an agent that ended is restarted, not an end of the story."""
        end = time.monotonic() + timeout_s
        while True:
            value = condition()
            if value:
                return value
            self.supervise()
            if time.monotonic() >= end:
                raise BedTimeout(f"after {timeout_s:g} s still not: {what}\n{self.describe()}")
            time.sleep(every_s)


@contextlib.contextmanager
def chaos_bed(tag: str, *, sources: bool = False, **kind: Any) -> Iterator[ChaosBed]:
    """A bed under a tag of its own, this thread on host `ct`; what former owners of any tag left is removed first."""
    sweep()
    place = _SHARED / f"{PREFIX}{tag}"
    place.mkdir(mode=0o755)
    with (place / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        bed = None
        try:
            program = install(place / "program", sources=sources)
            bed = ChaosBed(tag, place / "bed", program, **kind)
            bed.net.set_up()
            with bed.net.inside(CONTROL):
                yield bed
        finally:
            if bed is not None:
                bed.close()
            remove_namespaces(f"{PREFIX}{tag}-")
            shutil.rmtree(place, ignore_errors=True)


def sweep() -> None:
    """Remove what is named as ours and has no living owner."""
    for place in sorted(_SHARED.glob(f"{PREFIX}*")):
        try:
            lock = (place / "lock").open("a", encoding="utf-8")
        except OSError:
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody's
            print(f"removing what a former run left: {place.name}", flush=True)
            thaw_below(place)
            if not end_remembered(place / "bed"):
                end_processes_of(place)
            unmount_below(place)
            remove_namespaces(f"{place.name}-")
            shutil.rmtree(place, ignore_errors=True)


def mounts_below(place: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [where for line in lines if (where := line.split()[1]).startswith(f"{place}/")]


def thaw_below(place: Path) -> None:
    for where in mounts_below(place):
        subprocess.run(["fsfreeze", "-u", where], capture_output=True, check=False, timeout=_COMMAND_S)  # not frozen: EINVAL


def unmount_below(place: Path) -> None:
    for where in mounts_below(place):
        _command("umount", where)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_S, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")

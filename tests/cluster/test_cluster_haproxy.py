"""packaging/haproxy.cfg in front of a real cluster: whoever writes finds the primary and loses nothing, whoever reads finds a fresh standby."""

import csv
import itertools
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from pgha.demo.processes import process_of, spawn

pytestmark = pytest.mark.cluster

PACKAGED = Path(__file__).parents[2] / "packaging/haproxy.cfg"
HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
WRITE, READ, FRESH, SYNC, ASYNC = 5000, 5001, 5002, 5003, 5004
#: HAProxy leaves a node after two bad answers, 1 s and 0.5 s apart; more on a busy machine.
NOTICED_S = 3.0
#: What a reader sees may be that much older than what was acknowledged to a writer.
STALE_S = 3.0


def adapted(bed, address, admin):
    """The packaged configuration with this bed's addresses and ports, and sections made from its one for reads, as its comments tell."""
    text = PACKAGED.read_text()
    for i, node in enumerate(bed.nodes, 1):
        text, count = re.subn(rf"server node{i} \S+:5432 (.*)check port 8008", rf"server {node.name} {node.address}:{node.port} \1check port {node.rest_port}", text)
        assert count == 2, "the packaged configuration names each node in both sections"
    text, count = re.subn(r"bind \*:(\d+)", rf"bind {address}:\1", text)
    assert count == 2
    section = text[text.index("listen read"):]
    for name, port, path in (("fresh", FRESH, "/replica?lag=1MB"), ("sync", SYNC, "/sync"), ("async", ASYNC, "/async")):
        text += "\n" + section.replace("listen read", f"listen {name}").replace(f":{READ}", f":{port}").replace("OPTIONS /replica", f"OPTIONS {path}")
    return text.replace("global\n", f"global\n    stats socket {admin} mode 600\n", 1)


class HAProxy:
    """Use as a context."""

    def __init__(self, bed):
        assert HAPROXY, "haproxy is missing: run build/setup"
        self.bed = bed
        self.address = f"{bed.network}.31"
        self.socket = bed.directory / "haproxy.sock"

    def __enter__(self):
        config = self.bed.directory / "haproxy.cfg"
        config.write_text(adapted(self.bed, self.address, self.socket))
        self.child = spawn([HAPROXY, "-db", "-f", str(config)], log=self.bed.directory / "haproxy.log", directory=self.bed.directory, user="postgres")
        self.bed.wait(lambda: self.child.poll() is not None or self.socket.is_socket(), 10, "HAProxy runs")
        assert self.child.poll() is None, (self.bed.directory / "haproxy.log").read_text()
        return self

    def __exit__(self, *_):
        process = process_of(self.child)
        if process is not None:
            process.send(signal.SIGKILL)
        self.child.wait(10)
        self.socket.unlink(missing_ok=True)

    def up(self, section):
        """The nodes that it would send a client to, as its own statistics say."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(5)
            admin.connect(str(self.socket))
            admin.sendall(b"show stat\n")
            with admin.makefile() as answer:
                rows = list(csv.DictReader(answer.read().lstrip("# ").splitlines()))
        return {row["svname"] for row in rows if row["pxname"] == section and row["svname"] not in ("FRONTEND", "BACKEND") and row["status"].startswith("UP")}

    def wait_up(self, section, *nodes, timeout_s=30):
        self.bed.wait(lambda: self.up(section) == {node.name for node in nodes}, timeout_s, f"HAProxy's {section} leads to {[node.name for node in nodes]}")

    def connect(self, port):
        return psycopg.connect(host=self.address, port=port, user="postgres", dbname="postgres", password=self.bed.settings.password, autocommit=True,
                               connect_timeout=3, sslmode="disable", gssencmode="disable")

    def where(self, port):
        """(in recovery, address) of the node that this port leads to now."""
        with self.connect(port) as connection:
            return connection.execute("SELECT pg_is_in_recovery(), host(inet_server_addr())").fetchone()


class Read(NamedTuple):
    """One question by the read port, with a connection of its own. Moments are seconds of time.monotonic()."""

    began_s: float
    ended_s: float
    address: str            # "" if there was no answer, then `why` says so
    in_recovery: bool
    newest: int             # the highest row that was visible
    why: str = ""


class Load:
    """One client that writes rows 1, 2, 3 … by the write port, and two that read by the read port; use as a context."""

    def __init__(self, proxy):
        self.proxy = proxy
        self.acks: list[tuple[float, int]] = []         # (moment, row)
        self.reads: list[Read] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read, self._read)]

    def __enter__(self):
        with self.proxy.connect(WRITE) as connection:
            connection.execute("DROP TABLE IF EXISTS through_haproxy; CREATE TABLE through_haproxy (n int PRIMARY KEY)")
        for node in self.proxy.bed.nodes:
            self.proxy.bed.wait(lambda node=node: node.ask("SELECT to_regclass('through_haproxy')::text"), 10, f"{node.name} has the table")
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join(20)

    def go_on(self):
        """Until both write and read again."""
        acks, reads = len(self.acks) + 30, sum(1 for read in self.reads if read.address) + 10
        self.proxy.bed.wait(lambda: len(self.acks) >= acks and sum(1 for read in self.reads if read.address) >= reads, 30, "clients write and read")

    def _write(self):
        rows = itertools.count(1)
        while not self._end.is_set():
            try:
                with self.proxy.connect(WRITE) as connection:
                    while not self._end.wait(0.01):
                        row = next(rows)
                        connection.execute("INSERT INTO through_haproxy VALUES (%s)", (row,))
                        self.acks.append((time.monotonic(), row))
            except psycopg.Error:
                self._end.wait(0.02)

    def _read(self):
        while not self._end.wait(0.02):
            began_s = time.monotonic()
            try:
                with self.proxy.connect(READ) as connection:
                    in_recovery, address, newest = connection.execute(
                        "SELECT pg_is_in_recovery(), host(inet_server_addr()), coalesce(max(n), 0) FROM through_haproxy").fetchone()
                self.reads.append(Read(began_s, time.monotonic(), address, in_recovery, newest))
            except psycopg.Error as error:
                self.reads.append(Read(began_s, time.monotonic(), "", False, 0, str(error)))

    # -- what is to be said of it

    def gap_s(self, since_s):
        """The longest time without an acknowledged row since that moment."""
        moments = [at for at, _ in self.acks if at >= since_s - 1]
        return max(b - a for a, b in itertools.pairwise(moments))

    def failed_reads(self, *faults_s):
        """Those that failed though no fault was as recent as HAProxy needs to notice it."""
        return [read for read in self.reads if read.why and not any(fault_s <= read.ended_s and read.began_s < fault_s + NOTICED_S for fault_s in faults_s)]

    def stale_reads(self, present):
        """Those that did not see what had been acknowledged long before, of the rows that are present in the end."""
        acks = iter((at_s, row) for at_s, row in self.acks if row in present)
        at_s, row = next(acks)
        old, stale = 0, []
        for read in sorted((read for read in self.reads if read.address), key=lambda read: read.began_s):
            while at_s < read.began_s - STALE_S:
                old = row
                at_s, row = next(acks, (float("inf"), row))
            if read.newest < old:
                stale.append((read, old))
        return stale

    def reads_of_primaries(self, *reigns):
        """Reads that a primary answered that had been one for longer than HAProxy needs to notice it. `reigns`: (address, since, until)."""
        return [read for read in self.reads if read.address and not read.in_recovery
                and any(read.address == address and since_s + NOTICED_S < read.began_s < until_s for address, since_s, until_s in reigns)]


def is_broken(connection):
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def rows(node):
    with node.connect() as connection:
        return {n for (n,) in connection.execute("SELECT n FROM through_haproxy")}


def session_on(proxy, port, node):
    """A session by that port that happens to be on that node; the others that were needed are closed."""

    def found():
        connection = proxy.connect(port)
        if connection.execute("SELECT host(inet_server_addr())").fetchone()[0] == node.address:
            return connection
        connection.close()
        return None

    return proxy.bed.wait(found, 10, f"a session by port {port} on {node.name}")


def test_clients_of_haproxy_through_a_switchover_and_a_failover_under_load(cluster):
    old = cluster.wait_healthy(30)
    new = next(node for node in cluster.nodes if node is not old)
    replicas = [node for node in cluster.nodes if node is not old]
    with HAProxy(cluster) as proxy:
        # HAProxy takes every server for good until its first checks have failed; after that it knows
        proxy.wait_up("write", old)
        proxy.wait_up("read", *replicas)
        with Load(proxy) as load:
            assert proxy.where(WRITE) == (False, old.address)
            cluster.wait(lambda: {proxy.where(READ)[1] for _ in range(4)} == {node.address for node in replicas}, 10, "reads go to both replicas")
            writing, reading = session_on(proxy, WRITE, old), session_on(proxy, READ, new)
            switched_s = time.monotonic()
            answer = old.request("POST", "/switchover", {"leader": old.name, "candidate": new.name}, timeout_s=30)
            assert answer.status == 200
            cluster.wait(lambda: is_broken(writing), 10, "a session with the old primary has ended")
            cluster.wait(lambda: is_broken(reading), 10, "a session by the read port with the node that became the primary has ended, too")
            proxy.wait_up("write", new)
            assert proxy.where(WRITE) == (False, new.address)
            assert cluster.wait_healthy(30) is new
            proxy.wait_up("read", *(node for node in cluster.nodes if node is not new))
            load.go_on()
            gap_s, switched_rows = load.gap_s(switched_s), {row for _, row in load.acks}
            assert not switched_rows - rows(new), "a switchover loses nothing that was acknowledged through HAProxy"
            print(f"switchover: {gap_s:.2f} s without a write through HAProxy")
            assert gap_s < 6

            new.signal_agent(signal.SIGKILL)
            new.signal_postgres(signal.SIGKILL)
            new.kill_agent()
            killed_s = time.monotonic()
            third = cluster.wait_leader(other_than=new, timeout_s=30)
            elected_s = time.monotonic()
            proxy.wait_up("write", third)
            left = next(node for node in cluster.nodes if node not in (new, third))
            proxy.wait_up("read", left)
            load.go_on()
            print(f"failover: {load.gap_s(killed_s):.2f} s without a write through HAProxy, {elected_s - killed_s:.2f} s of them without a primary")
            new.start_agent()
            assert cluster.wait_healthy(60) is third
            back_s = time.monotonic()
            proxy.wait_up("read", left, new)
            load.go_on()
        ended_s = time.monotonic()
        print(f"{len(load.acks)} rows, {len(load.reads)} reads, failed: {sorted({read.why.strip()[:90] for read in load.reads if read.why})}")
        assert not load.failed_reads(switched_s, killed_s, elected_s, back_s)
        present = rows(third)
        assert not load.stale_reads(present)
        assert not load.reads_of_primaries((old.address, 0, switched_s), (new.address, switched_s, killed_s), (third.address, elected_s, ended_s))
        lost = {at: row for at, row in load.acks if row not in present}
        assert all(killed_s - 5 < at < killed_s + 1 for at in lost), "asynchronous: only the last rows before the kill may be lost"


def test_haproxy_chooses_by_lag_and_by_synchrony(cluster):
    """`/replica?lag=`, `/sync` and `/async` as health checks: HAProxy follows within seconds what the agents know."""
    leader = cluster.wait_healthy(30)
    replicas = [node for node in cluster.nodes if node is not leader]
    lagging, other = replicas

    def configure(**change):
        assert leader.request("PATCH", "/config", change).status == 200

    with HAProxy(cluster) as proxy:
        proxy.wait_up("fresh", *replicas)
        lagging.ask("SELECT pg_wal_replay_pause()")
        try:
            with leader.connect() as connection:
                connection.execute("CREATE TABLE ballast AS SELECT repeat('x', 100) FROM generate_series(1, 30000)")
            proxy.wait_up("fresh", other)
            assert {proxy.where(FRESH) for _ in range(6)} == {(True, other.address)}
            assert proxy.up("read") == {lagging.name, other.name}, "without lag= it is still good enough"
        finally:
            lagging.ask("SELECT pg_wal_replay_resume()")
            with leader.connect() as connection:
                connection.execute("DROP TABLE IF EXISTS ballast")
        proxy.wait_up("fresh", *replicas)

        proxy.wait_up("sync")
        proxy.wait_up("async", *replicas)
        configure(synchronous_mode=True)
        try:
            cluster.wait(lambda: len(proxy.up("sync")) == 1, 20, "HAProxy has a synchronous standby")
            (name,) = proxy.up("sync")
            synchronous, asynchronous = cluster.node(name), next(node for node in replicas if node.name != name)
            proxy.wait_up("async", asynchronous)
            assert {proxy.where(SYNC) for _ in range(4)} == {(True, synchronous.address)}
            assert {proxy.where(ASYNC) for _ in range(4)} == {(True, asynchronous.address)}
            sync = leader.ask(f"SELECT sync_state FROM pg_stat_replication WHERE application_name = '{name}'")
            assert sync == "sync"
        finally:
            configure(synchronous_mode=None)
        proxy.wait_up("async", *replicas)
        proxy.wait_up("sync")

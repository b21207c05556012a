"""packaging/haproxy.cfg in front of a real cluster: psql through its write port works before and after a failover."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from pgha.demo.processes import process_of, run, spawn

pytestmark = pytest.mark.cluster

PACKAGED = Path(__file__).parents[2] / "packaging/haproxy.cfg"
HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")


def adapted(bed, address):
    """The packaged configuration with this bed's addresses and ports; nothing else is changed."""
    text = PACKAGED.read_text()
    for i, node in enumerate(bed.nodes, 1):
        text, count = re.subn(rf"server node{i} \S+:5432 (.*)check port 8008", rf"server {node.name} {node.address}:{node.port} \1check port {node.rest_port}", text)
        assert count == 2, "the packaged configuration names each node in both sections"
    text, count = re.subn(r"bind \*:(\d+)", rf"bind {address}:\1", text)
    assert count == 2
    return text


class Psql:
    """psql as an application's user would call it, through one of HAProxy's ports."""

    def __init__(self, bed, address):
        self.bed, self.address = bed, address

    def __call__(self, port, query, timeout_s=10):
        """The output, or None if psql failed."""
        answer = run([str(self.bed.settings.bin_dir / "psql"), "-XAtq", "-h", self.address, "-p", str(port), "-U", "postgres", "-d", "postgres",
                      "-v", "ON_ERROR_STOP=1", "-c", query],
                     timeout_s=timeout_s, environment={"PGPASSWORD": self.bed.settings.password, "PGCONNECT_TIMEOUT": "3"})
        if answer.returncode != 0:
            print(f"psql -p {port}: {answer.stderr.strip()}")
            return None
        return answer.stdout.strip()


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
def test_clients_of_haproxy_find_the_primary_before_and_after_a_failover(cluster):
    address = f"{cluster.network}.31"
    config = cluster.directory / "haproxy.cfg"
    config.write_text(adapted(cluster, address))
    haproxy = spawn([HAPROXY, "-db", "-f", str(config)], log=cluster.directory / "haproxy.log", directory=cluster.directory, user="postgres")
    psql = Psql(cluster, address)
    where = "SELECT pg_is_in_recovery(), inet_server_addr()"
    try:
        old = cluster.leader()
        # HAProxy takes every server for good until its first checks have failed; after that it knows
        cluster.wait(lambda: all(psql(5000, where) == f"f|{old.address}" for _ in range(6)), 30, "the write port leads to the primary, each time")
        assert psql(5000, "CREATE TABLE IF NOT EXISTS through_haproxy (n int); INSERT INTO through_haproxy VALUES (1)") is not None
        cluster.wait(lambda: (psql(5001, where) or "").startswith("t|"), 15, "the read port leads to a replica")

        old.signal_agent(signal.SIGKILL)
        old.signal_postgres(signal.SIGKILL)
        old.kill_agent()
        killed_s = time.monotonic()
        new = cluster.wait_leader(other_than=old, timeout_s=30)
        cluster.wait(lambda: psql(5000, "INSERT INTO through_haproxy VALUES (2)") is not None, 15, "the write port works again")
        print(f"psql through HAProxy writes again {time.monotonic() - killed_s:.2f} s after the kill")
        assert psql(5000, where) == f"f|{new.address}"
        assert psql(5000, "SELECT string_agg(n::text, ',' ORDER BY n) FROM through_haproxy") == "1,2"

        old.start_agent()
        cluster.wait_healthy()
        cluster.wait(lambda: psql(5001, where) == f"t|{old.address}", 30, "the old primary serves reads as a replica")
    finally:
        process = process_of(haproxy)
        if process is not None:
            process.send(signal.SIGKILL)
        haproxy.wait(10)

"""Debian's vip-manager on every host of a real cluster: its address is where the leader is, and moves with it.

It asks etcd for the leader key, and takes the address when it finds its own node's name there. Debian 12's (1.0.2) asks
by etcd's version 2, for which the agents answer in the store's place (pgha/rest/etcd_v2.py).
"""

import json
import shutil
import signal
import subprocess

import pytest
from chaos_network import NETWORK

from pgha.demo.processes import process_of, run, spawn

pytestmark = pytest.mark.cluster

VIP = f"{NETWORK}.100"
VIP_MANAGER = shutil.which("vip-manager", path="/usr/sbin:/usr/bin")


class VipManagers:
    """One on each host, configured as its manual says; use as a context."""

    def __init__(self, bed):
        assert VIP_MANAGER, "vip-manager is missing: run build/setup"
        self.bed = bed
        self.children = []

    def __enter__(self):
        for host in self.bed.hosts:
            with self.bed.net.inside(host.name):
                self.children.append(spawn(
                    [VIP_MANAGER, "--ip", VIP, "--netmask", "24", "--interface", "eth0", "--interval", "300", "--dcs-type", "etcd",
                     "--dcs-endpoints", ",".join(f"http://{node.address}:{node.rest_port}" for node in self.bed.hosts),
                     "--trigger-key", self.bed.key("leader"), "--trigger-value", host.name],
                    log=self.bed.directory / f"vip-manager.{host.name}.log", directory=self.bed.directory))
        return self

    def __exit__(self, *_):
        for child in self.children:
            process = process_of(child)
            if process is not None:
                process.send(signal.SIGKILL)
            child.wait(10)
        for log in sorted(self.bed.directory.glob("vip-manager.*.log")):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}")

    def where(self):
        """The names of the hosts that have the address now."""
        return [host.name for host in self.bed.hosts if self.has_address(host)]

    def has_address(self, host):
        shown = subprocess.run(["ip", "-n", self.bed.net.namespace(host.name), "-json", "addr", "show", "dev", "eth0"],
                               capture_output=True, text=True, timeout=10, check=True).stdout
        return any(found["local"] == VIP for link in json.loads(shown) for found in link["addr_info"])

    def wait_at(self, *names):
        self.bed.wait(lambda: self.where() == list(names), 20, f"the address is at {names or 'no host'} and nowhere else")


def ask(bed, query):
    """As a client on a host of its own, by the address; None if that fails."""
    with bed.net.inside("cl"):
        answer = run([str(bed.settings.bin_dir / "psql"), "-XAtq", "-h", VIP, "-U", "postgres", "-d", "postgres", "-c", query],
                     timeout_s=10, environment={"PGPASSWORD": bed.settings.password, "PGCONNECT_TIMEOUT": "2"})
    return answer.stdout.strip() if answer.returncode == 0 else None


def test_the_address_of_vip_manager_follows_the_leader(hosts):
    bed = hosts
    first = bed.wait_healthy(30)
    with VipManagers(bed) as vip:
        vip.wait_at(first.name)
        bed.wait(lambda: ask(bed, "CREATE TABLE by_address (n int); INSERT INTO by_address VALUES (1)") == "", 20, "clients write by the address")

        second = next(host for host in bed.hosts if host is not first)
        answer = first.request("POST", "/switchover", {"leader": first.name, "candidate": second.name}, timeout_s=30)
        assert answer.status == 200
        vip.wait_at(second.name)
        bed.wait(lambda: ask(bed, "INSERT INTO by_address VALUES (2)") == "", 20, "clients write by the address, where it is now")
        assert bed.wait_healthy(30) is second

        second.kill_agent()
        second.start_agent()

        def leads_again():
            assert vip.where() == [second.name], "the address has left its host, though only the agent was restarted"
            answer = second.get("/leader")
            return answer is not None and answer.status == 200

        bed.wait(leads_again, 20, "the restarted agent leads")

        second.lose_power()     # but for its vip-manager, which has to see that its node leads no more
        third = bed.wait_leader(other_than=second, timeout_s=30)
        vip.wait_at(third.name)
        bed.wait(lambda: ask(bed, "INSERT INTO by_address VALUES (3)") == "", 20, "clients write by the address, where it is now")
        second.start_agent()
        assert bed.wait_healthy(60) is third
        assert ask(bed, "SELECT string_agg(n::text, ',' ORDER BY n) FROM by_address") == "1,2,3"

        bed.stop()
        vip.wait_at()

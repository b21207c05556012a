"""Replication slots and the tags that steer replication, on a real cluster: what is kept, who streams from whom, who is copied."""

import re
import shutil
import signal

import psycopg
import pytest
from traffic import Traffic

from pgha.demo.processes import spawn

pytestmark = pytest.mark.cluster

SEGMENT = 16 << 20
#: Less than what is written while a reader is away: without a slot it would be gone.
LITTLE = {"postgresql": {"parameters": {"wal_keep_size": "16MB"}}}


def slots(node):
    """Name → (active, restart_lsn in bytes) of the physical slots of a server."""
    with node.connect() as connection:
        rows = connection.execute("SELECT slot_name, active, (restart_lsn - '0/0')::bigint FROM pg_replication_slots WHERE slot_type = 'physical'").fetchall()
    return {name: (active, lsn) for name, active, lsn in rows}


def change(node, patch):
    answer = node.request("PATCH", "/config", patch)
    assert answer.status == 200, answer


def write_segments(leader, number):
    for _ in range(number):
        leader.ask("SELECT pg_logical_emit_message(true, 'test', repeat('x', 1000)) IS NOT NULL AND pg_switch_wal() IS NOT NULL")


def recycle(nodes):
    for node in nodes:
        with node.connect() as connection:
            connection.execute("CHECKPOINT")


def segments(directory):
    """Complete segments: number → files of that number, one a timeline."""
    found = {}
    for path in directory.iterdir():
        if re.fullmatch("[0-9A-F]{24}", path.name):
            found.setdefault(int(path.name[8:16], 16) * (1 << 32) // SEGMENT + int(path.name[16:], 16), []).append(path)
    return found


class Reader:
    """pg_receivewal by a permanent slot, as a backup program would run it: it looks for the primary by itself."""

    def __init__(self, bed, slot):
        self.bed = bed
        self.directory = bed.directory / "received"
        self.directory.mkdir()
        shutil.chown(self.directory, "postgres", "postgres")
        dsn = (f"host={','.join(node.address for node in bed.nodes)} port={bed.nodes[0].port} user=replicator sslmode=disable gssencmode=disable "
               "connect_timeout=2 target_session_attrs=read-write")
        self.process = spawn([str(bed.settings.bin_dir / "pg_receivewal"), "-d", dsn, "-D", str(self.directory), "--slot", slot, "--synchronous"],
                             log=bed.directory / "received.log", directory=self.directory, user="postgres", environment={"PGPASSWORD": bed.settings.password})

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(10)


def test_a_permanent_slot_and_what_it_keeps_survive_a_failover(cluster):
    old = cluster.wait_healthy(30)
    others = [node for node in cluster.nodes if node is not old]
    change(old, {**LITTLE, "slots": {"archive": {"type": "physical"}}, "ignore_slots": [{"name": "by_hand", "type": "physical"}]})
    cluster.wait(lambda: all("archive" in slots(node) for node in cluster.nodes), 15, "every node has the permanent slot")
    refused = old.request("PATCH", "/config", {"slots": {"debezium": {"type": "logical", "database": "postgres", "plugin": "pgoutput"}}})
    assert (refused.status, "slots.debezium: is a logical slot" in refused.body) == (400, True), refused
    for node in cluster.nodes:
        for name in ("by_hand", "nobodys"):
            node.ask(f"SELECT pg_create_physical_replication_slot('{name}', true) IS NOT NULL")
    cluster.wait(lambda: not any("nobodys" in slots(node) for node in cluster.nodes), 15, "a slot that nobody knows of is dropped")
    assert all("by_hand" in slots(node) for node in cluster.nodes)
    assert "by_hand" not in cluster.etcd.value(cluster.key("status"))["slots"]
    reader = Reader(cluster, "archive")
    try:
        with Traffic(cluster) as traffic:
            cluster.wait(lambda: slots(old)["archive"][0], 15, "the reader reads")
            write_segments(old, 3)
            begin = slots(old)["archive"][1]
            cluster.wait(lambda: all(slots(node)["archive"][1] >= begin for node in others), 15, "the standbys' slots have come along")
            reader.process.send_signal(signal.SIGSTOP)
            write_segments(old, 8)
            at = slots(old)["archive"][1]
            recycle(cluster.nodes)
            positions = [slots(node)["archive"][1] for node in others]
            assert max(positions) <= at, "no standby lets go of what the reader has not got"
            assert cluster.etcd.value(cluster.key("status"))["slots"]["archive"] <= at
            old.kill_agent()
            old.signal_postgres(signal.SIGKILL)
            traffic.fault(f"{old.name} dies")
            new = cluster.wait_leader(other_than=old, timeout_s=30)
            active, kept = slots(new)["archive"]
            assert (active, begin <= kept <= at) == (False, True), (begin, kept, at)
            assert at // SEGMENT in segments(new.data_dir / "pg_wal"), "the WAL that the reader needs is there"
            reader.process.send_signal(signal.SIGCONT)
            cluster.wait(lambda: slots(new)["archive"][0], 30, "the reader reads on at the new primary")
            old.start_agent()
            traffic.finish(lost_since_s=0)
        write_segments(new, 2)
        last = int(new.ask("SELECT (pg_current_wal_lsn() - '0/0')::bigint")) // SEGMENT - 1
        cluster.wait(lambda: last in segments(reader.directory), 30, "the reader has it all")
        received, there = segments(reader.directory), segments(new.data_dir / "pg_wal")
        assert sorted(received) == list(range(min(received), last + 1)), "no segment is missing in between"
        timelines = {path.name[:8] for paths in received.values() for path in paths}
        assert len(timelines) == 2, timelines
        newest = [path for paths in received.values() for path in paths if path.name[:8] == max(timelines)]
        same = [path for path in newest if path in {path.parent / other.name for number in there for other in there[number]}]
        assert same, "something to compare"
        for path in same:
            assert path.read_bytes() == (new.data_dir / "pg_wal" / path.name).read_bytes(), path.name
        cluster.wait(lambda: slots(old)["archive"][1] >= slots(new)["archive"][1] - SEGMENT, 15, "the old primary's slot comes along, as a standby's")
        assert all("by_hand" in slots(node) for node in others), "what is ignored is kept on a standby and on who was one (pg_rewind removes all slots)"
    finally:
        reader.end()
        leader = cluster.leader() or cluster.wait_leader()
        change(leader, {"slots": None, "ignore_slots": None, "postgresql": {"parameters": {"wal_keep_size": "128MB"}}})
    cluster.wait(lambda: not any({"archive", "by_hand"} & slots(node).keys() for node in cluster.nodes), 15, "what the configuration names no more is dropped")


def retag(node, **tags):
    node.tags = tags
    node.write_configuration()
    node.signal_agent(signal.SIGHUP)


def streams_from(cluster, node, upstream):
    """By its own slot, as the upstream has it."""
    query = f"SELECT count(*) FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid WHERE application_name = '{node.name}' AND slot_name = '{node.name}' AND state = 'streaming'"

    def streams():
        try:
            return upstream.ask(query) == 1
        except psycopg.OperationalError:    # it is being started
            return False

    cluster.wait(streams, 30, f"{node.name} streams from {upstream.name}")


def test_tags_steer_who_streams_from_whom_who_is_copied_and_who_serves_reads(cluster):
    leader = cluster.wait_healthy(30)
    upstream, reader = (node for node in cluster.nodes if node is not leader)
    added = None
    try:
        retag(reader, replicatefrom=upstream.name, noloadbalance=True, rack="r7")
        streams_from(cluster, reader, upstream)
        cluster.wait(lambda: reader.get("/replica").status == 503, 10, "not in /replica")
        assert reader.get("/health?tag_rack=r7").status == 200
        assert reader.get("/health?tag_rack=r8").status == 503
        assert upstream.get("/replica").status == 200
        (shown,) = (member for member in leader.get("/cluster").body["members"] if member["name"] == reader.name)
        assert shown["tags"] == {"replicatefrom": upstream.name, "noloadbalance": True, "rack": "r7"}

        # The primary keeps a slot for it, too, which moves with what it has.
        write_segments(leader, 2)
        at = int(leader.ask("SELECT (pg_current_wal_lsn() - '0/0')::bigint"))
        cluster.wait(lambda: slots(leader)[reader.name][1] >= at - SEGMENT, 15, "the primary's slot for the cascading replica moves along")
        assert not slots(leader)[reader.name][0]

        # Each names the other: both stream from the primary.
        retag(upstream, replicatefrom=reader.name)
        streams_from(cluster, reader, leader)
        streams_from(cluster, upstream, leader)
        retag(upstream, clonefrom=True)
        streams_from(cluster, reader, upstream)

        # Its upstream goes, and comes back.
        assert upstream.stop_agent() == 0
        streams_from(cluster, reader, leader)
        write_segments(leader, 1)
        upstream.start_agent()
        streams_from(cluster, reader, upstream)

        # It is to read from an archive only, of which there is none here.
        retag(reader, nostream=True)
        cluster.wait(lambda: not any(reader.name in slots(node) for node in (leader, upstream)), 15, "nobody keeps a slot for it")
        assert reader.ask("SELECT count(*) FROM pg_stat_wal_receiver") == 0
        retag(reader, replicatefrom=upstream.name)
        streams_from(cluster, reader, upstream)

        # A copy is taken from who offers itself; its slot stays for member_slots_ttl when it goes.
        added = cluster.add_node()
        shutil.rmtree(added.directory, ignore_errors=True)      # another test's, of the same name
        added.start_agent()
        streams_from(cluster, added, leader)
        assert f"bootstrap from replica '{upstream.name}'" in added.log_path.read_text()
        cluster.wait(lambda: all(added.name in slots(node) for node in (leader, upstream, reader)), 15, "every other node keeps a slot for it")
        assert added.stop_agent() == 0
        cluster.wait(lambda: not cluster.etcd.get(cluster.key(f"members/{added.name}")), 20, "its member key is gone")
        retag(reader)
        streams_from(cluster, reader, leader)
        assert all(added.name in slots(node) for node in (leader, upstream, reader))
        assert added.name in cluster.etcd.value(cluster.key("status"))["retain_slots"]
        change(leader, {"member_slots_ttl": "2s"})
        cluster.wait(lambda: not any(added.name in slots(node) for node in (leader, upstream, reader)), 30, "its slots are dropped")
        assert added.name not in cluster.etcd.value(cluster.key("status"))["retain_slots"]
        assert all(slots(leader)[node.name][0] for node in (upstream, reader)), "those in use stay"
    finally:
        change(cluster.wait_leader(), {"member_slots_ttl": None})
        for node in (upstream, reader):
            retag(node)
        if added is not None:
            added.kill_agent()
            added.signal_postgres(signal.SIGKILL)
            cluster.nodes.remove(added)
    cluster.wait_healthy(30)

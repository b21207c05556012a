"""The operator's programs on a real cluster: callbacks through a node's life, a veto, a program before each planned stop, a
copy by a program of one's own; and one that hangs, which holds nobody up."""

import signal

import pytest
from traffic import Traffic, ids

pytestmark = pytest.mark.cluster

#: Says what it is told, into a file of its node; hangs on a reload if it is told to.
TELL = """#!/bin/sh
echo "$3 $4 $5" >> "$1/told.$2"
[ "$3" = on_reload ] && [ -e "$1/hang" ] && exec sleep 1000
exit 0
"""
MAY_PROMOTE = """#!/bin/sh
echo "pre_promote" >> "$1/told.$2"
[ ! -e "$1/veto.$2" ] || { echo "the operator says no"; exit 1; }
"""
#: The server still answers.
DRAIN = """#!/bin/sh
echo "before_stop $(psql -qXAt -h "$3" -p "$4" -U postgres -c 'SELECT 1')" >> "$1/told.$2"
exit 1
"""
COPY = """#!/bin/bash
set -eu
for argument; do [[ $argument == --*=* ]] && declare "${argument:2}"; done
echo "copied as $role of $scope" >> "$notes"
exec "$program" -D "$datadir" -d "$connstring" -X stream -c fast -w
"""


class Hooks:
    """A bed whose nodes have all programs."""

    def __init__(self, bed):
        self.bed = bed
        self.place = bed.directory / "scripts"
        self.place.mkdir()
        self.place.chmod(0o777)
        for name, text in (("tell", TELL), ("may-promote", MAY_PROMOTE), ("drain", DRAIN), ("copy", COPY)):
            path = self.place / name
            path.write_text(text)
            path.chmod(0o755)
        self._read = {}
        for node in bed.nodes:
            self.equip(node)

    def equip(self, node):
        plain, here = node.configuration, self.place

        def configuration():
            whole = plain()
            whole["postgresql"] |= {
                "callbacks": {f"on_{event}": f"{here}/tell {here} {node.name}" for event in ("start", "stop", "restart", "reload", "role_change")},
                "pre_promote": f"{here}/may-promote {here} {node.name}", "before_stop": f"{here}/drain {here} {node.name} {node.runtime} {node.port}",
                "create_replica_methods": ["broken", "copy", "basebackup"],
                "broken": {"command": "/bin/false"},
                "copy": {"command": f"{here}/copy", "program": f"{node.settings.bin_dir}/pg_basebackup", "notes": f"{here}/told.{node.name}"},
            }
            whole["pgha"] |= {"callback_timeout": "4s", "pre_promote_timeout": "4s", "before_stop_timeout": "4s"}
            return whole

        node.configuration = configuration

    def told(self, node):
        """What its programs have noted since the last look."""
        try:
            lines = (self.place / f"told.{node.name}").read_text().splitlines()
        except FileNotFoundError:
            return []
        return lines[self._read.get(node.name, 0):]

    def wait_told(self, node, *expected, within_s=10):
        """Exactly these lines, in this order; the next look begins after them."""
        self.bed.wait(lambda: len(self.told(node)) >= len(expected), within_s, f"{node.name} is told {expected}")
        found = self.told(node)
        assert found == list(expected)
        self._read[node.name] = self._read.get(node.name, 0) + len(found)


def test_programs_of_the_operator(beds):
    bed = beds.fresh(nodes=2)
    hooks = Hooks(bed)
    bed.start()
    a = bed.wait_healthy(90)
    b = next(node for node in bed.nodes if node is not a)
    hooks.wait_told(a, "on_start primary demo")
    hooks.wait_told(b, "copied as replica of demo", "on_start replica demo")

    # by a signal, by REST; a restart waits for before_stop, which finds the server running
    a.signal_agent(signal.SIGHUP)
    hooks.wait_told(a, "on_reload primary demo")
    assert b.request("POST", "/reload", {}).status == 202
    hooks.wait_told(b, "on_reload replica demo")
    assert b.request("POST", "/restart", {}, timeout_s=30).status == 200
    hooks.wait_told(b, "before_stop 1", "on_restart replica demo")
    bed.wait_healthy(20)

    # an emergency asks nobody: PostgreSQL is killed, and started in place
    a.signal_postgres(signal.SIGKILL)
    bed.wait_healthy(20)
    hooks.wait_told(a, "on_start primary demo")

    # a callback that hangs holds up neither the switchover nor the cluster; what comes after it is told in order
    with Traffic(bed) as traffic:
        traffic.wait_for_more(50)
        (hooks.place / "hang").touch()
        assert a.request("POST", "/reload", {}).status == 202
        hooks.wait_told(a, "on_reload primary demo")
        at_s = traffic.fault(f"switchover from {a.name} to {b.name} while a callback hangs")
        assert a.request("POST", "/switchover", {"leader": a.name, "candidate": b.name}, timeout_s=30).status == 200
        hooks.wait_told(b, "pre_promote", "on_role_change primary demo")
        bed.wait_healthy(20)
        assert traffic.resumed_after_s(at_s) < 3
        hooks.wait_told(a, "before_stop 1", "on_stop primary demo", "on_role_change replica demo")
        assert "callback has ended" in a.log_tail(400) and "had not ended after 4 s" in a.log_tail(400)
        (hooks.place / "hang").unlink()
        traffic.finish()

    # a veto: the candidate gives the lock back, goes on as a standby, and the other leads on
    with Traffic(bed) as traffic:
        traffic.wait_for_more(50)
        (hooks.place / f"veto.{a.name}").touch()
        at_s = traffic.fault(f"switchover from {b.name} to {a.name}, which its pre_promote refuses")
        server = a.postmaster()
        answer = b.request("POST", "/switchover", {"leader": b.name, "candidate": a.name}, timeout_s=30)
        hooks.wait_told(a, "pre_promote")
        assert bed.wait_healthy(30) is b, answer
        assert traffic.resumed_after_s(at_s) < 10
        assert a.postmaster() == server, "its server was left alone"
        assert "pre_promote refused (exit code 1: the operator says no)" in a.log_tail(400)
        hooks.wait_told(b, "before_stop 1", "on_stop primary demo", "on_role_change replica demo", "pre_promote", "on_role_change primary demo")
        traffic.finish()
    # a ttl later, and without the veto, it may
    (hooks.place / f"veto.{a.name}").unlink()
    bed.wait(lambda: b.request("POST", "/switchover", {"leader": b.name, "candidate": a.name}, timeout_s=30).status == 200, 30, "the switchover succeeds", every_s=1.0)
    assert bed.wait_healthy(20) is a
    assert hooks.told(a)[0] == "pre_promote" and hooks.told(a)[-1] == "on_role_change primary demo"
    bed.wait(lambda: hooks.told(b)[-1:] == ["on_role_change replica demo"], 10, "the former leader is told")
    hooks._read = {node.name: len((hooks.place / f"told.{node.name}").read_text().splitlines()) for node in bed.nodes}

    # an agent that is started beside its running server tells what it finds
    a.kill_agent()
    a.start_agent()
    hooks.wait_told(a, "on_start primary demo")
    assert bed.wait_healthy(20) is a
    assert ids(a) == ids(b)

    # the end: each is asked before, and told after
    for node, role in ((b, "replica"), (a, "primary")):
        assert node.stop_agent(30) == 0
        hooks.wait_told(node, "before_stop 1", f"on_stop {role} demo")
    for node in bed.nodes:
        assert "Traceback" not in node.log_path.read_text()

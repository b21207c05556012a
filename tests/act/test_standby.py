"""Following: frozen, re-pointed, rewound, reconfigured; and what is seen of it."""

from __future__ import annotations

import os
import signal

import pytest
import trio
from act_bed import as_source
from msgspec.structs import replace
from test_bootstrap_clone import cancelled_at

from pgha.act import steps
from pgha.act.steps import closing
from pgha.errors import OperationFailed, PostgresError, PostgresUnreachable
from pgha.lock import recipe
from pgha.model import action as a
from pgha.postgres import files
from pgha.postgres.processes import read_postmaster_pid


async def switch(one, two, *, claim, block=()):
    """Hand over from `one` to `two`."""
    await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="switchover", timeout_s=20))
    await two.quick(a.Freeze(epoch=claim))
    await two.until(lambda: two.observer.facts.row.receiver is None)
    await two.take_lock(claim=claim)
    await two.operate(a.Promote(timeline=claim, leaving=1, block=block, epoch=claim))


def test_frozen_standby_stays_frozen_until_it_is_told_to_follow(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            began_s = trio.current_time()
            await two.quick(a.Freeze(epoch=1))
            await two.until(lambda: two.observer.facts.row.receiver is None)
            frozen_s = trio.current_time() - began_s
            await two.until(lambda: two.observer.facts.row.primary_conninfo == "")     # backends reload a moment later
            row = two.observer.facts.row
            assert row.restore_command == ""
            await two.quick(a.ApplyConfiguration(force=True))
            await one.sql("CREATE TABLE t (n int)")
            await trio.sleep(0.7)     # longer than wal_retrieve_retry_interval: it must not come back by itself
            await two.until(lambda: two.observer.facts.row.receiver is None)
            assert two.observer.facts.row.position == row.position
            began_s = trio.current_time()
            await two.quick(a.Follow(upstream=as_source(one)))
            await two.until(two.streaming)
            print("frozen after", frozen_s, "streaming again after", trio.current_time() - began_s)
            assert trio.current_time() - began_s < 1.0
    trio.run(main)


def test_third_node_is_pointed_to_the_new_primary_within_a_moment(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two, bed.node("c") as three:
            await one.primary()
            await two.standby_of(one)
            await three.standby_of(one)
            await one.quick(a.MaintainSlots(create=("c", "b")))
            await three.quick(a.Follow(upstream=as_source(one), slot_name="c"))
            await three.until(lambda: three.streaming() and three.observer.facts.row.receiver.slot_name == "c")
            await switch(one, two, claim=3, block=(2,))
            began_s = trio.current_time()
            await three.quick(a.Follow(upstream=as_source(two)))
            await three.until(lambda: three.streaming() and three.observer.facts.row.receiver.sender_port == two.port)
            took_s = trio.current_time() - began_s
            await three.until(lambda: three.observer.facts.row.timeline == 3)
            print("re-pointed in", took_s)
            assert took_s < 1.5
    trio.run(main)


@pytest.mark.parametrize("crashed", [False, True])
def test_diverged_primary_comes_back_by_rewind(bed, crashed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await one.sql("CREATE TABLE t (who text)")
            await two.standby_of(one)
            await two.quick(a.Freeze(epoch=1))
            await two.until(lambda: two.observer.facts.row.receiver is None)
            await one.sql("INSERT INTO t SELECT 'lost' FROM generate_series(1, 1000)")
            await one.operate(a.Demote(mode="kill" if crashed else "fast", release=True, checkpoint=False, why="test", timeout_s=20))
            await two.take_lock(claim=2)
            await two.operate(a.Promote(timeline=2, leaving=1, block=(), epoch=2))
            await two.sql("INSERT INTO t VALUES ('kept')")

            upstream = await one.operate(a.InspectUpstream(source=as_source(two)))
            assert upstream["timeline"] == 2 and not upstream["in_recovery"] and upstream["history"][0]["timeline"] == 1
            assert upstream["checkpoint_timeline"] in (1, 2)
            end = await one.operate(a.InspectEndOfWal())
            assert end["end_of_wal"] > upstream["history"][0]["switch_lsn"]
            async with trio.open_nursery() as nursery:     # as the agent of b does after its promotion
                nursery.start_soon(two.actor.checkpoint)
                facts = await one.operate(a.Rewind(source=as_source(two), why="diverged"))
            print(facts)
            assert facts["outcome"] == "rewound" and one.standby_signal and await one.guard_state() == "standby"
            await one.operate(a.StartStandby(upstream=as_source(two)))
            await one.until(one.streaming)
            with trio.fail_after(5):
                while await one.sql("SELECT who FROM t") != [("kept",)]:
                    await trio.sleep(0.02)
            # the role is the node's own again, not its source's
            assert one.observer.facts.row.in_recovery and (await one.sql("SHOW port")) == [(str(one.port),)]
    trio.run(main)


def test_cancelled_rewind_leaves_a_standby_at_rest(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            await two.quick(a.Freeze(epoch=1))
            await two.until(lambda: two.observer.facts.row.receiver is None)
            await one.sql("CREATE TABLE lost (n int)")
            await one.operate(a.Demote(mode="kill", release=True, checkpoint=False, why="test", timeout_s=20))
            await two.take_lock(claim=2)
            await two.operate(a.Promote(timeline=2, leaving=1, block=(), epoch=2))
            await two.actor.checkpoint()
            for word in ("crash recovery", "rewinding"):
                await cancelled_at(one, a.Rewind(source=as_source(two), why="test"), word)
                assert one.standby_signal and not one.living() and await one.guard_state() == "standby"
            assert (await one.operate(a.Rewind(source=as_source(two), why="test")))["outcome"] == "rewound"
    trio.run(main)


def test_rewind_from_a_standby_is_refused_before_anything_is_touched(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            await one.operate(a.Demote(mode="fast", release=True, checkpoint=False, why="test", timeout_s=20))
            with pytest.raises(OperationFailed, match="is in recovery"):
                await one.operate(a.Rewind(source=as_source(two), why="test"))
            assert one.standby_signal
    trio.run(main)


def test_slots_are_made_moved_and_dropped_and_repetition_is_no_error(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.quick(a.MaintainSlots(create=("x", "y")))
            await node.quick(a.MaintainSlots(create=("x",), drop=("y", "never_was")))
            (lsn,) = (await node.sql("SELECT pg_switch_wal(); SELECT pg_current_wal_flush_lsn() - '0/0'"))[0]
            await node.quick(a.MaintainSlots(advance=(("x", int(lsn)), ("never_was", 1))))
            await node.until(lambda: node.observer.facts.row is not None and [(s.name, s.restart_lsn) for s in node.observer.facts.row.slots] == [("x", int(lsn))])
    trio.run(main)


def test_a_slot_of_a_standby_that_has_gone_elsewhere_holds_back_vacuum_until_it_is_made_anew(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two, bed.node("c", parameters={"hot_standby_feedback": "on"}) as three:
            await one.primary()
            await two.standby_of(one)
            await three.standby_of(one)

            def slot():
                row = two.observer.facts.row
                return next((s for s in row.slots if s.name == "c"), None) if row is not None else None

            await two.quick(a.MaintainSlots(create=("c",)))
            await two.until(lambda: slot() is not None)
            assert (slot().active, slot().holds_back_vacuum) == (False, False)
            assert slot().restart_lsn > 0, "it keeps WAL from its beginning on, on a standby, too"
            await three.quick(a.Follow(upstream=as_source(two), slot_name="c"))
            await two.until(lambda: slot().active and slot().holds_back_vacuum)
            await three.quick(a.Follow(upstream=as_source(one)))
            await two.until(lambda: not slot().active)
            assert slot().holds_back_vacuum, "PostgreSQL keeps the last feedback of who has gone"
            await one.sql("SELECT pg_switch_wal(); CREATE TABLE t ()")
            (lsn,) = (await one.sql("SELECT pg_current_wal_flush_lsn() - '0/0'"))[0]
            await two.until(lambda: two.observer.facts.row.replayed_lsn >= int(lsn))
            before = slot()
            await two.quick(a.MaintainSlots(advance=(("c", 1 << 60),)))       # no further than it has replayed
            await two.until(lambda: slot().restart_lsn > before.restart_lsn)
            assert int(lsn) <= slot().restart_lsn <= two.observer.facts.row.replayed_lsn
            await two.quick(a.MaintainSlots(create=("c",), drop=("c",)))
            await two.until(lambda: slot() is not None and not slot().holds_back_vacuum)
            assert slot().restart_lsn > 0
    trio.run(main)


def test_changed_configuration_is_applied_and_what_waits_for_a_restart_is_told(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.until(lambda: node.observer.facts.is_primary)
            assert node.observer.facts.row.pending_restart == {}
            node.dynamic["postgresql"]["parameters"] = {"max_connections": 77, "work_mem": "7MB"}
            await node.quick(a.ApplyConfiguration())
            await node.until(lambda: node.observer.facts.row.pending_restart == {"max_connections": ("100", "77")})
            with trio.fail_after(5):
                while (await node.sql("SHOW work_mem")) != [("7MB",)]:
                    await trio.sleep(0.02)
            assert (await node.sql("SHOW wal_retrieve_retry_interval")) == [("500ms",)]
            await node.operate(a.Restart(as_primary=True, timeout_s=20))
            await node.until(lambda: node.observer.facts.row is not None and node.observer.facts.row.pending_restart == {})
            assert (await node.sql("SHOW max_connections")) == [("77",)]
    trio.run(main)


def test_a_value_that_postgresql_refuses_is_left_out_and_keeps_nothing_from_starting(bed, caplog):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            nonsense = {"parameters": {"work_mem": "7 parsecs", "wrok_mem": 1, "max_connections": 9999999, "timezone": "Mars", "maintenance_work_mem": "9MB",
                                       "plpgsql.nonsense": "x"}, "recovery_conf": {"recovery_min_apply_delay": "soon", "archive_cleanup_command": "true"}}
            for node in (one, two):
                node.dynamic["postgresql"] |= nonsense
                await node.quick(a.ApplyConfiguration())
                assert node.wanted.left_out.keys() == {"work_mem", "wrok_mem", "max_connections", "timezone", "recovery_min_apply_delay"}
                assert node.wanted.left_out["max_connections"] == '9999999 is outside the valid range for parameter "max_connections" (1 .. 262143)'
                await node.until(lambda node=node: node.observer.facts.row.pending_restart == {})
                with trio.fail_after(5):
                    while (await node.sql("SHOW maintenance_work_mem")) != [("9MB",)]:
                        await trio.sleep(0.02)
            # An agent that has just begun has asked nothing yet: PostgreSQL starts all the same.
            for node in (one, two):
                node.wanted.leave_out({}, {})
            await one.operate(a.Restart(as_primary=True, timeout_s=20))
            await two.operate(a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))
            for node in (one, two):
                assert (await node.sql("SHOW max_connections")) == [("100",)]
                assert (await node.sql("SHOW archive_cleanup_command")) == [("true",)]
            one.dynamic["postgresql"]["parameters"] = {"work_mem": "7MB"}
            one.dynamic["postgresql"]["recovery_conf"] = {}
            await one.quick(a.ApplyConfiguration())
            assert one.wanted.left_out == {}
    trio.run(main)
    said = [record for record in caplog.records if record.getMessage() == "PostgreSQL does not take a setting: it is left out"]
    assert len(said) == 2 * 2 * 5      # each node's each setting, by each agent


def test_a_standby_that_has_less_than_its_primary_stops_replaying_and_a_restart_helps(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            for node in (one, two):
                node.dynamic["postgresql"]["parameters"] = {"max_connections": 150}
                await node.quick(a.ApplyConfiguration())
            await one.operate(a.Restart(as_primary=True, timeout_s=20))     # the wrong order
            await two.until(lambda: two.observer.facts.row is not None and two.observer.facts.row.replay_paused)
            row = two.observer.facts.row
            control = (await two.reader.read_facts(running=True, timeline=row.timeline, fresh=True)).control
            assert (row.limits["max_connections"], control.limits["max_connections"]) == (100, 150)
            assert row.limits.keys() == control.limits.keys()
            await two.operate(a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))
            await two.until(lambda: two.observer.facts.row is not None and two.observer.facts.row.limits["max_connections"] == 150 and not two.observer.facts.row.replay_paused)
            await one.sql("CREATE TABLE replayed (x int)")
            with trio.fail_after(10):
                while (await two.sql("SELECT to_regclass('replayed')")) == [(None,)]:
                    await trio.sleep(0.02)
    trio.run(main)


def test_settings_that_postgresql_does_not_start_with_do_not_keep_it_down(bed, caplog):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            node = one
            await one.primary()
            await two.standby_of(one)
            for member in (one, two):
                # each is possible, both together are not; and the program that looks at values does not notice
                member.dynamic["postgresql"]["parameters"] = {"superuser_reserved_connections": 200, "max_connections": 150, "work_mem": "9MB"}
                await member.quick(a.ApplyConfiguration())
                assert member.wanted.left_out == {}
            pending = {"superuser_reserved_connections": ("3", "200"), "max_connections": ("100", "150")}
            await node.until(lambda: node.observer.facts.row.pending_restart == pending)
            with pytest.raises(PostgresError, match="must be less than max_connections"):
                await one.operate(a.Restart(as_primary=True, timeout_s=20))
            assert not one.living()
            assert one.standby_signal
            assert one.wanted.left_out["superuser_reserved_connections"].startswith("PostgreSQL did not start with it: ")
            await one.operate(a.StartPrimary(timeout_s=20))      # what the next pass decides
            assert (await one.sql("SELECT current_setting('max_connections'), current_setting('superuser_reserved_connections')")) == [("100", "3")]
            await node.until(lambda: node.observer.facts.row is not None and node.observer.facts.row.pending_restart == pending)
            # the operator's restart tries what is configured again; what failed once more falls back once more, also of another agent
            with pytest.raises(PostgresError, match="must be less than max_connections"):
                await two.operate(a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))
            await two.operate(a.StartStandby(upstream=as_source(one)))
            assert (await two.sql("SHOW superuser_reserved_connections")) == [("3",)]
            for member in (one, two):
                member.dynamic["postgresql"]["parameters"] = {"superuser_reserved_connections": 10, "max_connections": 150}
                await member.quick(a.ApplyConfiguration())
                assert member.wanted.left_out == {}
            await two.operate(a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))
            await one.operate(a.Restart(as_primary=True, timeout_s=20))
            assert (await one.sql("SELECT current_setting('max_connections'), current_setting('superuser_reserved_connections')")) == [("150", "10")]
    trio.run(main)
    assert sum(record.getMessage().startswith("PostgreSQL did not start with changed settings") for record in caplog.records) == 2


def test_what_postgresql_started_with_outlives_the_agent_and_is_no_help_when_it_is_something_else(bed, caplog):
    from pgha.act.wanted import Wanted

    async def main():
        async with bed.node("a") as node:
            def wanted():
                return Wanted(effective=node.wanted.effective, passfile=node.directory / "pgpass", started_file=node.directory / "started_with.json")

            node.dynamic["postgresql"]["parameters"] = {"work_mem": "5MB"}
            first = wanted()
            first.did_not_start("never started")        # nothing is known that is better
            assert first.prepared().file["work_mem"] == "5MB"
            first.note_started()
            node.dynamic["postgresql"]["parameters"] = {"work_mem": "6MB", "max_connections": 200, "archive_command": "KEY=topsecret wal-g"}
            second = wanted()
            second.did_not_start("LOG:  x\nFATAL:  no memory\nLOG:  shut down\n")
            assert (second.prepared().file["work_mem"], second.command_line(None)["max_connections"]) == ("5MB", "100")
            assert second.left_out == dict.fromkeys(("work_mem", "max_connections", "archive_command"), "PostgreSQL did not start with it: FATAL:  no memory")
            told = next(record for record in caplog.records if record.getMessage().startswith("PostgreSQL did not start with changed settings"))
            assert told.facts["changed"].startswith("archive_command, max_connections: ")
            assert second.settings()["work_mem"] == "6MB", "what is configured waits for a restart"
            second.did_not_start("again")               # so it was not the settings
            assert second.prepared().file["work_mem"] == "6MB"
            assert second.left_out == {}
            (node.directory / "started_with.json").write_text("[1")
            assert wanted().prepared().file["work_mem"] == "6MB"
    trio.run(main)


def test_custom_conf_is_included_in_place_of_the_former_postgresql_conf(bed):
    async def main():
        async with bed.node("a") as node:
            own = node.directory / "own.conf"
            own.write_text("work_mem = '11MB'\n")
            node.dynamic["postgresql"]["custom_conf"] = str(own)
            await node.primary()
            assert (await node.sql("SHOW work_mem")) == [("11MB",)]
            assert (node.data_dir / "postgresql.base.conf").exists()
            own.unlink()        # a file that is missing keeps nothing from starting
            await node.operate(a.Restart(as_primary=True, timeout_s=20))
            assert (await node.sql("SHOW work_mem")) == [("4MB",)]
    trio.run(main)


def test_a_change_is_judged_by_the_server_and_without_one_by_its_program(bed):
    def change(**parameters):
        return {"ttl": 30, "postgresql": {"parameters": parameters}}

    async def main():
        async with bed.node("a", parameters={"log_min_messages": "warning", "archive_command": "KEY=topsecret wal-g"}) as node:
            await node.primary()
            await node.sql("ALTER SYSTEM SET effective_cache_size = '1GB'")
            await node.sql("ALTER SYSTEM SET ssl_passphrase_command = 'echo topsecret'")
            old = change(autovacuum_naptime="never", work_mem="4MB")     # what was wrong before is not held against the change
            new = change(autovacuum_naptime="never", work_mem="4 parsecs", wrok_mem=1, max_connections=9999999, timezone="Mars", log_min_messages="error",
                         effective_cache_size="2GB", shared_buffers="16MB", **{"pg_stat_statements.max": "x", "plpgsql.variable_conflict": "sometimes"})
            where = "/config: postgresql.parameters."
            judged = await node.actor.judge_configuration(old, new)
            assert (judged.asked, judged.version) == ("server", 15)
            assert judged.problems == (
                f'{where}max_connections: is "9999999", out of range; allowed: a number from 1 to 262143',
                f'{where}timezone: PostgreSQL 15 refuses it: invalid value for parameter "TimeZone": "Mars"',
                f'{where}work_mem: is "4 parsecs", which is no number of this kind; allowed: a number from 64 to 2147483647, in kB or with a unit (B, kB, MB, GB, TB)',
                f"{where}wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?")
            assert judged.warnings[0] == f'{where}log_min_messages: a\'s own file sets it to "warning", which wins there'
            assert judged.warnings[1] == f'{where}shared_buffers: a\'s own file sets it to "8MB", which wins there'
            assert judged.warnings[2].startswith(f"{where}effective_cache_size: ALTER SYSTEM has set it to 1GB, which wins over the configuration's 2GB")
            assert judged.warnings[3].startswith(f'{where}autovacuum_naptime: is "never", which is no number')
            assert judged.warnings[3].endswith("; it is left out, as before")
            assert judged.restart == {}      # this node's own file says 8MB
            secretive = await node.actor.judge_configuration(change(), change(archive_command="true", ssl_passphrase_command="true", wal_buffers="1e999999999GB"))
            assert secretive.warnings == (
                f"{where}archive_command: a's own file sets it, which wins there",
                f"{where}ssl_passphrase_command: ALTER SYSTEM has set it to something else, which wins over the configuration on this member; allowed: ALTER SYSTEM RESET ssl_passphrase_command")
            assert [problem.partition(";")[0] for problem in secretive.problems] == [f'{where}wal_buffers: is "1e999999999GB", which is no number of this kind']
            good = await node.actor.judge_configuration(change(), change(max_connections=90, max_worker_processes=8, work_mem="5MB"))
            assert (good.problems, good.restart) == ((), {"max_connections": ("100", "90")})
            recovery = await node.actor.judge_configuration({}, {"postgresql": {"recovery_conf": {"recovery_min_apply_delay": "soon"}}})
            assert recovery.problems[0].startswith('/config: postgresql.recovery_conf.recovery_min_apply_delay: is "soon", which is no number')
            assert (await node.actor.judge_configuration(old, old | {"ttl": "x", "pause": True})).asked == "", "PostgreSQL has no say in it"
            await node.operate(a.Demote(mode="fast", release=True, checkpoint=False, why="test", timeout_s=20))
            without = await node.actor.judge_configuration(old, new)
            assert (without.asked, without.version, without.restart) == ("program", 15, {})
            assert [problem.split(": ")[1] for problem in without.problems] == [problem.split(": ")[1] for problem in judged.problems]
            node.server.bin_dir = "/nowhere"
            blind = await node.actor.judge_configuration(old, new | {"tll": 5})
            assert (blind.asked, blind.problems) == ("", ("/config: tll: unknown key; did you mean ttl?",))
            assert blind.warnings[0].startswith("PostgreSQL's parameters could not be checked on a: cannot start /nowhere/postgres")
    trio.run(main)


def test_a_report_that_fails_is_made_later(bed):
    """What waits for a restart is told although PostgreSQL did not answer when it was asked; and its probes go on meanwhile."""
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.until(lambda: node.observer.facts.is_primary)
            with closing(await node.machine.connect(node.wanted.local_conninfo(), deadline_s=5)) as locks:
                await locks.query("BEGIN", deadline_s=5)
                await locks.query("LOCK TABLE pg_catalog.pg_settings IN ACCESS EXCLUSIVE MODE", deadline_s=5)
                await node.sql("ALTER SYSTEM SET max_files_per_process = 1100")
                await node.sql("SELECT pg_reload_conf()")
                await node.until(lambda: node.observer.facts.answer == "silent")
                await node.until(lambda: node.observer.facts.answer == "sql")
                assert node.observer.facts.row.pending_restart == {}
            await node.until(lambda: node.observer.facts.row.pending_restart == {"max_files_per_process": ("1000", "1100")}, within_s=20)
    trio.run(main)


def test_alter_system_is_noticed_whoever_reloads(bed):
    async def main():
        async with bed.node("a") as node:
            node.dynamic["postgresql"]["parameters"] = {"max_files_per_process": 1000}
            await node.primary()
            await node.until(lambda: node.observer.facts.is_primary)
            await node.sql("ALTER SYSTEM SET max_files_per_process = 1100")
            await node.sql("ALTER SYSTEM SET max_connections = 99")        # without effect: it stands on the command line
            await node.sql("ALTER SYSTEM SET shared_preload_libraries = 'auto_explain'")
            await node.sql("SELECT pg_reload_conf()")
            await node.until(lambda: node.observer.facts.row.pending_restart == {"max_files_per_process": ("1000", "1100"), "shared_preload_libraries": ("", "auto_explain")})
            await node.sql("ALTER SYSTEM RESET shared_preload_libraries")
            await node.sql("SELECT pg_reload_conf()")
            await node.until(lambda: node.observer.facts.row.pending_restart == {"max_files_per_process": ("1000", "1100")})
            await node.operate(a.Restart(as_primary=True, timeout_s=20))
            await node.until(lambda: node.observer.facts.row is not None and node.observer.facts.row.pending_restart == {})
            assert (await node.sql("SELECT current_setting('max_files_per_process'), current_setting('max_connections')")) == [("1100", "100")]
    trio.run(main)


def test_a_standby_keeps_what_its_primary_has_and_waits_until_that_has_less(bed):
    """Compatibility spec 5.5: the larger of configuration and pg_controldata, and a restart that is pending until then."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            for node in (one, two):
                node.dynamic["postgresql"]["parameters"] = {"max_connections": 60}
                await node.quick(a.ApplyConfiguration())
                await node.until(lambda node=node: node.observer.facts.row.pending_restart == {"max_connections": ("100", "60")})
            await two.operate(a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))
            await two.until(lambda: two.observer.facts.row is not None and two.observer.facts.row.pending_restart == {"max_connections": ("100", "60")})
            await one.operate(a.Restart(as_primary=True, timeout_s=20))
            await one.until(lambda: one.observer.facts.row is not None and one.observer.facts.row.pending_restart == {})
            await two.until(lambda: two.observer.facts.row is not None and two.observer.facts.row.receiver is not None
                            and two.observer.facts.row.replayed_lsn >= one.observer.facts.row.lsn)
            await two.operate(a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))
            await two.until(lambda: two.observer.facts.row is not None and two.observer.facts.row.pending_restart == {})
            assert (await two.sql("SHOW max_connections")) == [("60",)]
    trio.run(main)


def test_restarted_agent_keeps_following_until_it_is_told_otherwise(bed):
    from pgha.act.wanted import Wanted

    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            again = Wanted(effective=two.wanted.effective, passfile=two.directory / "pgpass")
            assert again.recovery()["primary_conninfo"] == two.wanted.recovery()["primary_conninfo"] != ""
            assert not again.write_running()
    trio.run(main)


def test_hung_server_is_silent_and_the_observer_goes_on(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.until(lambda: node.observer.facts.is_primary)
            backends = [p.pid for p in node.living()]
            for pid in backends:
                os.kill(pid, signal.SIGSTOP)
            before = node.observer.facts.answered_at
            await node.until(lambda: node.observer.facts.answer == "silent", within_s=5)
            assert node.observer.facts.process == "running" and node.observer.facts.row is not None
            assert node.observer.facts.answered_at.boot_ns - before.boot_ns < 1e9
            for pid in backends:
                os.kill(pid, signal.SIGCONT)
            await node.until(lambda: node.observer.facts.answer == "sql", within_s=5)
            # only the session hangs: the postmaster still answers, which is a sign of life
            node.observer.hurry(5)
            postmaster = read_postmaster_pid(node.data_dir).pid

            def sessions_hang_and_it_is_seen():
                for pid in [p.pid for p in node.living() if p.pid != postmaster]:      # also one that was forked meanwhile
                    os.kill(pid, signal.SIGSTOP)
                return node.observer.facts.answer == "silent"
            await node.until(sessions_hang_and_it_is_seen, within_s=5)
            first = node.observer.facts.answered_at
            await node.until(lambda: node.observer.facts.answered_at.boot_ns > first.boot_ns, within_s=5)
    trio.run(main)


def test_children_that_outlive_their_postmaster_are_killed(bed):
    async def main():
        async with bed.node("b") as node:
            await node.primary()
            pid = read_postmaster_pid(node.data_dir).pid
            await node.until(lambda: node.observer.facts.is_primary)
            for proc in (p for p in node.living() if p.pid != pid):     # stopped, they do not notice their postmaster's death
                os.kill(proc.pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGKILL)
            await node.until(lambda: node.observer.facts.process == "absent")
            with trio.fail_after(3):
                while recipe.processes_of(node.procs):
                    await trio.sleep(0.01)
    trio.run(main)


def test_start_of_a_standby_whose_upstream_is_away_succeeds(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            await one.operate(a.Demote(mode="fast", release=True, checkpoint=False, why="test", timeout_s=20))
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(lambda: two.observer.facts.answer in ("sql", "starting"))
            with pytest.raises(PostgresUnreachable):
                await two.operate(a.InspectUpstream(source=as_source(one)))
            await two.operate(a.Stop(why="test", timeout_s=10))
            assert not two.living() and (await two.reader.read_facts(running=False)).standby_signal
    trio.run(main)


def test_half_rewound_directory_is_not_started(bed):
    from pgha.postgres import pg_rewind

    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            pg_rewind.marker(two.data_dir).write_text("")
            with pytest.raises(OperationFailed, match="rewind .* was interrupted"):
                await two.operate(a.StartStandby(upstream=as_source(one)))
            facts = await two.reader.read_facts(running=False)
            assert facts.rewind_interrupted and "interrupted" in facts.why
            with pytest.raises(OperationFailed, match="cut off") as caught:
                await two.operate(a.Rewind(source=as_source(one), why="test"))
            assert caught.value.final and two.standby_signal
            await two.clone_of(one, replace="keep_old_until_streaming")
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
    trio.run(main)


def test_standby_signal_comes_back_to_a_directory_at_rest_only(bed):
    async def main():
        async with bed.node("a") as node:
            assert not await node.actor.be_standby_at_rest()    # nothing there
            assert not node.data_dir.exists()
            await node.operate(a.Bootstrap())
            assert not await node.actor.be_standby_at_rest()
            (node.data_dir / "standby.signal").unlink()
            assert await node.actor.be_standby_at_rest() and node.standby_signal
            view = await node.view()
            await node.take_lock(initialize_revision=view.revision_of("initialize"), initialize_value=(await node.control()).system_identifier)
            await node.operate(a.StartPrimary(timeout_s=30, first_start=True))
            (node.data_dir / "standby.signal").unlink()
            assert not await node.actor.be_standby_at_rest() and not node.standby_signal    # the agent's own business
    trio.run(main)


def test_shutdown_does_not_wait_for_a_standby_that_hangs(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            for proc in two.living():
                os.kill(proc.pid, signal.SIGSTOP)
            await one.sql("CREATE TABLE t AS SELECT generate_series(1, 300000) n")   # more than a socket's buffers hold
            began_s = trio.current_time()
            facts = await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=60))
            print(facts)
            assert facts["clean"] and facts["stop_s"] < 4 and trio.current_time() - began_s < 8
    trio.run(main)


def test_another_server_on_our_port_is_not_taken_for_ours(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            two.port = one.port
            two.local = replace(two.local, postgresql=replace(two.local.postgresql, listen=one.local.postgresql.listen))
            # b cannot bind a's port, but its socket directory is its own: it runs, and TCP leads to a
            files.create_standby_signal(two.data_dir)
            await two.fence.standby()
            said = await steps.control(two.ctx)
            two.wanted.write_stopped(said)
            line = {**two.wanted.command_line(said), "listen_addresses": ""}
            server = await two.server.start(line)
            await two.server.wait_ready(server, deadline_s=10)
            server.close()
            await two.until(lambda: "another server" in two.observer.facts.why)
            assert two.observer.facts.row is None and two.observer.facts.answer == "refused"
            with pytest.raises(OperationFailed, match="another server"):
                await two.quick(a.MaintainSlots(create=("x",)))
    trio.run(main)


def test_restore_command_of_the_parameters_counts_except_while_frozen(bed):
    async def main():
        async with bed.node("a", parameters={"restore_command": "false"}) as node:
            assert "restore_command" not in node.wanted.recovery()
            assert node.wanted.settings()["restore_command"] == "false"
            node.wanted.freeze()
            assert node.wanted.recovery()["restore_command"] == ""
    trio.run(main)

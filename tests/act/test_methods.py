"""Copies and clusters made by the operator's programs, with real PostgreSQL: the next method after a failure, what is left
behind by one that fails or is cut off, and that nothing of before is lost."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import pytest
import trio
from act_bed import as_source, shared
from msgspec.structs import replace as but
from test_bootstrap_clone import cancelled_at

from pgha.config.programs import BootstrapMethod, ReplicaMethod
from pgha.dcs import Delete
from pgha.errors import OperationFailed
from pgha.model import action as a
from pgha.postgres import directories
from pgha.postgres.processes import living_processes

PG_BASEBACKUP = shared.BIN / "pg_basebackup"


def program(path, text):
    """A script of the operator's; "$datadir", "$connstring", "$role" … hold what it was given."""
    path.write_text('#!/bin/bash\nset -eu\nfor argument; do [[ $argument == --*=* ]] && declare "${argument:2}"; done\n' + text)
    path.chmod(0o755)
    return str(path)


def methods(**tables):
    return {"create_replica_methods": list(tables), **{name: table for name, table in tables.items() if name != "basebackup"}}


COPY = f'{PG_BASEBACKUP} -D "$datadir" -d "$connstring" -X fetch -c fast -w\n'


async def clone(node, source, names, **more):
    identifier = (await source.control()).system_identifier
    return await node.operate(a.Clone(source=as_source(source) if more.pop("with_source", True) else None, system_identifier=identifier, methods=tuple(names), why="test", **more))


def test_a_method_fills_a_fresh_directory_and_the_next_one_follows_a_failure(bed):
    said = bed.path / "said"
    walg = program(bed.path / "walg", f'echo "$role $scope $level $connstring $(env | grep -c PGHA_) $PGPASSFILE" >> {said}\n[ ! -e {bed.path}/broken ]\n' + COPY
                   + 'touch "$datadir/recovery.signal"; echo "restore_command = \'false\'" >> "$datadir/postgresql.auto.conf"; chmod 755 "$datadir"; sleep 1000 &\n')

    async def main():
        replication = {"username": "rep", "password": "re:p", "sslmode": "disable", "sslrootcert": "/no where/a&b=%2F", "gssencmode": "disable"}
        users = {"superuser": {"username": "postgres", "password": "sup's er"}, "rewind": {"username": "rew", "password": "re\\w"}, "replication": replication}
        options = {**methods(walg={"command": walg, "level": 3}, basebackup=None), "authentication": users, "krbsrvname": "pg"}
        query = "sslmode=disable&sslrootcert=/no%20where/a%26b%3D%252F&gssencmode=disable&krbsrvname=pg"
        async with bed.node("a") as one, bed.node("b", postgresql=options) as two:
            await one.primary()
            (bed.path / "broken").touch()
            facts = await clone(two, one, ["walg", "basebackup"])
            assert facts["method"] == "basebackup"
            (bed.path / "broken").unlink()
            (two.data_dir / "of_the_old").touch()
            facts = await clone(two, one, ["walg", "basebackup"], replace="keep_old_until_streaming")
            assert facts["method"] == "walg" and (Path(facts["old"]) / "of_the_old").exists()
            assert said.read_text().splitlines() == [f"replica bed 3 postgres://rep@127.0.0.1:{one.port}/postgres?{query} 0 {two.directory}/pgpass"] * 2
            assert two.standby_signal and not (two.data_dir / "recovery.signal").exists() and stat.S_IMODE(two.data_dir.stat().st_mode) == 0o700
            assert await two.guard_state() == "standby"
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
            assert await two.actor.discard_old() == [facts["old"]]
            await two.operate(a.Stop(why="test", timeout_s=20))
            with pytest.raises(OperationFailed, match="none of"):
                await clone(two, one, ["nothing"], replace="keep_old_until_streaming")
    trio.run(main)


def test_a_method_that_brings_another_clusters_data_has_failed(bed):
    async def main():
        async with bed.node("a") as one, bed.node("c") as other:
            await one.primary()
            bed.world.transact([], [Delete(key=one.keys.path("initialize"))])
            await other.operate(a.Bootstrap())
            wrong = program(bed.path / "wrong", f'cp -a {other.data_dir} "$datadir"\n')
            half = program(bed.path / "half", 'mkdir -p "$datadir/global"; touch "$datadir/PG_VERSION"\n')
            async with bed.node("b", postgresql=methods(wrong={"command": wrong}, half={"command": half})) as two:
                with pytest.raises(OperationFailed, match=r"the copy by wrong has system identifier \d+, expected \d+; half has left a data directory that is partial"):
                    await clone(two, one, ["wrong", "half"])
                assert not two.data_dir.exists() and not directories.clone_directory(two.data_dir).exists()
    trio.run(main)


def test_without_a_source_only_those_that_need_none(bed):
    async def main():
        async with bed.node("a") as one:
            await one.primary()
            await one.operate(a.Stop(why="test", timeout_s=20))
            backup = program(bed.path / "backup", f'[ -z "$connstring" ]\ncp -a {one.data_dir} "$datadir"\n')
            async with bed.node("b", postgresql=methods(live={"command": "/bin/false"}, backup={"command": backup, "no_leader": True}, basebackup=None)) as two:
                facts = await clone(two, one, ["live", "backup", "basebackup"], with_source=False)
                assert facts["method"] == "backup"
                await two.operate(a.StartStandby(upstream=None))
                assert await two.sql("SELECT pg_is_in_recovery()") == [("t",)]
                await two.operate(a.Stop(why="test", timeout_s=20))
                with pytest.raises(OperationFailed, match="without a source"):
                    await clone(two, one, ["live", "basebackup"], with_source=False, replace="keep_old_until_streaming")
    trio.run(main)


# --- in place ------------------------------------------------------------------------------------------------------------

def place(bed, node, source, text, **flags):
    """A method that cannot be told where to write, or works on what is there: `node` is where it writes."""
    script = program(bed.path / "place", f"datadir={node.data_dir}; connstring=postgres://rep@127.0.0.1:{source.port}/postgres\n" + text)
    node.local = but(node.local, postgresql=but(node.local.postgresql, methods={"place": ReplicaMethod(command=script, **flags)}))


REFRESH = f'rm -rf "$datadir.tmp"; {PG_BASEBACKUP} -D "$datadir.tmp" -d "$connstring" -X fetch -c fast -w; rm -rf "$datadir"/*; mv "$datadir.tmp"/* "$datadir"; rmdir "$datadir.tmp"\n'


@pytest.mark.parametrize("keeps", [True, False])
def test_a_method_in_place_from_nothing(bed, keeps):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            place(bed, two, one, f"[ -e {bed.path}/go ]; ls -a $datadir > {bed.path}/found; touch $datadir/begun; [ -e {bed.path}/on ]\n" + REFRESH, no_params=True, keep_data=keeps)
            for _ in range(2):
                with pytest.raises(OperationFailed, match="exit code 1"):
                    await clone(two, one, ["place"])
                (bed.path / "go").touch()
            facts = await two.reader.read_facts(running=False)
            if keeps:       # the next one goes on from here; nobody else has to do with it
                assert facts.unfinished_copy and facts.state == "partial" and (two.data_dir / "begun").exists()
                with pytest.raises(OperationFailed, match="was cut off"):
                    await two.operate(a.StartStandby(upstream=as_source(one)))
            else:
                assert facts.state == "empty" and not facts.unfinished_copy
            (bed.path / "on").touch()
            await clone(two, one, ["place"])
            assert ("begun" in (bed.path / "found").read_text().split()) == keeps
            facts = await two.reader.read_facts(running=False)
            assert facts.state == "valid" and not facts.unfinished_copy and two.standby_signal
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
    trio.run(main)


@pytest.mark.parametrize("how", ["fails", "cancelled", "works"])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_method_in_place_of_data_that_is_there(bed, keeps, how):
    """Without keep_data the old data waits beside, and comes back; with it the program has it in its hands."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            (two.data_dir / "of_the_old").touch()
            end = {"fails": "exit 3\n", "cancelled": "sleep 1000\n", "works": REFRESH}[how]
            place(bed, two, one, f"[ -e $datadir/of_the_old ] && touch {bed.path}/seen; touch $datadir/written; mkdir $datadir/base 2>/dev/null || :\n" + end, no_params=True, keep_data=keeps)
            with pytest.raises(OperationFailed, match="only if"):
                await clone(two, one, ["place"])
            if keeps:
                with pytest.raises(OperationFailed, match="place works on the data that is to be kept"):
                    await clone(two, one, ["place"], replace="keep_old_until_streaming")
                assert not (bed.path / "seen").exists() and (await two.reader.read_facts(running=False)).state == "valid"
            asked = a.Clone(source=as_source(one), system_identifier=(await one.control()).system_identifier, methods=("place",), replace="remove_first", why="test")
            old = two.data_dir.with_name("data.old")
            if how == "works":
                facts = await two.operate(asked)
                assert facts["old"] == ("" if keeps else str(old)) and old.exists() == (not keeps)
                await two.operate(a.StartStandby(upstream=as_source(one)))
                await two.until(two.streaming)
                await two.actor.discard_old()
            elif how == "fails":
                with pytest.raises(OperationFailed, match="exit code 3"):
                    await two.operate(asked)
            else:
                await cancelled_at(two, asked, "place runs")
            assert (bed.path / "seen").exists() == keeps or how == "cancelled"
            assert not living_processes(two.data_dir) or how == "works"
            if how != "works":
                facts = await two.reader.read_facts(running=False)
                assert not old.exists() and (two.data_dir / "of_the_old").exists()
                assert facts.unfinished_copy == keeps
                if not keeps:
                    assert facts.state == "valid" and not (two.data_dir / "written").exists() and not (two.data_dir / directories.REPLACED).exists()
                # whatever was overwritten is kept until something better streams
                facts = await clone(two, one, ["basebackup"], replace="nothing_there" if keeps else "keep_old_until_streaming")
                assert (Path(facts["old"]) / "of_the_old").exists()
            assert not old.exists() or how != "works"
    trio.run(main)


def in_place(bed, node, **texts):
    """Methods that write to `node`'s directory, by name: what a keep_data one does, or (the last) any other."""
    *keeping, last = texts
    node.local = but(node.local, postgresql=but(node.local.postgresql, methods={
        name: ReplicaMethod(command=program(bed.path / name, f"datadir={node.data_dir}\n{text}"), no_params=True, no_leader=True, keep_data=name in keeping)
        for name, text in texts.items()}))
    return (*keeping, last)


def test_torn_data_stays_marked_whatever_fails_after(bed):
    """A method overwrites part of the data and fails; another one moves that out of its way, and fails."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            names = in_place(bed, two, delta='echo torn > "$datadir/base/1/1259"; exit 1\n', other='[ ! -e "$datadir/base" ]; mkdir "$datadir/begun"; exit 2\n')
            with pytest.raises(OperationFailed, match="exit code 1; other: exit code 2"):
                await clone(two, one, names, replace="remove_first")
            facts = await two.reader.read_facts(running=False, fresh=True)
            assert facts.unfinished_copy and not facts.abandoned_bootstrap and directories.bootstrapping(two.data_dir) == "copying over"
            assert (two.data_dir / "base/1/1259").read_text() == "torn\n" and [p.name for p in two.data_dir.parent.glob("data.*") if p.is_dir()] == []
            with pytest.raises(OperationFailed, match="was cut off"):
                await two.operate(a.StartStandby(upstream=as_source(one)))
    trio.run(main)


@pytest.mark.parametrize("next_one", ["leaderless", "basebackup", "abandon"])
def test_a_killed_agents_copy_in_place_costs_nothing(bed, next_one):
    """The data waits beside, half a copy is in its place: the next agent brings it back before it does anything else."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            (two.data_dir / "of_the_old").touch()
            names = in_place(bed, two, other="exit 2\n")
            directories.move_to_old(two.data_dir, "replaced by a copy that other makes")
            facts = await two.reader.read_facts(running=False)
            assert (facts.state, facts.abandoned_bootstrap, facts.unfinished_copy) == ("missing", True, True)
            (two.data_dir / "global").mkdir(parents=True)
            facts = await two.reader.read_facts(running=False)
            assert (facts.state, facts.abandoned_bootstrap, facts.unfinished_copy) == ("partial", True, True)
            if next_one == "abandon":
                assert await two.operate(a.AbandonDirectory(why="test")) == {"kept_as": ""}
            else:
                with pytest.raises(OperationFailed, match="has been brought back"):
                    await clone(two, one, names if next_one == "leaderless" else ["basebackup"], with_source=next_one == "basebackup")
            facts = await two.reader.read_facts(running=False)
            assert (facts.state, facts.abandoned_bootstrap, facts.unfinished_copy) == ("valid", False, False)
            assert (two.data_dir / "of_the_old").exists() and (two.data_dir.with_name("data.failed") / "global").exists()
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
            assert await two.actor.discard_old() == []
    trio.run(main)


def test_what_people_put_into_a_marked_directory_is_kept(bed):
    """A copy made of nothing was cut off, and somebody has put data there since: it is out of the way, not gone."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            names = in_place(bed, two, other="exit 2\n")
            directories.note_bootstrap(two.data_dir, "copying")
            (two.data_dir / "of_people").touch()
            with pytest.raises(OperationFailed, match="exit code 2"):
                await clone(two, one, names, with_source=False)
            assert (two.data_dir.with_name("data.failed") / "of_people").exists()
            assert directories.content(two.data_dir) == "empty" and directories.bootstrapping(two.data_dir) == ""
    trio.run(main)


def test_half_a_copy_is_cleared_away_by_the_operation_that_made_it(bed):
    """From nothing: what one method leaves to the next does not pile up beside the directory."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            names = in_place(bed, two, delta='touch "$datadir/begun"; exit 1\n', other='[ ! -e "$datadir/begun" ]; touch "$datadir/half"; exit 2\n')
            with pytest.raises(OperationFailed, match="exit code 1; other: exit code 2"):
                await clone(two, one, names)
            assert (await clone(two, one, [*names, "basebackup"]))["method"] == "basebackup"
            assert sorted(p.name for p in two.data_dir.parent.iterdir() if p.name.startswith("data.")) == []
    trio.run(main)


def test_what_a_killed_agents_method_has_left_is_killed_before_the_next(bed):
    """Its processes go on when the agent is killed; the next agent knows them by their environment."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            mark = {**os.environ, "COPIES_INTO_OF_PGHA": str(two.data_dir)}
            async with trio.open_nursery() as nursery:
                left = await nursery.start(partial(trio.run_process, ["sleep", "1000"], env=mark, check=False))
                directories.note_bootstrap(two.data_dir, "copying")
                two.data_dir.mkdir()
                (two.data_dir / "PG_VERSION").touch()
                facts = await clone(two, one, ["basebackup"])
                await left.wait()
                assert left.returncode == -9 and facts["old"] == ""
            assert (two.data_dir.with_name("data.failed") / "PG_VERSION").exists()      # somebody may have put it there since
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
    trio.run(main)


# --- a new cluster -------------------------------------------------------------------------------------------------------

def own(node, **method):
    node.local = but(node.local, bootstrap=but(node.local.bootstrap, method="own", methods={"own": BootstrapMethod(**method)}))


@pytest.mark.parametrize("which", ["target", "existing", "as it is"])
def test_a_cluster_from_a_backup(bed, which):
    """Recovered to a target, by settings of ours or of the program's; or opened as it was when it was shut down."""
    async def main():
        archive = bed.path / "archive"
        archive.mkdir()
        logged = {"archive_mode": "on", "archive_command": f"cp %p {archive}/%f", "max_connections": "200"}
        async with bed.node("a", parameters=logged) as one:
            identifier = await one.primary()
            await one.sql("CREATE TABLE t AS SELECT 1 AS n")
            backup = bed.path / "backup"
            await trio.run_process([PG_BASEBACKUP, "-D", backup, "-h", "127.0.0.1", "-p", str(one.port), "-U", "rep", "-X", "none", "-c", "fast"], env={**os.environ, "PGPASSWORD": "re:p"}, capture_stderr=True)
            await one.sql("INSERT INTO t VALUES (2)")
            await one.sql("SELECT pg_create_restore_point('here')")
            await one.sql("INSERT INTO t VALUES (3)")
            await one.sql("SELECT pg_switch_wal()")
            await one.until(lambda: len(list(archive.iterdir())) >= 3)
            await one.sql("ALTER ROLE postgres PASSWORD 'another'")
            await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=20))
            source = one.data_dir if which == "as it is" else backup
            restore = program(bed.path / "restore", f'echo "$scope $times" > {bed.path}/said\ncp -a {source} "$datadir"\nrm -f "$datadir/postmaster.pid"\n')
            if which == "existing":
                program(bed.path / "restore", (bed.path / "restore").read_text().partition("done\n")[2] + f"""\
touch "$datadir/recovery.signal"; echo "restore_command = 'cp {archive}/%f %p'
recovery_target_name = 'here'" >> "$datadir/postgresql.auto.conf"
""")
            async with bed.node("b", bootstrap={"post_bootstrap": f"/bin/sh -c 'psql -qXAtc \"SELECT sum(n) FROM t\" \"$0\" > {bed.path}/sum'"}) as two:
                bed.world.transact([], [Delete(key=two.keys.path(key)) for key in ("initialize", "pgha/lock", "pgha/epoch")])
                conf = {"restore_command": f"cp {archive}/%f %p", "recovery_target_name": "here"} if which == "target" else {}
                own(two, command=restore, arguments=(("times", "1"),), recovery_conf=conf, keep_existing_recovery_conf=which == "existing")
                assert await two.primary() == identifier
                assert (bed.path / "said").read_text() == "bed 1\n"
                wanted = "6" if which == "as it is" else "3"
                assert (bed.path / "sum").read_text().strip() == wanted
                assert await two.sql("SELECT sum(n) FROM t") == [(wanted,)]
                assert await two.sql("SELECT 1", host="127.0.0.1", password="sup's er") == [("1",)]       # the configuration's, again
                assert (await two.control()).timeline == (1 if which == "as it is" else 2)
                assert not (two.data_dir / "recovery.signal").exists()
                assert "recovery_target_name" not in (two.data_dir / "postgresql.auto.conf").read_text()
                assert ("waiting for end of recovery after bootstrap" in two.progress) == (which != "as it is")
                assert all("cp " not in word for word in Path(f"/proc/{two.observer.facts.pid or os.getpid()}/cmdline").read_text().split("\0"))
    trio.run(main)


@pytest.mark.parametrize(("text", "why"), [("echo no such backup >&2; exit 2\n", "own: exit code 2: no such backup"), (":\n", "has left a data directory that is missing")])
def test_a_bootstrap_that_fails_frees_initialize(bed, text, why):
    async def main():
        async with bed.node("a") as node:
            own(node, command=program(bed.path / "restore", text))
            with pytest.raises(OperationFailed, match=why):
                await node.operate(a.Bootstrap())
            assert not node.data_dir.exists() and (await node.view()).initialize is None
    trio.run(main)

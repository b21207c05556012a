"""A member of another make: what a Patroni agent does, as it is seen from outside (compatibility spec 7 to 11). For level (a).

A tick every loop_wait, or as soon as `leader` changes: read the store, then one thing: keep the leader key, follow, race, or
give up. Its promises are weaker than pgha's, and that is what it is here for: no guard, so that a frozen or killed agent
leaves its PostgreSQL running; no votes, no freeze, no claim of a timeline; the key `leader` under its lease is all of its lock.

Modelled: lease-bound member and leader keys under one lease; the leader key adopted by VALUE == name; demotion when the store
is not read, or the key is another's; the race by `GET /patroni` of all others, with lag and `failover_priority`; switchover and
failover by the key `failover`; pause; start in place after a crash; rewind, or a new copy. Left out: synchronous modes and
failsafe mode (worlds with Patroni members have neither), bootstrap (pgha's nodes do that), watchdog devices, cascading.
"""

from __future__ import annotations

import json
from typing import Any

from pgha.dcs import ABSENT, Compare, Delete, Put
from pgha.dcs.keys import Keys
from pgha.errors import CommandFailed, DcsError, LeaseLost, PostgresError
from pgha.model.cluster import ClusterView, Member, slot_name
from pgha.model.observation import Peer
from pgha.model.wal import format_lsn
from tests.simulation import hands, kernel, stepped
from tests.simulation.kernel import Process
from tests.simulation.postgres import Instance, contains
from tests.simulation.world import Host

KEYS = Keys("service", "sim")
ANSWER_S = 2.0
MINIMUM_TTL_S = 20.0


class PatroniProcess:
    """One run of a Patroni agent on a host. What other members and the faults see of an agent, this has, too."""

    decision = None
    seen = None

    def __init__(self, host: Host, *, incarnation: int) -> None:
        world = host.world
        self.host, self.world, self.instance = host, world, host.instance
        self.process = Process(world.scheduler, host.name, failed=self._failed)
        self.process.host = host                        # type: ignore[attr-defined]
        self.process.trace = world.trace                # type: ignore[attr-defined]
        self.clock = host.clock
        self.store: Any = stepped.sources().simulation_store.SimStore(world.store, host.name, first=incarnation + len(host.name))
        self.name = host.name
        self._news = kernel.Event()
        self._lease = 0
        self._lease_ttl_s = 0.0
        self._renewed_at = -1e9
        self._config: dict[str, Any] = {}
        self._shutting_down = False
        self._restarts = 0
        self._view: ClusterView | None = None
        world.trace(host.name, "patroni starts", run=incarnation)
        self.process.spawn(self._run)

    # --- what others see of an agent --------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.process.kill()

    def stop(self) -> None:
        self._shutting_down = True
        self._news.set()

    def request(self, kind: Any, **options: Any) -> None:
        if kind == "restart":
            self._restarts += 1
            self._news.set()

    def failsafe_asked(self, body: bytes, answered: Any) -> None:
        answered("502 failsafe mode is off")

    def vote_asked(self, epoch: int, answered: Any, context: Any, wait_s: float) -> None:
        """It knows no votes: what `GET /patroni` says, as observe/peers.py reads it."""
        answered(context, self._says())

    def _says(self) -> Peer:
        instance, now = self.instance, self.clock.now()
        tags = Member(name=self.name).tags.of(self.host.tags)
        if not instance.answers() or instance.server is None:
            primary = instance.server is not None and instance.server.primary and instance.server.phase != "stopping"
            return Peer(name=self.name, asked_at=now, answered=bool(instance.dir.system_identifier), in_recovery=False if primary else None,
                        system_identifier=instance.dir.system_identifier, tags=tags)
        return Peer(name=self.name, asked_at=now, answered=True, in_recovery=not instance.server.primary, timeline=instance.dir.timeline, lsn=instance.dir.lsn, running=True,
                    tags=tags, system_identifier=instance.dir.system_identifier)

    def _failed(self, process: Process, error: BaseException) -> None:
        self.world.violation("NoTaskFails", f"{self.name} (patroni): {type(error).__name__}: {error}")

    # --- the loop -----------------------------------------------------------------------------------------------------------

    @property
    def _loop_wait_s(self) -> float:
        return float(self._config.get("loop_wait", 10))

    @property
    def _ttl_s(self) -> float:
        return max(MINIMUM_TTL_S, float(self._config.get("ttl", 30)))

    @property
    def _paused(self) -> bool:
        return self._config.get("pause") is True

    async def _run(self) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while not self._shutting_down:
                self._news = kernel.Event()
                began_s = kernel.current_time()
                try:
                    await self._tick()
                except PostgresError as error:
                    self.world.trace(self.name, "patroni: cannot", why=str(error)[:80].replace(" ", "_"))
                with kernel.move_on_after(max(0.1, self._loop_wait_s - (kernel.current_time() - began_s))):
                    await self._news.wait()
            await self._shut_down()
            nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Wakes the loop when `leader` changes."""
        while True:
            try:
                async with self.store.watch(KEYS.path("leader"), after_revision=self.store.generation.revision) as changes:
                    while (await changes.__anext__()) is not None:
                        self._news.set()
            except DcsError:
                pass
            await kernel.sleep(1.0)

    async def _tick(self) -> None:
        try:
            snapshot = await self.store.read(KEYS.root, deadline_s=float(self._config.get("retry_timeout", 10)))
        except DcsError:
            if self._is_primary() and not self._paused:
                await self._demote("offline", None)
            return
        view = self._view = hands.real_parse(snapshot, KEYS)
        if view.config is not None:
            self._config = view.config
        try:
            await self._step(view)
            await self._keep_member(view)
        except LeaseLost:
            self._lease = 0
        except DcsError as error:
            self.world.trace(self.name, "patroni: store", why=str(error)[:60].replace(" ", "_"))
            if self._is_primary() and view.leader == self.name and not self._paused:
                await self._demote("immediate", None)       # its lock could not be renewed

    async def _step(self, view: ClusterView) -> None:
        instance = self.instance
        leader = view.members.get(view.leader) if view.leader != self.name else None
        if view.initialize is None and self._is_primary():
            await self.store.transact(compares=[Compare(key=KEYS.path("initialize"), revision=ABSENT)], deadline_s=3.0,
                                      puts=[Put(key=KEYS.path("initialize"), value=instance.dir.system_identifier.encode())])
            return
        if instance.disk_hung or not view.initialized or instance.dir.content == "partial":
            return
        if instance.dir.content != "valid":
            if leader is not None and leader.role == "primary" and not self._paused:
                await self._copy(leader.name)
            return
        if instance.dir.system_identifier != view.initialize:
            return                                          # a real one ends: its data is another cluster's
        server = instance.server
        if server is None or not server.postmaster_alive:
            if not self._paused:
                await self._start(view, leader)
            elif view.leader == self.name:
                await self._delete_leader(view)
            return
        if server.phase != "ready":
            if view.leader == self.name:
                await self._renew(view)
            return
        if self._restarts:
            self._restarts = 0
            await self._stop_postgres("fast")
            return
        if view.leader == self.name:
            await self._lead(view)
        elif view.leader:
            await self._follow(view, leader)
        else:
            await self._race(view)

    # --- lock ---------------------------------------------------------------------------------------------------------------

    async def _own_lease(self) -> int:
        if self._lease and self._lease_ttl_s == self._ttl_s:
            await self.store.renew(self._lease, deadline_s=3.0)
        else:
            self._lease_ttl_s = self._ttl_s
            self._lease = await self.store.grant(self._ttl_s, deadline_s=3.0)
        self._renewed_at = kernel.current_time()
        return self._lease

    async def _renew(self, view: ClusterView) -> bool:
        """Keep-alive; a key under another lease is adopted if it has this name, or created if it is gone. Whether it is ours."""
        try:
            lease = await self._own_lease()
        except LeaseLost:
            self._lease = 0
            lease = await self._own_lease()
        if view.leader_lease == lease:
            return True
        path, value = KEYS.path("leader"), self.name.encode()
        for compare in (Compare(key=path, value=value), Compare(key=path, revision=ABSENT)):
            outcome = await self.store.transact(compares=[compare], puts=[Put(key=path, value=value, lease=lease)], deadline_s=3.0)
            if outcome.succeeded:
                return True
        return False

    async def _acquire(self) -> bool:
        lease = await self._own_lease()
        path = KEYS.path("leader")
        outcome = await self.store.transact(compares=[Compare(key=path, revision=ABSENT)], puts=[Put(key=path, value=self.name.encode(), lease=lease)], deadline_s=3.0)
        return bool(outcome.succeeded)

    async def _delete_leader(self, view: ClusterView) -> None:
        path = KEYS.path("leader")
        await self.store.transact(compares=[Compare(key=path, value=self.name.encode())], puts=[Delete(key=path)], deadline_s=3.0)

    async def _keep_member(self, view: ClusterView) -> None:
        instance, server = self.instance, self.instance.server
        ready = server is not None and server.phase == "ready" and server.postmaster_alive
        value: dict[str, Any] = {
            "conn_url": f"postgres://{self.name}:5432/postgres", "api_url": f"http://{self.name}:8008/patroni", "version": "4.1.5",
            "state": "running" if ready else "stopped", "role": "primary" if ready and server is not None and server.primary else "replica"}
        if self.host.tags:
            value["tags"] = self.host.tags
        if ready:
            value |= {"xlog_location": instance.dir.lsn, "timeline": instance.dir.timeline}
            if server is not None and server.stream is not None:
                value["replication_state"] = "streaming"
        if self._paused:
            value["pause"] = True
        mine = view.members.get(self.name)
        stale = kernel.current_time() - self._renewed_at >= self._loop_wait_s
        if self._lease == 0 or (stale and view.leader != self.name):
            await self._own_lease()
        if mine is None or mine.raw != value or mine.lease != self._lease:
            await self.store.transact(compares=[], puts=[Put(key=KEYS.member(self.name), value=json.dumps(value).encode(), lease=self._lease)], deadline_s=3.0)

    # --- leading --------------------------------------------------------------------------------------------------------------

    async def _lead(self, view: ClusterView) -> None:
        server, data = self.instance.server, self.instance.dir
        assert server is not None
        if self._paused and not server.primary:
            await self._delete_leader(view)
            return
        if not await self._renew(view):
            if server.primary and not self._paused:
                await self._demote("immediate", None)
            return
        if not server.primary:
            self.instance.request_promotion()
            return
        puts: list[Any] = []
        status = {"optime": data.lsn}
        if view.status.raw != status:
            puts.append(Put(key=KEYS.path("status"), value=json.dumps(status).encode()))
        rows = [[r.timeline, r.switch_lsn, "no recovery target specified"] for r in (data.branch.history() if data.branch is not None else ())]
        if [(e.timeline, e.lsn) for e in view.history or ()] != [(r[0], r[1]) for r in rows] or view.history is None:
            puts.append(Put(key=KEYS.path("history"), value=json.dumps(rows).encode()))
        if puts:
            await self.store.transact(compares=[], puts=puts, deadline_s=3.0)
        for name in view.members:
            if name != self.name:
                self.instance.slots.setdefault(slot_name(name), data.lsn)
        await self._asked_to_hand_over(view)

    async def _asked_to_hand_over(self, view: ClusterView) -> None:
        key = view.failover
        if key.empty or key.scheduled_at:
            return
        possible = key.leader in ("", self.name) and key.candidate != self.name and (bool(key.candidate) or not self._paused)
        if possible:
            wanted = [n for n in view.members if n != self.name and key.candidate in ("", n)]
            answers = [p for p in await self._ask(wanted) if p.answered and p.running and p.in_recovery and not p.tags.nofailover]
            possible = any(self.instance.dir.lsn - p.lsn <= self._maximum_lag for p in answers)
        if not possible:
            await self.store.transact(compares=[Compare(key=KEYS.path("failover"), revision=view.revision_of("failover"))], puts=[Put(key=KEYS.path("failover"), value=b"{}")], deadline_s=3.0)
            return
        await self._demote("graceful", view)

    @property
    def _maximum_lag(self) -> int:
        return int(self._config.get("maximum_lag_on_failover", 1048576))

    async def _demote(self, mode: str, view: ClusterView | None) -> None:
        """offline, graceful: in order; immediate: at once. Only a graceful one gives the key back, after the stop."""
        self.world.trace(self.name, "patroni demotes", mode=mode)
        await self._stop_postgres("fast" if mode in ("offline", "graceful") else "immediate")
        if mode == "graceful" and view is not None and not self.instance.lives:
            await self._delete_leader(view)
            await kernel.sleep(2.0)
        elif mode == "offline" and not self.instance.lives:
            self._be_standby(None)
            self.instance.start()

    async def _stop_postgres(self, mode: str) -> None:
        self.instance.signal("INT" if mode == "fast" else "QUIT")
        for _ in range(3000):
            if not self.instance.lives:
                return
            await kernel.sleep(0.02)

    # --- racing and following ---------------------------------------------------------------------------------------------------

    async def _race(self, view: ClusterView) -> None:
        server, data = self.instance.server, self.instance.dir
        assert server is not None
        if server.primary:
            if not self._paused and data.timeline < view.timeline or not await self._acquire() and not self._paused:
                await self._demote("immediate", None)
            return
        if self._paused or self.host.tags.get("nofailover"):
            return
        key = view.failover
        chosen = key.candidate == self.name and not key.scheduled_at
        others = [n for n in view.members if n != self.name]
        answers = await self._ask(others)
        if not chosen and key.candidate and any(p.name == key.candidate and p.answered and p.running and p.in_recovery and not p.tags.nofailover for p in answers):
            return
        if not chosen and not self._is_healthiest(view, answers):
            return
        if await self._acquire():
            self.world.trace(self.name, "patroni has the key")
            if not key.empty:
                await self.store.transact(compares=[], puts=[Put(key=KEYS.path("failover"), value=b"{}")], deadline_s=3.0)
            self.instance.request_promotion()
            self._news.set()

    def _is_healthiest(self, view: ClusterView, answers: list[Peer]) -> bool:
        data, priority = self.instance.dir, int(self.host.tags.get("failover_priority", 1))
        if view.status.optime - data.lsn > self._maximum_lag or (self._config.get("check_timeline") and data.timeline < view.timeline):
            return False
        for peer in answers:
            if not peer.answered or peer.tags.nofailover or peer.watchdog_failed:
                continue
            if peer.in_recovery is False or peer.lsn > data.lsn or (peer.lsn == data.lsn and peer.tags.failover_priority > priority):
                return False
        return True

    async def _ask(self, names: list[str]) -> list[Peer]:
        """GET api_url of each; who is silent is not among the answers."""
        got: list[Peer] = []
        for name in names:
            self.world.network.send(self.name, name, self._asked, name, got)
        with kernel.move_on_after(ANSWER_S):
            for _ in range(40):
                await kernel.sleep(0.05)
                if len(got) == len(names):
                    break
        return list(got)

    def _asked(self, name: str, got: list[Peer]) -> None:
        peer = self.world.agents.get(name)
        if peer is not None and peer.process.alive:
            peer.process.call(peer.vote_asked, -1, lambda _, answer: self.world.network.send(name, self.name, self._answered, name, answer, got), None, 0.0)

    def _answered(self, name: str, answer: Peer, got: list[Peer]) -> None:
        from msgspec.structs import replace

        got.append(replace(answer, name=name))

    async def _follow(self, view: ClusterView, leader: Member | None) -> None:
        instance, server = self.instance, self.instance.server
        assert server is not None
        if server.primary:
            if not self._paused:
                await self._demote("immediate", None)
            return
        if leader is None or not leader.host:
            return
        if self._paused and server.upstream == leader.name:
            return
        theirs = self.world.instances.get(leader.name)
        if server.stream is None and leader.role == "primary" and theirs is not None and self._diverges(theirs) and self._reaches(theirs) and not self._paused:
            await self._stop_postgres("fast")
            return
        if server.upstream != leader.name:
            instance.conf_upstream, instance.conf_slot = leader.name, slot_name(self.name)
            instance.reload()

    def _reaches(self, theirs: Instance) -> bool:
        return self.world.network.both_ways(self.name, theirs.name) and theirs.answers() and theirs.server is not None and theirs.server.primary

    def _diverges(self, theirs: Instance) -> bool:
        ours = self.instance.dir
        return ours.branch is not None and theirs.dir.branch is not None and not contains(theirs.dir.branch, theirs.dir.lsn, ours.branch, ours.lsn)

    # --- starting -----------------------------------------------------------------------------------------------------------------

    def _be_standby(self, upstream: str | None) -> None:
        instance = self.instance
        if instance.disk_full:
            raise PostgresError("no space left on device")
        instance.dir.standby_signal = True
        instance.conf_upstream, instance.conf_slot = upstream, slot_name(self.name) if upstream else ""

    async def _start(self, view: ClusterView, leader: Member | None) -> None:
        instance, data = self.instance, self.instance.dir
        if instance.lives:
            instance.kill_all()
        if view.leader == self.name:
            if not await self._renew(view):
                return
            if not data.standby_signal and "recovery" not in data.state:
                instance.start()                            # in place, without a new timeline
            else:
                self._be_standby(None)                      # promoted in a later tick
                instance.start()
            return
        theirs = self.world.instances.get(leader.name) if leader is not None else None
        if leader is not None and leader.role != "primary":
            return                                          # it is about to be one
        if theirs is not None and self._reaches(theirs) and self._diverges(theirs):
            await self._rewind_or_copy(leader.name if leader is not None else "", theirs)
            return
        if data.rewind_marker:
            return
        self._be_standby(leader.name if leader is not None else None)
        instance.start()

    async def _rewind_or_copy(self, name: str, theirs: Instance) -> None:
        instance, path = self.instance, hands.ModelDir(self.instance)
        if (self._config.get("postgresql") or {}).get("use_pg_rewind") and instance.dir.wal_log_hints:
            if instance.dir.state not in ("shut down", "shut down in recovery"):
                instance.dir.standby_signal = False
                await hands.ModelServer(instance).single_user_recovery({}, deadline_s=60.0)
            instance.dir.standby_signal = False
            done = await hands.run_rewind(path, "", {"host": name}, hands.control_data(instance.dir), source_timeline=theirs.dir.timeline, deadline_s=60.0)
            if done.outcome == "rewound":
                self._be_standby(name)
                return
            if not done.target_changed and done.outcome != "not_needed":
                return
        await self._copy(name)

    async def _copy(self, name: str) -> None:
        """Deletes first what it has, if there is something: so does a real one."""
        instance = self.instance
        try:
            await hands.base_backup(hands.ModelDir(instance, "clone"), "", {"host": name, "port": 5432}, {}, deadline_s=120.0)
        except CommandFailed:
            instance.clone = None
            raise
        clone = instance.clone
        assert clone is not None
        clone.bootstrap_mark = clone.rewind_marker = ""
        instance.dir, instance.clone, instance.clone_whole = clone, None, False
        self._be_standby(name)
        instance._changed("files")
        self.world.trace(self.name, "patroni has copied", source=name, lsn=format_lsn(clone.lsn))

    # --- the end --------------------------------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        if not self._paused:
            led = self._is_primary()
            await self._stop_postgres("fast")
            if led and not self.instance.lives and self._view is not None:
                try:
                    await self._delete_leader(self._view)
                except DcsError:
                    pass
        self.world.trace(self.name, "patroni ends")
        self.process.kill()
        self.host.note_bare()

    def _is_primary(self) -> bool:
        server = self.instance.server
        return server is not None and server.postmaster_alive and server.primary


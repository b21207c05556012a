"""This node holds the lock, and PostgreSQL runs: promote it, or keep the cluster's books."""

from __future__ import annotations

import json

from msgspec.structs import replace

from pgha.clock import candidate_age_s, remaining_s
from pgha.decide import capacity, failsafe, restart, slots, switchover, synchronous
from pgha.decide.common import (
    NONSENSE_AHEAD,
    ask_others,
    fence_in_s,
    own_history,
    reason,
    stop_timeout_s,
    view_of,
)
from pgha.decide.schedule import Due
from pgha.decide.standing import left_s, licence_left, licensed
from pgha.model.action import (
    Action,
    ApplyConfiguration,
    Demote,
    PrePromote,
    Promote,
    ReadCluster,
    Restart,
    RestoreStandbySignal,
    StandDown,
    WriteInitialize,
    WriteKey,
)
from pgha.model.cluster import HistoryEntry, is_system_identifier
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation
from pgha.model.wal import format_lsn

#: Less than this to the fence, and a promotion is not begun: it would hardly be done before the next renewal matters.
MINIMUM_TO_PROMOTE_S = 1.0
#: A holder whose standby is not being promoted after this long gives the lock back.
PROMOTE_WITHIN_S = 10.0


def decide(o: Observation, memory: Memory) -> Decision | None:
    if not licensed(o):
        return None
    if o.dcs.view is None:
        return Decision(situation="leading", summary="holding the lock, reading the cluster", actions=(ReadCluster(),), memory=memory, wake_in_s=0.2)
    row = o.postgres.row
    if row is None or row.in_recovery:
        memory = memory if memory.holding_since else replace(memory, holding_since=o.now)
        use = lock_is_of_use(o, memory)
        if not use.holds:
            back = Demote(mode="kill", release=True, checkpoint=False, why=use.because, timeout_s=0.0)
            return Decision(situation="leading", summary=f"giving the lock to those who can use it: {use.because}", reasons=(use,), actions=(back,), memory=memory)
        if row is None:
            return Decision(situation="leading", summary=f"holding the lock, PostgreSQL is {o.postgres.process} ({o.postgres.answer})", memory=memory, wake_in_s=0.1,
                            reasons=(use, reason("leading.server_answers", False, o.postgres.why or "no SQL answer yet")))
        return _promote(o, memory)
    if memory.holding_since:
        memory = replace(memory, holding_since=None)
    if switchover.requested(o):
        return _hand_over(o, memory)
    memory = replace(memory, election=None, switchover_asked_at=None) if memory.election or memory.switchover_asked_at else memory
    if view_of(o).failover.scheduled_at:
        return _scheduled(o, memory)
    return _keep_books(o, memory)


# --- becoming primary --------------------------------------------------------------------------------------------------

def _promote(o: Observation, memory: Memory) -> Decision:
    reasons = promotion_conditions(o)
    view, row = view_of(o), o.postgres.row
    assert row is not None
    failed = memory.promotion_failed_at is not None and candidate_age_s(memory.promotion_failed_at, o.now) < 30
    if failed:
        back = Demote(mode="kill", release=True, checkpoint=False, why="promotion failed", timeout_s=0.0)
        return Decision(situation="leading", summary="promotion failed: giving the lock back", reasons=reasons, actions=(back,), memory=memory)
    veto = pre_promote_agrees(o, memory)
    if not veto.holds:
        down = StandDown(lsn=row.position, timeline=row.timeline, why=veto.because)
        return Decision(situation="leading", summary=f"giving the lock to others: {veto.because}", reasons=(*reasons, veto), actions=(down,), memory=memory, wake_in_s=0.2)
    if view.epoch.holder != o.me.name or o.licence.epoch != view.epoch.number or not 0 < view.epoch.timeline - row.timeline <= NONSENSE_AHEAD + 1:
        # The claim is not in sight yet, was used up, or is nonsense: read again; without a claim above our timeline nobody promotes.
        unread = view.revision < o.licence.revision
        if unread:
            return Decision(situation="leading", summary="holding the lock, reading the claim", reasons=reasons, actions=(ReadCluster(),), memory=memory, wake_in_s=0.1)
        back = Demote(mode="kill", release=True, checkpoint=False, why="no timeline is claimed for a promotion", timeout_s=0.0)
        return Decision(situation="leading", summary="holding the lock without a claimed timeline: giving it back", reasons=reasons, actions=(back,), memory=memory)
    synchronously, prepare, memory = synchronous.before_promotion(o, memory)
    reasons = (*reasons, *synchronously)
    if all(r.holds for r in reasons) and o.settings.pre_promote_s and memory.pre_promoted_epoch != view.epoch.number:
        # An operation of its own: what is decided after it, in a later pass, is decided on what is so then.
        asking = PrePromote(epoch=view.epoch.number, limit_s=o.settings.pre_promote_s)
        return Decision(situation="leading", summary="asking pre_promote before the promotion", reasons=reasons, actions=(asking,), memory=memory,
                        state="running", role="replica")
    if all(r.holds for r in reasons):
        claim = view.epoch.timeline
        promote = Promote(timeline=claim, leaving=row.timeline, block=tuple(range(row.timeline + 1, claim)), epoch=view.epoch.number, synchronous_names=o.written_names.names)
        return Decision(situation="leading", summary=f"promoting to timeline {claim} from {format_lsn(row.position)}", reasons=reasons, actions=(promote,),
                        memory=memory, state="running", role="replica")
    return Decision(situation="leading", summary="holding the lock, not promoting: " + "; ".join(r.because for r in reasons if not r.holds), reasons=reasons,
                    actions=prepare if reasons[0].holds else (), memory=memory, wake_in_s=0.05)


def promotion_conditions(o: Observation) -> tuple[Reason, ...]:
    """Promotion is decided in a later pass than the one that acquired the lock, with enough of the licence left."""
    return (restart.lock_seen_held(o), licence_lasts_long_enough(o), guard_knows(o), watchdog_is_ready(o))


def pre_promote_agrees(o: Observation, memory: Memory) -> Reason:
    """The operator's program has not just said no."""
    left = remaining_s(memory.vetoed_until, o.now) if memory.vetoed_until else 0.0
    return reason("leading.pre_promote_agrees", left <= 0, f"{memory.veto_why}, for another {left:.1f} s" if left > 0
                  else "asked, and agreed" if memory.pre_promoted_epoch == view_of(o).epoch.number else "not asked" if o.settings.pre_promote_s else "there is no pre_promote")


def lock_is_of_use(o: Observation, memory: Memory) -> Reason:
    """A holder that does not become a primary keeps everybody else from it: bounded."""
    rule, since = "leading.lock_is_of_use", memory.holding_since
    held_s = candidate_age_s(since, o.now) if since else 0.0
    sign_of_life = o.postgres.answered_at or o.postgres.since
    if o.postgres.row is None and sign_of_life is not None and candidate_age_s(sign_of_life, o.now) < PROMOTE_WITHIN_S:
        limit_s = o.settings.primary_start_timeout_s or 300.0     # it starts or recovers, and says so
    else:
        limit_s = PROMOTE_WITHIN_S
    return reason(rule, held_s < limit_s, f"held for {held_s:.1f} s without a primary, limit {limit_s:g} s" + (f" ({o.postgres.why})" if o.postgres.why else ""))


def licence_lasts_long_enough(o: Observation) -> Reason:
    to_fence_s = fence_in_s(o)
    return reason("leading.licence_lasts_long_enough", to_fence_s >= MINIMUM_TO_PROMOTE_S,
                  f"{to_fence_s:.2f} s to the fence, {MINIMUM_TO_PROMOTE_S} s needed, licence {left_s(o):.2f} s")


def guard_knows(o: Observation) -> Reason:
    """The acknowledgement itself is asked for by the promotion, immediately before it begins."""
    return reason("leading.guard_answers", o.guard.reachable, f"guard is {o.guard.state}" if o.guard.reachable else f"guard does not answer: {o.guard.why}")


def watchdog_is_ready(o: Observation) -> Reason:
    return reason("leading.watchdog_is_ready", not o.watchdog.failed, o.watchdog.why or f"watchdog mode {o.watchdog.mode}")


# --- handing over ------------------------------------------------------------------------------------------------------

def _scheduled(o: Observation, memory: Memory) -> Decision:
    """A switchover for later. When its time has come it becomes one for now, in the store: so everybody judges the same request,
    whatever their clocks say."""
    key, revision = view_of(o).failover, view_of(o).revision_of("failover")
    in_time, at = switchover.is_in_time(o)
    if not in_time.holds or (at.due is Due.NOW and not (key.leader or key.candidate)):
        clear = WriteKey(key="failover", value=b"{}", if_revision=revision, epoch_revision=o.licence.epoch_revision)
        why = in_time.because if not in_time.holds else "it names neither leader nor candidate"
        return Decision(situation="leading", summary=f"refused to hand over: {why}", reasons=(in_time,), actions=(clear,), memory=memory, wake_in_s=0.1)
    if at.due is Due.NOW and not o.settings.pause:
        value = {name: given for name, given in key.raw.items() if name != "scheduled_at"}
        begin = WriteKey(key="failover", value=_compact(value), if_revision=revision, epoch_revision=o.licence.epoch_revision)
        return Decision(situation="leading", summary=f"the time of the switchover to {key.candidate or 'the best standby'} has come", reasons=(in_time,), actions=(begin,),
                        memory=memory, ask_peers=ask_others(o, every_s=0.05), wake_in_s=0.1)
    books = _keep_books(o, memory)
    return replace(books, reasons=(*books.reasons, in_time), wake_in_s=min(books.wake_in_s, at.in_s) if at.due is Due.LATER else books.wake_in_s)


def _hand_over(o: Observation, memory: Memory) -> Decision:
    key, revision = view_of(o).failover, view_of(o).revision_of("failover")
    if key.candidate == o.me.name or key.leader not in ("", o.me.name):
        # Either it has just been carried out, to this node, or it was meant for another leader: done with.
        clear = WriteKey(key="failover", value=b"{}", if_revision=revision, epoch_revision=o.licence.epoch_revision)
        done = switchover.is_done_with(o)
        return Decision(situation="leading", summary=f"clearing the failover key: {done.because}", reasons=(done,), actions=(clear,), memory=memory, wake_in_s=0.1)
    if memory.handed_over_revision == revision:
        # Once is enough: whoever was to take over has not, and each try stops the primary.
        clear = WriteKey(key="failover", value=b"{}", if_revision=revision, epoch_revision=o.licence.epoch_revision)
        tried = switchover.was_not_tried(o)
        return Decision(situation="leading", summary=f"refused to hand over: {tried.because}", reasons=(tried,), actions=(clear,), memory=memory, wake_in_s=0.1)
    if memory.switchover_revision != revision or memory.switchover_asked_at is None:
        memory = replace(memory, switchover_revision=revision, switchover_asked_at=o.now)
    reasons = switchover.conditions(o)
    ask = ask_others(o, every_s=0.05)
    if all(r.holds for r in reasons):
        demote = Demote(mode="fast", release=True, checkpoint=True, why=f"{switchover.WHY}{key.candidate or 'the best standby'}", timeout_s=stop_timeout_s(o), before_stop_s=o.settings.before_stop_s)
        return Decision(situation="leading", summary=f"handing over: {demote.why}", reasons=reasons, actions=(demote,),
                        memory=replace(memory, handed_over_revision=revision), ask_peers=ask)
    if switchover.still_patient(o, memory):
        return Decision(situation="leading", summary="asked to hand over, asking the others", reasons=reasons, memory=memory, ask_peers=ask, wake_in_s=0.05)
    clear = WriteKey(key="failover", value=b"{}", if_revision=revision, epoch_revision=o.licence.epoch_revision)
    return Decision(situation="leading", summary="refused to hand over: " + "; ".join(r.because for r in reasons if not r.holds), reasons=reasons, actions=(clear,),
                    memory=memory, wake_in_s=0.1)


# --- everyday ----------------------------------------------------------------------------------------------------------

def _keep_books(o: Observation, memory: Memory) -> Decision:
    view, row = view_of(o), o.postgres.row
    assert row is not None
    actions: list[Action] = []
    if not o.directory.standby_signal and o.directory.state == "valid":
        actions.append(RestoreStandbySignal())
    if not view.initialized and is_system_identifier(row.system_identifier):
        actions.append(WriteInitialize(value=row.system_identifier, if_revision=view.revision_of("initialize")))
    if view.config is None and o.settings.dynamic_config:
        actions.append(_leaders_write(o, "config", o.settings.dynamic_config))
    kept = synchronous.upkeep(o, memory)
    memory = kept.memory
    actions += kept.actions
    status, memory = _status(o, memory)
    if status is not None:
        actions.append(status)
    history = _history(o)
    if history is not None:
        actions.append(history)
    listed, memory = failsafe.list_to_write(o, memory)
    if listed is not None:
        actions.append(listed)
    compact, memory = capacity.compaction(o, memory)
    if compact is not None:
        actions.append(compact)
    asked = operator_requests(o, as_primary=True, synchronous_names=synchronous.primary_names(o, memory)) if restart.lock_seen_held(o).holds else []
    actions += asked or slots.upkeep(o)
    in_the_way = slots.obstacles(o)
    lasts = licence_left(o) if o.licence.endless else f"{left_s(o):.1f} s left, {fence_in_s(o):.1f} s to the fence"
    reasons = (reason("leading.licence", True, lasts), *capacity.reasons(o), *kept.reasons, *in_the_way)
    # Both texts are the reference's: people's alerts look for them.
    summary = f"no action. I am ({o.me.name}), the leader with the lock"
    if o.licence.by_failsafe:
        summary = "continue to run as a leader because failsafe mode is enabled and all members are accessible"
    if (held_up := next((r for r in kept.reasons if r.rule == synchronous.COMMITS_GO_ON and not r.holds), None)) is not None:
        summary += f"; {held_up.because}"       # a DBA who sees nothing but waiting sessions finds it in the log
    return Decision(situation="leading", summary=summary + slots.complaint(in_the_way), reasons=reasons, actions=tuple(actions), memory=memory,
                    wake_in_s=min(o.settings.loop_wait_s, kept.wake_in_s or o.settings.loop_wait_s))


def _leaders_write(o: Observation, key: str, value: bytes) -> WriteKey:
    return WriteKey(key=key, value=value, if_revision=view_of(o).revision_of(key), epoch_revision=o.licence.epoch_revision)


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _status(o: Observation, memory: Memory) -> tuple[WriteKey | None, Memory]:
    """`status`: position and slots, once every loop_wait, and only if it says something new."""
    view, row = view_of(o), o.postgres.row
    assert row is not None
    if o.dcs.unreachable_since is not None:
        return None, memory
    if memory.last_status_at is not None and candidate_age_s(memory.last_status_at, o.now) < o.settings.loop_wait_s * 0.95:
        return None, memory
    value: dict[str, object] = {k: v for k, v in view.status.raw.items() if k not in ("optime", "slots", "retain_slots")}
    value = {"optime": row.lsn, **value}
    published = slots.published_slots(o)
    if published:
        value["slots"] = published
        value["retain_slots"] = slots.retained_names(o)
    if value == view.status.raw:
        return None, memory
    return _leaders_write(o, "status", _compact(value)), replace(memory, last_status_at=o.now)


def _history(o: Observation) -> WriteKey | None:
    """`history`: the rows of the own timeline's history file; known rows keep their time and leader."""
    view, row = view_of(o), o.postgres.row
    assert row is not None
    if row.timeline == view.timeline or (row.timeline > 1 and not own_history(o, row.timeline)):
        return None
    if o.directory.history and o.directory.history[-1].timeline >= row.timeline:
        return None     # the directory was looked at before the promotion
    known = {e.timeline: e for e in view.history or ()}
    entries = []
    newest = o.directory.history[-1].timeline if o.directory.history else 0
    for item in o.directory.history:
        old = known.get(item.timeline)
        if old is not None and old.lsn == item.switch_lsn:
            entries.append(old)
        elif item.timeline == newest:
            entries.append(HistoryEntry(timeline=item.timeline, lsn=item.switch_lsn, reason=item.reason, timestamp=_timestamp(o.wall_s), leader=o.me.name))
        else:
            entries.append(HistoryEntry(timeline=item.timeline, lsn=item.switch_lsn, reason=item.reason))
    limit = o.settings.max_timelines_history
    told = [(e.timeline, e.lsn) for e in (entries[-limit:] if limit else entries)]
    if view.history is not None and told == [(e.timeline, e.lsn) for e in view.history]:
        return None     # told already: after a number was left out the last row's is not the own one less one
    rows = [[e.timeline, e.lsn, e.reason, e.timestamp, e.leader] for e in (entries[-limit:] if limit else entries)]
    for item_row in rows:
        while item_row[-1] == "":
            item_row.pop()
    if row.timeline == 1 and view.history == ():
        return None
    return _leaders_write(o, "history", _compact(rows))


def _timestamp(wall_s: float) -> str:
    """Epoch seconds → ISO 8601 in UTC with microseconds, by arithmetic: `decide` reads no clock and needs no zone."""
    days, rest = divmod(int(wall_s), 86400)
    micro = int((wall_s - int(wall_s)) * 1e6)
    # Civil date from days since 1970-01-01 (proleptic Gregorian calendar, eras of 400 years).
    z = days + 719468
    era, doe = divmod(z, 146097)
    yoe = (doe - doe // 1460 + doe // 36524 - doe // 146096) // 365
    doy = doe - (365 * yoe + yoe // 4 - yoe // 100)
    mp = (5 * doy + 2) // 153
    day, month = doy - (153 * mp + 2) // 5 + 1, mp + 3 if mp < 10 else mp - 9
    year = yoe + era * 400 + (1 if month <= 2 else 0)
    return f"{year:04d}-{month:02d}-{day:02d}T{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}.{micro:06d}+00:00"


def operator_requests(o: Observation, *, as_primary: bool, synchronous_names: str | None = None) -> list[Action]:
    """What configuration and operators ask of the running server: one operation a pass."""
    actions: list[Action] = [ApplyConfiguration()] if o.settings.configuration_changed else []
    for request in o.requests:
        if request.kind == "restart":
            timeout_s = float(request.options.get("timeout_s") or o.settings.primary_start_timeout_s or 300.0)
            actions.append(Restart(as_primary=as_primary, timeout_s=timeout_s, before_stop_s=o.settings.before_stop_s, request_id=request.id, synchronous_names=synchronous_names))
            break
    return actions



"""The guard: from its deadline on, no process of this data directory lives, whatever has become of the agent.

    python -m pgha.lock.guard --data-dir DIR --runtime-dir DIR --agent-lock FILE [--cgroup PATH] [--alone-s SECONDS]

A process of its own, outside the agent's process tree. What may run, and who may change that, is guard_state.py; how
killing is done, recipe.py; the words, protocol.py; the look at the directory, guard_look.py. This file is the loop.

Rules of this file:
- On the way to a kill there is no disk, no DNS, no SQL, no lock, no log: /proc and signals only, then the rest.
- Time is looked at before every message, so that no message finds a licence that has ended.
- The file (tmpfs) is written before a request is acknowledged; what narrows holds even if that fails.

How soon: the deadline itself: 1 ms (poll) plus scheduling. A server that appears while latched: inotify tells within
about a millisecond, without inotify a look every 20 ms; starting takes PostgreSQL longer than that. A promotion
behind the agent's back: the file `promote`, with which it begins, and the removal of standby.signal, which comes some
milliseconds before the first write (without inotify: within 50 ms, and then there may have been writes). A promote_trigger_file (PostgreSQL up to 15)
is noticed by that removal only. The death of a postmaster: its pidfd.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from typing import NamedTuple

from pgha.clock import Instant, SystemClock, remaining_s
from pgha.lock import recipe
from pgha.lock.guard_look import Looker
from pgha.lock.guard_state import Facts, Held, Look, Role, after_look, answer, judge, lapse, latched, unarmed
from pgha.lock.guard_system import (
    BootTimer,
    Log,
    Memory,
    RuntimeDirectoryError,
    check_runtime_dir,
    lock_alone,
    take_privileges,
)
from pgha.lock.protocol import (
    MAX_BYTES,
    SOCKET_NAME,
    Answer,
    Op,
    ProtocolError,
    Request,
    State,
    encode_answer,
    parse_request,
)

#: A frozen agent's primary ends its clients first and drains its walsenders (safety model 8), then all at once.
SIGINT_BEFORE_S = 0.5
SIGQUIT_BEFORE_S = 0.1
#: How long the directory may take to answer a request that depends on it.
LOOK_WAIT_S = 0.2
#: The same, when a postmaster has died and a successor might be taken for an orphan.
SUCCESSOR_WAIT_S = 0.003
#: With inotify the ticks only confirm; without it they are how things are noticed.
TICK_S = 1.0
TICK_UNWATCHED_S = 0.05
TICK_LATCHED_UNWATCHED_S = 0.02
#: How often the agent's lock and the whole of /proc are looked at.
ROUND_S = 5.0
#: The guard ends when for so long no agent held its lock and no process of the directory lived.
ALONE_S = 60.0
MAX_CLIENTS = 16
MAX_UNSENT_BYTES = 16 * MAX_BYTES

ENDED, USAGE, ALREADY_RUNNING, UNUSABLE = 0, 2, 3, 4


class _Server(NamedTuple):
    """The postmaster that is being watched."""

    proc: recipe.Proc
    pidfd: int


class _Client:
    """One connection; never waited for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.unsent = b""
        self.last_s = time.monotonic()
        self.closing = False


class Guard:
    """The guard of one data directory; `run` returns when it may end."""

    def __init__(self, *, data_dir: str, runtime_dir: str, agent_lock: str, cgroup: str | None = None,
                 alone_s: float = ALONE_S) -> None:
        self._clock = SystemClock()
        self._cgroup = cgroup
        self._alone_limit_s = alone_s
        self._memory = Memory(runtime_dir, data_dir)
        # The deadline first (safety model 8): everything else of this start comes after it.
        remembered = self._memory.read()
        self._held = remembered[0] if remembered else unarmed(Held(), self._clock.now(), "no file of this boot")
        self._unknown = remembered is None
        self._directory = recipe.DataDirectory(data_dir, remembered[1] if remembered else ())
        self._server: _Server | None = None
        self._warned: tuple[Instant | None, int] = (None, 0)   # for which fence_at, how many of the two signals
        self._fenced: set[tuple[int, int]] = set()             # who was killed since the latch fell
        self._last_fence = ""
        self._look = Look()
        self._next_tick_s = 0.0
        self._next_sweep_s = 0.0
        self._next_round_s = 0.0
        self._alone_since_s: float | None = None
        self._agent_alive: bool | None = None
        self._ending = False
        self._ended = False
        self._clients: dict[int, _Client] = {}
        self._poll = select.poll()
        # Before the threads, which inherit it: a thread that waits for the CPU with the interpreter's lock in its
        # hand would make the guard wait, too.
        self._privileges = take_privileges()
        threading.stack_size(256 * 1024)
        self._log = Log()
        self._looker = Looker(data_dir, agent_lock)
        self._fence_if_due()
        self._timer = BootTimer()
        self._listener = _listen(f"{runtime_dir}/{SOCKET_NAME}")
        for fd in (self._looker.fd, self._looker.inotify_fd, self._timer.fd, self._listener.fileno()):
            if fd >= 0:
                self._poll.register(fd, select.POLLIN)
        self._wakeup_fd = self._take_signals()

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        self._begin()
        while not self._ended:
            self._fence_if_due()
            now_s = time.monotonic()
            if now_s >= self._next_tick_s:
                self._tick(now_s)
                continue
            sleep_s = max(0.0, min(self._next_tick_s - now_s, self._deadline_in_s()))
            self._timer.set_s(sleep_s)
            for fd, _ in self._poll.poll(int(sleep_s * 1000) + 1):
                self._fence_if_due()
                self._ready(fd)
        self._log("INFO", "guard_ends", state=self._held.state)
        self._log.flush(0.2)
        return ENDED

    def _begin(self) -> None:
        look = self._looker.now(LOOK_WAIT_S)
        if look is not None:
            self._learn(look)
            if self._unknown:
                # Nothing of this boot is known: a primary has UNARMED_S left, counted from this process's start.
                if not recipe.processes_of(self._directory):
                    self._held = Held(why="no server runs")
                elif self._server is not None and judge(look) is not Role.PRIMARY:
                    self._held = Held(State.STANDBY, why="a server in recovery was found running")
            else:
                self._after_look(look)
        self._save()
        self._log("INFO", "guard_runs", state=self._held.state, why=self._held.why, data_dir=self._directory.path,
                  **self._privileges._asdict())

    def _ready(self, fd: int) -> None:
        if fd == self._timer.fd:
            self._timer.clear()
        elif fd == self._looker.fd:
            self._on_look(self._looker.take())
        elif fd == self._looker.inotify_fd:
            self._on_news()
        elif self._server is not None and fd == self._server.pidfd:
            self._on_death()
        elif fd == self._listener.fileno():
            self._accept()
        elif fd == self._wakeup_fd:
            os.read(fd, 64)
            self._next_tick_s = 0.0
        elif fd in self._clients:
            self._serve(self._clients[fd])

    def _take_signals(self) -> int:
        """SIGTERM: end as soon as no process of the directory lives. Returns what wakes the loop."""
        readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)

        def end(_signum: int, _frame: object) -> None:
            self._ending = True

        signal.signal(signal.SIGTERM, end)
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)
        self._poll.register(readable, select.POLLIN)
        return readable

    # --- time --------------------------------------------------------------------------------------------------

    def _deadline_in_s(self) -> float:
        """Seconds until time alone makes something happen."""
        held = self._held
        now = self._clock.now()
        if held.until is not None:
            return remaining_s(held.until, now)
        if held.fence_at is None:
            return TICK_S
        left_s = remaining_s(held.fence_at, now)
        sent = self._warned[1] if self._warned[0] == held.fence_at else 0
        return left_s - (SIGINT_BEFORE_S, SIGQUIT_BEFORE_S, 0.0)[sent]

    def _fence_if_due(self) -> None:
        now = self._clock.now()
        after = lapse(self._held, now)
        if after is not self._held:
            self._fence(after)
        elif after.fence_at is not None:
            left_s = remaining_s(after.fence_at, now)
            due = 2 if left_s <= SIGQUIT_BEFORE_S else 1 if left_s <= SIGINT_BEFORE_S else 0
            sent = self._warned[1] if self._warned[0] == after.fence_at else 0
            if due > sent:
                self._warned = (after.fence_at, due)
                self._warn(signal.SIGINT if due == 1 else signal.SIGQUIT)

    def _warn(self, signum: signal.Signals) -> None:
        """Sent whether or not it is a primary: at the deadline it would be killed in any case."""
        if self._server is not None:
            recipe.send(self._server.proc, signum)
            sent_to: tuple[int, ...] = (self._server.proc.pid,)
        else:
            sent_to = recipe.signal_postmaster(self._directory, signum)
        if sent_to:
            self._log("ERROR", "licence_is_ending", signal=signum.name, pid=sent_to[0])

    def _fence(self, after: Held) -> None:
        """The fence falls, or still stands: kill first, then remember, then tell."""
        assert after.state is State.LATCHED, after
        report = recipe.kill_all(self._directory, known=(self._server.proc,) if self._server else (),
                                 cgroup=self._cgroup)
        fell = self._held.state is not State.LATCHED
        if fell:
            self._fenced.clear()
        self._held = after
        fresh = [p for p in report.killed if p.key not in self._fenced]
        self._fenced.update(p.key for p in fresh)
        if fell:
            self._last_fence = f"{len(report.killed)} processes in {report.took_s * 1000:.1f} ms: {after.why}"
            self._changed()
        if fell or fresh:
            self._log("ERROR", "fenced", why=after.why, killed=len(fresh), took_s=report.took_s,
                       not_gone_yet=len(report.left))
        if report.denied or report.unreadable:
            self._log("ERROR", "fence_has_gaps", not_permitted=len(report.denied),
                       of_unknown_directory=len(report.unreadable))

    def _tick(self, now_s: float) -> None:
        self._next_tick_s = now_s + self._tick_s()
        _reap()
        if self._held.state is State.LATCHED and now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + TICK_S
            self._fence(self._held)
        whole = now_s >= self._next_round_s
        if whole:
            self._next_round_s = now_s + min(ROUND_S, self._alone_limit_s / 4)
            if self._server is None:
                self._adopt_any()
        self._looker.ask(agent=whole)
        if self._ending and not recipe.processes_of(self._directory):
            self._log("INFO", "sigterm")
            self._ended = True

    def _tick_s(self) -> float:
        if self._ending:
            return 0.1
        if self._look.watched:
            return TICK_S
        return TICK_LATCHED_UNWATCHED_S if self._held.state is State.LATCHED else TICK_UNWATCHED_S

    # --- the data directory ------------------------------------------------------------------------------------

    def _learn(self, look: Look) -> None:
        """Take over what a look says about who is there; whatever else follows from it comes after."""
        self._look = look
        if look.identity is not None and look.identity != next(iter(self._directory.identities), None):
            self._directory.learn(look.identity)
            self._save()
        if look.postmaster_pid and (self._server is None or self._server.proc.pid != look.postmaster_pid):
            self._adopt(recipe.read_proc(look.postmaster_pid))

    def _adopt(self, proc: recipe.Proc | None) -> None:
        """Watch this process if it is a server of ours: postmaster.pid may be old and its pid another's by now."""
        if proc is None or proc.comm not in recipe.COMMS or self._directory.holds(proc.pid) is not recipe.Belongs.YES:
            return
        pidfd = recipe.open_pidfd(proc)
        if pidfd is not None:
            self._drop_server()
            self._server = _Server(proc, pidfd)
            self._poll.register(pidfd, select.POLLIN)

    def _adopt_any(self) -> None:
        """postmaster.pid may be unreadable or removed: whoever has children here is a postmaster."""
        ours = recipe.processes_of(self._directory)
        parents = {p.ppid for p in ours}
        for proc in recipe.postmasters_of(ours):
            if proc.pid in parents:
                self._adopt(proc)
        if ours and self._server is None and self._held.state is not State.OFFLINE:
            # Nobody leads them: a postmaster that died unseen left them. One that starts is not that old.
            report = recipe.kill_orphans(self._directory, seen_ticks=recipe.ticks_now() - recipe.TICKS_PER_S)
            if report.killed:
                self._log("WARNING", "orphans_killed", killed=len(report.killed))

    def _drop_server(self) -> None:
        if self._server is not None:
            self._poll.unregister(self._server.pidfd)
            os.close(self._server.pidfd)
            self._server = None

    def _on_look(self, look: Look) -> None:
        self._learn(look)
        self._after_look(look)
        if self._held.state is State.LATCHED and self._server is not None:
            self._fence(self._held)
        if look.agent_alive is not None:
            self._agent_is(alive=look.agent_alive)

    def _after_look(self, look: Look) -> None:
        if look.epoch != self._looker.epoch:
            return  # it began under a state that is no more
        after = after_look(self._held, look, server=self._server is not None, now=self._clock.now())
        if after is self._held:
            return
        if after.state is State.LATCHED:
            self._fence(after)
        else:
            self._held = after
            self._changed()
            self._log("WARNING", "state", state=after.state, why=after.why)

    def _on_news(self) -> None:
        news = self._looker.news()
        if news.promotion_asked and self._server is None and self._held.state is State.STANDBY:
            self._adopt_any()       # one that has just been started, and was not looked at yet
        if self._held.state is State.LATCHED and (news.pid_written or news.other):
            # Not when it is created: killed before its first write, a postmaster leaves an empty postmaster.pid, and
            # PostgreSQL refuses to start beside one for ever. One that stays in between is the next tick's.
            self._fence(self._held)
        elif self._held.state is State.STANDBY and (news.signal_removed or news.promotion_asked) and self._server is not None:
            self._fence(latched(self._held, "the file promote was made: somebody else promotes this server" if news.promotion_asked
                                else "standby.signal was removed under a running server"))
        if any(news):
            self._looker.ask()

    def _on_death(self) -> None:
        """The postmaster is dead: its backends do not know it yet, and go on answering their clients."""
        seen_ticks = recipe.ticks_now()
        assert self._server is not None
        dead = self._server.proc
        if self._held.state is State.LATCHED:
            self._fence(self._held)
            self._drop_server()
            return
        if self._held.state is State.OFFLINE:  # a single-user server: no backends, and initdb starts one after the other
            self._drop_server()
            return
        look = self._looker.now(min(SUCCESSOR_WAIT_S, max(0.0, self._deadline_in_s())))
        keep = frozenset({look.postmaster_pid}) if look is not None and look.postmaster_pid != dead.pid else frozenset()
        report = recipe.kill_orphans(self._directory, seen_ticks=seen_ticks, keep=keep)
        self._drop_server()
        self._log("WARNING", "postmaster_died", pid=dead.pid, orphans_killed=len(report.killed))
        self._looker.ask()

    def _agent_is(self, *, alive: bool) -> None:
        """The guard ends when nobody needs it any more; it cannot start an agent, only say that there is none."""
        if alive is not self._agent_alive:
            self._agent_alive = alive
            self._log("INFO" if alive else "WARNING", "agent_present" if alive else "agent_absent",
                       state=self._held.state)
        if alive or self._server is not None or recipe.processes_of(self._directory):
            self._alone_since_s = None
        elif self._alone_since_s is None:
            self._alone_since_s = time.monotonic()
        elif time.monotonic() - self._alone_since_s >= self._alone_limit_s:
            self._log("INFO", "alone", for_s=self._alone_limit_s)
            self._ended = True

    # --- requests ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # gone again
        _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        sock.setblocking(False)
        if uid not in (os.geteuid(), 0):
            self._log("WARNING", "stranger_refused", uid=uid)
            sock.close()
            return
        if len(self._clients) >= MAX_CLIENTS:  # the newest is the one that wants something
            self._close(min(self._clients.values(), key=lambda c: c.last_s))
        self._clients[sock.fileno()] = _Client(sock)
        self._poll.register(sock.fileno(), select.POLLIN)

    def _close(self, client: _Client) -> None:
        self._poll.unregister(client.sock.fileno())
        del self._clients[client.sock.fileno()]
        client.sock.close()

    def _serve(self, client: _Client) -> None:
        client.last_s = time.monotonic()
        try:
            if client.unsent:
                client.unsent = client.unsent[client.sock.send(client.unsent):]
            data = client.sock.recv(MAX_BYTES)
        except BlockingIOError:
            data = None
        except OSError:
            self._close(client)
            return
        if data == b"":
            self._close(client)
            return
        client.received += data or b""
        while b"\n" in client.received and not client.closing:
            line, client.received = client.received.split(b"\n", 1)
            client.unsent += self._answer(line)
            self._fence_if_due()
        if len(client.received) >= MAX_BYTES and not client.closing:
            client.unsent += self._reply(f"a line may have {MAX_BYTES} bytes")
            client.closing = True
        if client.closing:
            client.received = b""
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            if client.unsent:
                client.unsent = client.unsent[client.sock.send(client.unsent):]
        except BlockingIOError:
            pass
        except OSError:
            self._close(client)
            return
        if len(client.unsent) > MAX_UNSENT_BYTES:
            self._close(client)
            return
        if client.closing and not client.unsent:
            # Read on until the other side closes: closing with something unread would take the answer back.
            try:
                client.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._close(client)
                return
        events = select.POLLIN | (select.POLLOUT if client.unsent else 0)
        self._poll.modify(client.sock.fileno(), events)

    def _answer(self, line: bytes) -> bytes:
        try:
            request = parse_request(line)
        except ProtocolError as exc:
            return self._reply(str(exc))
        facts = self._facts_for(request)
        self._fence_if_due()
        before = self._held
        verdict = answer(before, request, facts, self._clock.now())
        if verdict.error:
            return self._reply(verdict.error)
        if verdict.fence:
            self._fence(verdict.held)
            return self._reply()
        if verdict.held != before:
            if request.op is Op.NARROW:
                self._held = verdict.held  # holds whether or not it can be written down
            try:
                self._memory.write(verdict.held, self._directory.identities)
            except OSError as exc:
                return self._reply(f"the guard cannot write its file: {exc.strerror}")
            self._held = verdict.held
            if (before.state, before.agent) != (verdict.held.state, verdict.held.agent):
                self._new_epoch()
                self._log("INFO", "state", state=verdict.held.state, before=before.state,
                          incarnation=verdict.held.agent.incarnation)
        self._ended |= verdict.end
        return self._reply()

    def _facts_for(self, request: Request) -> Facts:
        if request.op not in (Op.STANDBY, Op.OFFLINE, Op.BYE):
            return Facts()
        self._on_news()  # what happened before this request belongs to the state before it
        look = self._looker.now(min(LOOK_WAIT_S, max(0.0, self._deadline_in_s())))
        if look is not None:
            self._learn(look)
        return Facts(len(recipe.processes_of(self._directory)), look)

    def _reply(self, error: str = "") -> bytes:
        held = self._held
        server = self._server.proc.pid if self._server else 0
        return encode_answer(Answer(not error, held.state, held.fence_at, held.until, held.agent, held.sequence, error, {
            "pid": os.getpid(), "data_dir": self._directory.path, "postmaster": server, "why": held.why,
            "last_fence": self._last_fence, "watched": self._look.watched, "agent_alive": self._agent_alive,
            **self._privileges._asdict(),
        }))

    # --- memory and log ----------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """The state has changed by itself."""
        self._save()
        self._new_epoch()

    def _new_epoch(self) -> None:
        """Looks that began before now belong to a state that is no more."""
        self._looker.epoch += 1
        self._looker.ask()

    def _save(self) -> None:
        try:
            self._memory.write(self._held, self._directory.identities)
        except OSError as exc:
            self._log("ERROR", "file_not_written", why=exc.strerror or "")


def _listen(path: str) -> socket.socket:
    """The socket, 0600; the lock file says that a former one is nobody's."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    former = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(former)
    listener.listen(128)
    return listener


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def run(*, data_dir: str, runtime_dir: str, agent_lock: str, cgroup: str | None = None,
        alone_s: float = ALONE_S) -> int:
    """Guard `data_dir` until there is nothing to guard; the process's exit code."""
    try:
        check_runtime_dir(runtime_dir)
        alone = lock_alone(runtime_dir)
    except (RuntimeDirectoryError, OSError) as exc:
        sys.stderr.write(f"guard: {exc}\n")
        return UNUSABLE
    if alone is None:
        sys.stderr.write(f"guard: already running in {runtime_dir}\n")
        return ALREADY_RUNNING
    data_dir = os.path.abspath(data_dir)
    agent_lock = os.path.abspath(agent_lock)
    runtime_dir = os.path.abspath(runtime_dir)
    os.chdir("/")
    return Guard(data_dir=data_dir, runtime_dir=runtime_dir, agent_lock=agent_lock, cgroup=cgroup,
                 alone_s=alone_s).run()


def main(argv: list[str]) -> int:
    """`argv` without the program's name. (argparse alone would take a tenth of the guard's memory.)"""
    names = {"--data-dir": "data_dir", "--runtime-dir": "runtime_dir", "--agent-lock": "agent_lock", "--cgroup": "cgroup",
             "--alone-s": "alone_s"}
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names or (not equals and not (value := next(words, ""))):
            sys.stderr.write(f"guard: {word}: one of {', '.join(names)}, each with its value\n")
            return USAGE
        given[names[name]] = value
    if not {"data_dir", "runtime_dir", "agent_lock"} <= given.keys():
        sys.stderr.write("guard: --data-dir, --runtime-dir and --agent-lock are needed\n")
        return USAGE
    alone_s = given.get("alone_s", str(ALONE_S))
    if alone_s != "infinity" and not alone_s.removesuffix(".0").isdecimal():
        sys.stderr.write("guard: --alone-s: whole seconds, or infinity\n")
        return USAGE
    return run(data_dir=given["data_dir"], runtime_dir=given["runtime_dir"], agent_lock=given["agent_lock"],
               cgroup=given.get("cgroup"), alone_s=float(alone_s))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

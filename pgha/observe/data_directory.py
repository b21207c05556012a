"""What does the data directory hold, without changing it?

Cheap while PostgreSQL runs: a few `stat` calls, and pg_controldata only while pg_control has never been read. Of a
stopped server pg_control is read again whenever the file has changed.

Rules of this file:
* "unreadable" is a state of its own: a directory that cannot be looked into must never be taken for an empty one;
* a thread looks, since a hung disk must not stop the loop; no second one is started while the first hangs.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import trio
from msgspec import Struct
from msgspec.structs import replace

from pgha.errors import PostgresError
from pgha.model.node import Control, DataDirectoryFacts
from pgha.model.rolling import STANDBY_AT_LEAST
from pgha.model.wal import HistoryRow, parse_history_file
from pgha.postgres.controldata import ControlData, read_control
from pgha.postgres.directories import Bootstrapping, bootstrapping, replaced_by_copy
from pgha.postgres.files import read_beginning
from pgha.postgres.pg_rewind import interrupted
from pgha.postgres.programs import Run, run
from pgha.postgres.threads import InThread, in_thread

#: (inode, mtime, size) of a file that is rewritten in place.
Stamp = tuple[int, int, int]
#: A disk that does not answer for a few small files in this time counts as unreadable.
LOOK_DEADLINE_S = 2.0
CONTROL_DEADLINE_S = 2.0
#: A history is a few lines; anything longer is damage.
LARGEST_HISTORY_BYTES = 1 << 20


def control_of(said: ControlData) -> Control:
    """The part that decisions use."""
    return Control(
        state=said.state, system_identifier=said.system_identifier, timeline=said.timeline, checkpoint_lsn=said.checkpoint_lsn,
        redo_lsn=said.redo_lsn, min_recovery_lsn=said.min_recovery_end_lsn, min_recovery_timeline=said.min_recovery_timeline,
        checksums=said.checksums, wal_log_hints=said.wal_log_hints, limits={name: getattr(said, name) for name in STANDBY_AT_LEAST})


class _Looked(Struct, frozen=True, kw_only=True):
    """What the thread saw. `control_stamp` None: there is no pg_control."""

    exists: bool
    names: frozenset[str] = frozenset()
    control_stamp: Stamp | None = None
    major_version: int = 0
    rewind_interrupted: bool = False
    bootstrapping: Bootstrapping = ""
    copy_replaces: bool = False     # what a copy in place is to replace waits beside


def _stamp_of(path: Path) -> Stamp | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _look(data_dir: Path) -> _Looked:
    """OSError if the directory is there and cannot be looked into."""
    try:
        names = frozenset(os.listdir(data_dir))  # noqa: PTH208  (names are all that is needed)
    except FileNotFoundError:
        return _Looked(exists=False, copy_replaces=bool(replaced_by_copy(data_dir)))
    version = read_beginning(data_dir / "PG_VERSION", 16).decode("ascii", "replace").strip() if "PG_VERSION" in names else ""
    return _Looked(exists=True, names=names, control_stamp=_stamp_of(data_dir / "global" / "pg_control") if names else None,
                   major_version=int(version) if version.isascii() and version.isdigit() else 0, rewind_interrupted=interrupted(data_dir),
                   bootstrapping=bootstrapping(data_dir), copy_replaces=bool(replaced_by_copy(data_dir)))


def _read_history(path: Path) -> tuple[HistoryRow, ...]:
    """() if there is none, or one that does not parse."""
    try:
        return parse_history_file(read_beginning(path, LARGEST_HISTORY_BYTES).decode(errors="replace"))
    except (FileNotFoundError, ValueError):
        return ()


class DataDirectoryReader:
    """Reads the facts of one data directory, and remembers what need not be read again."""

    def __init__(self, data_dir: Path, bin_dir: Path | str, *, in_thread: InThread = in_thread, run: Run = run) -> None:
        self._data_dir = data_dir
        self._bin_dir = bin_dir
        self._in_thread, self._run = in_thread, run
        self._control: ControlData | None = None
        self._stamp: Stamp | None = None
        self._end_of_wal: tuple[Stamp, int, int] | None = None
        self._history: tuple[int, tuple[HistoryRow, ...]] = (0, ())
        self._looking = False
        self.facts = DataDirectoryFacts()

    async def note_end_of_wal(self, *, lsn: int, timeline: int) -> None:
        """InspectEndOfWal's result; true for as long as pg_control is not written again."""
        stamp = await self._in_thread(partial(_stamp_of, self._data_dir / "global" / "pg_control"))
        self._end_of_wal = None if stamp is None else (stamp, lsn, timeline)

    async def read_facts(self, *, running: bool, timeline: int = 0, fresh: bool = False) -> DataDirectoryFacts:
        """Look now, and keep the answer in `facts`. Never raises: what goes wrong is the state.

        `timeline`: the running server's own, if it is known. `fresh`: read pg_control of a running server, too.
        """
        if self._looking:  # the disk still has not answered for the last look
            return self.facts
        why = f"{self._data_dir}: no answer from the disk within {LOOK_DEADLINE_S:g} s"
        with trio.move_on_after(LOOK_DEADLINE_S + CONTROL_DEADLINE_S):
            try:
                self.facts = await self._read(running=running, timeline=timeline, fresh=fresh)
                return self.facts
            except OSError as error:
                why = f"{error.filename}: {error.strerror}"
        self.facts = DataDirectoryFacts(state="unreadable", why=why)
        return self.facts

    async def _read(self, *, running: bool, timeline: int, fresh: bool) -> DataDirectoryFacts:
        looked = await self._look()
        if not looked.exists:
            return DataDirectoryFacts(state="missing", why=f"{self._data_dir} does not exist", abandoned_bootstrap=looked.copy_replaces, unfinished_copy=looked.copy_replaces)
        if not looked.names:
            return DataDirectoryFacts(state="empty", why=f"{self._data_dir} is empty", abandoned_bootstrap=looked.copy_replaces, unfinished_copy=looked.copy_replaces)
        facts = DataDirectoryFacts(
            state="partial", standby_signal="standby.signal" in looked.names, major_version=looked.major_version,
            rewind_interrupted=looked.rewind_interrupted, abandoned_bootstrap=looked.bootstrapping == "making" or looked.copy_replaces, unfinished_copy=looked.bootstrapping.startswith("copying"),
            bootstrap_unregistered=looked.bootstrapping == "made")
        stamp = looked.control_stamp
        if looked.bootstrapping == "making" and not running:     # also when it looks whole: users, script, configuration may lack
            return replace(facts, why=f"{self._data_dir}: a bootstrap was begun here and has not ended")
        if facts.unfinished_copy and not running:
            return replace(facts, why=f"{self._data_dir}: a copy was begun here and has not ended")
        if not looked.major_version or stamp is None:
            missing = "global/pg_control" if looked.major_version else "PG_VERSION"
            return replace(facts, why=f"{self._data_dir} is not empty, but has no {missing}")
        if self._control is None or fresh or (stamp != self._stamp and not running):
            try:
                self._control, self._stamp = await read_control(self._data_dir, self._bin_dir, deadline_s=CONTROL_DEADLINE_S, run=self._run), stamp
            except PostgresError as error:
                self._control = self._stamp = None
                return replace(facts, state="unreadable", why=str(error))
        end = self._end_of_wal if self._end_of_wal is not None and self._end_of_wal[0] == stamp and not running else None
        control = control_of(self._control)
        why = "a rewind of it was interrupted: it must be rewound again, or cloned" if looked.rewind_interrupted else ""
        timeline = timeline or (end[2] if end else 0) or max(control.timeline, control.min_recovery_timeline)
        return replace(
            facts, state="valid", why=why, control=control, end_of_wal=end[1] if end else 0, end_of_wal_timeline=end[2] if end else 0,
            history=await self._history_of(timeline, again=not running), history_of=timeline)

    async def _look(self) -> _Looked:
        """The look itself; a thread that the disk keeps is left behind, and `_looking` stays true until it returns."""
        self._looking = True

        def look() -> _Looked:
            try:
                return _look(self._data_dir)
            finally:
                self._looking = False

        return await self._in_thread(look, abandon_on_cancel=True)

    async def _history_of(self, timeline: int, *, again: bool) -> tuple[HistoryRow, ...]:
        """A timeline's history never changes while a server is on it; at rest other data may have taken the place of this,
        with another branch of the same number."""
        if timeline <= 1:
            return ()
        if again or self._history[0] != timeline or not self._history[1]:
            path = self._data_dir / "pg_wal" / f"{timeline:08X}.history"
            self._history = (timeline, await self._in_thread(partial(_read_history, path), abandon_on_cancel=True))
        return self._history[1]

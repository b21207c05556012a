"""Where does the WAL of a stopped server end?  Read with pg_waldump, so it needs no server and changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import trio
from msgspec import Struct

from pgha.errors import CommandFailed, PostgresError, PostgresTimeout
from pgha.model.wal import format_lsn, parse_lsn
from pgha.postgres.controldata import ControlData
from pgha.postgres.programs import Completed, binary, run

_RECORD = re.compile(
    r"^rmgr: (?P<rmgr>\S+)\s+len \(rec/tot\):\s+\d+/\s*(?P<length>\d+), tx:\s+\d+, "
    r"lsn: (?P<lsn>[0-9A-F]+/[0-9A-F]+), prev (?P<prev>[0-9A-F]+/[0-9A-F]+), desc: (?P<desc>.*)", re.MULTILINE)
#: pg_waldump's own words when a record cannot be read: the position is that of the last one that could.
_LAST_READ = re.compile(r"error in WAL record at ([0-9A-F]+/[0-9A-F]+)")

_SHORT_HEADER_BYTES = 24   # of a WAL page (SizeOfXLogShortPHD)
_LONG_HEADER_BYTES = 40    # of a segment's first page (SizeOfXLogLongPHD)


class WalRecord(Struct, frozen=True, kw_only=True):
    """One record as pg_waldump shows it. `length_bytes` counts the record alone, without the page headers inside it."""

    lsn: int
    prev_lsn: int
    length_bytes: int
    rmgr: str
    desc: str

    @property
    def is_switch(self) -> bool:
        return self.rmgr == "XLOG" and self.desc.startswith("SWITCH")

    @property
    def is_shutdown_checkpoint(self) -> bool:
        return self.rmgr == "XLOG" and self.desc.startswith("CHECKPOINT_SHUTDOWN")


def record_end(record: WalRecord, *, segment_bytes: int, block_bytes: int = 8192) -> int:
    """The LSN after `record`: PostgreSQL's own EndRecPtr. A record spans pages, each of which has a header."""
    if record.is_switch:  # the rest of its segment is empty
        return -(-(record.lsn + 1) // segment_bytes) * segment_bytes
    at, left = record.lsn, record.length_bytes
    while left > (room := block_bytes - at % block_bytes):
        left -= room
        at += room
        at += _LONG_HEADER_BYTES if at % segment_bytes == 0 else _SHORT_HEADER_BYTES
    return -(-(at + left) // 8) * 8


async def _dump(data_dir: Path, bin_dir: Path | str, timeline: int, from_lsn: int, *options: str,
                deadline_s: float) -> Completed:
    return await run(
        [binary(bin_dir, "pg_waldump"), f"--path={data_dir / 'pg_wal'}", f"--timeline={timeline:d}",
         f"--start={format_lsn(from_lsn)}", *options], deadline_s=deadline_s)


async def read_record(data_dir: Path, bin_dir: Path | str, *, timeline: int, lsn: int, segment_bytes: int,
                      deadline_s: float) -> WalRecord:
    """The record that begins exactly at `lsn`. PostgresError if there is none, or no longer."""
    if _extent(data_dir, timeline, lsn, segment_bytes)[0] != lsn:
        raise PostgresError(f"the WAL of timeline {timeline} at {format_lsn(lsn)} is not in {data_dir}")
    done = await _dump(data_dir, bin_dir, timeline, lsn, "--limit=1", deadline_s=deadline_s)
    match = _RECORD.search(done.stdout)
    if match is None or parse_lsn(match["lsn"]) != lsn:
        raise PostgresError(f"no WAL record at {format_lsn(lsn)} on timeline {timeline}: {done.stderr.strip()[-300:]}")
    return _record(match)


def _record(match: re.Match[str]) -> WalRecord:
    return WalRecord(lsn=parse_lsn(match["lsn"]), prev_lsn=parse_lsn(match["prev"]), length_bytes=int(match["length"]),
                     rmgr=match["rmgr"], desc=match["desc"])


class ShutdownPositions(Struct, frozen=True, kw_only=True):
    """Positions of a clean end, all on `timeline`."""

    timeline: int
    checkpoint_lsn: int   # where the shutdown checkpoint record begins
    end_lsn: int          # after it: the server's whole WAL
    published_lsn: int    # what `status.optime` says after a clean shutdown (compatibility spec 1.4)


async def shutdown_positions(control: ControlData, data_dir: Path, bin_dir: Path | str, *,
                             deadline_s: float) -> ShutdownPositions:
    """Read the shutdown checkpoint of a server that was shut down as primary, and the record before it.

    With archiving the server switches segments before the checkpoint. A standby then has everything that matters once it
    has the switch, which is why that is the published position. PostgresError if the state is another one.
    """
    if control.state != "shut down":
        raise PostgresError(f"no shutdown checkpoint: the state is {control.state!r}")
    until = trio.current_time() + deadline_s
    checkpoint = await read_record(
        data_dir, bin_dir, timeline=control.timeline, lsn=control.checkpoint_lsn,
        segment_bytes=control.wal_segment_bytes, deadline_s=deadline_s)
    if not checkpoint.is_shutdown_checkpoint:
        raise PostgresError(f"record at {format_lsn(checkpoint.lsn)} is {checkpoint.desc[:40]!r}")
    try:
        before = await read_record(data_dir, bin_dir, timeline=control.timeline, lsn=checkpoint.prev_lsn,
                                   segment_bytes=control.wal_segment_bytes, deadline_s=until - trio.current_time())
    except PostgresTimeout:
        raise
    except PostgresError:
        before = None  # its segment is gone, so it is no switch of this shutdown
    end = record_end(checkpoint, segment_bytes=control.wal_segment_bytes, block_bytes=control.wal_block_bytes)
    published = before.lsn if before is not None and before.is_switch else checkpoint.lsn
    return ShutdownPositions(timeline=control.timeline, checkpoint_lsn=checkpoint.lsn, end_lsn=end, published_lsn=published)


def _extent(data_dir: Path, timeline: int, lsn: int, segment_bytes: int) -> tuple[int, int]:
    """Where to begin, and the end of the last segment file in an unbroken row from there.

    Begin is `lsn`, or the first later segment if only such are there for `timeline`. pg_waldump must not be let run past
    the last file: it waits 5 s for it to appear.
    """
    per_log = 2**32 // segment_bytes
    names = (path.name for path in (data_dir / "pg_wal").glob(f"{timeline:08X}" + "[0-9A-F]" * 16))
    wanted = lsn // segment_bytes
    present = {number for name in names if (number := int(name[8:16], 16) * per_log + int(name[16:], 16)) >= wanted}
    if not present:
        raise PostgresError(f"no WAL of timeline {timeline} from {format_lsn(lsn)} on in {data_dir}")
    first = last = min(present)
    while last + 1 in present:
        last += 1
    return max(lsn, first * segment_bytes), (last + 1) * segment_bytes


async def end_of_wal(control: ControlData, data_dir: Path, bin_dir: Path | str, *, timeline: int, from_lsn: int,
                     deadline_s: float) -> int:
    """End of the valid WAL of a stopped or crashed server: what crash recovery would replay up to.

    Every record from `from_lsn` (the redo LSN of pg_control) is read and verified. The last good one is found in
    pg_waldump's message about the first bad one; if all are good to the end of the files, there is no message, and the
    last records are listed. `timeline` may have begun after `from_lsn` (a crash soon after a promotion): reading then
    begins with its first segment, for what is before was replayed already.
    """
    until = trio.current_time() + deadline_s
    segment_bytes = control.wal_segment_bytes
    begin, stop = _extent(data_dir, timeline, from_lsn, segment_bytes)
    bound = f"--end={format_lsn(stop)}"
    quiet = await _dump(data_dir, bin_dir, timeline, begin, bound, "--quiet", deadline_s=deadline_s)
    bad = _LAST_READ.search(quiet.stderr)
    if bad is not None:
        last = await read_record(
            data_dir, bin_dir, timeline=timeline, lsn=parse_lsn(bad[1]), segment_bytes=segment_bytes,
            deadline_s=until - trio.current_time())
        return record_end(last, segment_bytes=segment_bytes, block_bytes=control.wal_block_bytes)
    # One record may fill segments; the second attempt reads them all, as for pg_waldump 13 and 14 without --quiet.
    near = max(begin, stop - 2 * segment_bytes) if quiet.exit_code == 0 else begin
    for start in dict.fromkeys((near, begin)):
        listed = await _dump(data_dir, bin_dir, timeline, start, bound, deadline_s=until - trio.current_time())
        if records := list(_RECORD.finditer(listed.stdout)):
            return record_end(_record(records[-1]), segment_bytes=segment_bytes, block_bytes=control.wal_block_bytes)
    if "could not find a valid record" in listed.stderr:
        return begin  # not one record has been written
    raise CommandFailed("pg_waldump", listed.exit_code, listed.stderr)

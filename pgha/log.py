"""Logging: an event and its facts, one line each, to standard error.

    log.info("promoted", timeline=8, took_s=1.2)   →   … INFO promoted timeline=8 took_s=1.2

Where standard error is the journal, each line begins with its priority ("<3>", sd-daemon(3)) and has no time: it has its own.
Values whose key looks like a secret are never written, whatever they are.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
from typing import Any, TextIO

from pgha.systemd import journal_listens, with_priority

_SECRET = re.compile(r"passw|secret|token|private", re.IGNORECASE)
#: Credentials inside connection strings and URLs, whoever put them into a text.
#: conninfo (spaces around "=", quotes doubled or escaped), JSON and repr, headers.
_EMBEDDED = re.compile(
    r"""(passw(?:or)?d["']?\s*[=:]\s*)(?:'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|[^\s&,}]+)"""
    r"""|(authorization["']?\s*[:=]\s*["']?(?:basic|bearer)?\s*)[^\s"',]+""",
    re.IGNORECASE)
#: URLs; a password may hold "/" and "@". Whether there is an "@" at all is looked at afterwards: looking for the last one
#: here would take a time that is quadratic in a text without any.
_IN_URL = re.compile(r"""(://[^:/@\s]*:)([^\s"']+)""")
#: More of a text is neither written nor looked through; who needs a whole value finds it where it came from.
LONGEST_TEXT = 8192


def scrub(text: str) -> str:
    """`text` without passwords in conninfo strings or URLs."""
    return _EMBEDDED.sub(lambda m: f"{m[1] or m[2]}***", _IN_URL.sub(_without_password, text))


def _without_password(url: re.Match[str]) -> str:
    _, at, rest = url[2].rpartition("@")
    return f"{url[1]}***@{rest}" if at else url[0]


def _clean(value: Any) -> Any:
    """`value` without what a key calls secret, and without credentials inside texts, however deep."""
    if isinstance(value, dict):
        return {k: "***" if _SECRET.search(str(k)) else _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return _bounded(value) if isinstance(value, str) else value


def _bounded(text: str) -> str:
    """`text` scrubbed, and not longer than anybody reads."""
    more = len(text) - LONGEST_TEXT
    if more <= 0:
        return scrub(text)
    head = text[:LONGEST_TEXT]
    url = head.rfind("://") + 3
    if url >= 3 and not re.search(r"\s", head[url:]):
        head = head[:url]       # its "@" may be in what is left out: half a URL is not recognised as one with a password
    return f"{scrub(head)}… ({more} characters more)"


def _traceback(text: str) -> str:
    """Its end says what happened."""
    if len(text) <= 2 * LONGEST_TEXT:
        return scrub(text)
    return _bounded(text) + "\n" + scrub(text[-LONGEST_TEXT:].partition("\n")[2])


def _printable(text: str) -> str:
    """Without control characters: what others wrote cannot begin a line of its own, nor speak to a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        value = round(value, 3)
    text = _bounded(str(value))
    return json.dumps(text) if not text or not text.isprintable() or re.search(r'[\s"=]', text) else text


class Log:
    """A named logger whose calls take an event and facts."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **facts: Any) -> None:
        self._emit(logging.DEBUG, event, facts)

    def info(self, event: str, /, **facts: Any) -> None:
        self._emit(logging.INFO, event, facts)

    def warning(self, event: str, /, **facts: Any) -> None:
        self._emit(logging.WARNING, event, facts)

    def error(self, event: str, /, **facts: Any) -> None:
        self._emit(logging.ERROR, event, facts)

    def exception(self, event: str, /, **facts: Any) -> None:
        """With the traceback of the exception being handled."""
        self._emit(logging.ERROR, event, facts, exc_info=True)

    def _emit(self, level: int, event: str, facts: dict[str, Any], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            clean = _clean(facts)
            self._logger.log(level, "%s", _bounded(event), extra={"facts": clean}, exc_info=exc_info)


class PlainFormatter(logging.Formatter):
    """Time, level, event, key=value. `timed`: False where whoever reads the lines notes their time."""

    default_msec_format = "%s.%03d"

    def __init__(self, *, timed: bool = True) -> None:
        super().__init__()
        self._timed = timed

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        tail = "".join(f" {k}={_format_value(v)}" for k, v in facts.items())
        line = f"{self.formatTime(record) + ' ' if self._timed else ''}{record.levelname} {_printable(_bounded(record.getMessage()))}{tail}"
        if record.exc_info:
            line += "\n" + _traceback(self.formatException(record.exc_info))
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, static: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._static = static or {}

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        out = {"time": self.formatTime(record), "level": record.levelname, "event": _bounded(record.getMessage()), **self._static}
        out.update({k: v if isinstance(v, (int, float, bool)) or v is None else _bounded(str(v)) for k, v in facts.items()})
        if record.exc_info:
            out["traceback"] = _traceback(self.formatException(record.exc_info))
        return json.dumps(out, ensure_ascii=False)


class JournalFormatter(logging.Formatter):
    """Another's lines, each with the priority that `journalctl -p` goes by."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return with_priority(self._inner.format(record), record.levelname)


class Writer(logging.Handler):
    """Lines to a descriptor by a thread of its own: a journal that hangs or a pipe that nobody reads loses lines, no time.

    (The loop and the lock's renewal log, too: a write that blocks would end a healthy primary.)
    """

    #: What is queued at the process's end has this long to be written.
    FLUSH_S = 1.0

    def __init__(self, descriptor: int, *, max_lines: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(max_lines)
        self._lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                self._lines.put_nowait(self._said_lost())
                self._lost = 0
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1

    def _said_lost(self) -> str:
        return self.format(logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "msg": "lines of the log were lost", "facts": {"lines": self._lost}}))

    def resize(self, max_lines: int) -> None:
        with self._lines.mutex:
            self._lines.maxsize = max_lines

    def flush(self) -> None:
        """Called at the process's end (logging.shutdown)."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, self.FLUSH_S)

    def _write(self) -> None:
        while True:
            left = (self._lines.get() + "\n").encode(errors="backslashreplace")
            try:
                while left:
                    left = left[os.write(self._descriptor, left):]
            except OSError:
                pass        # nobody reads it, or no space: there is nowhere to say so
            self._lines.task_done()


_own_levels: set[str] = set()     # loggers that the last set_up has given a level of their own
_writers: list[Writer] = []     # one a process: a reload goes on with it


def _writer(max_lines: int) -> Writer:
    if not _writers:
        _writers.append(Writer(2, max_lines=max_lines))
    _writers[0].resize(max_lines)
    return _writers[0]


def set_up(*, level: str = "INFO", form: str = "plain", loggers: dict[str, str] | None = None,
           static: dict[str, Any] | None = None, stream: TextIO | None = None, max_lines: int | None = None) -> None:
    """Configure the root logger anew. `form`: "plain" or "json". `stream`: instead of standard error.

    `max_lines`: the caller must not wait for whoever reads the log; so many lines are kept for them, more are counted.
    """
    handler: logging.Handler = logging.StreamHandler(stream or sys.stderr) if max_lines is None else _writer(max_lines)
    journal = stream is None and journal_listens(os.environ)
    formatter = JsonFormatter(static) if form == "json" else PlainFormatter(timed=not journal)
    handler.setFormatter(JournalFormatter(formatter) if journal else formatter)
    for name in _own_levels:
        logging.getLogger(name).setLevel(logging.NOTSET)
    _own_levels.clear()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for name, wanted in (loggers or {}).items():
        logging.getLogger(name).setLevel(wanted)
        _own_levels.add(name)

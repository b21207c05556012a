"""`pgha config import patroni.yml`: a Patroni configuration as pgha.toml, and what became of each key.

The report goes to standard output, what needs attention to standard error, the configuration only into its file, which
nobody else may read: no password is ever printed. What is written has been read by `load` before, so that `pgha config
check` takes it; what it would not take is not written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import tomli_w

from pgha.config.convert import Conversion, Fate, convert
from pgha.config.environment import WHOLE
from pgha.config.load import load
from pgha.config.patroni_file import read_patroni
from pgha.config.values import printable
from pgha.errors import ConfigError, Refused

_EXPLAINED = {
    Fate.CHANGED: "changed, so that it means the same here",
    Fate.DROPPED: "dropped, since it has no meaning here",
    Fate.MISSING: "MISSING: not supported by this version, and left out",
}


def import_patroni(
    where: str | None, output: str, environ: Mapping[str, str], *,
    accept_missing: bool = False, force: bool = False, dry_run: bool = False,
    say: Callable[[str], None], warn: Callable[[str], None],
) -> None:
    """Read `where` (None: PATRONI_CONFIGURATION), report with `say` and `warn`, write `output`. Raises Refused, ConfigError."""
    if output == "-":
        raise ConfigError("--output: is -; allowed: a file, since passwords are in it (--dry-run shows the report alone)")
    target = Path(output)
    if not force and not dry_run and os.path.lexists(target):
        raise Refused(f"{output} is there already; nothing was written (--force replaces it)")
    conversion = convert(read_patroni(where, environ))
    for line in conversion.lines:
        say(str(line))
    say(", ".join(f"{len(conversion.of(fate))} {fate.value}" for fate in Fate))
    for note in conversion.notes:
        say(f"note     {note}")
    missing = [line.key for line in conversion.of(Fate.MISSING)]
    named = f"{len(missing)} key{'s are' if len(missing) != 1 else ' is'} not supported by this version: {', '.join(missing)}"
    if missing and not accept_missing:
        raise Refused(f"{named}. Nothing was written; --accept-missing writes the configuration without them")
    text = _text(where or "PATRONI_CONFIGURATION", conversion)
    for warning in _checked(text, output):
        warn(f"warning: {warning}")
    if missing:
        warn(f"left out, as accepted: {named}")
    if dry_run:
        say(f"{output}: not written, as asked; `pgha config check` would take it")
        return
    _write(text, target, force=force)
    say(f"{output}: written, for its owner alone (mode 0600); `pgha config check {output}` takes it")


def _text(source: str, conversion: Conversion) -> str:
    """The file: first what differs from Patroni's, as comments, since comments are all that a later reader has."""
    lines = [f"# Made from {printable(source)} by `pgha config import`. What is not here as it was there:"]
    for fate, explained in _EXPLAINED.items():
        if of_it := conversion.of(fate):
            lines += ["#", f"# {explained}:", *(f"#   {printable(str(line)[9:])}" for line in of_it)]
    lines += [part for note in conversion.notes for part in ("#", f"# {note}")]
    if not any(line.fate is not Fate.CARRIED for line in conversion.lines):
        lines[0] = f"# Made from {printable(source)} by `pgha config import`. Every key is here as it was there."
    return "\n".join(lines) + "\n\n" + tomli_w.dumps(conversion.raw)


def _checked(text: str, output: str) -> tuple[str, ...]:
    """Warnings of `load`. What it refuses is a ConfigError in the name of the file that is not to be."""
    try:
        warnings = load(output, {WHOLE: text}).warnings
    except ConfigError as error:
        problems = [problem.replace(f"environment {WHOLE}", output) for problem in error.problems]
        raise ConfigError(*problems, "pgha would not start with this; nothing was written") from None
    return tuple(warning.replace(f"environment {WHOLE}", output) for warning in warnings)


def _write(text: str, target: Path, *, force: bool) -> None:
    """Whole or not at all, with mode 0600 from the first byte on; without `force` never over another file."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # 0600
        beside = Path(name)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  (a descriptor)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if force:
                beside.replace(target)
            else:
                os.link(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except FileExistsError:
        raise Refused(f"{target} is there already; nothing was written (--force replaces it)") from None
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); allowed: a file in a directory that this user may write") from None

"""`ctl history`: each timeline that ended, where, and who led the next."""

from __future__ import annotations

import argparse

from pgha.ctl import cluster as clusters
from pgha.ctl.ends import DONE
from pgha.ctl.output import Column, records, table
from pgha.ctl.settings import Settings

COLUMNS = (Column("TL", right=True), Column("LSN", right=True), Column("Reason"), Column("Timestamp"), Column("New Leader"))


def run(settings: Settings, given: argparse.Namespace) -> int:
    history = clusters.read_or_ask(settings, more="history").history
    rows = [dict(zip((c.name for c in COLUMNS), row, strict=False)) for row in history]
    print(table(COLUMNS, rows) if given.format in ("table", "pretty") else records(COLUMNS, rows, given.format, toml_name="history"))
    return DONE

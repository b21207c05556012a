"""`ctl dsn`: where is the PostgreSQL of a member, as a connection string without user and password?"""

from __future__ import annotations

import argparse

from pgha.ctl import cluster as clusters
from pgha.ctl.ends import DONE
from pgha.ctl.member import meant, one_option
from pgha.ctl.settings import Settings


def run(settings: Settings, given: argparse.Namespace) -> int:
    one_option(given)
    member = meant(clusters.read_or_ask(settings), given)[0]
    print(f"host={member['host']} port={member['port']}")
    return DONE

"""`ctl show-config`: the cluster's dynamic configuration, as TOML unless asked otherwise."""

from __future__ import annotations

import argparse
import json

from pgha.ctl import cluster as clusters
from pgha.ctl.ends import DONE, FAILED, End
from pgha.ctl.output import to_toml
from pgha.ctl.settings import Settings


def run(settings: Settings, given: argparse.Namespace) -> int:
    config = clusters.read_or_ask(settings, more="config").config
    if config is None:
        raise End(FAILED, "there is no configuration in the store (or it is not a JSON object)")
    print(to_toml(config) if given.format == "toml" else json.dumps(config, indent=2))
    return DONE

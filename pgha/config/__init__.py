"""What the operator wants: this node's file (`pgha.toml`, PGHA_*), and the cluster's shared part in the store.

    values.py lists.py addresses.py    one value: durations, sizes, booleans, secrets; several; host:port
    schema.py    a table against a Struct: every mistake in one run, each with file, key, remedy
    local.py     this node's keys         cluster.py   the shared keys (`/config`)       gucs.py  what pgha sets itself
    rules.py     what depends on several keys
    environment.py  PGHA_* variables      load.py      files + environment → Loaded; Loaded + `/config` → Effective
    check.py sample.py   `pgha config check`, `pgha config sample`
    patroni_file.py convert.py takeover.py   `pgha config import`: what a Patroni file says, what becomes of each key, the command
    directories.py state.py   where runtime and state files are, and the few facts that outlive an agent

Only msgspec and the standard library are needed, so that `pgha config check` works on any machine (`import` needs
tomli_w and PyYAML, too).
"""

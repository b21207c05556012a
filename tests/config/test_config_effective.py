"""The layers: built-in < /config < the node's file < environment, with the exceptions that the spec names."""

from __future__ import annotations

from config_samples import GOOD, changed, loaded

from pgha.config.load import effective


def test_what_no_layer_says_is_built_in(tmp_path):
    result = effective(loaded(tmp_path, GOOD).local, None)
    assert result.problems == ()
    assert (result.settings.ttl_s, result.settings.loop_wait_s, result.settings.primary_hang_timeout_s) == (30, 10, 29)
    assert (result.settings.postgres_host, result.settings.postgres_port, result.settings.has_bootstrap_section) == ("10.0.0.1", 5432, True)
    assert result.use_slots


def test_a_nodes_keys_win_and_parameters_merge(tmp_path):
    raw = changed("postgresql.parameters", {"work_mem": "8MB", "max_connections": 500, "Shared_Buffers": "1GB"}, changed("postgresql.use_pg_rewind", False))
    dynamic = {"postgresql": {
        "use_pg_rewind": True, "pg_hba": ["local all all trust"], "pg_ctl_timeout": "2min", "use_slots": False, "data_dir": "/wrong",
        "parameters": {"work_mem": "4MB", "max_connections": 60, "max_worker_processes": 1, "jit": False, "shared_buffers": "2GB"}}}
    result = effective(loaded(tmp_path, raw).local, dynamic)
    postgresql = result.postgresql
    assert postgresql.parameters == {"max_connections": 60, "jit": False, "work_mem": "8MB", "Shared_Buffers": "1GB"}
    assert (postgresql.use_pg_rewind, result.settings.use_pg_rewind) == (False, False)
    assert postgresql.pg_hba == ("local all all trust",)
    assert postgresql.pg_ctl_timeout_s == 120
    assert postgresql.data_dir == "/srv/pg/data"
    assert not result.use_slots
    assert not result.settings.use_slots
    assert [p.partition(";")[0] for p in result.problems] == [
        "/config: postgresql.data_dir: is known only to the node itself", "/config: postgresql.parameters.max_worker_processes: is 1, below the minimum"]


def test_lists_replace(tmp_path):
    local = loaded(tmp_path, changed("postgresql.pg_hba", ["local all all peer"])).local
    assert effective(local, {"postgresql": {"pg_hba": ["x"], "pg_ident": ["y"]}}).postgresql.pg_hba == ("local all all peer",)
    assert effective(local, {"postgresql": {"pg_ident": ["y"]}}).postgresql.pg_ident == ("y",)


def test_a_patroni_among_the_members_raises_ttl(tmp_path):
    local = loaded(tmp_path, GOOD).local
    dynamic = {"ttl": 5, "loop_wait": 1, "retry_timeout": 1}
    assert effective(local, dynamic).settings.ttl_s == 5
    assert effective(local, dynamic, patroni_member_present=True).settings.ttl_s == 20


def test_tags_and_watchdog_are_the_nodes(tmp_path):
    local = loaded(tmp_path, changed("tags", {"nofailover": True}, changed("watchdog.mode", "required", changed("bootstrap", None)))).local
    settings = effective(local, {"tags": {}, "watchdog": {"mode": "off"}}).settings
    assert (settings.tags.nofailover, settings.watchdog_required, settings.has_bootstrap_section) == (True, True, False)

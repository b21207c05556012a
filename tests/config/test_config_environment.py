"""PGHA_… variables: every key has one, they win over the file, and a misspelt one is an error."""

from __future__ import annotations

import pytest
import tomli_w
from config_samples import GOOD, changed, loaded, problems

from pgha.config.environment import variables
from pgha.config.load import load


def test_names_are_the_references_with_another_prefix():
    known = set(variables())
    assert known >= {"PGHA_" + name for name in (
        "NAME", "NAMESPACE", "SCOPE", "LOG_TYPE", "LOG_LEVEL", "LOG_LOGGERS", "LOG_STATIC_FIELDS",
        "RESTAPI_LISTEN", "RESTAPI_CONNECT_ADDRESS", "RESTAPI_USERNAME", "RESTAPI_PASSWORD", "RESTAPI_CERTFILE", "RESTAPI_KEYFILE",
        "RESTAPI_KEYFILE_PASSWORD", "RESTAPI_CAFILE", "RESTAPI_CIPHERS", "RESTAPI_VERIFY_CLIENT", "RESTAPI_ALLOWLIST",
        "RESTAPI_HTTP_EXTRA_HEADERS", "RESTAPI_HTTPS_EXTRA_HEADERS", "RESTAPI_REQUEST_QUEUE_SIZE", "RESTAPI_SERVER_TOKENS",
        "CTL_USERNAME", "CTL_PASSWORD", "CTL_INSECURE", "CTL_CACERT", "CTL_CERTFILE", "CTL_KEYFILE", "CTL_KEYFILE_PASSWORD",
        "POSTGRESQL_LISTEN", "POSTGRESQL_CONNECT_ADDRESS", "POSTGRESQL_PROXY_ADDRESS", "POSTGRESQL_CONFIG_DIR", "POSTGRESQL_DATA_DIR", "POSTGRESQL_PGPASS",
        "POSTGRESQL_BIN_DIR", "ETCD3_HOST", "ETCD3_HOSTS", "ETCD3_URL", "ETCD3_PROTOCOL", "ETCD3_USERNAME", "ETCD3_PASSWORD",
        "ETCD3_CACERT", "ETCD3_CERT", "ETCD3_KEY", "STATE_DIR", "RUNTIME_DIR",
        *(f"{user}_{key}" for user in ("SUPERUSER", "REPLICATION", "REWIND") for key in (
            "USERNAME", "PASSWORD", "PASSWORD_FILE", "SSLMODE", "SSLKEY", "SSLPASSWORD", "SSLCERT", "SSLROOTCERT", "SSLCRL", "SSLCRLDIR", "SSLNEGOTIATION",
            "GSSENCMODE", "CHANNEL_BINDING")),
    )}
    assert "PGHA_CACHE" not in known


@pytest.mark.parametrize(("variable", "text", "attribute", "means"), [
    ("PGHA_NAME", "n9", "name", "n9"),
    ("PGHA_POSTGRESQL_PG_CTL_TIMEOUT", "2min", "postgresql.pg_ctl_timeout_s", 120.0),
    ("PGHA_POSTGRESQL_USE_UNIX_SOCKET", "on", "postgresql.use_unix_socket", True),
    ("PGHA_RESTAPI_ALLOWLIST", "10.0.0.0/8, a", "restapi.allowlist", ("10.0.0.0/8", "a")),
    ("PGHA_RESTAPI_ALLOWLIST", '["10.0.0.0/8"]', "restapi.allowlist", ("10.0.0.0/8",)),
    ("PGHA_RESTAPI_HTTP_EXTRA_HEADERS", '{"X-A": "1"}', "restapi.http_extra_headers", {"X-A": "1"}),
    ("PGHA_LOG_LOGGERS", '{"pgha.dcs" = "DEBUG"}', "log.loggers", {"pgha.dcs": "DEBUG"}),
    ("PGHA_TAGS", '{"nofailover": true}', "tags.nofailover", True),
    ("PGHA_BOOTSTRAP_INITDB", "data-checksums,encoding=UTF8", "bootstrap.initdb", (("data-checksums", None), ("encoding", "UTF8"))),
    ("PGHA_BOOTSTRAP_INITDB", '[{encoding = "UTF8"}]', "bootstrap.initdb", (("encoding", "UTF8"),)),
    ("PGHA_ETCD3_HOST", "other:1", "etcd3.endpoints", ("http://other:1",)),
    ("PGHA_ETCD3_URL", "https://other:1", "etcd3.endpoints", ("https://other:1",)),
])
def test_a_variable_wins_over_the_file(tmp_path, variable, text, attribute, means):
    result = loaded(tmp_path, GOOD, {variable: text, "HOME": "/", "PGHACTL_X": "1", "PGHA_CACHE": "/tmp/x"})
    got = result.local
    for part in attribute.split("."):
        got = getattr(got, part)
    assert got == means
    assert result.consumed_env == {variable}


def test_a_password_from_the_environment_replaces_a_password_file(tmp_path):
    raw = changed("postgresql.authentication.superuser", {"username": "postgres", "password_file": "/nowhere"})
    local = loaded(tmp_path, raw, {"PGHA_SUPERUSER_PASSWORD": "hush"}).local
    assert local.postgresql.authentication.superuser.password.reveal() == "hush"


def test_a_section_may_come_from_the_environment_alone(tmp_path):
    local = loaded(tmp_path, changed("etcd3", None), {"PGHA_ETCD3_HOSTS": "a:1,b:2"}).local
    assert local.etcd3.endpoints == ("http://a:1", "http://b:2")


def test_a_whole_configuration_replaces_the_file(tmp_path):
    result = load(tmp_path / "nowhere", {"PGHA_CONFIGURATION": tomli_w.dumps(GOOD), "PGHA_NAME": "n2"})
    assert (result.local.scope, result.local.name) == ("demo", "n2")
    assert result.consumed_env == {"PGHA_CONFIGURATION", "PGHA_NAME"}


@pytest.mark.parametrize(("variable", "text", "line"), [
    ("PGHA_SCOPPE", "hush", "environment: PGHA_SCOPPE: unknown variable; did you mean PGHA_SCOPE?"),
    ("PGHA_QXJZW", "hush", "environment: PGHA_QXJZW: unknown variable; allowed: PGHA_ and a key's path in capitals"),
    ("PGHA_POSTGRESQL_PG_CTL_TIMEOUT", "soon", 'environment PGHA_POSTGRESQL_PG_CTL_TIMEOUT: postgresql.pg_ctl_timeout: is "soon", not a number'),
    ("PGHA_TAGS", "nofailover", 'environment: PGHA_TAGS: is no table; allowed: a table as TOML, {key = "value"}, or JSON'),
    ("PGHA_TAGS", "{hush", "environment: PGHA_TAGS: is neither TOML nor JSON; allowed: a table as TOML or JSON"),
    ("PGHA_BOOTSTRAP_INITDB", "[hush", "environment: PGHA_BOOTSTRAP_INITDB: is neither TOML nor JSON; allowed: a list as TOML or JSON"),
    ("PGHA_REPLICATION_SSLPASSWORD", "hush", "environment PGHA_REPLICATION_SSLPASSWORD: postgresql.authentication.replication.sslpassword: is not supported, since"),
    ("PGHA_RESTAPI_HTTP_EXTRA_HEADERS", '{"X-A": "hush\\r\\nX-B: 1"}', "environment PGHA_RESTAPI_HTTP_EXTRA_HEADERS: restapi.http_extra_headers: has a character in X-A that is no printable ASCII"),
    ("PGHA_RESTAPI_HTTPS_EXTRA_HEADERS", '{"Content-Length": "5"}', "environment PGHA_RESTAPI_HTTPS_EXTRA_HEADERS: restapi.https_extra_headers: has Content-Length, which pgha sets itself"),
    ("PGHA_SUPERUSER_PASSWORD", "", "environment PGHA_SUPERUSER_PASSWORD: postgresql.authentication.superuser.password: is empty; allowed: text"),
])
def test_is_refused(tmp_path, variable, text, line):
    (found,) = problems(tmp_path, GOOD, {variable: text})
    assert found.startswith(line)
    assert "hush" not in found

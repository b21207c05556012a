"""A cluster behind locks: who has the key is served, who has not is refused, named once and changes nothing; no secret gets out."""

import base64
import json
import re
import signal
import subprocess
import tomllib

import pytest
import tomli_w
from patronictl import PatroniCtl
from secured import DOORS, ETCD_PASSWORD, KEY_PASSPHRASE, REST_PASSWORD, LockedBed, Spy

from pgha.demo.processes import CLEAN_ENVIRONMENT, as_user

pytestmark = pytest.mark.cluster

DONE, FAILED, USAGE, REFUSED, UNKNOWN, UNREACHABLE = range(6)
NO_PASSWORD: dict[str, str] = {}
WRONG = {"Authorization": "Basic " + base64.b64encode(b"admin:hush-wrong-guess").decode()}
#: node, certificate, source address, headers → status (None: no TLS connection), and how the log calls it
REFUSALS = [
    ("n1", "client", "", WRONG, 401, "not authenticated"),
    ("n1", "client", "", NO_PASSWORD, 401, "no auth header received"),
    ("n1", "", "", None, 403, "client certificate required"),
    ("n1", "expired", "", None, None, "its client certificate is not accepted: certificate has expired"),
    ("n1", "foreign", "", None, None, "its client certificate is not accepted: unable to get local issuer certificate"),
    ("n2", "client", "", WRONG, 401, "not authenticated"),
    ("n2", "expired", "", None, None, "its client certificate is not accepted: certificate has expired"),
    ("n2", "", "", None, None, "it shows no client certificate"),
    ("n3", "", "", None, 403, "Access is denied"),
    ("n3", "", "127.0.0.2", WRONG, 401, "not authenticated"),
]
READ = ["/", "/patroni", "/cluster", "/config", "/history", "/metrics", "/failsafe", "/liveness", "/pgha/decision", "/pgha/observation"]


@pytest.fixture(scope="module")
def locked(program, bench, all_beds):
    all_beds.end()
    from pgha.demo.node import FAST
    from pgha.demo.programs import find_etcd, find_postgres
    bed = LockedBed(bench / "locked", program, etcd_program=find_etcd(), bin_dir=find_postgres(), user="postgres", profile=FAST)
    secrets = {bed.settings.password, "hush-"}      # all others begin with it
    try:
        with Spy(secrets) as spy:
            bed.start()
            bed.wait_healthy(90)
            yield bed, spy
    finally:
        bed.close()


def ctl(bed, *arguments, config=None):
    program = bed.settings.program
    done = subprocess.run([*program.argv, "ctl", "-c", str(config or bed.nodes[0].config_path), *arguments], capture_output=True, text=True, timeout=120,
                          check=False, cwd="/", env={**CLEAN_ENVIRONMENT, **program.environment}, **as_user("postgres"))
    print(f"ctl {' '.join(arguments)} → {done.returncode}\n{done.stdout}{done.stderr}")
    assert "hush-" not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def refused_lines(node, why):
    return [line for line in node.log_path.read_text().splitlines() if "REST client refused" in line and why in line]


def state(bed):
    """Everything that a change would have changed."""
    return {
        "config": bed.etcd.get(bed.key("config")), "failover": bed.etcd.get(bed.key("failover")),
        "postmasters": [node.postmaster() for node in bed.nodes], "leader": bed.leader(),
    }


def test_who_has_no_key_is_refused_named_once_and_changes_nothing(locked):
    bed, _ = locked
    before = state(bed)
    for name, certificate, source, headers, status, why in REFUSALS:
        node = bed.node(name)
        known = len(refused_lines(node, why))
        for method, path, body in (("POST", "/restart", {}), ("PATCH", "/config", {"ttl": 20}), ("POST", "/switchover", {"leader": "n1", "candidate": "n2"})):
            answer = node.request(method, path, body, certificate=certificate, source=source, headers=headers)
            assert (answer.status if answer else None) == status, (name, certificate, source, method)
        assert len(refused_lines(node, why)) - known <= 1, why      # three times refused, once said
        assert len(refused_lines(node, why)) == 1, why
    assert state(bed) == before
    # reading is open but where the handshake itself demands a certificate
    assert [bed.node(name).request("GET", "/patroni", certificate="", headers={}) is not None for name in DOORS] == [True, False, True]
    # who has the keys comes in
    for name in DOORS:
        assert bed.node(name).request("PATCH", "/config", {"pgha_test": None}, source="127.0.0.2").status == 200


def test_a_member_may_where_members_are_allowed(locked):
    bed, _ = locked
    n3 = bed.node("n3")
    for node in bed.nodes:
        bed.wait(lambda node=node: (n3.request("PATCH", "/config", {"pgha_test": None}, certificate="", source=node.address) or (0,))[0] == 200, 10,
                 f"{node.name}'s address is allowed at n3")
    # a member's key with what is no name at all ends nobody: no agent that allows members, and none that asks it or copies from it
    bad = {"api_url": "https://node9..example.com:8008/patroni", "conn_url": "postgres://node9..example.com:5432/postgres", "state": "running", "role": "replica",
           "version": "4.1.4", "timeline": 1, "tags": {"clonefrom": True}}
    assert bed.etcd.put(bed.key("members/n9"), json.dumps(bad).encode())
    try:
        bed.wait(lambda: "a name cannot be resolved" in n3.log_path.read_text(), 20, "the name without an address is named")
        replica = next(node for node in (bed.node("n2"), bed.node("n1")) if node is not bed.leader())
        assert replica.request("POST", "/reinitialize", {}).status == 200
        bed.wait(lambda: replica.patroni().get("replication_state") != "streaming", 20, "it is copied anew")
        bed.wait(lambda: replica.patroni().get("replication_state") == "streaming", 60, "from another, in the end")
        assert [node.ended_by_itself for node in bed.nodes] == [None] * 3
    finally:
        bed.etcd.delete(bed.key("members/n9"))


def test_ctl_has_the_same_keys(locked, tmp_path_factory):
    bed, _ = locked
    code, out, _ = ctl(bed, "list", "-f", "json")
    assert code == DONE
    assert {row["Member"] for row in json.loads(out)} == set(DOORS)
    leader = bed.leader()
    target = next(n for n in bed.nodes if n is not leader)
    assert ctl(bed, "switchover", "--candidate", target.name, "--force")[0] == DONE
    bed.wait_healthy(30)
    bad = bed.directory / "bad.toml"
    text = bed.nodes[0].config_path.read_text()
    for old, new, command, code, said in (
        (r'(\[ctl\.authentication\]\nusername = "admin"\n)password_file = .*', r'\1password = "hush-guess"', ("reload", "demo", "--force"), REFUSED, "not authenticated"),
        (r"(cert(?:file)?) = .*/client\.crt\"", rf'\1 = "{bed.authority.place}/expired.crt"', ("list",), UNREACHABLE, ""),
        (r'password_file = .*/etcd\.password"', 'password = "hush-guess"', ("list",), None, "etcd"),
    ):
        changed, count = re.subn(old, new, text)
        assert count, old
        if "expired" in new:
            changed = changed.replace("client.key", "expired.key")
        bad.write_text(changed)
        bad.chmod(0o600)
        bed.nodes[0]._give(bad)
        ended, out, err = ctl(bed, *command, config=bad)
        assert ended != DONE
        assert code is None or ended == code, err
        assert said in out + err


def test_patronictl_has_the_same_keys(locked):
    """The real one, with the same files in a configuration as Patroni's users have it."""
    bed, _ = locked
    place = bed.authority.place

    def with_keys(*, password=REST_PASSWORD):
        return PatroniCtl(
            bed, etcd3={"hosts": list(bed.etcd.endpoints), "protocol": "https", "cacert": f"{place}/ca.crt", "cert": f"{place}/client.crt", "key": f"{place}/client.key",
                        "username": "pgha", "password": ETCD_PASSWORD},
            ctl={"cacert": f"{place}/ca.crt", "certfile": f"{place}/client.crt", "keyfile": f"{place}/client.key",
                 "authentication": {"username": "admin", "password": password}})

    patronictl = with_keys()
    old = bed.wait_healthy(30)
    assert patronictl.members()[old.name]["Role"] == "Leader"
    target = next(node for node in bed.nodes if node is not old and not node.patroni().get("tags"))
    assert f'Successfully switched over to "{target.name}"' in patronictl("switchover", "--force", "--candidate", target.name)
    bed.wait_healthy(30)
    assert "Success: cluster management is paused" in patronictl("pause", "--wait")
    assert "Success: cluster management is resumed" in patronictl("resume", "--wait")
    assert patronictl("edit-config", "--force", "-q", "-s", "pgha_test=1") == "Configuration changed\n"
    patronictl("edit-config", "--force", "-q", "-s", "pgha_test=null")
    out = with_keys(password="hush-guess")("reload", bed.settings.scope, target.name, "--force")
    assert f"Failed: reload for member {target.name}, status code=401, (not authenticated)" in out
    assert f"Reload request received for member {target.name}" in patronictl("reload", bed.settings.scope, target.name, "--force")


def test_what_needs_another_start_is_not_half_taken(locked):
    """TLS away, other ports for the API and for PostgreSQL: all of it stays as it is, in what is published, asked for and looked at."""
    bed, _ = locked
    leader = bed.wait_healthy(30)

    def published():
        ((_, value, _),) = bed.etcd.get(bed.key(f"members/{leader.name}"))
        return json.loads(value)

    addresses = {key: published()[key] for key in ("api_url", "conn_url")}
    before = leader.config_path.read_text()
    raw = tomllib.loads(before)
    for key in ("certfile", "keyfile", "keyfile_password", "cafile", "verify_client", "ciphers"):
        raw["restapi"].pop(key, None)
    for section in ("restapi", "postgresql"):
        for key in raw[section].keys() & {"listen", "connect_address"}:
            host, _, port = raw[section][key].rpartition(":")
            raw[section][key] = f"{host}:{int(port) + 1}"
    try:
        leader.config_path.write_text(tomli_w.dumps(raw))
        leader.signal_agent(signal.SIGHUP)
        for key in ("restapi.listen", "restapi.certfile", "postgresql.listen"):
            bed.wait(lambda key=key: f"{key}: the change takes effect at the agent's next start" in leader.log_path.read_text(), 10, f"{key} is named")
        written = leader.ask("SELECT pg_switch_wal() - '0/0'")
        bed.wait(lambda: published()["xlog_location"] >= int(written), 20, "its PostgreSQL is still looked at")
        assert {key: published()[key] for key in addresses} == addresses
        assert leader.request("POST", "/reload", source="127.0.0.2").status == 202
        assert (leader.request("POST", "/reload", certificate="", source="127.0.0.2") or (403,))[0] in ((202,) if leader.name == "n3" else (403,))
    finally:
        leader.config_path.write_text(before)
        leader.signal_agent(signal.SIGHUP)
    assert bed.wait_healthy(30) is leader


def test_certificates_and_passwords_change_while_it_runs(locked):
    bed, _ = locked
    leader, member = bed.wait_healthy(30), bed.etcd.members[0]
    serials = {node.name: node.serial() for node in bed.nodes}
    epoch = leader.get("/pgha/decision").body
    for node in bed.nodes:
        bed.authority.issue(node.name, addresses=(node.address,), passphrase=KEY_PASSPHRASE)
    bed.authority.issue("client", subject="/O=pgha")
    bed.nodes[0].secret("etcd", ETCD_PASSWORD + "-2")
    bed.nodes[0].secret("rest", REST_PASSWORD + "-2")
    assert member.request("/v3/auth/user/changepw", {"name": "pgha", "password": ETCD_PASSWORD + "-2"}) is not None
    for node in bed.nodes:
        node.signal_agent(signal.SIGHUP)
    new = {"Authorization": "Basic " + base64.b64encode(f"admin:{REST_PASSWORD}-2".encode()).decode()}
    for node in bed.nodes:
        bed.wait(lambda node=node: node.serial() != serials[node.name], 10, f"{node.name} shows its new certificate")
        bed.wait(lambda node=node: node.request("POST", "/reload", headers=new, source="127.0.0.2").status == 202, 10, f"{node.name} takes the new password")
        assert node.request("POST", "/reload", source="127.0.0.2").status == 401
    # the store, too: a write that needs the new login, and no change of leader
    bed.wait(lambda: leader.request("PATCH", "/config", {"maximum_lag_on_failover": 2000000}, headers=new, source="127.0.0.2").status == 200, 10, "the store takes writes")
    assert bed.leader() is leader, epoch
    # what cannot be read changes nothing, and says so
    (bed.authority.place / f"{leader.name}.crt").write_text("no certificate\n")
    leader.signal_agent(signal.SIGHUP)
    bed.wait(lambda: "certificate not reloaded" in leader.log_path.read_text(), 10, "the agent says so")
    assert leader.request("POST", "/reload", headers=new, source="127.0.0.2").status == 202
    bed.authority.issue(leader.name, addresses=(leader.address,), passphrase=KEY_PASSPHRASE)


def test_a_failover_behind_locks_and_no_secret_anywhere(locked):
    bed, spy = locked
    leader = bed.wait_healthy(30)
    leader.kill_agent()
    leader.signal_postgres(signal.SIGKILL)
    new = bed.wait_leader(other_than=leader, timeout_s=30)
    leader.start_agent()
    bed.wait_healthy(60)
    assert new.ask("SELECT 1") == 1
    broken = bed.directory / "broken.toml"
    broken.write_text(bed.nodes[0].config_path.read_text().replace("[etcd3]", '[etcd3]\nnonsense = "hush-value"'))
    bed.nodes[0]._give(broken)
    program = bed.settings.program
    for arguments in (["run", str(broken)], ["config", "check", str(broken)]):
        done = subprocess.run([*program.argv, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd="/",
                              env={**CLEAN_ENVIRONMENT, **program.environment}, **as_user("postgres"))
        assert done.returncode == USAGE, done.stderr
        assert "nonsense" in done.stdout + done.stderr
        assert "hush-" not in done.stdout + done.stderr
    # what the API tells
    secrets = {bed.settings.password, "hush-"}
    for node in bed.nodes:
        for path in READ:
            answer = node.get(path)
            assert answer is not None, path
            assert not [s for s in secrets if s in json.dumps(answer.body)], path
    # what is in logs, and in the store
    logs = [path for path in bed.directory.rglob("*") if path.is_file() and path.suffix in (".log", ".json", ".csv")]
    assert len(logs) >= 7
    for log in logs:
        text = log.read_text(errors="replace")
        assert not [s for s in secrets if s in text], log
        assert "Traceback" not in text, log
    for key, value, _ in bed.etcd.get(bed.key("")) or []:
        assert not [s for s in secrets if s in value.decode()], key
    # who passed by in the process table meanwhile
    subprocess.run(["sh", "-c", "sleep 0.5; :", "hush-canary"], check=True, timeout=10)
    assert spy.looked > 100
    assert [line for line in spy.found if "hush-canary" in line], "the spy sees what stands in arguments"
    assert not [line for line in spy.found if "hush-canary" not in line]

"""A cluster whose every door is locked: etcd with TLS, client certificates and users; REST with TLS, certificates, passwords, allowlist.

Each node's REST API is locked in another way (`DOORS`); all of them want the password for changes.
"""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

from pgha.demo.bed import Bed
from pgha.demo.etcd import EtcdMember
from pgha.demo.node import Answer, Node
from pgha.demo.processes import CLEAN_ENVIRONMENT, spawn

#: node → restapi keys beside certificate and password
DOORS: dict[str, dict[str, Any]] = {
    "n1": {"verify_client": "optional"},
    "n2": {"verify_client": "required"},
    "n3": {"verify_client": "none", "allowlist": ["127.0.0.2/32"], "allowlist_include_members": True},
}
ROOT_PASSWORD = "hush-etcd-root"
ETCD_PASSWORD = "hush-etcd-pgha"
REST_PASSWORD = "hush-rest: admin"
KEY_PASSPHRASE = "hush-passphrase"


class Authority:
    """Certificates below `place`, all readable by `user` only. Serial numbers are as they come."""

    def __init__(self, place: Path, user: str) -> None:
        self.place = place
        self._user = user
        place.mkdir()
        self._openssl("req", "-x509", *self._key("ca"), "-out", "ca.crt", "-subj", "/CN=test ca", "-days", "2")
        self._openssl("req", "-x509", *self._key("other-ca"), "-out", "other-ca.crt", "-subj", "/CN=another ca", "-days", "2")
        self._own()

    def _openssl(self, *arguments: str, passphrase: str = "") -> None:
        """The passphrase, of which "env:PASSPHRASE" speaks, stands in no argument: a spy looks at those of all processes."""
        subprocess.run(["openssl", *arguments], cwd=self.place, check=True, capture_output=True, timeout=30, env={**CLEAN_ENVIRONMENT, "PASSPHRASE": passphrase})

    def _key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]

    def issue(self, name: str, *, subject: str = "", addresses: tuple[str, ...] = (), days: int = 2, ca: str = "ca", passphrase: str = "") -> Path:
        """NAME.crt and NAME.key, for both uses. Issued again, both are new.

        `subject`: of a client of etcd it must have no common name: with authentication on, etcd's gateway refuses one (400).
        """
        alternatives = ",".join(f"IP:{address}" for address in ("127.0.0.1", *addresses))
        (self.place / f"{name}.ext").write_text(f"subjectAltName={alternatives}\nextendedKeyUsage=serverAuth,clientAuth\n")
        self._openssl("req", *self._key(name), "-out", f"{name}.csr", "-subj", subject or f"/CN={name}")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", str(days),
                      "-extfile", f"{name}.ext", "-out", f"{name}.crt")
        if passphrase:
            self._openssl("ec", "-in", f"{name}.key", "-aes256", "-passout", "env:PASSPHRASE", "-out", f"{name}.key.new", passphrase=passphrase)
            (self.place / f"{name}.key.new").replace(self.place / f"{name}.key")
        self._own()
        return self.place / f"{name}.crt"

    def _own(self) -> None:
        for file in self.place.iterdir():
            file.chmod(0o600)
            shutil.chown(file, self._user, self._user)
        shutil.chown(self.place, self._user, self._user)

    def context(self, name: str = "", *, passphrase: str = "") -> ssl.SSLContext:
        """A client that trusts this authority, and shows the certificate of that name."""
        context = ssl.create_default_context(cafile=str(self.place / "ca.crt"))
        if name:
            context.load_cert_chain(self.place / f"{name}.crt", self.place / f"{name}.key", password=passphrase or None)
        return context


class LockedMember(EtcdMember):
    """etcd behind TLS with client certificates; its users come with `lock`."""

    authority: Authority
    token = ""

    def start(self, program: str, initial_cluster: str, token: str, user: str | None) -> None:
        place = self.authority.place
        client, peer = f"https://{self.endpoint}", f"http://{self.address}:{self.peer_port}"
        self.child = spawn(
            [program, "--name", self.name, "--data-dir", str(self.directory), "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", initial_cluster,
             "--initial-cluster-state", "new", "--initial-cluster-token", token,
             "--cert-file", str(place / "etcd.crt"), "--key-file", str(place / "etcd.key"), "--client-cert-auth", "--trusted-ca-file", str(place / "ca.crt")],
            log=self.log, directory=self.log.parent, user=user)

    def request(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        status, answer = self._post(path, body)
        if status != 200 and self.token:        # changes of users make tokens worthless
            self.token = str(self._post("/v3/auth/authenticate", {"name": "root", "password": ROOT_PASSWORD}, anonymous=True)[1].get("token", ""))
            status, answer = self._post(path, body)
        return answer if status == 200 else None

    def _post(self, path: str, body: dict[str, Any], *, anonymous: bool = False) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPSConnection(self.address, self.client_port, timeout=2, context=self.authority.context("client"))
        headers = {"Content-Type": "application/json", **({"Authorization": self.token} if self.token and not anonymous else {})}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            return 0, {}
        finally:
            connection.close()
        return response.status, answer if isinstance(answer, dict) else {}

    def lock(self, prefix: str) -> None:
        """A root, and a user `pgha` that may do everything below `prefix`, and no more; then authentication goes on."""
        start, end = base64.b64encode(prefix.encode()).decode(), base64.b64encode((prefix[:-1] + chr(ord(prefix[-1]) + 1)).encode()).decode()
        for path, body in (
            ("user/add", {"name": "root", "password": ROOT_PASSWORD}), ("user/grant", {"user": "root", "role": "root"}),
            ("role/add", {"name": "pgha"}), ("role/grant", {"name": "pgha", "perm": {"permType": "READWRITE", "key": start, "range_end": end}}),
            ("user/add", {"name": "pgha", "password": ETCD_PASSWORD}), ("user/grant", {"user": "pgha", "role": "pgha"}), ("enable", {}),
        ):
            assert self.request(f"/v3/auth/{path}", body) is not None, path
        self.token = "not yet"


class LockedNode(Node):
    authority: Authority

    def configuration(self) -> dict[str, Any]:
        raw, place = super().configuration(), self.authority.place
        users = raw["postgresql"]["authentication"]
        raw["postgresql"]["authentication"] = {
            name: {"username": user["username"], "password_file": str(self.secret(name, f"hush-{name}-{self.settings.password}"[:60] if name != "superuser" else user["password"]))}
            for name, user in users.items()}
        raw["postgresql"]["parameters"] |= {"log_statement": "all", "log_min_duration_statement": 0}     # what a careful, and careless, DBA sets
        raw["etcd3"] |= {"protocol": "https", "cacert": str(place / "ca.crt"), "cert": str(place / "client.crt"), "key": str(place / "client.key"),
                         "username": "pgha", "password_file": str(place / "etcd.password")}
        raw["restapi"] |= {"certfile": str(place / f"{self.name}.crt"), "keyfile": str(place / f"{self.name}.key"), "keyfile_password": KEY_PASSPHRASE,
                           "cafile": str(place / "ca.crt"), "authentication": {"username": "admin", "password_file": str(place / "rest.password")},
                           **DOORS[self.name]}
        if "allowlist" in DOORS[self.name]:
            raw["tags"] = {"nofailover": True}      # as a leader it would turn ctl away, which comes from 127.0.0.1
        raw["ctl"] = {"cacert": str(place / "ca.crt"), "certfile": str(place / "client.crt"), "keyfile": str(place / "client.key"),
                      "authentication": {"username": "admin", "password_file": str(place / "rest.password")}}
        return raw

    def secret(self, name: str, text: str) -> Path:
        """A password file that only its owner can read."""
        file = self.authority.place / f"{name}.password"
        file.write_text(text + "\n")
        file.chmod(0o600)
        self._give(file)
        return file

    def request(self, method: str, path: str, body: Any = None, *, timeout_s: float = 2.0, certificate: str = "client", source: str = "",
                headers: dict[str, str] | None = None) -> Answer | None:
        """As the client with that certificate ("" for none), from that address; `headers` instead of the right password. None: no answer, as without TLS."""
        given = {"Authorization": "Basic " + base64.b64encode(f"admin:{REST_PASSWORD}".encode()).decode()} if headers is None else headers
        connection = http.client.HTTPSConnection(self.address, self.rest_port, timeout=timeout_s, context=self.authority.context(certificate),
                                                 source_address=(source, 0) if source else None)
        return self._exchange(connection, method, path, body, given)

    def serial(self) -> int:
        """Of the certificate that its REST API shows to a new connection."""
        context = self.authority.context("client")
        with context.wrap_socket(__import__("socket").create_connection((self.address, self.rest_port), 2), server_hostname=self.address) as connection:
            return int(str((connection.getpeercert() or {})["serialNumber"]), 16)


class LockedBed(Bed):
    """As Bed; `start` locks etcd before the first agent starts."""

    _authority: Authority | None = None

    @property
    def authority(self) -> Authority:
        if self._authority is None:
            assert self._user is not None
            authority = self._authority = Authority(self.directory / "tls", self._user)
            authority.issue("etcd", addresses=tuple(f"{self.network}.{21 + i}" for i in range(3)))
            for i in range(3):
                authority.issue(f"n{i + 1}", addresses=(f"{self.network}.{11 + i}",), passphrase=KEY_PASSPHRASE)
            authority.issue("client", subject="/O=pgha")
            authority.issue("expired", days=-1)
            authority.issue("foreign", ca="other-ca")
        return self._authority

    def new_member(self, name: str, address: str, client_port: int, directory: Path, log: Path) -> EtcdMember:
        member = LockedMember(name, address, client_port, directory, log)
        member.authority = self.authority
        return member

    def new_node(self, name: str, address: str, **more: Any) -> Node:
        node = LockedNode(name, address, **more)
        node.authority = self.authority
        node.secret("etcd", ETCD_PASSWORD)
        node.secret("rest", REST_PASSWORD)
        return node

    def start_etcd(self) -> None:
        super().start_etcd()
        member = self.etcd.members[0]
        assert isinstance(member, LockedMember)
        member.lock(self.key(""))


class Spy:
    """Looks at the arguments of every process on the machine, and at the environment of PostgreSQL's, again and again."""

    def __init__(self, secrets: set[str]) -> None:
        self._secrets = [secret.encode() for secret in secrets]
        self.found: set[str] = set()
        self.looked = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    arguments = (process / "cmdline").read_bytes()
                    environment = (process / "environ").read_bytes() if b"postgres" in arguments and b"pgha" not in arguments.split(b"\0")[0] else b""
                except OSError:
                    continue        # it has ended
                for secret in self._secrets:
                    if secret in arguments:
                        self.found.add(f"arguments: {arguments[:300]!r}")
                    if secret in environment:
                        self.found.add(f"environment of {arguments[:100]!r}")
            self.looked += 1

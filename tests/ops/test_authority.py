"""Certificates hold under the strictest checks of OpenSSL, in real handshakes, and only for whom they were made."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.ops.kits.certificates import (
    Authority,
    Certificate,
    certificate_pem,
    check_issued,
    make_key,
    private_pem,
    read_connection_key,
)
from fedtune.spec import ConfigError

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the command openssl is not installed")


@dataclass(frozen=True)
class Holder:
    """Files of somebody with a certificate."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class World:
    """An authority's certificate, and a function that makes certificates of it."""

    ca: Path
    authority: Authority
    folder: Path

    def holder(
        self, kind: str, *, name: str = "a", hosts: tuple[str, ...] = ("localhost",), **when: datetime
    ) -> Holder:
        key, now = make_key(), when.get("now", datetime.now(UTC))
        names = hosts if kind == "server" else ()
        certificate = self.authority.issue(key.public_key(), kind=kind, name=name, hosts=names, days=1, now=now)
        made = Holder(certificate=self.folder / f"{kind}-{name}.pem", key=self.folder / f"{kind}-{name}-key.pem")
        made.certificate.write_bytes(certificate_pem(certificate))
        made.key.write_bytes(private_pem(key))
        return made


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(name: str = "cardiology", *, now: datetime | None = None, days: int = 100) -> World:
        folder = tmp_path / name
        folder.mkdir()
        authority = Authority.make(name, days=days, now=now or datetime.now(UTC))
        (folder / "ca.pem").write_bytes(certificate_pem(authority.certificate))
        return World(ca=folder / "ca.pem", authority=authority, folder=folder)

    return make


def context(side: int, *, ca: Path, holder: Holder | None) -> ssl.SSLContext:
    """What Python's newest versions use by default, with certificates demanded on both sides."""
    made = ssl.SSLContext(side)
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(ca)
    if holder:
        made.load_cert_chain(holder.certificate, holder.key)
    return made


def exchange(server: ssl.SSLContext, client: ssl.SSLContext, *, host: str = "localhost") -> dict[str, object]:
    """Connect over loopback and pass a word both ways; the client's certificate as the server saw it.

    Raises:
        ssl.SSLError: either side refused the other.
    """
    seen: dict[str, object] = {}
    failed: dict[str, OSError] = {}
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            try:
                plain, _ = listening.accept()
                plain.settimeout(10)
                with plain, server.wrap_socket(plain, server_side=True) as tls:
                    seen.update(tls.getpeercert() or {})
                    tls.sendall(tls.recv(5))
            except OSError as error:
                failed["server"] = error

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname=host) as tls,
            ):
                tls.sendall(b"hello")
                assert tls.recv(5) in (b"hello", b"")
        except OSError as error:
            failed["client"] = error
        thread.join(10)
    if failed:  # in TLS 1.3 a client learns only later that it was refused, and not always why
        raise ssl.SSLError(", ".join(f"{side}: {error}" for side, error in failed.items()))
    return seen


def shake(world: World, *, server: Holder | None = None, client: Holder | None = None, **options: str) -> object:
    """A handshake between holders of certificates of `world`."""
    server = server or world.holder("server", hosts=("localhost", "127.0.0.1", "fl.example.org"))
    client = client or world.holder("site", name="north")
    return exchange(
        context(ssl.PROTOCOL_TLS_SERVER, ca=world.ca, holder=server),
        context(ssl.PROTOCOL_TLS_CLIENT, ca=world.ca, holder=client),
        **options,
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fl.example.org"])
def test_server_and_site_trust_each_other(world: Any, host: str) -> None:
    seen = shake(world(), host=host)
    assert [part[0] for part in seen["subject"]] == [
        ("organizationName", "cardiology"),
        ("organizationalUnitName", "site"),
        ("commonName", "north"),
    ]


@pytest.mark.parametrize("host", ["127.0.0.2", "x.fl.example.org"])
def test_a_server_is_nobody_else(world: Any, host: str) -> None:
    with pytest.raises(ssl.SSLError, match="certificate is not valid for"):
        shake(world(), host=host)


@pytest.mark.parametrize(("side", "kind", "name"), [("server", "site", "localhost"), ("client", "server", "other")])
def test_neither_a_site_nor_the_server_can_pose_as_the_other(world: Any, side: str, kind: str, name: str) -> None:
    ours = world()
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        shake(ours, **{side: ours.holder(kind, name=name)})


def test_a_site_cannot_issue_certificates(world: Any, tmp_path: Path) -> None:
    ours = world()
    site = ours.holder("site", name="north")
    key = make_key()
    own = x509.load_pem_x509_certificate(site.certificate.read_bytes())
    posing = Authority(key=read_connection_key(site.key), certificate=own)
    forged = posing.issue(key.public_key(), kind="site", name="forged", days=1, now=datetime.now(UTC))
    with pytest.raises(ConfigError, match="must be issued by the authority"):
        check_issued(forged, ca=ours.authority.certificate, key="site.pem")
    chain = Holder(certificate=tmp_path / "chain.pem", key=tmp_path / "forged.pem")
    chain.certificate.write_bytes(certificate_pem(forged) + certificate_pem(own))
    chain.key.write_bytes(private_pem(key))
    with pytest.raises(ssl.SSLError, match=r"server: .*(invalid CA certificate)"):
        shake(ours, client=chain)


@needs_openssl
def test_openssl_finds_nothing_to_object_to(world: Any) -> None:
    ours = world()
    for holder, purpose in (
        (ours.holder("server", hosts=("fl.example.org", "10.0.0.3", "2001:db8::1")), "sslserver"),
        (ours.holder("lead", name="lead"), "sslclient"),
        (ours.holder("site", name="north"), "sslclient"),
    ):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", ours.ca, holder.certificate]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_certificate_begins_earlier_for_slow_clocks_and_never_outlives_its_authority(world: Any) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    authority = world(now=start, days=10).authority
    key = make_key().public_key()

    def issued(now: datetime, days: int) -> Certificate:
        return Certificate.of(authority.issue(key, kind="site", name="a", days=days, now=now))

    later = start + timedelta(days=3)
    assert issued(later, 2).not_before == later - timedelta(minutes=5)
    assert issued(later, 2).not_after == later + timedelta(days=2)
    assert issued(later, 365).not_after == start + timedelta(days=10)
    assert issued(start, 1).not_before == start - timedelta(minutes=5)  # the authority's own beginning
    with pytest.raises(ConfigError, match="provision the federation again"):
        issued(start + timedelta(days=11), 1)


def test_a_loaded_authority_is_the_one_that_was_made(world: Any) -> None:
    ours = world()
    path = ours.folder / "ca_key.pem"
    with pytest.raises(ConfigError, match=r"ca_key\.pem.*bring the authority's folder back"):
        Authority.load(ours.folder)
    path.write_bytes(private_pem(ours.authority.key))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640.*chmod 600"):
        Authority.load(ours.folder)
    path.chmod(0o600)
    assert Authority.load(ours.folder).certificate == ours.authority.certificate
    path.write_bytes(private_pem(make_key()))
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        Authority.load(ours.folder)
    path.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ConfigError, match="must be an EC P-384 private key"):
        Authority.load(ours.folder)


@needs_openssl
def test_the_fingerprint_is_what_openssl_computes(world: Any) -> None:
    holder = world().holder("site", name="north")
    pem = subprocess.run(
        ["openssl", "x509", "-in", holder.certificate, "-pubkey", "-noout"], capture_output=True, check=True
    ).stdout
    der = subprocess.run(["openssl", "pkey", "-pubin", "-outform", "DER"], input=pem, capture_output=True, check=True)
    digest = subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=der.stdout, capture_output=True, check=True)
    certificate = x509.load_pem_x509_certificate(holder.certificate.read_bytes())
    assert Certificate.of(certificate).fingerprint == digest.stdout.split()[0].decode()

"""Certificates under the strictest checks of OpenSSL, in real handshakes, and only for their own names."""

import contextlib
import shutil
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.ops.kits import certificates
from fedtune.ops.kits.certificates import (
    Authority,
    Certificate,
    encode_certificate_pem,
    encode_private_pem,
    generate_connection_key,
)
from fedtune.ops.wire.identity import Tls
from fedtune.spec import ConfigError

from .deployment_files import run_tool


@dataclass(frozen=True)
class World:
    authority: Authority
    folder: Path

    def holder(self, kind: str, *, name: str = "a", hosts: tuple[str, ...] = ("localhost",)) -> Tls:
        key, names = generate_connection_key(), hosts if kind == "server" else ()
        options = {"kind": kind, "name": name, "hosts": names, "days": 1, "now": datetime.now(UTC)}
        certificate = self.authority.issue(key.public_key(), **options)  # type: ignore[arg-type]
        return self.files(f"{kind}-{name}", encode_private_pem(key), certificate)

    def files(self, name: str, key: bytes, *chain: x509.Certificate) -> Tls:
        ca, certificate, private = (self.folder / file for file in ("ca.pem", f"{name}.pem", f"{name}-key.pem"))
        tls = Tls(ca=ca, certificate=certificate, key=private)
        tls.certificate.write_bytes(b"".join(map(encode_certificate_pem, chain)))
        tls.key.write_bytes(key)
        return tls


@pytest.fixture
def make_authorities(tmp_path: Path) -> World:
    authority = Authority.create_authority("cardiology", days=100, now=datetime.now(UTC))
    (tmp_path / "ca.pem").write_bytes(encode_certificate_pem(authority.certificate))
    return World(authority, tmp_path)


def make_context(side: int, holder: Tls) -> ssl.SSLContext:
    """Create a TLS context with Python's newest defaults, and mutual authentication."""
    context = ssl.SSLContext(side)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(holder.ca)
    context.load_cert_chain(holder.certificate, holder.key)
    return context


def shake_hands(world: World, *, server: Tls | None = None, client: Tls | None = None, host: str = "localhost") -> Any:
    """Do a handshake in memory; return the client's certificate at the server, or the ssl.SSLError of a refusal."""
    server = server or world.holder("server", hosts=("localhost", "127.0.0.1", "fl.example.org"))
    client = client or world.holder("site", name="north")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    site = make_context(ssl.PROTOCOL_TLS_CLIENT, client).wrap_bio(to_client, to_server, server_hostname=host)
    serving = make_context(ssl.PROTOCOL_TLS_SERVER, server).wrap_bio(to_server, to_client, server_side=True)
    for side in (site, serving) * 2:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return serving.getpeercert()


def test_server_and_site_accept_each_other_only_under_their_names(make_authorities: World) -> None:
    north = {"organizationName": "cardiology", "organizationalUnitName": "site", "commonName": "north"}
    for host in ("localhost", "127.0.0.1", "fl.example.org"):
        assert dict(part[0] for part in shake_hands(make_authorities, host=host)["subject"]) == north
    for host in ("127.0.0.2", "x.fl.example.org"):
        with pytest.raises(ssl.SSLError, match="certificate is not valid for"):
            shake_hands(make_authorities, host=host)


@pytest.mark.parametrize(("side", "kind", "name"), [("server", "site", "localhost"), ("client", "server", "other")])
def test_site_and_server_certificates_are_not_interchangeable(
    make_authorities: World, side: str, kind: str, name: str
) -> None:
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        shake_hands(make_authorities, **{side: make_authorities.holder(kind, name=name)})


def test_site_cannot_issue_certificates(make_authorities: World) -> None:
    site = make_authorities.holder("site", name="north")
    key = generate_connection_key()
    cert = x509.load_pem_x509_certificate(site.certificate.read_bytes())
    posing = Authority(key=certificates.read_connection_key(site.key), certificate=cert)
    forged = posing.issue(key.public_key(), kind="site", name="forged", days=1, now=datetime.now(UTC))
    with pytest.raises(ConfigError, match="must be issued by the authority"):
        certificates.check_issued(forged, ca=make_authorities.authority.certificate, key="site.pem")
    with pytest.raises(ssl.SSLError, match="invalid CA certificate"):
        shake_hands(make_authorities, client=make_authorities.files("forged", encode_private_pem(key), forged, cert))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the command openssl is not installed")
def test_openssl_accepts_certificates_and_agrees_on_their_fingerprints(make_authorities: World) -> None:
    for holder, purpose in (
        (make_authorities.holder("server", hosts=("fl.example.org", "10.0.0.3", "2001:db8::1")), "sslserver"),
        (make_authorities.holder("lead", name="lead"), "sslclient"),
        (make_authorities.holder("site", name="north"), "sslclient"),
    ):
        run_tool("openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", holder.ca, holder.certificate)
    command = "openssl x509 -pubkey -noout | openssl pkey -pubin -outform DER | openssl dgst -sha256 -r"
    pem = holder.certificate.read_text()
    digest = run_tool("sh", "-c", command, input=pem).split()[0]
    assert Certificate.from_x509(x509.load_pem_x509_certificate(pem.encode())).fingerprint == digest


def test_certificate_validity_tolerates_slow_clocks_and_ends_with_the_authority() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    authority = Authority.create_authority("cardiology", days=10, now=start)
    key = generate_connection_key().public_key()

    def issue_certificate(now: datetime, days: int) -> Certificate:
        return Certificate.from_x509(authority.issue(key, kind="site", name="a", days=days, now=now))

    later = start + timedelta(days=3)
    assert issue_certificate(later, 2).not_before == later - timedelta(minutes=5)
    assert issue_certificate(later, 2).not_after == later + timedelta(days=2)
    assert issue_certificate(later, 365).not_after == start + timedelta(days=10)
    assert issue_certificate(start, 1).not_before == start - timedelta(minutes=5)  # not before the authority is valid
    with pytest.raises(ConfigError, match="provision the federation again"):
        issue_certificate(start + timedelta(days=11), 1)


def test_authority_is_loaded_only_with_its_own_private_key(make_authorities: World) -> None:
    path = make_authorities.folder / "ca_key.pem"
    with pytest.raises(ConfigError, match=r"ca_key\.pem.*restore the authority's folder"):
        Authority.load(make_authorities.folder)
    for key, mode, reason in (
        (make_authorities.authority.key, 0o640, r"mode 640.*chmod 600"),
        (generate_connection_key(), 0o600, "does not match the certificate in ca.pem"),
        (ec.generate_private_key(ec.SECP256R1()), 0o600, "must be an EC P-384 private key"),
    ):
        path.write_bytes(encode_private_pem(key))
        path.chmod(mode)
        with pytest.raises(ConfigError, match=reason):
            Authority.load(make_authorities.folder)
    path.write_bytes(encode_private_pem(make_authorities.authority.key))
    assert Authority.load(make_authorities.folder).certificate == make_authorities.authority.certificate

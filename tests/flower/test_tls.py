"""Who shakes hands with whom, without a network."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from fedtune.flower.tls import Tls

from .certificates import LOOPBACK, Authority


def shake_hands(client: Tls, server: Tls, *, name: str = LOOPBACK, most: ssl.TLSVersion | None = None) -> str:
    """TLS between a client of ours and a server as uvicorn makes it; the protocol's version."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server.certificate, server.key)
    theirs.load_verify_locations(server.ca)
    theirs.verify_mode = ssl.CERT_REQUIRED
    if most is not None:
        theirs.maximum_version = most
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        theirs.wrap_bio(to_server, to_client, server_side=True),
        client.client_context().wrap_bio(to_client, to_server, server_hostname=name),
    ]
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for end in ends:
        end.do_handshake()
    return ends[1].version() or ""


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "others")


def test_members_of_one_federation_meet(ours: Authority) -> None:
    server = ours.issue("server", address=LOOPBACK)
    assert shake_hands(ours.issue("a"), server) == "TLSv1.3"
    assert shake_hands(ours.issue("a"), server, most=ssl.TLSVersion.TLSv1_2) == "TLSv1.2"


def test_another_authority_is_not_trusted(ours: Authority, others: Authority) -> None:
    server = ours.issue("server", address=LOOPBACK)
    with pytest.raises(ssl.SSLError):
        shake_hands(others.issue("a"), server)
    # A client of ours shows its certificate, and does not take theirs.
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours.issue("a"), others.issue("server", address=LOOPBACK))


def test_a_certificate_from_elsewhere_does_not_pass_for_ours(ours: Authority, others: Authority) -> None:
    theirs = others.issue("a")
    stranger = Tls(ca=ours.file, certificate=theirs.certificate, key=theirs.key)
    with pytest.raises(ssl.SSLError):
        shake_hands(stranger, ours.issue("server", address=LOOPBACK))


def test_a_server_under_another_name_is_not_trusted(ours: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch"):
        shake_hands(ours.issue("a"), ours.issue("server", address="127.0.0.2"))


def test_a_site_cannot_play_the_server(ours: Authority) -> None:
    # Its certificate is of the same authority, but for clients alone, whatever name it is reached under.
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours.issue("a"), ours.issue("b"))


def test_the_server_s_certificate_is_none_for_a_client(ours: Authority) -> None:
    server = ours.issue("server", address=LOOPBACK)
    with pytest.raises(ssl.SSLError):
        shake_hands(server, server)


@pytest.mark.parametrize("who", ["site", "server"])
def test_a_certificate_that_has_ended_is_none(ours: Authority, who: str) -> None:
    site = ours.issue("a", days=-1 if who == "site" else 5)
    server = ours.issue("server", address=LOOPBACK, days=-1 if who == "server" else 5)
    with pytest.raises(ssl.SSLError, match="expired"):
        shake_hands(site, server)


def test_old_protocols_are_refused(ours: Authority) -> None:
    assert ours.issue("a").client_context().minimum_version >= ssl.TLSVersion.TLSv1_2

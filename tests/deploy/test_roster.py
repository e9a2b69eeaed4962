"""The roster of sites, as a person may have damaged it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedtune.deploy.kits.certificates import Authority, make_key, p384_of
from fedtune.deploy.kits.members import Member, read_roster, write_roster
from fedtune.privacy.keys import SigningKey
from fedtune.spec import ConfigError


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # The point of the public key in a form that there is none of, and a kind of key that there is none of.
        (b"\x03\x62\x00\x04", b"\x03\x62\x00\x08"),
        (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06071a8648ce3d0201")),
    ],
    ids=["point", "kind"],
)
def test_a_certificate_whose_key_cannot_be_read_is_refused(right: bytes, wrong: bytes, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    issued = Authority.make("clinics", days=30, now=now).issue_client(
        make_key().public_key(), kind="site", name="north", days=10, now=now
    )
    der = issued.public_bytes(serialization.Encoding.DER)
    assert der.count(right) == 1
    damaged = x509.load_der_x509_certificate(der.replace(right, wrong))
    with pytest.raises(ConfigError, match="must be for an EC P-384 key"):
        p384_of(damaged, key="certificate")
    path = tmp_path / "roster.json"
    member = Member(
        site="north",
        site_key=SigningKey.load_or_make(tmp_path / "key.pem").public,
        datasets={"a": 1},
        certificate=damaged,
        revoked=None,
    )
    write_roster(path, [member], federation="clinics")
    with pytest.raises(ConfigError, match="must be one in PEM form"):
        read_roster(path)

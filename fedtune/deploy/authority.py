"""The federation's certificate authority: one EC P-384 key that signs the certificates of server, lead and sites.

It signs nothing but end certificates (path length 0).  Every certificate names the federation, what its holder is
("server", "lead" or "site") and the holder; only the server's may be used to serve.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.deploy.address import ip_address
from fedtune.deploy.certificates import (
    check_days,
    check_in_force,
    check_private,
    public_pem,
    read_certificate,
    read_connection_key,
)
from fedtune.spec import ConfigError

CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin so long before they are made, for machines whose clocks are slow."""
_OVER = "the federation has to be provisioned anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """The authority's key and its own certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, federation: str, *, days: int, now: datetime) -> Authority:
        """A new authority for `federation`, for so many days from `now` (with a time zone)."""
        check_days("authority_days", days)
        key = make_key()
        name = _subject(federation, kind="authority", name="authority")
        builder = _begun(key.public_key(), subject=name, issuer=name)
        builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        return cls(key=key, certificate=builder.sign(key, hashes.SHA384()))

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The authority in `folder`.

        Raises:
            ConfigError: a file is missing or holds something else, or others can read the key.
        """
        path = folder / "ca_key.pem"
        if not os.path.isfile(path):
            bound = "is missing: bring the authority's folder back from where you keep it, for as long as you need it"
            raise ConfigError(str(path), None, bound)
        check_private(path)
        key, certificate = read_connection_key(path), read_certificate(folder / "ca.pem")
        if public_pem(certificate) != public_pem(key):
            raise ConfigError(str(path), None, "is not the key of the certificate in ca.pem beside it")
        return cls(key=key, certificate=certificate)

    @property
    def federation(self) -> str:
        """The name of the federation that the authority was made for."""
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)

    def issue_server(
        self, public: ec.EllipticCurvePublicKey, *, hosts: Sequence[str], days: int, now: datetime
    ) -> x509.Certificate:
        """A certificate with which a server may serve under any of `hosts`."""
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = self._end(public, kind="server", name="server")
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        return self._signed(builder.add_extension(names, critical=False), days=days, now=now)

    def issue_client(
        self, public: ec.EllipticCurvePublicKey, *, kind: str, name: str, days: int, now: datetime
    ) -> x509.Certificate:
        """A certificate with which a "lead" (its name is "lead", too) or a "site" may call the server."""
        builder = self._end(public, kind=kind, name=name)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        return self._signed(builder, days=days, now=now)

    def _end(self, public: ec.EllipticCurvePublicKey, *, kind: str, name: str) -> x509.CertificateBuilder:
        builder = _begun(
            public, subject=_subject(self.federation, kind=kind, name=name), issuer=self.certificate.subject
        )
        issuer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        return builder.add_extension(identifier, critical=False)

    def _signed(self, builder: x509.CertificateBuilder, *, days: int, now: datetime) -> x509.Certificate:
        """The certificate, from `now` for so many days, but never beyond the authority's own.

        Raises:
            ConfigError: the authority's own is not in force.
        """
        own = self.certificate
        check_in_force(own, now=now, key="authority", renewal=_OVER)
        begins = max(now - CLOCK_SKEW, own.not_valid_before_utc)
        ends = min(now + timedelta(days=days), own.not_valid_after_utc)
        return builder.not_valid_before(begins).not_valid_after(ends).sign(self.key, hashes.SHA384())


def make_key() -> ec.EllipticCurvePrivateKey:
    """A new EC P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM form, not encrypted: for a file that its owner alone can read."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM form."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _subject(federation: str, *, kind: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, kind),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _begun(public: ec.EllipticCurvePublicKey, *, subject: x509.Name, issuer: x509.Name) -> x509.CertificateBuilder:
    """What every certificate starts with; a serial number of 159 random bits."""
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    address = ip_address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)

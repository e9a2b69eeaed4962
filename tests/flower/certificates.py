"""An authority and the certificates that it signs, made for a test."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.ops.wire.identity import Tls

LOOPBACK = "127.0.0.1"


class Authority:
    """A certificate authority whose files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP384R1())
        self.certificate = _signed("authority", self._key.public_key(), by=self._key, authority=True)
        self.file = _written(folder / "ca.pem", _pem(self.certificate))

    def issue(self, name: str, *, address: str | None = None, days: float = 5) -> Tls:
        """Files of somebody of this authority.

        Args:
            name: common name, and name of the files.
            address: of a server; None: it is a client.
            days: for how long the certificate is good; below 0: it has ended.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = _signed(
            name, key.public_key(), by=self._key, issuer=self.certificate.subject, address=address, days=days
        )
        return Tls(
            ca=self.file,
            certificate=_written(self._folder / f"{name}.pem", _pem(certificate)),
            key=_written(self._folder / f"{name}_key.pem", _private_pem(key)),
        )


def public_pem(tls: Tls) -> bytes:
    """The public half of somebody's connection key, as a roster has it."""
    certificate = x509.load_pem_x509_certificate(tls.certificate.read_bytes())
    return certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _signed(
    name: str,
    key: ec.EllipticCurvePublicKey,
    *,
    by: ec.EllipticCurvePrivateKey,
    issuer: x509.Name | None = None,
    authority: bool = False,
    address: str | None = None,
    days: float = 5,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        .add_extension(usage, critical=True)
    )
    if not authority:
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if address else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if address:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(by, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path

"""X.509 certificates and keys of a federation, and the authority that issues certificates.

The authority has a single EC P-384 key, which signs only end-entity certificates (path length 0).  The subject of every
certificate contains the federation, the type of the holder ("server", "lead" or "site") and the holder's name.  Only
the server's certificate allows server authentication.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as _OID
from cryptography.x509.oid import NameOID

from fedtune.codec import read_regular_file
from fedtune.spec import NOT_GIVEN, ConfigError, check_name

CLOCK_SKEW = timedelta(minutes=5)  # backdating of certificates, for machines with slow clocks
SOON_DAYS = 30  # remaining days below which a certificate should be renewed
_OVER = "provision the federation again"
_MAX_DAYS = 36_500
UNREADABLE = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
"""Exceptions of `cryptography` for a damaged certificate, request or key; some are raised only on field access."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """The properties of a certificate that commands display."""

    name: str  # common name of the subject: a site's name, "lead", "server"
    not_before: datetime
    not_after: datetime
    fingerprint: str  # SHA-256 of the public key (SubjectPublicKeyInfo), 64 hex digits; unchanged by a renewal

    @classmethod
    def from_x509(cls, certificate: x509.Certificate) -> Certificate:
        """Extract the properties of an X.509 certificate."""
        return cls(
            name=get_common_name(certificate.subject) or "",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            fingerprint=compute_key_fingerprint(encode_public_pem(certificate)),
        )

    def count_days_left(self, now: datetime) -> int:
        """Return the number of whole days until the certificate expires; negative for an expired certificate."""
        return (self.not_after - now) // timedelta(days=1)


def read_certificate(path: Path) -> x509.Certificate:
    """Read the first certificate in a PEM file.

    Raises:
        ConfigError: the file contains no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(read_regular_file(path))
    except OSError as error:
        raise ConfigError("certificate", str(path), f"must be a readable file ({error.strerror})") from None
    except UNREADABLE:
        raise ConfigError("certificate", str(path), "must be a certificate in PEM format") from None


def read_connection_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an EC P-384 private key from a PEM file, for TLS and for Flower's node authentication.

    Raises:
        ConfigError: the file does not contain such a key.
    """
    try:
        key = serialization.load_pem_private_key(read_regular_file(path), password=None)
    except OSError as error:
        raise ConfigError("key", str(path), f"must be a readable file ({error.strerror})") from None
    except UNREADABLE:
        key = None
    if not is_p384(key):
        raise ConfigError("key", str(path), "must be an EC P-384 private key in PEM format, without a password")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def check_private(path: Path) -> None:
    """Check that only the owner can read the file `path`; raise ConfigError otherwise."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        bound = "must be readable only by its owner"
        raise ConfigError(str(path), f"mode {mode:03o}", bound, remedy=f"chmod 600 {path}")


def extract_p384_public_key(
    holder: x509.Certificate | x509.CertificateSigningRequest, *, key: str
) -> ec.EllipticCurvePublicKey:
    """Return the EC P-384 public key of a certificate or a signing request; raise ConfigError for any other key.

    `key` is the name of the certificate or request in the error.
    """
    try:
        public = holder.public_key()
    except UNREADABLE:  # the key is parsed on first access
        raise ConfigError(key, "unreadable", "must contain an EC P-384 key") from None
    if not is_p384(public):
        raise ConfigError(key, type(public).__name__, "must contain an EC P-384 key")
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public


def is_p384(key: object) -> bool:
    """Return True if `key` is a public or private key on P-384, the only supported curve."""
    return isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and isinstance(
        key.curve, ec.SECP384R1
    )


def check_issued(certificate: x509.Certificate, *, ca: x509.Certificate, key: str) -> None:
    """Check that `certificate` was issued by the authority `ca`; raise ConfigError otherwise."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (*UNREADABLE, InvalidSignature):
        name = get_common_name(certificate.subject)
        raise ConfigError(key, name, "must be issued by the authority in ca.pem") from None


def check_validity(certificate: x509.Certificate, *, now: datetime, key: str, renewal: str) -> None:
    """Check that `certificate` is valid at `now` (with a time zone); otherwise raise ConfigError with the remedy
    `renewal`.
    """
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        bound = "must be in the future: the certificate has expired"
        raise ConfigError(key, f"{ends:%Y-%m-%d %H:%M} UTC", bound, remedy=renewal)
    if now < begins:
        bound = (
            "must be in the past: the certificate is not valid yet, because this machine's "
            f"clock shows {now:%Y-%m-%d %H:%M}"
        )
        raise ConfigError(key, f"{begins:%Y-%m-%d %H:%M} UTC", bound, remedy="set the clock")


def get_common_name(name: x509.Name) -> str | None:
    """Return the common name of a subject; None if there is not exactly one."""
    attributes = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attributes[0].value) if len(attributes) == 1 else None


def check_common_name(key: str, name: str) -> None:
    """Check that `name` can be used in certificate subjects, file names, messages and command lines."""
    check_name(key, name)
    if len(name) > 64:
        raise ConfigError(key, name, "must have at most 64 characters, the limit for a name in a certificate")


def check_days(key: str, days: int) -> None:
    """Check that `days` is a valid lifetime for a certificate."""
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigError(key, days, f"must be a number of days from 1 to {_MAX_DAYS}")


def list_certificate_host_names(certificate: x509.Certificate) -> list[str]:
    """List the host names and IP addresses of a server certificate, in lower case."""
    try:
        alt_names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [address.compressed for address in alt_names.get_values_for_type(x509.IPAddress)]
    return [name.lower() for name in alt_names.get_values_for_type(x509.DNSName)] + addresses


def encode_public_pem(holder: x509.Certificate | x509.CertificateSigningRequest | ec.EllipticCurvePrivateKey) -> bytes:
    """Encode the public key of a certificate, a signing request or a private key as SubjectPublicKeyInfo in PEM
    format.
    """
    return holder.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def compute_key_fingerprint(public: bytes) -> str:
    """Compute the fingerprint of a PEM public key: the SHA-256 of its DER-encoded SubjectPublicKeyInfo, in hex."""
    key = serialization.load_pem_public_key(public)
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def parse_ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address; return None if `text` is a host name.  Zone ids (fe80::1%eth0) are not accepted."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """Certificate authority of a federation, with its private key and its self-signed certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create_authority(cls, federation: str, *, days: int, now: datetime) -> Authority:
        """Create an authority for `federation`, valid for `days` days from `now` (with a time zone)."""
        check_days("authority_days", days)
        key = generate_connection_key()
        name = _build_subject(federation, kind="authority", name="authority")
        builder = _start_certificate(key.public_key(), subject=name, issuer=name)
        builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_build_key_usage(signs_certificates=True), critical=True)
        return cls(key=key, certificate=builder.sign(key, hashes.SHA384()))

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Load the authority from `folder`.

        Raises:
            ConfigError: a file is missing or invalid, or other accounts can read the key.
        """
        path = folder / "ca_key.pem"
        if not os.path.isfile(path):
            remedy = "restore the authority's folder from offline storage, and remove it again afterwards"
            raise ConfigError(str(path), NOT_GIVEN, "is missing", remedy=remedy)
        check_private(path)
        key, certificate = read_connection_key(path), read_certificate(folder / "ca.pem")
        if encode_public_pem(certificate) != encode_public_pem(key):
            raise ConfigError(str(path), NOT_GIVEN, "does not match the certificate in ca.pem in the same folder")
        return cls(key=key, certificate=certificate)

    def issue(
        self,
        public: ec.EllipticCurvePublicKey,
        *,
        kind: str,
        name: str,
        hosts: Sequence[str] = (),
        days: int,
        now: datetime,
    ) -> x509.Certificate:
        """Issue a certificate that is valid for `days` days, but not longer than the authority's own certificate.

        If `hosts` is given, the result is a server certificate for these names.  Otherwise, it is a client certificate
        for a "lead" (whose name is also "lead") or a "site".

        Raises:
            ConfigError: the authority's own certificate is not valid at `now`.
        """
        authority = self.certificate
        check_validity(authority, now=now, key="authority", renewal=_OVER)
        federation = str(authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)
        issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        addresses = {host: parse_ip_address(host) for host in hosts}
        names = [x509.IPAddress(address) if address else x509.DNSName(host) for host, address in addresses.items()]
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_build_key_usage(signs_certificates=False), True),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), False),
            (x509.ExtendedKeyUsage([_OID.SERVER_AUTH if names else _OID.CLIENT_AUTH]), False),
            *([(x509.SubjectAlternativeName(names), False)] if names else []),
        ]
        subject = _build_subject(federation, kind=kind, name=name)
        builder = _start_certificate(public, subject=subject, issuer=authority.subject)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        begins = max(now - CLOCK_SKEW, authority.not_valid_before_utc)
        ends = min(now + timedelta(days=days), authority.not_valid_after_utc)
        return builder.not_valid_before(begins).not_valid_after(ends).sign(self.key, hashes.SHA384())


def generate_connection_key() -> ec.EllipticCurvePrivateKey:
    """Generate an EC P-384 private key for TLS and node authentication."""
    return ec.generate_private_key(ec.SECP384R1())


def encode_private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key as unencrypted PEM, for a file that only its owner can read."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def encode_certificate_pem(certificate: x509.Certificate) -> bytes:
    """Encode a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _build_subject(federation: str, *, kind: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, kind),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _start_certificate(
    public: ec.EllipticCurvePublicKey, *, subject: x509.Name, issuer: x509.Name
) -> x509.CertificateBuilder:
    """Create a certificate builder with a random serial number of 159 bits."""
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _build_key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
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

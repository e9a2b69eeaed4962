"""Reading and checking certificates and the keys that they are for; `authority` issues them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.spec import ConfigError, check_name

_MOST_DAYS = 36_500
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
"""What `cryptography` raises for a damaged certificate, request or key; some of it only when a field is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What people want to know of a certificate.

    Attributes:
        name: common name of the subject: a site's name, "lead", "server".
        fingerprint: SHA-256 of the public key (its SubjectPublicKeyInfo), 64 hex digits; a renewal keeps it.
    """

    name: str
    not_before: datetime
    not_after: datetime
    fingerprint: str

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Certificate:
        """What `certificate` says."""
        return cls(
            name=common_name(certificate.subject) or "",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            fingerprint=fingerprint_of(public_pem(certificate)),
        )

    def days_left(self, now: datetime) -> int:
        """Whole days until it expires; negative when it has."""
        return (self.not_after - now) // timedelta(days=1)


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError("certificate", str(path), f"must be a readable file ({error.strerror})") from None
    except UNREADABLE:
        raise ConfigError("certificate", str(path), "must be a certificate in PEM form") from None


def read_connection_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in a PEM file: EC P-384, for TLS and for Flower's node authentication.

    Raises:
        ConfigError: the file holds no such key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError("key", str(path), f"must be a readable file ({error.strerror})") from None
    except UNREADABLE:
        key = None
    if not is_p384(key):
        raise ConfigError("key", str(path), "must be an EC P-384 private key in PEM form, without a password")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def check_private(path: Path) -> None:
    """Require that nobody but the owner can read the secret file `path`."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(str(path), f"mode {mode:03o}", f"must be readable by its owner alone: chmod 600 {path}")


def p384_of(holder: x509.Certificate | x509.CertificateSigningRequest, *, key: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate or a request, which must be EC P-384; `key` names its place, for an error."""
    try:
        public = holder.public_key()
    except UNREADABLE:  # it is parsed only now
        raise ConfigError(key, "unreadable", "must be for an EC P-384 key") from None
    if not is_p384(public):
        raise ConfigError(key, type(public).__name__, "must be for an EC P-384 key")
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public


def is_p384(key: object) -> bool:
    """Whether `key`, public or private, is on the one curve that certificates and node authentication use."""
    return isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and isinstance(
        key.curve, ec.SECP384R1
    )


def check_issued(certificate: x509.Certificate, *, ca: x509.Certificate, key: str) -> None:
    """Require `certificate` to be signed by the authority `ca`."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (*UNREADABLE, InvalidSignature):
        raise ConfigError(key, common_name(certificate.subject), "must be issued by the authority in ca.pem") from None


def check_in_force(certificate: x509.Certificate, *, now: datetime, key: str, renewal: str) -> None:
    """Require `now` (with a time zone) to lie within the certificate's days; `renewal` says what to do otherwise."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        raise ConfigError(key, f"{ends:%Y-%m-%d %H:%M} UTC", f"is when the certificate expired: {renewal}")
    if now < begins:
        bound = f"is when the certificate begins, and this machine's clock says {now:%Y-%m-%d %H:%M}: set the clock"
        raise ConfigError(key, f"{begins:%Y-%m-%d %H:%M} UTC", bound)


def common_name(name: x509.Name) -> str | None:
    """The one common name in a subject; None where there is none, or several."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else None


def check_common_name(key: str, name: str) -> None:
    """Require a name that a certificate's subject can hold, and a file, a message and a command line too."""
    check_name(key, name)
    if len(name) > 64:
        raise ConfigError(key, name, "must have at most 64 characters, so that it fits into a certificate")


def check_days(key: str, days: int) -> None:
    """Require a number of days that a certificate can last."""
    if not 1 <= days <= _MOST_DAYS:
        raise ConfigError(key, days, f"must be a number of days from 1 to {_MOST_DAYS}")


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses of machines that a server's certificate is for, in lower case."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [address.compressed for address in found.get_values_for_type(x509.IPAddress)]
    return [name.lower() for name in found.get_values_for_type(x509.DNSName)] + addresses


def public_pem(holder: x509.Certificate | x509.CertificateSigningRequest | ec.EllipticCurvePrivateKey) -> bytes:
    """The public key of a certificate, a request or a private key: SubjectPublicKeyInfo in PEM form."""
    return holder.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint_of(public: bytes) -> str:
    """SHA-256, in hex, of a public key given as PEM: over its SubjectPublicKeyInfo in DER form."""
    key = serialization.load_pem_public_key(public)
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def key_fingerprint(site_key: str) -> str:
    """SHA-256, in hex, of an Ed25519 public key that is given as 64 hex digits."""
    return hashlib.sha256(bytes.fromhex(site_key)).hexdigest()


def spoken(fingerprint: str) -> str:
    """Hex digits in groups of four, to be read out over a telephone."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))

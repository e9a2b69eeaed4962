"""A federation's authority for tests, and the files that it issues."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedtune.ops.kits import certificates
from fedtune.ops.kits.certificates import (
    encode_certificate_pem,
    encode_private_pem,
    generate_connection_key,
    read_certificate,
)
from fedtune.ops.wire.identity import Tls

LOOPBACK = "127.0.0.1"
_AGE_DAYS = 10.0
"""The issuer name of every certificate."""


class Authority:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._made = certificates.Authority.create_authority("test", days=90, now=_begin(_AGE_DAYS))
        self.file = folder / "ca.pem"
        self.file.write_bytes(encode_certificate_pem(self._made.certificate))

    def issue(self, name: str, *, address: str | None = None, days: float = 5, age_days: float = _AGE_DAYS) -> Tls:
        """Issue the files of a member of this authority.

        Without an `address` the member is a client. With `days` below 0 the certificate has expired; with `age_days`
        below 0 it is not yet valid.
        """
        key, options = generate_connection_key(), {"name": name, "days": age_days + days, "now": _begin(age_days)}
        options |= {"kind": "server", "hosts": [address]} if address else {"kind": "site"}
        signed = self._made.issue(key.public_key(), **options)  # type: ignore[arg-type]
        tls = Tls(ca=self.file, certificate=self._folder / f"{name}.pem", key=self._folder / f"{name}_key.pem")
        tls.certificate.write_bytes(encode_certificate_pem(signed))
        tls.key.write_bytes(encode_private_pem(key))
        return tls


def to_public_pem(tls: Tls) -> bytes:
    """Return the public connection key of a member in PEM format, as in a roster."""
    return certificates.encode_public_pem(read_certificate(tls.certificate))


def _begin(age_days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=age_days)

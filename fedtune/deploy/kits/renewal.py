"""How a roster, and in it a new certificate, reach those whom they are for: by the server, which can change neither.

A process whose person allowed it (`--renew`) asks for a new certificate in the last third of its own one's time, with
that one's key.  The machine that holds the authority issues one only to a key that people compared when its holder
joined, and the certificate comes in the lead's next roster.  No private key travels.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.kits.certificates import (
    UNREADABLE,
    Certificate,
    fingerprint_of,
    p384_of,
    public_pem,
    read_certificate,
    read_connection_key,
)
from fedtune.deploy.kits.kit_file import Kit, read_json
from fedtune.deploy.kits.members import Roster, signed_bytes
from fedtune.privacy.durable import write_durably
from fedtune.spec import KIT_SCHEMA, ConfigError, RunError, spec

log = logging.getLogger(__name__)
NEWEST = "newest_roster.json"
"""Where a site and a server keep the newest roster that they have seen, in their own folders."""
_PURPOSE = b"fedtune renewal\0"
_AGAIN_S, _LEAST_S, _TRIES = 600.0, 5.0, 20
"""How soon to ask again: in ten minutes, or so that this many tries are left; but not within seconds."""


def revoked_beside(roster: Path) -> Path:
    """Where a machine keeps which connection keys were ever revoked, beside the newest roster that it has seen."""
    return roster.with_suffix(".revoked.json")


def is_due(certificate: Certificate, now: datetime) -> bool:
    """Whether the last third of a certificate's time has begun: of a year's, four months before its end."""
    return now >= certificate.not_after - (certificate.not_after - certificate.not_before) / 3


@spec
class RenewalRequest:
    """What the holder of a certificate asks for: another one like it, for the same key.

    Attributes:
        name: a site's, "server" or "lead".
        replaces: SHA-256 of the certificate, 64 hex digits, so that an old request is good for nothing.
        signature: in hex, by the certificate's key over the rest.
    """

    version: int
    federation: str
    name: str
    replaces: str
    signature: str = ""

    @classmethod
    def of(cls, data: bytes) -> RenewalRequest:
        """The request in `data`."""
        return read_json(cls, data, key="renewal")

    @classmethod
    def make(cls, kit: Kit) -> bytes:
        """The request for the certificate of `kit`, signed with its key."""
        certificate, key = read_certificate(kit.certificate), read_connection_key(kit.key)
        name, replaces = Certificate.of(certificate).name, digest_of(certificate)
        made = cls(version=KIT_SCHEMA, federation=kit.federation, name=name, replaces=replaces)
        signature = key.sign(made._signed_bytes(), ec.ECDSA(hashes.SHA384())).hex()
        return json.dumps(dataclasses.asdict(dataclasses.replace(made, signature=signature))).encode()

    def check(self, current: x509.Certificate, *, federation: str, now: datetime) -> None:
        """Require a request by the holder of the certificate `current`, which is due to be replaced.

        Raises:
            ConfigError: somebody else made it, or for another certificate, or too early.
        """
        if self.federation != federation or self.replaces != digest_of(current):
            raise ConfigError("renewal", self.name, "must be for the certificate that its holder has now")
        try:
            key = p384_of(current, key="certificate")
            key.verify(bytes.fromhex(self.signature), self._signed_bytes(), ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, ValueError):
            bound = "must be signed with the key of the certificate that it replaces: somebody else made it"
            raise ConfigError("renewal", self.name, bound) from None
        if not is_due(Certificate.of(current), now):
            raise ConfigError("renewal", self.name, "comes before the last third of the certificate's time")

    def _signed_bytes(self) -> bytes:
        return _PURPOSE + signed_bytes(dataclasses.asdict(self))


def digest_of(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, 64 hex digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


@dataclass(frozen=True, kw_only=True, slots=True)
class RosterBook:
    """The newest roster that a machine has seen; it takes no older one, and none that is not the lead's.

    A connection key that any of those seen revoked stays revoked, also after one that lacks the site.

    Attributes:
        path: where it lies, once there is one.
        lead: public key of the lead, as the kit has it.
    """

    path: Path
    federation: str
    lead: str

    @classmethod
    def of(cls, kit: Kit, path: Path) -> RosterBook:
        """The book at `path` of a machine with this kit."""
        return cls(path=path, federation=kit.federation, lead=kit.lead)

    def newest(self) -> Roster | None:
        """The newest roster; None: none was seen yet.

        Raises:
            ConfigError: the file is not as the lead signed it.
        """
        if not self.path.exists():
            return None
        try:
            roster = Roster.read(self.path)
            roster.check_signed(self.lead)
        except ConfigError as error:
            bound = f"{error.bound}. Move the file away, and have the lead run `fedtune provision sync`"
            raise ConfigError(
                "newest roster", str(self.path), f"{bound}: until then an older one may count here"
            ) from None
        return roster

    def take(self, data: bytes) -> Roster:
        """Keep the roster in `data`, if it is not known already.

        Raises:
            ConfigError: it is not the lead's, or another federation's, or not newer, or lets a revoked key in again.
        """
        roster, newest = Roster.of(data), self.newest()
        roster.check_signed(self.lead)
        if roster.federation != self.federation:
            raise ConfigError("roster.federation", roster.federation, f"must be {self.federation!r}")
        if roster == newest:
            return roster
        if newest is not None and roster.number <= newest.number:
            bound = f"must be higher than {newest.number}, that of the newest roster seen here"
            raise ConfigError("roster.number", roster.number, bound)
        kept = self._revoked()
        revoked = kept.union(_revoked_in(newest) if newest is not None else ())
        if back := [
            one.site for one in roster.sites if one.revoked is None and fingerprint_of(one.node_key) in revoked
        ]:
            bound = "must stay revoked, as in a roster seen here: revoke them again, after a restore from a backup"
            raise ConfigError("roster.sites", back, bound)
        revoked |= _revoked_in(roster)
        if revoked != kept:  # first, so that no crash forgets what the newest roster alone said
            write_durably(revoked_beside(self.path), json.dumps(sorted(revoked), indent=1).encode() + b"\n")
        write_durably(self.path, roster.to_bytes())
        return roster

    def _revoked(self) -> set[str]:
        """Fingerprints of the keys that were revoked in rosters before the newest one."""
        path = revoked_beside(self.path)
        if not path.exists():
            return set()
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            bound = "must be the list that fedtune wrote: bring it back from a backup, or move it away; then a key that"
            raise ConfigError("revoked keys", str(path), f"{bound} only it has counts as new")
        return set(found)


def _revoked_in(roster: Roster) -> set[str]:
    return {fingerprint_of(one.node_key) for one in roster.sites if one.revoked is not None}


class Desk(Protocol):
    """Where rosters are had and renewals are asked for: at the server."""

    def roster(self) -> bytes: ...

    def ask(self, request: bytes) -> int: ...


class CertificateKeeper:
    """Has a running process use its kit's certificate as it is now; and asks for the next one, if a person allowed it.

    A certificate that somebody puts into the kit is used within seconds, too.

    Args:
        kit: the process's.
        book: of the rosters that it has seen.
        desk: where it asks; None: nobody allowed it to.

    Raises:
        ConfigError: the kit's certificate is not fit for use.
    """

    def __init__(self, kit: Kit, *, book: RosterBook, desk: Desk | None) -> None:
        self._kit, self._book, self._desk = kit, book, desk
        if desk is not None and (seen := book.newest()) is not None:  # the kit may be an older copy than what is kept
            with suppress(ConfigError, OSError):
                self._put(seen)
        self._seen = _mark(kit.certificate)
        self.certificate = kit.check_certificate(datetime.now(UTC))
        self._next = float("-inf")
        self._said = ""

    def look(self) -> bool:
        """Whether the kit has another certificate than at the last look, fit for use."""
        if self._desk is not None and time.monotonic() >= self._next:
            self.ask(self._desk)
        try:
            mark = _mark(self._kit.certificate)
            if mark == self._seen:
                return False
            certificate = self._kit.check_certificate(datetime.now(UTC))
        except Exception as error:  # it may be in the middle of being copied
            self._warn("the kit's certificate is not used", error)
            return False
        self._seen = mark
        if certificate == self.certificate:
            return False
        self.certificate, self._next = certificate, float("-inf")
        log.info("a new certificate is used", extra={"certificate_until": self.certificate.not_after.isoformat()})
        return True

    def ask(self, desk: Desk) -> None:
        """If a new certificate is due, put it into the kit where the lead has issued it, and else ask for it."""
        now = datetime.now(UTC)
        left_s = (self.certificate.not_after - now) / timedelta(seconds=1)
        self._next = time.monotonic() + max(_LEAST_S, min(_AGAIN_S, left_s / _TRIES))
        if not is_due(self.certificate, now):
            return
        try:
            roster, number = self._book.newest(), desk.ask(RenewalRequest.make(self._kit))
            if self._is_news("asked"):
                log.info("a new certificate is asked for")
            if roster is None or number > roster.number:
                roster = self._book.take(desk.roster())
            self._put(roster)
        except Exception as error:  # whatever a server answers, it ends nobody's process
            self._warn("no new certificate yet", error)

    def _put(self, roster: Roster) -> None:
        """Put the later certificate that a roster has for this kit's key, if there is one, into the kit.

        A read-only kit may have a link to where its certificate can be written.
        """
        if (issued := issued_to(self._kit, roster, now=datetime.now(UTC))) is not None:
            write_durably(self._kit.certificate.resolve(), issued)

    def _warn(self, what: str, error: Exception) -> None:
        """Log it once, with the text of fedtune's and the system's own errors alone."""
        said = str(error) if isinstance(error, ConfigError | RunError | OSError) else type(error).__name__
        if self._is_news(said):
            log.warning("%s: %s", what, said)

    def _is_news(self, said: str) -> bool:
        """Whether it was not said last."""
        last, self._said = self._said, said
        return said != last


def _mark(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def issued_to(kit: Kit, roster: Roster, *, now: datetime) -> bytes | None:
    """The certificate, in PEM form, that a roster has for the key of `kit` and that ends later than the kit's own.

    Raises:
        ConfigError: it is not fit for use.
    """
    own = read_certificate(kit.certificate)
    pem = roster.certificate_of(Certificate.of(own).name)
    if pem is None:
        return None
    try:
        issued = x509.load_pem_x509_certificate(pem.encode())
    except UNREADABLE:
        raise ConfigError("roster", "unreadable", "must have a certificate in PEM form") from None
    if issued.not_valid_after_utc <= own.not_valid_after_utc or public_pem(issued) != public_pem(own):
        return None
    kit.check(issued, now=now)
    return pem.encode()

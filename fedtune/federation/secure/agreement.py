"""Session setup for secure aggregation: terms, threshold, and one key per site, agreed before the first release.

No code in this module trusts the lead.  A site accepts only members from its own roster, terms within its own limits,
and keys signed by their owners; every later message is bound to the digest of these terms and keys
(`KeyAgreement.digest`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from fedtune.federation.secure.masks import is_mask_key
from fedtune.privacy.keys import SigningKey, check_public_key, is_signed
from fedtune.privacy.ledger.chain import to_canonical_json
from fedtune.privacy.threshold import min_threshold as safe_threshold
from fedtune.spec import WIRE_SCHEMA, ConfigError, RefusedError, check_at_least, check_name, check_whole

MAX_SITES_OF_SUM = 20
"""Limit on the number of sites, because the messages grow with its square."""
MAX_BITS = 64
MAX_LENGTH = 1 << 28  # values of a vector
KEY, CONFIRMATION, SHARES = "secure aggregation key", "secure aggregation survivors", "secure aggregation shares"
"""Purposes for which a site signs messages; a signature for one purpose is invalid for every other purpose."""
_SHA256 = re.compile("[0-9a-f]{64}")


class RejectionReason(StrEnum):
    """Reason code for rejecting a message from another party.

    Only these codes leave the site, never the text of an exception.
    """

    MALFORMED = "malformed"
    REQUEST_CHANGED = "request_changed"
    ROSTER_DIFFERS = "roster_differs"
    TOO_FEW_SITES = "too_few_sites"
    THRESHOLD_TOO_LOW = "threshold_too_low"
    NOT_A_MEMBER = "not_a_member"
    WRONG_TERMS = "wrong_terms"
    WRONG_KEY = "wrong_key"
    WRONG_SIGNATURE = "wrong_signature"
    KEY_MISSING = "key_missing"
    SESSION_DIFFERS = "session_differs"
    RELEASE_OVER = "release_over"
    TOO_FEW_SURVIVORS = "too_few_survivors"
    SURVIVORS_CHANGED = "survivors_changed"
    NOT_PROMISED = "not_promised"
    NOT_CONFIRMED = "not_confirmed"
    REPEATED = "repeated"


class Rejected(RefusedError):
    """Raised for an invalid message from another party; the error contains only a `RejectionReason`, and no other text.

    Attributes:
        wrong: the reason.
        site: the sender of the message, if the lead checks the messages of all sites together; otherwise empty.
    """

    def __init__(self, wrong: RejectionReason, *, site: str = "") -> None:
        self.wrong, self.site = wrong, site
        super().__init__(f"secure aggregation: {wrong}")


def compute_modulus_bits(num_sites: int, largest: int) -> int:
    """Compute the bit length of the smallest power-of-two modulus for sums of `num_sites` values in [-largest,
    largest].
    """
    return (num_sites * largest).bit_length() + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Terms of a run's secure aggregation, derived independently by the lead and every site from the run's proposal.

    Attributes:
        run: the name of the run.
        proposal: the SHA-256 of the run's proposal, in hex.
        members: site -> its public identity key (Ed25519, hex), for all participating sites.
        threshold: t, the number of sites that must help to unmask a release; also the minimum number of survivors.
        length: the number of values in a vector.
        largest: the largest absolute value of an entry in a site's vector; noise exceeds it with negligible
            probability.

    Raises:
        ConfigError: a value is out of range.
    """

    run: str
    proposal: str
    members: Mapping[str, str]
    threshold: int
    length: int
    largest: int

    def __post_init__(self) -> None:
        if not (1 <= len(self.run) <= 300 and self.run.isprintable()):  # the limits of a proposal
            raise ConfigError("run", self.run, "must be printable text of 1 to 300 characters")
        if not _SHA256.fullmatch(self.proposal):
            raise ConfigError("proposal", self.proposal, "must be a SHA-256 in hex")
        for site, key in self.members.items():
            check_name("site", site)
            check_public_key(f"members.{site}", key)
        if not 2 <= len(self.members) <= MAX_SITES_OF_SUM:
            raise ConfigError("members", len(self.members), f"must be from 2 to {MAX_SITES_OF_SUM} sites")
        if len(set(self.members.values())) < len(self.members):
            raise ConfigError("members", list(self.members), "must have distinct keys, but two sites share a key")
        check_whole("largest", self.largest)
        check_at_least("largest", self.largest, 1)
        for name, most in (("threshold", len(self.members)), ("length", MAX_LENGTH), ("bits", MAX_BITS)):
            check_whole(name, getattr(self, name))
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(name, getattr(self, name), f"must be from 1 to {most}")
        check_at_least("threshold", self.threshold, len(self.members) // 2 + 1)

    @property
    def sites(self) -> tuple[str, ...]:
        """The members in sorted order, the order of all lists in messages."""
        return tuple(sorted(self.members))

    @property
    def bits(self) -> int:
        """The bit length of the modulus 2**bits, the smallest for which no sum overflows."""
        return compute_modulus_bits(len(self.members), self.largest)

    def digest(self) -> str:
        """Return the SHA-256 of the terms and the protocol version, in hex."""
        # Includes the protocol version, because masks of two versions might not cancel.
        fields = {**asdict(self), "members": dict(self.members), "protocol": WIRE_SCHEMA}
        return hashlib.sha256(to_canonical_json(fields)).hexdigest()

    def check_survivors(self, survivors: Sequence[str]) -> None:
        """Check that a list of survivors is sorted, has no duplicates, and contains at least `threshold` members.

        Raises:
            Rejected: the list violates one of these rules.
        """
        if not set(survivors) <= set(self.members):
            raise Rejected(RejectionReason.NOT_A_MEMBER)
        if list(survivors) != sorted(set(survivors)):
            raise Rejected(RejectionReason.MALFORMED)
        if len(survivors) < self.threshold:
            raise Rejected(RejectionReason.TOO_FEW_SURVIVORS)


Demand = Callable[[Terms], None]  # raises Rejected for terms that a site does not accept


def require_terms(terms: Terms, /, *, min_sites: int = 3, min_threshold: int = 3, colluders: int = 0) -> None:
    """Check that the terms proposed by the lead meet a site's own minimum requirements.

    The default minimum threshold is three, because each site of a sum of two learns the other site's vector by
    subtraction.

    Args:
        terms: the terms of a run.
        min_sites: the minimum number of sites in the run.
        min_threshold: the minimum threshold of a release.
        colluders: the number of other sites that may collude with the server.

    Raises:
        Rejected: the terms do not meet a requirement.
    """
    if len(terms.members) < max(min_sites, colluders + 1):
        raise Rejected(RejectionReason.TOO_FEW_SITES)
    if terms.threshold < max(min_threshold, safe_threshold(len(terms.members), colluders=colluders)):
        raise Rejected(RejectionReason.THRESHOLD_TOO_LOW)


def require_pinned(terms: Terms, roster: Mapping[str, str]) -> None:
    """Check that the identity key of every member matches this site's roster.

    Raises:
        Rejected: a member is missing from the roster or has another key there.
    """
    if not terms.members.items() <= dict(roster).items():
        raise Rejected(RejectionReason.ROSTER_DIFFERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """A site's X25519 key for one session, signed for the session's terms."""

    site: str
    terms: str
    key: str
    signature: str

    @classmethod
    def create_signed(cls, site: str, terms: Terms, key: str, *, identity: SigningKey) -> Announcement:
        """Create an announcement and sign it with the site's identity key."""
        unsigned = cls(site=site, terms=terms.digest(), key=key, signature="")
        return replace(unsigned, signature=identity.sign(KEY, unsigned.to_bytes()))

    def to_bytes(self) -> bytes:
        """Encode the announcement as canonical JSON; with an empty signature, the result is the content to sign."""
        return to_canonical_json(asdict(self))

    def require_genuine(self, terms: Terms) -> None:
        """Check that the announcement is for these terms and is signed by a member.

        Raises:
            Rejected: one of the checks failed.
        """
        if self.site not in terms.members:
            raise Rejected(RejectionReason.NOT_A_MEMBER)
        if self.terms != terms.digest():
            raise Rejected(RejectionReason.WRONG_TERMS)
        if not is_mask_key(self.key):
            raise Rejected(RejectionReason.WRONG_KEY)
        unsigned = replace(self, signature="")
        if not is_signed(terms.members[self.site], KEY, unsigned.to_bytes(), self.signature):
            raise Rejected(RejectionReason.WRONG_SIGNATURE)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAgreement:
    """Secure aggregation session: the terms, and the key that each member announced under these terms."""

    terms: Terms
    keys: Mapping[str, str]
    # SHA-256, in hex, of terms and keys.  Masks, shares and confirmations are bound to it, so that nothing can be
    # unmasked across sites that received different keys.
    digest: str

    @classmethod
    def from_announcements(cls, terms: Terms, announcements: Collection[Announcement]) -> KeyAgreement:
        """Build a session from exactly one validly signed announcement per member.

        Raises:
            Rejected: an announcement is missing, duplicated, or not genuine.
        """
        for announcement in announcements:
            announcement.require_genuine(terms)
        keys = {announcement.site: announcement.key for announcement in announcements}
        if len(keys) < len(announcements):
            raise Rejected(RejectionReason.REPEATED)
        if set(keys) != set(terms.members):
            raise Rejected(RejectionReason.KEY_MISSING)
        digest = hashlib.sha256(to_canonical_json({"terms": terms.digest(), "keys": keys})).hexdigest()
        return cls(terms=terms, keys=keys, digest=digest)

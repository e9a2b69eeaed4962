"""The agreement of the sites of a secure sum before its first release: terms, thresholds, one key of each site.

Nothing here trusts the lead.  A site takes members by its own roster, terms within its own limits, and keys with
their owner's signature; all that follows is bound to the digest of exactly these (`Session.digest`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from fedtune.federation.secure.masks import is_mask_key
from fedtune.privacy.keys import SigningKey, check_public_key, is_signed
from fedtune.privacy.ledger.chain import canonical
from fedtune.privacy.threshold import least_threshold as safe_threshold
from fedtune.spec import WIRE_SCHEMA, ConfigError, RefusedError, check_at_least, check_name, check_whole

MOST_SITES_OF_SUM = 20
"""Each site exchanges keys and shares with each other one; beyond this the messages would grow too large."""
MOST_BITS = 64
MOST_LENGTH = 1 << 28  # values of a vector
KEY, CONFIRMATION, SHARES = "secure sum key", "secure sum survivors", "secure sum shares"
"""Purposes of a site's signatures."""
_SHA256 = re.compile("[0-9a-f]{64}")


class Wrong(StrEnum):
    """Why a message of the other side is not taken.  The list is closed: no text of an exception leaves with it."""

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
    """A message of the other side is not taken, for a reason of the closed list and no other word.

    Attributes:
        site: whose message it is, where the lead looks at those of all sites at once; else empty.
    """

    def __init__(self, wrong: Wrong, *, site: str = "") -> None:
        self.wrong, self.site = wrong, site
        super().__init__(f"secure sum: {wrong}")


def bits_needed(num_sites: int, largest: int) -> int:
    """Bits of the smallest modulus in which every sum of values from -largest to largest is told from every other."""
    return (num_sites * largest).bit_length() + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """The terms of a run's secure sums; the same at the lead and at every site, which make it from the run's proposal.

    Attributes:
        run: name of the run.
        proposal: SHA-256 of its proposal, in hex.
        members: public identity key (Ed25519, hex) by site, of all sites that take part.
        threshold: t, how many sites must help to unmask a release; also the least number of survivors.
        length: of a vector, in values.
        largest: every value of a site's vector lies in [-largest, largest], except with negligible probability.

    Raises:
        ConfigError: a value that no run can have.
    """

    run: str
    proposal: str
    members: Mapping[str, str]
    threshold: int
    length: int
    largest: int

    def __post_init__(self) -> None:
        if not (1 <= len(self.run) <= 300 and self.run.isprintable()):  # as a proposal's, of which it is
            raise ConfigError("run", self.run, "must be a printable text of 1 to 300 characters")
        if not _SHA256.fullmatch(self.proposal):
            raise ConfigError("proposal", self.proposal, "must be a SHA-256 in hex")
        for site, key in self.members.items():
            check_name("site", site)
            check_public_key(f"members.{site}", key)
        if not 2 <= len(self.members) <= MOST_SITES_OF_SUM:
            raise ConfigError("members", len(self.members), f"must be from 2 to {MOST_SITES_OF_SUM} sites")
        if len(set(self.members.values())) < len(self.members):
            raise ConfigError("members", list(self.members), "must have a key each; two have the same")
        check_whole("largest", self.largest)
        check_at_least("largest", self.largest, 1)
        for name, most in (("threshold", len(self.members)), ("length", MOST_LENGTH), ("bits", MOST_BITS)):
            check_whole(name, getattr(self, name))
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(name, getattr(self, name), f"must be from 1 to {most}")
        check_at_least("threshold", self.threshold, len(self.members) // 2 + 1)

    @property
    def sites(self) -> tuple[str, ...]:
        """Members in the order in which everything that names them has them."""
        return tuple(sorted(self.members))

    @property
    def bits(self) -> int:
        """Of the modulus, 2**bits: the fewest that no sum passes."""
        return bits_needed(len(self.members), self.largest)

    def digest(self) -> str:
        """SHA-256, in hex."""
        # The number of the wire format is in it, since masks of two versions would not cancel.
        fields = {**asdict(self), "members": dict(self.members), "protocol": WIRE_SCHEMA}
        return hashlib.sha256(canonical(fields)).hexdigest()

    def check_survivors(self, survivors: Sequence[str]) -> None:
        """Require a set of survivors as it is written: enough members, each once and in order."""
        if not set(survivors) <= set(self.members):
            raise Rejected(Wrong.NOT_A_MEMBER)
        if list(survivors) != sorted(set(survivors)):
            raise Rejected(Wrong.MALFORMED)
        if len(survivors) < self.threshold:
            raise Rejected(Wrong.TOO_FEW_SURVIVORS)


Demand = Callable[[Terms], None]  # raises Rejected for terms that a site does not join


def require_terms(terms: Terms, /, *, least_sites: int = 3, least_threshold: int = 3, colluders: int = 0) -> None:
    """Check that terms ask for no less than a site demands, whatever the lead says.

    Three is the least threshold unless the site says otherwise: of a sum of two, each of the two learns the other's
    vector by subtraction.

    Args:
        terms: of a run.
        least_sites: that take part in the run.
        least_threshold: of a release.
        colluders: other sites that the sum must withstand beside the server.

    Raises:
        Rejected: they ask for less.
    """
    if len(terms.members) < max(least_sites, colluders + 1):
        raise Rejected(Wrong.TOO_FEW_SITES)
    if terms.threshold < max(least_threshold, safe_threshold(len(terms.members), colluders=colluders)):
        raise Rejected(Wrong.THRESHOLD_TOO_LOW)


def require_pinned(terms: Terms, roster: Mapping[str, str]) -> None:
    """Require each member's identity key to be the one that this site's own roster has for it."""
    if not terms.members.items() <= dict(roster).items():
        raise Rejected(Wrong.ROSTER_DIFFERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """A site's X25519 key of one session, signed for these terms alone."""

    site: str
    terms: str
    key: str
    signature: str

    @classmethod
    def made(cls, site: str, terms: Terms, key: str, *, identity: SigningKey) -> Announcement:
        """The announcement as its site makes it."""
        unsigned = cls(site=site, terms=terms.digest(), key=key, signature="")
        return replace(unsigned, signature=identity.sign(KEY, unsigned.to_bytes()))

    def to_bytes(self) -> bytes:
        """The announcement as it travels; with an empty signature what is signed."""
        return canonical(asdict(self))

    def require_genuine(self, terms: Terms) -> None:
        """Require a member's signature, and these terms."""
        if self.site not in terms.members:
            raise Rejected(Wrong.NOT_A_MEMBER)
        if self.terms != terms.digest():
            raise Rejected(Wrong.WRONG_TERMS)
        if not is_mask_key(self.key):
            raise Rejected(Wrong.WRONG_KEY)
        unsigned = replace(self, signature="")
        if not is_signed(terms.members[self.site], KEY, unsigned.to_bytes(), self.signature):
            raise Rejected(Wrong.WRONG_SIGNATURE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Terms, and the one key that each member announced under them."""

    terms: Terms
    keys: Mapping[str, str]
    # SHA-256, in hex, of terms and keys.  Masks, shares and confirmations are bound to it, so that sites to
    # which different keys were shown have nothing in common that could be unmasked.
    digest: str

    @classmethod
    def of(cls, terms: Terms, announcements: Collection[Announcement]) -> Session:
        """The session of these announcements: one of each member, each signed.

        Raises:
            Rejected: one is missing, there twice, or not genuine.
        """
        for one in announcements:
            one.require_genuine(terms)
        keys = {one.site: one.key for one in announcements}
        if len(keys) < len(announcements):
            raise Rejected(Wrong.REPEATED)
        if set(keys) != set(terms.members):
            raise Rejected(Wrong.KEY_MISSING)
        digest = hashlib.sha256(canonical({"terms": terms.digest(), "keys": keys})).hexdigest()
        return cls(terms=terms, keys=keys, digest=digest)

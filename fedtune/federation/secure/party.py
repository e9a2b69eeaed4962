"""A site's part in a secure sum: it masks its vector, confirms one set of survivors, and helps to unmask their sum.

A party is the site's memory of one session, and its keys are nowhere else.  A site that was restarted, or put back
from a backup, has no party: it cannot say or reveal anything in the session any more, and joins a new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.federation.secure import shares
from fedtune.federation.secure.agreement import Announcement, Demand, Rejected, Session, Terms, Wrong, require_pinned
from fedtune.federation.secure.masks import SEED_BYTES, MaskKey, PairSecrets, masks
from fedtune.federation.secure.messages import (
    MOST_RELEASES,
    Confirmation,
    ConfirmRequest,
    Revealed,
    UnmaskRequest,
    Upload,
    read_announcement,
    seeds_needed,
)
from fedtune.federation.secure.packing import packed, reduced
from fedtune.privacy.keys import SigningKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """A promise that a site binds itself to, before it answers.

    Attributes:
        survivors: the one set of the release that the site helps to unmask.
        confirmed: whether the site has seen that enough sites confirmed this set.  Then no other set of the release
            can be unmasked, by anybody's help; before, another one may be.
    """

    session: str
    release: int
    survivors: tuple[str, ...]
    confirmed: bool


Keep = Callable[[Promise], None]  # writes a promise so that it is on disk when the call returns, or raises


class Party:
    """One site in one session.

    Args:
        site: its name.
        identity: its long-term key.
        terms: of the run, made by the site itself from the proposal.
        roster: public identity keys by site, as this site has them from the sites themselves.
        demand: what it demands of the terms.
        keep: told of each promise before the answer that makes it.

    Raises:
        Rejected: the terms are less than the site demands, or name members whom the roster does not have.
    """

    def __init__(
        self, site: str, *, identity: SigningKey, terms: Terms, roster: Mapping[str, str], demand: Demand, keep: Keep
    ) -> None:
        require_pinned(terms, roster)
        if terms.members.get(site) != identity.public:
            raise Rejected(Wrong.NOT_A_MEMBER)
        demand(terms)
        self._site, self._identity, self._terms, self._keep = site, identity, terms, keep
        self._key = MaskKey()
        self._joined: tuple[Session, PairSecrets] | None = None
        self._release = 0
        self._promised: ConfirmRequest | None = None
        self._noted: set[Promise] = set()

    @property
    def terms(self) -> Terms:
        """Of its session."""
        return self._terms

    def announce(self) -> bytes:
        """The site's key for this session, signed."""
        return Announcement.made(self._site, self._terms, self._key.public, identity=self._identity).to_bytes()

    def join(self, announcements: Sequence[bytes]) -> str:
        """Take the keys of all members, once; returns the session's digest, which is the same at all who took the same.

        Raises:
            Rejected: a key is missing or not its owner's, or this site has joined with other keys.
        """
        if len(announcements) > len(self._terms.members):
            raise Rejected(Wrong.REPEATED)
        session = Session.of(self._terms, [read_announcement(data) for data in announcements])
        if session.keys[self._site] != self._key.public:
            raise Rejected(Wrong.WRONG_KEY)
        if self._joined is None:
            self._joined = session, self._key.agreed_in(session.digest, session.keys)
        if self._joined[0].digest != session.digest:
            raise Rejected(Wrong.SESSION_DIFFERS)
        return session.digest

    def require_open(self, release: int) -> None:
        """Raise Rejected where no upload to this release can come any more: it is asked before anything is paid."""
        if self._joined is None:
            raise Rejected(Wrong.SESSION_DIFFERS)
        if not self._release < release < MOST_RELEASES:
            raise Rejected(Wrong.RELEASE_OVER)

    def upload(self, release: int, vector: npt.NDArray[np.int64]) -> bytes:
        """Mask a vector, once for each release.

        Guarantee: whatever the lead and as many colluders as the limits allow for do with it, they learn no more of
        the vector than its sum with those of one set of survivors (docs/secure_aggregation.md).  The bytes may be sent
        again; the vector must not be used for another release: a retry has noise of its own.

        Args:
            release: above all that this party was asked about before.
            vector: whole numbers, (terms.length,).  Noise may reach beyond terms.largest: nothing is cut off or
                refused, since only the sum of whole values, modulo 2**bits, is a function of what its noise protects.

        Raises:
            Rejected: the release is over, or has begun.
        """
        assert vector.shape == (self._terms.length,)
        assert vector.dtype == np.int64
        self.require_open(release)
        (session, pairs), sites = self._require_joined(), self._terms.sites
        self._release, self._promised = release, None
        seeds = {other: pairs.mask_seed(self._site, other, release=release) for other in sites}
        seeds[self._site] = os.urandom(SEED_BYTES)
        masked = vector.astype(np.uint64) + masks(self._site, seeds, length=self._terms.length)  # modulo 2**64
        # By the site that a mask is shared with: the seed at place 0, and a share for each member at its place.
        dealt = [shares.split(seeds[other], threshold=self._terms.threshold, num_shares=len(sites)) for other in sites]
        return Upload(
            session=session.digest,
            release=release,
            site=self._site,
            digests=tuple(
                tuple(
                    shares.digest(share, session.digest, release, self._site, other, place)
                    for place, share in enumerate(values)
                )
                for other, values in zip(sites, dealt, strict=True)
            ),
            sealed=tuple(
                pairs.seal(
                    b"".join(values[place].to_bytes(shares.SHARE_BYTES) for values in dealt),
                    sender=self._site,
                    receiver=receiver,
                    release=release,
                )
                for place, receiver in enumerate(sites, start=1)
            ),
            vector=packed(reduced(masked, self._terms.bits), self._terms.bits),
        ).to_bytes(self._terms)

    def confirm(self, request: bytes) -> bytes:
        """Promise, durably and signed, to help with this release's sum of these survivors and of no others.

        Raises:
            Rejected: too few survivors, another set than was promised, or a release that is over.
        """
        session, _ = self._require_joined()
        asked = ConfirmRequest.from_bytes(request, session)
        if asked.release < self._release:
            raise Rejected(Wrong.RELEASE_OVER)
        if asked.release > self._release:
            self._release, self._promised = asked.release, None
        if self._promised not in (None, asked):
            raise Rejected(Wrong.SURVIVORS_CHANGED)
        self._promised = asked  # before it is written: if that fails half-way, no other set is promised either
        self._note(asked, confirmed=False)
        return Confirmation.of(asked, self._site, identity=self._identity).to_bytes()

    def unmask(self, request: bytes) -> bytes:
        """Reveal shares of the seeds that unmask the sum of the survivors whom this site and enough others confirmed.

        Raises:
            Rejected: not what this site promised, or not confirmed by as many sites as the threshold.
        """
        session, pairs = self._require_joined()
        asked = UnmaskRequest.from_bytes(request, session)
        if asked.asked != self._promised:
            raise Rejected(Wrong.NOT_PROMISED)
        self._note(asked.asked, confirmed=True)
        given = {survivor: self._shares_of(survivor, asked, pairs) for survivor in asked.survivors}
        return Revealed.of(asked.asked, self._site, shares=given, identity=self._identity).to_bytes()

    def _shares_of(self, survivor: str, asked: UnmaskRequest, pairs: PairSecrets) -> dict[str, str]:
        """Shares of the seeds that must be taken from a survivor's upload; none where it sealed none for this site."""
        sealed = asked.sealed_by(survivor)
        text = pairs.opened(sealed, sender=survivor, receiver=self._site, release=asked.release)
        size, sites = shares.SHARE_BYTES, self._terms.sites
        if text is None or len(text) != len(sites) * size:
            return {}
        dealt = {other: text[place * size : (place + 1) * size].hex() for place, other in enumerate(sites)}
        return {other: dealt[other] for other in seeds_needed(survivor, asked.survivors, self._terms)}

    def _note(self, asked: ConfirmRequest, *, confirmed: bool) -> None:
        survivors = tuple(asked.survivors)
        promise = Promise(session=asked.session, release=asked.release, survivors=survivors, confirmed=confirmed)
        if promise not in self._noted:
            self._keep(promise)
            self._noted = {promise, *(one for one in self._noted if one.release == asked.release)}

    def _require_joined(self) -> tuple[Session, PairSecrets]:
        if self._joined is None:
            raise Rejected(Wrong.SESSION_DIFFERS)
        return self._joined

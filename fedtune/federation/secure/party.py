"""A site's part in secure aggregation: mask its vector, confirm one set of survivors, and help to unmask their sum.

A party is the site's state in one session, and its keys exist only in memory.  After a restart, or a restore from a
backup, the site has no party: it can no longer confirm or reveal anything in the session, and joins a new session.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.federation.secure import shares
from fedtune.federation.secure.agreement import (
    Announcement,
    Demand,
    KeyAgreement,
    Rejected,
    RejectionReason,
    Terms,
    require_pinned,
)
from fedtune.federation.secure.masks import SEED_BYTES, MaskKey, PairSecrets, sum_masks
from fedtune.federation.secure.messages import (
    MAX_RELEASES,
    Confirmation,
    ConfirmRequest,
    Revealed,
    UnmaskRequest,
    Upload,
    list_needed_seeds,
    read_announcement,
)
from fedtune.federation.secure.packing import pack_residues, reduce_residues
from fedtune.privacy.keys import SigningKey


@dataclass(frozen=True, kw_only=True, slots=True)
class SumConfirmation:
    """A site's binding promise for one release, written to disk before the site answers.

    Attributes:
        session: the digest of the session.
        release: the number of the release.
        survivors: the only set of survivors that the site will help to unmask in this release.
        confirmed: whether the site has verified confirmations of this set from at least the threshold of sites.  If it
            is True, no other set of this release can ever be unmasked.  If it is False, another set may still be.
    """

    session: str
    release: int
    survivors: tuple[str, ...]
    confirmed: bool


Keep = Callable[[SumConfirmation], None]  # durably stores a promise before the call returns, or raises


class Party:
    """State of one site in one session of the secure aggregation protocol.

    Args:
        site: the name of the site.
        identity: the site's long-term signing key.
        terms: the terms of the run, derived from the proposal by the site itself.
        roster: site -> its public identity key, obtained from the sites themselves.
        demand: checks that the terms meet the site's requirements.
        keep: stores each promise before the answer with the promise is sent.

    Raises:
        Rejected: the terms do not meet the site's requirements, or a member is missing from the roster.
    """

    def __init__(
        self, site: str, *, identity: SigningKey, terms: Terms, roster: Mapping[str, str], demand: Demand, keep: Keep
    ) -> None:
        require_pinned(terms, roster)
        if terms.members.get(site) != identity.public:
            raise Rejected(RejectionReason.NOT_A_MEMBER)
        demand(terms)
        self._site, self._identity, self._terms, self._keep = site, identity, terms, keep
        self._key = MaskKey()
        self._joined: tuple[KeyAgreement, PairSecrets] | None = None
        self._release = 0
        self._promised: ConfirmRequest | None = None
        self._noted: set[SumConfirmation] = set()

    @property
    def terms(self) -> Terms:
        """The terms of the session."""
        return self._terms

    def announce(self) -> bytes:
        """Return the site's signed public key for this session."""
        return Announcement.create_signed(self._site, self._terms, self._key.public, identity=self._identity).to_bytes()

    def join(self, announcements: Sequence[bytes]) -> str:
        """Accept the keys of all members, once, and return the digest of the session.

        All sites that accepted the same keys return the same digest.

        Raises:
            Rejected: a key is missing or not signed by its owner, or this site has already joined with other keys.
        """
        if len(announcements) > len(self._terms.members):
            raise Rejected(RejectionReason.REPEATED)
        session = KeyAgreement.from_announcements(self._terms, [read_announcement(data) for data in announcements])
        if session.keys[self._site] != self._key.public:
            raise Rejected(RejectionReason.WRONG_KEY)
        if self._joined is None:
            self._joined = session, self._key.derive_secrets(session.digest, session.keys)
        if self._joined[0].digest != session.digest:
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        return session.digest

    def require_open(self, release: int) -> None:
        """Check, before any budget is charged, that this release still accepts an upload; raise Rejected otherwise."""
        if self._joined is None:
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        if not self._release < release < MAX_RELEASES:
            raise Rejected(RejectionReason.RELEASE_OVER)

    def upload(self, release: int, vector: npt.NDArray[np.int64]) -> bytes:
        """Mask a vector for a release and return the encoded upload; each release accepts one vector.

        Guarantee: the lead and the permitted number of colluding sites learn nothing about the vector except its sum
        with the vectors of one set of survivors (docs/secure_aggregation.md).  The returned bytes may be resent, but
        the vector must not be reused in another release, because a retry draws fresh noise.

        Args:
            release: the number of the release, larger than that of every earlier release.
            vector: integers, shape (terms.length,), int64.  Values above terms.largest, due to noise, are neither
                clipped nor rejected, because privacy holds for the sum of unclipped values modulo 2**bits.

        Raises:
            Rejected: the release is over, or has already begun.
        """
        assert vector.shape == (self._terms.length,)
        assert vector.dtype == np.int64
        self.require_open(release)
        (session, pairs), sites = self._require_joined(), self._terms.sites
        self._release, self._promised = release, None
        seeds = {other: pairs.derive_mask_seed(self._site, other, release=release) for other in sites}
        seeds[self._site] = os.urandom(SEED_BYTES)
        masked = vector.astype(np.uint64) + sum_masks(self._site, seeds, length=self._terms.length)  # modulo 2**64
        # For each peer of a mask: the seed at index 0, and the share of member j at index j.
        dealt = [
            shares.split_secret(seeds[other], threshold=self._terms.threshold, num_shares=len(sites)) for other in sites
        ]
        return Upload(
            session=session.digest,
            release=release,
            site=self._site,
            digests=tuple(
                tuple(
                    shares.hash_share(share, session.digest, release, self._site, other, place)
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
            vector=pack_residues(reduce_residues(masked, self._terms.bits), self._terms.bits),
        ).to_bytes(self._terms)

    def confirm(self, request: bytes) -> bytes:
        """Make a durable, signed promise to help unmask the sum of these survivors and no other sum of this release.

        Raises:
            Rejected: there are too few survivors, the site has promised another set of survivors, or the release is
                over.
        """
        session, _ = self._require_joined()
        confirm_request = ConfirmRequest.from_bytes(request, session)
        if confirm_request.release < self._release:
            raise Rejected(RejectionReason.RELEASE_OVER)
        if confirm_request.release > self._release:
            self._release, self._promised = confirm_request.release, None
        if self._promised not in (None, confirm_request):
            raise Rejected(RejectionReason.SURVIVORS_CHANGED)
        self._promised = confirm_request  # before the write, so that a failed write cannot lead to a second promise
        self._record_promise(confirm_request, confirmed=False)
        return Confirmation.create_signed(confirm_request, self._site, identity=self._identity).to_bytes()

    def unmask(self, request: bytes) -> bytes:
        """Reveal the shares that unmask the sum of the confirmed survivors.

        Raises:
            Rejected: the request differs from this site's promise, or fewer sites than the threshold confirmed it.
        """
        session, pairs = self._require_joined()
        unmasking = UnmaskRequest.from_bytes(request, session)
        if unmasking.asked != self._promised:
            raise Rejected(RejectionReason.NOT_PROMISED)
        self._record_promise(unmasking.asked, confirmed=True)
        revealed = {survivor: self._open_shares(survivor, unmasking, pairs) for survivor in unmasking.survivors}
        return Revealed.create_signed(unmasking.asked, self._site, shares=revealed, identity=self._identity).to_bytes()

    def _open_shares(self, survivor: str, unmasking: UnmaskRequest, pairs: PairSecrets) -> dict[str, str]:
        """Decrypt a survivor's shares, and return those of the seeds to remove; empty if the ciphertext is invalid."""
        sealed = unmasking.get_shares_sealed_by(survivor)
        text = pairs.unseal(sealed, sender=survivor, receiver=self._site, release=unmasking.release)
        size, sites = shares.SHARE_BYTES, self._terms.sites
        if text is None or len(text) != len(sites) * size:
            return {}
        dealt = {other: text[place * size : (place + 1) * size].hex() for place, other in enumerate(sites)}
        return {other: dealt[other] for other in list_needed_seeds(survivor, unmasking.survivors, self._terms)}

    def _record_promise(self, request: ConfirmRequest, *, confirmed: bool) -> None:
        survivors = tuple(request.survivors)
        promise = SumConfirmation(
            session=request.session, release=request.release, survivors=survivors, confirmed=confirmed
        )
        if promise not in self._noted:
            self._keep(promise)
            self._noted = {promise, *(older for older in self._noted if older.release == request.release)}

    def _require_joined(self) -> tuple[KeyAgreement, PairSecrets]:
        if self._joined is None:
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        return self._joined

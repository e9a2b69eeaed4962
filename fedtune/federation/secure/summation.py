"""The lead's part in one release of secure aggregation, from the uploads of the sites to the unmasked sum.

Every message from a site is validated before it changes any state, so that an invalid message excludes only its sender.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

from fedtune.federation.secure import shares
from fedtune.federation.secure.agreement import Announcement, KeyAgreement, Rejected, RejectionReason, Terms
from fedtune.federation.secure.masks import SEED_BYTES, sum_masks
from fedtune.federation.secure.messages import (
    Confirmation,
    ConfirmRequest,
    Revealed,
    UnmaskRequest,
    Upload,
    list_needed_seeds,
    read_announcement,
)
from fedtune.federation.secure.packing import reduce_residues, to_signed_integers, unpack_residues
from fedtune.spec import RunError


def build_session(terms: Terms, announcements: dict[str, bytes]) -> KeyAgreement:
    """Build the session from the announcements (member -> announcement); every site builds an identical session.

    Raises:
        Rejected: an announcement is missing, duplicated or not genuine, or names another site than its sender; the
            error names the sender, unless an announcement is missing.
    """
    return KeyAgreement.from_announcements(
        terms, [_verify_announcement(terms, site, data) for site, data in announcements.items()]
    )


def _verify_announcement(terms: Terms, site: str, data: bytes) -> Announcement:
    """Decode and verify an announcement from `site`."""
    try:
        announced = read_announcement(data)
        announced.require_genuine(terms)
        if announced.site != site:
            raise Rejected(RejectionReason.WRONG_KEY)
    except Rejected as rejected:  # name the site, because one invalid announcement blocks the whole session
        raise Rejected(rejected.wrong, site=site) from None
    return announced


class UnmaskingError(RunError):
    """Raised if the sum of a release cannot be computed; a retry is a new release with fresh masks and fresh noise.

    Attributes:
        site: the survivor that provably sent inconsistent shares; None if there were too few correct shares, in which
            case `Summation.wrong_shares` lists the pairs of sites involved.
    """

    def __init__(self, release: int, what: str, *, site: str | None = None) -> None:
        self.site = site
        super().__init__(f"the sum of secure aggregation release {release} cannot be computed: {what}")


class Summation:
    """State of one release at the lead.

    The survivors are the sites that uploaded before the first call of `build_confirm_request`.  A site confirms only
    one set of survivors per release.  A restarted lead must therefore replay the same messages or begin another
    release.

    Attributes:
        survivors: the sites with a vector in the sum, in sorted order.
        wrong_shares: a pair (holder, dealer) for each wrong or missing share; one of the two sites is at fault.
    """

    def __init__(self, session: KeyAgreement, *, release: int) -> None:
        self._session, self._terms, self._release = session, session.terms, release
        self._uploads: dict[str, Upload] = {}
        self._masked = np.zeros(session.terms.length, np.uint64)
        self._closed = False
        self._confirmed: dict[str, str] = {}
        self._revealed: dict[str, Revealed] = {}
        self.wrong_shares: set[tuple[str, str]] = set()

    @property
    def survivors(self) -> list[str]:
        return sorted(self._uploads)

    def add_upload(self, site: str, data: bytes) -> None:
        """Add a site's masked vector to the sum.

        Raises:
            Rejected: the upload is late, duplicated, or from another site or release.
        """
        upload = Upload.from_bytes(data, self._session)
        self._check_sender(site, upload.site, upload.release)
        if self._closed:
            raise Rejected(RejectionReason.RELEASE_OVER)
        if site in self._uploads:
            raise Rejected(RejectionReason.REPEATED)
        try:
            self._masked += unpack_residues(upload.vector, self._terms.length, self._terms.bits)
        except ValueError:
            raise Rejected(RejectionReason.MALFORMED) from None
        self._uploads[site] = upload

    def build_confirm_request(self) -> bytes:
        """Fix the survivors, and build the confirmation request for all members, including dropped sites.

        Raises:
            UnmaskingError: there are fewer survivors than the threshold.
        """
        self._closed = True
        if len(self._uploads) < self._terms.threshold:
            raise UnmaskingError(self._release, f"{len(self._uploads)} sites uploaded{self._threshold_clause}")
        return self._asked.to_bytes()

    def add_confirmation(self, site: str, data: bytes) -> None:
        """Add a site's confirmation; raise Rejected if it names other survivors or comes from another site."""
        confirmation = Confirmation.from_bytes(data, self._session)
        self._check_sender(site, confirmation.site, confirmation.release)
        if confirmation.asked != self._asked:
            raise Rejected(RejectionReason.SURVIVORS_CHANGED)
        self._confirmed[site] = confirmation.signature

    def build_unmask_request(self, site: str) -> bytes:
        """Build the request that asks a member to reveal its shares.

        Raises:
            UnmaskingError: fewer sites than the threshold confirmed the survivors.
        """
        if len(self._confirmed) < self._terms.threshold:
            raise UnmaskingError(
                self._release, f"{len(self._confirmed)} sites confirmed the survivors{self._threshold_clause}"
            )
        place = self._terms.sites.index(site)
        return UnmaskRequest(
            session=self._session.digest,
            release=self._release,
            survivors=self.survivors,
            confirmations=self._confirmed,
            sealed={
                survivor: base64.b64encode(upload.sealed[place]).decode() for survivor, upload in self._uploads.items()
            },
        ).to_bytes()

    def add_revealed(self, site: str, data: bytes) -> None:
        """Add a site's shares; raise Rejected if they are for other survivors or not signed by the site."""
        revealed = Revealed.from_bytes(data, self._session)
        self._check_sender(site, revealed.site, revealed.release)
        if revealed.survivors != self.survivors:
            raise Rejected(RejectionReason.SURVIVORS_CHANGED)
        self._revealed[site] = revealed

    def compute_total(self) -> npt.NDArray[np.int64]:
        """Unmask and return the sum of the survivors' vectors; shape (terms.length,), int64.

        Raises:
            UnmaskingError: too few sites revealed shares, or too few shares of a survivor's seed are correct.
        """
        if len(self._revealed) < self._terms.threshold:
            raise UnmaskingError(self._release, f"{len(self._revealed)} sites sent shares{self._threshold_clause}")
        # Check all shares first, so that every wrong share is recorded before an error.
        right = {
            survivor: {
                other: self._select_correct_shares(survivor, other)
                for other in list_needed_seeds(survivor, self.survivors, self._terms)
            }
            for survivor in self.survivors
        }
        total = self._masked.copy()
        for survivor, correct in right.items():
            seeds = {other: self._reconstruct_seed(survivor, other, points) for other, points in correct.items()}
            total -= sum_masks(survivor, seeds, length=self._terms.length)
        return to_signed_integers(reduce_residues(total, self._terms.bits), self._terms.bits)

    def _select_correct_shares(self, survivor: str, other: str) -> dict[int, int]:
        """Select the correct shares of a survivor's seed, by evaluation point of the holder; record wrong shares in
        `wrong_shares`.
        """
        digests = self._uploads[survivor].digests[self._terms.sites.index(other)]
        about = (self._session.digest, self._release, survivor, other)
        right: dict[int, int] = {}
        for place, holder in enumerate(self._terms.sites, start=1):
            if holder not in self._revealed:
                continue
            share = self._revealed[holder].share(survivor, other)
            if share is not None and shares.hash_share(share, *about, place) == digests[place]:
                right[place] = share
            else:
                self.wrong_shares.add((holder, survivor))
        return right

    def _reconstruct_seed(self, survivor: str, other: str, right: dict[int, int]) -> bytes:
        """Reconstruct a survivor's seed from correct shares; raise UnmaskingError if there are too few."""
        digests = self._uploads[survivor].digests[self._terms.sites.index(other)]
        about = (self._session.digest, self._release, survivor, other)
        if len(right) < self._terms.threshold:
            what = f"{len(right)} sites sent correct unmasking shares for {survivor}{self._threshold_clause}"
            raise UnmaskingError(self._release, what)
        seed = shares.combine_shares(dict(list(right.items())[: self._terms.threshold]))
        if shares.hash_share(seed, *about, 0) != digests[0] or seed >> 8 * SEED_BYTES:
            raise UnmaskingError(self._release, f"{survivor} sent inconsistent shares of its secret", site=survivor)
        return seed.to_bytes(SEED_BYTES)

    @property
    def _asked(self) -> ConfirmRequest:
        return ConfirmRequest(session=self._session.digest, release=self._release, survivors=self.survivors)

    def _check_sender(self, site: str, named: str, release: int) -> None:
        if named != site:
            raise Rejected(RejectionReason.NOT_A_MEMBER)
        if release != self._release:
            raise Rejected(RejectionReason.RELEASE_OVER)

    @property
    def _threshold_clause(self) -> str:
        return f", but {self._terms.threshold} are required"

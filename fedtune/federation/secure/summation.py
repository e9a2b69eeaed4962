"""The lead's part in one release of a secure sum: collect uploads, fix the survivors, ask for shares, unmask the sum.

Every message of a site is checked before it changes anything, so that a bad one costs its own site's part alone.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

from fedtune.federation.secure import shares
from fedtune.federation.secure.agreement import Announcement, Rejected, Session, Terms, Wrong
from fedtune.federation.secure.masks import SEED_BYTES, masks
from fedtune.federation.secure.messages import (
    Confirmation,
    ConfirmRequest,
    Revealed,
    UnmaskRequest,
    Upload,
    read_announcement,
    seeds_needed,
)
from fedtune.federation.secure.packing import reduced, signed, unpacked
from fedtune.spec import RunError


def session_of(terms: Terms, announcements: dict[str, bytes]) -> Session:
    """The session of what the members announced, by member; every site makes the same of it.

    Raises:
        Rejected: as `Session.of` says, or a site spoke for another; it names the site, unless one is missing.
    """
    return Session.of(terms, [_genuine(terms, site, data) for site, data in announcements.items()])


def _genuine(terms: Terms, site: str, data: bytes) -> Announcement:
    """The site's own announcement."""
    try:
        announced = read_announcement(data)
        announced.require_genuine(terms)
        if announced.site != site:
            raise Rejected(Wrong.WRONG_KEY)
    except Rejected as rejected:  # one of them is enough to keep all from a sum, so that people must know which
        raise Rejected(rejected.wrong, site=site) from None
    return announced


class Unreadable(RunError):
    """A release has no sum; a retry is another release, with other masks and other noise.

    Attributes:
        site: the survivor who dealt shares that do not fit together, for certain; None: too few right ones came, and
            `Summation.wrong_shares` says between whom.
    """

    def __init__(self, release: int, what: str, *, site: str | None = None) -> None:
        self.site = site
        super().__init__(f"release {release} of the secure sum cannot be read: {what}")


class Summation:
    """One release at the lead.

    The survivors are who uploaded before the first `confirm_request`.  A lead that was restarted gives the same
    messages to a new object, or begins another release: no site confirms other survivors for this one.

    Attributes:
        survivors: sites whose vectors are in the sum.
        wrong_shares: (holder, dealer) of each share that is wrong or was not given: one of the two is at fault.
    """

    def __init__(self, session: Session, *, release: int) -> None:
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
        """Take a site's masked vector; raises Rejected for any but the site's own first of this release, in time."""
        upload = Upload.from_bytes(data, self._session)
        self._check_sender(site, upload.site, upload.release)
        if self._closed:
            raise Rejected(Wrong.RELEASE_OVER)
        if site in self._uploads:
            raise Rejected(Wrong.REPEATED)
        try:
            self._masked += unpacked(upload.vector, self._terms.length, self._terms.bits)
        except ValueError:
            raise Rejected(Wrong.MALFORMED) from None
        self._uploads[site] = upload

    def confirm_request(self) -> bytes:
        """The question to every member, whether or not it survived; from here on the survivors are fixed.

        Raises:
            Unreadable: fewer survivors than the threshold.
        """
        self._closed = True
        if len(self._uploads) < self._terms.threshold:
            raise Unreadable(self._release, f"{len(self._uploads)} sites uploaded{self._bound}")
        return self._asked.to_bytes()

    def add_confirmation(self, site: str, data: bytes) -> None:
        """Take a site's confirmation; raises Rejected for one of other survivors, or by another site."""
        confirmation = Confirmation.from_bytes(data, self._session)
        self._check_sender(site, confirmation.site, confirmation.release)
        if confirmation.asked != self._asked:
            raise Rejected(Wrong.SURVIVORS_CHANGED)
        self._confirmed[site] = confirmation.signature

    def unmask_request(self, site: str) -> bytes:
        """The question to a member for its shares.

        Raises:
            Unreadable: fewer sites confirmed than the threshold.
        """
        if len(self._confirmed) < self._terms.threshold:
            raise Unreadable(self._release, f"{len(self._confirmed)} sites confirmed the survivors{self._bound}")
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
        """Take a site's shares; raises Rejected for those of other survivors, or that the site did not sign."""
        revealed = Revealed.from_bytes(data, self._session)
        self._check_sender(site, revealed.site, revealed.release)
        if revealed.survivors != self.survivors:
            raise Rejected(Wrong.SURVIVORS_CHANGED)
        self._revealed[site] = revealed

    def total(self) -> npt.NDArray[np.int64]:
        """The sum of the survivors' vectors, (terms.length,).

        Raises:
            Unreadable: too few sites helped, or gave right shares of a survivor's seeds.
        """
        if len(self._revealed) < self._terms.threshold:
            raise Unreadable(self._release, f"{len(self._revealed)} sites gave shares{self._bound}")
        # All of them first, so that every wrong share is known before the first one ends it.
        right = {
            survivor: {
                other: self._right(survivor, other) for other in seeds_needed(survivor, self.survivors, self._terms)
            }
            for survivor in self.survivors
        }
        total = self._masked.copy()
        for survivor, given in right.items():
            seeds = {other: self._seed(survivor, other, found) for other, found in given.items()}
            total -= masks(survivor, seeds, length=self._terms.length)
        return signed(reduced(total, self._terms.bits), self._terms.bits)

    def _right(self, survivor: str, other: str) -> dict[int, int]:
        """The right shares of a survivor's seed, by their holder's place; wrong ones are noted."""
        digests = self._uploads[survivor].digests[self._terms.sites.index(other)]
        about = (self._session.digest, self._release, survivor, other)
        right: dict[int, int] = {}
        for place, holder in enumerate(self._terms.sites, start=1):
            if holder not in self._revealed:
                continue
            share = self._revealed[holder].share(survivor, other)
            if share is not None and shares.digest(share, *about, place) == digests[place]:
                right[place] = share
            else:
                self.wrong_shares.add((holder, survivor))
        return right

    def _seed(self, survivor: str, other: str, right: dict[int, int]) -> bytes:
        """A survivor's seed, from right shares of it."""
        digests = self._uploads[survivor].digests[self._terms.sites.index(other)]
        about = (self._session.digest, self._release, survivor, other)
        if len(right) < self._terms.threshold:
            what = f"{len(right)} sites gave right shares of what unmasks {survivor}{self._bound}"
            raise Unreadable(self._release, what)
        seed = shares.joined(dict(list(right.items())[: self._terms.threshold]))
        if shares.digest(seed, *about, 0) != digests[0] or seed >> 8 * SEED_BYTES:
            raise Unreadable(self._release, f"{survivor} dealt shares that do not fit together", site=survivor)
        return seed.to_bytes(SEED_BYTES)

    @property
    def _asked(self) -> ConfirmRequest:
        return ConfirmRequest(session=self._session.digest, release=self._release, survivors=self.survivors)

    def _check_sender(self, site: str, named: str, release: int) -> None:
        if named != site:
            raise Rejected(Wrong.NOT_A_MEMBER)
        if release != self._release:
            raise Rejected(Wrong.RELEASE_OVER)

    @property
    def _bound(self) -> str:
        return f", and {self._terms.threshold} must"

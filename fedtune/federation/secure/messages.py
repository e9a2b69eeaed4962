"""Messages of secure aggregation, each with a unique canonical encoding; any other bytes are rejected before parsing.

A release takes three requests from the lead to each site:

    upload    (release)                              -> Upload: masked vector, sealed shares, digests of shares
    confirm   ConfirmRequest: survivors              -> Confirmation: signed
    unmask    UnmaskRequest: confirmations, shares   -> Revealed: signed shares of mask seeds
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from fedtune.federation.secure.agreement import (
    CONFIRMATION,
    SHARES,
    Announcement,
    KeyAgreement,
    Rejected,
    RejectionReason,
    Terms,
)
from fedtune.federation.secure.masks import TAG_BYTES
from fedtune.federation.secure.packing import compute_packed_size
from fedtune.federation.secure.shares import SHARE_BYTES
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.privacy.ledger.chain import to_canonical_json

MAX_JSON_BYTES = 1 << 17  # limit for all messages except uploads; 20 sites need far less
MAX_RELEASES = 1 << 31
_UPLOAD = b"fedtune-secure-upload-1\n"
_HEAD = struct.Struct(">32sIB")
_DIGEST_BYTES = 32
_SHARE = re.compile(f"[0-9a-f]{{{2 * SHARE_BYTES}}}")


def read_announcement(data: bytes) -> Announcement:
    """Decode an announcement; raise Rejected for any other bytes."""
    return Announcement(**_decode_fields(data, Announcement))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmRequest:
    """The lead's request to confirm the survivors of a release, and base class of the later messages.

    Every later message of the release repeats these fields.  All messages are sent as canonical JSON.
    """

    session: str  # digest of the session
    release: int  # number of the release
    survivors: list[str]  # sites with an upload in the sum, in sorted order

    def to_bytes(self) -> bytes:
        """Encode the message as canonical JSON; for a `ConfirmRequest`, the result is also the signed content of a
        confirmation.
        """
        return to_canonical_json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, session: KeyAgreement) -> Self:
        """Decode a message of this session; raise Rejected for any other bytes."""
        message = cls(**_decode_fields(data, cls))
        _check_texts(message.survivors)
        if message.session != session.digest:
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        if not 1 <= message.release < MAX_RELEASES:
            raise Rejected(RejectionReason.MALFORMED)
        session.terms.check_survivors(message.survivors)
        message.check(session.terms)
        return message

    def check(self, terms: Terms) -> None:
        """Check the additional fields of a subclass; raise Rejected if a field is invalid."""

    @property
    def asked(self) -> ConfirmRequest:
        """The fields that a site confirms: session, release and survivors."""
        return ConfirmRequest(session=self.session, release=self.release, survivors=self.survivors)

    def require_confirmed(self, signatures: Mapping[str, str], terms: Terms) -> None:
        """Check that every signature in `signatures` (site -> signature) is from a member and covers these survivors.

        Raises:
            Rejected: a signer is not a member, or a signature is invalid.
        """
        for site, signature in signatures.items():
            if site not in terms.members:
                raise Rejected(RejectionReason.NOT_A_MEMBER)
            if not is_signed(terms.members[site], CONFIRMATION, self.asked.to_bytes(), signature):
                raise Rejected(RejectionReason.WRONG_SIGNATURE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation(ConfirmRequest):
    """A site's signed promise to help unmask the sum of these survivors, and no other sum of the release."""

    site: str
    signature: str

    @classmethod
    def create_signed(cls, asked: ConfirmRequest, site: str, *, identity: SigningKey) -> Confirmation:
        """Create a confirmation and sign it with the site's identity key."""
        return cls(**asdict(asked), site=site, signature=identity.sign(CONFIRMATION, asked.to_bytes()))

    def check(self, terms: Terms) -> None:
        self.require_confirmed({self.site: self.signature}, terms)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmaskRequest(ConfirmRequest):
    """The lead's request for a site's shares, with proof that enough sites confirmed the survivors."""

    confirmations: dict[str, str]  # site -> its signature
    sealed: dict[str, str]  # survivor -> its shares, sealed for the receiving site, in base64

    def check(self, terms: Terms) -> None:
        """Check that at least `threshold` sites confirmed exactly these survivors.

        Raises:
            Rejected: too few confirmations, a wrong signature, or sealed shares that do not match the survivors.
        """
        _check_texts([*self.confirmations.values(), *self.sealed.values()])
        self.require_confirmed(self.confirmations, terms)
        if len(self.confirmations) < terms.threshold:
            raise Rejected(RejectionReason.NOT_CONFIRMED)
        if set(self.sealed) != set(self.survivors):
            raise Rejected(RejectionReason.MALFORMED)

    def get_shares_sealed_by(self, survivor: str) -> bytes:
        """Decode a survivor's sealed shares from base64; empty if the text is invalid."""
        try:
            return base64.b64decode(self.sealed[survivor], validate=True)
        except ValueError:
            return b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Revealed(ConfirmRequest):
    """A site's signed shares of the seeds that unmask the sum of the survivors.

    The signature makes the site accountable for wrong shares.
    """

    site: str
    # survivor -> peer site -> share in hex of the seed of their mask; a survivor's own mask is under its own name.
    # Shares that the survivor did not deal are missing.
    shares: dict[str, dict[str, str]]
    signature: str

    @classmethod
    def create_signed(
        cls, asked: ConfirmRequest, site: str, *, shares: dict[str, dict[str, str]], identity: SigningKey
    ) -> Revealed:
        """Create a message with a site's shares and sign it with the site's identity key."""
        unsigned = cls(**asdict(asked), site=site, shares=shares, signature="")
        return replace(unsigned, signature=identity.sign(SHARES, unsigned.to_bytes()))

    def check(self, terms: Terms) -> None:
        """Check that the shares are well-formed and signed by a member; raise Rejected otherwise."""
        if self.site not in terms.members:
            raise Rejected(RejectionReason.NOT_A_MEMBER)
        for shares in self.shares.values():
            if type(shares) is not dict:
                raise Rejected(RejectionReason.MALFORMED)
            _check_texts(list(shares.values()))
            if not all(_SHARE.fullmatch(share) for share in shares.values()):
                raise Rejected(RejectionReason.MALFORMED)
        unsigned = replace(self, signature="")
        if not is_signed(terms.members[self.site], SHARES, unsigned.to_bytes(), self.signature):
            raise Rejected(RejectionReason.WRONG_SIGNATURE)

    def share(self, survivor: str, other: str) -> int | None:
        """Return the share of one seed as an integer; None if it is missing."""
        share = self.shares.get(survivor, {}).get(other)
        return None if share is None else int(share, 16)


def list_needed_seeds(survivor: str, survivors: list[str], terms: Terms) -> list[str]:
    """List the peers whose masks with `survivor` must be removed from the survivors' sum.

    These masks are the survivor's own mask and its shared masks with dropped sites.  Masks shared by two survivors
    cancel in the sum and are never revealed.  Shares dealt by a dropped site are never revealed either, so that its
    upload stays masked if it arrives late.  Thus a site's own mask is revealed only if the site survived, and its masks
    with survivors are revealed only if it dropped out, never both.
    """
    return [other for other in terms.sites if other == survivor or other not in survivors]


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """A site's masked vector, with encrypted shares of its mask seeds for every member."""

    session: str
    release: int  # number of the release
    site: str  # name of the uploading site
    # SHA-256 digests, shape (K, K + 1): row i for the mask shared with member i, column 0 for its seed, column j for
    # the share of member j
    digests: tuple[tuple[bytes, ...], ...]
    sealed: tuple[bytes, ...]  # shares of all seeds, one ciphertext per member in order
    vector: bytes  # packed residues of the masked vector

    def to_bytes(self, terms: Terms) -> bytes:
        """Encode header, digests, sealed shares and vector; the terms determine the length of each part."""
        head = _HEAD.pack(bytes.fromhex(self.session), self.release, terms.sites.index(self.site))
        return b"".join([_UPLOAD, head, *(digest for row in self.digests for digest in row), *self.sealed, self.vector])

    @classmethod
    def from_bytes(cls, data: bytes, session: KeyAgreement) -> Upload:
        """Decode an upload of this session; raise Rejected for any other bytes."""
        terms = session.terms
        size = compute_upload_size(len(terms.members), length=terms.length, bits=terms.bits)
        if len(data) != size or not data.startswith(_UPLOAD):
            raise Rejected(RejectionReason.MALFORMED)
        digest, release, index = _HEAD.unpack_from(data, len(_UPLOAD))
        if digest.hex() != session.digest:
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        if not (index < len(terms.sites) and 1 <= release < MAX_RELEASES):
            raise Rejected(RejectionReason.MALFORMED)
        num_sites, start = len(terms.sites), len(_UPLOAD) + _HEAD.size
        digests, start = _split_pieces(data, start, num_sites * (num_sites + 1), _DIGEST_BYTES)
        sealed, start = _split_pieces(data, start, num_sites, compute_sealed_size(num_sites))
        rows = tuple(digests[row : row + num_sites + 1] for row in range(0, len(digests), num_sites + 1))
        site, vector = terms.sites[index], data[start:]
        return cls(session=session.digest, release=release, site=site, digests=rows, sealed=sealed, vector=vector)


def compute_upload_size(num_sites: int, *, length: int, bits: int) -> int:
    """Return the size in bytes of an upload with `length` values, which is the same for all sites of a run."""
    shares = num_sites * ((num_sites + 1) * _DIGEST_BYTES + compute_sealed_size(num_sites))
    return len(_UPLOAD) + _HEAD.size + shares + compute_packed_size(length, bits)


def compute_sealed_size(num_sites: int) -> int:
    """Return the size in bytes of a ciphertext between two sites, with a share of every seed of the sender."""
    return num_sites * SHARE_BYTES + TAG_BYTES


def _split_pieces(data: bytes, start: int, count: int, size: int) -> tuple[tuple[bytes, ...], int]:
    """Read `count` pieces of `size` bytes, beginning at offset `start`; return the pieces and the end offset."""
    end = start + count * size
    return tuple(data[place : place + size] for place in range(start, end, size)), end


def _decode_fields(data: bytes, message: Any) -> dict[str, Any]:
    """Decode the fields of a canonical JSON message with the expected names and types; raise Rejected for any other
    bytes.
    """
    if len(data) > MAX_JSON_BYTES:
        raise Rejected(RejectionReason.MALFORMED)
    try:
        decoded = json.loads(data)
        if type(decoded) is not dict or to_canonical_json(decoded) != data:
            raise ValueError("the message is not in canonical form")
    except (ValueError, RecursionError):
        raise Rejected(RejectionReason.MALFORMED) from None
    types = {field.name: str(field.type).partition("[")[0] for field in fields(message)}
    if {name: type(value).__name__ for name, value in decoded.items()} != types:
        raise Rejected(RejectionReason.MALFORMED)
    return decoded


def _check_texts(texts: list[Any]) -> None:
    if not all(type(text) is str for text in texts):
        raise Rejected(RejectionReason.MALFORMED)

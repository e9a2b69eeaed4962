"""Sites and lead of a run in one process, for tests that take the steps of secure aggregation in any order."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.federation.secure.agreement import (
    SHARES,
    Demand,
    KeyAgreement,
    Rejected,
    RejectionReason,
    Terms,
    require_terms,
)
from fedtune.federation.secure.messages import CONFIRMATION, ConfirmRequest, UnmaskRequest
from fedtune.federation.secure.party import Party, SumConfirmation
from fedtune.federation.secure.summation import Summation, build_session
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import to_canonical_json

LARGEST, LENGTH = 1 << 20, 4
ANY = partial(require_terms, min_sites=2, min_threshold=2)


def make_identity(site: str) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest()))


def make_terms(num_sites: int, threshold: int, **changes: Any) -> Terms:
    members = {site: make_identity(site).public for site in "abcdefghijklmnopqrst"[:num_sites]}
    fields = {"run": "r", "proposal": "0" * 64, "members": members, "threshold": threshold, "length": LENGTH}
    return Terms(**{**fields, "largest": LARGEST, **changes})


@dataclass
class Federation:
    """Sites that have joined one session, with their stored promises."""

    terms: Terms
    demand: Demand = ANY
    parties: dict[str, Party] = field(default_factory=dict)
    promises: dict[str, list[SumConfirmation]] = field(default_factory=dict)
    session: KeyAgreement = field(init=False)

    def __post_init__(self) -> None:
        for site in self.terms.sites:
            self.restart(site)
        self.begin_session()

    def restart(self, site: str) -> Party:
        """Replace a site's process; all of its memory is lost."""
        promises = self.promises.setdefault(site, [])
        fields = {"terms": self.terms, "roster": self.terms.members, "demand": self.demand}
        self.parties[site] = Party(site, identity=make_identity(site), keep=promises.append, **fields)
        return self.parties[site]

    def begin_session(self) -> None:
        """Begin a new session of all current sites."""
        announced = {site: party.announce() for site, party in self.parties.items()}
        self.session = build_session(self.terms, announced)
        for party in self.parties.values():
            assert party.join(list(announced.values())) == self.session.digest

    def make_vector(self, site: str) -> npt.NDArray[np.int64]:
        """Build a vector with a distinct power of two per site, so that a sum identifies its sites."""
        return np.full(self.terms.length, 1 << self.terms.sites.index(site))

    def start_release(self, release: int, sites: Collection[str]) -> Summation:
        """Start a release with uploads of these sites."""
        summation = Summation(self.session, release=release)
        for site in sites:
            summation.add_upload(site, self.parties[site].upload(release, self.make_vector(site)))
        return summation

    def add_confirmations(self, summation: Summation, by: Collection[str]) -> Summation:
        """Add the confirmations of these sites to the release."""
        request = summation.build_confirm_request()
        for site in by:
            summation.add_confirmation(site, self.parties[site].confirm(request))
        return summation

    def add_shares(self, summation: Summation, by: Collection[str]) -> Summation:
        """Add the shares of these sites to the release."""
        for site in by:
            summation.add_revealed(site, self.parties[site].unmask(summation.build_unmask_request(site)))
        return summation

    def add_vectors(self, sites: Collection[str]) -> npt.NDArray[np.int64]:
        """Compute the expected sum at the lead."""
        return np.sum([self.make_vector(site) for site in sites], axis=0)

    def request(self, release: int, survivors: Sequence[str]) -> ConfirmRequest:
        return ConfirmRequest(session=self.session.digest, release=release, survivors=list(survivors))

    def forge_unmask_request(self, request: ConfirmRequest, signers: Collection[str], sealed: dict[str, str]) -> bytes:
        """Build an unmask request with signatures in the name of these sites."""
        signatures = {site: make_identity(site).sign(CONFIRMATION, request.to_bytes()) for site in signers}
        fields = {"session": request.session, "release": request.release, "survivors": request.survivors}
        return UnmaskRequest(**fields, confirmations=signatures, sealed=sealed).to_bytes()


def change_message(message: bytes, **fields: Any) -> bytes:
    return to_canonical_json({**json.loads(message), **fields})


def resign_answer(answer: bytes, **fields: Any) -> bytes:
    """Change the fields of a site's shares and sign them again with the site's key."""
    unsigned = change_message(answer, **fields, signature="")
    return change_message(unsigned, signature=make_identity(json.loads(answer)["site"]).sign(SHARES, unsigned))


@contextmanager
def expect_rejection(reason: RejectionReason) -> Iterator[Any]:
    with pytest.raises(Rejected) as error:
        yield error
    assert error.value.wrong is reason

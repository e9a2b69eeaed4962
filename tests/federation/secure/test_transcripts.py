"""No transcript lets the server learn two sums that differ by one site, for any requests in any order."""

import base64
import json
import random

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedtune.federation.secure.agreement import Announcement, KeyAgreement, Rejected
from fedtune.federation.secure.masks import MaskKey
from fedtune.federation.secure.messages import ConfirmRequest, Upload, read_announcement
from fedtune.federation.secure.shares import SHARE_BYTES
from fedtune.privacy.threshold import min_threshold

from .knowledge import Knowledge, RecordedUpload, watch_seeds
from .parties import ANY, Federation, change_message, make_identity, make_terms

pytestmark = pytest.mark.nightly

RANDOM_SITES = st.randoms(use_true_random=True)
"""Random choice of sites; hypothesis's own draws would rarely get as far as a sum."""


class Transcript(RuleBasedStateMachine):
    """A malicious server with colluders that sends honest sites arbitrary requests."""

    @initialize(num_sites=st.integers(3, 5), colluders=st.integers(0, 1))
    def begin(self, num_sites: int, colluders: int) -> None:
        threshold = min_threshold(num_sites, colluders=colluders)
        terms = make_terms(num_sites, threshold, length=2)
        self.federation = Federation(terms, demand=ANY)
        self.colluders = frozenset(terms.sites[num_sites - colluders :])
        self.honest = [site for site in terms.sites if site not in self.colluders]
        self.knowledge = Knowledge(threshold, self.colluders, terms.sites, terms.bits)
        self.keys = {site: [party.announce()] for site, party in self.federation.parties.items()}
        self.uploads, self.signatures, self.requests, self.release = {}, {}, [], 1
        self.sessions = {self.federation.session.digest: self.federation.session}
        self.joined = dict.fromkeys(self.honest, self.federation.session.digest)
        # The adversary has all keys of a colluder; its first key belongs to a party, whose memory it has.
        self.secrets = {
            site: {self.federation.session.digest: self.federation.parties[site]._require_joined()[1]}
            for site in self.colluders
        }
        self.second_keys: dict[str, MaskKey] = {}

    # Actions of the server.

    @rule(rng=RANDOM_SITES)
    def restart(self, rng: random.Random) -> None:
        """Restart a site, or restore it from a backup; in both cases it loses all sessions."""
        site = rng.choice(self.honest)
        self.keys[site].append(self.federation.restart(site).announce())
        self.joined.pop(site, None)

    @rule()
    def announce_second_key(self) -> None:
        for site in self.colluders:
            key = self.second_keys.setdefault(site, MaskKey())
            other = Announcement.create_signed(site, self.federation.terms, key.public, identity=make_identity(site))
            self.keys[site].append(other.to_bytes())

    @rule(rng=RANDOM_SITES)
    def join(self, rng: random.Random) -> None:
        """Show some sites old and new keys of the server's choice."""
        newest = rng.random() < 0.7
        announcements = [keys[-1] if newest else rng.choice(keys) for keys in self.keys.values()]
        for site in self._draw_sites(rng):
            try:
                digest = self.federation.parties[site].join(announcements)
            except Rejected:
                continue
            self.joined[site] = digest
            self.sessions[digest] = session = KeyAgreement.from_announcements(
                self.federation.terms, [read_announcement(announcement) for announcement in announcements]
            )
            for colluder in self.colluders:
                key = self.second_keys.get(colluder)
                if key is not None and session.keys[colluder] == key.public:
                    self.secrets[colluder][digest] = key.derive_secrets(digest, session.keys)
                else:
                    first_key = self.federation.parties[colluder]._key
                    self.secrets[colluder][digest] = first_key.derive_secrets(digest, session.keys)

    @rule(rng=RANDOM_SITES)
    def run_release(self, rng: random.Random) -> None:
        """Run all steps of a release twice, with one set of survivors each, in sequence or interleaved."""
        self.release += rng.random() < 0.7
        first, second = self._draw_set(rng, self.release), self._draw_set(rng, self.release)
        self._upload(self.release, self._draw_sites(rng), rng)
        self._confirm(first, self._draw_sites(rng))
        if rng.random() < 0.5:
            self._unmask(first, self._draw_sites(rng), padded=rng.random() < 0.3)
        self._upload(self.release, self._draw_sites(rng), rng)
        self._confirm(second, self._draw_sites(rng))
        for survivors in (second, first):
            self._unmask(survivors, self._draw_sites(rng), padded=rng.random() < 0.3)

    @rule(rng=RANDOM_SITES)
    def ask_for_uploads(self, rng: random.Random) -> None:
        """Request uploads for the current or a past release."""
        self._upload(rng.randint(1, self.release), self._draw_sites(rng), rng)

    @rule(rng=RANDOM_SITES)
    def ask_to_confirm(self, rng: random.Random) -> None:
        """Request confirmations of one set from some sites for the current or a past release, and then their shares."""
        request = self._draw_set(rng, rng.randint(1, self.release))
        self._confirm(request, self._draw_sites(rng))
        self._unmask(request, self._draw_sites(rng), padded=False)

    @rule(rng=RANDOM_SITES)
    def ask_to_unmask(self, rng: random.Random) -> None:
        """Request shares for a set that some site has confirmed, or for any set."""
        request = self._draw_set(rng, rng.randint(1, self.release))
        if self.signatures and rng.random() < 0.7:
            request = ConfirmRequest(**json.loads(rng.choice(sorted(self.signatures))))
        self._unmask(request, self._draw_sites(rng), padded=rng.random() < 0.3)

    @rule(rng=RANDOM_SITES)
    def repeat_requests(self, rng: random.Random) -> None:
        for _ in range(min(len(self.requests), 5)):
            self._ask(*rng.choice(self.requests))

    def _upload(self, release: int, sites: list[str], rng: random.Random) -> None:
        for site in sites:
            vector = np.array([1 << self.federation.terms.sites.index(site), rng.randint(-50, 50)])
            try:
                with watch_seeds() as seeds:
                    sent = self.federation.parties[site].upload(release, vector)
            except Rejected:
                continue
            session = self.sessions[self.joined[site]]
            upload = Upload.from_bytes(sent, session)
            self.knowledge.sent.append(RecordedUpload(site, upload, vector, seeds[-1]))
            self.uploads.setdefault((session.digest, release, site), []).append(upload)
            self._open(upload, session)

    def _open(self, upload: Upload, session: KeyAgreement) -> None:
        """Open the shares that are sealed for the colluders."""
        sites = self.federation.terms.sites
        for colluder in self.colluders:
            pairs = self.secrets[colluder][session.digest]
            text = pairs.unseal(
                upload.sealed[sites.index(colluder)], sender=upload.site, receiver=colluder, release=upload.release
            )
            for index, other in enumerate(sites):
                value = int.from_bytes(text[index * SHARE_BYTES : (index + 1) * SHARE_BYTES])
                self.knowledge.learn(session.digest, upload.release, upload.site, other, {colluder: value})

    def _confirm(self, request: ConfirmRequest, sites: list[str]) -> None:
        for site in sites:
            self._ask(site, "confirm", request.to_bytes())

    def _unmask(self, request: ConfirmRequest, sites: list[str], *, padded: bool) -> None:
        """Send an unmask request with all known confirmations, optionally padded with other signatures of the same
        sites.
        """
        signed = dict(self.signatures.get(request.to_bytes(), {}))
        for signatures in self.signatures.values() if padded else ():
            signed = {**signatures, **signed}
        for site in sites:
            sealed = {}
            for survivor in request.survivors:
                uploads = self.uploads.get((request.session, request.release, survivor), [])
                index = self.federation.terms.sites.index(site)
                sealed[survivor] = base64.b64encode(uploads[-1].sealed[index]).decode() if uploads else ""
            forged = self.federation.forge_unmask_request(request, self.colluders, sealed)
            self._ask(
                site,
                "unmask",
                change_message(forged, confirmations={**signed, **json.loads(forged)["confirmations"]}),
            )

    def _ask(self, site: str, step: str, request: bytes) -> None:
        self.requests.append((site, step, request))
        party = self.federation.parties[site]
        try:
            answer = party.confirm(request) if step == "confirm" else party.unmask(request)
        except Rejected:
            return
        if step == "confirm":
            fields = json.loads(answer)
            signed = ConfirmRequest(**{key: fields[key] for key in ("session", "release", "survivors")}).to_bytes()
            self.signatures.setdefault(signed, {})[site] = fields["signature"]
        else:
            self.knowledge.record_answer(answer)

    def _draw_sites(self, rng: random.Random) -> list[str]:
        return self.honest if rng.random() < 0.5 else [site for site in self.honest if rng.random() < 0.7]

    def _draw_set(self, rng: random.Random, release: int) -> ConfirmRequest:
        """Draw a set of survivors, mostly from the sites' session, often all sites or all but one."""
        joined = sorted(self.joined.values())
        session = rng.choice(joined if joined and rng.random() < 0.9 else sorted(self.sessions))
        sites = self.federation.terms.sites
        dropped = rng.sample(sites, rng.choice([0, 0, 1, 1, 2]))
        survivors = [site for site in sites if site not in dropped]
        return ConfirmRequest(session=session, release=release, survivors=survivors)

    # Invariants.

    @invariant()
    def check_one_sum_per_release(self) -> None:
        if not hasattr(self, "knowledge"):
            return
        used: set[int] = set()
        for combination in self.knowledge.find_readable_sums():
            uploads = [self.knowledge.sent[number] for number in combination]
            assert set(combination.values()) == {1}, "only sums may be readable, no other combination"
            assert len({(record.upload.session, record.upload.release) for record in uploads}) == 1
            assert len(uploads) >= self.knowledge.threshold - len(self.colluders)
            assert not used & set(combination), "no upload may be in two sums"
            used |= set(combination)
            vectors = np.sum([record.vector for record in uploads], axis=0)
            assert self.knowledge.unmask(combination).tolist() == vectors.tolist()


TestTranscript = Transcript.TestCase
TestTranscript.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # seeded draws cannot be shrunk
)

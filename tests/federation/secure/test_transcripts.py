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

from .knowledge import Knowledge, Sent, watch_seeds
from .parties import ANY, Federation, change_message, make_identity, make_terms

pytestmark = pytest.mark.nightly

CHANCE = st.randoms(use_true_random=True)
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
        self.uploads, self.signatures, self.asked, self.release = {}, {}, [], 1
        self.sessions = {self.federation.session.digest: self.federation.session}
        self.joined = dict.fromkeys(self.honest, self.federation.session.digest)
        # The adversary has all keys of a colluder; its first key belongs to a party, whose memory it has.
        self.secrets = {
            site: {self.federation.session.digest: self.federation.parties[site]._require_joined()[1]}
            for site in self.colluders
        }
        self.second: dict[str, MaskKey] = {}

    # Actions of the server.

    @rule(chance=CHANCE)
    def restart(self, chance: random.Random) -> None:
        """Restart a site, or restore it from a backup; in both cases it loses all sessions."""
        site = chance.choice(self.honest)
        self.keys[site].append(self.federation.restart(site).announce())
        self.joined.pop(site, None)

    @rule()
    def show_two_keys(self) -> None:
        for site in self.colluders:
            key = self.second.setdefault(site, MaskKey())
            other = Announcement.create_signed(site, self.federation.terms, key.public, identity=make_identity(site))
            self.keys[site].append(other.to_bytes())

    @rule(chance=CHANCE)
    def join(self, chance: random.Random) -> None:
        """Show some sites old and new keys of the server's choice."""
        newest = chance.random() < 0.7
        chosen = [keys[-1] if newest else chance.choice(keys) for keys in self.keys.values()]
        for site in self._draw_sites(chance):
            try:
                digest = self.federation.parties[site].join(chosen)
            except Rejected:
                continue
            self.joined[site] = digest
            self.sessions[digest] = session = KeyAgreement.from_announcements(
                self.federation.terms, [read_announcement(one) for one in chosen]
            )
            for colluder in self.colluders:
                key = self.second.get(colluder)
                if key is not None and session.keys[colluder] == key.public:
                    self.secrets[colluder][digest] = key.derive_secrets(digest, session.keys)
                else:
                    own = self.federation.parties[colluder]._key
                    self.secrets[colluder][digest] = own.derive_secrets(digest, session.keys)

    @rule(chance=CHANCE)
    def run_release(self, chance: random.Random) -> None:
        """Run all steps of a release twice, with one set of survivors each, in sequence or interleaved."""
        self.release += chance.random() < 0.7
        first, second = self._draw_set(chance, self.release), self._draw_set(chance, self.release)
        self._upload(self.release, self._draw_sites(chance), chance)
        self._confirm(first, self._draw_sites(chance))
        if chance.random() < 0.5:
            self._unmask(first, self._draw_sites(chance), stuffed=chance.random() < 0.3)
        self._upload(self.release, self._draw_sites(chance), chance)
        self._confirm(second, self._draw_sites(chance))
        for survivors in (second, first):
            self._unmask(survivors, self._draw_sites(chance), stuffed=chance.random() < 0.3)

    @rule(chance=CHANCE)
    def ask_for_uploads(self, chance: random.Random) -> None:
        """Request uploads for the current or a past release."""
        self._upload(chance.randint(1, self.release), self._draw_sites(chance), chance)

    @rule(chance=CHANCE)
    def ask_to_confirm(self, chance: random.Random) -> None:
        """Request confirmations of one set from some sites for the current or a past release, and then their shares."""
        asked = self._draw_set(chance, chance.randint(1, self.release))
        self._confirm(asked, self._draw_sites(chance))
        self._unmask(asked, self._draw_sites(chance), stuffed=False)

    @rule(chance=CHANCE)
    def ask_to_unmask(self, chance: random.Random) -> None:
        """Request shares for a set that some site has confirmed, or for any set."""
        asked = self._draw_set(chance, chance.randint(1, self.release))
        if self.signatures and chance.random() < 0.7:
            asked = ConfirmRequest(**json.loads(chance.choice(sorted(self.signatures))))
        self._unmask(asked, self._draw_sites(chance), stuffed=chance.random() < 0.3)

    @rule(chance=CHANCE)
    def ask_again(self, chance: random.Random) -> None:
        for _ in range(min(len(self.asked), 5)):
            self._ask(*chance.choice(self.asked))

    def _upload(self, release: int, sites: list[str], chance: random.Random) -> None:
        for site in sites:
            vector = np.array([1 << self.federation.terms.sites.index(site), chance.randint(-50, 50)])
            try:
                with watch_seeds() as seeds:
                    sent = self.federation.parties[site].upload(release, vector)
            except Rejected:
                continue
            session = self.sessions[self.joined[site]]
            upload = Upload.from_bytes(sent, session)
            self.knowledge.sent.append(Sent(site, upload, vector, seeds[-1]))
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
            for place, other in enumerate(sites):
                value = int.from_bytes(text[place * SHARE_BYTES : (place + 1) * SHARE_BYTES])
                self.knowledge.learn(session.digest, upload.release, upload.site, other, {colluder: value})

    def _confirm(self, asked: ConfirmRequest, sites: list[str]) -> None:
        for site in sites:
            self._ask(site, "confirm", asked.to_bytes())

    def _unmask(self, asked: ConfirmRequest, sites: list[str], *, stuffed: bool) -> None:
        """Send an unmask request with all known confirmations, optionally padded with other signatures of the same
        sites.
        """
        signed = dict(self.signatures.get(asked.to_bytes(), {}))
        for others in self.signatures.values() if stuffed else ():
            signed = {**others, **signed}
        for site in sites:
            sealed = {}
            for survivor in asked.survivors:
                there = self.uploads.get((asked.session, asked.release, survivor), [])
                place = self.federation.terms.sites.index(site)
                sealed[survivor] = base64.b64encode(there[-1].sealed[place]).decode() if there else ""
            request = self.federation.forge_question(asked, self.colluders, sealed)
            self._ask(
                site,
                "unmask",
                change_message(request, confirmations={**signed, **json.loads(request)["confirmations"]}),
            )

    def _ask(self, site: str, what: str, request: bytes) -> None:
        self.asked.append((site, what, request))
        party = self.federation.parties[site]
        try:
            answer = party.confirm(request) if what == "confirm" else party.unmask(request)
        except Rejected:
            return
        if what == "confirm":
            fields = json.loads(answer)
            about = ConfirmRequest(**{key: fields[key] for key in ("session", "release", "survivors")}).to_bytes()
            self.signatures.setdefault(about, {})[site] = fields["signature"]
        else:
            self.knowledge.hear(answer)

    def _draw_sites(self, chance: random.Random) -> list[str]:
        return self.honest if chance.random() < 0.5 else [site for site in self.honest if chance.random() < 0.7]

    def _draw_set(self, chance: random.Random, release: int) -> ConfirmRequest:
        """Draw a set of survivors, mostly from the sites' session, often all sites or all but one."""
        joined = sorted(self.joined.values())
        session = chance.choice(joined if joined and chance.random() < 0.9 else sorted(self.sessions))
        sites = self.federation.terms.sites
        left_out = chance.sample(sites, chance.choice([0, 0, 1, 1, 2]))
        survivors = [site for site in sites if site not in left_out]
        return ConfirmRequest(session=session, release=release, survivors=survivors)

    # Invariants.

    @invariant()
    def check_one_sum_per_release(self) -> None:
        if not hasattr(self, "knowledge"):
            return
        seen: set[int] = set()
        for combination in self.knowledge.find_readable_sums():
            uploads = [self.knowledge.sent[number] for number in combination]
            assert set(combination.values()) == {1}, "only sums may be readable, no other combination"
            assert len({(one.upload.session, one.upload.release) for one in uploads}) == 1
            assert len(uploads) >= self.knowledge.threshold - len(self.colluders)
            assert not seen & set(combination), "no upload may be in two sums"
            seen |= set(combination)
            vectors = np.sum([one.vector for one in uploads], axis=0)
            assert self.knowledge.read(combination).tolist() == vectors.tolist()


TestTranscript = Transcript.TestCase
TestTranscript.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # seeded draws cannot be shrunk
)

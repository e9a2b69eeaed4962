"""No upload leaves a site without a charge, for any requests of a lead and any restarts."""

import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fedtune.federation.protocol import ANNOUNCE, CONFIRM, JOIN, UNMASK, RoundRequest, derive_terms
from fedtune.federation.secure.agreement import KeyAgreement, Rejected
from fedtune.federation.secure.at_site import Parties
from fedtune.federation.secure.messages import ConfirmRequest
from fedtune.federation.secure.summation import Summation, UnmaskingError, build_session
from fedtune.federation.site_round import TrainingResult
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Update

from .test_secure_site import NAMES, VECTOR, Federation, SecureSite, make_federation

RANDOM_SITES = st.randoms(use_true_random=True)
"""Random choice of sites; hypothesis's own draws would rarely get as far as a sum."""


@dataclass
class WatchedSite(SecureSite):
    """A site that trains to a new vector each time and records all of them, or fails on demand."""

    vectors: list[np.ndarray] = field(default_factory=list)
    fails: bool = False

    def _train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> TrainingResult:
        self.vectors.append(VECTOR + np.int64(100 * NAMES.index(self.policy.site) + len(self.vectors)))
        if self.fails:
            self.fails = False
            raise RuntimeError("of records")
        return TrainingResult(share=self.vectors[-1].copy())


class Charges(RuleBasedStateMachine):
    """A lead that sends arbitrary requests to sites that restart and fail."""

    make_new: ClassVar[Callable[[], Federation]]
    sums_read: ClassVar[int] = 0

    @initialize(rng=RANDOM_SITES)
    def begin(self, rng: random.Random) -> None:
        self.federation = type(self).make_new()
        self.sessions: list[tuple[str, KeyAgreement, list[bytes]]] = []
        self.released: dict[str, dict[bytes, np.ndarray]] = {site: {} for site in NAMES}
        self.newest_release = 0
        self._begin_session()
        self._play(1, rng)

    # Actions.

    @rule(rng=RANDOM_SITES)
    def begin_new_session(self, rng: random.Random) -> None:
        self._begin_session(*self._draw_sites(rng))

    @rule(rng=RANDOM_SITES)
    def restore_earlier_session(self, rng: random.Random) -> None:
        if self.sessions:
            name, _, announcements = rng.choice(self.sessions)
            self.federation.name = name
            for site in self._draw_sites(rng):
                self.federation.step(site, JOIN, *announcements)

    @rule(rng=RANDOM_SITES)
    def restart(self, rng: random.Random) -> None:
        self.federation.sites[rng.choice(NAMES)].parties = Parties()

    @rule(rng=RANDOM_SITES)
    def fail(self, rng: random.Random) -> None:
        site = self.federation.sites[rng.choice(NAMES)]
        site.fails = True

    @rule(rng=RANDOM_SITES)
    def ask_for_uploads(self, rng: random.Random) -> None:
        for site in self._draw_sites(rng):
            self._upload(site, rng.randint(1, 9))

    @rule(rng=RANDOM_SITES)
    def ask_to_confirm(self, rng: random.Random) -> None:
        """Request confirmations of arbitrary survivors from some sites, before any upload."""
        if self.sessions:
            session = self.sessions[-1][1]
            survivors = sorted(rng.sample(NAMES, rng.choice([2, 3])))
            request = ConfirmRequest(session=session.digest, release=rng.randint(1, 9), survivors=survivors)
            for site in self._draw_sites(rng):
                self.federation.step(site, CONFIRM, request.to_bytes())

    @rule(rng=RANDOM_SITES)
    def run_release(self, rng: random.Random) -> None:
        """Run a release from uploads, some requested twice, to the sum if possible; often in a new session."""
        if rng.random() < 0.6:
            self._begin_session()
        self._play(self.newest_release + 1 if rng.random() < 0.7 else rng.randint(1, 8), rng)

    def _play(self, release: int, rng: random.Random) -> None:
        self.newest_release = max(self.newest_release, release)
        sessions = [session for name, session, _ in self.sessions if name == self.federation.name]
        if not sessions:
            return
        summation, uploads = Summation(sessions[0], release=release), list[tuple[str, bytes]]()
        try:
            for site in NAMES + self._draw_sites(rng):
                if (data := self._upload(site, release)) is not None and site not in dict(uploads):
                    summation.add_upload(site, data)
                    uploads.append((site, data))
            request = summation.build_confirm_request()
            for site in NAMES:
                if isinstance(answer := self.federation.step(site, CONFIRM, request), bytes):
                    summation.add_confirmation(site, answer)
            for site in NAMES:
                request = summation.build_unmask_request(site)
                if isinstance(answer := self.federation.step(site, UNMASK, request), bytes):
                    summation.add_revealed(site, answer)
            total = summation.compute_total()
        except (Rejected, UnmaskingError):
            return
        np.testing.assert_array_equal(total, sum(self.released[site][data] for site, data in uploads))
        assert len(uploads) == len(NAMES), "a sum must have as many sites as the plan assumes"
        type(self).sums_read += 1

    def _begin_session(self, *sites: str) -> None:
        name, federation = secrets.token_hex(16), self.federation
        replies = {site: federation.step(site, ANNOUNCE, name=name) for site in NAMES}
        announcements = {site: reply for site, reply in replies.items() if isinstance(reply, bytes)}
        if len(announcements) < len(NAMES):
            return
        keys = {site: member.key.public for site, member in federation.sites.items()}
        terms = derive_terms(federation.propose(), members=keys, length=VECTOR.size)
        self.sessions.append((name, build_session(terms, announcements), list(announcements.values())))
        federation.name = name
        for site in sites or NAMES:
            federation.step(site, JOIN, *announcements.values(), name=name)

    def _upload(self, site: str, release: int) -> bytes | None:
        """Request an upload and record it with its vector, the newest vector unless the upload is a repeat."""
        body = self.federation.upload(site, release).body
        if not isinstance(body, Update):
            return None
        assert isinstance(body.tensors, bytes)
        watched = self.federation.sites[site]
        self.released[site].setdefault(body.tensors, watched.vectors[-1])
        return body.tensors

    def _draw_sites(self, rng: random.Random) -> tuple[str, ...]:
        return NAMES if rng.random() < 0.5 else tuple(site for site in NAMES if rng.random() < 0.7)

    # Invariants.

    @invariant()
    def check_all_is_charged(self) -> None:
        if not hasattr(self, "newest_release"):
            return
        for name, site in self.federation.sites.items():
            charged = self.federation.count_charged_rounds(name)
            assert len(site.vectors) <= charged <= self.federation.propose().plan.max_rounds
            assert len(self.released[name]) <= len(site.vectors), "one vector was released under two masks"
            assert len({vector.tobytes() for vector in self.released[name].values()}) == len(self.released[name])


@pytest.mark.parametrize("histories", [3, pytest.param(40, marks=pytest.mark.nightly)])
def test_random_secure_histories_release_only_charged_updates(histories: int, tmp_path: Path) -> None:
    def make_new_federation() -> Federation:
        folder = tmp_path / secrets.token_hex(8)
        folder.mkdir()
        return make_federation(folder, WatchedSite, num_rounds=5, spare_rounds=3)

    class Histories(Charges):
        pass

    Histories.make_new = staticmethod(make_new_federation)
    options = settings(
        max_examples=histories, stateful_step_count=15, deadline=None, database=None, phases=[Phase.generate]
    )
    run_state_machine_as_test(Histories, settings=options)
    assert Histories.sums_read >= histories // 2, "too few histories reached a sum"

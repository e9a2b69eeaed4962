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

CHANCE = st.randoms(use_true_random=True)
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

    made: ClassVar[Callable[[], Federation]]
    sums_read: ClassVar[int] = 0

    @initialize(chance=CHANCE)
    def begin(self, chance: random.Random) -> None:
        self.federation = type(self).made()
        self.sessions: list[tuple[str, KeyAgreement, list[bytes]]] = []
        self.left: dict[str, dict[bytes, np.ndarray]] = {site: {} for site in NAMES}
        self.newest = 0
        self._begin_a_session()
        self._play(1, chance)

    # Actions.

    @rule(chance=CHANCE)
    def begin_another_session(self, chance: random.Random) -> None:
        self._begin_a_session(*self._draw_sites(chance))

    @rule(chance=CHANCE)
    def restore_earlier_session(self, chance: random.Random) -> None:
        if self.sessions:
            name, _, announced = chance.choice(self.sessions)
            self.federation.name = name
            for site in self._draw_sites(chance):
                self.federation.step(site, JOIN, *announced)

    @rule(chance=CHANCE)
    def restart(self, chance: random.Random) -> None:
        self.federation.sites[chance.choice(NAMES)].parties = Parties()

    @rule(chance=CHANCE)
    def fail(self, chance: random.Random) -> None:
        site = self.federation.sites[chance.choice(NAMES)]
        site.fails = True

    @rule(chance=CHANCE)
    def ask_for_uploads(self, chance: random.Random) -> None:
        for site in self._draw_sites(chance):
            self._upload(site, chance.randint(1, 9))

    @rule(chance=CHANCE)
    def ask_to_confirm(self, chance: random.Random) -> None:
        """Request confirmations of arbitrary survivors from some sites, before any upload."""
        if self.sessions:
            session = self.sessions[-1][1]
            survivors = sorted(chance.sample(NAMES, chance.choice([2, 3])))
            request = ConfirmRequest(session=session.digest, release=chance.randint(1, 9), survivors=survivors)
            for site in self._draw_sites(chance):
                self.federation.step(site, CONFIRM, request.to_bytes())

    @rule(chance=CHANCE)
    def run_release(self, chance: random.Random) -> None:
        """Run a release from uploads, some requested twice, to the sum if possible; often in a new session."""
        if chance.random() < 0.6:
            self._begin_a_session()
        self._play(self.newest + 1 if chance.random() < 0.7 else chance.randint(1, 8), chance)

    def _play(self, release: int, chance: random.Random) -> None:
        self.newest = max(self.newest, release)
        current = [session for name, session, _ in self.sessions if name == self.federation.name]
        if not current:
            return
        made, of_sum = Summation(current[0], release=release), list[tuple[str, bytes]]()
        try:
            for site in NAMES + self._draw_sites(chance):
                if (data := self._upload(site, release)) is not None and site not in dict(of_sum):
                    made.add_upload(site, data)
                    of_sum.append((site, data))
            question = made.build_confirm_request()
            for site in NAMES:
                if isinstance(answer := self.federation.step(site, CONFIRM, question), bytes):
                    made.add_confirmation(site, answer)
            for site in NAMES:
                if isinstance(answer := self.federation.step(site, UNMASK, made.build_unmask_request(site)), bytes):
                    made.add_revealed(site, answer)
            total = made.compute_total()
        except (Rejected, UnmaskingError):
            return
        np.testing.assert_array_equal(total, sum(self.left[site][data] for site, data in of_sum))
        assert len(of_sum) == len(NAMES), "a sum must have as many sites as the plan assumes"
        type(self).sums_read += 1

    def _begin_a_session(self, *joining: str) -> None:
        name, federation = secrets.token_hex(16), self.federation
        answers = {site: federation.step(site, ANNOUNCE, name=name) for site in NAMES}
        announced = {site: one for site, one in answers.items() if isinstance(one, bytes)}
        if len(announced) < len(NAMES):
            return
        keys = {site: one.key.public for site, one in federation.sites.items()}
        terms = derive_terms(federation.asked(), members=keys, length=VECTOR.size)
        self.sessions.append((name, build_session(terms, announced), list(announced.values())))
        federation.name = name
        for site in joining or NAMES:
            federation.step(site, JOIN, *announced.values(), name=name)

    def _upload(self, site: str, release: int) -> bytes | None:
        """Request an upload and record it with its vector, the newest vector unless the upload is a repeat."""
        body = self.federation.upload(site, release).body
        if not isinstance(body, Update):
            return None
        assert isinstance(body.tensors, bytes)
        watched = self.federation.sites[site]
        self.left[site].setdefault(body.tensors, watched.vectors[-1])
        return body.tensors

    def _draw_sites(self, chance: random.Random) -> tuple[str, ...]:
        return NAMES if chance.random() < 0.5 else tuple(site for site in NAMES if chance.random() < 0.7)

    # Invariants.

    @invariant()
    def check_all_is_charged(self) -> None:
        if not hasattr(self, "newest"):
            return
        for name, site in self.federation.sites.items():
            charged = self.federation.count_charged_rounds(name)
            assert len(site.vectors) <= charged <= self.federation.asked().plan.max_rounds
            assert len(self.left[name]) <= len(site.vectors), "one vector was released under two masks"
            assert len({vector.tobytes() for vector in self.left[name].values()}) == len(self.left[name])


@pytest.mark.parametrize("histories", [3, pytest.param(40, marks=pytest.mark.nightly)])
def test_random_secure_histories_release_only_charged_updates(histories: int, tmp_path: Path) -> None:
    def make_in_new_folder() -> Federation:
        folder = tmp_path / secrets.token_hex(8)
        folder.mkdir()
        return make_federation(folder, WatchedSite, num_rounds=5, spare_rounds=3)

    class Histories(Charges):
        pass

    Histories.made = staticmethod(make_in_new_folder)
    few = settings(
        max_examples=histories, stateful_step_count=15, deadline=None, database=None, phases=[Phase.generate]
    )
    run_state_machine_as_test(Histories, settings=few)
    assert Histories.sums_read >= histories // 2, "too few histories reached a sum"

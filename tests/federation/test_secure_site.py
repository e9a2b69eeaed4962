"""Answers of sites with ledgers in the steps of secure aggregation, to malicious leads and servers."""

import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.federation import protocol
from fedtune.federation.protocol import ANNOUNCE, CONFIRM, JOIN, UNMASK, Reply, RoundRequest
from fedtune.federation.secure import at_site
from fedtune.federation.secure.agreement import KeyAgreement, require_terms
from fedtune.federation.secure.at_site import Parties, SiteAggregator, make_promise_writer
from fedtune.federation.secure.messages import ConfirmRequest
from fedtune.federation.secure.summation import Summation, build_session
from fedtune.federation.site_round import PreparedRun, TrainingResult, answer, answer_step
from fedtune.model.adapter import Adapter
from fedtune.privacy import durable
from fedtune.privacy.distributed_noise import SecureAggregationSpec
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import to_canonical_json
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refusal, Update
from fedtune.privacy.trust import Trust

from ..builders import round_request, set_methods
from ..conftest import make_site_policy, run_plan, run_proposal
from ..privacy.builders import lead_key, make_key, stranger_key
from .conftest import Station

NAMES = ("east", "north", "south")
VECTOR = np.arange(10, dtype=np.int64) - 5
SESSION_DIFFERS = (Reason.SECURE_STEP, "session_differs")
"""A site's answer about a session that it is not in."""


@dataclass
class SecureSite(Station):
    """A site whose training returns a fixed vector; `parties` contains the state that a restart loses."""

    preparation: dict[str, Any] = field(default_factory=lambda: {"update_dtype": "bfloat16", "members": NAMES})
    members: dict[str, str] = field(default_factory=dict)
    parties: Parties = field(default_factory=Parties)

    @property
    def promises(self) -> Path:
        return self.folder / "promises.jsonl"

    def _train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> TrainingResult:
        self.trained.append((request.round, attempt))
        return TrainingResult(share=VECTOR.copy())

    @property
    def sums(self) -> SiteAggregator:
        trust = self.policy.trust
        demand = partial(require_terms, min_sites=trust.min_sites, min_threshold=trust.min_threshold)
        roster = {**self.members, self.policy.site: self.key.public}
        fields = {"demand": demand, "roster": roster, "keep": make_promise_writer(self.promises)}
        return SiteAggregator(site=self.policy.site, identity=self.key, parties=self.parties, **fields)


@dataclass
class Federation:
    """Three sites, their lead's keys, and the lead's requests."""

    sites: dict[str, SecureSite]
    propose: Callable[..., Proposal]
    lead: SigningKey
    other_lead: SigningKey
    adapter: Adapter
    name: str = "0" * 32
    """The lead's current session."""

    def step(self, site: str, kind: str, *parts: bytes, name: str = "", lead: Any = None, signed: Any = None) -> Any:
        """Return a site's answer to these parts; `signed` are the parts that the lead signed, if they were changed."""
        key, digest = lead or self.lead, protocol.hash_parts(parts if signed is None else signed)
        fields = {"expires": 1e12, "step": kind, "session": name or self.name, "parts_digest": digest}
        request = protocol.SumRequest(proposal=self.propose(lead=key.public), site=site, **fields)
        return answer_step(self.sites[site].open(), request.sign_with(key), list(parts))

    def ask_site(self, site: str, kind: str, *parts: bytes, **options: Any) -> bytes:
        answer = self.step(site, kind, *parts, **options)
        assert isinstance(answer, bytes), answer
        return answer

    def get_refusal(self, site: str, kind: str, *parts: bytes, **options: Any) -> tuple[Reason, object]:
        answer = self.step(site, kind, *parts, **options)
        assert isinstance(answer, Refusal), answer
        return answer.reason, answer.requested

    def begin_session(self) -> tuple[KeyAgreement, str, list[bytes]]:
        """Begin a session of all sites; return its name and announcements."""
        name, proposal = secrets.token_hex(16), self.propose()
        self.name = name
        keys = {site: member.key.public for site, member in self.sites.items()}
        terms = protocol.derive_terms(proposal, members=keys, length=VECTOR.size)
        announcements = {site: self.ask_site(site, ANNOUNCE, name=name) for site in NAMES}
        session = build_session(terms, announcements)
        for site in NAMES:
            assert self.ask_site(site, JOIN, *announcements.values(), name=name) == session.digest.encode()
        return session, name, list(announcements.values())

    def request(self, site: str, round: int = 1, *, expires: float = 1e12) -> RoundRequest:
        fields = {"round": round, "site": site, "adapter_digest": self.adapter.digest(), "session": self.name}
        return round_request(self.propose(), expires=expires, **fields)

    def upload(self, site: str, round: int = 1) -> Reply:
        signed = self.request(site, round).sign_with(self.lead)
        return answer(self.sites[site].open(), signed, self.adapter)

    def make_summation(self, session: KeyAgreement, round: int = 1) -> Summation:
        summation = Summation(session, release=round)
        for site in NAMES:
            summation.add_upload(site, read_masked(self.upload(site, round)))
        return summation

    def confirm_release(self, summation: Summation) -> Summation:
        for site in NAMES:
            summation.add_confirmation(site, self.ask_site(site, CONFIRM, summation.build_confirm_request()))
        return summation

    def read_total(self, summation: Summation) -> np.ndarray:
        self.confirm_release(summation)
        for site in NAMES:
            summation.add_revealed(site, self.ask_site(site, UNMASK, summation.build_unmask_request(site)))
        return summation.compute_total()

    def count_charged_rounds(self, site: str) -> int:
        return self.sites[site].ledger().history.charged_rounds(self.propose().run)


def read_masked(reply: Reply) -> bytes:
    assert isinstance(reply.body, Update), reply.body
    assert isinstance(reply.body.tensors, bytes)
    return reply.body.tensors


def read_reason(reply: Reply) -> tuple[Reason, object]:
    assert isinstance(reply.body, Refusal), reply
    return reply.body.reason, reply.body.requested


def make_federation(folder: Path, kind: type[SecureSite] = SecureSite, **changes: Any) -> Federation:
    """Create a federation in an empty folder, with sites of a class; keywords override its plan."""
    shared = SecureAggregationSpec(num_sites=3, threshold=3, colluders=0).with_share(run_plan().noise_multiplier)
    plan = replace(run_plan(), **{"local_steps": 1, "spare_rounds": 0, "shared": shared, **changes})

    def propose(**changes: Any) -> Proposal:
        return replace(run_proposal(), plan=plan, num_sites=3, **changes)

    adapter = Adapter({"a": np.zeros((2, 3), np.float32), "head": np.zeros(4, np.float32)})
    sites = {}
    for name in NAMES:
        (folder / name).mkdir()
        policy = make_site_policy(name, limits={"max_rounds": plan.max_rounds})
        allow = replace(policy.allow, leads=(lead_key.public, stranger_key.public))
        policy = replace(policy, trust=Trust(secure=True), allow=allow)
        sites[name] = kind(folder / name, policy, propose, lead_key, adapter)
    for name, site in sites.items():
        site.members = {other: member.key.public for other, member in sites.items() if other != name}
    return Federation(sites, propose, lead_key, stranger_key, adapter)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make_federation(tmp_path)


def test_unapproved_lead_cannot_take_over_a_run(federation: Federation) -> None:
    """A run's name depends on its settings but not on its lead, so another allowed lead can request the same name."""
    for site in federation.sites.values():
        site.policy = replace(site.policy, approval="manual")
        site.ledger().approve(federation.propose())
    session, _, _ = federation.begin_session()
    options = {"name": "1" * 32, "lead": federation.other_lead}
    assert federation.get_refusal("north", ANNOUNCE, **options)[0] is Reason.AWAITING_APPROVAL
    federation.read_total(federation.make_summation(session))
    assert federation.get_refusal("north", ANNOUNCE, **options)[0] is Reason.PLAN_CHANGED
    for step in (JOIN, CONFIRM, UNMASK):
        assert federation.get_refusal("north", step, b"x", **options)[0] is Reason.PLAN_CHANGED
    np.testing.assert_array_equal(federation.read_total(federation.make_summation(session, 2)), 3 * VECTOR)


def test_incomplete_new_session_keeps_the_previous_one(federation: Federation) -> None:
    session, name, announcements = federation.begin_session()
    later = secrets.token_hex(16)
    keys = {site: federation.ask_site(site, ANNOUNCE, name=later) for site in ("north", "south")}  # east is silent
    assert len(set(keys.values())) == 2
    summation = federation.make_summation(session)
    np.testing.assert_array_equal(federation.read_total(summation), 3 * VECTOR)
    assert federation.ask_site("north", JOIN, *announcements, name=name) == session.digest.encode()


def test_sites_can_return_to_an_earlier_session(federation: Federation) -> None:
    session, name, announcements = federation.begin_session()
    later, later_name, _ = federation.begin_session()
    assert later.digest != session.digest
    federation.name = name
    for site in NAMES:
        federation.ask_site(site, JOIN, *announcements)
    np.testing.assert_array_equal(federation.read_total(federation.make_summation(session)), 3 * VECTOR)
    for _ in range(5):
        federation.begin_session()
    assert federation.get_refusal("north", JOIN, *announcements, name=later_name) == SESSION_DIFFERS


def test_round_in_another_session_is_not_charged(federation: Federation) -> None:
    _, earlier, _ = federation.begin_session()
    session, name, _ = federation.begin_session()
    # A party belongs to its lead alone, even before the ledger knows the run.
    assert federation.get_refusal("north", CONFIRM, b"x", lead=federation.other_lead) == SESSION_DIFFERS
    for other in (earlier, "f" * 32):
        federation.name = other
        assert read_reason(federation.upload("north")) == SESSION_DIFFERS
        assert federation.get_refusal("north", CONFIRM, b"x") == SESSION_DIFFERS
    assert (federation.count_charged_rounds("north"), federation.sites["north"].trained) == (0, [])
    federation.name = name
    np.testing.assert_array_equal(federation.read_total(federation.make_summation(session)), 3 * VECTOR)


def test_round_cannot_be_requested_in_two_sessions(federation: Federation) -> None:
    """The stored reply belongs to the first session, and a request in another session is a different request."""
    federation.begin_session()
    federation.upload("north")
    federation.begin_session()
    assert read_reason(federation.upload("north"))[0] is Reason.ROUND_REQUESTED_DIFFERENTLY
    assert (federation.count_charged_rounds("north"), federation.sites["north"].trained) == (1, [(1, 1)])


def test_upload_after_its_confirmation_request_is_not_charged(federation: Federation) -> None:
    session, _, _ = federation.begin_session()
    request = ConfirmRequest(session=session.digest, release=1, survivors=list(NAMES)).to_bytes()
    federation.ask_site("north", CONFIRM, request)
    for _ in range(3):
        assert read_reason(federation.upload("north")) == (Reason.SECURE_STEP, "release_over")
    assert (federation.count_charged_rounds("north"), federation.sites["north"].trained) == (0, [])


def test_stored_upload_is_resent_after_a_restart_without_a_charge(federation: Federation) -> None:
    session, _, _ = federation.begin_session()
    first = read_masked(federation.upload("north"))
    federation.sites["north"].parties = Parties()
    assert read_masked(federation.upload("north")) == first
    assert read_reason(federation.upload("north", 2)) == SESSION_DIFFERS
    assert (federation.count_charged_rounds("north"), federation.sites["north"].trained) == (1, [(1, 1)])
    summation = Summation(session, release=1)
    for site in NAMES:
        summation.add_upload(site, read_masked(federation.upload(site)))


def test_tampered_request_is_not_answered(federation: Federation) -> None:
    """A site would give no shares for tampered ciphertexts, and would be blamed for it."""
    session, name, announcements = federation.begin_session()
    summation = federation.make_summation(session)
    confirm_request = summation.build_confirm_request()
    other = ConfirmRequest(session=session.digest, release=1, survivors=list(NAMES[:2])).to_bytes()
    refusal = (Reason.SECURE_STEP, "request_changed")
    for parts in ((other,), (), (confirm_request, b""), (confirm_request[:-1],)):
        assert federation.get_refusal("north", CONFIRM, *parts, signed=(confirm_request,)) == refusal
    for parts in (announcements[:2], announcements[::-1], [b"".join(announcements)]):
        assert federation.get_refusal("north", JOIN, *parts, signed=tuple(announcements)) == refusal
    assert federation.get_refusal("north", ANNOUNCE, b"", signed=(), name=name) == refusal
    assert not federation.sites["north"].promises.exists(), "no confirmation may be stored for it"
    unmask_request = federation.confirm_release(summation).build_unmask_request("north")
    fields = json.loads(unmask_request)
    fields["sealed"]["east"] = fields["sealed"]["south"]
    assert federation.get_refusal("north", UNMASK, to_canonical_json(fields), signed=(unmask_request,)) == refusal
    for site in NAMES:
        summation.add_revealed(site, federation.ask_site(site, UNMASK, summation.build_unmask_request(site)))
    np.testing.assert_array_equal(summation.compute_total(), 3 * VECTOR)


CHANGES: dict[str, Callable[[SecureSite], None]] = {
    "secure=false": lambda site: setattr(site, "policy", replace(site.policy, trust=Trust(secure=False))),
    "frozen": lambda site: site.ledger().freeze("enough"),
    "a member less": lambda site: site.members.pop("east"),
    "another key": lambda site: site.members.update(east=make_key(9).public),
    "min_sites": lambda site: setattr(site, "policy", replace(site.policy, trust=Trust(secure=True, min_sites=4))),
    "no lead": lambda site: setattr(
        site, "policy", replace(site.policy, allow=replace(site.policy.allow, leads=("ab" * 32,)))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_policy_change_ends_the_participation_of_a_site(federation: Federation, change: Any) -> None:
    session, _, _ = federation.begin_session()
    summation = federation.confirm_release(federation.make_summation(session))
    change(federation.sites["north"])
    federation.get_refusal("north", UNMASK, summation.build_unmask_request("north"))
    federation.get_refusal("north", CONFIRM, summation.build_confirm_request())
    assert isinstance(federation.upload("north", 2).body, Refusal)
    assert federation.count_charged_rounds("north") == 1


def test_site_that_would_refuse_the_round_joins_no_session(federation: Federation) -> None:
    """Otherwise the other sites would be charged for a round without this site."""
    session, name, announcements = federation.begin_session()
    plan = federation.propose().plan
    for round in range(1, plan.num_rounds + 1):
        federation.read_total(federation.make_summation(session, round))
    assert federation.get_refusal("north", JOIN, *announcements, name=name)[0] is Reason.PLAN_EXHAUSTED
    federation.sites["south"].paused = True
    assert federation.get_refusal("south", JOIN, *announcements, name=name)[0] is Reason.PAUSED


def test_settings_are_needed_only_for_the_first_step_of_a_session(federation: Federation, monkeypatch: Any) -> None:
    """The lead sends settings only with the announce step; a site that lost its party refuses, and announces again."""
    session, name, announcements = federation.begin_session()
    summation = federation.make_summation(session)

    def fail_to_read(proposal: Proposal) -> PreparedRun:
        raise AssertionError("this request has no settings")

    monkeypatch.setattr(
        SecureSite, "open", lambda site, real=SecureSite.open: set_methods(real(site), prepare=fail_to_read)
    )
    federation.read_total(summation)
    assert federation.ask_site("north", JOIN, *announcements) == session.digest.encode()
    federation.sites["north"].parties = Parties()
    assert federation.get_refusal("north", JOIN, *announcements) == SESSION_DIFFERS
    assert federation.get_refusal("north", ANNOUNCE, name="1" * 32)[0] is Reason.SITE_ERROR
    assert name == federation.name


def test_repeated_confirmation_is_stored_once(federation: Federation) -> None:
    session, _, _ = federation.begin_session()
    summation = federation.make_summation(session)
    for _ in range(20):
        federation.ask_site("north", CONFIRM, summation.build_confirm_request())
    assert len(federation.sites["north"].promises.read_text().splitlines()) == 1
    federation.read_total(summation)
    assert list_promises(federation.sites["north"]) == [(session.digest, 1, True)]
    modified = federation.sites["north"].promises.stat().st_mtime_ns
    for _ in range(20):
        federation.ask_site("north", CONFIRM, summation.build_confirm_request())
        federation.ask_site("north", UNMASK, summation.build_unmask_request("north"))
    assert federation.sites["north"].promises.stat().st_mtime_ns == modified


def list_promises(site: SecureSite) -> list[tuple[str, int, bool]]:
    """List session, release and confirmation state of each promise on disk."""
    promises = map(json.loads, site.promises.read_text().splitlines())
    return [(promise["session"], promise["release"], promise["confirmed"]) for promise in promises]


def test_newest_confirmation_per_session_is_stored(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_site, "_MAX_NOTED", 2)
    digests = []
    for release in (1, 2, 3):
        session, _, _ = federation.begin_session()
        digests.append(session.digest)
        federation.read_total(federation.make_summation(session, release))
        assert list_promises(federation.sites["north"])[-1] == (session.digest, release, True)
    assert list_promises(federation.sites["north"]) == [(digests[index], index + 1, True) for index in (1, 2)]


@pytest.mark.parametrize("crash_at", [0, 1, 2, None], ids=["unwritten", "not in place", "in place", "answered"])
def test_crash_while_storing_a_confirmation_leaves_the_old_or_new_confirmation(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, crash_at: int | None
) -> None:
    """Crashes before each step of the durable write: content, name and folder."""
    session, _, _ = federation.begin_session()
    federation.read_total(federation.make_summation(session))
    request = federation.make_summation(session, 2).build_confirm_request()
    steps = itertools.count()

    def wrap_step(step: Callable[..., None]) -> Callable[..., None]:
        def run_or_crash(*arguments: object) -> None:
            if next(steps) == crash_at:
                raise KeyboardInterrupt
            step(*arguments)

        return run_or_crash

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(durable.os, name, wrap_step(getattr(os, name)))
        with contextlib.nullcontext() if crash_at is None else pytest.raises(KeyboardInterrupt):
            federation.ask_site("north", CONFIRM, request)
    before, new = (session.digest, 1, True), (session.digest, 2, False)
    assert list_promises(federation.sites["north"]) == [new if crash_at in (2, None) else before]

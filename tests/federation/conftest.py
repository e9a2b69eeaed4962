"""A small adapter, and a site with a real ledger that answers signed requests."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.federation.lead import RoundResult
from fedtune.federation.protocol import EndOfRun, Invitation, Reply, RoundRequest, Signed
from fedtune.federation.secure.at_site import SiteAggregator
from fedtune.federation.site_round import PreparedRun, Site, TrainingResult, answer, answer_invitation, end_run
from fedtune.model.adapter import Adapter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import RECEIPT, Reason, Receipt, Refusal, Update
from fedtune.privacy.site_policy import Policy

from ..builders import MadeSite, Train, round_request
from ..conftest import make_site_policy, run_proposal
from ..privacy.builders import lead_key

NONCE = "0a" * 16


def round_of(number: int, **changes: Any) -> RoundResult:
    """Build the result of a round with the single site `a` and no scores."""
    fields = {"round": number, "seconds": 1.0, "sites": ("a",), "failed_sites": {}, "bytes_down": 1, "bytes_up": 2}
    return RoundResult(**fields | {"metrics": {}, "ended": "2026-01-01T00:00:00+00:00"} | changes)


def read_reason(reply: Reply) -> Reason:
    assert isinstance(reply.body, Refusal)
    return reply.body.reason


def make_adapter() -> Adapter:
    return Adapter({"b.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.ones(4, np.float32)})


_adapter = pytest.fixture(name="adapter")(make_adapter)


def make_update(**changes: Any) -> Update:
    return Update(**({"site": "a", "run": "r", "round": 1, "tensors": make_adapter().tensors} | changes))


def make_site_key(site: str) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(site.encode().ljust(32)))


def make_receipt(site: str = "a", *, charged: int = 1, run: str = "r", key: Any = None, **more: Any) -> Receipt:
    """Build a receipt signed by its site; `key` replaces the site's key."""
    key = key or make_site_key(site)
    fields: dict[str, Any] = {"charged_rounds": charged, "sequence": 3 * charged}
    fields |= {"ended": False, "plan": "", "seeded_noise": False, "simulated": False} | more
    unsigned = Receipt(site=site, run=run, head="00" * 32, site_key=key.public, signature="", **fields)
    return replace(unsigned, signature=key.sign(RECEIPT, unsigned.encode_signed_bytes()))


@dataclass
class Station:
    """The site `a` on disk, reopened for every request as after a restart; its training adds one to each value."""

    folder: Path
    policy: Policy
    propose: Callable[..., Proposal]
    lead: SigningKey
    template: Adapter
    declared_size: int = 100
    preparation: dict[str, Any] = field(default_factory=lambda: {"update_dtype": "float32"})
    trained: list[tuple[int, int]] = field(default_factory=list)  # (round, attempt) of each training
    before_training: list[list[Kind]] = field(default_factory=list)  # ledger kinds before each training
    prepared: list[str] = field(default_factory=list)  # the run of each preparation
    stored: list[tuple[str, str]] = field(default_factory=list)  # (run, digest) of each final adapter that it stored
    submitted: list[Proposal] = field(default_factory=list)  # runs submitted for approval
    paused: bool = False

    @property
    def path(self) -> Path:
        return self.folder / self.policy.ledger

    @property
    def key(self) -> SigningKey:
        return SigningKey.load_or_create(self.folder / self.policy.site_key)

    @property
    def sums(self) -> SiteAggregator | None:
        return None

    def ledger(self) -> SiteLedger:
        return SiteLedger(self.path, self.policy, self.key, create=True)

    def open(self, train: Train | None = None) -> Site:
        def prepare(proposal: Proposal) -> PreparedRun:
            self.prepared.append(proposal.run)
            derived = self.propose(lead=proposal.lead)
            return PreparedRun(
                proposal=derived, template=self.template, declared_size=self.declared_size, **self.preparation
            )

        site = MadeSite(self.ledger(), prepare=prepare, train=train or self._train, paused=self.paused, sums=self.sums)
        site.stored, site.submitted = self.stored, self.submitted
        return site

    def _train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> TrainingResult:
        self.trained.append((request.round, attempt))
        self.before_training.append(self.kinds())
        updated = Adapter({name: value + np.float32(1) for name, value in adapter.tensors.items()})
        return TrainingResult(adapter=updated, fingerprint="hmac of the records")

    def request(self, round: int = 1, *, adapter: Any = None, fields: Any = None, **changes: Any) -> RoundRequest:
        """Build a request of the lead; `changes` apply to the proposal, `fields` to other fields."""
        defaults = {"round": round, "site": self.policy.site, "adapter_digest": (adapter or self.template).digest()}
        return round_request(self.propose(**changes), **defaults | (fields or {}))

    def ask(self, round: int = 1, *, train: Train | None = None, key: SigningKey | None = None, **more: Any) -> Reply:
        signed = self.request(round, **more).sign_with(key or self.lead)
        return self.send(signed, adapter=more.get("adapter"), train=train)

    def send(self, signed: Signed, *, adapter: Adapter | None = None, train: Train | None = None) -> Reply:
        return answer(self.open(train), signed, adapter or self.template)

    def invite(self, *, key: SigningKey | None = None, fields: dict[str, Any] | None = None, **changes: Any) -> Reply:
        """Answer an invitation; `changes` apply to the proposal, `fields` to other fields."""
        defaults: dict[str, Any] = {"proposal": self.propose(**changes), "site": self.policy.site}
        defaults |= {"expires": 1e12, "nonce": NONCE}
        return answer_invitation(self.open(), Invitation(**(defaults | (fields or {}))).sign_with(key or self.lead))

    def end(self, *, run: str = "r", key: Any = None, adapter: Any = None, digest: str = "") -> Receipt | None:
        """Send the site an end-of-run notice signed by the lead, or by `key`; `adapter` is attached."""
        lead = key or self.lead
        notice = EndOfRun(run=run, lead=lead.public, adapter_digest=digest)
        return end_run(self.open(), notice.sign_with(lead), adapter)

    def events(self) -> tuple[Event, ...]:
        return verify(self.path, site_key=self.key.public).events if self.path.exists() else ()

    def kinds(self) -> list[Kind]:
        """List the kinds of the ledger's events after its opening and its policy."""
        return [event.kind for event in self.events() if event.detail.get("what") not in ("opened", "policy")]


@pytest.fixture
def station(tmp_path: Path, adapter: Adapter) -> Callable[..., Station]:
    """A factory of separate sites; keywords change the policy."""

    def make(**changes: Any) -> Station:
        return Station(tmp_path / "site", make_site_policy(**changes), run_proposal, lead_key, adapter)

    return make


@pytest.fixture
def site(station: Callable[..., Station]) -> Station:
    """A site whose policy allows exactly the run."""
    return station()

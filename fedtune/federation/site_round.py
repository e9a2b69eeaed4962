"""One round at a site: check the request, reserve the charge, train, commit the update to the ledger, and reply.

The site makes every decision itself and does not trust the server.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedtune.federation.bfloat16 import round_difference
from fedtune.federation.protocol import (
    ANNOUNCE,
    CONFIRM,
    JOIN,
    EndOfRun,
    Invitation,
    Reply,
    RoundRequest,
    Signed,
    SumRequest,
    compute_answer_digest,
    derive_terms,
    hash_parts,
)
from fedtune.federation.secure.agreement import Rejected, RejectionReason
from fedtune.federation.secure.at_site import SiteAggregator
from fedtune.federation.secure.party import Party
from fedtune.federation.sent_round import pack_initial, unpack_adapter
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Difference, Masked, Offer, Reason, Receipt, Refusal, Refused, Tensors, Update
from fedtune.spec import ConfigError, translate_panics
from fedtune.training.algorithms.fedavg import FEDAVG
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm
from fedtune.version import build

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Result of a round of training at a site."""

    adapter: Adapter | None = None  # after the plan's noisy steps; None with secure aggregation
    share: npt.NDArray[np.int64] | None = None  # noisy gradient sum for secure aggregation, shape (values,)
    scores: tuple[float, float] | None = None  # noised score and count of held-out units, if the plan releases them
    fingerprint: str = ""  # fingerprint of the records, only for the ledger
    state: Arrays = field(default_factory=dict)  # state of the algorithm for the next round; never leaves the site


Request = RoundRequest | Invitation | SumRequest
_R = TypeVar("_R", RoundRequest, Invitation, SumRequest)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run that the site's policy and budget allow, as the site derives it from the lead's configuration."""

    proposal: Proposal  # derived from the configuration; requests with another proposal are refused
    template: Adapter  # an adapter with the names and shapes of the trained tensors
    declared_size: int  # the site's size in this run; it must equal the declared size in the policy
    update_dtype: str  # the number format of a plain update on the wire
    members: tuple[str, ...] = ()  # the sites of a run with secure aggregation
    algorithm: LocalAlgorithm = FEDAVG


class Site(ABC):
    """Interface between the round protocol and a site; methods with an empty body are optional.

    Args:
        ledger: the site's ledger, opened with the site's policy.
        sums: the site's state in secure aggregation; None without secure aggregation.
    """

    def __init__(self, ledger: SiteLedger, *, sums: SiteAggregator | None = None) -> None:
        self.name, self.ledger, self.sums = ledger.policy.site, ledger, sums

    @property
    def paused(self) -> bool:
        """Whether a person at the site has paused it."""
        return False

    def check_settings(self, proposal: Proposal) -> None:  # noqa: B027
        """Check the settings of the run before a person is asked to approve it.

        Raises:
            Refused: the site does not accept the settings.
        """

    @abstractmethod
    def prepare(self, proposal: Proposal) -> PreparedRun:
        """Load the model and derive the plan of a run that policy, budget and approver have allowed; may be slow.

        Reads no record, because a request that is refused later must not reveal anything about the records.

        Raises:
            Refused: the site cannot take part in the run.
        """

    def store_run(self, run: PreparedRun) -> None:  # noqa: B027
        """Write the run's files before a round is charged, so that a failed write causes no charge."""

    def find_user_cohorts(self, request: RoundRequest) -> Mapping[str, int]:
        """Determine each user's cohort from the user's records, for a run that admits only some cohorts."""
        raise NotImplementedError

    @abstractmethod
    def train(
        self, request: RoundRequest, adapter: Adapter, attempt: int, admitted: Collection[str] | None = None
    ) -> TrainingResult:
        """Train the adapter in one round of a prepared run.

        Only this method and `find_user_cohorts` read records.

        Args:
            request: the lead's request.
            adapter: the adapter from the request, packed with the algorithm's arrays.
            attempt: the number of the attempt at this round.
            admitted: the users whose records are used; None: all users.
        """

    def read_adapter_shapes(self, run: str) -> Mapping[str, list[int]] | None:
        """Return the tensor shapes that `store_run` stored for a run; None if they are missing. Loads no model."""
        return None

    def store_adapter(self, run: str, adapter: Adapter) -> None:  # noqa: B027
        """Store the final adapter of a run, which `end_run` has checked."""

    def await_approval(self, proposal: Proposal, *, software: str) -> None:  # noqa: B027
        """Add a run to the site's approval queue; `software` is the fedtune version at the lead."""


def answer(site: Site, signed: Signed, adapter: Adapter) -> Reply:
    """Answer a round request with an update, or with a refusal that contains one of the fixed `Reason` codes.

    Guarantee: the site trains on records only after its ledger has durably charged the round.  No exception text leaves
    the site: an unexpected error becomes `site_error`, and its details stay in the site's log.  A sender that is not an
    allowed lead learns nothing about the ledger.
    """
    return _make_reply(
        site, signed, RoundRequest.from_signed, lambda request: _train_and_commit(site, request, adapter)
    )


def answer_invitation(site: Site, signed: Signed) -> Reply:
    """Answer an invitation with an offer, or with a refusal that contains one of the fixed `Reason` codes.

    Guarantee: the same as for `answer`.  In addition, an invitation charges and reserves no budget.
    """
    return _make_reply(site, signed, Invitation.from_signed, lambda request: _make_offer(site, request))


def answer_step(site: Site, signed: Signed, parts: Sequence[bytes]) -> bytes | Refusal:
    """Perform a step of secure aggregation and return its message, or a refusal with one of the fixed `Reason` codes.

    Guarantee: the step charges no budget and reads no record.  The answer depends only on keys, seeds and the lead's
    messages (`fedtune.federation.secure`).
    """
    return _answer_or_refuse(site, signed, SumRequest.from_signed, lambda request: _run_step(site, request, parts))[1]


def _run_step(site: Site, request: SumRequest, parts: Sequence[bytes]) -> bytes:
    _check_asker(site, request)
    if request.parts_digest != hash_parts(parts):
        raise Rejected(RejectionReason.REQUEST_CHANGED)
    sums, proposal = _require_sums(site, request.proposal), request.proposal.digest()
    if request.step == ANNOUNCE:
        run = _prepare_run(site, request)
        full_proposal, length = request.proposal, run.template.num_values
        return sums.announce(
            request.session, run.members, lambda members: derive_terms(full_proposal, members=members, length=length)
        )
    # Shares help to unmask uploads, so check again that the policy still allows the run.
    site.ledger.policy.check(request.proposal)
    site.ledger.require_startable(request.proposal)
    if request.step == JOIN:
        # Checked before each round, because a later refusal would waste the other sites' charges.
        if site.paused:
            raise Refused(Reason.PAUSED)
        site.ledger.require_another_round(request.proposal)
        return sums.join(proposal, request.session, parts)
    party, (message, *others) = _get_current_party(site, request), parts or [b""]
    if others:
        raise Rejected(RejectionReason.MALFORMED)
    return party.confirm(message) if request.step == CONFIRM else party.unmask(message)


def _get_current_party(site: Site, request: RoundRequest | SumRequest) -> Party:
    return _require_sums(site, request.proposal).party(request.proposal.digest(), request.session)


def _require_sums(site: Site, proposal: Proposal) -> SiteAggregator:
    if site.sums is None or proposal.plan.shared is None:
        raise Refused(Reason.SECURE_AGGREGATION)
    return site.sums


def _make_reply(
    site: Site, signed: Signed, read: Callable[[Signed], _R], body_for: Callable[[_R], Update | Offer]
) -> Reply:
    request, body = _answer_or_refuse(site, signed, read, body_for)
    if request is None or (isinstance(body, Refusal) and body.reason.is_from_stranger):
        return Reply(body=body, receipt=None)  # a receipt would reveal the ledger's charges to a stranger
    return Reply(
        body=body, receipt=_make_receipt(site, request.run, request.signer_key, reply=compute_answer_digest(body))
    )


def _answer_or_refuse(
    site: Site, signed: Signed, read: Callable[[Signed], _R], work: Callable[[_R], _T]
) -> tuple[_R | None, _T | Refusal]:
    """Parse a request and run `work` on it; return the request (None if unreadable) and the result or a refusal."""
    request: _R | None = None
    try:
        with translate_panics():
            try:
                request = read(signed)
            except ConfigError as error:
                raise Refused(Reason.MALFORMED_REQUEST) from error
            return request, work(request)
    except Refused as refused:
        return request, _refuse(site, request, refused)
    except Rejected as rejected:
        return request, _refuse(site, request, Refused(Reason.SECURE_STEP, requested=rejected.wrong.value))
    except Exception:
        log.exception("%s failed in %s", site.name, _describe_request(request))
        return request, _make_refusal(site, request, Refused(Reason.SITE_ERROR))


def end_run(site: Site, signed: Signed, adapter: Adapter | None) -> Receipt | None:
    """Release the unused reservation of a finished run; only the run's own lead can end it.

    Guarantee: the receipt signs the digest of a final adapter only if the site computed that digest itself, from an
    adapter with the run's tensor names and shapes and finite values. Any other adapter ends the run unsigned, because
    the lead's signed notice alone must release the reservation. No model is loaded before that.

    Args:
        site: the receiving site.
        signed: the lead's notice.
        adapter: the final adapter, if one was sent; stored if the policy says "keep".

    Returns:
        A receipt for all charges of the run, which also signs its end and the digest of the final adapter in the
        ledger; None if the site does not know the run, or cannot read its ledger.

    Raises:
        Refused: the sender is not the run's lead.
    """
    notice = EndOfRun.from_signed(signed)
    known = site.ledger.history.runs.get(notice.run)
    if known is None and not site.ledger.history.has_refused(notice.run, notice.lead):
        return None
    if (known and known.proposal.lead != notice.lead) or notice.lead not in site.ledger.policy.allow.leads:
        raise Refused(Reason.LEADS, requested=notice.lead)
    # A run that was never accepted has no shapes to compare with.
    digest = _find_signable_digest(site, notice, adapter) if adapter and known else ""
    site.ledger.end_run(notice.run, lead=notice.lead, adapter_sha256=digest)
    # Only the first notice counts, so that the stored adapter matches the ledger.
    kept = known is not None and known.adapter == digest
    if adapter and digest and kept and site.ledger.policy.final_adapter == "keep":
        site.store_adapter(notice.run, adapter)
    return _make_receipt(site, notice.run, notice.lead, reply=known.adapter if known else "")


def _find_signable_digest(site: Site, notice: EndOfRun, adapter: Adapter) -> str:
    """Return the digest of a final adapter that matches the notice and the run, and "" for any other adapter."""
    try:
        _check_adapter(adapter, digest=notice.adapter_digest, shapes=site.read_adapter_shapes(notice.run))
    except Refused as refused:
        log.warning("site %s does not sign the final adapter of %s: %s", site.name, notice.run, refused)
        return ""
    return notice.adapter_digest


def _make_receipt(site: Site, run: str, lead: str, *, reply: str = "") -> Receipt | None:
    # After a failed write, the ledger is empty in memory and must not certify that nothing was charged.
    return site.ledger.sign_receipt(run, lead=lead, reply=reply) if site.ledger.history.length else None


def _make_offer(site: Site, request: Invitation) -> Offer:
    proposal, plan = request.proposal, request.proposal.plan
    offer = Offer(
        site=site.name,
        run=proposal.run,
        max_rounds=plan.num_rounds,
        min_noise=plan.noise_multiplier,
        rank=proposal.find_rank(site.name),
    )
    try:
        _prepare_run(site, request)
    except Refused as refused:
        if not (request.less and refused.reason.concerns_budget):
            raise
        offer = site.ledger.make_offer(proposal)
    log.info("site %s offers to take part in %s; the lead has fedtune %s", site.name, request.run, request.software)
    return replace(offer, nonce=request.nonce, software=build())


def _prepare_run(site: Site, request: Request) -> PreparedRun:
    """Check and prepare a run without charging anything; raise Refused if the site may not take part."""
    _check_asker(site, request)
    if site.paused:
        raise Refused(Reason.PAUSED)
    # Policy first, so that an excessive request is refused with the violated rule before any costly work.
    site.ledger.policy.check(request.proposal)
    site.ledger.require_startable(request.proposal, approved=False)
    site.check_settings(request.proposal)
    site.ledger.require_startable(request.proposal)
    run = site.prepare(request.proposal)
    if request.run != run.proposal.run:
        raise Refused(Reason.WRONG_RUN, requested=request.run, allowed=run.proposal.run)
    if request.proposal != run.proposal:
        raise Refused(Reason.PLAN_CHANGED, requested=request.proposal.digest(), allowed=run.proposal.digest())
    declared = site.ledger.policy.declared_size(request.proposal.dataset)
    if run.declared_size != declared:
        raise Refused(Reason.DECLARED_SIZE, requested=run.declared_size, allowed=declared)
    return run


def _check_asker(site: Site, request: Request) -> None:
    # Check the lead first, so that a stranger learns nothing and causes no work.
    if request.proposal.lead not in site.ledger.policy.allow.leads:
        raise Refused(Reason.LEADS, requested=request.proposal.lead)
    if request.site != site.name:
        raise Refused(Reason.WRONG_SITE, requested=request.site, allowed=site.name)
    if time.time() > request.expires:
        raise Refused(Reason.REQUEST_EXPIRED)


def _train_and_commit(site: Site, request: RoundRequest, adapter: Adapter) -> Update:
    run = _prepare_run(site, request)
    template = pack_initial(run.template, run.algorithm)
    _check_adapter(adapter, digest=request.adapter_digest, shapes=template.shapes)
    if request.receipt is not None:
        site.ledger.require_receipt(request.receipt)

    def make_ready() -> None:
        if request.session:
            # A restarted site has lost its keys, and must not be charged for a round without an upload.
            _get_current_party(site, request).require_open(request.round)
        # Not earlier, so that a request without a charge writes no files.
        site.store_run(run)

    with ExitStack() as schedule:

        def begin() -> None:
            schedule.enter_context(_pad_duration(site.ledger.policy.releases.reply_after_s))

        def find_arrivals() -> Mapping[str, int]:
            begin()  # the dates are read from records
            return site.find_user_cohorts(request)

        granted = site.ledger.reserve(
            request.proposal,
            round=request.round,
            request=request.digest(),
            before_charge=make_ready,
            reply_bytes=(32 if run.algorithm.keeps_state else 16) * run.template.num_values,
            arrivals=find_arrivals,
        )
        if isinstance(granted, bytes):
            return Update.from_bytes(granted)
        if granted.admitted is None:
            begin()
        trained = site.train(request, adapter, granted.attempt, granted.admitted)
        update = Update(
            site=site.name,
            run=request.run,
            round=request.round,
            tensors=_protect(site, request, trained, sent=unpack_adapter(adapter)[0], dtype=run.update_dtype),
            scores=trained.scores,
        )
        state = Adapter(trained.state).to_bytes() if trained.state else b""
        site.ledger.commit(granted, update.to_bytes(), fingerprint=trained.fingerprint, state=state)
    return update


def _protect(
    site: Site, request: RoundRequest, trained: TrainingResult, *, sent: Adapter, dtype: str
) -> Tensors | Difference | Masked:
    """Encode the result of training for the lead.

    A plain update contains the site's own noise and is rounded to bfloat16 if the run uses that format.  A share for
    secure aggregation is masked with the session's masks.
    """
    if request.session:  # set if and only if the plan has secure aggregation
        assert trained.share is not None
        assert trained.adapter is None, "the noise of one share does not protect an adapter"
        return _get_current_party(site, request).upload(request.round, trained.share)
    assert trained.adapter is not None
    after = trained.adapter.tensors
    before = cut_to_rank(sent.tensors, request.proposal.find_rank(site.name))
    return round_difference(after, before) if dtype == "bfloat16" else after


def _check_adapter(adapter: Adapter, *, digest: str, shapes: Mapping[str, list[int]] | None) -> None:
    if adapter.shapes != shapes:
        raise Refused(Reason.ADAPTER_SHAPE)
    if adapter.digest() != digest:
        raise Refused(Reason.ADAPTER_DIFFERS, requested=digest, allowed=adapter.digest())
    # Finite values may have any size, because SiteWork.do clips them to the site's bound before use.
    if not all(bool(np.isfinite(value).all()) for value in adapter.tensors.values()):
        raise Refused(Reason.MAX_ADAPTER_VALUE, requested="values that are not finite", allowed="finite values")


def _refuse(site: Site, request: Request | None, refused: Refused) -> Refusal:
    """Record a refusal in the log and the ledger, and build the reply."""
    if request and refused.reason in (Reason.SETTINGS, Reason.PLAN_CHANGED) and request.software != build():
        shown = f"{refused.requested or 'these settings'} (fedtune {request.software})"
        refused = Refused(refused.reason, requested=shown, allowed=f"{refused.allowed or 'others'} (fedtune {build()})")
    log.warning("site %s refused %s: %s", site.name, _describe_request(request), refused)
    if why := site.ledger.explain_refusal(refused):
        log.warning("%s: %s", site.name, why)
    if request is not None:
        try:
            site.ledger.record_refusal(
                refused, run=request.run, lead=request.signer_key, round=request.round, request=request.digest()
            )
            if refused.reason is Reason.AWAITING_APPROVAL:
                site.await_approval(request.proposal, software=request.software)
        except Exception:  # refuse even if the refusal cannot be recorded
            log.exception("%s could not record a refusal", site.name)
    return _make_refusal(site, request, refused)


def _describe_request(request: Request | None) -> str:
    if isinstance(request, Invitation):
        return "to take part"
    if isinstance(request, SumRequest):
        return f"step {request.step} of secure aggregation"
    return f"round {request.round}" if request else "a message"


def _make_refusal(site: Site, request: Request | None, refused: Refused) -> Refusal:
    return Refusal(
        site=site.name,
        run=request.run if request else "",
        round=request.round if request else 0,
        reason=refused.reason,
        requested=refused.requested,
        allowed=refused.allowed,
    )


@contextmanager
def _pad_duration(every_s: float) -> Iterator[None]:
    """Pad the duration of the block to a multiple of `every_s` seconds, because it would reveal the number of records.

    The duration is padded even if the block raises an exception.  A refusal before the block needs no padding, because
    no record was read.
    """
    began = time.monotonic()
    try:
        yield
    finally:
        if every_s > 0:
            passed = time.monotonic() - began
            time.sleep(max(0.0, math.ceil(passed / every_s) * every_s - passed))

"""A site's ledger: a SQLite file with a permanent, append-only record of every use of one population's records.

Every decision is one transaction: process the events of other processes, check the policy and the budget, append an
event. The event is on disk when the call returns. A round is charged before it trains on any record, and its reply is
stored before it is sent; after a crash in between, the round remains charged.

The file uses SQLite's rollback journal, so that a copy made between two transactions is complete.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

from fedtune.privacy import events
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.durable import require_disk_space
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import run_acceptance
from fedtune.privacy.ledger.chain import Arrivals, Doubt, Head, Kind, RestoreNote, iter_charges, list_charge_rows
from fedtune.privacy.ledger.history import AcceptedRun, History, build_refusal_key
from fedtune.privacy.ledger.register import LedgerHeader
from fedtune.privacy.ledger.store import EventStore, create_ledger_file
from fedtune.privacy.policy_file import build_never_accepted_mark
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import RECEIPT, Offer, Reason, Receipt, Refused
from fedtune.privacy.site_policy import Policy
from fedtune.spec import RunError

MAX_ANSWERS_PER_DAY, MAX_STRANGERS_PER_DAY = 1000, 10
"""Daily limits of recorded refusals, to allowed leads and to strangers. Further refusals are sent and logged, but not
recorded, so that nobody can fill a site's disk, and strangers cannot exhaust the limit of leads. An offer beyond the
limit is not sent."""
_MAX_TEXT = 300
_MAX_DOUBTS = 256
"""Maximum number of recorded doubts. At the limit, further doubts may be unrecorded, so no anchor clears any doubt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Permission to train one round that has already been charged.

    Attributes:
        admitted: users that the round may sample; None: everybody, in a population without arrivals.
    """

    run: str
    round: int
    request: str
    attempt: int
    admitted: frozenset[str] | None = None

    @property
    def event_fields(self) -> dict[str, Any]:
        """The event fields that identify this reservation."""
        return {"run": self.run, "round": self.round, "request": self.request, "attempt": self.attempt}


class SiteLedger:
    """The ledger of a site, opened for training.

    Args:
        path: the SQLite file.
        policy: the site's policy. A changed policy is recorded; unit, delta, population and filter order cannot change.
        key: the site's signing key, which must be the key that created the ledger.
        anchor: file for the newest signed head, preferably on another disk; None: no anchor.
        create: begin a new ledger if the file is missing. Without it, a lost ledger is an error, not a new budget.

    Raises:
        ConfigError: the ledger has the format of another version.
        RunError: the file is missing, damaged, was changed or rolled back, or is not writable. Training is impossible
            then.
    """

    def __init__(
        self, path: Path, policy: Policy, key: SigningKey, *, anchor: Path | None = None, create: bool = False
    ) -> None:
        self.policy = policy
        self._key, self._store = key, EventStore(path, key, anchor)
        if create:
            create_ledger_file(path)
        with self._store.transaction():
            if not self.history.length:
                if not create:
                    raise RunError(f"ledger {path} has no events; training is not possible without a ledger")
                opened = LedgerHeader.from_policy(policy, ledger=secrets.token_hex(16), site_key=key.public)
                self._store.append_note("opened", **opened.to_json())
                if opened.arrivals:
                    self._store.create_register()
            self._require_fixed_settings()
            if self.history.policy != policy:
                self._store.append_note("policy", policy=policy.to_json(), sha256=policy.digest())

    @property
    def folder(self) -> Path:
        """Folder of the ledger's file."""
        return self._store.path.parent

    @property
    def history(self) -> History:
        """State of the ledger after the last transaction."""
        return self._store.history

    def reserve(
        self,
        proposal: Proposal,
        *,
        round: int,
        request: str,
        before_charge: Callable[[], None] = lambda: None,
        reply_bytes: int = 0,
        arrivals: Callable[[], Mapping[str, int]] = dict,
        own: bool = False,
    ) -> Reservation | bytes:
        """Charge a round before training, or return the stored reply to a repeated request.

        Guarantee: policy check, budget check and charge are one transaction, and the charge is durable on return; the
        caller need not read any private record before. After every accepted request, all charges together are within
        every cap of the policy; after a new run is accepted, so are all charges plus the reservations of open runs.

        Args:
            proposal: the run's proposal.
            round: number of the round.
            request: digest of the lead's request.
            before_charge: called after all checks have passed; if it raises, nothing is charged.
            reply_bytes: size of the reply on disk; 0 for a reply that fits into the margin of `require_disk_space`.
            arrivals: for populations with arrivals: called last before the charge, it returns each user's cohort
                according to the user's records. Admitted users are added to the register of arrivals.
            own: charge the site's own release, without a lead, under the rules of `Policy.check_release`.

        Raises:
            Refused: names the rule, the requested value and the allowed value; nothing is charged.
            RunError: the ledger is damaged or not writable.
            OSError: the disk is too full for the reply, so that the round would be charged in vain.
        """
        if own is bool(proposal.lead):  # a lead can neither request a site's own release nor read its value
            raise Refused(Reason.LEADS, requested=proposal.lead)
        with self._store.transaction():
            self._require_newest_policy()
            now, run = self._store.now(), self.history.runs.get(proposal.run)
            if run is None:
                self.require_startable(proposal, own=own)
                expires = now + timedelta(days=self.policy.limits.run_expires_after_days)
                detail: dict[str, Any] = {"proposal": proposal.to_json(), "expires": expires.isoformat()}
                self._store.append_event(Kind.PLAN, detail, run=proposal.run, dataset=proposal.dataset)
                run = self.history.runs[proposal.run]
            elif (stored := self._find_stored_reply(run, proposal, round, request)) is not None:
                return stored
            else:
                self._require_another_round(run, now)
            before_charge()
            require_disk_space(self.folder, reply_bytes)
            attempt = run.attempts[round] + 1
            # The salt distinguishes the charges of two copies of a ledger for one request, even at equal times.
            detail = {"event": events.to_json(run.plan.event()), "salt": secrets.token_hex(16)}
            granted = Reservation(run=proposal.run, round=round, request=request, attempt=attempt)
            cohort = ""
            if (cohorts := run.plan.cohorts) is not None:
                # The digest is always present, because others learn the number of events, which must not depend on
                # records. The salt hides the digest, because anybody may read the event's hash in an anchor.
                admitted, detail["register"] = self._store.admit_users(arrivals(), cohorts)
                cohort, granted = str(cohorts), replace(granted, admitted=admitted)
            self._store.append_event(
                Kind.RESERVE, detail, **granted.event_fields, dataset=proposal.dataset, cohort=cohort
            )
            return granted

    def commit(self, reservation: Reservation, reply: bytes, *, fingerprint: str = "", state: bytes = b"") -> None:
        """Store the reply of a reserved round durably before it is sent, replacing the run's earlier reply.

        Args:
            reservation: the newest reservation of the round.
            reply: canonical bytes of the reply.
            fingerprint: HMAC of the training records under `fingerprint_key`, stored in the ledger only.
            state: the algorithm's state for the site's next round, post-processing of the run's noised gradients. The
                state is replaced in the same transaction, so that it always belongs to the newest reply.

        Raises:
            Refused: the population was frozen or the run denied during training, so the reply must not leave the site.
        """
        with self._store.transaction():
            run = self.history.runs[reservation.run]
            if self.history.is_frozen:
                raise Refused(Reason.FROZEN)
            self._require_not_denied(run.proposal)
            newest = run.attempts[reservation.round] == reservation.attempt
            assert newest, "only the newest reservation of a round can be committed"
            assert reservation.request not in run.replies, "a request can be committed only once"
            self._store.store_reply(run=reservation.run, request=reservation.request, reply=reply, state=state)
            detail = {"reply_sha256": hashlib.sha256(reply).hexdigest(), "fingerprint": fingerprint}
            self._store.append_event(Kind.COMMIT, detail, **reservation.event_fields, dataset=run.proposal.dataset)

    def read_algorithm_state(self, run: str) -> bytes:
        """Read the algorithm's state that was stored with a run's newest commit, for the newest charged round.

        The state is empty without a commit, and if its round was charged in an earlier budget period than the newest
        round. Otherwise an update could release what was charged to that period, and the period's charges would not
        bound what is learned in it.
        """
        with self._store.transaction():
            state, known = self._store.read_stored_state(run), self.history.runs.get(run)
            is_usable = known is None or known.has_state_of_this_period(self.policy.budget.period)
            return state if is_usable else b""

    def record_refusal(self, refused: Refused, *, run: str, round: int, request: str, lead: str = "") -> None:
        """Record the refusal of a lead's request, up to a daily limit.

        A refusal of the same request for the same reason is recorded once a day, so that replays do not use up the
        limit. While a run awaits approval or the site is paused, all requests of the run count as the same.
        """
        with self._store.transaction():
            if build_refusal_key(self._store.now().date(), run, lead, refused.reason, request) in self.history.refused:
                return
            requested = refused.requested and refused.requested[:_MAX_TEXT]  # untrusted text from a server
            detail = {"reason": refused.reason.value, "requested": requested, "allowed": refused.allowed, "lead": lead}
            if self._may_record_answer(stranger=refused.reason.is_from_stranger):
                self._store.append_event(Kind.REFUSAL, detail, run=run, round=round, request=request)

    def end_run(self, run: str, *, lead: str = "", adapter_sha256: str = "") -> None:
        """Record the end of a run, which releases the unspent part of its reservation.

        After a refusal, a run that was never accepted can no longer be accepted from that lead, so that a receipt can
        state permanently that the lead's run costs nothing. A run of the same name from another lead is a different
        run.

        Args:
            run: name of the run.
            lead: public key of the lead that reports the end; required only for a run that was never accepted.
            adapter_sha256: digest of the final adapter, if the lead sent it.
        """
        with self._store.transaction():
            if (known := self.history.runs.get(run)) is not None:
                if known.expires is not None:
                    self._store.append_note("run_ended", run=run, adapter_sha256=adapter_sha256)
            elif build_never_accepted_mark(run, lead) not in self.history.marks and self.history.has_refused(run, lead):
                self._store.append_note("run_ended", run=run, adapter_sha256=adapter_sha256, lead=lead)

    def approve(self, proposal: Proposal, *, by: str = "", ticket: str = "", why: str = "") -> None:
        """Record a person's approval of exactly this proposal.

        Args:
            proposal: the run's proposal.
            by: name of the person.
            ticket: case number in the site's own records.
            why: reason for the approval.

        Raises:
            Refused: policy or budget would refuse the proposal despite the approval.
        """
        with self._store.transaction():
            self._require_newest_policy()
            if proposal.run not in self.history.runs:
                self.require_acceptable(proposal)
            about = proposal.to_json()
            self._store.append_note("approved", run=proposal.run, proposal=about, by=by, ticket=ticket, why=why)

    def deny(self, proposal: Proposal, why: str, *, by: str = "", ticket: str = "") -> None:
        """Record a person's permanent denial of exactly this proposal. The reason `why` never leaves the site.

        Guarantee: from then on the ledger charges no round of the run, and no reply of the run leaves the site, not
        even the reply of a round in progress. A run in progress ends at this site, and its reservation is released.
        """
        with self._store.transaction():
            about = proposal.to_json()
            self._store.append_note("denied", run=proposal.run, proposal=about, by=by, ticket=ticket, why=why)

    def freeze(self, why: str) -> None:
        """End all training on the population permanently."""
        with self._store.transaction():
            self._store.append_note("frozen", why=why)

    def set_server_time(self, server_time: float) -> None:
        """Set the server's time at the current request, in seconds since 1970. An invalid time is ignored."""
        try:
            self._store.server_time = datetime.fromtimestamp(server_time, UTC)
        except (ValueError, OverflowError, OSError):
            self._store.server_time = None

    def confirm_date(self) -> None:
        """Record a person's confirmation of this machine's date, which opens the budget period of that date.

        It may set the ledger's date back, after a clock was ahead when an event was written.
        """
        with self._store.transaction():
            self._store.append_note("date_confirmed", at=self.history.machine_clock)

    @property
    def explain_pending_period(self) -> str:
        """Explanation of why the current budget period has not begun, and how to open it; empty if it has begun."""
        return self.history.explain_pending_period(server=self._store.server_time, time=self._store.now())

    def explain_refusal(self, refused: Refused) -> str:
        """Explain to people at the site how to open the period whose cap refused a charge; empty for other refusals."""
        return self.explain_pending_period if refused.reason is Reason.MAX_EPSILON_PER_PERIOD else ""

    def sign_receipt(self, run: str, *, lead: str = "", reply: str = "") -> Receipt:
        """Sign a receipt for the charges of a lead's run, optionally with the digest of the accompanying reply."""
        known = self.history.runs.get(run)
        fields: dict[str, Any] = {
            "site": self.policy.site,
            "run": run,
            "charged_rounds": self.history.charged_rounds(run),
            # Depends on events only: a clock may be corrected, a signature remains.
            "ended": build_never_accepted_mark(run, lead) in self.history.marks
            if known is None
            else known.expires is None,
            "plan": known.plan.digest() if known else "",
            "seeded_noise": bool(known and known.proposal.seeded_noise),
            "simulated": self.policy.simulated,
            "sequence": self.history.path[-1][0],
            "head": self._store.compute_salted_head(),
            "site_key": self._key.public,
            "reply": reply,
        }
        unsigned = Receipt(**fields, signature="")
        return Receipt(**fields, signature=self._key.sign(RECEIPT, unsigned.encode_signed_bytes()))

    def require_receipt(self, receipt: Receipt) -> None:
        """Check that the ledger contains the event of a receipt that this site issued.

        If the event is missing, the ledger was lost or rolled back. After a failed check, training is blocked for all
        leads until `charge_gap` charges the missing events.

        Raises:
            Refused: this site did not issue the receipt, or the ledger does not contain the receipt's event.
        """
        # Check the name, too: several populations of an organization may share one key.
        if (receipt.site, receipt.site_key) != (
            self.policy.site,
            self._key.public,
        ) or not receipt.has_valid_signature():
            raise Refused(Reason.WRONG_SIGNATURE)
        shown = Doubt(receipt.sequence, receipt.head, receipt.run, receipt.charged_rounds)
        with self._store.transaction():
            doubts = self.history.doubts
            known = self._store.covers_receipt(shown)
            if not known and shown not in doubts and len(doubts) < _MAX_DOUBTS:
                self._store.append_note("in_doubt", **shown._asdict())
        if not known:
            raise Refused(Reason.LEDGER_BEHIND_RECEIPT, requested=receipt.sequence, allowed=self.history.length)

    def charge_gap(self, anchor: Head) -> Counter[DpEvent]:
        """Charge all mechanisms that the anchor lists but this restored ledger lacks, and return the added charges.

        The ledger also adopts the remaining state of the anchor: ended runs, permanent marks, denied proposals, earlier
        caps, user columns, and receipts for missing events, unless the two branches together contain those events.

        Raises:
            RunError: the anchor belongs to another ledger, or its user columns differ from the policy.
        """
        self._store.require_same_ledger(anchor)
        with self._store.transaction():
            if self.history.covers_head(anchor):
                return Counter()
            # Charges after the last common event are on another branch, and cover nothing of the anchor's.
            both = [n for n, hash in anchor.path if n <= self.history.length and self.history.hashes[n - 1] == hash]
            shared = max(both, default=0)
            charges = iter_charges(anchor.charged, anchor.arrivals)
            gap = Counter({(event, span): count for event, count, span in charges}) - self.history.charges(up_to=shared)
            lost = list_charge_rows(gap)
            restored = RestoreNote(
                shared=shared,
                end=anchor.sequence,
                path=frozenset(anchor.path + anchor.made_up),
                gap=tuple((event, count) for event, count, _ in lost),
                runs=dict(Counter(dict(anchor.runs)) - self.history.count_rounds_up_to(shared)),
                denied=frozenset(anchor.denied),
                marks=frozenset(anchor.marks),
                caps=_drop_common_prefix(self.history.caps, anchor.caps),
                users=frozenset(anchor.users),
                doubts=frozenset(anchor.doubts),
                arrivals=self._find_lost_arrivals(anchor, [span for *_, span in lost], shared=shared),
            )
            doubts = self.history.doubts.union(anchor.doubts)
            if len(doubts) < _MAX_DOUBTS:
                doubts = frozenset(doubt for doubt in doubts if not self._store.covers_receipt(doubt, besides=restored))
            # The gap counts in the anchor's budget period, or in a later one.
            then = max(self._store.now(), datetime.fromisoformat(anchor.time))
            self._store.append_note("restored", at=then, **replace(restored, doubts=doubts).to_json())
            self._require_fixed_settings()
        return sum((Counter({event: count}) for (event, _), count in gap.items()), Counter[DpEvent]())

    def head(self) -> Head:
        """Create and sign the head of the newest event, for an anchor."""
        return self._store.head()

    def make_offer(self, proposal: Proposal) -> Offer:
        """Compute the maximum rounds and the minimum noise with which the site would accept a new run now.

        An offer is a release, and is recorded like a refusal.

        Raises:
            Refused: no number of rounds and no noise multiplier is acceptable; names the rule.
            RunError: the daily limit of refusals and offers is reached, or the ledger is damaged or not writable.
        """
        with self._store.transaction():
            self._require_newest_policy()
            if not self._may_record_answer():
                raise RunError("the ledger reached today's limit of refusals and offers; try again tomorrow")
            proposal = self.policy.lower_rank(proposal)
            rounds = run_acceptance.find_max_rounds(proposal, self._would_accept)
            noise = run_acceptance.find_min_noise(proposal, self._would_accept)
            if not rounds and noise is None:
                self.require_acceptable(proposal)
            detail = {"what": "offer", "max_rounds": rounds, "min_noise": noise, "lead": proposal.lead}
            self._store.append_event(Kind.RELEASE, detail, run=proposal.run)
        site, run = self.policy.site, proposal.run
        return Offer(site=site, run=run, max_rounds=rounds, min_noise=noise, rank=proposal.find_rank(site))

    def require_acceptable(self, proposal: Proposal, *, own: bool = False) -> None:
        """Check that the site would accept a new run, or its own release (`own`), as of the last transaction.

        Raises:
            Refused: names the rule, the requested value and the allowed value.
        """
        run_acceptance.require_acceptable(self.history, self.policy, proposal, self._store.now(), own=own)

    def require_startable(self, proposal: Proposal, *, approved: bool = True, own: bool = False) -> None:
        """Check that a run may start or continue.

        An accepted run may continue with an unchanged proposal, as long as the ledger permits training and nobody has
        denied the run.

        Args:
            proposal: the run's proposal.
            approved: require a person's approval of a new run, if the policy demands approvals.
            own: check the site's own release, which requires no approval, because a person at the site requests it.

        Raises:
            Refused: names the rule, the requested value and the allowed value.
        """
        self._require_not_denied(proposal)
        if (known := self.history.runs.get(proposal.run)) is not None:
            run_acceptance.require_usable_ledger(self.history)
            if known.proposal != proposal:
                raise Refused(Reason.PLAN_CHANGED, requested=proposal.digest(), allowed=known.proposal.digest())
            return
        if build_never_accepted_mark(proposal.run, proposal.lead) in self.history.marks:
            raise Refused(Reason.RUN_ENDED)
        self.require_acceptable(proposal, own=own)
        if approved and not own and self.policy.approval == "manual":
            since = self.history.approved.get(proposal.digest())
            good_for = timedelta(days=self.policy.limits.run_expires_after_days)
            # By the clock, so that a delayed budget period extends neither approvals nor runs.
            if since is None or self.history.clock - since > good_for:
                raise Refused(Reason.AWAITING_APPROVAL)

    def require_another_round(self, proposal: Proposal) -> None:
        """Check that one more round of an accepted run may be charged, as of the last transaction.

        Raises:
            Refused: names the rule, the requested value and the allowed value.
        """
        if (known := self.history.runs.get(proposal.run)) is not None:
            self._require_another_round(known, self._store.now())

    def fingerprint_key(self) -> bytes:
        """Return the secret HMAC key of record fingerprints.

        A plain hash would allow an attacker to test guesses at the data set.
        """
        return self._key.derive_secret("data fingerprint")

    # The methods below decide or write inside a transaction.

    def _would_accept(self, proposal: Proposal) -> bool:
        try:
            self.require_acceptable(proposal)
        except Refused:
            return False
        return True

    def _require_another_round(self, run: AcceptedRun, now: datetime) -> None:
        """Check that one more round of an accepted run may be charged.

        Policy and period may have changed since the run was accepted.
        """
        if not run.is_open(self.history.clock):
            raise Refused(Reason.RUN_ENDED)
        if run.charged_rounds >= run.plan.max_rounds:
            raise Refused(Reason.PLAN_EXHAUSTED, requested=run.charged_rounds + 1, allowed=run.plan.max_rounds)
        self.policy.check(run.proposal)
        asked = events.count_mechanisms([run.plan.event()])
        run_acceptance.require_budget_room(
            self.history, self.policy, run.plan.cohorts, asked=asked, held=lambda _: Counter(), now=now
        )

    def _find_lost_arrivals(self, anchor: Head, ranges: Sequence[str], *, shared: int) -> Arrivals | None:
        """Return the cohorts charged in a gap, and the newest event with complete register rows after the restore.

        Guarantee: the result depends only on charges, so that no refusal or figure after a restore reveals anything
        about a record. If the lost branch charged a round that this ledger lacks, that branch may have admitted people
        under any cohort if they have no row in this register, or a row from after the split. The same holds for people
        whose row is in doubt on only one of the branches.
        """
        if (there := anchor.arrivals) is None:
            return None
        unsure = [last for last, _ in self.history.lost_rows]
        unsure += [] if there.lost_after is None else [there.lost_after]
        if ranges or unsure:
            unsure.append(shared)
        return Arrivals(ranges=tuple(ranges), lost_after=min(unsure, default=None))

    def _find_stored_reply(self, run: AcceptedRun, proposal: Proposal, round: int, request: str) -> bytes | None:
        """Return the stored reply to a repeated request, or None if the round has not been trained yet.

        Guarantee: rounds never go back. For a round before the newest charged one, the ledger returns the stored reply
        or refuses, so that nobody can delay a lead's request and have it charged after the lead has moved on.
        """
        self.require_startable(proposal)
        if run.reserved.get(round, request) != request:
            raise Refused(Reason.ROUND_REQUESTED_DIFFERENTLY, requested=request, allowed=run.reserved[round])
        if request not in run.replies and round >= max(run.reserved, default=0):
            return None
        reply = self._store.read_stored_reply(request)
        if reply is None or hashlib.sha256(reply).hexdigest() != run.replies[request]:
            raise Refused(Reason.REPLY_NO_LONGER_STORED, requested=round)
        return reply

    def _require_not_denied(self, proposal: Proposal) -> None:
        if proposal.digest() in self.history.denied:
            raise Refused(Reason.DENIED)

    def _may_record_answer(self, *, stranger: bool = False) -> bool:
        most = MAX_STRANGERS_PER_DAY if stranger else MAX_ANSWERS_PER_DAY
        return self.history.answers[self._store.now().date(), stranger] < most

    def _require_newest_policy(self) -> None:
        if self.history.policy != self.policy:
            raise RunError(f"the policy of ledger {self._store.path} was changed while it was open; reopen it")

    def _require_fixed_settings(self) -> None:
        """Check that unit, delta, population, site, key and user columns are unchanged since the ledger was created."""
        opened = self.history.opening
        differences = [("site_key", opened.site_key, self._key.public), *opened.list_differences(self.policy)]
        differences += self.history.list_changed_user_columns(self.policy)
        for key, made_for, says in differences:
            if made_for != says:
                raise RunError(
                    f"ledger {self._store.path} was created for {key} = {made_for}, but the policy says {says}; "
                    "restore the old value, which is fixed for the ledger's lifetime"
                )


def _drop_common_prefix(here: Sequence[float | None], there: Sequence[float | None]) -> tuple[float | None, ...]:
    """Return the items of `there` that follow its common prefix with `here`."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False))
    return tuple(there[sum(1 for _ in same) :])

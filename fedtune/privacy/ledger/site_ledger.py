"""A site's ledger: one SQLite file that says what was done to the records of one population, for ever.

Every decision is one transaction: follow the events that others wrote since, check the policy and the budget, append.
It is on disk when the call returns.  A round is charged before a record is trained on, and its reply is stored before
it is sent; a crash between the two leaves the round charged.

The file is in SQLite's rollback mode, so that a copy made between two transactions is whole.
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

from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import spending
from fedtune.privacy.ledger.chain import Arrivals, Doubt, Head, Kind, Restored, charges_of, table
from fedtune.privacy.ledger.history import History, Run
from fedtune.privacy.ledger.register import Opened
from fedtune.privacy.ledger.store import EventStore
from fedtune.privacy.policy_file import never
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import RECEIPT, Offer, Reason, Receipt, Refused
from fedtune.privacy.site_policy import Policy
from fedtune.spec import RunError

MOST_ANSWERS_A_DAY, MOST_STRANGERS_A_DAY = 1000, 10
"""Refusals beyond these, of allowed leads and of strangers, are given and logged but not recorded: nobody can fill a
site's disk, and no stranger can use up what is there for leads.  An offer that cannot be recorded is not made."""
_MOST_TEXT = 300
_MOST_DOUBTS = 256
"""Receipts that a ledger notes it lacks.  With this many there may be others, so that no anchor clears any of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Leave to train one round, already charged.

    Attributes:
        admitted: the users whom the round may sample; None: everybody, where the population has no arrivals.
    """

    run: str
    round: int
    request: str
    attempt: int
    admitted: frozenset[str] | None = None

    @property
    def of_events(self) -> dict[str, Any]:
        """The fields of the events that are about it."""
        return {"run": self.run, "round": self.round, "request": self.request, "attempt": self.attempt}


class Ledger:
    """The ledger of a site, opened for training.

    Args:
        path: the SQLite file, made when missing.
        policy: the site's limits.  A changed one is noted; unit, delta, population and filter order stay as they were.
        key: the site's key; the one that the ledger was made with.
        anchor: file outside the ledger, best on another disk, that always holds the newest signed head; None: none.

    Raises:
        RunError: the file is damaged, was changed or put back, or cannot be written.  Then nothing may be trained.
    """

    def __init__(self, path: Path, policy: Policy, key: SigningKey, *, anchor: Path | None = None) -> None:
        self.policy = policy
        self._key, self._store = key, EventStore(path, key, anchor)
        with self._store.transaction():
            if not self.history.length:
                opened = Opened.under(policy, ledger=secrets.token_hex(16), site_key=key.public)
                self._store.note("opened", **opened.to_json())
                if opened.arrivals:
                    self._store.make_register()
            self._require_fitting()
            if self.history.policy != policy:
                self._store.note("policy", policy=policy.to_json(), sha256=policy.digest())

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return self._store.path.parent

    @property
    def history(self) -> History:
        """The sum of the events, as of the last transaction."""
        return self._store.history

    def reserve(
        self,
        proposal: Proposal,
        *,
        round: int,
        request: str,
        before_charge: Callable[[], None] = lambda: None,
        arrivals: Callable[[], Mapping[str, int]] = dict,
    ) -> Reservation | bytes:
        """Charge a round before it is trained, or return the stored reply to the same request.

        Guarantee: policy, budget and charge are one transaction, and the charge is durable on return; no private
        record needs to have been read before.  After any accepted request, what was charged stays within every cap of
        the policy, and after a new run was accepted so does what is set aside for open runs.

        Args:
            proposal: of the run.
            round: of the run.
            request: digest of what the lead asked.
            before_charge: called once all checks have passed; if it raises, nothing is charged.
            arrivals: where the population has arrivals, called last before the charge: the cohort of each user by the
                user's own records.  Whom the reservation admits of them is written in the register of arrivals.

        Raises:
            Refused: names the rule, what was asked and what is allowed; nothing is charged.
            RunError: the ledger cannot be trusted or written.
        """
        with self._store.transaction():
            self._require_newest_policy()
            now, run = self._store.now(), self.history.runs.get(proposal.run)
            if run is None:
                self.require_startable(proposal)
                expires = now + timedelta(days=self.policy.limits.run_expires_after_days)
                detail: dict[str, Any] = {"proposal": proposal.to_json(), "expires": expires.isoformat()}
                self._store.append(Kind.PLAN, detail, run=proposal.run, dataset=proposal.dataset)
                run = self.history.runs[proposal.run]
            elif (stored := self._repeated(run, proposal, round, request)) is not None:
                return stored
            else:
                self._require_another_round(run, now)
            before_charge()
            attempt = run.attempts[round] + 1
            # The salt makes two copies' charges of one request differ, also where a clock that is behind says one time.
            detail = {"event": events.to_json(run.plan.event()), "salt": secrets.token_hex(16)}
            granted = Reservation(run=proposal.run, round=round, request=request, attempt=attempt)
            cohort = ""
            if (cohorts := run.plan.cohorts) is not None:
                # The digest always, since others learn the number of events, which must depend on no record; the salt
                # hides it, since an anchor, which anybody may read, has the event's hash.
                admitted, detail["register"] = self._store.admit(arrivals(), cohorts)
                cohort, granted = str(cohorts), replace(granted, admitted=admitted)
            self._store.append(Kind.RESERVE, detail, **granted.of_events, dataset=proposal.dataset, cohort=cohort)
            return granted

    def commit(self, reservation: Reservation, reply: bytes, *, fingerprint: str = "") -> None:
        """Store the reply of a reserved round, durably, before it is sent; the run's earlier reply is dropped.

        `fingerprint` is an HMAC of the records trained on, under `fingerprint_key`; it stays in the ledger.

        Raises:
            Refused: the population was frozen or the run denied meanwhile, so the reply must not leave.
        """
        with self._store.transaction():
            run = self.history.runs[reservation.run]
            if self.history.frozen:
                raise Refused(Reason.FROZEN)
            self._require_undenied(run.proposal)
            newest = run.attempts[reservation.round] == reservation.attempt
            assert newest, "only the newest reservation of a round is committed"
            assert reservation.request not in run.replies, "a request is committed once"
            self._store.store_reply(run=reservation.run, request=reservation.request, reply=reply)
            detail = {"reply_sha256": hashlib.sha256(reply).hexdigest(), "fingerprint": fingerprint}
            self._store.append(Kind.COMMIT, detail, **reservation.of_events, dataset=run.proposal.dataset)

    def refuse(self, refused: Refused, *, run: str, round: int, request: str, lead: str = "") -> None:
        """Record that a lead's request was refused, and why; that it still waits for a person, once a day."""
        with self._store.transaction():
            today = self._store.now().date()
            if refused.reason.is_waiting and (today, run, lead, refused.reason.value) in self.history.refused:
                return
            asked = refused.asked and refused.asked[:_MOST_TEXT]  # what is asked for comes from a server
            detail = {"reason": refused.reason.value, "asked": asked, "allowed": refused.allowed, "lead": lead}
            if self._has_room_for_answer(stranger=refused.reason.is_of_a_stranger):
                self._store.append(Kind.REFUSAL, detail, run=run, round=round, request=request)

    def end(self, run: str, *, lead: str = "", adapter_sha256: str = "") -> None:
        """Note that a run is over: what its plan had set aside and not spent is free again.

        A run that was refused here, and never accepted, can't be accepted from that lead any more: a receipt can then
        say that the lead's run is charged nothing, for good.  Another lead's run of the same name is another run.

        Args:
            run: the one that ended.
            lead: public key of the lead that says so; only a run that was never accepted needs it.
            adapter_sha256: digest of the final adapter, where the lead sent it.
        """
        with self._store.transaction():
            if (known := self.history.runs.get(run)) is not None:
                if known.expires is not None:
                    self._store.note("run_ended", run=run, adapter_sha256=adapter_sha256)
            elif never(run, lead) not in self.history.marks and self.history.has_refused(run, lead):
                self._store.note("run_ended", run=run, adapter_sha256=adapter_sha256, lead=lead)

    def approve(self, proposal: Proposal, *, by: str = "", ticket: str = "", why: str = "") -> None:
        """Note that a person at the site approves this proposal, to the letter.

        Args:
            proposal: of the run.
            by: the person's name.
            ticket: number of the request in the site's own records.
            why: the reason.

        Raises:
            Refused: policy or budget would refuse it all the same.
        """
        with self._store.transaction():
            self._require_newest_policy()
            if proposal.run not in self.history.runs:
                self.require_acceptable(proposal)
            about = proposal.to_json()
            self._store.note("approved", run=proposal.run, proposal=about, by=by, ticket=ticket, why=why)

    def deny(self, proposal: Proposal, why: str, *, by: str = "", ticket: str = "") -> None:
        """Note that a person at the site denies this proposal, to the letter and for good; `why` leaves with nothing.

        Guarantee: from then on no round of the run is charged here, and no reply of it leaves, not even that of a
        round in progress.  A run that had begun ends at this site, and what its plan had set aside is free.
        """
        with self._store.transaction():
            about = proposal.to_json()
            self._store.note("denied", run=proposal.run, proposal=about, by=by, ticket=ticket, why=why)

    def freeze(self, why: str) -> None:
        """End all training on the population, for ever."""
        with self._store.transaction():
            self._store.note("frozen", why=why)

    def asked_at(self, server_time: float) -> None:
        """Take the server's time of the request that is answered next, in seconds since 1970; nonsense says nothing."""
        try:
            self._store.server_time = datetime.fromtimestamp(server_time, UTC)
        except (ValueError, OverflowError, OSError):
            self._store.server_time = None

    def confirm_date(self) -> None:
        """Note that a person says that this machine's date is right: the period of the budget that it is in begins."""
        with self._store.transaction():
            self._store.note("date_confirmed", not_before=self.history.clock)

    @property
    def held_back(self) -> str:
        """Why a period of the budget that this machine's clock is in has not begun, and what to do; or nothing."""
        return self.history.held_back(server=self._store.server_time)

    def receipt(self, run: str, *, lead: str = "", reply: str = "") -> Receipt:
        """The charges of a lead's `run` so far, signed together with the digest of the reply that they travel with."""
        known = self.history.runs.get(run)
        fields: dict[str, Any] = {
            "site": self.policy.site,
            "run": run,
            "charged_rounds": self.history.charged_rounds(run),
            # By an event alone: a clock that is ahead is set right again, and what is signed stays.
            "ended": never(run, lead) in self.history.marks if known is None else known.expires is None,
            "plan": known.plan.digest() if known else "",
            "seeded_noise": bool(known and known.proposal.seeded_noise),
            "simulated": self.policy.simulated,
            "sequence": self.history.path[-1][0],
            "head": self._store.salted_head(),
            "site_key": self._key.public,
            "reply": reply,
        }
        unsigned = Receipt(**fields, signature="")
        return Receipt(**fields, signature=self._key.sign(RECEIPT, unsigned.message()))

    def require_contains(self, receipt: Receipt) -> None:
        """Check a receipt that this site once gave: a ledger without it was lost or put back.

        Then nothing is trained any more, for whatever lead, until the ledger is made up for (`charge_gap`).

        Raises:
            Refused: the receipt is not this site's, or the ledger does not contain its head.
        """
        # The name, too, since populations of one organization may have ledgers under one key.
        if (receipt.site, receipt.site_key) != (self.policy.site, self._key.public) or not receipt.is_signed():
            raise Refused(Reason.WRONG_SIGNATURE)
        shown = Doubt(receipt.sequence, receipt.head, receipt.run, receipt.charged_rounds)
        with self._store.transaction():
            doubts = self.history.doubts
            known = self._store.knows(shown)
            if not known and shown not in doubts and len(doubts) < _MOST_DOUBTS:
                self._store.note("in_doubt", **shown._asdict())
        if not known:
            raise Refused(Reason.LEDGER_BEHIND_RECEIPT, asked=receipt.sequence, allowed=self.history.length)

    def charge_gap(self, anchor: Head) -> Counter[DpEvent]:
        """After a backup was put back: charge, and return, what the anchor says was charged and this ledger lacks.

        All else that the anchor says is taken over with it: what ended, what marks the ledger, whom a person denied,
        which caps were in force, who a user is, and which receipts show that events are missing, unless both branches
        together have them.

        Raises:
            RunError: the anchor is of another ledger, or was made for other users than the policy names.
        """
        self._store.require_same_ledger(anchor)
        with self._store.transaction():
            if self.history.holds(anchor):
                return Counter()
            # What lies behind the last event that both know was charged on another branch, and makes up for nothing.
            both = [n for n, hash in anchor.path if n <= self.history.length and self.history.hashes[n - 1] == hash]
            shared = max(both, default=0)
            there = charges_of(anchor.charged, anchor.arrivals)
            gap = Counter({(event, said): count for event, count, said in there}) - self.history.charges(up_to=shared)
            lost = table(gap)
            restored = Restored(
                shared=shared,
                end=anchor.sequence,
                path=frozenset(anchor.path + anchor.made_up),
                gap=tuple((event, count) for event, count, _ in lost),
                runs=dict(Counter(dict(anchor.runs)) - self.history.rounds_up_to(shared)),
                denied=frozenset(anchor.denied),
                marks=frozenset(anchor.marks),
                caps=_beyond(self.history.caps, anchor.caps),
                users=frozenset(anchor.users),
                doubts=frozenset(anchor.doubts),
                arrivals=self._lost_arrivals(anchor, [said for *_, said in lost], shared=shared),
            )
            doubts = self.history.doubts.union(anchor.doubts)
            if len(doubts) < _MOST_DOUBTS:
                doubts = frozenset(doubt for doubt in doubts if not self._store.knows(doubt, besides=restored))
            # What was charged there counts in the anchor's period, or in a later one.
            then = datetime.fromisoformat(anchor.time)
            self._store.note("restored", not_before=then, **replace(restored, doubts=doubts).to_json())
            self._require_fitting()
        return sum((Counter({event: count}) for (event, _), count in gap.items()), Counter[DpEvent]())

    def head(self) -> Head:
        """The newest head, for an anchor."""
        return self._store.head()

    def offer(self, proposal: Proposal) -> Offer:
        """As much of a new run as the site would accept now; telling it is a release, and is recorded like a refusal.

        Raises:
            Refused: nothing fits, whatever the rounds and the noise; names the rule.
        """
        with self._store.transaction():
            self._require_newest_policy()
            if not self._has_room_for_answer():
                raise RunError("too many refusals and offers today to record another one")
            rounds = spending.most_rounds(proposal, self._would_accept)
            noise = spending.least_noise(proposal, self._would_accept)
            if not rounds and noise is None:
                self.require_acceptable(proposal)
            detail = {"what": "offer", "most_rounds": rounds, "least_noise": noise, "lead": proposal.lead}
            self._store.append(Kind.RELEASE, detail, run=proposal.run)
        return Offer(site=self.policy.site, run=proposal.run, most_rounds=rounds, least_noise=noise)

    def require_acceptable(self, proposal: Proposal) -> None:
        """Raise the reason to refuse a new run, as of the last transaction."""
        spending.require_acceptable(self.history, self.policy, proposal, self._store.now())

    def require_startable(self, proposal: Proposal, *, approved: bool = True) -> None:
        """The same for a run that is new to this ledger; unless not `approved` yet, a person must have approved it.

        One that was accepted may go on as it was proposed, while anything may be trained here and nobody denied it.
        """
        self._require_undenied(proposal)
        if (known := self.history.runs.get(proposal.run)) is not None:
            spending.require_usable(self.history)
            _require_same(known, proposal)
            return
        if never(proposal.run, proposal.lead) in self.history.marks:
            raise Refused(Reason.RUN_ENDED)
        self.require_acceptable(proposal)
        if approved and self.policy.approval == "manual":
            since = self.history.approved.get(proposal.digest())
            good_for = timedelta(days=self.policy.limits.run_expires_after_days)
            # By the clock: a period that is held back keeps no approval, and below no run, alive.
            if since is None or self.history.clock - since > good_for:
                raise Refused(Reason.AWAITING_APPROVAL)

    def require_another_round(self, proposal: Proposal) -> None:
        """Raise the reason to refuse one more round of a run that was accepted, as of the last transaction."""
        if (known := self.history.runs.get(proposal.run)) is not None:
            self._require_another_round(known, self._store.now())

    def fingerprint_key(self) -> bytes:
        """Secret key of the records' HMAC; a plain hash would let anyone test a candidate data set."""
        return self._key.secret("data fingerprint")

    # What follows decides or writes inside a transaction.

    def _would_accept(self, proposal: Proposal) -> bool:
        try:
            self.require_acceptable(proposal)
        except Refused:
            return False
        return True

    def _require_another_round(self, run: Run, now: datetime) -> None:
        """Raise the reason to refuse one more round of an accepted run; policy and period may have changed since."""
        if not run.is_open(self.history.clock):
            raise Refused(Reason.RUN_ENDED)
        if run.charged_rounds >= run.plan.most_rounds:
            raise Refused(Reason.PLAN_EXHAUSTED, asked=run.charged_rounds + 1, allowed=run.plan.most_rounds)
        self.policy.check(run.proposal)
        asked = events.grouped([run.plan.event()])
        spending.require_room(
            self.history, self.policy, run.plan.cohorts, asked=asked, held=lambda _: Counter(), now=now
        )

    def _lost_arrivals(self, anchor: Head, ranges: Sequence[str], *, shared: int) -> Arrivals | None:
        """The cohorts of a gap, and up to which event the register's rows count once the gap is made up for.

        Guarantee: it follows from charges alone, so that no refusal or figure after a restore tells of a record.
        If the lost branch charged a round that this ledger lacks, somebody whom this register lacks, or has under an
        event that the lost branch did not share, may have been admitted there under any cohort.  So may somebody whose
        row one of the branches doubts and the other does not.
        """
        if (there := anchor.arrivals) is None:
            return None
        unsure = [last for last, _ in self.history.lost_rows]
        unsure += [] if there.lost_after is None else [there.lost_after]
        if ranges or unsure:
            unsure.append(shared)
        return Arrivals(ranges=tuple(ranges), lost_after=min(unsure, default=None))

    def _repeated(self, run: Run, proposal: Proposal, round: int, request: str) -> bytes | None:
        """The stored reply to a request that was answered before; None for a round still to be trained.

        Guarantee: rounds never go back.  Of a round before the newest charged one there is the stored reply or none,
        so nobody who kept a lead's question back can have it charged after the lead went on.
        """
        self.require_startable(proposal)
        if run.reserved.get(round, request) != request:
            raise Refused(Reason.ROUND_REQUESTED_DIFFERENTLY, asked=request, allowed=run.reserved[round])
        if request not in run.replies and round >= max(run.reserved, default=0):
            return None
        reply = self._store.reply_to(request)
        if reply is None or hashlib.sha256(reply).hexdigest() != run.replies[request]:
            raise Refused(Reason.REPLY_NO_LONGER_STORED, asked=round)
        return reply

    def _require_undenied(self, proposal: Proposal) -> None:
        if proposal.digest() in self.history.denied:
            raise Refused(Reason.DENIED)

    def _has_room_for_answer(self, *, stranger: bool = False) -> bool:
        most = MOST_STRANGERS_A_DAY if stranger else MOST_ANSWERS_A_DAY
        return self.history.answers[self._store.now().date(), stranger] < most

    def _require_newest_policy(self) -> None:
        if self.history.policy != self.policy:
            raise RunError(f"the policy of ledger {self._store.path} was changed while it was open; open it again")

    def _require_fitting(self) -> None:
        """Unit, delta, population, site, key and who a user is are fixed when a ledger is made."""
        opened = self.history.opened
        differences = [("site_key", opened.site_key, self._key.public), *opened.differences(self.policy)]
        differences += self.history.other_users(self.policy)
        for key, made_for, says in differences:
            if made_for != says:
                raise RunError(
                    f"ledger {self._store.path} was made for {key} = {made_for}, the policy says {says}; "
                    "set it back, since it is fixed for the ledger's life"
                )


def _beyond(here: Sequence[float | None], there: Sequence[float | None]) -> tuple[float | None, ...]:
    """The items of `there` after the beginning that both have in common."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False))
    return tuple(there[sum(1 for _ in same) :])


def _require_same(known: Run, proposal: Proposal) -> None:
    """A run's name holds its settings and not its lead: another lead may ask for the same ones."""
    if known.proposal != proposal:
        raise Refused(Reason.PLAN_CHANGED, asked=proposal.digest(), allowed=known.proposal.digest())

"""A site's ledger: one SQLite file that says what was done to the records of one population, for ever.

Every decision is one transaction: follow the events that others wrote since, check the policy and the budget, append.
It is on disk when the call returns.  A round is charged before its first record is read, and its reply is stored before
it is sent; a crash between the two leaves the round charged.

The file is in SQLite's rollback mode, so that a copy made between two transactions is whole.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from dp_accounting import DpEvent

from fedtune.privacy import events, ledger_file, spending
from fedtune.privacy.chain import Head, Kind
from fedtune.privacy.event_store import EventStore, Reservation
from fedtune.privacy.filter import best_order
from fedtune.privacy.history import History, Run, counted
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy import Policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import RECEIPT, Offer, Reason, Receipt, Refused
from fedtune.spec import RunError

MOST_ANSWERS_A_DAY = 1000
"""Refusals and offers beyond these are given and logged but not recorded, so that nobody can fill a site's disk."""
_MOST_TEXT = 300


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
        with self._store.transaction() as file:
            self._store.require_anchored(file)
            if not self.history.length:
                self._open(file)
            self._check_ownership()
            if self.history.policy != policy:
                self._note(file, {"what": "policy", "policy": policy.to_json(), "sha256": policy.digest()})

    @property
    def history(self) -> History:
        """What the events add up to, as of the last transaction."""
        return self._store.history

    def reserve(self, proposal: Proposal, *, round: int, request: str) -> Reservation | bytes:
        """Charge a round before it is trained, or return the stored reply to the same request.

        Guarantee: policy, budget and charge are one transaction, and the charge is durable on return; no private
        record needs to have been read before.  After any accepted request, what was charged and what is set aside for
        open runs stay within every cap of the policy.

        Raises:
            Refused: names the rule, what was asked and what is allowed; nothing is charged.
            RunError: the ledger cannot be trusted or written.
        """
        with self._store.transaction() as file:
            now = self._store.now()
            run = self.history.runs.get(proposal.run)
            if self.history.frozen:
                raise Refused(Reason.FROZEN)
            if run is None:
                self._require_acceptable(proposal, now)
                expires = now + timedelta(days=self.policy.limits.run_expires_after_days)
                detail = {"proposal": proposal.to_json(), "expires": expires.isoformat()}
                self._store.append(file, Kind.PLAN, detail, of=Reservation(run=proposal.run), dataset=proposal.dataset)
                run = self.history.runs[proposal.run]
            elif (stored := self._repeated(file, run, proposal, round, request)) is not None:
                return stored
            else:
                self._require_another_round(run, now)
            attempt = run.attempts[round] + 1
            detail = {"event": events.to_json(run.plan.event())}
            granted = Reservation(run=proposal.run, round=round, request=request, attempt=attempt)
            self._store.append(file, Kind.RESERVE, detail, of=granted, dataset=proposal.dataset)
            return granted

    def commit(self, reservation: Reservation, reply: bytes, *, fingerprint: str = "") -> None:
        """Store the reply of a reserved round, durably, before it is sent; the run's earlier reply is dropped.

        `fingerprint` is an HMAC of the records trained on, under `fingerprint_key`; it stays in the ledger.
        """
        with self._store.transaction() as file:
            run = self.history.runs[reservation.run]
            newest = run.attempts[reservation.round] == reservation.attempt
            assert newest, "only the newest reservation of a round is committed"
            assert reservation.request not in run.replies, "a request is committed once"
            ledger_file.store_reply(file, run=reservation.run, request=reservation.request, reply=reply)
            self._store.append(
                file,
                Kind.COMMIT,
                {"reply_sha256": hashlib.sha256(reply).hexdigest(), "fingerprint": fingerprint},
                of=reservation,
                dataset=run.proposal.dataset,
            )

    def refuse(self, refused: Refused, *, run: str, round: int, request: str) -> None:
        """Record that a request was refused, and why."""
        with self._store.transaction() as file:
            today = self._store.now().isoformat()[:10]
            if self.history.answers[today] < MOST_ANSWERS_A_DAY:
                asked = refused.asked and refused.asked[:_MOST_TEXT]  # what is asked for comes from a server
                detail = {"reason": refused.reason.value, "asked": asked, "allowed": refused.allowed}
                self._store.append(
                    file, Kind.REFUSAL, detail, of=Reservation(run=run[:_MOST_TEXT], round=round, request=request)
                )

    def end(self, run: str) -> None:
        """Note that a run is over: what its plan had set aside and not spent is free again."""
        with self._store.transaction() as file:
            known = self.history.runs.get(run)
            if known is not None and known.expires is not None:
                self._note(file, {"what": "run_ended"}, run=run)

    def freeze(self, why: str) -> None:
        """Take no part in anything any more; there is no way back."""
        with self._store.transaction() as file:
            self._note(file, {"what": "frozen", "why": why})

    def receipt(self, run: str) -> Receipt:
        """What `run` has been charged so far, signed."""
        known = self.history.runs.get(run)
        charged = known.charged_rounds if known else 0
        steps = known.plan.local_steps if known else 0
        fields: dict[str, Any] = {
            "site": self.policy.site,
            "run": run,
            "charged_rounds": charged,
            "charged_steps": charged * steps,
            "sequence": self.history.length,
            "restores": len(self.history.restored),
            "head": self._store.salted_head(),
            "site_key": self._key.public,
        }
        unsigned = Receipt(**fields, signature="")
        return Receipt(**fields, signature=self._key.sign(RECEIPT, unsigned.message()))

    def require_contains(self, receipt: Receipt) -> None:
        """Check a receipt that this site once gave: a ledger without it was lost or put back.

        Raises:
            Refused: the ledger does not contain the receipt's head.
        """
        if receipt.site_key != self._key.public or not receipt.is_signed():
            raise Refused(Reason.WRONG_SIGNATURE)
        if self.history.makes_up_for(sequence=receipt.sequence, restores=receipt.restores):
            return
        if not self._store.contains(receipt.sequence, receipt.head):
            raise Refused(Reason.LEDGER_BEHIND_RECEIPT, asked=receipt.sequence, allowed=self.history.length)

    def charge_gap(self, anchor: Head) -> Counter[DpEvent]:
        """After a backup was put back: charge what the anchor says was charged and this ledger lacks.

        Returns:
            What was charged now.

        Raises:
            RunError: the anchor is of another ledger.
        """
        self._store.require_same_ledger(anchor)
        with self._store.transaction() as file:
            if not self._store.lacks(file, anchor):
                return Counter()
            # What was charged after the anchor's time was charged on another branch, and makes up for nothing.
            known = self.history.charged(until=datetime.fromisoformat(anchor.time))
            gap = Counter({events.from_json(data): count for data, count in anchor.charged}) - known
            self._note(file, anchor.restored_note(counted(gap)))
        return gap

    def head(self) -> Head:
        """The newest head, for an anchor."""
        return self._store.head()

    def spending(self) -> spending.Spending:
        """What was spent and is left, by now."""
        return spending.spending(self.history, self._store.now())

    def offer(self, proposal: Proposal) -> Offer:
        """As much of a new run as the site would accept now; telling it is a release, and is recorded.

        Raises:
            Refused: nothing fits, whatever the rounds and the noise; names the rule.
        """
        with self._store.transaction() as file:
            if self.history.frozen:
                raise Refused(Reason.FROZEN)
            rounds = spending.most_rounds(proposal, self._would_accept)
            noise = spending.least_noise(proposal, self._would_accept)
            if not rounds and noise is None:
                self._require_acceptable(proposal, self._store.now())
            if self.history.answers[self._store.now().isoformat()[:10]] < MOST_ANSWERS_A_DAY:
                detail = {"what": "offer", "most_rounds": rounds, "least_noise": noise}
                self._store.append(file, Kind.RELEASE, detail, of=Reservation(run=proposal.run))
        return Offer(site=self.policy.site, most_rounds=rounds, least_noise=noise)

    def _would_accept(self, proposal: Proposal) -> bool:
        try:
            self._require_acceptable(proposal, self._store.now())
        except Refused:
            return False
        return True

    def fingerprint_key(self) -> bytes:
        """Secret key of the records' HMAC; a plain hash would let anyone test a candidate data set."""
        return self._key.secret("data fingerprint")

    # What follows decides or writes inside a transaction.

    def _require_acceptable(self, proposal: Proposal, now: datetime) -> None:
        """Raise the reason to refuse a new run: its whole plan must fit beside what open runs have set aside."""
        self.policy.check(proposal)
        whole = events.grouped([proposal.plan.event(rounds=proposal.plan.most_rounds)])
        held = self.history.set_aside(now)
        spending.require_room(self.history, self.policy, asked=whole, held=held, now=now)

    def _require_another_round(self, run: Run, now: datetime) -> None:
        """Raise the reason to refuse one more round of an accepted run; policy and period may have changed since."""
        if not run.is_open(now):
            raise Refused(Reason.RUN_ENDED)
        if run.charged_rounds >= run.plan.most_rounds:
            raise Refused(Reason.PLAN_EXHAUSTED, asked=run.charged_rounds + 1, allowed=run.plan.most_rounds)
        self.policy.check(run.proposal)
        asked = events.grouped([run.plan.event()])
        spending.require_room(self.history, self.policy, asked=asked, held=Counter(), now=now)

    def _repeated(
        self, file: sqlite3.Connection, run: Run, proposal: Proposal, round: int, request: str
    ) -> bytes | None:
        """The stored reply to a request that was answered before; None for a round still to be trained."""
        if run.proposal != proposal:
            raise Refused(Reason.PLAN_CHANGED, asked=proposal.digest(), allowed=run.proposal.digest())
        if run.reserved.get(round, request) != request:
            raise Refused(Reason.ROUND_REQUESTED_DIFFERENTLY, asked=request, allowed=run.reserved[round])
        if request not in run.replies:
            return None
        reply = ledger_file.reply_to(file, request)
        if reply is None or hashlib.sha256(reply).hexdigest() != run.replies[request]:
            raise Refused(Reason.REPLY_NO_LONGER_STORED, asked=round)
        return reply

    def _open(self, file: sqlite3.Connection) -> None:
        """Write the first event: everything about the ledger that never changes."""
        budget = self.policy.budget
        reference = budget.reference_event()
        self._note(
            file,
            {
                "what": "opened",
                "ledger": secrets.token_hex(16),
                "site": self.policy.site,
                "population": self.policy.population.name,
                "unit": self.policy.population.unit,
                "delta": budget.delta,
                "order": best_order(reference, epsilon=budget.max_epsilon, delta=budget.delta),
                "reference": events.to_json(reference),
                "site_key": self._key.public,
                "no_person_at_another_site": self.policy.asserted.no_person_at_another_site,
            },
        )

    def _check_ownership(self) -> None:
        """Unit, delta, population, site and key are fixed when a ledger is made."""
        opened, policy = self.history.opened, self.policy
        for name, asked in (
            ("site_key", self._key.public),
            ("site", policy.site),
            ("population", policy.population.name),
            ("unit", policy.population.unit),
            ("delta", policy.budget.delta),
        ):
            if (made_for := getattr(opened, name)) != asked:
                raise RunError(
                    f"ledger {self._store.path} was made for {name} = {made_for}, the policy says {asked}; "
                    "another one needs a ledger of its own"
                )

    def _note(self, file: sqlite3.Connection, detail: dict[str, Any], *, run: str = "") -> None:
        self._store.append(file, Kind.NOTE, detail, of=Reservation(run=run))

"""What the lead knows of a run between two rounds, and what each site has been charged as far as it can tell."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.federation.protocol import Reply
from fedtune.model import Adapter
from fedtune.privacy import accountant
from fedtune.privacy.durable import write_durably
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Receipt, Update, receipt_from_json
from fedtune.spec import RunError

Arrays = Mapping[str, npt.NDArray[np.float32]]
Scores = Mapping[str, float | None]
"""Name -> score on a file of the lead; None, or a number that is not finite: the model diverged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """What one round came to, as `run.json` shows it.

    Attributes:
        seconds: training and aggregation; evaluation is not counted.
        failed_sites: site -> reason.
        metrics: of the aggregated adapter on the lead's validation file.
        site_scores: site -> its noised statistics of held-out units, for the adapter that the round began with; with
            `privacy.metrics=noised`, the noised score and the noised share of the declared number.
        ended: UTC, when the round was aggregated and scored; empty in runs of versions that did not note it.
        diverged: the average, or its score, was not finite; the run went back to the adapter before, whose `metrics`
            these are.  The round is charged all the same.
    """

    round: int
    seconds: float
    sites: tuple[str, ...]
    failed_sites: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    metrics: Scores
    site_scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ended: str = ""
    diverged: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LeadState:
    """A run between two rounds; everything that a resumed run continues from.

    Attributes:
        round: rounds finished so far.
        adapter: aggregated after that round.
        strategy: arrays of the server optimizer, empty for plain averaging.
        receipts: site -> its newest receipt.
        unanswered: site -> rounds asked of it since that receipt.
        rounds: one result for each finished round.
        seconds: wall time so far, over all starts of the run.
        metrics_before: of the initial adapter on the test file.
    """

    round: int
    adapter: Adapter
    strategy: Arrays = field(default_factory=dict)
    receipts: Mapping[str, Receipt] = field(default_factory=dict)
    unanswered: Mapping[str, int] = field(default_factory=dict)
    rounds: Sequence[RoundResult] = ()
    seconds: float = 0.0
    metrics_before: Scores = field(default_factory=dict)

    def asked(self, sites: Sequence[str]) -> LeadState:
        """The state once a round has been asked of `sites`: until they answer, each may have been charged for it."""
        counts = {site: self.unanswered.get(site, 0) + (site in sites) for site in {*self.unanswered, *sites}}
        return replace(self, unanswered=counts)

    def answered(self, replies: Mapping[str, Reply], *, run: str, most_rounds: int) -> LeadState:
        """The state with the receipts of `replies`, which say what was really charged.

        A receipt of another run or site says nothing about this one; one that is not signed, or by another key than
        before, is nobody's word; one of more rounds than the plan has is wrong; and one that went backwards comes of a
        ledger that was lost or put back.  Such a site counts as silent.
        """
        return self._with(self._credible_of(replies, run=run, most_rounds=most_rounds))

    def believed(self, replies: Mapping[str, Reply], *, run: str, most_rounds: int) -> dict[str, Reply]:
        """`replies` without the receipts that say nothing about this run: an update whose receipt is gone is none."""
        kept = self._credible_of(replies, run=run, most_rounds=most_rounds)
        return {site: reply if site in kept else replace(reply, receipt=None) for site, reply in replies.items()}

    def heard(self, receipts: Mapping[str, Receipt], *, run: str, most_rounds: int) -> LeadState:
        """As `answered`, for receipts that came without replies."""
        return self._with(self._credible(receipts, run=run, most_rounds=most_rounds, updates=()))

    def _with(self, new: Mapping[str, Receipt]) -> LeadState:
        unanswered = {site: count for site, count in self.unanswered.items() if site not in new}
        return replace(self, receipts={**self.receipts, **new}, unanswered=unanswered)

    def _credible_of(self, replies: Mapping[str, Reply], *, run: str, most_rounds: int) -> dict[str, Receipt]:
        updates = {site for site, reply in replies.items() if isinstance(reply.body, Update)}
        receipts = {site: reply.receipt for site, reply in replies.items() if reply.receipt}
        return self._credible(receipts, run=run, most_rounds=most_rounds, updates=updates)

    def _credible(
        self, receipts: Mapping[str, Receipt], *, run: str, most_rounds: int, updates: Collection[str]
    ) -> dict[str, Receipt]:
        return {
            site: receipt
            for site, receipt in receipts.items()
            # No ledger grants a run more rounds than its plan has.
            if (receipt.run, receipt.site) == (run, site) and receipt.charged_rounds <= most_rounds
            if self._fits(receipt, update=site in updates)
        }

    def _fits(self, receipt: Receipt, *, update: bool) -> bool:
        # Each update was charged: a receipt that counts fewer is an old one, which a server put in a newer one's place.
        if receipt.charged_rounds < update + sum(receipt.site in result.sites for result in self.rounds):
            return False
        old = self.receipts.get(receipt.site)
        if old is not None and (receipt.charged_rounds < old.charged_rounds or receipt.sequence < old.sequence):
            return False
        return receipt.is_signed() and (old is None or receipt.site_key == old.site_key)


def newest_of(one: Mapping[str, Receipt], other: Mapping[str, Receipt]) -> dict[str, Receipt]:
    """Of each site, the receipt that knows more of its ledger; `other`'s where the keys, and so the ledgers, differ."""
    newest = dict(one)
    for site, receipt in other.items():
        known = newest.get(site)
        if known is None or receipt.site_key != known.site_key or receipt.sequence >= known.sequence:
            newest[site] = receipt
    return newest


@dataclass(frozen=True)
class ReceiptBook:
    """A JSON file.  Sent back with the next request, a receipt shows a site that its ledger was lost or put back."""

    path: Path

    def read(self) -> dict[str, Receipt]:
        """Site -> its newest receipt.

        Raises:
            RunError: the file is damaged.
        """
        if not self.path.exists():
            return {}
        try:
            return {site: receipt_from_json(fields) for site, fields in json.loads(self.path.read_bytes()).items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RunError(f"{self.path} is damaged; the sites' last receipts are not known") from error

    def keep(self, receipts: Mapping[str, Receipt]) -> None:
        """Remember those that are newer than what is there."""
        newest = {site: asdict(receipt) for site, receipt in newest_of(self.read(), receipts).items()}
        write_durably(self.path, json.dumps(newest, indent=1).encode() + b"\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCharge:
    """A site's spending in one run, from its receipts.

    Attributes:
        rounds: charged, retries included; `steps` are theirs.
        epsilon: by PLD, at the plan's delta; infinite without noise.
        epsilon_rdp: the same events by RDP.
        planned_epsilon: of the whole plan, by PLD.  For a run that ended early this is the figure that is proved
            whatever made it end: `epsilon` is one only where that did not depend on what the run had released.
        upper_bound: the site fell silent, so every round asked of it since its last receipt is counted as charged.
    """

    rounds: int
    steps: int
    epsilon: float
    epsilon_rdp: float
    planned_epsilon: float
    upper_bound: bool


def site_charge(state: LeadState, site: str, plan: Plan) -> SiteCharge:
    """What `site` has spent in this run: derived from charged rounds, never from what was planned.

    A site that fell silent may have been charged for every round asked of it since its last receipt, but for no more
    rounds than its plan: its ledger grants none.
    """
    receipt = state.receipts.get(site)
    silent = state.unanswered.get(site, 0)
    charged = receipt.charged_rounds if receipt else 0
    rounds = max(charged, min(charged + silent, plan.most_rounds))
    epsilon, epsilon_rdp = charged_epsilons(plan, rounds)
    return SiteCharge(
        rounds=rounds,
        steps=rounds * plan.local_steps,
        epsilon=epsilon,
        epsilon_rdp=epsilon_rdp,
        planned_epsilon=charged_epsilons(plan, plan.most_rounds)[0],
        upper_bound=silent > 0,
    )


@lru_cache(maxsize=256)
def charged_epsilons(plan: Plan, rounds: int) -> tuple[float, float]:
    """Epsilon of so many charged rounds of a plan, by PLD and by RDP."""
    # Cached: sites mostly stand at the same count, and composing takes a moment.
    if rounds == 0:
        return 0.0, 0.0
    spent = [plan.event(rounds=rounds)]
    return accountant.epsilon_pld(spent, plan.delta), accountant.epsilon_rdp(spent, plan.delta)

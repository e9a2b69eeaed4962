"""Handling of a round's replies at the lead: the stopping rule for stragglers, and the validation of updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtune.federation.bfloat16 import MAX_ROUNDING, add_difference
from fedtune.federation.protocol import Reply
from fedtune.federation.spec import FederationSpec
from fedtune.federation.update_store import UpdateStore
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank, pad_to_full_rank
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Difference, Masked, Refusal, Tensors, Update
from fedtune.privacy.run_plan import Plan

if TYPE_CHECKING:  # it imports torch
    from fedtune.training.update_bound import UpdateBound

INVALID_UPDATE = "invalid_update"
NO_REPLY = "no_reply"
LEFT_OUT = "left_out"  # the site is excluded, because its shares in secure aggregation were wrong
NOT_SUMMED = "not_summed"  # the site was charged, but its upload is not in the sum
UNSIGNED_REPLY = "unsigned_reply"  # unsigned, or signed for another round, so that it does not prove a charge
_MAX_SHARE = 1e9
"""The largest plausible noised score or count, as a share of the declared size."""
BEYOND_PLAN = "beyond_plan"  # the update is further from the sent adapter than the plan's training allows


@dataclass
class StoppingRule:
    """Rule that ends the wait for stragglers.  It depends only on which sites have answered, never on update values.

    The wait ends `straggler_grace_s` seconds after either of two events: `enough_sites` usable answers have arrived, or
    `required_sites` usable answers have arrived and all other sites are idle (offline, paused, awaiting a person's
    approval, or refusing).  It ends at once if no site is working and too many sites have refused for `required_sites`
    usable answers.
    """

    spec: FederationSpec
    clock: Callable[[], float] = time.monotonic  # seconds; only differences matter
    _since: float | None = field(default=None, init=False)

    def is_over(self, *, good: int, at_work: int, others: int) -> bool:
        """Return True if the wait is over; poll it during an exchange.

        Args:
            good: the number of sites with a usable answer.
            at_work: the number of online sites without an answer; before a run begins, it includes sites where a person
                has yet to approve the run.
            others: the number of sites that are offline, paused or, during a round, not approved yet; they may still
                answer.
        """
        if not at_work and good + others < self.spec.required_sites:
            return True
        enough = self.spec.enough_sites or len(self.spec.active)
        if not (good >= enough or (good >= self.spec.required_sites and not at_work)):
            self._since = None
            return False
        if self._since is None:
            self._since = self.clock()
        return self.clock() - self._since >= self.spec.straggler_grace_s


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """Outcome of validating a site's reply.

    `failure` is the reason for rejecting the reply; it is empty for a usable update.
    """

    failure: str = ""
    scores: tuple[float, float] | None = None
    refusal: Refusal | None = None


@dataclass(kw_only=True)
class RoundReplies:
    """Replies to a round, each validated on arrival.

    An update is valid if its site signed it, and its distance from the sent adapter is possible under the plan.
    """

    proposal: Proposal  # the proposal of the run
    round: int  # the number of the round
    sent: Adapter  # the adapter that was sent to the sites
    reaches: Mapping[str, UpdateBound]  # requested site -> bound on its update, in the order of the sites
    arrived: UpdateStore  # the store for valid updates
    update_dtype: str  # the number format of plain updates on the wire
    left_out: Collection[str] = ()  # excluded sites, whose replies are ignored
    # site -> its upload to secure aggregation, which cannot be validated on its own
    masked: dict[str, bytes] = field(default_factory=dict, init=False)
    _outcomes: dict[str, _Outcome] = field(default_factory=dict, init=False)

    def add_reply(self, site: str, reply: Reply) -> None:
        """Validate a reply from a requested site, and store its update if it is valid.

        A later reply replaces the earlier reply of the same site.
        """
        if site not in self.reaches or site in self.left_out:
            return
        outcome, update = self._validate_reply(site, reply)
        if isinstance(update, Masked):
            self.masked[site] = update
        elif update is not None:
            self.arrived.put(site, update)
        self._outcomes[site] = outcome

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites with a valid update, in a fixed order for reproducible floating-point sums."""
        return tuple(site for site, outcome in self._list_outcomes() if not outcome.failure)

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """The noised score and count of held-out records by site, if the plan releases them."""
        return {site: outcome.scores for site, outcome in self._list_outcomes() if outcome.scores is not None}

    @property
    def failures(self) -> dict[str, str]:
        """The reason for each missing update, by site."""
        return {site: outcome.failure for site, outcome in self._list_outcomes() if outcome.failure}

    @property
    def refusals(self) -> dict[str, Refusal]:
        """The signed refusals by site, each with the requested and the allowed value."""
        return {site: outcome.refusal for site, outcome in self._list_outcomes() if outcome.refusal is not None}

    def _list_outcomes(self) -> list[tuple[str, _Outcome]]:
        silent = {site: _Outcome(failure=LEFT_OUT if site in self.left_out else NO_REPLY) for site in self.reaches}
        return [(site, self._outcomes.get(site, why)) for site, why in silent.items()]

    def _validate_reply(self, site: str, reply: Reply) -> tuple[_Outcome, Tensors | Masked | None]:
        """Validate a reply; return the outcome, and the trained adapter or the masked upload if the update is valid."""
        body, own = reply.body, reply.is_signed()
        about_this = reply.about == (site, self.proposal.run, self.round)
        if isinstance(body, Refusal):
            # A site gives no receipt to a stranger or with an unreadable ledger.  The reason of such a refusal is
            # shown, but the refusal counts as no answer.
            own = own and about_this
            shown = own or not reply.receipt
            return _Outcome(failure=body.reason.value if shown else UNSIGNED_REPLY, refusal=body if own else None), None
        if not (own and about_this):
            return _Outcome(failure=UNSIGNED_REPLY), None
        plan = self.proposal.plan
        if not (isinstance(body, Update) and _are_valid_scores(plan, body.scores)):
            return _Outcome(failure=INVALID_UPDATE), None
        update, outcome = body.tensors, _Outcome(scores=body.scores)
        if plan.shared is not None:
            return (outcome, update) if isinstance(update, Masked) else (_Outcome(failure=INVALID_UPDATE), None)
        rounded = isinstance(update, Difference)
        rank, sent = self.proposal.find_rank(site), self.sent.tensors
        expected = rounded == (self.update_dtype == "bfloat16")
        part = _decode_update(update, cut_to_rank(sent, rank)) if expected else None
        tensors = None if part is None else pad_to_full_rank(part, sent, rank)
        if tensors is None:
            return _Outcome(failure=INVALID_UPDATE), None
        within = self.reaches[site].allows(tensors, sent=self.sent, rounding=MAX_ROUNDING * rounded)
        return (outcome, tensors) if within else (_Outcome(failure=BEYOND_PLAN), None)


def _are_valid_scores(plan: Plan, scores: tuple[float, float] | None) -> bool:
    """Return True if the scores are plausible, and present exactly if the plan releases scores.

    Scores and counts are shares of the declared size.
    """
    return (scores is not None) == plan.releases_metrics and all(abs(value) <= _MAX_SHARE for value in scores or ())


def _decode_update(update: Tensors | Difference | Masked, sent: Tensors) -> Tensors | None:
    """Decode an update to tensors; None if names, order, shapes or dtype differ from `sent`, or a value is not finite.

    A bfloat16 difference is added to `sent` here, once, so that bounds and averages see the resulting adapter.
    """
    if isinstance(update, Masked):
        return None
    arrays: Mapping[str, npt.NDArray[Any]] = update.halves if isinstance(update, Difference) else update
    expected = [(name, value.shape) for name, value in sent.items()]
    if [(name, value.shape) for name, value in arrays.items()] != expected:
        return None
    tensors = add_difference(sent, update) if isinstance(update, Difference) else update
    is_sound = all(value.dtype == np.float32 and bool(np.isfinite(value).all()) for value in tensors.values())
    return tensors if is_sound else None

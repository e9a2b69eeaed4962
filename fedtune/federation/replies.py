"""A round's answers at the lead: when it stops waiting for them, and which of them may be averaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtune.federation.protocol import Reply
from fedtune.federation.rounding import MOST_ROUNDING, add_difference
from fedtune.federation.spec import FederationSpec
from fedtune.federation.update_store import Arrived
from fedtune.model.adapter import Adapter
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Difference, Masked, Refusal, Tensors, Update
from fedtune.privacy.run_plan import Plan

if TYPE_CHECKING:  # it imports torch
    from fedtune.training.reach import Reach

INVALID_UPDATE = "invalid_update"
NO_REPLY = "no_reply"
LEFT_OUT = "left_out"  # of a site that is asked no more, since its shares in a secure sum were wrong
NOT_SUMMED = "not_summed"  # of a site whose upload is in no sum: it is charged, and the round moved nothing by it
UNSIGNED_REPLY = "unsigned_reply"  # or signed about something else, which shows no charge
_MOST_SHARE = 1e9
"""The largest share of the declared number that a score or a count may be, with any noise and any true number."""
BEYOND_PLAN = "beyond_plan"  # of an update that moves the adapter further than the plan's training can


@dataclass
class Closing:
    """A rule on when an exchange with the sites may end before its time is up: on who answered, and not what.

    Two cases end it, each `grace_s` seconds after it began: `enough_sites` good answers are there; or `least_sites`
    are, and nobody else is at work, for every other site is offline, paused, waiting for a person or has refused.  It
    ends at once when nobody is at work and too many sites have refused for `least_sites` good answers to come.
    """

    spec: FederationSpec
    clock: Callable[[], float] = time.monotonic  # seconds, of which only differences count
    _since: float | None = field(default=None, init=False)

    def is_over(self, *, good: int, at_work: int, others: int) -> bool:
        """True if it is time to stop waiting; to be asked again and again.

        Args:
            good: sites with an answer of the kind that was hoped for.
            at_work: sites that are online, were asked and have not answered; before a run begins also those where a
                person is yet to approve it.
            others: sites that are offline, paused or, in a round, not approved yet: an answer may still come.
        """
        if not at_work and good + others < self.spec.least_sites:
            return True
        enough = self.spec.enough_sites or len(self.spec.active)
        if not (good >= enough or (good >= self.spec.least_sites and not at_work)):
            self._since = None
            return False
        if self._since is None:
            self._since = self.clock()
        return self.clock() - self._since >= self.spec.grace_s


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """The outcome of a site's reply: `failure` says why it brought no usable update, and is empty where it did."""

    failure: str = ""
    scores: tuple[float, float] | None = None
    refusal: Refusal | None = None


@dataclass(kw_only=True)
class RoundReplies:
    """A round's replies, each judged as it comes: which updates their sites signed and training can have made."""

    proposal: Proposal  # of the run
    round: int  # of the run
    sent: Adapter  # the adapter that the round began in
    reaches: Mapping[str, Reach]  # asked site -> how far its training may take the adapter, in the sites' order
    arrived: Arrived  # where the valid updates are kept
    update_dtype: str  # the number format in which plain updates come
    left_out: Collection[str] = ()  # sites that are asked no more, and not heard
    # site -> its upload to a secure sum, which nothing can be said of by itself
    masked: dict[str, bytes] = field(default_factory=dict, init=False)
    _outcomes: dict[str, _Outcome] = field(default_factory=dict, init=False)

    def take(self, site: str, reply: Reply) -> None:
        """Judge an asked site's reply, and keep its update if it is valid; a later reply of its replaces it."""
        if site not in self.reaches or site in self.left_out:
            return
        outcome, found = self._judge(site, reply)
        if isinstance(found, Masked):
            self.masked[site] = found
        elif found is not None:
            self.arrived.put(site, found)
        self._outcomes[site] = outcome

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites with a valid update, in their order, so that a sum over them always rounds alike."""
        return tuple(site for site, outcome in self._in_order() if not outcome.failure)

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """Site -> noised score and count of its held-out units, where the plan releases them."""
        return {site: outcome.scores for site, outcome in self._in_order() if outcome.scores is not None}

    @property
    def failures(self) -> dict[str, str]:
        """Site -> reason, for every asked site without a usable update."""
        return {site: outcome.failure for site, outcome in self._in_order() if outcome.failure}

    @property
    def refusals(self) -> dict[str, Refusal]:
        """The failures that are refusals under their site's signature, with what was asked and what is allowed."""
        return {site: outcome.refusal for site, outcome in self._in_order() if outcome.refusal is not None}

    def _in_order(self) -> list[tuple[str, _Outcome]]:
        silent = {site: _Outcome(failure=LEFT_OUT if site in self.left_out else NO_REPLY) for site in self.reaches}
        return [(site, self._outcomes.get(site, why)) for site, why in silent.items()]

    def _judge(self, site: str, reply: Reply) -> tuple[_Outcome, Tensors | Masked | None]:
        """The outcome of a reply, and the adapter that a valid update is, or the upload to a secure sum."""
        body, own = reply.body, reply.is_signed()
        about_this = reply.about == (site, self.proposal.run, self.round)
        if isinstance(body, Refusal):
            # A site gives a stranger no receipt, and none of a ledger that it cannot read: such a refusal's reason is
            # shown, and it counts as no answer.
            own = own and about_this
            shown = own or not reply.receipt
            return _Outcome(failure=body.reason.value if shown else UNSIGNED_REPLY, refusal=body if own else None), None
        if not (own and about_this):
            return _Outcome(failure=UNSIGNED_REPLY), None
        plan = self.proposal.plan
        if not (isinstance(body, Update) and _are_scores_of(plan, body.scores)):
            return _Outcome(failure=INVALID_UPDATE), None
        came, outcome = body.tensors, _Outcome(scores=body.scores)
        if plan.shared is not None:
            return (outcome, came) if isinstance(came, Masked) else (_Outcome(failure=INVALID_UPDATE), None)
        rounded = isinstance(came, Difference)
        tensors = _tensors_of(came, self.sent) if rounded == (self.update_dtype == "bfloat16") else None
        if tensors is None:
            return _Outcome(failure=INVALID_UPDATE), None
        within = self.reaches[site].includes(tensors, sent=self.sent, rounding=MOST_ROUNDING * rounded)
        return (outcome, tensors) if within else (_Outcome(failure=BEYOND_PLAN), None)


def _are_scores_of(plan: Plan, scores: tuple[float, float] | None) -> bool:
    """Scores came if the plan has them, of a size with which one can reckon: shares of a declared number."""
    return (scores is not None) == plan.releases_metrics and all(abs(value) <= _MOST_SHARE for value in scores or ())


def _tensors_of(came: Tensors | Difference | Masked, sent: Adapter) -> Tensors | None:
    """The adapter that an update is, with the names, order, shapes, type of `sent` and finite values; None: it is none.

    A difference is added here, once, so that bounds and averages see the adapter that arrived.
    """
    if isinstance(came, Masked):
        return None
    arrays: Mapping[str, npt.NDArray[Any]] = came.halves if isinstance(came, Difference) else came
    wanted = [(name, value.shape) for name, value in sent.tensors.items()]
    if [(name, value.shape) for name, value in arrays.items()] != wanted:
        return None
    tensors = add_difference(sent.tensors, came) if isinstance(came, Difference) else came
    is_sound = all(value.dtype == np.float32 and bool(np.isfinite(value).all()) for value in tensors.values())
    return tensors if is_sound else None

"""A round's answers at the lead: when it stops waiting for them, and which of them may be averaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from fedtune.federation.protocol import Reply
from fedtune.federation.spec import FederationSpec
from fedtune.model import Adapter
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import METRICS, Answer, Refusal, Update

if TYPE_CHECKING:  # it imports torch
    from fedtune.training.optimizer import Reach

INVALID_UPDATE = "invalid_update"
NO_REPLY = "no_reply"
UNSIGNED_REPLY = "unsigned_reply"
_MOST_SHARE = 1e9
"""Of the declared number, whatever noise and true number make of it."""
BEYOND_PLAN = "beyond_plan"
"""Of an update that moves the adapter further than the plan's training can."""


@dataclass
class Closing:
    """Whether one exchange with the sites may end before its time is up: a rule that reads who answered, and no answer.

    Two cases end it, each `grace_s` seconds after it began: `enough_sites` good answers are there; or `min_sites` are,
    and nobody else is at work, for every other site is offline, paused, waiting for a person or has refused.  It ends
    at once when nobody is at work and so many sites have refused that `min_sites` good answers cannot come any more.

    Attributes:
        clock: seconds, of which only differences count.
    """

    spec: FederationSpec
    clock: Callable[[], float] = time.monotonic
    _since: float | None = field(default=None, init=False)

    def is_over(self, *, good: int, at_work: int, others: int) -> bool:
        """Whether to stop waiting now; to be asked again and again.

        Args:
            good: sites with an answer of the kind that was hoped for.
            at_work: sites that are online, were asked and have not answered; before a run begins also those where a
                person is yet to approve it.
            others: sites that are offline, paused or, in a round, not approved yet: an answer may still come.
        """
        if not at_work and good + others < self.spec.min_sites:
            return True
        enough = self.spec.enough_sites or len(self.spec.active)
        if not (good >= enough or (good >= self.spec.min_sites and not at_work)):
            self._since = None
            return False
        if self._since is None:
            self._since = self.clock()
        return self.clock() - self._since >= self.spec.grace_s


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReplies:
    """A round's replies, sorted out.

    Attributes:
        updates: site -> adapter, in the order of the sites, so that a sum over them always rounds alike.
        scores: site -> noised statistics of its held-out units, where the plan releases them.
        failures: site -> reason, for every asked site without a usable update.
        refusals: the failures that are refusals under their site's signature, with what was asked and what is allowed.
    """

    updates: dict[str, Adapter] = field(default_factory=dict)
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)


def sort_replies(
    replies: Mapping[str, Reply], *, proposal: Proposal, round: int, sent: Adapter, reaches: Mapping[str, Reach]
) -> RoundReplies:
    """Keep the updates that their sites signed and that training can have made of the adapter that was sent.

    Args:
        replies: site -> its answer.
        proposal: of the run.
        round: of the run.
        sent: the adapter that each site was sent.
        reaches: asked site -> how far its training may take the adapter, in the sites' order.

    Returns:
        Beside the updates, why every other asked site has none.  A site gives a stranger no receipt, and none of a
        ledger that it cannot read: such a refusal's reason is shown, and it counts as no answer.
    """
    found = RoundReplies()
    num_scores = METRICS[proposal.plan.metrics].num_values * proposal.plan.num_groups
    for site, reach in reaches.items():
        reply, asked = replies.get(site), (site, proposal.run, round)
        if reply is None:
            found.failures[site] = NO_REPLY
        elif isinstance(reply.body, Refusal):
            own = reply.is_signed() and reply.about == asked
            found.failures[site] = reply.body.reason.value if own or not reply.receipt else UNSIGNED_REPLY
            if own:
                found.refusals[site] = reply.body
        elif not reply.is_signed():
            found.failures[site] = UNSIGNED_REPLY
        elif reply.about != asked or not fits(reply.body, sent) or not _are_statistics(reply.body.scores, num_scores):
            found.failures[site] = INVALID_UPDATE
        elif not reach.includes(reply.body.tensors, sent=sent):
            found.failures[site] = BEYOND_PLAN
        else:
            found.updates[site] = Adapter(reply.body.tensors)
            if reply.body.scores is not None:
                found.scores[site] = reply.body.scores
    return found


def _are_statistics(scores: tuple[float, ...] | None, num_scores: int) -> bool:
    """Whether these are the plan's statistics, of a size with which one can reckon: shares of a declared number."""
    return len(scores or ()) == num_scores and all(abs(value) <= _MOST_SHARE for value in scores or ())


def fits(body: Answer, sent: Adapter) -> TypeGuard[Update]:
    """Whether this is an update with the sent adapter's names, order, shapes and type, and finite values."""
    if not isinstance(body, Update) or list(body.tensors) != list(sent.tensors):
        return False
    return all(
        value.shape == sent.tensors[name].shape and value.dtype == np.float32 and bool(np.isfinite(value).all())
        for name, value in body.tensors.items()
    )

"""A round's answers at the lead: when it stops waiting for them, and which of them may be averaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np

from fedtune.federation.protocol import Reply
from fedtune.federation.spec import FederationSpec
from fedtune.model import Adapter
from fedtune.privacy.release import Offer, Refusal, Update
from fedtune.training.optimizer import Reach

INVALID_UPDATE = "invalid_update"
NO_REPLY = "no_reply"
UNSIGNED_REPLY = "unsigned_reply"
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
        scores: site -> noised score and count of its held-out units, where the plan releases them.
        failures: site -> reason, for every asked site without a usable update.
        refusals: the failures that are refusals under their site's signature, with what was asked and what is allowed.
    """

    updates: dict[str, Adapter]
    scores: dict[str, tuple[float, float]]
    failures: dict[str, str]
    refusals: dict[str, Refusal]


def sort_replies(
    replies: Mapping[str, Reply],
    *,
    run: str,
    round: int,
    sent: Adapter,
    reaches: Mapping[str, Reach],
    scored: bool,
) -> RoundReplies:
    """Keep the updates that their sites signed and that training can have made of the adapter that was sent.

    Args:
        replies: site -> its answer.
        run: the run's name at its sites.
        round: of the run.
        sent: the adapter that each site was sent.
        reaches: asked site -> how far its training may take the adapter, in the sites' order.
        scored: whether the plan releases scores beside an update.

    Returns:
        Beside the updates, why every other asked site has none.  A site gives a stranger no receipt, and none of a
        ledger that it cannot read: such a refusal's reason is shown, and it counts as no answer.
    """
    updates: dict[str, Adapter] = {}
    scores: dict[str, tuple[float, float]] = {}
    failures: dict[str, str] = {}
    refusals: dict[str, Refusal] = {}
    for site, reach in reaches.items():
        reply = replies.get(site)
        if reply is None:
            failures[site] = NO_REPLY
        elif not reply.is_signed() and (reply.receipt or isinstance(reply.body, Update)):
            failures[site] = UNSIGNED_REPLY
        elif isinstance(reply.body, Refusal):
            about = (reply.body.site, reply.body.run, reply.body.round)
            if not reply.receipt:
                failures[site] = reply.body.reason.value
            elif about != (site, run, round):
                failures[site] = UNSIGNED_REPLY  # what was signed is the answer to something else
            else:
                failures[site] = reply.body.reason.value
                refusals[site] = reply.body
        elif (
            (reply.body.run, reply.body.site) != (run, site)
            or not fits(reply.body, sent, round=round)
            or (reply.body.scores is not None) is not scored
        ):
            failures[site] = INVALID_UPDATE
        elif not reach.includes(reply.body.tensors, sent=sent):
            failures[site] = BEYOND_PLAN
        else:
            updates[site] = Adapter(reply.body.tensors)
            if reply.body.scores is not None:
                scores[site] = reply.body.scores
    return RoundReplies(updates=updates, scores=scores, failures=failures, refusals=refusals)


def fits(body: Update | Offer, sent: Adapter, *, round: int) -> TypeGuard[Update]:
    """Whether this is the round's update: the sent adapter's names, order, shapes and type, and finite values."""
    if not isinstance(body, Update) or body.round != round or list(body.tensors) != list(sent.tensors):
        return False
    return all(
        value.shape == sent.tensors[name].shape and value.dtype == np.float32 and bool(np.isfinite(value).all())
        for name, value in body.tensors.items()
    )

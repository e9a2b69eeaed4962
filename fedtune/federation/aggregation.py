"""From replies to updates that may be averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedtune.federation.protocol import Reply
from fedtune.model import Adapter
from fedtune.privacy.release import Refusal, Update

INVALID_UPDATE = "invalid_update"
NO_REPLY = "no_reply"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReplies:
    """A round's replies, sorted out.

    Attributes:
        updates: site -> adapter, in the order of the sites, so that a sum over them always rounds alike.
        scores: site -> noised score and count of its held-out units, where the plan releases them.
        failures: site -> reason, for every asked site without a usable update.
        refusals: the failures that are refusals, with what was asked and what is allowed.
    """

    updates: dict[str, Adapter]
    scores: dict[str, tuple[float, float]]
    failures: dict[str, str]
    refusals: dict[str, Refusal]


def sort_replies(
    replies: Mapping[str, Reply], *, asked: Iterable[str], run: str, round: int, sent: Adapter
) -> RoundReplies:
    """Keep the updates that fit the adapter that was sent; say for every other asked site why it has none."""
    updates: dict[str, Adapter] = {}
    scores: dict[str, tuple[float, float]] = {}
    failures: dict[str, str] = {}
    refusals: dict[str, Refusal] = {}
    for site in asked:
        reply = replies.get(site)
        if reply is None:
            failures[site] = NO_REPLY
        elif isinstance(reply.body, Refusal):
            failures[site] = reply.body.reason.value
            refusals[site] = reply.body
        elif (reply.body.run, reply.body.round, reply.body.site) != (run, round, site) or not fits(reply.body, sent):
            failures[site] = INVALID_UPDATE
        else:
            updates[site] = Adapter(reply.body.tensors)
            if reply.body.scores is not None:
                scores[site] = reply.body.scores
    return RoundReplies(updates=updates, scores=scores, failures=failures, refusals=refusals)


def fits(update: Update, sent: Adapter) -> bool:
    """Whether an update has exactly the sent adapter's names, order, shapes and type, and only finite values."""
    return list(update.tensors) == list(sent.tensors) and all(
        value.shape == sent.tensors[name].shape and value.dtype == np.float32 and bool(np.isfinite(value).all())
        for name, value in update.tensors.items()
    )

"""One round at a site: check, reserve, train, commit, reply.  The site disposes; nothing here trusts the server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedtune.federation.protocol import Reply, RoundRequest
from fedtune.model import Adapter
from fedtune.privacy.ledger import Ledger
from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Reason, Refusal, Refused, Update

log = logging.getLogger(__name__)

LARGEST_VALUE = 50.0
"""No value of an adapter that a site trains from is larger.  Rounding grows with the adapter, and one record can move
the others' terms by rounding (docs/threat_model.md); trained adapters stay far below this."""

Train = Callable[[RoundRequest, Adapter, int], Adapter]
"""Trains the adapter for the request's round and the given attempt; the only step that reads records."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site as a round sees it.

    Attributes:
        run: the run it takes part in.
        plan: what the site itself makes of the run's configuration; a request for another is refused.
        ledger: its own record of what was charged.
        train: reads the records.
    """

    name: str
    run: str
    plan: Plan
    ledger: Ledger
    train: Train


def answer(site: Site, request: RoundRequest, adapter: Adapter) -> Reply:
    """Answer a request with an update, or with a reason from the closed list.

    Guarantee: records are trained on only after the ledger has durably charged the round, and no text of an exception
    leaves: an unforeseen failure is `site_error`, and its details stay in the site's log.
    """
    body: Update | Refusal
    try:
        body = Update.from_bytes(_update(site, request, adapter))
    except Refused as refused:
        log.warning("%s refused round %d: %s", site.name, request.round, refused)
        body = _refusal(site, request, refused.reason, asked=refused.asked, allowed=refused.allowed)
    except Exception:
        log.exception("%s failed in round %d", site.name, request.round)
        body = _refusal(site, request, Reason.SITE_ERROR)
    return Reply(body=body, receipt=site.ledger.receipt(site.run))


def _update(site: Site, request: RoundRequest, adapter: Adapter) -> bytes:
    if request.site != site.name:
        raise Refused(Reason.WRONG_SITE, asked=request.site, allowed=site.name)
    if request.run != site.run:
        raise Refused(Reason.WRONG_RUN, asked=request.run, allowed=site.run)
    if request.plan != site.plan:
        raise Refused(Reason.PLAN_CHANGED, asked=request.plan.digest(), allowed=site.plan.digest())
    if adapter.digest() != request.adapter_digest:
        raise Refused(Reason.ADAPTER_DIFFERS, asked=request.adapter_digest, allowed=adapter.digest())
    if not all(bool((np.abs(value) <= LARGEST_VALUE).all()) for value in adapter.tensors.values()):
        raise Refused(Reason.ADAPTER_OUT_OF_RANGE, allowed=LARGEST_VALUE)
    sequence = site.ledger.receipt(site.run).sequence
    if sequence < request.receipt_sequence:
        raise Refused(Reason.LEDGER_BEHIND_RECEIPT, asked=request.receipt_sequence, allowed=sequence)
    granted = site.ledger.reserve(run=request.run, round=request.round, request=request.digest(), plan=request.plan)
    if isinstance(granted, bytes):
        return granted
    trained = site.train(request, adapter, granted.attempt)
    reply = Update(site=site.name, run=request.run, round=request.round, tensors=trained.tensors).to_bytes()
    site.ledger.commit(granted, reply)
    return reply


def _refusal(
    site: Site, request: RoundRequest, reason: Reason, *, asked: str | None = None, allowed: str | None = None
) -> Refusal:
    return Refusal(site=site.name, run=site.run, round=request.round, reason=reason, asked=asked, allowed=allowed)

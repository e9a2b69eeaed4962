"""The lead's main loop: invite the sites, train and aggregate in each round, and announce the end of the run.

An invitation charges nothing: each site offers to take part, or refuses with a reason.  Every round ends with a
checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from fedtune.federation.early_stopping import select_round, should_stop
from fedtune.federation.invitation import invite
from fedtune.federation.lead import Aggregation, AggregationResult, Lead, LeadState, RoundResult, Scores, merge_receipts
from fedtune.federation.protocol import EndOfRun, RoundRequest
from fedtune.federation.replies import RoundReplies
from fedtune.federation.secure_rounds import SecureAggregator
from fedtune.federation.sent_round import pack_adapter
from fedtune.federation.transport import Question, Transport
from fedtune.federation.update_store import UpdateStore
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.release import Reason, Update
from fedtune.privacy.run_plan import Plan
from fedtune.spec import RefusedError, RunError, StuckError
from fedtune.training.algorithms.local_algorithm import RoundOutcome
from fedtune.training.local import list_frozen_tensors
from fedtune.training.optimizer import compute_round_factors
from fedtune.training.spec import TrainingSpec
from fedtune.training.update_bound import bound_round_update

log = logging.getLogger(__name__)

_END_TIMEOUT_S = 60.0


def run_rounds(transport: Transport, lead: Lead, state: LeadState) -> LeadState:
    """Run the remaining rounds of a run and return its final state.

    Raises:
        RunError: fewer than `min_sites` sites accepted the invitation or sent an update; the run can be resumed from
            the previous checkpoint.
        RefusedError: too many sites refuse or have exhausted their plan for any round to succeed.
        StuckError: two consecutive rounds diverged; a resumed run would diverge again.
    """
    there = transport.wait_for_sites(lead.declared_sizes, timeout_s=lead.asked.federation.round_timeout_s)
    if missing := sorted(set(lead.declared_sizes) - set(there)):
        raise RunError(f"the run did not start, because these sites did not answer: {', '.join(missing)}")
    if state.round == 0:
        # Invite first, so that no site is charged for a run that other sites refuse.
        answers, rounds = invite(transport, lead.asked), lead.plan.num_rounds
        answers.require_enough(lead.asked.federation, takes_part=lambda offer: offer.max_rounds >= rounds)
    aggregation = lead.average if lead.plan.shared is None else SecureAggregator(transport, lead, state)
    state = aggregation.resume(state)
    transport.take_traffic()  # reset the counter: invitations belong to no round
    try:
        while not should_stop(state.rounds, lead.asked.federation, primary_metric=lead.primary_metric):
            state = _run_round(transport, lead, state, aggregation)
            lead.checkpoints.save(state)
            lead.finished(state)
    except (RefusedError, StuckError):
        # No further round can succeed, so let the sites release their reservations.
        lead.checkpoints.save(_announce_end(transport, lead, state, adapter=None))
        raise
    trained = any(result.sites for result in state.rounds)
    state = _announce_end(transport, lead, state, adapter=state.kept_adapter if trained else None)
    lead.checkpoints.save(state)
    if not trained:
        raise RunError(f"no round of run {lead.run} produced an update; nothing was trained")
    return state


def _run_round(transport: Transport, lead: Lead, state: LeadState, aggregation: Aggregation) -> LeadState:
    """Run the next round and return the state after it."""
    round, started = state.round + 1, time.monotonic()
    sites = list(aggregation.prepare())
    lead.checkpoints.record_request(round, sites)
    state = state.with_requests_to(sites)
    algorithm, tensors = lead.asked.federation.bound_algorithm, state.adapter.tensors
    kept = state.algorithm or algorithm.initial_arrays(tensors)
    arrays = algorithm.select_sent_arrays(kept)
    packed = pack_adapter(state.adapter, arrays)
    questions = _build_requests(lead, state, sent=packed, session=aggregation.session, sites=sites)
    frozen = list_frozen_tensors(lead.lora, algorithm, tensors, round=round, sent=arrays)
    reaches = {
        site: bound_round_update(
            lead.training,
            lead.plan,
            round=round,
            declared_size=size,
            sent=Adapter(cut_to_rank(tensors, lead.asked.proposal.find_rank(site))),
            frozen=frozen,
            algorithm=algorithm,
            arrays=arrays,
        )
        for site, size in lead.declared_sizes.items()
    }
    with UpdateStore(lead.checkpoints.updates_folder, state.adapter) as arrived:
        replies = RoundReplies(
            proposal=lead.asked.proposal,
            round=round,
            sent=state.adapter,
            reaches=reaches,
            arrived=arrived,
            update_dtype=lead.asked.federation.update_dtype,
            left_out=aggregation.left_out,
        )
        for site, reply in transport.train(questions, timeout_s=lead.asked.federation.round_timeout_s):
            receipt, update = lead.asked.drop_foreign_receipt(site, reply).receipt, isinstance(reply.body, Update)
            if receipt and (receipt.site, receipt.run) != (site, lead.run):
                receipt = None
            # A server may attach the receipt of another answer, which does not prove the charge of this round.
            genuine = receipt if reply.is_signed() and reply.about == (site, lead.run, round) else None
            after = state.with_receipt(site, genuine, run=lead.run, plan=lead.plan, update=update)
            # An update without its receipt does not count: the lead could not derive the site's epsilon.
            replies.add_reply(site, replace(reply, receipt=receipt if after or not genuine else None))
            state = after or state
        if any(result.sites for result in state.rounds) and _is_plan_spent(replies, lead):
            # End the run with the previous rounds, because a resumed run would be refused again.
            combined = AggregationResult(state.adapter, (), replies.failures, state.strategy)
        else:
            _require_enough_updates(replies, lead, round)
            combined = aggregation.combine(state, replies)
            if lead.asked.proposal.ranks and lead.lora.trains_both_factors:
                weights = {site: lead.declared_sizes[site] for site in combined.sites}
                combined = replace(combined, adapter=arrived.average_products(combined.adapter, weights))
    bytes_down, bytes_up = transport.take_traffic()
    metrics: Scores = lead.evaluate(adapter := combined.adapter)
    if diverged := not _is_finite(adapter, metrics):
        adapter, metrics = _roll_back(lead, state, aggregation, metrics)
    elif combined.sites and lead.plan.shared is None:
        outcome = describe_outcome(
            adapter,
            sent=state.adapter,
            sites=combined.sites,
            sizes=lead.declared_sizes,
            training=lead.training,
            plan=lead.plan,
            round=round,
            frozen=frozen,
        )
        kept = algorithm.compute_next_arrays(kept, outcome)
    result = RoundResult(
        round=round,
        seconds=time.monotonic() - started,
        sites=combined.sites,
        failed_sites=combined.failures,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
        metrics=metrics,
        site_scores=replies.scores,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        diverged=diverged,
    )
    rounds = (*state.rounds, result)
    best = select_round(rounds, lead.asked.federation, primary_metric=lead.primary_metric)
    return replace(
        state,
        round=round,
        adapter=adapter,
        best=None if best is None or best.round == round else state.kept_adapter,
        algorithm=kept,
        strategy=state.strategy if diverged else combined.strategy,
        rounds=rounds,
        seconds=lead.elapsed(),
    )


def describe_outcome(
    average: Adapter,
    *,
    sent: Adapter,
    sites: Sequence[str],
    sizes: Mapping[str, int],
    training: TrainingSpec,
    plan: Plan,
    round: int,
    frozen: frozenset[str],
) -> RoundOutcome:
    """Build the summary of a round that the federated algorithm uses at the lead; it contains only public numbers.

    Args:
        average: the aggregated adapter.
        sent: the adapter that was sent to the sites.
        sites: the sites with an update.
        sizes: site -> its declared size, for all sites.
        training: the training settings of the sites.
        plan: the plan of the run.
        round: the number of the round.
        frozen: the names of the tensors that are frozen in this round.
    """
    factors, total = compute_round_factors(training, plan, round=round), sum(sizes[site] for site in sites)
    lora, head = training.compute_peak_rates(clipped=plan.private)
    step_sizes = {
        name: (head if name.startswith("head.") else lora) * sum(factors) for name in sent.tensors if name not in frozen
    }
    # Standard deviation of a site's noise in one coordinate of a step, times its declared size.  The weight of the site
    # is its size over the total, and the noise of the steps is weighted by their learning rates.
    of_step = plan.noise_multiplier * plan.max_grad_norm / plan.sampling_rate
    noise = of_step * math.sqrt(len(sites)) / total * math.hypot(*factors) / (sum(factors) or 1.0)
    return RoundOutcome(
        adapter=sent.tensors,
        average=average.tensors,
        step_sizes={name: size for name, size in step_sizes.items() if size > 0},
        share=total / sum(sizes.values()),
        noise=noise,
    )


def _is_finite(adapter: Adapter, metrics: Scores) -> bool:
    values = all(bool(np.isfinite(tensor).all()) for tensor in adapter.tensors.values())
    return values and all(score is not None and math.isfinite(score) for score in metrics.values())


def _roll_back(lead: Lead, state: LeadState, aggregation: Aggregation, scores: Scores) -> tuple[Adapter, Scores]:
    """Roll back a diverged round: restore the server optimizer, and return the previous adapter with its scores.

    Raises:
        StuckError: the previous round diverged as well.
    """
    shown = ", ".join(f"{name} {score:g}" for name, score in scores.items())
    text = f"round {state.round + 1} diverged ({shown or 'the average contains non-finite values'})"
    if state.rounds and state.rounds[-1].diverged:
        rates = lead.training.suggest_lower_rates(clipped=lead.plan.private)
        lower = " ".join(f"training.{key}={rate:g}" for key, rate in rates.items())
        raise StuckError(
            f"{text}, like the previous round; the checkpoint of round {state.round} has the last good adapter.  "
            "The learning rates are too high, and a resumed run would diverge again. The cost stays charged; "
            f"start a new run with {lower}"
        )
    log.error("%s; restoring the adapter of the previous round", text)
    aggregation.restore(state.strategy)
    return state.adapter, state.rounds[-1].metrics if state.rounds else lead.evaluate(state.adapter)


def _build_requests(
    lead: Lead, state: LeadState, *, sent: Adapter, session: str, sites: Sequence[str]
) -> list[Question]:
    receipts, digest = merge_receipts(lead.earlier_receipts, state.receipts), sent.digest()
    expires, questions = time.time() + lead.asked.federation.round_timeout_s, []
    for site in sites:
        request = RoundRequest(
            proposal=lead.asked.proposal,
            round=state.round + 1,
            site=site,
            adapter_digest=digest,
            session=session,
            receipt=receipts.get(site),
            expires=expires,
        )
        signed = request.sign_with(lead.asked.key)
        questions.append(Question(site=site, signed=signed, adapter=sent, settings=lead.asked.settings))
    return questions


def _is_plan_spent(replies: RoundReplies, lead: Lead) -> bool:
    """Return True if too many sites have exhausted the run's plan for another round to succeed."""
    spent = sum(refusal.reason is Reason.PLAN_EXHAUSTED for refusal in replies.refusals.values())
    return len(lead.declared_sizes) - spent < lead.asked.federation.required_sites


def _require_enough_updates(replies: RoundReplies, lead: Lead, round: int) -> None:
    least = lead.asked.federation.required_sites
    if len(replies.sites) >= least:
        return
    refusals = {site: refusal.as_text for site, refusal in replies.refusals.items()}
    others = {site: refusals.get(site, reason) for site, reason in replies.failures.items()}
    too_few = lead.asked.federation.explain_too_few(len(replies.sites), "sent an update", others=others)
    final = [site for site, refusal in replies.refusals.items() if refusal.reason.is_final]
    if len(lead.declared_sizes) - len(final) < least:
        hint = "; interrupted rounds are charged: set federation.spare_rounds" if _is_plan_spent(replies, lead) else ""
        raise RefusedError(f"round {round}: refused by a policy or budget; {too_few}{hint}")
    raise RunError(f"round {round}: {too_few}; resume from the checkpoint of round {round - 1}")


def _announce_end(transport: Transport, lead: Lead, state: LeadState, *, adapter: Adapter | None) -> LeadState:
    """Announce the end of the run to every site, and add the receipts in their answers to the state.

    A site that misses the notice releases its reservation when the run expires.
    """
    final = adapter if lead.gives_adapter else None
    notice = EndOfRun(run=lead.run, lead=lead.asked.key.public, adapter_digest=final.digest() if final else "")
    signed = notice.sign_with(lead.asked.key)
    questions = [Question(site=site, signed=signed, adapter=final) for site in lead.asked.federation.active]
    timeout_s = min(lead.asked.federation.round_timeout_s, _END_TIMEOUT_S)
    for site, receipt in transport.end(questions, timeout_s=timeout_s):
        genuine = receipt and receipt.site_key == lead.asked.site_keys.get(site, receipt.site_key)
        # A site that ended the run earlier, for example by a denial, has recorded no final adapter.
        if receipt and genuine and receipt.reply in ("", notice.adapter_digest):
            state = state.with_receipt(site, receipt, run=lead.run, plan=lead.plan) or state
    return state

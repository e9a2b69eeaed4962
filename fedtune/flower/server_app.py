"""The lead's end of a run: asks who takes part, drives Flower's strategy round by round, and tells the end.

Before round 1 nobody pays: each site says whether it would take part, or why not.  Every round ends in a checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.federation.arrived import Arrived
from fedtune.federation.kept_round import is_over, kept_of
from fedtune.federation.lead import LeadState, RoundResult, Scores, newest_of
from fedtune.federation.protocol import EndOfRun, RoundRequest
from fedtune.federation.replies import RoundReplies
from fedtune.flower import flower_records
from fedtune.flower.invitation import Lead, invite, readable
from fedtune.flower.secure_rounds import Made, SecureRounds, past_asked, secure_rounds, summed
from fedtune.flower.strategy import aggregated, restore_strategy, strategy_state
from fedtune.flower.streaming_grid import receive
from fedtune.model import Adapter
from fedtune.privacy.release import Reason, Receipt
from fedtune.spec import ConfigError, RefusedError, RunError, StuckError
from fedtune.training.reach import Reach, reach

log = logging.getLogger(__name__)

_END_TIMEOUT_S = 60.0


def run_rounds(grid: Grid, lead: Lead, state: LeadState) -> LeadState:
    """Run the rounds that `state` has not seen yet.

    Raises:
        RunError: fewer than `min_sites` sites would take part, or sent an update in a round; the checkpoint before it
            can be resumed.
        RefusedError: too many sites refuse, or have used up their plan, for any round to succeed.
    """
    lead = replace(lead, nodes=lead.nodes or _introductions(grid, lead))
    if state.round == 0:
        # So that no site is charged for a run that the others' policies end.
        answers, rounds = invite(grid, lead), lead.plan.num_rounds
        answers.require_enough(lead.federation, takes_part=lambda offer: offer.most_rounds >= rounds)
    sums = secure_rounds(grid, lead, state)
    if sums is not None:
        state = past_asked(lead, state, left_out=sums.left_out)
    try:
        while not is_over(state.rounds, lead.federation, judged_by=lead.judged_by):
            state = _run_round(grid, lead, state, sums)
            lead.checkpoints.save(state)
            lead.finished(state)
    except RefusedError:
        # No round can succeed any more: the sites that accepted need not hold budget for it.
        _tell_the_end(grid, lead, adapter=None)
        raise
    if not any(one.sites for one in state.rounds):
        raise RunError(f"no round of {lead.run} had a result; nothing was trained")
    receipts = _tell_the_end(grid, lead, adapter=state.kept)
    state = state.heard(receipts, run=lead.run, most_rounds=lead.plan.most_rounds)
    lead.checkpoints.save(state)
    return state


def _run_round(grid: Grid, lead: Lead, state: LeadState, sums: SecureRounds | None) -> LeadState:
    """The state after one more round."""
    round, started = state.round + 1, time.monotonic()
    sites = list(lead.declared_sizes if sums is None else sums.ready())
    lead.checkpoints.ask(round, sites)
    state = state.asked(sites)
    messages = _requests(grid, lead, state, session="" if sums is None else sums.session, sites=sites)
    bytes_down = sum(flower_records.num_bytes(message.content) for message in messages)
    with Arrived(lead.checkpoints.arrived, state.adapter) as arrived:
        replies = RoundReplies(
            proposal=lead.proposal,
            round=round,
            sent=state.adapter,
            reaches=_reaches(lead, round, state.adapter),
            arrived=arrived,
            left_out=() if sums is None else sums.left_out,
        )
        state, envelopes, bytes_up = _collected(grid, lead, state, messages, into=replies)
        made = _averaged(lead, replies, envelopes) if sums is None else summed(sums, lead, state, replies)
    metrics: Scores = lead.evaluate(adapter := made.adapter)
    if diverged := not _is_sound(adapter, metrics):
        adapter, metrics = _back(lead, state, round, metrics)
    result = RoundResult(
        round=round,
        seconds=time.monotonic() - started,
        sites=made.sites,
        failed_sites=made.failures,
        bytes_down=bytes_down + made.bytes_down,
        bytes_up=bytes_up + made.bytes_up,
        metrics=metrics,
        site_scores=replies.scores,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        diverged=diverged,
    )
    rounds = (*state.rounds, result)
    kept = kept_of(rounds, lead.federation, judged_by=lead.judged_by)
    return replace(
        state,
        round=round,
        adapter=adapter,
        best=None if kept is None or kept.round == round else state.kept,
        strategy=state.strategy if diverged else made.strategy,
        rounds=rounds,
        seconds=lead.elapsed(),
    )


def _collected(
    grid: Grid, lead: Lead, state: LeadState, messages: Sequence[Message], *, into: RoundReplies
) -> tuple[LeadState, dict[str, Message], int]:
    """The state with what sites answered to these messages, the answers without their arrays, and their bytes.

    Raises:
        RunError, RefusedError: too few sent an update.
    """
    most_rounds, envelopes, num_bytes = lead.plan.most_rounds, dict[str, Message](), 0
    received = receive(grid, messages, timeout=lead.federation.round_timeout_s)
    for site, reply, message in readable(received, lead):
        num_bytes += flower_records.num_bytes(message.content)
        believed = state.believed({site: reply}, run=lead.run, most_rounds=most_rounds)
        state = state.answered(believed, run=lead.run, most_rounds=most_rounds)
        into.take(site, believed[site])
        flower_records.drop_arrays(message.content)  # what it brought is on disk
        envelopes[site] = message
    _require_enough(into, lead, into.round)
    return state, envelopes, num_bytes


def _reaches(lead: Lead, round: int, sent: Adapter) -> dict[str, Reach]:
    rests = lead.lora.rests_in(round)
    return {
        site: reach(lead.training, lead.plan, round=round, declared_size=size, sent=sent, rests=rests)
        for site, size in lead.declared_sizes.items()
    }


def _averaged(lead: Lead, replies: RoundReplies, envelopes: Mapping[str, Message]) -> Made:
    weights = {site: lead.declared_sizes[site] for site in replies.sites}
    adapter = aggregated(lead.strategy, replies.round, replies.arrived, weights=weights, envelopes=envelopes)
    return Made(adapter, replies.sites, replies.failures, strategy_state(lead.strategy))


def _is_sound(adapter: Adapter, metrics: Scores) -> bool:
    values = all(bool(np.isfinite(tensor).all()) for tensor in adapter.tensors.values())
    return values and all(score is not None and math.isfinite(score) for score in metrics.values())


def _back(lead: Lead, state: LeadState, round: int, found: Scores) -> tuple[Adapter, Scores]:
    """The adapter before a round that diverged, with its scores; the server optimizer goes back, too.

    Raises:
        RunError: the round before diverged as well.
    """
    scores = ", ".join(f"{name} {score:g}" for name, score in found.items())
    text = f"round {round} diverged ({scores or 'the average is not finite'})"
    if state.rounds and state.rounds[-1].diverged:
        rates = lead.training.lower_rates(clipped=lead.plan.private)
        lower = " ".join(f"training.{key}={rate:g}" for key, rate in rates.items())
        raise StuckError(
            f"{text}, as the round before did; the checkpoint of round {round - 1} holds the last good adapter.  "
            "The learning rates are too high, and resuming would diverge again: what was charged stays charged; "
            f"start a new run with {lower}"
        )
    log.error("%s; going back to the adapter that it began with", text)
    restore_strategy(lead.strategy, state.strategy)
    return state.adapter, state.rounds[-1].metrics if state.rounds else lead.evaluate(state.adapter)


def _requests(grid: Grid, lead: Lead, state: LeadState, *, session: str, sites: Sequence[str]) -> list[Message]:
    """One message for each of these sites, in order; the strategy says which nodes are asked."""
    round, adapter, digest = state.round + 1, flower_records.from_adapter(state.adapter), state.adapter.digest()
    arrays = flower_records.to_arrays(state.adapter.tensors)
    messages = {
        lead.nodes[message.metadata.dst_node_id]: message
        for message in lead.strategy.configure_train(round, arrays, ConfigRecord(), grid)
    }
    receipts = newest_of(lead.earlier_receipts, state.receipts)
    for site, message in messages.items():
        request = RoundRequest(
            proposal=lead.proposal,
            round=round,
            site=site,
            adapter_digest=digest,
            session=session,
            receipt=receipts.get(site),
            expires=time.time() + lead.federation.round_timeout_s,
        )
        message.content = flower_records.from_signed(request.signed(lead.key), adapter=adapter, settings=lead.settings)
    return [messages[site] for site in sites if site in messages]


def _require_enough(replies: RoundReplies, lead: Lead, round: int) -> None:
    least = lead.federation.least_sites
    if len(replies.sites) >= least:
        return
    refusals = {site: refusal.in_words for site, refusal in replies.refusals.items()}
    others = {site: refusals.get(site, reason) for site, reason in replies.failures.items()}
    too_few = lead.federation.too_few(len(replies.sites), "sent an update", others=others)
    final = [site for site, refusal in replies.refusals.items() if refusal.reason.is_final]
    if len(lead.declared_sizes) - len(final) < least:
        exhausted = any(refusal.reason is Reason.PLAN_EXHAUSTED for refusal in replies.refusals.values())
        hint = "; interrupted rounds count, plan with federation.spare_rounds" if exhausted else ""
        raise RefusedError(f"round {round}: refused by policy or budget; {too_few}{hint}")
    raise RunError(f"round {round}: {too_few}; the checkpoint of round {round - 1} can be resumed")


def _tell_the_end(grid: Grid, lead: Lead, *, adapter: Adapter | None) -> dict[str, Receipt]:
    """Let every site know that the run is over; who does not hear it waits until the run expires.

    Returns:
        Each site's last receipt, as far as it answered.
    """
    given = adapter if lead.gives_adapter else None
    notice = EndOfRun(run=lead.run, lead=lead.key.public, adapter_digest=given.digest() if given else "")
    adapter_record = None if given is None else flower_records.from_adapter(given)
    content = flower_records.from_signed(notice.signed(lead.key), adapter=adapter_record)
    messages = [Message(content, node_id, f"query.{flower_records.END}") for node_id in lead.nodes]
    receipts = {}
    for message in receive(grid, messages, timeout=min(lead.federation.round_timeout_s, _END_TIMEOUT_S)):
        site = lead.nodes.get(message.metadata.src_node_id)
        if site is None or message.has_error():
            continue
        try:
            receipt = flower_records.to_receipt(message.content)
        except ConfigError as error:
            log.warning("%s answered the end of the run unreadably: %s", site, error)
            continue
        if receipt and receipt.site_key == lead.site_keys.get(site, receipt.site_key):
            receipts[site] = receipt
    return receipts


def _introductions(grid: Grid, lead: Lead) -> dict[int, str]:
    """Node id -> site name, as each node gives it."""
    node_ids = list(grid.get_node_ids())
    deadline = time.monotonic() + lead.federation.round_timeout_s
    while len(node_ids) < len(lead.declared_sizes) and time.monotonic() < deadline:
        time.sleep(0.2)
        node_ids = list(grid.get_node_ids())
    questions = [Message(RecordDict(), node_id, "query") for node_id in sorted(node_ids)]
    nodes = {}
    for message in receive(grid, questions, timeout=lead.federation.round_timeout_s):
        if not message.has_error():
            nodes[message.metadata.src_node_id] = str(message.content.config_records[flower_records.SITE]["name"])
    missing = sorted(set(lead.declared_sizes) - set(nodes.values()))
    if missing:
        raise RunError(f"sites that did not introduce themselves: {', '.join(missing)}")
    return nodes

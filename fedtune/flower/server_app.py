"""The lead's end of a run: asks who takes part, drives Flower's strategy round by round, and tells the end.

Before round 1 nobody pays: each site says whether it would take part, or why not.  Every round ends in a checkpoint.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedtune.federation.arrived import Arrived
from fedtune.federation.kept_round import is_over, kept_of
from fedtune.federation.lead import Checkpoints, LeadState, RoundResult, Scores, newest_of
from fedtune.federation.protocol import PROTOCOL, Brought, EndOfRun, Invitation, Reply, RoundRequest
from fedtune.federation.replies import NO_REPLY, UNSIGNED_REPLY, RoundReplies
from fedtune.federation.spec import FederationSpec
from fedtune.flower import flower_records
from fedtune.flower.secure_rounds import Made, SecureRounds, past_asked, secure_rounds, summed
from fedtune.flower.strategy import aggregated, restore_strategy, strategy_state
from fedtune.flower.streaming_grid import receive
from fedtune.model import Adapter
from fedtune.privacy.few_bits import Difference
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Receipt, Refusal
from fedtune.privacy.run_plan import Plan
from fedtune.spec import ConfigError, RefusedError, RunError, StuckError
from fedtune.training.optimizer import reach
from fedtune.training.spec import TrainingSpec

log = logging.getLogger(__name__)

_END_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Invited:
    """Who is asked about what.

    Attributes:
        proposal: what every site is asked to take part in.
        key: the lead's, which signs each question and request.
        settings: JSON of the run's configuration, for sites that do not have it; or empty.
        nodes: node id -> site, where that is known; empty: each node is asked for its name before a run begins.
        site_keys: site -> the public key under which it signs, where that is known beforehand.
    """

    proposal: Proposal
    key: SigningKey
    federation: FederationSpec
    settings: str = ""
    nodes: Mapping[int, str] = field(default_factory=dict)
    site_keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the sites said to an invitation.

    Attributes:
        offers: of the sites that would take part, in all of it or in less.
        refusals: of those that would not, or not before a person there has decided.
        silent: site -> why it counts as silent.
    """

    offers: Mapping[str, Offer]
    refusals: Mapping[str, Refusal]
    silent: Mapping[str, str]

    def require_enough(self, federation: FederationSpec, *, takes_part: Callable[[Offer], object]) -> None:
        """Check that `min_sites` sites make an offer that `takes_part` accepts.

        Raises:
            RefusedError: policies and budgets leave fewer sites than that.
            RunError: too few have answered so far.
        """
        ready = [site for site, offer in self.offers.items() if takes_part(offer)]
        if len(ready) >= federation.min_sites:
            return
        refused = [site for site, refusal in self.refusals.items() if refusal.reason.is_final]
        refused += [site for site in self.offers if site not in ready]
        error = RefusedError if len(federation.active) - len(refused) < federation.min_sites else RunError
        others = {site: refusal.in_words for site, refusal in self.refusals.items()} | dict(self.silent)
        less = {site: offer for site, offer in self.offers.items() if site not in ready}
        others |= {site: f"has room for {offer.most_rounds} rounds" for site, offer in less.items()}
        too_few = federation.too_few(len(ready), "would take part", others=others)
        raise error(f"{too_few}; nothing was charged for this run")


def invite(grid: Grid, asked: Invited, *, less: bool = False) -> Answers:
    """Ask every site about a run, and sort out what they say; no site is charged.

    Args:
        grid: that reaches them.
        asked: who, about what.
        less: whether a site without room for all of it is to say how much it has room for.
    """
    expires, nonce = time.time() + asked.federation.round_timeout_s, secrets.token_hex(16)
    messages = []
    for node_id, site in asked.nodes.items():
        question = Invitation(proposal=asked.proposal, site=site, expires=expires, nonce=nonce, less=less)
        content = flower_records.from_signed(question.signed(asked.key), settings=asked.settings)
        messages.append(Message(content, node_id, f"query.{flower_records.INVITE}"))
    received = receive(grid, messages, timeout=asked.federation.round_timeout_s)
    replies = {site: reply for site, reply, _ in readable(received, asked)}
    offers: dict[str, Offer] = {}
    refusals: dict[str, Refusal] = {}
    silent: dict[str, str] = {}
    for site in asked.nodes.values():
        if site not in replies:
            silent[site] = NO_REPLY
            continue
        reply = replies[site]
        own = reply.is_signed() and reply.about == (site, asked.proposal.run, 0)
        if own and isinstance(reply.body, Offer) and reply.body.nonce == nonce:
            offers[site] = reply.body
        elif own and isinstance(reply.body, Refusal):
            refusals[site] = reply.body
        elif isinstance(reply.body, Refusal) and not reply.receipt:
            silent[site] = _unsigned(reply.body.reason)  # it is shown, and may change
        else:
            silent[site] = UNSIGNED_REPLY
    for site, why in {**{site: body.in_words for site, body in refusals.items()}, **silent}.items():
        log.warning("%s does not take part: %s", site, why)
    return Answers(offers=offers, refusals=refusals, silent=silent)


def _unsigned(reason: Reason) -> str:
    if reason is not Reason.MALFORMED_REQUEST:
        return reason.value
    return f"{reason.value}, so it may run another version of fedtune than this lead, which speaks protocol {PROTOCOL}"


def readable(received: Iterable[Message], asked: Invited) -> Iterator[tuple[str, Reply, Message]]:
    """Each site's readable answer; an unreadable one counts as none, as does a receipt under a foreign key."""
    for message in received:
        site = asked.nodes.get(message.metadata.src_node_id)
        if site is None or message.has_error():
            log.warning("%s: Flower delivered an error in place of a reply", site)
            continue
        try:
            reply = flower_records.to_reply(message.content)
            if reply.receipt and reply.receipt.site_key != asked.site_keys.get(site, reply.receipt.site_key):
                log.warning("%s: its receipt is signed with a key that the roster does not know", site)
                reply = replace(reply, receipt=None)
            if reply.receipt and not reply.receipt.reply:
                log.warning("%s: its receipt signs no reply, as those of fedtune 0.1.0: it has to be updated", site)
        except ConfigError as error:
            log.warning("%s sent an unreadable reply: %s", site, error)
            continue
        yield site, reply, message


@dataclass(frozen=True, kw_only=True)
class Lead(Invited):
    """What the lead brings to a run, beside who is asked about what.

    Attributes:
        training: how each site steps, which bounds how far an update can be from the adapter that was sent.
        declared_sizes: site -> the size it publishes; the weights of the average.
        evaluate: scores an adapter on the lead's own validation data.
        judged_by: of these scores the one that may decide when the run ends, and whose adapter it keeps.
        finished: called with the state after each round.
        earlier_receipts: site -> the newest one of earlier runs, to be sent back until this run has one.
        elapsed: seconds since the run began, interruptions left out.
        gives_adapter: whether the sites receive the final adapter.
    """

    training: TrainingSpec
    declared_sizes: Mapping[str, int]
    strategy: FedAvg
    checkpoints: Checkpoints
    evaluate: Callable[[Adapter], Mapping[str, float]]
    finished: Callable[[LeadState], None]
    elapsed: Callable[[], float]
    earlier_receipts: Mapping[str, Receipt] = field(default_factory=dict)
    gives_adapter: bool = False
    judged_by: str = "loss"

    @property
    def run(self) -> str:
        """The run's name at its sites."""
        return self.proposal.run

    @property
    def plan(self) -> Plan:
        """The run's plan."""
        return self.proposal.plan


def run_rounds(grid: Grid, lead: Lead, state: LeadState) -> LeadState:
    """Run the rounds that `state` has not seen yet.

    Raises:
        RunError: fewer than `min_sites` sites would take part, or sent an update in a round; the checkpoint before it
            can be resumed.
        RefusedError: so many sites refuse, or have used up their plan, that no round can succeed.
    """
    lead = replace(lead, nodes=lead.nodes or _introductions(grid, lead))
    if state.round == 0:
        # So that no site is charged for a run that the others' policies end.
        answers, rounds = invite(grid, lead), lead.plan.num_rounds
        answers.require_enough(lead.federation, takes_part=lambda offer: offer.most_rounds >= rounds)
    sums = secure_rounds(grid, lead, state)
    if sums is not None:
        sums.begin()
        state = past_asked(lead, state)
    if state.round == 0 and lead.federation.bits != 32:
        lead.checkpoints.keep_reference(state.adapter)
    holders: Collection[str] = ()  # a site may have lost it, and this lead been started again for that
    try:
        while not is_over(state.rounds, lead.federation, judged_by=lead.judged_by):
            state = _run_round(grid, lead, state, sums, holders=holders)
            holders = state.rounds[-1].sites
            lead.checkpoints.save(state)
            lead.finished(state)
    except RefusedError:
        # No round can succeed any more: the sites that accepted need not hold budget for it.
        _tell_the_end(grid, lead, adapter=None)
        raise
    receipts = _tell_the_end(grid, lead, adapter=state.kept)
    state = state.heard(receipts, run=lead.run, most_rounds=lead.plan.most_rounds)
    lead.checkpoints.save(state)
    return state


def _run_round(
    grid: Grid, lead: Lead, state: LeadState, sums: SecureRounds | None, *, holders: Collection[str]
) -> LeadState:
    """The state after one more round; `holders` are the sites that keep the run's reference adapter."""
    round, started, sites = state.round + 1, time.monotonic(), list(lead.declared_sizes)
    lead.checkpoints.ask(round, sites)
    state = state.asked(sites)
    brought = _brought(lead, state)
    reference = brought.adapter.digest() if brought.difference is not None and brought.adapter else ""
    sent = brought.made_of(None, digest=reference)
    digests = {"adapter_digest": sent.digest(), "reference_digest": reference}
    messages = _requests(grid, lead, state, brought, digests=digests, holders=holders)
    bytes_down, bytes_up = sum(flower_records.num_bytes(message.content) for message in messages), 0
    most_rounds, envelopes = lead.plan.most_rounds, dict[str, Message]()
    with Arrived(lead.checkpoints.arrived, state.adapter) as arrived:
        replies = RoundReplies(
            proposal=lead.proposal,
            round=round,
            sent=state.adapter,
            travelled=sent,
            reaches={
                site: reach(lead.training, lead.plan, round=round, declared_size=size, sent=sent)
                for site, size in lead.declared_sizes.items()
            },
            arrived=arrived,
            bits=lead.federation.bits,
        )
        received = receive(grid, messages, timeout=lead.federation.round_timeout_s)
        for site, reply, message in readable(received, lead):
            bytes_up += flower_records.num_bytes(message.content)
            believed = state.believed({site: reply}, run=lead.run, most_rounds=most_rounds)
            state = state.answered(believed, run=lead.run, most_rounds=most_rounds)
            replies.take(site, believed[site])
            flower_records.drop_arrays(message.content)  # what it brought is on disk
            envelopes[site] = message
        _require_enough(replies, lead, round)
        if sums is None:
            weights = {site: lead.declared_sizes[site] for site in replies.sites}
            adapter = aggregated(lead.strategy, round, arrived, weights=weights, envelopes=envelopes)
            made = Made(adapter, replies.sites, replies.failures, strategy_state(lead.strategy))
        else:
            made = summed(sums, lead, state, replies)
    adapter = made.adapter
    metrics: Scores = lead.evaluate(adapter)
    if diverged := not _is_sound(adapter, metrics):
        adapter, metrics = _back(lead, state, round, metrics)
    result = RoundResult(
        round=round,
        seconds=time.monotonic() - started,
        sites=made.sites,
        failed_sites=made.failures,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
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


def _brought(lead: Lead, state: LeadState) -> Brought:
    """The adapter that a round begins in, as it travels: each time it is the exact one that is rounded."""
    if lead.federation.bits == 32:
        return Brought(adapter=state.adapter)
    reference, bits = lead.checkpoints.reference(), lead.federation.bits
    difference = Difference.between(reference.tensors, state.adapter.tensors, bits=bits, about=f"{state.round}")
    return Brought(adapter=reference, difference=difference)


def _requests(
    grid: Grid,
    lead: Lead,
    state: LeadState,
    brought: Brought,
    *,
    digests: Mapping[str, str],
    holders: Collection[str],
) -> list[Message]:
    """One message for each site, in the sites' order; the strategy says which nodes are asked."""
    whole, round = flower_records.from_brought(brought), state.round + 1
    less = whole if brought.difference is None else flower_records.from_brought(replace(brought, adapter=None))
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
            **digests,
            receipt=receipts.get(site),
            expires=time.time() + lead.federation.round_timeout_s,
        )
        adapter = less if site in holders else whole
        message.content = flower_records.from_signed(request.signed(lead.key), adapter=adapter, settings=lead.settings)
    return [messages[site] for site in lead.declared_sizes if site in messages]


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
    brought = flower_records.from_brought(Brought(adapter=given))
    content = flower_records.from_signed(notice.signed(lead.key), adapter=brought)
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

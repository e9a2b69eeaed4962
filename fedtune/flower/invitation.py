"""Who is asked about a run: what a lead brings to it, and what the sites say before anybody pays."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedtune.federation.lead import Checkpoints, LeadState
from fedtune.federation.protocol import Invitation, Reply
from fedtune.federation.replies import NO_REPLY, UNSIGNED_REPLY
from fedtune.federation.spec import FederationSpec
from fedtune.flower import flower_records
from fedtune.flower.streaming_grid import receive
from fedtune.model import Adapter, LoraSpec
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Receipt, Refusal
from fedtune.privacy.run_plan import Plan
from fedtune.spec import WIRE_SCHEMA, ConfigError, RefusedError, RunError
from fedtune.training.spec import TrainingSpec

log = logging.getLogger(__name__)


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
        """Check that `least_sites` sites make an offer that `takes_part` accepts.

        Raises:
            RefusedError: policies and budgets leave fewer sites than that.
            RunError: too few have answered so far.
        """
        ready = [site for site, offer in self.offers.items() if takes_part(offer)]
        if len(ready) >= federation.least_sites:
            return
        refused = [site for site, refusal in self.refusals.items() if refusal.reason.is_final]
        refused += [site for site in self.offers if site not in ready]
        error = RefusedError if len(federation.active) - len(refused) < federation.least_sites else RunError
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
    here = f"this lead, which speaks protocol {WIRE_SCHEMA}"
    return f"{reason.value}, so it may run another version of fedtune than {here}"


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
        except ConfigError as error:
            log.warning("%s sent an unreadable reply: %s", site, error)
            continue
        yield site, reply, message


@dataclass(frozen=True, kw_only=True)
class Lead(Invited):
    """What the lead brings to a run, beside who is asked about what.

    Attributes:
        training: how each site steps, which bounds how far an update can be from the adapter that was sent.
        lora: which tensors rest in a round.
        declared_sizes: site -> the size it publishes; the weights of the average.
        evaluate: scores an adapter on the lead's own validation data.
        judged_by: of these scores the one that may decide when the run ends, and whose adapter it keeps.
        finished: called with the state after each round.
        earlier_receipts: site -> the newest one of earlier runs, to be sent back until this run has one.
        elapsed: seconds since the run began, interruptions left out.
        gives_adapter: whether the sites receive the final adapter.
    """

    training: TrainingSpec
    lora: LoraSpec
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

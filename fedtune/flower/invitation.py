"""Before anybody pays: each site is asked whether it would take part in a run, and says so, or why not."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.federation.aggregation import NO_REPLY, UNSIGNED_REPLY
from fedtune.federation.protocol import PROTOCOL, Invitation, Reply
from fedtune.federation.spec import FederationSpec
from fedtune.flower import records
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Refusal
from fedtune.spec import ConfigError, RefusedError, RunError

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
        content = records.from_signed(question.signed(asked.key), settings=asked.settings)
        messages.append(Message(content, node_id, f"query.{records.INVITE}"))
    received = grid.send_and_receive(messages, timeout=asked.federation.round_timeout_s)
    replies = readable(received, asked)
    offers: dict[str, Offer] = {}
    refusals: dict[str, Refusal] = {}
    silent: dict[str, str] = {}
    for site in asked.nodes.values():
        if site not in replies:
            silent[site] = NO_REPLY
            continue
        reply, _ = replies[site]
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


def readable(received: Iterable[Message], asked: Invited) -> dict[str, tuple[Reply, Message]]:
    """Each site's readable answer; an unreadable one counts as none, as does a receipt under a foreign key."""
    answers = {}
    for message in received:
        site = asked.nodes.get(message.metadata.src_node_id)
        if site is None or message.has_error():
            log.warning("%s: Flower delivered an error in place of a reply", site)
            continue
        try:
            reply = records.to_reply(message.content)
            if reply.receipt and reply.receipt.site_key != asked.site_keys.get(site, reply.receipt.site_key):
                log.warning("%s: its receipt is signed with a key that the roster does not know", site)
                reply = replace(reply, receipt=None)
            if reply.receipt and not reply.receipt.reply:
                log.warning("%s: its receipt signs no reply, as those of fedtune 0.1.0: it has to be updated", site)
            answers[site] = (reply, message)
        except ConfigError as error:
            log.warning("%s sent an unreadable reply: %s", site, error)
    return answers

"""Invitation of sites to a run, and evaluation of their answers, before any budget is charged."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedtune.federation.protocol import Invitation, Reply
from fedtune.federation.replies import NO_REPLY, UNSIGNED_REPLY
from fedtune.federation.spec import FederationSpec
from fedtune.federation.transport import Question, Transport
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Refusal
from fedtune.spec import RefusedError, RunError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProposedRun:
    """A run that the lead proposes to the sites, with the keys to sign requests and verify replies."""

    proposal: Proposal  # the proposal, identical for every site
    key: SigningKey  # the lead's signing key, for invitations and requests
    federation: FederationSpec
    settings: str = ""  # JSON of the run's configuration for sites without it; otherwise empty
    # site -> its public signing key, if the lead has a roster
    site_keys: Mapping[str, str] = field(default_factory=dict)

    def drop_foreign_receipt(self, site: str, reply: Reply) -> Reply:
        """Remove the receipt from a site's reply if it is signed with a key other than the site's key in the roster."""
        if reply.receipt and reply.receipt.site_key != self.site_keys.get(site, reply.receipt.site_key):
            log.warning("site %s: the receipt is signed with a key that is not in the roster", site)
            return replace(reply, receipt=None)
        return reply


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Answers of the sites to an invitation, grouped into offers, refusals and silent sites."""

    offers: Mapping[str, Offer]  # site -> its offer, for the whole plan or for a part of it
    refusals: Mapping[str, Refusal]  # site -> its refusal, which may be temporary until a person approves the run
    silent: Mapping[str, str]  # site -> the reason why it counts as silent

    def require_enough(self, federation: FederationSpec, *, takes_part: Callable[[Offer], object]) -> None:
        """Check that at least `federation.required_sites` sites made an offer that `takes_part` accepts.

        Raises:
            RefusedError: too many sites refuse by policy or budget for `required_sites` to take part.
            RunError: too few sites accept, but silent or undecided sites may still accept.
        """
        ready = [site for site, offer in self.offers.items() if takes_part(offer)]
        if len(ready) >= federation.required_sites:
            return
        rooms = {site: offer.max_rounds for site, offer in self.offers.items() if site not in ready}
        less = {site: f"budget left for {rounds} rounds" for site, rounds in rooms.items()}
        refused = [*less, *(site for site, refusal in self.refusals.items() if refusal.reason.is_final)]
        error = RefusedError if len(federation.active) - len(refused) < federation.required_sites else RunError
        others = {site: refusal.as_text for site, refusal in self.refusals.items()} | dict(self.silent) | less
        too_few = federation.explain_too_few(len(ready), "accepted the invitation", others=others)
        raise error(f"{too_few}; nothing was charged for this run")


def invite(transport: Transport, asked: ProposedRun, *, less: bool = False) -> Answers:
    """Invite every site to a run and sort the answers into offers, refusals and silent sites; nothing is charged.

    Args:
        transport: the connection to the sites.
        asked: the proposed run, with the sites to invite.
        less: whether a site whose budget cannot cover the whole plan should offer the part that fits.
    """
    timeout_s, nonce = asked.federation.round_timeout_s, secrets.token_hex(16)
    expires, questions = time.time() + timeout_s, []
    for site in asked.federation.active:
        invitation = Invitation(proposal=asked.proposal, site=site, expires=expires, nonce=nonce, less=less)
        questions.append(Question(site=site, signed=invitation.sign_with(asked.key), settings=asked.settings))
    answered = transport.invite(questions, timeout_s=timeout_s)
    replies = {site: asked.drop_foreign_receipt(site, reply) for site, reply in answered}
    offers: dict[str, Offer] = {}
    refusals: dict[str, Refusal] = {}
    silent: dict[str, str] = {}
    for site in asked.federation.active:
        if site not in replies:
            silent[site] = NO_REPLY
            continue
        reply = replies[site]
        genuine = reply.is_signed() and reply.about == (site, asked.proposal.run, 0)
        if genuine and isinstance(reply.body, Offer) and reply.body.nonce == nonce:
            offers[site] = reply.body
            log.info("site %s offers to take part, with fedtune %s", site, reply.body.software)
        elif genuine and isinstance(reply.body, Refusal):
            refusals[site] = reply.body
        elif isinstance(reply.body, Refusal) and not reply.receipt:
            silent[site] = reply.body.reason.value  # unsigned: shown to people, but not trusted as final
        else:
            silent[site] = UNSIGNED_REPLY
    for site, why in {**{site: body.as_text for site, body in refusals.items()}, **silent}.items():
        log.warning("site %s does not take part: %s", site, why)
    return Answers(offers=offers, refusals=refusals, silent=silent)

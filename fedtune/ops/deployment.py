"""A run over real sites: the lead's side of it, through the federation's server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import Message

from fedtune.config import RunConfig
from fedtune.federation.invitation import Invited, invite
from fedtune.federation.lead import LeadState, ReceiptBook
from fedtune.federation.protocol import EndOfRun, Invitation, Reply, RoundRequest
from fedtune.federation.replies import Closing
from fedtune.federation.spec import FederationSpec
from fedtune.federation.transport import Question, Transport
from fedtune.flower import flower_records
from fedtune.flower.averaging import Average
from fedtune.flower.grid_transport import GridTransport
from fedtune.ops.kits.members import Member
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.remote_grid import Heard, RemoteGrid
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import Offer, Reason, Refusal, Update
from fedtune.runs.federation_run import FederationRun, Listener
from fedtune.runs.results import RunResult
from fedtune.sites.run_records import RunRecords
from fedtune.sites.shared_model import SharedModel
from fedtune.sites.shared_settings import for_sites
from fedtune.spec import ConfigError

OFFER = "would_take_part"
"""What a listener hears of a site that would take part."""
_ASK_AGAIN_S = 5.0
"""How soon to ask a site again that waits for a person there."""


@dataclass(frozen=True, kw_only=True)
class LeadConnection:
    """How a lead reaches its sites.

    Attributes:
        server: host:port.
        key: signs requests and calls.
        sites: those of its roster that take part, in the order of the run's `federation.site_names`.
        has_new_certificate: asked again and again whether the files of `tls` have another one than before.
    """

    server: str
    tls: Tls
    key: SigningKey
    sites: Sequence[Member]
    has_new_certificate: Callable[[], bool] = lambda: False

    @property
    def nodes(self) -> dict[int, str]:
        """Number in the grid -> site."""
        return {number: member.site for number, member in enumerate(self.sites, 1)}


class DeployedListener(Listener, Protocol):
    """Also hears each site."""

    def site_answered(
        self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None, noise_factor: float = 1.0
    ) -> None:
        """A site's answer came in: "update", or why there is none, and what its receipt says was charged in all."""


def run_deployed(
    config: RunConfig, folder: Path, *, connection: LeadConnection, receipts: ReceiptBook, listener: DeployedListener
) -> RunResult:
    """Run `config` at real sites to its end, or from its newest checkpoint on, and write the run folder.

    Returns:
        The content of `run.json`.

    Raises:
        ConfigError: data, model or checkpoint don't fit the configuration; raised before any site is asked.
        RunError: the server cannot be reached, or too few sites replied.
        RefusedError: too many sites' policies or budgets refuse the run.
    """

    def over_sites(run: Callable[[Transport], LeadState]) -> LeadState:
        with grid:
            return run(GridTransport(grid, connection.nodes))

    records = RunRecords(config)
    records.read()
    asked = _invited(config, connection)
    grid = _grid(connection, config.federation, listener, most_rounds=asked.proposal.plan.most_rounds)
    return FederationRun(
        config=config,
        folder=folder,
        # nothing is trained here
        shared=SharedModel(config, trains=False, records=records, progress=listener.preparing),
        asked=asked,
        average=Average(config.federation, config.declared_sizes()),
        receipts=receipts,
        engine=over_sites,
        gives_adapter=True,
    ).to_its_end(listener)


def fitted_deployed(config: RunConfig, *, connection: LeadConnection) -> RunConfig:
    """`config`, with as many rounds or as little noise as the sites' budgets have room for, as they say.

    Nothing is charged.  A site that is away, paused or waits for a person is left to answer by itself later.

    Raises:
        ConfigError: the model cannot be had.
        RunError: the server cannot be reached, or fewer than `min_sites` sites answered.
        RefusedError: too few sites have room for anything.
    """
    with _grid(connection, config.federation) as grid:
        found = invite(GridTransport(grid, connection.nodes), _invited(config, connection), less=True)
    found.require_enough(config.federation, takes_part=config.can_use)
    return config.fitted_to([offer for offer in found.offers.values() if config.can_use(offer)])


def end_deployed(run: str, federation: FederationSpec, *, connection: LeadConnection, timeout_s: float) -> list[str]:
    """Tell the sites that a run is over, without a final adapter; returns those that heard it.

    Args:
        run: its whole name, as its sites have it.
        federation: its sites.
        connection: of the lead that began it; nothing else of the run is needed.
        timeout_s: how long to wait for sites.
    """
    notice = EndOfRun(run=run, lead=connection.key.public).signed(connection.key)
    with _grid(connection, federation) as grid:
        questions = [Question(site=member.site, signed=notice) for member in connection.sites]
        return [site for site, _ in GridTransport(grid, connection.nodes).end(questions, timeout_s=timeout_s)]


def online_sites(federation: FederationSpec, *, connection: LeadConnection) -> list[str]:
    """The sites that have a line to the server now."""
    with _grid(connection, federation) as grid:
        return [connection.sites[number - 1].site for number in grid.online()]


def _invited(config: RunConfig, connection: LeadConnection) -> Invited:
    """Every site, about the run as it is sent to them."""
    sent = for_sites(config)
    return Invited(
        proposal=sent.proposal(lead=connection.key.public, plan=sent.plan()),
        key=connection.key,
        federation=config.federation,
        settings=json.dumps(sent.to_json()),
        site_keys={member.site: member.site_key for member in connection.sites},
    )


class _Ears:
    """Reads each answer as it comes: tells the listener, and says what it means for the exchange.

    What a server or a site may have made up counts for nothing: an answer is good, and its charge is told, under the
    site's signature alone.

    Args:
        sites: in the order of the grid's numbers, from 1.
        most_rounds: that a site may be charged for.
    """

    def __init__(self, sites: Sequence[Member], listener: DeployedListener | None, *, most_rounds: int) -> None:
        self._sites, self._listener, self._most_rounds = sites, listener, most_rounds
        self._said: dict[str, str] = {}

    def __call__(self, number: int, question: Message, answer: Message) -> Heard:
        kind, member = question.metadata.message_type, self._sites[number - 1]
        if kind == f"query.{flower_records.END}":
            return Heard(good=True)  # no more than a receipt was asked for
        if kind == f"query.{flower_records.SUM}":
            return Heard(good=flower_records.PARTS in answer.content)
        try:
            reply = flower_records.to_reply(answer.content)
        except ConfigError:  # nonsense, which counts as none
            return Heard(good=False)
        signed = reply.is_signed() and reply.receipt is not None and reply.receipt.site_key == member.site_key
        refused = reply.body.reason if isinstance(reply.body, Refusal) else None
        waiting = refused is not None and refused.is_waiting
        self._tell(
            member.site, reply, num_bytes=flower_records.num_bytes(answer.content), signed=signed, waiting=waiting
        )
        # Before a run begins, and nobody is charged yet, people are waited for; in a round they are not.
        invited = kind == f"query.{flower_records.INVITE}"
        idle = waiting and not (invited and refused is Reason.AWAITING_APPROVAL)
        good = signed and _answers(question, reply, site=member.site)
        return Heard(good=good, again_s=_ASK_AGAIN_S if waiting else None, idle=idle)

    def _tell(self, site: str, reply: Reply, *, num_bytes: int, signed: bool, waiting: bool) -> None:
        body, receipt = reply.body, reply.receipt
        what = body.reason.value if isinstance(body, Refusal) else "update" if isinstance(body, Update) else OFFER
        if self._listener is not None and not (waiting and self._said.get(site) == what):
            believed = signed and receipt is not None and receipt.charged_rounds <= self._most_rounds
            charged, factor = (receipt.charged_rounds, receipt.noise_factor) if receipt and believed else (None, 1.0)
            self._listener.site_answered(site, what, num_bytes=num_bytes, charged_rounds=charged, noise_factor=factor)
        self._said[site] = what


def _answers(question: Message, reply: Reply, *, site: str) -> bool:
    """Whether a reply is of the kind that was hoped for, and about what was asked."""
    signed = flower_records.to_signed(question.content)
    if question.metadata.message_type == f"query.{flower_records.INVITE}":
        invitation = Invitation.of(signed)
        about = reply.about == (site, invitation.run, 0)
        return about and isinstance(reply.body, Offer) and reply.body.nonce == invitation.nonce
    request = RoundRequest.of(signed)
    return isinstance(reply.body, Update) and reply.about == (site, request.run, request.round)


def _grid(
    connection: LeadConnection, spec: FederationSpec, listener: DeployedListener | None = None, *, most_rounds: int = 0
) -> RemoteGrid:
    return RemoteGrid(
        connection.server,
        connection.tls,
        sites={member.site: member.node_key for member in connection.sites},
        key=connection.key,
        hear=_Ears(connection.sites, listener, most_rounds=most_rounds),
        closing=lambda: Closing(spec),
        has_new_certificate=connection.has_new_certificate,
    )

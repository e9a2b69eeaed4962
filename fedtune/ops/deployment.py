"""Runs over real sites: the lead's side, connected to the sites through the federation's server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.federation.invitation import ProposedRun, invite
from fedtune.federation.lead import LeadState
from fedtune.federation.protocol import EndOfRun, Invitation, Reply, RoundRequest
from fedtune.federation.replies import StoppingRule
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import FederationSpec
from fedtune.federation.transport import Question, Transport
from fedtune.flower import flower_records
from fedtune.flower.asking_grid import ClassifiedAnswer, FlowerGrid, RetryingGrid
from fedtune.flower.averaging import Average
from fedtune.flower.grid_transport import GridTransport, Message
from fedtune.ops.kits.kit_file import Kit, KitCertificate
from fedtune.ops.kits.members import Member
from fedtune.ops.metrics import LeadMetrics
from fedtune.ops.services.lead_and_server import RECEIPTS, find_members, mark_running, read_latest_answers
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason, Refusal, Update
from fedtune.runs.federation_run import FederationRun, Listener
from fedtune.runs.results import RunResult
from fedtune.sites.run_records import RunRecords
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.shared_settings import MAX_CHARACTERS, select_settings_for_sites, serialize_for_sites
from fedtune.spec import ConfigError, RunError
from fedtune.version import build

OFFER = "would_take_part"  # the answer reported to a listener for an offer
_ASK_AGAIN_S = (5.0, 60.0)  # minimum and maximum delay before a site that awaits approval is asked again


@dataclass(frozen=True, kw_only=True)
class LeadService:
    """The lead of a run over real sites, configured by the lead's kit."""

    kit: Kit
    federation: FederationSpec  # the settings with the names of the sites
    # creates the grid in a process started by Flower; None: fedtune's own connection to the federation's server
    over: Callable[..., FlowerGrid] | None = None

    @cached_property
    def metrics(self) -> LeadMetrics:
        """The progress metrics of the run."""
        return LeadMetrics(kit=self.kit)

    @cached_property
    def sites(self) -> tuple[Member, ...]:
        """The roster entries of the run's sites, in the order of `federation.site_names`."""
        return find_members(self.kit, self.federation.active)

    @cached_property
    def key(self) -> SigningKey:
        """The lead's signing key, for requests and calls to the server."""
        return self.kit.load_key()

    def run(self, config: RunConfig, folder: Path, listener: Listener) -> RunResult:
        """Run `config` at its sites from the newest checkpoint to the end, and write the run folder.

        Returns:
            The content of `run.json`.

        Raises:
            ConfigError: kit, roster, data, model or checkpoint do not match the settings (before any site is
                contacted), or too few sites use this lead's protocol version.
            RunError: the server cannot be reached, or too few sites replied.
            RefusedError: the policies or budgets of too many sites refuse the run.
        """
        if self.over is None:
            self.kit.check_certificate(datetime.now(UTC))  # first, to report an expired certificate before other errors
        find_members(self.kit, self.federation.active)  # checks again whether a site was revoked
        recorder, records = _RecordingListener(listener, folder, self.metrics), RunRecords(config)
        with mark_running(folder):
            records.read()
            proposed = self._propose_run(config)
            patience_s = self.federation.round_timeout_s
            grid = self.open_grid(recorder, max_rounds=proposed.proposal.plan.max_rounds, patience_s=patience_s)

            loaded = LoadedModel(config, trains=False, progress=recorder.on_preparing)  # nothing is trained here

            def run_over_sites(run: Callable[[Transport], LeadState]) -> LeadState:
                with grid as opened, (transport := self._make_transport(opened)).explain_protocol_mismatch():
                    return run(transport)

            return FederationRun(
                config=config,
                folder=folder,
                shared=RunModel(loaded, config, records=records, progress=recorder.on_preparing),
                asked=proposed,
                average=Average(config.federation, config.declared_sizes()),
                receipts=self.kit.folder / RECEIPTS,
                engine=run_over_sites,
                gives_adapter=True,
            ).run_to_end(recorder)

    def fit_to_budgets(self, config: RunConfig) -> RunConfig:
        """Fit rounds or noise of `config` to the sites' budgets, if `if_over_budget` allows it, and ranks to policies.

        No budget is charged.  Sites that are offline, paused or awaiting approval are ignored; they can accept the run
        later.

        Raises:
            ConfigError: the model is not available, or too few sites use this lead's protocol version.
            RunError: the server cannot be reached, or fewer than `min_sites` sites answered.
            RefusedError: too few sites have any budget left.
        """
        if not (config.may_be_fitted or config.federation.ranks):
            return config
        grid = self.open_grid(patience_s=self.federation.round_timeout_s)
        with grid as opened, (transport := self._make_transport(opened)).explain_protocol_mismatch():
            answers = invite(transport, self._propose_run(config), less=True)
            answers.require_enough(config.federation, takes_part=config.can_use_offer)
        return config.fit_to_offers([offer for offer in answers.offers.values() if config.can_use_offer(offer)])

    def announce_end(self, run: str, *, timeout_s: float) -> list[str]:
        """Announce the permanent end of a run without a final adapter; return the sites that confirmed it.

        Args:
            run: the full name of the run at the sites; the run folder is not required.
            timeout_s: the timeout for the answers of the sites.
        """
        notice = EndOfRun(run=run, lead=self.key.public).sign_with(self.key)
        with self.open_grid() as grid:
            questions = [Question(site=member.site, signed=notice) for member in self.sites]
            return [site for site, _ in self._make_transport(grid).end(questions, timeout_s=timeout_s)]

    def list_online_sites(self) -> dict[str, bool]:
        """Return a mapping from site name to whether the site is connected to the server."""
        with self.open_grid() as grid:
            online = grid.list_online_nodes()
        return {member.site: number in online for number, member in enumerate(self.sites, 1)}

    def open_grid(
        self, listener: Listener | None = None, *, max_rounds: int = 0, patience_s: float = 0.0
    ) -> AbstractContextManager[RetryingGrid]:
        """Open the connection to the sites.

        The lead's own connection reloads the kit's certificate when it is renewed, and waits up to `patience_s` seconds
        for an unavailable server.
        """
        sites = {member.site: member.node_key for member in self.sites}
        classify = _AnswerClassifier(self.sites, listener, max_rounds=max_rounds)
        closing = partial(StoppingRule, self.federation)
        if self.over is not None:
            return self.over(sites, hear=classify, closing=closing)
        from fedtune.ops.wire.remote_grid import RemoteGrid  # imports Flower's internals

        return RemoteGrid(
            self.kit.server,
            self.kit.tls(),
            sites=sites,
            key=self.key,
            hear=classify,
            closing=closing,
            has_new_certificate=KitCertificate(self.kit).is_new,
            patience_s=patience_s,
        )

    def _make_transport(self, grid: RetryingGrid) -> GridTransport:
        return GridTransport(grid, {number: member.site for number, member in enumerate(self.sites, 1)})

    def _propose_run(self, config: RunConfig) -> ProposedRun:
        """Build the proposal of the run, with the JSON settings that every site receives."""
        sent = select_settings_for_sites(config)
        settings = serialize_for_sites(sent)
        if len(settings) > MAX_CHARACTERS:
            bound = f"must have at most {MAX_CHARACTERS:,} characters for the sites: use fewer or shorter texts"
            raise ConfigError("settings", f"{len(settings):,} characters", bound)
        return ProposedRun(
            proposal=sent.proposal(lead=self.key.public, plan=sent.plan()),
            key=self.key,
            federation=config.federation,
            settings=settings,
            site_keys={member.site: member.site_key for member in self.sites},
        )


class _RecordingListener:
    """Listener wrapper that also stores each site's latest answer for `fedtune run status` and updates the metrics."""

    def __init__(self, listener: Listener, folder: Path, metrics: LeadMetrics) -> None:
        self._listener, self._path, self._metrics = listener, RunFolder(folder).answers, metrics
        self._answers: dict[str, dict[str, str]] = {}
        with suppress(RunError):  # a damaged file is replaced
            self._answers = read_latest_answers(folder)
        self.on_site_replied, self.on_preparing = listener.on_site_replied, listener.on_preparing
        self.note = listener.note

    def on_prepared(self, shared: RunModel, proposal: Proposal, state: LeadState) -> None:
        self._metrics.record_start(state, num_rounds=proposal.plan.num_rounds)
        self._listener.on_prepared(shared, proposal, state)

    def on_round_finished(self, state: LeadState) -> None:
        self._metrics.record_round(state)
        self._listener.on_round_finished(state)

    def on_site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        self._answers[site] = {"what": what, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        write_durably(self._path, json.dumps(self._answers, indent=1).encode() + b"\n")
        self._metrics.record_answer(site, what)
        self._listener.on_site_answered(site, what, num_bytes=num_bytes, charged_rounds=charged_rounds)


class _AnswerClassifier:
    """Callback of `RetryingGrid` that reports each answer to the listener and classifies it for the exchange.

    The server or another site may forge answers.  Only an answer with the site's signature counts, and only its charge
    is reported.

    Args:
        sites: the sites in the order of the grid's numbers, which start at 1.
        listener: the listener to notify; None: no listener.
        max_rounds: the maximum number of rounds that a site can have been charged for.
    """

    def __init__(self, sites: Sequence[Member], listener: Listener | None, *, max_rounds: int) -> None:
        self._sites, self._listener, self._max_rounds = sites, listener, max_rounds
        self._said: dict[str, str] = {}
        self._waiting_since: dict[str, float] = {}

    def __call__(self, number: int, question: Message, answer: Message) -> ClassifiedAnswer:
        kind, member = question.metadata.message_type, self._sites[number - 1]
        if kind == f"query.{flower_records.END}":
            return ClassifiedAnswer(good=True)  # the answer contains only a receipt
        if kind == f"query.{flower_records.SUM}":
            return ClassifiedAnswer(good=flower_records.PARTS in answer.content)
        try:
            reply = flower_records.to_reply(answer.content)
        except ConfigError:  # an unreadable answer
            return ClassifiedAnswer(good=False)
        signed = reply.is_signed() and reply.receipt is not None and reply.receipt.site_key == member.site_key
        refused = reply.body.reason if isinstance(reply.body, Refusal) else None
        waiting = refused is not None and refused.is_waiting
        num_bytes = flower_records.count_payload_bytes(answer.content)
        self._notify_listener(member.site, reply, num_bytes=num_bytes, signed=signed, waiting=waiting)
        # Wait for people's approval only before a run begins, when no site is charged yet.
        invited = kind == f"query.{flower_records.INVITE}"
        idle = waiting and not (invited and refused is Reason.AWAITING_APPROVAL)
        good = signed and _is_answer_to(question, reply, site=member.site)
        again_s = self._compute_next_question_s(member.site) if waiting else None
        if not waiting:
            self._waiting_since.pop(member.site, None)
        return ClassifiedAnswer(good=good, again_s=again_s, idle=idle)

    def _compute_next_question_s(self, site: str) -> float:
        """Compute the delay before the next request to a waiting site: 10 % of its waiting time so far, within limits.

        With stock Flower, each request starts a process at the site, so frequent requests would waste CPU time during a
        long approval.
        """
        now = time.monotonic()
        shortest, longest = _ASK_AGAIN_S
        return min(max(shortest, (now - self._waiting_since.setdefault(site, now)) / 10), longest)

    def _notify_listener(self, site: str, reply: Reply, *, num_bytes: int, signed: bool, waiting: bool) -> None:
        body, receipt = reply.body, reply.receipt
        what = body.reason.value if isinstance(body, Refusal) else "update" if isinstance(body, Update) else OFFER
        if self._listener is not None and not (waiting and self._said.get(site) == what):
            believed = signed and receipt is not None and receipt.charged_rounds <= self._max_rounds
            charged = receipt.charged_rounds if receipt and believed else None
            self._listener.on_site_answered(site, what, num_bytes=num_bytes, charged_rounds=charged)
            if isinstance(body, Offer) and signed and body.software != build():
                self._listener.note(f"{site} runs fedtune {body.software}, and this lead runs {build()}")
        self._said[site] = what


def _is_answer_to(question: Message, reply: Reply, *, site: str) -> bool:
    """Return True if a reply answers the question: it has the requested type, and the same site, run and round."""
    signed = flower_records.to_signed(question.content)
    if question.metadata.message_type == f"query.{flower_records.INVITE}":
        invitation = Invitation.from_signed(signed)
        about = reply.about == (site, invitation.run, 0)
        return about and isinstance(reply.body, Offer) and reply.body.nonce == invitation.nonce
    request = RoundRequest.from_signed(signed)
    return isinstance(reply.body, Update) and reply.about == (site, request.run, request.round)

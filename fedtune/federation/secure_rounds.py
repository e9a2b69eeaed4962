"""The lead's side of secure aggregation: one session of all sites, and one release of their noisy gradient sum per
round.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from fedtune.codec import parse_json
from fedtune.federation.lead import AggregationResult, Arrays, Lead, LeadState, RoundResult
from fedtune.federation.protocol import ANNOUNCE, CONFIRM, JOIN, UNMASK, SumRequest, derive_terms, hash_parts
from fedtune.federation.replies import LEFT_OUT, NO_REPLY, NOT_SUMMED, RoundReplies
from fedtune.federation.secure.agreement import KeyAgreement, Rejected
from fedtune.federation.secure.summation import Summation, UnmaskingError, build_session
from fedtune.federation.transport import Question, Transport
from fedtune.privacy.release import Reason, Refusal
from fedtune.privacy.site_policy import DEFAULT_MAX_ADAPTER_VALUE, compute_adapter_bound
from fedtune.spec import RunError
from fedtune.training.secure_server_step import take_secure_server_step

log = logging.getLogger(__name__)

_SESSIONS = 3
"""Maximum number of attempts to begin a session, because a site may restart during an attempt.  Afterwards, the lead
continues without that site or gives up."""

MAX_LOST_ROUNDS = 5
"""The run ends after this number of releases without a sum: if two sites accuse each other of wrong shares, the lead
cannot identify the site at fault."""


class SecureAggregator:
    """Aggregation rule of a run with secure aggregation.

    Args:
        transport: the connection to the sites.
        lead: the lead of the run; its checkpoints store the session for a restart.
        state: the state of the run, which determines the number of values in the adapter.

    Attributes:
        session: the lead's name for the current session; empty before the first one.
        left_out: the sites excluded from all further rounds.
    """

    def __init__(self, transport: Transport, lead: Lead, state: LeadState) -> None:
        self._transport, self._lead = transport, lead
        members = {site: lead.asked.site_keys[site] for site in lead.declared_sizes}
        self._terms = derive_terms(lead.asked.proposal, members=members, length=state.adapter.num_values)
        self._ready: tuple[str, ...] = ()
        self._failed: Counter[frozenset[str]] = Counter()
        self.session, self.left_out = "", frozenset[str]()
        self._announced: tuple[bytes, ...] = ()  # the announcements, in the order of the members
        self._begun: KeyAgreement | None = None  # the current session; None before the first session
        self._accused: set[frozenset[str]] = set()  # pairs of sites with a wrong share: one is at fault
        if kept := lead.checkpoints.load_session():
            self._restore_session(kept)

    def _restore_session(self, kept: bytes) -> None:
        """Restore the state written by `_save_session`; a session that does not match the terms is dropped."""
        try:
            fields = parse_json(kept, key="session", bound="must be JSON")
            self.left_out = frozenset(map(str, fields["left_out"]))
            self._accused = {frozenset(map(str, pair)) for pair in fields["accused"]}
            announced = tuple(text.encode() for text in fields["announced"])
            begun = build_session(self._terms, dict(zip(self._terms.sites, announced, strict=True)))
            self.session, self._announced, self._begun = str(fields["name"]), announced, begun
        except (Rejected, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("the stored session of secure aggregation cannot be resumed: %s", error)

    def _save_session(self) -> None:
        """Write the session state, which contains only public values, to disk for a restart of the lead."""
        fields = {
            "left_out": sorted(self.left_out),
            "accused": sorted(map(sorted, self._accused)),
            "name": self.session,
            "announced": [message.decode() for message in self._announced],
        }
        self._lead.checkpoints.save_session(json.dumps(fields).encode())

    def resume(self, state: LeadState) -> LeadState:
        """Count every round that was requested before a restart as lost, because its release cannot be completed.

        A site confirms only the first set of survivors that it receives, and a restarted lead does not know that set.
        """
        lead = self._lead
        for round, sites in sorted(dict(lead.checkpoints.list_requests(after=state.round)).items()):
            not_asked = {site: LEFT_OUT if site in self.left_out else NO_REPLY for site in lead.declared_sizes}
            lost = RoundResult(
                round=round,
                seconds=0.0,
                sites=(),
                failed_sites=not_asked | dict.fromkeys(sites, NOT_SUMMED),
                bytes_down=0,
                bytes_up=0,
                metrics=state.rounds[-1].metrics if state.rounds else lead.evaluate(state.adapter),
                ended=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            state = replace(state, round=round, rounds=(*state.rounds, lost))
        return state

    def restore(self, strategy: Arrays) -> None:
        """Do nothing, because the optimizer state is stored in `LeadState` and not in this object."""

    def combine(self, state: LeadState, replies: RoundReplies) -> AggregationResult:
        """Apply an optimizer step with the sum of the uploads; keep the previous adapter if the sum cannot be computed.

        Raises:
            RunError: two consecutive rounds, or `MAX_LOST_ROUNDS` rounds in total, had no sum.
        """
        lead, adapter, strategy = self._lead, state.adapter, state.strategy
        sites: tuple[str, ...] = ()
        try:
            uploads = {site: upload for site, upload in replies.masked.items() if site in replies.sites}
            total, sites = self.compute_total(replies.round, uploads)
            adapter, strategy = take_secure_server_step(
                state.adapter,
                total,
                state.strategy,
                training=lead.training,
                plan=lead.plan,
                step=sum(bool(result.sites) for result in state.rounds),
                sites=len(sites),
                most=compute_adapter_bound(DEFAULT_MAX_ADAPTER_VALUE, lead.asked.proposal.lora_scale),
                declared_size=sum(lead.declared_sizes[site] for site in sites),
            )
        except UnmaskingError as error:
            lost = [result.round for result in state.rounds if not result.sites]
            if state.round in lost or len(lost) + 1 >= MAX_LOST_ROUNDS:
                pairs = sorted(" and ".join(sorted(pair)) for pair in self._accused)
                accused = f"; wrong shares between {', '.join(pairs)}" if pairs else ""
                before = f"as in round {', '.join(map(str, lost))}, and each round is charged{accused}"
                raise RunError(f"{error}, {before}; resume from the checkpoint of round {state.round}") from None
            log.error("%s; continuing with the next round", error)
        failures = dict.fromkeys((site for site in replies.sites if site not in sites), NOT_SUMMED)
        return AggregationResult(adapter, sites, {**replies.failures, **failures}, strategy)

    def prepare(self) -> tuple[str, ...]:
        """Return the members that have joined the current session, before any site is charged for the round.

        Begins a new session if there is none yet, or if a restarted member has lost its keys for the current session.
        If a member does not join the new session, the old session continues without that member.

        Raises:
            RunError: fewer members than the threshold are ready.
        """
        failed: Mapping[str, str] = {}
        here, missing = self._rejoin()
        lost = frozenset(site for site, why in missing.items() if why and why.reason is Reason.SECURE_STEP)
        if self._begun is None or (lost and lost == set(missing) and self._failed[lost] < _SESSIONS):
            failed = self._begin_session()
            self._failed[lost] += bool(failed)
            here, missing = self._rejoin()
        ready = self._ready = tuple(site for site in here if site not in self.left_out)
        if len(ready) < self._terms.threshold:
            left_out = dict.fromkeys(self.left_out, "sends wrong shares")
            why = {**_describe_missing(missing), **failed, **left_out}
            others = "; ".join(f"{site}: {reason}" for site, reason in why.items())
            num = len(self._terms.members)
            if self._begun is None:  # the first session needs the keys of all members
                state = f"no secure aggregation session could begin: the first needs all {num} sites"
            else:
                joined = f"{len(ready)} of {num} sites joined the secure aggregation session"
                state = f"{joined}, but {self._terms.threshold} are required"
            raise RunError(f"{state} ({others}); nothing was charged for this round")
        return ready

    def _rejoin(self) -> tuple[list[str], dict[str, Refusal | None]]:
        """Ask all members to rejoin the current session; return the sites that did, and the refusals of the others.

        A refusal of None means that the site did not answer.
        """
        if self._begun is None:
            return [], {}
        joined, missing = self._request_step(JOIN, self.session, dict.fromkeys(self._terms.sites, self._announced))
        right = [site for site, digest in joined.items() if digest == self._begun.digest.encode()]
        return right, missing

    def _begin_session(self) -> dict[str, str]:
        """Begin a session with keys from all members.

        Returns the sites that prevented it, with their reasons; empty on success.
        """
        why: dict[str, str] = {}
        for _ in range(_SESSIONS):
            name = secrets.token_hex(16)
            announced, missing = self._request_step(ANNOUNCE, name, dict.fromkeys(self._terms.sites, ()))
            if missing:
                why = _describe_missing(missing)
                break
            try:
                session = build_session(self._terms, announced)
            except Rejected as rejected:
                why = {rejected.site: f"its key was rejected ({rejected.wrong})"}
                continue
            parts = tuple(announced.values())
            joined, missing = self._request_step(JOIN, name, dict.fromkeys(self._terms.sites, parts))
            if not missing and set(joined.values()) == {session.digest.encode()}:
                self.session, self._announced, self._begun = name, parts, session
                self._save_session()
                return {}
            if missing:  # another attempt would take the other sites out of their current session
                why = _describe_missing(missing)
                break
            other = (site for site, digest in joined.items() if digest != session.digest.encode())
            why = dict.fromkeys(other, "received different keys")
        log.warning("a new session of secure aggregation could not be started: %s", why)
        return why

    def compute_total(self, round: int, uploads: Mapping[str, bytes]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Compute the sum of a round's uploads, shape (values,), and return it with the included sites.

        Raises:
            UnmaskingError: too few sites completed the protocol; the next round may succeed.
        """
        assert self._begun is not None, "prepare first"
        release = Summation(self._begun, release=round)
        _add_messages(uploads, release.add_upload)
        if (uploaded := len(release.survivors)) < (least := self._lead.asked.federation.required_sites):
            without = ", ".join(site for site in self._ready if site not in release.survivors)
            raise UnmaskingError(
                round, f"{uploaded} sites uploaded, but {least} are required; no usable upload from {without}"
            )
        request = release.build_confirm_request()
        # Sites without an upload may also confirm and reveal shares.
        confirmed = self._request_and_log_missing(CONFIRM, dict.fromkeys(self._ready, (request,)))
        _add_messages(confirmed, release.add_confirmation)
        requests = {site: (release.build_unmask_request(site),) for site in confirmed}
        revealed = self._request_and_log_missing(UNMASK, requests)
        _add_messages(revealed, release.add_revealed)
        try:
            return release.compute_total(), tuple(release.survivors)
        except UnmaskingError as error:
            self._exclude_suspect(error.site, release.wrong_shares)
            raise
        finally:
            for holder, dealer in sorted(release.wrong_shares):
                log.warning(
                    "secure aggregation: the share dealt by %s and held by %s is wrong or missing", dealer, holder
                )

    def _exclude_suspect(self, dealer: str | None, wrong_shares: Iterable[tuple[str, str]]) -> None:
        """Exclude the site that made a sum unreadable, if the site can be identified.

        Either the holder or the dealer of a wrong share is at fault.  A site is excluded if it has wrong shares with
        more sites than can collude, and with more sites than any other suspect.  Pairs with an excluded site are
        ignored.
        """
        self._accused |= {frozenset(pair) for pair in wrong_shares}
        pairs = [pair for pair in self._accused if len(pair) > 1 and not pair & self.left_out]
        most = Counter(site for pair in pairs for site in pair).most_common(2)
        if dealer is None and most:
            (first, count), (_, next_count) = most  # a pair contributes two sites
            dealer = first if count > max(1, self._lead.asked.federation.colluders, next_count) else None
        if dealer is not None:
            log.error("%s is excluded from all further rounds: its secure aggregation shares are wrong", dealer)
            self.left_out |= {dealer}
        self._save_session()

    def _request_and_log_missing(self, step: str, parts: Mapping[str, Iterable[bytes]]) -> dict[str, bytes]:
        """Send the request of a step that needs answers from some sites only, and log the sites without an answer."""
        answers, missing = self._request_step(step, self.session, parts)
        for site, why in _describe_missing(missing).items():
            log.warning("secure aggregation: %s did not answer the step %r: %s", site, step, why)
        return answers

    def _request_step(
        self, step: str, session: str, parts: Mapping[str, Iterable[bytes]]
    ) -> tuple[dict[str, bytes], dict[str, Refusal | None]]:
        """Send the request of one protocol step; return the sites' answers, in the order of the members, and the
        refusals.

        A refusal of None means that the site did not answer.
        """
        run = self._lead.asked
        timeout_s = run.federation.round_timeout_s
        expires, questions = time.time() + timeout_s, []
        for site in self._lead.declared_sizes:
            if site not in parts:
                continue
            chunks = tuple(parts[site])
            request = SumRequest(
                proposal=run.proposal,
                site=site,
                expires=expires,
                step=step,
                session=session,
                parts_digest=hash_parts(chunks),
            )
            # Later steps need no settings: a site without the session refuses, and announces again.
            settings = run.settings if step == ANNOUNCE else ""
            questions.append(Question(site=site, signed=request.sign_with(run.key), settings=settings, parts=chunks))
        answers: dict[str, bytes] = {}
        missing: dict[str, Refusal | None] = dict.fromkeys(parts)
        for site, answer in self._transport.take_sum_step(questions, timeout_s=timeout_s):
            if isinstance(answer, Refusal):
                missing[site] = answer
            else:
                answers[site] = answer
                del missing[site]
        return {site: answers[site] for site in self._terms.sites if site in answers}, missing


def _describe_missing(missing: Mapping[str, Refusal | None]) -> dict[str, str]:
    return {site: NO_REPLY if why is None else why.as_text for site, why in missing.items()}


def _add_messages(messages: Mapping[str, bytes], add: Callable[[str, bytes], None]) -> None:
    for site, data in messages.items():
        try:
            add(site, data)
        except Rejected as rejected:  # an invalid message excludes only its sender
            log.warning("site %s sent an invalid message of secure aggregation: %s", site, rejected)

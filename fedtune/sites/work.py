"""Local computation of a site in a round: training, noised scores, and the input to secure aggregation."""

from __future__ import annotations

import hashlib
import hmac
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from fedtune.data import TextDataset, group_by_user
from fedtune.data.load import SiteRecords
from fedtune.data.records import record_key
from fedtune.evaluation.scoring import compute_unit_scores, compute_user_scores
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.secure.agreement import require_terms
from fedtune.federation.secure.at_site import Parties, SiteAggregator, make_promise_writer
from fedtune.federation.sent_round import unpack_adapter
from fedtune.federation.site_round import Site, TrainingResult
from fedtune.model.adapter import Adapter, AdapterError
from fedtune.privacy.cohorts import compute_cohort_number
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.mechanism import release_scores
from fedtune.privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_files import SiteFiles
from fedtune.sites.shared_model import RunModel
from fedtune.training.algorithms.local_algorithm import Arrays
from fedtune.training.devices import DividedUnits
from fedtune.training.examples import SiteExamples, Units
from fedtune.training.local import TrainingRound, compute_round_share, train_round
from fedtune.training.users import UserExamples

PROMISES = ".promises.jsonl"  # suffix of the ledger's file name, because several ledgers may share a folder
TrainingUnits = SiteExamples | UserExamples


@dataclass
class SiteWork:
    """The records of a site, with the model that is trained on these records."""

    site: str  # name of the site
    shared: RunModel  # the model, used alternately by all sites of a process
    records: SiteRecords  # the site's own records
    declared_size: int  # published size, in privacy units
    max_adapter_value: float  # the site's bound on values of the adapter
    lenient: bool = False  # no record may cause a failure, which would reveal it to the lead
    # wrapper of the training units, with which an audit adds canaries
    around: Callable[[TrainingUnits], TrainingUnits] = lambda units: units
    _divided: DividedUnits | None = field(default=None, init=False, repr=False, compare=False)
    _limited: tuple[frozenset[str], SiteWork] | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def examples(self) -> TrainingUnits:
        """The tokenized training records, grouped by user for unit "user"."""
        examples = self.shared.make_site_examples(
            self.shared.tokenize_records(self.records.training, lenient=self.lenient)
        )
        privacy = self.shared.config.privacy
        if privacy.unit == "record":
            return self.around(examples)
        # 8 bytes per float64 of a mean, and 8 for its copy without non-finite values.
        of_each = 16 * sum(parameter.numel() for parameter in self.shared.model.trainable().values())
        users = UserExamples(
            examples,
            group_by_user(self.records.training),
            most_records=privacy.contribution,
            most_users=max(1, self.shared.loaded.user_means_bytes // of_each),
        )
        return self.around(users)

    def _split_units(self) -> TrainingUnits | DividedUnits:
        """Return the training units, divided among the site's devices if there are several."""
        devices, max_grad_norm = self.shared.loaded.devices, self.shared.config.privacy.max_grad_norm
        if devices is not None and self._divided is None:
            self._divided = devices.divide_units(self.examples, max_grad_norm=max_grad_norm)
        return self.examples if self._divided is None else self._divided

    def drop_model(self) -> None:
        """Release the model on all devices, without freeing any record."""
        for work in (self,) if self._limited is None else (self, self._limited[1]):
            work._divided = None
            del work.shared

    @cached_property
    def _heldout(self) -> TextDataset:
        return self.shared.tokenize_records(self.records.heldout, lenient=self.lenient)

    def find_user_cohorts(self) -> dict[str, int]:
        """Determine each user's cohort by the earliest date in the user's records.

        Users without a date are in the oldest cohort.
        """
        cohorts = self.shared.config.privacy.cohorts
        assert cohorts is not None, "the run is not limited to cohorts"
        months: dict[str, str] = {}
        for record in (*self.records.training, *self.records.heldout):
            user, month = record.fields["user"], record.fields["arrival"]
            months[user] = min(filter(None, (months.get(user), month)), default="")
        return {user: compute_cohort_number(month, cohorts.period) for user, month in months.items()}

    def _restrict_to(self, admitted: frozenset[str]) -> SiteWork:
        """Return a copy with the records of the admitted users only. The copy is cached for the next round."""
        if self._limited is None or self._limited[0] != admitted:
            self._limited = None  # first, so that the states of two rounds are never in memory together
            training, heldout = (
                [record for record in records if record.fields["user"] in admitted]
                for records in (self.records.training, self.records.heldout)
            )
            self._limited = admitted, replace(self, records=SiteRecords(training, heldout))
        return self._limited[1]

    def run_round(
        self,
        request: RoundRequest,
        adapter: Adapter,
        attempt: int,
        *,
        fingerprint_key: bytes,
        admitted: Collection[str] | None = None,
        state: bytes = b"",
    ) -> TrainingResult:
        """Score the lead's adapter if the plan includes scores, and train the adapter for one round.

        Adapter values are clamped to the site's bound. With secure aggregation, the result is the site's share of the
        sum instead of an adapter.

        Guarantee: the released part of the result satisfies the round's `DpEvent`; the fingerprint is only for the
        site's ledger.

        Args:
            request: the lead's request for the round.
            adapter: adapter in the request, packed with the algorithm's arrays.
            attempt: number of the attempt at this round, from 1.
            fingerprint_key: secret key for the fingerprint of the records.
            admitted: users to train on and score, if the plan is limited to cohorts. All other users are silently left
                out, and the fingerprint covers the whole file. None: all users.
            state: the algorithm's state after the last committed round, from the ledger.
        """
        plan = request.proposal.plan
        randomness = make_randomness(request.proposal.seeded_noise, self.shared.config.seed)
        assert (admitted is None) == (plan.cohorts is None), "`admitted` is required iff the plan has cohorts"
        adapter, sent = unpack_adapter(adapter)
        adapter = adapter.clip_values(self.max_adapter_value)
        site = self if admitted is None else self._restrict_to(frozenset(admitted))
        scores = (
            site._compute_noised_scores(plan, request, adapter, attempt, randomness) if plan.releases_metrics else None
        )
        fingerprint = self.fingerprint(fingerprint_key)
        units, work = site._prepare_round(request, attempt, sent=sent, state=_read_state(state))
        if plan.shared is None:
            trained, kept = train_round(self.shared.model, adapter, units, work, randomness=randomness)
            return TrainingResult(adapter=trained, scores=scores, fingerprint=fingerprint, state=kept)
        sums = compute_round_share(self.shared.model, adapter, units, work, randomness=randomness)
        share = np.concatenate([sums[name].ravel() for name in adapter.tensors])
        return TrainingResult(share=share, scores=scores, fingerprint=fingerprint)

    def _prepare_round(
        self, request: RoundRequest, attempt: int, *, sent: Arrays, state: Arrays
    ) -> tuple[Units, TrainingRound]:
        """Return the training units of a round, and the round's inputs except the model."""
        work = TrainingRound(
            site=self.site,
            round=request.round,
            attempt=attempt,
            plan=request.proposal.plan,
            training=self.shared.config.training,
            declared_size=self.declared_size,
            max_adapter_value=self.max_adapter_value,
            algorithm=self.shared.config.federation.bound_algorithm,
            sent=sent,
            state=state,
            rank=request.proposal.find_rank(self.site),
        )
        units = self._split_units()
        if self.shared.loaded.keeps_states:
            report = partial(self.shared.progress, f"{self.site}: running the frozen layers over the records")
            units.cache_frozen_states(self.shared.model, folder=self.shared.loaded.states_folder, told=report)
        units.cache_reference(self.shared.model)
        return units, work

    def _compute_noised_scores(
        self, plan: Plan, request: RoundRequest, adapter: Adapter, attempt: int, randomness: Randomness
    ) -> tuple[float, float]:
        """Compute the noised score and count of the held-out records, as fractions of the declared size."""
        adapter.load_into(self.shared.model)
        exact = compute_unit_scores(self.shared.model, self._heldout, pad_id=self.shared.tokenizer.pad_token_id)
        users = group_by_user(self.records.heldout) if plan.unit == "user" else None
        return release_scores(
            exact if users is None else compute_user_scores(exact, users),
            declared_size=self.declared_size * self.shared.config.data.heldout_fraction,
            noise_multiplier=plan.metrics_noise_multiplier,
            stream=randomness.stream(self.site, request.round, attempt, "scores"),
        )

    def fingerprint(self, key: bytes) -> str:
        """Compute the HMAC-SHA256 of the site's training records, in hex, under a secret key."""
        digest = hmac.new(key, digestmod="sha256")
        for record in self.records.training:
            digest.update(hashlib.sha256(record_key(record)).digest())
        return digest.hexdigest()


class WorkingSite(Site):
    """A site, simulated or real, that trains on its records with the model of its process."""

    def __init__(self, files: SiteFiles, ledger: SiteLedger, parties: Parties, *, members: Mapping[str, str]) -> None:
        super().__init__(ledger, sums=make_sums_at_site(files, parties, members=members))

    @abstractmethod
    def work(self, run: str) -> SiteWork:
        """Return the site's records for a prepared run, with the run's model."""

    def find_user_cohorts(self, request: RoundRequest) -> Mapping[str, int]:
        """Determine each user's cohort from the records.

        The caller has already checked policy and budget, and charges the round before sampling any record.
        """
        return self.work(request.run).find_user_cohorts()

    def train(
        self, request: RoundRequest, adapter: Adapter, attempt: int, admitted: Collection[str] | None = None
    ) -> TrainingResult:
        """Train on the site's records for a round that has already been charged."""
        key, state = self.ledger.fingerprint_key(), self.ledger.read_algorithm_state(request.run)
        work = self.work(request.run)
        return work.run_round(request, adapter, attempt, fingerprint_key=key, admitted=admitted, state=state)


def _read_state(data: bytes) -> Arrays:
    """Decode an algorithm's state. A missing or unreadable state is empty."""
    try:
        return Adapter.from_bytes(data).tensors if data else {}
    except AdapterError:
        return {}


def make_sums_at_site(files: SiteFiles, parties: Parties, *, members: Mapping[str, str]) -> SiteAggregator:
    """Create the site's party in secure aggregation.

    Args:
        files: files of the site; the confirmations in the protocol are stored next to the ledger.
        parties: protocol parties of the process.
        members: site -> public key of the other sites that the policy trusts.
    """
    trust, identity = files.policy.trust, files.load_key(make=True)
    return SiteAggregator(
        site=files.policy.site,
        identity=identity,
        parties=parties,
        demand=partial(require_terms, **trust.requirements),
        roster={**members, files.policy.site: identity.public},
        keep=make_promise_writer(files.ledger.with_name(files.ledger.name + PROMISES)),
    )


def make_randomness(seeded: bool, seed: int) -> Randomness:
    """Create the source of noise and sampling: the operating system or, in a marked study, a seeded generator."""
    return SeededRandomness(seed) if seeded else SystemRandomness()

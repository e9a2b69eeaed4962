"""Black-box attack: membership inference on artificial canary records from the final model's losses.

Also computes membership-inference baselines on real records, members against held-out records, with confidence
intervals.  They are not in `fedtune.evaluation`, because only an audit may read exact scores of private records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from fedtune.data import Record
from fedtune.evaluation.scoring import enter_evaluation_mode, iter_batches_by_length
from fedtune.lab.audit.guesses import Coins, Count, Place, Values, compute_centered_ranks, count_right_guesses
from fedtune.lab.audit.spec import AuditSpec
from fedtune.model.adapter import Adapter
from fedtune.privacy.randomness import RandomStream
from fedtune.report.facts import AuditHitRate, AuditMembership
from fedtune.sites.virtual_site import Participants
from fedtune.sites.work import make_randomness
from fedtune.tasks.inputs import get_input_for

FALSE_ALARMS = (0.01, 0.001)
_WORDS = 8  # number of random words per text: short enough to avoid truncation, long enough to be unique
_MIN_WORDS = 100
_LARGEST_LOSS = 1e30


@dataclass(frozen=True, kw_only=True)
class PlantedRecords:
    """A site's canaries and its real records."""

    canaries: list[Record]
    inserted: Coins  # (canaries,) whether the canary is in the training data
    members: list[Record]  # the site's real training records
    non_members: list[Record]  # the site's held-out records, selected by a keyed hash


def _compute_loss_drop(losses: Values) -> Values:
    """Compute (records,) loss before training minus loss after training, the log-likelihood ratio of the two models."""
    gain: Values = losses[0] - losses[1]
    return gain


class RecordAttack:
    """Black-box attack, which plants its canaries on construction.

    Args:
        everyone: the participants of the run, before their data is tokenized.
        spec: the audit's settings.
        sites: the sites that receive canaries.
    """

    def __init__(self, everyone: Participants, spec: AuditSpec, sites: Sequence[str]) -> None:
        self._everyone, self._spec = everyone, spec
        # Words that are tokens of the model.
        tokens = (token.strip("Ġ▁#") for token in everyone.shared.tokenizer.get_vocab())
        words = sorted({token for token in tokens if token.isascii() and token.isalpha() and len(token) > 2})
        self._words = words if len(words) >= _MIN_WORDS else [f"word{number}" for number in range(1000)]
        self.planted = {site: self._plant_records(site) for site in sites}
        self._losses: dict[str, list[Values]] = {}  # site -> result of `_compute_losses_before_and_after`

    def _plant_records(self, site: str) -> PlantedRecords:
        config, work = self._everyone.config, self._everyone.work[site]
        randomness = make_randomness(config.runtime.seeded_noise, config.seed)
        inserted = randomness.stream(site, "audit", "coins").bernoulli(self._spec.canaries, 0.5)
        texts = randomness.stream(site, "audit", "records")
        canaries = [self._generate_random_record(texts) for _ in range(self._spec.canaries)]
        chosen = [canary for canary, is_in in zip(canaries, inserted, strict=True) if is_in]
        members, non_members = list(work.records.training), list(work.records.heldout)
        records = replace(work.records, training=[*members, *chosen])
        self._everyone.work[site] = replace(work, records=records)
        return PlantedRecords(canaries=canaries, inserted=inserted, members=members, non_members=non_members)

    def _generate_random_record(self, stream: RandomStream) -> Record:
        """Generate a canary from random words and, if the task has declared labels, a random label."""
        config, data = self._everyone.config, self._everyone.config.data
        task = config.bound_task

        def draw_below(count: int) -> int:
            (draw,) = stream.uniform64(1)
            return int(draw % np.uint64(count))

        def text(role: str) -> str:
            chosen = task.dummy_field(role, data, draw=draw_below)
            chosen = chosen or get_input_for(data).generate_dummy_field(role, data, draw=draw_below)
            if chosen is not None:
                return chosen
            return " ".join(self._words[draw_below(len(self._words))] for _ in range(_WORDS))

        return Record({role: text(role) for role in task.columns(data)})

    def observe_steps(self) -> AbstractContextManager[None]:
        """Return an empty context: the attacker sees only the final model."""
        return nullcontext()

    def count_guesses(self, adapters: Sequence[Adapter]) -> Mapping[Place, Count]:
        """Count correct guesses per site and over all sites; also score the real records.

        Args:
            adapters: the initial adapter, and the aggregated adapter after each round.
        """
        self._losses = {
            site: self._compute_losses_before_and_after(planted, adapters) for site, planted in self.planted.items()
        }
        counts = dict[Place, Count]()
        for place, sites in [*((site, [site]) for site in self.planted), (None, [*self.planted])]:
            drops = np.concatenate([_compute_loss_drop(self._losses[site][0]) for site in sites])
            inserted = np.concatenate([self.planted[site].inserted for site in sites])
            guesses = (self._spec.guesses or self._spec.canaries) * len(sites)
            counts[place] = count_right_guesses(compute_centered_ranks(drops), inserted, guesses=guesses)
        return counts

    def measure_membership_baselines(self) -> tuple[AuditMembership, ...]:
        """Compute the membership baselines on real records, per site and over all sites; call `count_guesses` first."""
        by_site = list(self._losses.values())
        pooled = [np.concatenate(some, axis=1) for some in zip(*by_site, strict=True)]
        return tuple(
            self._measure_membership_baseline(site, score, members=losses[1], non_members=losses[2])
            for site, losses in [*self._losses.items(), (None, pooled)]
            if losses[1].size and losses[2].size
            for score in ("loss", "reference_ratio")
        )

    def _measure_membership_baseline(
        self, site: Place, score: Literal["loss", "reference_ratio"], *, members: Values, non_members: Values
    ) -> AuditMembership:
        groups = (members, non_members)
        members, others = (_compute_loss_drop(one) if score == "reference_ratio" else -one[1] for one in groups)
        area, low, high = estimate_auroc(members, others, confidence=self._spec.confidence)
        rates = []
        for share in FALSE_ALARMS:
            found = estimate_hit_rate(members, others, false_positive_rate=share, confidence=self._spec.confidence)
            rate, least, most = found or (None, None, None)
            rates.append(AuditHitRate(false_positive_rate=share, true_positive_rate=rate, low=least, high=most))
        return AuditMembership(
            site=site,
            score=score,
            members=len(members),
            non_members=len(others),
            auroc=area,
            auroc_low=low,
            auroc_high=high,
            hit_rates=tuple(rates),
        )

    def _compute_losses_before_and_after(self, planted: PlantedRecords, adapters: Sequence[Adapter]) -> list[Values]:
        """Compute losses (2, records) before and after training for canaries, training records and held-out records."""
        groups = (planted.canaries, planted.members, planted.non_members)
        ends = adapters[0], adapters[-1]
        losses = [[self._record_losses(some, adapter) for some in groups] for adapter in ends]
        return list(map(np.stack, zip(*losses, strict=True)))

    def _record_losses(self, records: Sequence[Record], adapter: Adapter) -> Values:
        if not records:
            return np.zeros(0)
        losses = np.zeros(len(records))
        shared, evaluation = self._everyone.shared, self._everyone.config.evaluation
        adapter.load_into(shared.model)
        examples = shared.tokenize_records(records)
        pad_id = shared.tokenizer.pad_token_id
        with enter_evaluation_mode(shared.model):
            for places, batch in iter_batches_by_length(examples, pad_id=pad_id, max_tokens=evaluation.max_tokens):
                losses[places] = shared.model.losses(batch.to(shared.device)).double().cpu().numpy()
        # A diverged model gives NaN for some records; the attack treats them as the largest loss.
        return np.where(np.isfinite(losses), losses, _LARGEST_LOSS)


def estimate_auroc(members: Values, others: Values, *, confidence: float) -> tuple[float, float, float]:
    """Estimate the AUROC, the probability that a member scores above a non-member (ties count half), with an interval.

    The interval is a normal approximation with DeLong's variance (DeLong, DeLong and Clarke-Pearson 1988).

    Returns:
        (estimate, low, high).
    """
    both = np.sort(others), np.sort(members)
    of_members = (np.searchsorted(both[0], members, "left") + np.searchsorted(both[0], members, "right")) / 2
    of_others = (np.searchsorted(both[1], others, "left") + np.searchsorted(both[1], others, "right")) / 2
    area = float(of_members.mean() / len(others))
    placements = (of_members / len(others), of_others / len(members))
    variance = sum(float(one.var(ddof=1) / len(one)) if len(one) > 1 else 0.25 for one in placements)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return area, max(0.0, area - reach), min(1.0, area + reach)


def estimate_hit_rate(
    members: Values, others: Values, *, false_positive_rate: float, confidence: float
) -> tuple[float, float, float] | None:
    """Estimate the true positive rate at a false positive rate of at most `false_positive_rate`, with an interval.

    The Clopper-Pearson interval for the members treats the threshold, which is measured on the non-members, as fixed.

    Returns:
        (estimate, low, high); None if there are fewer than 1 / false_positive_rate non-members.
    """
    allowed = math.floor(false_positive_rate * len(others) + 1e-9)
    if allowed < 1:
        return None
    threshold = np.sort(others)[-allowed - 1] if allowed < len(others) else -np.inf
    return estimate_share(int((members > threshold).sum()), len(members), confidence=confidence)


def estimate_share(found: int, tried: int, *, confidence: float) -> tuple[float, float, float]:
    """Estimate a proportion from independent trials; return (estimate, low, high) with a Clopper-Pearson interval."""
    interval = binomtest(found, tried).proportion_ci(confidence, method="exact")
    return found / tried, float(interval.low), float(interval.high)

"""A run's plan: every parameter that determines its privacy cost, fixed before any private data is read."""

from __future__ import annotations

import dataclasses

from fedtune.codec import decode, hash_json, require
from fedtune.privacy import accountant, events
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.distributed_noise import (
    USUAL_BOUND,
    DistributedNoise,
    Epsilons,
    SecureAggregationSpec,
    compute_epsilons_by_adversary,
)
from fedtune.privacy.dp_library import ComposedDpEvent, DpEvent, GaussianDpEvent, LaplaceDpEvent, SelfComposedDpEvent
from fedtune.privacy.mechanism import MAX_RUNS, MIN_CLIP_NORM, MIN_SAMPLING_RATE, Noise, PrivacySpec, Unit
from fedtune.spec import ConfigError, check_at_least, check_at_most, check_fraction, check_whole, spec

_ONLY_WITH = {"shared": "secure aggregation", "cohorts": "arrivals", "runs": "further runs", "noise": "Laplace"}
MORE_THAN_DECLARED = 4.0  # bound on actual over declared units; most sites publish a rounded number


@spec
class Plan:
    """The privacy mechanisms of one federated run at a site, or of the site's own release.

    Attributes:
        unit: the privacy unit.
        delta: the delta of every epsilon of the run.
        sampling_rate: probability with which each unit joins a step.
        noise_multiplier: standard deviation of the site's own noise, divided by the clip norm; 0 in a run without
            privacy.
        max_grad_norm: clip norm C.
        local_steps: number of noisy steps per round.
        num_rounds: planned number of rounds.
        spare_rounds: additional rounds in the budget, for retries of interrupted rounds.
        metrics_noise_multiplier: noise multiplier of each round's held-out scores (`mechanism.release_scores`); 0: no
            scores are released.
        records_per_user: maximum number of records of one unit in a step. The unit's clipped mean has at most the clip
            norm for any number of records, so no epsilon depends on it; a site's policy may still limit it.
        shared: parameters of distributed noise in secure aggregation; each round is then one sum, with one clipped
            gradient sum from each site. None: each site adds the complete noise itself.
        cohorts: the arrival cohorts that the run admits and charges; None: everybody, in a population without arrivals.
        runs: number of runs like this one that may use the same person's records; the noise is calibrated to the
            epsilon of their composition.
        noise: noise distribution; "laplace" only for a site's own release, where the noise multiplier is the scale
            divided by the L1 sensitivity.
    """

    unit: Unit
    delta: float
    sampling_rate: float
    noise_multiplier: float
    max_grad_norm: float
    local_steps: int
    num_rounds: int
    spare_rounds: int = 0
    metrics_noise_multiplier: float = 0.0
    records_per_user: int = 1
    shared: DistributedNoise | None = None
    cohorts: Cohorts | None = None
    runs: int = 1
    noise: Noise = "gaussian"

    def __post_init__(self) -> None:
        # A plan may come from a server's request, so every field is checked.
        check_fraction("sampling_rate", self.sampling_rate, one=True)
        # Limits within which the accounting is computable.
        check_at_least("sampling_rate", self.sampling_rate, MIN_SAMPLING_RATE)
        for name in ("noise_multiplier", "metrics_noise_multiplier"):
            accountant.check_noise(name, getattr(self, name), none=True)
        check_at_least("max_grad_norm", self.max_grad_norm, MIN_CLIP_NORM)  # its inverse is finite
        for name in ("local_steps", "num_rounds", "spare_rounds", "records_per_user", "runs"):
            check_whole(name, count := getattr(self, name))
            check_at_least(name, count, 0 if name == "spare_rounds" else 1)
        check_at_most("runs", self.runs, MAX_RUNS)
        accountant.check_delta("delta", self.delta, steps=self.local_steps * self.max_rounds * self.runs)
        by_user, most = self.unit == "user", self.records_per_user
        require("records_per_user", most, by_user or most == 1, "must be 1 for unit 'record'")
        require("cohorts", str(self.cohorts), by_user or self.cohorts is None, "must be omitted for unit 'record'")
        right = self.noise == "gaussian" or (self.sampling_rate == 1 and self.private and self.shared is None)
        require("noise", self.noise, right, "must be gaussian if units are sampled or noise is shared")
        if self.shared is not None:
            noise, share = self.noise_multiplier, self.shared.noise_multiplier
            require(
                "noise_multiplier", noise, noise == share, f"must equal the noise multiplier of one share, {share:g}"
            )
            bound = "must be 1 with secure aggregation: only a site's own noise would protect its local steps"
            require("local_steps", self.local_steps, self.local_steps == 1, bound)
        for name in ("delta", "sampling_rate", "noise_multiplier", "max_grad_norm", "metrics_noise_multiplier"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)  # 1 and -0.0 would change the digest

    @classmethod
    def from_privacy(
        cls,
        privacy: PrivacySpec,
        *,
        local_steps: int,
        num_rounds: int,
        spare_rounds: int = 0,
        together: SecureAggregationSpec | None = None,
        bound: int = USUAL_BOUND,
    ) -> Plan:
        """Create the plan of a run, and calibrate a missing noise multiplier.

        The calibration covers all rounds, spare rounds and planned runs.

        Args:
            privacy: the privacy settings of the run.
            local_steps: number of noisy steps per round.
            num_rounds: planned number of rounds.
            spare_rounds: additional rounds in the budget, for retries.
            together: the parameters of secure aggregation; an explicit noise multiplier then applies to one share.
                None: no secure aggregation.
            bound: largest absolute value in a site's sum under secure aggregation, in clip norms.

        Raises:
            ConfigError: a value is out of range, or no noise multiplier reaches the target epsilon.
        """
        most = privacy.planned_runs * (num_rounds + spare_rounds)
        noise = privacy.noise_multiplier
        accountant.check_delta("privacy.delta", privacy.delta, steps=local_steps * most)
        if not privacy.private:
            noise = 0.0
        elif noise is None:
            noise = accountant.calibrate_noise(
                epsilon=privacy.epsilon,
                delta=privacy.delta,
                sampling_rate=privacy.sampling_rate,
                steps=local_steps * most,
                also=build_score_events(privacy.metrics_noise, most),
            )
            noise = noise if together is None else together.compute_share_for_total(noise)
        return cls(
            unit=privacy.unit,
            delta=privacy.delta,
            sampling_rate=privacy.sampling_rate,
            noise_multiplier=noise,
            max_grad_norm=privacy.max_grad_norm,
            local_steps=local_steps,
            num_rounds=num_rounds,
            spare_rounds=spare_rounds,
            metrics_noise_multiplier=privacy.metrics_noise,
            records_per_user=privacy.contribution,
            shared=None if together is None else together.with_share(noise, bound=bound),
            cohorts=privacy.cohorts,
            runs=privacy.planned_runs,
        )

    @property
    def private(self) -> bool:
        """Whether training adds noise. Without noise there is no guarantee."""
        return self.noise_multiplier > 0

    @property
    def releases_metrics(self) -> bool:
        """Whether each round also releases noised scores of held-out units."""
        return self.metrics_noise_multiplier > 0

    @property
    def max_rounds(self) -> int:
        """Maximum number of rounds that a site may be charged for, retries included."""
        return self.num_rounds + self.spare_rounds

    @property
    def full_event(self) -> DpEvent:
        """Privacy event of all rounds that may be charged."""
        return self.event(rounds=self.max_rounds)

    @property
    def all_runs_event(self) -> DpEvent:
        """Privacy event of all planned runs together, for whose epsilon the noise was calibrated."""
        return self.event(rounds=self.max_rounds * self.runs)

    @property
    def noise_multipliers(self) -> tuple[float, ...]:
        """All noise multipliers in the accounting: for training and, if scores are released, for the scores."""
        return (self.accounted_noise, self.metrics_noise_multiplier)[: 1 + self.releases_metrics]

    @property
    def secure_noise(self) -> DistributedNoise:
        """Parameters of distributed noise. Must be read only if the plan uses secure aggregation."""
        assert self.shared is not None, "the plan does not use secure aggregation"
        return self.shared

    @property
    def accounted_noise(self) -> float:
        """Noise multiplier that the accounting uses.

        With secure aggregation, it is the noise of the fewest honest shares in any allowed sum.
        """
        return self.noise_multiplier if self.shared is None else self.shared.smallest_honest_noise

    def with_noise(self, noise_multiplier: float) -> Plan:
        """Return a copy of the plan with another noise multiplier.

        In secure aggregation, it is the multiplier of one share.
        """
        shared = None if self.shared is None else self.shared.with_share(noise_multiplier, bound=self.shared.bound)
        return dataclasses.replace(self, noise_multiplier=noise_multiplier, shared=shared)

    @property
    def with_own_noise_only(self) -> Plan:
        """The plan with only the site's own noise share, as if all other sites colluded."""
        return dataclasses.replace(self, shared=None)

    def compute_epsilons_by_trust(self, rounds: int) -> Epsilons | None:
        """Compute the epsilon of `rounds` rounds against each adversary. None without secure aggregation.

        Each sum is assumed to have the minimum number of sites.
        """
        if self.shared is None:
            return None
        return compute_epsilons_by_adversary(
            self.shared,
            survivors={self.shared.threshold: rounds},
            sampling_rate=self.sampling_rate,
            delta=self.delta,
            also=build_score_events(self.metrics_noise_multiplier, rounds),
        )

    def event(self, *, rounds: int = 1) -> DpEvent:
        """Build the privacy event of `rounds` rounds of this plan, released scores included.

        Guarantee: under add-or-remove-one-unit adjacency. Secure aggregation counts as a sum over the smallest number
        of sites that the plan allows, minus its colluders: a sum over more sites reveals less
        (`fedtune.privacy.distributed_noise`).
        """
        training = events.build_dp_sgd_event(
            sampling_rate=self.sampling_rate, noise_multiplier=self.accounted_noise, steps=self.local_steps * rounds
        )
        if self.noise == "laplace":
            training = SelfComposedDpEvent(LaplaceDpEvent(self.noise_multiplier), self.local_steps * rounds)
        scores = build_score_events(self.metrics_noise_multiplier, rounds)
        return ComposedDpEvent((training, *scores)) if scores else training  # a tuple: events are counted, so hashed

    def to_json(self) -> dict[str, object]:
        """Return the canonical JSON object that `digest` hashes, without defaults and inapplicable fields."""
        fields = dataclasses.asdict(self)
        if self.unit == "record":
            del fields["records_per_user"]
        for key, usual in (("shared", None), ("cohorts", None), ("runs", 1), ("noise", "gaussian")):
            if fields[key] == usual:
                del fields[key]
        return fields

    @classmethod
    def from_json(cls, fields: object) -> Plan:
        """Decode the output of `to_json`.

        Raises:
            ConfigError: the fields are not a valid plan, or contain a field that `to_json` omits.
        """
        plan = decode(cls, fields)
        for key, without in _ONLY_WITH.items():
            if isinstance(fields, dict) and key in fields and key not in plan.to_json():
                # the encoding of a plan is unique
                raise ConfigError(key, fields[key], f"is only allowed with {without}")
        return plan

    def digest(self) -> str:
        """Return the SHA-256 of the plan's canonical JSON, in hex."""
        return hash_json(self.to_json())


def build_score_events(noise_multiplier: float, rounds: int) -> list[DpEvent]:
    """Build the privacy events of the noised held-out scores that `rounds` rounds release."""
    return [SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), rounds)] if noise_multiplier > 0 and rounds else []

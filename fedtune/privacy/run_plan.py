"""The plan of a run: every number that decides what its releases cost, fixed before anything private is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, SelfComposedDpEvent

from fedtune.codec import decode, require
from fedtune.privacy import accountant, events
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.distributed_noise import USUAL_BOUND, Epsilons, SharedNoise, Together, epsilons
from fedtune.privacy.mechanism import LEAST_SAMPLING_RATE, MOST_RUNS, PrivacySpec, Unit
from fedtune.spec import ConfigError, check_at_least, check_at_most, check_fraction, check_positive, check_whole, spec

MORE_THAN_DECLARED = 4.0  # a site may have this many times the units that it declares; most publish a rounded number


@spec
class Plan:
    """The mechanisms that a site will run for one federated training.

    Attributes:
        unit: the privacy unit.
        delta: at which epsilon is stated.
        sampling_rate: probability with which each unit joins a step.
        noise_multiplier: noise standard deviation over clip norm that the site itself adds; 0 in a run without privacy.
        max_grad_norm: clip norm C.
        local_steps: noisy steps in a round.
        num_rounds: rounds that the run is meant to take.
        spare_rounds: further rounds that are paid for beforehand, for retries of interrupted rounds.
        metrics_noise_multiplier: noise of each round's held-out scores, as in `mechanism.noised_scores`; 0: a site
            releases none.
        records_per_user: most records of one unit in a step.  Its clipped mean has the clip norm however many they
            are, so no epsilon depends on it; a site may bound it all the same.
        shared: how sites make the noise of a secure sum together; each round is then one sum, of one clipped gradient
            sum of each site.  None: each site has noise of its own.
        cohorts: whom the run admits, and charges; None: everybody, in a population whose people have no arrivals.
        runs: how many runs like this one may use the same person's records; the noise is for the epsilon of them all.
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
    shared: SharedNoise | None = None
    cohorts: Cohorts | None = None
    runs: int = 1

    def __post_init__(self) -> None:
        # A plan also comes from a server's request: nothing about it is taken on trust.
        check_fraction("sampling_rate", self.sampling_rate, one=True)
        # Within these, accounting can be computed; no sensible plan is outside.
        check_at_least("sampling_rate", self.sampling_rate, LEAST_SAMPLING_RATE)
        for name in ("noise_multiplier", "metrics_noise_multiplier"):
            accountant.check_noise(name, getattr(self, name), none=True)
        check_positive("max_grad_norm", self.max_grad_norm)
        for name in ("local_steps", "num_rounds", "spare_rounds", "records_per_user", "runs"):
            check_whole(name, count := getattr(self, name))
            check_at_least(name, count, 0 if name == "spare_rounds" else 1)
        check_at_most("runs", self.runs, MOST_RUNS)
        accountant.check_delta("delta", self.delta, steps=self.local_steps * self.most_rounds * self.runs)
        by_user, most = self.unit == "user", self.records_per_user
        require("records_per_user", most, by_user or most == 1, "must be 1 for unit 'record'")
        require("cohorts", str(self.cohorts), by_user or self.cohorts is None, "must be left out for unit 'record'")
        if self.shared is not None:
            noise, share = self.noise_multiplier, self.shared.noise_multiplier
            require("noise_multiplier", noise, noise == share, f"must be that of a share of the noise, {share:g}")
            bound = "must be 1 with a secure sum: what a site steps on by itself is hidden by its own noise alone"
            require("local_steps", self.local_steps, self.local_steps == 1, bound)
        for name in ("delta", "sampling_rate", "noise_multiplier", "max_grad_norm", "metrics_noise_multiplier"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)  # 1 and -0.0 would have other digests

    @classmethod
    def of(
        cls,
        privacy: PrivacySpec,
        *,
        local_steps: int,
        num_rounds: int,
        spare_rounds: int = 0,
        together: Together | None = None,
        bound: int = USUAL_BOUND,
    ) -> Plan:
        """The plan of a run, with noise calibrated once for all its rounds, spare ones included, and those of `runs`.

        `together` says who makes the noise of a secure sum, and `bound` how large a value of a site's may be there, in
        clip norms; a noise multiplier that is given is then each site's share.
        """
        most = privacy.runs * (num_rounds + spare_rounds)
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
                also=scores_of(privacy.metrics_noise, most),
            )
            noise = noise if together is None else together.share_of(noise)
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
            runs=privacy.runs,
        )

    @property
    def private(self) -> bool:
        """The plan adds noise to training; without it nothing is promised."""
        return self.noise_multiplier > 0

    @property
    def releases_metrics(self) -> bool:
        """Each round also releases noised scores of held-out units."""
        return self.metrics_noise_multiplier > 0

    @property
    def most_rounds(self) -> int:
        """Rounds that a site may be charged for, retries included."""
        return self.num_rounds + self.spare_rounds

    @property
    def whole(self) -> DpEvent:
        """All rounds that may be charged, as one event."""
        return self.event(rounds=self.most_rounds)

    @property
    def of_all_runs(self) -> DpEvent:
        """The same of all `runs`: what the epsilon is for that the noise was calibrated to."""
        return self.event(rounds=self.most_rounds * self.runs)

    @property
    def noises(self) -> tuple[float, ...]:
        """Every noise multiplier that the plan counts with."""
        return (self.counted_noise, self.metrics_noise_multiplier)[: 1 + self.releases_metrics]

    @property
    def sums(self) -> SharedNoise:
        """`shared`, of a plan that is known to have secure sums."""
        assert self.shared is not None, "a plan of secure sums"
        return self.shared

    @property
    def counted_noise(self) -> float:
        """Noise multiplier that each step counts with: the site's own; of a secure sum, that of the fewest shares."""
        return self.noise_multiplier if self.shared is None else self.shared.noise_of_fewest

    def with_noise(self, noise_multiplier: float) -> Plan:
        """The same with another noise multiplier; of a secure sum, with another share."""
        shared = None if self.shared is None else self.shared.with_share(noise_multiplier, bound=self.shared.bound)
        return dataclasses.replace(self, noise_multiplier=noise_multiplier, shared=shared)

    @property
    def by_own_noise_alone(self) -> Plan:
        """The same where nothing but the site's own share hides it: what a run costs if all other sites collude."""
        return dataclasses.replace(self, shared=None)

    def by_trust(self, rounds: int) -> Epsilons | None:
        """Epsilon of `rounds` rounds by who looks, of the smallest sums; None: each site makes its own noise."""
        if self.shared is None:
            return None
        return epsilons(
            self.shared,
            survivors={self.shared.threshold: rounds},
            sampling_rate=self.sampling_rate,
            delta=self.delta,
            also=scores_of(self.metrics_noise_multiplier, rounds),
        )

    def event(self, *, rounds: int = 1) -> DpEvent:
        """The privacy event of `rounds` rounds of this plan, released scores included; one unit more or less.

        A secure sum counts as one of the fewest sites that the plan allows, less its colluders: of more it tells less
        (`fedtune.privacy.distributed_noise`).
        """
        training = events.dp_sgd(
            sampling_rate=self.sampling_rate, noise_multiplier=self.counted_noise, steps=self.local_steps * rounds
        )
        scores = scores_of(self.metrics_noise_multiplier, rounds)
        return ComposedDpEvent((training, *scores)) if scores else training  # a tuple: events are counted, so hashed

    def to_json(self) -> dict[str, object]:
        """Plain JSON, the canonical form that `digest` hashes: without what is None or usual, or only users have."""
        fields = dataclasses.asdict(self)
        if self.unit == "record":
            del fields["records_per_user"]
        for key, usual in (("shared", None), ("cohorts", None), ("runs", 1)):
            if fields[key] == usual:
                del fields[key]
        return fields

    @classmethod
    def from_json(cls, fields: object) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ConfigError: anything else.
        """
        plan = decode(cls, fields)
        for key, without in (("shared", "secure sums"), ("cohorts", "arrivals"), ("runs", "others to come")):
            if isinstance(fields, dict) and key in fields and key not in plan.to_json():
                raise ConfigError(key, fields[key], f"must be left out without {without}")  # a plan has one spelling
        return plan

    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def scores_of(noise_multiplier: float, rounds: int) -> list[DpEvent]:
    """The scores that `rounds` rounds release; held-out records are charged like those trained on."""
    return [SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), rounds)] if noise_multiplier > 0 and rounds else []

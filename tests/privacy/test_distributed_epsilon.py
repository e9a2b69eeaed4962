"""The privacy cost of a sum with shared noise against exact distributions; invalid credits against attacks on them."""

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent
from scipy import stats

from fedtune.privacy import accountant, events
from fedtune.privacy.accountant import FINE, calibrate_noise, compose_pld, epsilon_pld
from fedtune.privacy.distributed_noise import (
    DistributedNoise,
    SecureAggregationSpec,
    add_noise_share,
    build_secure_aggregation_event,
    combine_noise_shares,
    compute_epsilons_by_adversary,
)
from fedtune.privacy.loss_distribution import Composition
from fedtune.privacy.mechanism import GRID_BITS
from fedtune.privacy.randomness import SeededRandomness

from . import exact_sums

CLIP_NORM = 2**GRID_BITS
DELTA = 1e-5


def make_shared(noise: float, sites: int, *, threshold: int | None = None, colluders: int = 0) -> DistributedNoise:
    return SecureAggregationSpec(num_sites=sites, threshold=threshold or sites, colluders=colluders).with_share(
        noise, bound=1000
    )


def compute_claimed_delta(event: DpEvent, epsilon: float, *, times: int = 1) -> float:
    """Compute the accountant's delta for `times` compositions of `event`."""
    return compose_times(event, times).delta(epsilon)


@lru_cache(maxsize=64)
def compose_times(event: DpEvent, times: int) -> Composition:
    return compose_pld(tuple(events.count_mechanisms({event: times}).items()), FINE)


# Exact distributions of the released values, in one and two dimensions, compared with the charge.

CELLS = 8.0
"""Standard deviation of a noise share, in the widest cells that are allowed."""


def compute_value_outcomes(contribution: float, others: list[float]) -> exact_sums.Values:
    """Compute probabilities of one value of a sum, for a site's contribution and arbitrary contributions of others."""
    return exact_sums.compute_sum_outcomes([contribution, *others], CELLS, most=110)


@pytest.mark.parametrize("rate", [1.0, 0.3, 0.05])
@pytest.mark.parametrize(("honest", "clip_norm"), [(1, 8.0), (2, 16.0), (4, 16.0), (5, 11.0)])
def test_charge_of_one_release_tightly_bounds_the_exact_delta(rate: float, honest: int, clip_norm: float) -> None:
    event = build_secure_aggregation_event(sampling_rate=rate, noise_multiplier=CELLS / clip_norm, honest=honest)
    others = [0.0, 3.0, -7.0, 2.0][: honest - 1]
    # Rounding follows the noise, so a sum before it need not be an integer.
    without_unit, with_unit = (compute_value_outcomes(contribution, others) for contribution in (0.4, 0.4 + clip_norm))
    taking_part = exact_sums.sample_outcomes(with_unit, without_unit, rate)
    for epsilon in (0.0, 0.1, 0.5, 1.0, 2.0):
        exact = exact_sums.compute_delta(epsilon, taking_part, without_unit)
        claimed = compute_claimed_delta(event, epsilon)
        assert exact <= claimed + 1e-12
        # Rounding adds 1/768 to each share's variance.
        assert exact >= 0.97 * claimed - 1e-9, "the charge must be tight"


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.6, 0.8), (-math.sqrt(0.5), math.sqrt(0.5))])
def test_values_of_one_unit_are_charged_by_their_joint_norm(rate: float, direction: tuple[float, float]) -> None:
    honest, clip_norm = 2, 16.0
    event = build_secure_aggregation_event(sampling_rate=rate, noise_multiplier=CELLS / clip_norm, honest=honest)
    absent = exact_sums.join_outcomes(*(compute_value_outcomes(0.0, [4.0]) for _ in direction))
    with_unit = exact_sums.join_outcomes(*(compute_value_outcomes(clip_norm * part, [4.0]) for part in direction))
    taking_part = exact_sums.sample_outcomes(with_unit, absent, rate)
    for epsilon in (0.1, 1.0, 2.0):
        exact, claimed = exact_sums.compute_delta(epsilon, taking_part, absent), compute_claimed_delta(event, epsilon)
        assert 0.97 * claimed - 1e-9 <= exact <= claimed + 1e-12
    too_long = exact_sums.join_outcomes(*(compute_value_outcomes(1.1 * clip_norm * part, [4.0]) for part in direction))
    assert exact_sums.compute_delta(
        1.0, exact_sums.sample_outcomes(too_long, absent, rate), absent
    ) > compute_claimed_delta(event, 1.0)


def test_two_releases_are_charged_as_a_composition() -> None:
    rate, honest, clip_norm = 0.3, 3, 16.0
    event = build_secure_aggregation_event(sampling_rate=rate, noise_multiplier=CELLS / clip_norm, honest=honest)
    absent, with_unit = compute_value_outcomes(0.0, [1.0, 2.0]), compute_value_outcomes(clip_norm, [1.0, 2.0])
    once = exact_sums.sample_outcomes(with_unit, absent, rate)
    twice, never = exact_sums.join_outcomes(once, once), exact_sums.join_outcomes(absent, absent)
    for epsilon in (0.1, 0.5, 1.0):
        exact, claimed = exact_sums.compute_delta(epsilon, twice, never), compute_claimed_delta(event, epsilon, times=2)
        assert 0.96 * claimed - 1e-9 <= exact <= claimed + 1e-12


def test_noise_shares_smaller_than_a_cell_are_refused() -> None:
    """With continuous noise that each site rounds, a share of a fifth of a cell is lost, however many sites add one."""
    for sites, deviation in ((25, 0.2), (100, 0.1)):
        assert deviation * math.sqrt(sites) == pytest.approx(1.0)
        without_unit, with_unit = (
            exact_sums.compute_sum_outcomes([contribution] + [0.0] * (sites - 1), deviation, most=6)
            for contribution in (0.0, 1.0)
        )
        event = build_secure_aggregation_event(sampling_rate=1.0, noise_multiplier=deviation, honest=sites)
        assert exact_sums.compute_delta(1.0, with_unit, without_unit) > 2.5 * compute_claimed_delta(event, 1.0)
        # The claim would hold only for noise that the server rounds once.
        one_round = [exact_sums.compute_site_outcomes(contribution, 1.0, most=30) for contribution in (0.0, 1.0)]
        assert exact_sums.compute_delta(1.0, *one_round) <= compute_claimed_delta(event, 1.0)
        with pytest.raises(ValueError, match="rounding removes the noise shares"):
            DistributedNoise(
                num_sites=sites, threshold=sites, colluders=0, noise_multiplier=deviation, cell_bits=0, bound=10
            )


@pytest.mark.parametrize(
    ("share", "by_honest"),
    [
        (0.6, {1: 7.43, 2: 2.68, 4: 1.30, 8: 0.77, 16: 0.50}),
        (0.8, {1: 3.14, 2: 1.44, 4: 0.84, 8: 0.53, 16: 0.35}),
        (1.0, {1: 1.83, 2: 1.00, 4: 0.62, 8: 0.41, 16: 0.28}),
        (1 / math.sqrt(5), {1: 19.2, 2: 6.30, 3: 3.44, 4: 2.35, 5: 1.83}),  # five sites, some of which drop out
    ],
)
def test_epsilon_for_honest_sites_matches_reference_values(share: float, by_honest: dict[int, float]) -> None:
    """Sampling rate 0.01, 1000 releases, delta 1e-5."""
    for honest, epsilon in by_honest.items():
        event = build_secure_aggregation_event(sampling_rate=0.01, noise_multiplier=share, honest=honest)
        assert epsilon_pld({event: 1000}, DELTA) == pytest.approx(epsilon, abs=0.011 if epsilon < 10 else 0.06)


@pytest.mark.parametrize(
    ("target", "local_noise_costs", "all_others"), [(8.0, 3.17, 24.7), (3.0, 1.32, 7.5), (1.0, 0.46, 2.2)]
)
def test_epsilons_for_four_sites_match_reference_values(
    target: float, local_noise_costs: float, all_others: float
) -> None:
    """Sampling rate 0.3, 50 releases, no dropouts; the server alone, and all other sites against one."""
    total = calibrate_noise(epsilon=target, delta=DELTA, sampling_rate=0.3, steps=50)
    share = SecureAggregationSpec(num_sites=4, threshold=4, colluders=0).compute_share_for_total(total)
    epsilons = compute_epsilons_by_adversary(make_shared(share, 4), survivors={4: 50}, sampling_rate=0.3, delta=DELTA)
    assert 0.998 * target < epsilons.server_alone <= target
    assert epsilons.with_colluders == epsilons.server_alone, "without colluders these must be equal"
    assert epsilons.with_all_others == pytest.approx(all_others, abs=0.06)
    # The noise that each of four banks adds without secure aggregation.
    today = build_secure_aggregation_event(sampling_rate=0.3, noise_multiplier=total, honest=4)
    assert epsilon_pld({today: 50}, DELTA) == pytest.approx(local_noise_costs, abs=0.006)


# The three figures, and the charge for a release.


def compute_figures(survivors: dict[int, int], also: Sequence[DpEvent] = ()) -> Any:
    plan = make_shared(0.7, 6, threshold=4, colluders=1)
    return compute_epsilons_by_adversary(plan, survivors=survivors, sampling_rate=0.2, delta=DELTA, also=also)


def cache_epsilons(*honest: int) -> float:
    """Compute the epsilon of one release for each number of honest shares."""
    per_round = [PoissonSampledDpEvent(0.2, GaussianDpEvent(math.sqrt(0.7**2 * number))) for number in honest]
    return epsilon_pld(per_round, DELTA, interval=accountant.COARSE)


def test_each_epsilon_counts_only_the_noise_of_honest_sites() -> None:
    found = compute_figures({6: 2, 5: 1, 4: 3})
    expected = cache_epsilons(6, 6, 5, 4, 4, 4), cache_epsilons(5, 5, 4, 3, 3, 3), cache_epsilons(1, 1, 1, 1, 1, 1)
    assert (found.server_alone, found.with_colluders, found.with_all_others) == pytest.approx(expected, rel=1e-6)
    assert found.server_alone < found.with_colluders < found.with_all_others


def test_releases_with_fewer_survivors_are_charged_more() -> None:
    spent = [compute_figures({number: 6}).with_colluders for number in (6, 5, 4, 3, 2, 1)]
    assert spent[:5] == sorted(set(spent[:5]))
    assert spent[4] == spent[5], "a site's own share always counts"
    # The plan's figure is that of the threshold, and holds for any larger number of survivors.
    assert compute_figures({6: 1, 5: 3, 4: 2}).with_colluders < compute_figures({4: 6}).with_colluders


def test_local_score_releases_raise_every_epsilon() -> None:
    scores = GaussianDpEvent(3.0)
    with_scores, without_unit = compute_figures({5: 4}, also=[scores, scores]), compute_figures({5: 4})
    for field in dataclasses.fields(without_unit):
        assert getattr(with_scores, field.name) > getattr(without_unit, field.name) + 0.1


# Invalid credits.


def attack_two_steps(sites: int, trials: int, *, unit: bool, threshold: float) -> float:
    """Return how often a sum of two local steps reveals the unit: the second step amplifies the result of the first.

    The unit adds one clip norm to its site's first sum; the site's other records add a hundred to the second, up or
    down, depending on which side of one half the site's hidden state is.
    """
    plan = dataclasses.replace(make_shared(1 / math.sqrt(sites), sites), cell_bits=GRID_BITS)
    randomness = SeededRandomness(3)

    def take_step(site: int, number: int, sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return add_noise_share({"a": sums}, plan, randomness.stream(site, number, str(unit)))["a"]

    no_noise = np.zeros(trials, dtype=np.int64)
    state = take_step(0, 1, no_noise + CLIP_NORM * unit)
    total = state + take_step(0, 2, np.where(state > CLIP_NORM / 2, 100, -100) * CLIP_NORM)
    for site in range(1, sites):
        total = total + take_step(site, 1, no_noise) + take_step(site, 2, no_noise)
    return float((total > threshold * CLIP_NORM).mean())


@pytest.mark.parametrize(("sites", "hit", "most"), [(10, 0.943, 0.434), (5, 0.868, 0.617)])
def test_multiple_local_steps_get_no_credit_for_noise_of_other_sites(sites: int, hit: float, most: float) -> None:
    trials = 20_000
    found, false_alarm = (attack_two_steps(sites, trials, unit=unit, threshold=0.0) for unit in (True, False))
    assert found == pytest.approx(hit, abs=0.01)
    assert false_alarm == pytest.approx(1 - hit, abs=0.01)

    def is_refuted(event: DpEvent) -> bool:
        return any(
            found - math.exp(epsilon) * false_alarm > compute_claimed_delta(event, epsilon) + 0.02
            for epsilon in np.linspace(0, 3, 13)
        )

    share = 1 / math.sqrt(sites)
    credited = build_secure_aggregation_event(sampling_rate=1.0, noise_multiplier=share, honest=sites)
    two_credited = events.build_dp_sgd_event(
        sampling_rate=1.0, noise_multiplier=combine_noise_shares(share, sites), steps=2
    )
    assert events.count_mechanisms([credited, credited]) == events.count_mechanisms([two_credited])
    assert is_refuted(two_credited), "the attack must refute a credit for two local steps"
    # Two Gaussian mechanisms of noise 1 allow at most this much at the attack's false positive rate.
    assert stats.norm.cdf(math.sqrt(2) + stats.norm.ppf(1 - hit)) == pytest.approx(most, abs=0.002)
    own_shares = events.build_dp_sgd_event(sampling_rate=1.0, noise_multiplier=share, steps=2)
    assert not is_refuted(own_shares), "without the credit the claim must hold"


def test_clipping_a_whole_site_sum_halves_the_noise_per_record() -> None:
    """Silo-level clipping to R: one record can move a site's sum between opposite ends, at distance 2 R."""
    records = np.full((9, 2), [0.02, 0.0])
    joining = np.array([[-1.0, 0.0]])

    def clip_whole_sum(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        total = 100 * rows.sum(axis=0)  # a site's update, much longer than R
        return np.trunc(total / max(float(np.linalg.norm(total)), 1.0) * CLIP_NORM).astype(np.int64)

    distance = np.linalg.norm(clip_whole_sum(np.concatenate([records, joining])) - clip_whole_sum(records)) / CLIP_NORM
    assert distance == pytest.approx(2.0, abs=1e-6)
    # The attacker looks at the sign of the sum; noise of 1.5 R, four sites.
    noise = 1.5
    epsilons, false_alarm = stats.norm.cdf(distance / 2 / noise), stats.norm.cdf(-distance / 2 / noise)
    event = build_secure_aggregation_event(sampling_rate=1.0, noise_multiplier=noise / 2, honest=4)
    half_noise = build_secure_aggregation_event(sampling_rate=1.0, noise_multiplier=noise / 4, honest=4)
    assert epsilons - false_alarm > compute_claimed_delta(event, 0.0) + 0.1, "the full claim must be refuted"
    assert epsilons - false_alarm <= compute_claimed_delta(half_noise, 0.0) + 1e-9, "the claim for half of it must hold"

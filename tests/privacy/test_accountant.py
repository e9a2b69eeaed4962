"""Golden epsilons, a comparison of the two accountants, and calibration."""

import logging
import math

import mpmath
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, NonPrivateDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedtune.privacy import accountant, events
from fedtune.privacy.accountant import COARSE, calibrate_noise, compute_epsilon_above_limit, epsilon_pld, epsilon_rdp
from fedtune.spec import ConfigError

from . import exact_delta

# sampling rate, noise multiplier, steps, delta, epsilon; verified outside fedtune.
GOLDEN_PLD = [
    (0.1, 3.0, 512, 1e-6, 3.77),
    (0.04, 1.5, 2250, 1e-5, 6.769),
    (0.01, 0.6, 3000, 1e-5, 12.04),
    (0.01, 0.8, 3000, 1e-5, 5.24),
    (0.01, 1.0, 3000, 1e-5, 3.19),
    (0.2, 0.949, 25, 1e-5, 8.00),
    (0.001, 0.6, 500, 1e-5, 1.21),  # the GDP accountant underestimates this as 0.29
]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta", "golden"), GOLDEN_PLD)
def test_pld_epsilon_matches_golden_values(rate: float, sigma: float, steps: int, delta: float, golden: float) -> None:
    event = events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=sigma, steps=steps)
    fine, coarse = epsilon_pld([event], delta), epsilon_pld([event], delta, interval=1e-3)
    half_a_digit = 0.51 * 10.0 ** -len(str(golden).partition(".")[2])
    assert fine == pytest.approx(golden, abs=max(half_a_digit, 0.005))
    assert fine <= coarse + 1e-4, "the fine grid must not report more than the coarse one"
    assert coarse <= 1.01 * fine + 1e-3
    assert fine <= epsilon_rdp([event], delta)


@pytest.mark.parametrize(
    ("rate", "sigma", "count"), [(0.3, 1.5, 50), (0.01, 0.6, 3000), (0.999, 0.7, 3), (1e-4, 20.0, 7), (1.0, 2.0, 4)]
)
def test_epsilons_match_dp_accounting_at_usual_deltas(rate: float, sigma: float, count: int) -> None:
    """Covers compositions with an unsampled mechanism, too."""
    step, score = PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), GaussianDpEvent(9.0)
    pld, rdp = PLDAccountant(accountant.NEIGHBORING_RELATION, value_discretization_interval=COARSE), RdpAccountant()
    for event, times in ((step, count), (score, 2)):
        pld.compose(event, times)
        rdp.compose(event, times)
    pld_curve = accountant.compose_pld(((step, count), (score, 2)), COARSE)
    for delta in (1e-3, 1e-5, 1e-6):
        assert pld_curve.epsilon(delta) == pytest.approx(pld.get_epsilon(delta), rel=2e-7)
    for epsilon in (0.0, 0.1, 1.0):
        assert pld_curve.delta(epsilon) == pytest.approx(pld.get_delta(epsilon), abs=2e-9)
    for _ in range(2):  # the second pass uses cached divergences of steps
        found, reference = accountant.compose_rdp(((step, count), (score, 2)))(1e-5), rdp.get_epsilon(1e-5)
        assert reference <= found == pytest.approx(reference, rel=1e-9)


_NOISES = (0.1, 0.5, 1.0, 4.0, 30.0, 1e3, 1e4)


@pytest.mark.by_day("1e-09", "0.001", "0.5", "1.0")
@pytest.mark.parametrize("rate", [1e-9, 1e-5, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
def test_renyi_divergence_is_a_tight_upper_bound(rate: float) -> None:
    """Includes orders where dp-accounting's value is mostly rounding error; a quarter of the margin suffices there."""
    with mpmath.workdps(60):
        for noise in _NOISES:
            event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
            for order in (2.0, 3.0, 6.0, 17.0, 59.0, 64.0, 128.0, 192.0, 256.0, 512.0):
                epsilon = mpmath.mpf(accountant.compute_renyi_divergence(event, order)) * (mpmath.mpf(order) - 1)
                exact = exact_delta.log_moment(rate, noise, order)
                added = mpmath.mpf(2) ** -48 * order * (1 + exact)
                assert 3 / 4 * added <= epsilon - exact <= 3 / 2 * added, (noise, order)


@pytest.mark.parametrize(("rate", "noise"), [(1e-9, 1e4), (1e-5, 0.1), (0.01, 30.0), (0.3, 0.5), (0.9, 1e3)])
@pytest.mark.parametrize("order", [1.1, 1.5, 2.5, 5.95])
def test_fractional_order_divergence_is_an_upper_bound(rate: float, noise: float, order: float) -> None:
    event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    with mpmath.workdps(40):
        exact = exact_delta.log_moment(rate, noise, order)
        assert accountant.compute_renyi_divergence(event, order) >= exact / (mpmath.mpf(order) - 1)


@pytest.mark.parametrize(
    ("rate", "noise", "order"),
    [(0.1, 0.5, 1.6), (0.3, 1.5, 1.1), (0.5, 1.0, 1.8), (0.5, 4.0, 1.9), (0.5, 10.0, 2.2), (0.5, 100.0, 2.6)],
)
def test_divergence_is_bounded_when_the_series_does_not_converge(rate: float, noise: float, order: float) -> None:
    event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    rdp = RdpAccountant(orders=[order])
    rdp.compose(event)
    assert rdp.rdp[0] == math.inf, "dp-accounting converges at this order: choose another order"
    with mpmath.workdps(40):
        exact = float(exact_delta.log_moment(rate, noise, order) / (mpmath.mpf(order) - 1))
    epsilon = accountant.compute_renyi_divergence(event, order)
    assert exact < epsilon < accountant.compute_renyi_divergence(event, math.ceil(order)) * (1 + 1e-9)
    assert epsilon < 2.5 * exact
    assert accountant.compute_renyi_divergence(NonPrivateDpEvent(), order) == math.inf


def test_adjacency_is_add_or_remove_one_record() -> None:
    # For a single Gaussian other adjacency relations may give the same numbers, but their guarantee differs.
    assert accountant.NEIGHBORING_RELATION is NeighboringRelation.ADD_OR_REMOVE_ONE


def test_epsilon_is_infinite_without_noise_and_zero_without_steps() -> None:
    event = events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=0.0, steps=1)
    private = events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=5.0, steps=1)
    assert epsilon_pld([event], 1e-5) == epsilon_rdp([event], 1e-5) == epsilon_pld([private, event], 1e-5) == math.inf
    assert compute_epsilon_above_limit([event], 1e-5, limit=100.0) == math.inf
    no_steps = events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=0.0, steps=0)
    assert epsilon_pld([], 1e-5) == epsilon_pld([no_steps], 1e-5) == 0


def test_epsilon_above_returns_none_within_the_limit() -> None:
    event = events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=2.0, steps=20)
    fine, coarse = epsilon_pld([event], 1e-5), epsilon_pld([event], 1e-5, interval=1e-3)
    assert fine < coarse
    assert compute_epsilon_above_limit([event], 1e-5, limit=coarse) is None
    assert compute_epsilon_above_limit([event], 1e-5, limit=(fine + coarse) / 2) is None, (
        "a close call must be decided on the fine grid"
    )
    assert compute_epsilon_above_limit([event], 1e-5, limit=0.999 * fine) == fine
    assert compute_epsilon_above_limit([event], 1e-5, limit=0.5 * fine) == coarse


# Two digits of these would be below the exact value.
@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"), [(8.0, 1e-5, 0.3, 50), (1.0, 1e-5, 0.3, 50), (3.0, 1e-6, 0.01, 100)]
)
def test_calibrated_noise_meets_the_target_epsilon_tightly(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate_noise(epsilon=epsilon, delta=delta, sampling_rate=rate, steps=steps)

    def compute_spent(noise: float) -> float:
        return epsilon_pld([events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=steps)], delta)

    assert compute_spent(sigma) <= epsilon
    assert compute_spent(0.99 * sigma) > epsilon


def test_noise_calibration_terminates_at_extreme_targets() -> None:
    for epsilon in (1e-8, 1e-9, 1e-10):
        found = calibrate_noise(epsilon=epsilon, delta=1e-3, sampling_rate=0.2, steps=5)
        assert found == pytest.approx(188.72, rel=1e-4)
    assert calibrate_noise(epsilon=8.0, delta=1e-5, sampling_rate=1e-6, steps=5) == 0.1
    most_noise = events.build_dp_sgd_event(sampling_rate=1.0, noise_multiplier=0.99 * accountant.MAX_NOISE, steps=1000)
    epsilon = epsilon_pld([most_noise], 1e-5, interval=accountant.COARSE)
    found = calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=1.0, steps=1000)
    assert found == pytest.approx(0.99 * accountant.MAX_NOISE, rel=1e-4)


def test_too_many_steps_and_unreachable_epsilons_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps = 5000000000: must be at most 100,000,000, summed over all rounds"):
        accountant.check_delta("privacy.delta", 1e-5, steps=5 * 10**9)
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 1e-07: cannot be reached"):
        calibrate_noise(epsilon=1e-7, delta=1e-12, sampling_rate=1.0, steps=10)


def test_only_the_skipped_orders_warning_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("absl")
    filters = list(logger.filters)
    epsilon_rdp([events.build_dp_sgd_event(sampling_rate=0.001, noise_multiplier=0.6, steps=1)], 1e-5)
    assert logger.filters == filters
    assert "failed to converge" not in caplog.text

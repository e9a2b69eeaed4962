"""PLD epsilon is an upper bound at any delta, including rounding: compared with deltas computed without a grid."""

import json
import math

import mpmath
import numpy as np
import pytest
from hypothesis import Phase, assume, given, reject, settings
from hypothesis import strategies as st

from fedtune.privacy import events
from fedtune.privacy.accountant import COARSE, FINE, compute_epsilon_above_limit, epsilon_pld
from fedtune.privacy.loss_distribution import UNIT, Composition, compute_hockey_stick, discretize_sampled_gaussian
from fedtune.privacy.run_plan import Plan
from fedtune.report.derive import profile
from fedtune.spec import ConfigError

from . import exact_delta

EXACT = json.loads(exact_delta.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("width", "row"), [*((COARSE, row) for row in EXACT), *((FINE, row) for row in EXACT[::4])], ids=str
)
def test_epsilon_is_a_tight_upper_bound_on_the_exact_value(width: float, row: dict[str, float]) -> None:
    event = events.build_dp_sgd_event(sampling_rate=row["rate"], noise_multiplier=row["noise"], steps=int(row["steps"]))
    epsilon = epsilon_pld([event], row["delta"], interval=width)
    assert row["epsilon"] <= epsilon <= row["epsilon"] + row["steps"] * width**2 + width


@pytest.mark.parametrize("row", EXACT[::5], ids=lambda row: f"{row['rate']}-{row['delta']}")
def test_reference_deltas_are_accurate_to_eight_digits(row: dict[str, float]) -> None:
    assert exact_delta.compute_delta(row["rate"], row["noise"], int(row["steps"]), row["epsilon"]) == pytest.approx(
        row["delta"], rel=1e-8
    )


def check_epsilon_is_not_below_exact(rate: float, noise: float, steps: int, log_delta: float) -> None:
    delta = 10**log_delta
    event = [events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=steps)]
    epsilon = epsilon_pld(event, delta, interval=COARSE)
    assume(0.01 < epsilon < 50)
    try:
        exact = exact_delta.compute_delta(rate, noise, steps, epsilon)
    except exact_delta.TooFewStepsError:
        reject()
    assert exact <= delta


@pytest.mark.parametrize(("plans", "max_steps"), [(4, 1e4), pytest.param(40, 1e6, marks=pytest.mark.nightly)])
def test_epsilon_of_random_plans_is_never_below_the_exact_value(plans: int, max_steps: float) -> None:
    plans_strategy = given(
        rate=st.floats(math.log(1e-4), 0).map(math.exp),
        noise=st.floats(math.log(0.5), math.log(30)).map(math.exp),
        steps=st.floats(math.log(60), math.log(max_steps)).map(lambda log: round(math.exp(log))),
        log_delta=st.floats(-15, -3),
    )
    few_examples = settings(max_examples=plans, deadline=None, derandomize=True, phases=[Phase.generate])
    few_examples(plans_strategy(check_epsilon_is_not_below_exact))()


def test_rounding_does_not_hide_spending_at_tiny_deltas() -> None:
    """Regression: one grid reported 9.32 instead of 10.83, so a cap of 10.75 accepted it."""
    event = [events.build_dp_sgd_event(sampling_rate=0.01, noise_multiplier=1.0, steps=10_000)]
    assert compute_epsilon_above_limit(event, 1e-13, limit=10.75) == pytest.approx(10.8331, abs=2e-4)
    assert compute_epsilon_above_limit(event, 1e-13, limit=10.84) is None


@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize(("rate", "noise"), [(0.01, 1.0), (0.3, 0.5), (1.0, 4.0), (1e-5, 30.0), (0.999, 0.2)])
def test_rounding_error_of_one_step_stays_within_its_bound(rate: float, noise: float, adding: bool) -> None:
    """An empirical check: the proof assumes that scipy's tails and numpy's exponentials are accurate to a few ulps."""
    width = 1e-3
    step = discretize_sampled_gaussian(rate, noise, width, adding=adding)
    epsilons = step.losses(width)[:: max(1, step.log_probabilities.size // 60)]
    with mpmath.workdps(60):
        q, sigma = mpmath.mpf(rate), mpmath.mpf(noise)
        for epsilon, found in zip(epsilons, compute_hockey_stick(rate, noise, epsilons, adding=adding), strict=True):
            factor = mpmath.exp(mpmath.mpf(epsilon))
            share = 1 - factor * (1 - q) if adding else q
            ratio = q * factor / share if adding and share > 0 else (factor - 1 + q) / q
            if share <= 0 or ratio <= 0:
                assert found == pytest.approx(0.0 if adding else float(1 - factor), rel=4 * UNIT)
                continue
            u = sigma * mpmath.log(ratio) - 1 / (2 * sigma)
            first, second = mpmath.ncdf(-u), mpmath.ncdf(-u - 1 / sigma)
            exact = share * (first - ratio * second)
            larger = first if adding else (1 - q) * second + q * first  # probability of a larger loss
            assert abs(found - exact) <= step.rounding / 4 * larger + 1e-60  # losses below this count as infinite


@pytest.mark.parametrize("tilt", [0.0, 2.0, 16.0])
def test_rounding_error_of_composition_stays_within_its_bound(tilt: float) -> None:
    """The reference is direct sums of positive terms, which are accurate except for the last few digits."""
    width, count = 0.05, 128
    for order in Composition([(0.2, 1.0, count)], width)._orders:
        exact = np.exp(order._steps[0][0].log_probabilities)
        for _ in range(7):
            exact = np.convolve(exact, exact)
        losses = (order._lowest + np.arange(exact.size)) * width
        tail = order.tail(tilt)
        for index, loss in enumerate(tail.losses[:-1]):
            beyond = losses > loss + width / 2
            true = float(np.sum(exact[beyond] * -np.expm1(loss - losses[beyond])))
            claimed = tail.mass[index + 1] - math.exp(-width) * tail.weighted[index + 1]
            assert abs(claimed - true) <= tail.rounding[index] + 1e-11 * true


def test_deltas_below_numerical_precision_are_refused() -> None:
    settings = {"unit": "record", "sampling_rate": 0.1, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    Plan(**settings, delta=2e-18, local_steps=10, num_rounds=100)
    with pytest.raises(ConfigError, match=r"^delta = 1e-19: must be at least 1e-18: .* for 1000 steps"):
        Plan(**settings, delta=1e-19, local_steps=10, num_rounds=100)
    thousand = events.build_dp_sgd_event(sampling_rate=0.1, noise_multiplier=1.0, steps=1000)
    assert epsilon_pld([thousand], 1e-21, interval=COARSE) == math.inf


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "coarse_is_less"),
    [
        (0.0002, 1.0, 4, 3e-11, True),
        (0.0001, 1.05, 1357, 1.4e-16, True),
        (0.01, 1.0, 10_000, 1e-13, False),
        (0.0001, 1.0, 1_000_000, 1e-5, False),
    ],
)
def test_epsilon_is_the_smaller_value_of_both_grids(
    rate: float, noise: float, steps: int, delta: float, coarse_is_less: bool
) -> None:
    """Rounding can outweigh the finer grid. Regression: the larger figure was used, so a cap between both refused."""
    spent = [events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=steps)]
    coarse, fine = (Composition([(rate, noise, steps)], width).epsilon(delta) for width in (COARSE, FINE))
    assert (coarse < fine) == coarse_is_less
    assert epsilon_pld(spent, delta) == profile.epsilon_pld(spent, delta, interval=FINE) == min(coarse, fine)
    assert compute_epsilon_above_limit(spent, delta, limit=min(coarse, fine)) is None
    assert compute_epsilon_above_limit(spent, delta, limit=0.99 * min(coarse, fine)) is not None

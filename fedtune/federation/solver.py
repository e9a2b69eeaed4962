"""From a target epsilon to a plan: how little noise, how many rounds, how large a sampling rate keep within it.

Every answer was tried and kept within the target, on the coarse grid that calibration uses too; none is interpolated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fedtune.privacy import accountant
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.plan import Plan
from fedtune.spec import ConfigError

MOST_ROUNDS = 1_000_000
"""The search for rounds ends here."""
_MOST_NOISE, _LEAST_RATE = 1e4, 1e-7


def solve_noise(privacy: PrivacySpec, plan: Plan) -> Plan:
    """`plan` with the least noise, to four digits, that keeps it within `privacy.epsilon`, as a run calibrates it."""
    return Plan.of(
        dataclasses.replace(privacy, noise_multiplier=None),
        local_steps=plan.local_steps,
        num_rounds=plan.num_rounds,
        spare_rounds=plan.spare_rounds,
    )


def solve_rounds(plan: Plan, *, epsilon: float) -> Plan:
    """`plan` with the most rounds, beside its spare ones, that stay within `epsilon`.

    Raises:
        ConfigError: not even one round does.
    """

    def within(count: int) -> bool:
        return coarse_epsilon(dataclasses.replace(plan, num_rounds=count)) <= epsilon

    fits, too_many = 0, 1
    while within(too_many):
        fits, too_many = too_many, 2 * too_many
        if too_many > MOST_ROUNDS:
            return dataclasses.replace(plan, num_rounds=fits)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if within(middle) else (fits, middle)
    if not fits:
        bound = f"must be larger: one round of {plan.local_steps} steps passes privacy.epsilon = {epsilon:g}"
        raise ConfigError("privacy.noise_multiplier", plan.noise_multiplier, bound)
    return dataclasses.replace(plan, num_rounds=fits)


def solve_sampling_rate(plan: Plan, *, epsilon: float) -> Plan:
    """`plan` with the largest sampling rate, rounded down to four digits, that stays within `epsilon`.

    Raises:
        ConfigError: no rate does.
    """

    def at(rate: float) -> Plan:
        return dataclasses.replace(plan, sampling_rate=rate)

    if coarse_epsilon(at(1.0)) <= epsilon:
        return at(1.0)
    low = plan.sampling_rate
    while coarse_epsilon(at(low)) > epsilon:
        low /= 2
        if low < _LEAST_RATE:
            bound = f"must be larger: no sampling rate stays within privacy.epsilon = {epsilon:g}"
            raise ConfigError("privacy.noise_multiplier", plan.noise_multiplier, bound)
    high = min(1.0, 2 * low)
    while coarse_epsilon(at(high)) <= epsilon:
        low, high = high, min(1.0, 2 * high)
    rate = _last_within(lambda rate: coarse_epsilon(at(rate)), epsilon, inside=low, outside=high)
    return at(_rounded_down(rate))


def least_noise(plan: Plan, *, epsilon: float) -> float | None:
    """The least noise multiplier, rounded up to four digits, that keeps `plan` within `epsilon`; None: no noise does.

    What `accountant.calibrate_noise` finds from scratch, in a third of the time since the answer lies near `plan`.
    """

    def at(noise: float) -> float:
        return coarse_epsilon(dataclasses.replace(plan, noise_multiplier=noise))

    low = high = plan.noise_multiplier
    while at(high) > epsilon:
        low, high = high, 1.5 * high
        if high > _MOST_NOISE:
            return None
    while low == high or at(low) <= epsilon:
        low, high = low / 1.5, low
    return math.ceil(_last_within(at, epsilon, inside=high, outside=low) * 1e4) / 1e4


def coarse_epsilon(plan: Plan) -> float:
    """Of the whole plan by PLD, on the coarse grid that calibration uses too: at most a little above the fine one's."""
    whole = plan.event(rounds=plan.most_rounds)
    return accountant.epsilon_pld([whole], plan.delta, interval=accountant.COARSE)


def _last_within(
    epsilon_at: Callable[[float], float], epsilon: float, *, inside: float, outside: float, tolerance: float = 1e-5
) -> float:
    """The last point towards `outside` at which `epsilon_at` is seen to keep within `epsilon`.

    Regula falsi in log-log coordinates with the Illinois rule.  What it returns was tried, never interpolated.
    """
    goal = math.log(epsilon)
    in_x, out_x = math.log(inside), math.log(outside)
    in_y, out_y = math.log(epsilon_at(inside)) - goal, math.log(epsilon_at(outside)) - goal
    assert in_y <= 0 < out_y, "the two ends lie on both sides of the boundary"
    best = inside
    while abs(out_x - in_x) > tolerance:
        x = in_x + (out_x - in_x) * min(max(in_y / (in_y - out_y), 0.01), 0.99)
        if abs(x - in_x) < tolerance / 2:  # the boundary is next to the inside: try a step beyond it
            x = in_x + math.copysign(tolerance / 2, out_x - in_x)
        y = math.log(epsilon_at(math.exp(x))) - goal
        if y <= 0:
            best, in_x, in_y, out_y = math.exp(x), x, y, out_y / 2
        else:
            out_x, out_y, in_y = x, y, in_y / 2
    return best


def _rounded_down(value: float, digits: int = 4) -> float:
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return math.floor(value * scale) / scale

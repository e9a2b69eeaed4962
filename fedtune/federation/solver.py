"""From a target epsilon to a plan: how many rounds, how large a sampling rate, how little noise keep within it.

Every answer was tried and kept within the target, on the coarse grid that calibration uses too; none is interpolated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache

from fedtune.privacy import accountant
from fedtune.privacy.plan import Plan
from fedtune.spec import ConfigError

MOST_ROUNDS = 1_000_000
"""The search for rounds ends here."""
_LEAST_NOISE = 1e-2
_TOLERANCE = 1e-5  # relative
_TYPICAL_SLOPE = 1.2  # of log epsilon over the log of noise or rate; a wrong guess costs a step or two


@lru_cache(maxsize=1024)
def coarse_epsilon(plan: Plan) -> float:
    """Of the whole plan by PLD, on the coarse grid that calibration uses too: a little above the fine one's at most."""
    whole = plan.whole
    return accountant.epsilon_pld([whole], plan.delta, interval=accountant.COARSE)


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
        spare = f" and {plan.spare_rounds} spare ones" if plan.spare_rounds else ""
        bound = f"passes privacy.epsilon = {epsilon:g} with one round of {plan.local_steps} steps{spare}"
        raise ConfigError("privacy.noise_multiplier", plan.noise_multiplier, bound)
    return dataclasses.replace(plan, num_rounds=fits)


def solve_sampling_rate(plan: Plan, *, epsilon: float, least: float) -> Plan:
    """`plan` with the largest sampling rate, rounded down to four digits, that stays within `epsilon`.

    Raises:
        ConfigError: no rate from `least` upwards does.
    """

    def at(rate: float) -> Plan:
        return dataclasses.replace(plan, sampling_rate=rate)

    rate = _last_within(
        lambda rate: coarse_epsilon(at(rate)),
        epsilon,
        start=max(plan.sampling_rate, least),
        bounds=(least, 1.0),
        rising=True,
    )
    if rate is None:
        bound = f"passes privacy.epsilon = {epsilon:g} at every sampling rate down to {least:.3g}"
        raise ConfigError("privacy.noise_multiplier", plan.noise_multiplier, bound)
    return at(_rounded_down(rate))


def least_noise(plan: Plan, *, epsilon: float) -> float | None:
    """The least noise multiplier, rounded up to four digits, that keeps `plan` within `epsilon`; None: no noise does.

    What `accountant.calibrate_noise` finds from scratch, in a third of the time since the answer lies near `plan`.
    """
    noise = _last_within(
        lambda noise: coarse_epsilon(dataclasses.replace(plan, noise_multiplier=noise)),
        epsilon,
        start=plan.noise_multiplier,
        bounds=(_LEAST_NOISE, accountant.MOST_NOISE),
        rising=False,
    )
    return None if noise is None else math.ceil(noise * 1e4) / 1e4


def _last_within(
    epsilon_at: Callable[[float], float], epsilon: float, *, start: float, bounds: tuple[float, float], rising: bool
) -> float | None:
    """The largest value, or the least where epsilon is not `rising`, at which `epsilon_at` keeps within `epsilon`.

    None when none within `bounds` does.  Steps in log-log coordinates until both sides of the boundary are known, then
    regula falsi with the Illinois rule.  What is returned was tried.
    """
    lowest, highest = map(math.log, bounds)

    def value(x: float) -> float:
        return min(max(math.exp(x), bounds[0]), bounds[1])  # rounding may pass a bound that Plan holds to

    slope = _TYPICAL_SLOPE if rising else -_TYPICAL_SLOPE
    inside: tuple[float, float] | None = None  # (log value, log of epsilon over its bound)
    outside: tuple[float, float] | None = None
    x, before = math.log(start), None
    while True:
        # Nothing may be infinite in what follows; epsilon is 0 where delta alone covers the loss.
        y = math.log(min(max(epsilon_at(value(x)), 1e-9), 1e9) / epsilon)
        if y <= 0:
            inside, outside = (x, y), _halved(outside, before is True)
        else:
            outside, inside = (x, y), _halved(inside, before is False)
        before = y <= 0
        if inside is None or outside is None:
            if x in (lowest, highest):
                break
            # A little too far, so that both sides of the boundary are known soon.
            step = math.copysign(min(max(1.2 * abs(y / slope), 0.01), 2.0), -y * slope)
            x = min(max(x + step, lowest), highest)
        elif abs(outside[0] - inside[0]) <= _TOLERANCE:
            break
        else:
            x = _between(inside, outside)
    return None if inside is None else value(inside[0])


def _between(inside: tuple[float, float], outside: tuple[float, float]) -> float:
    """Where the straight line through both ends crosses the boundary, but never quite at an end."""
    width = outside[0] - inside[0]
    least = _TOLERANCE / 2 / abs(width)
    share = inside[1] / (inside[1] - outside[1])
    return inside[0] + width * min(max(share, least), 1 - least)


def _halved(end: tuple[float, float] | None, again: bool) -> tuple[float, float] | None:
    """The Illinois rule: an end that stays `again` gets half its weight, so that the next point lies nearer to it."""
    return (end[0], end[1] / 2) if again and end is not None else end


def _rounded_down(value: float, digits: int = 4) -> float:
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return math.floor(value * scale) / scale

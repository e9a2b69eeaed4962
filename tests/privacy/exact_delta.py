"""Delta of many sampled Gaussian mechanisms without a grid, to compare fedtune's upper bounds with.

With M(z) the mean of e^(z x loss) of one step, the delta of `steps` of them at epsilon is an integral along the line
Re z = tilt, for any tilt above 0 (Alghamdi et al. 2023, arXiv 2208.09595, "The saddle-point method"):

    delta = 1 / (2 pi i) x integral of M(z)^steps e^(-z epsilon) / (z (1 + z)) dz

Both integrals are sums over evenly spaced points, which for such functions have an error of only e^(-1 / spacing).

    python tests/privacy/exact_delta.py        writes exact_deltas.json with 50 digits in each step; about two minutes
"""

import json
import math
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
from scipy import optimize

FILE = Path(__file__).with_name("exact_deltas.json")
PLANS = [
    *((0.01, 1.0, 10_000), (0.01, 1.0, 100_000), (0.04, 1.5, 2_250), (0.01, 0.6, 3_000), (0.002, 0.7, 50_000)),
    *((0.1, 3.0, 512), (0.3, 4.0, 50), (0.9, 5.0, 200), (0.0001, 1.0, 1_000_000), (0.02, 30.0, 1_000_000)),
]
"""Sampling rate, noise multiplier, steps."""
DELTAS = (1e-5, 1e-6, 1e-9, 1e-11, 1e-13, 1e-14, 1e-15)


class TooFewStepsError(ValueError):
    """So few records take part in all steps together that the integral does not converge."""


def _list_noise_points(noise: float, tilt: float, *, adding: bool) -> np.ndarray:
    """List evenly spaced noise values that contribute at this tilt."""
    distance = min(noise, noise**2) / 12
    lower, upper = (-tilt - 14 * noise, 14 * noise) if adding else (-14 * noise, tilt + 2 + 14 * noise)
    return np.arange(math.floor(lower / distance), math.ceil(upper / distance) + 1) * distance


def _log_means(rate: float, noise: float, orders: np.ndarray, tilt: float, *, adding: bool) -> np.ndarray:
    """Compute log M at each complex order with real part `tilt`."""
    x = _list_noise_points(noise, tilt, adding=adding)
    loss = np.log(1 - rate + rate * np.exp((2 * x - 1) / (2 * noise**2)))
    powers = -orders if adding else orders + 1
    normal = -(x**2) / (2 * noise**2) + math.log((x[1] - x[0]) / noise / math.sqrt(2 * math.pi))
    exponents = powers[:, None] * loss + normal
    largest = exponents.real.max()
    return largest + np.log(np.exp(exponents - largest).sum(axis=1))


def log_moment(rate: float, noise: float, order: float) -> mpmath.mpf:
    """Compute (order - 1) times the Renyi divergence of one sampled Gaussian mechanism; needs about 60 digits."""
    q, sigma, a = mpmath.mpf(rate), mpmath.mpf(noise), mpmath.mpf(order)
    if float(order).is_integer():
        parts = range(int(order) + 1)
        weights = (mpmath.binomial(int(order), i) * q**i * (1 - q) ** (int(order) - i) for i in parts)
        growth = (mpmath.exp((mpmath.mpf(i) ** 2 - i) / (2 * sigma**2)) for i in parts)
        return mpmath.log(mpmath.fsum(w * g for w, g in zip(weights, growth, strict=True)))

    def distance_from_chord(x: mpmath.mpf) -> mpmath.mpf:  # 1 + order (ratio - 1), whose mean is 1
        ratio = 1 - q + q * mpmath.exp((2 * x * sigma - 1) / (2 * sigma**2))
        return (ratio**a - 1 - a * (ratio - 1)) * mpmath.npdf(x)

    bends = {0.0, order / noise, noise * math.log(1 / rate - 1) + 0.5 / noise}
    ends = {-16.0, order / noise + 16}
    near = {bend + step for bend in bends for step in (-16, -8, -4, 0, 4, 8, 16)}
    return mpmath.log1p(mpmath.quad(distance_from_chord, sorted(ends | {x for x in near if min(ends) < x < max(ends)})))


def find_best_tilt(rate: float, noise: float, steps: int, epsilon: float, *, adding: bool) -> float:
    """Find the tilt that minimizes Chernoff's bound at `epsilon`."""

    def compute_bound(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        mean = _log_means(rate, noise, np.array([tilt + 0j]), tilt, adding=adding)[0].real
        return float(steps * mean - tilt * epsilon)

    return math.exp(float(optimize.minimize_scalar(compute_bound, bounds=(-5, 8), method="bounded").x))


def _choose_line(rate: float, noise: float, steps: int, tilt: float, *, adding: bool) -> tuple[float, int]:
    """Choose the spacing and the number of points on the line above the real axis.

    Raises:
        TooFewStepsError: M^steps does not decay along the line.
    """
    nearby = _log_means(rate, noise, tilt + np.array([0, 1e-3j * tilt]), tilt, adding=adding).real
    deviation = math.sqrt(max(2 * steps * float(nearby[0] - nearby[1]), 1e-12)) / (1e-3 * tilt)
    distance, end = 2 * math.pi / (30 * deviation + 60 / tilt), 8 / deviation
    while end < 500 / deviation:
        two = _log_means(rate, noise, tilt + np.array([0, 1j * end]), tilt, adding=adding).real
        if steps * (two[0] - two[1]) > 34:
            return distance, math.ceil(end / distance)
        end *= 1.5
    raise TooFewStepsError


def compute_delta(rate: float, noise: float, steps: int, epsilon: float) -> float:
    """Compute delta at `epsilon` to eight digits."""

    def compute_one_order(adding: bool) -> float:
        tilt = find_best_tilt(rate, noise, steps, epsilon, adding=adding)
        distance, count = _choose_line(rate, noise, steps, tilt, adding=adding)
        z = tilt + 1j * distance * np.arange(count)
        logs = steps * _log_means(rate, noise, z, tilt, adding=adding) - z * epsilon
        values = (np.exp(logs) / (z * (1 + z))).real
        return float(distance / math.pi * (values[0] / 2 + values[1:].sum()))

    return max(compute_one_order(False), compute_one_order(True))


def compute_precise_delta(rate: float, noise: float, steps: int, epsilon: float) -> mpmath.mpf:
    """Compute the same sums with 50 digits."""

    def compute_one_order(adding: bool) -> mpmath.mpf:
        tilt = find_best_tilt(rate, noise, steps, epsilon, adding=adding)
        distance, count = _choose_line(rate, noise, steps, tilt, adding=adding)
        q, sigma = mpmath.mpf(rate), mpmath.mpf(noise)
        positions = _list_noise_points(noise, tilt, adding=adding)
        spacing = mpmath.mpf(float(positions[1] - positions[0]))
        points = [mpmath.mpf(round(float(position / spacing))) * spacing for position in positions]
        normal = [mpmath.exp(-(x**2) / (2 * sigma**2)) * spacing / sigma / mpmath.sqrt(2 * mpmath.pi) for x in points]
        losses = [mpmath.log(1 - q + q * mpmath.exp((2 * x - 1) / (2 * sigma**2))) for x in points]
        # Each term is multiplied by the same factor from one point on the line to the next.
        sign, h, t = (-1 if adding else 1), mpmath.mpf(distance), mpmath.mpf(tilt)
        terms = [w * mpmath.exp((-t if adding else t + 1) * loss) for w, loss in zip(normal, losses, strict=True)]
        turns = [mpmath.expj(sign * h * loss) for loss in losses]
        total = mpmath.mpf(0)
        for number in range(count):
            z = mpmath.mpc(t, h * number)
            value = (mpmath.fsum(terms) ** steps * mpmath.exp(-z * mpmath.mpf(epsilon)) / (z * (1 + z))).real
            total += value / 2 if number == 0 else value
            terms = [term * turn for term, turn in zip(terms, turns, strict=True)]
        return h / mpmath.pi * total

    with mpmath.workdps(50):
        return max(compute_one_order(False), compute_one_order(True))


def main() -> None:
    rows = []
    for rate, noise, steps in PLANS:
        for at in DELTAS:
            off = partial(
                lambda plan, at, e: math.log(max(compute_delta(*plan, e), 1e-200) / at), (rate, noise, steps), at
            )
            position = float(f"{optimize.brentq(off, 0.01, 60.0, xtol=1e-10):.8g}")
            exact = mpmath.nstr(compute_precise_delta(rate, noise, steps, position), 15)
            rows.append({"rate": rate, "noise": noise, "steps": steps, "epsilon": position, "delta": float(exact)})
            print(rows[-1], compute_delta(rate, noise, steps, position) / float(exact) - 1, flush=True)
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()

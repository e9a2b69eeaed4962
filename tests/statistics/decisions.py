"""Accept or reject a mechanism from what it released, with error rates that are computed and not hoped for.

Each decision is an exact test: its statistic's distribution under the right mechanism is known in closed form, so
`false_alarm` is its rate of rejecting that mechanism, and `power` the rate of rejecting a wrong one, from the same
distribution.  `test_decisions.py` checks both against simulation.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import stats

FALSE_ALARM = 1e-6
"""Of a whole test, over all its comparisons: how often it rejects the right mechanism."""
POWER = 1 - 1e-3
"""Of one comparison: how often it rejects a mechanism that is 10 % off, at least."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """Whether independent values are N(0, scale^2): the sum of their squares is chi-square.

    Attributes:
        count: how many values.
        false_alarm: of this one comparison.
    """

    count: int
    false_alarm: float

    @cached_property
    def _compute_bounds(self) -> tuple[float, float]:
        half = self.false_alarm / 2
        return float(stats.chi2.ppf(half, self.count)), float(stats.chi2.isf(half, self.count))

    def accepts(self, values: Values, scale: float) -> bool:
        assert values.size == self.count
        least, most = self._compute_bounds
        return bool(least <= np.sum(np.square(values / scale)) <= most)

    def power(self, factor: float) -> float:
        """Against noise whose standard deviation is `factor` times the stated one."""
        least, most = (end / factor**2 for end in self._compute_bounds)
        return float(stats.chi2.cdf(least, self.count) + stats.chi2.sf(most, self.count))


@dataclass(frozen=True)
class Shape:
    """Whether independent values have the whole distribution N(0, scale^2): Kolmogorov's and Smirnov's exact test."""

    count: int
    false_alarm: float

    def accepts(self, values: Values, scale: float) -> bool:
        assert values.size == self.count
        return bool(stats.kstest(values / scale, "norm", method="asymp").statistic <= self._compute_threshold)

    @cached_property
    def _compute_threshold(self) -> float:
        return float(stats.kstwo.isf(self.false_alarm, self.count))

    def power(self, distance: float) -> float:
        """At least this, against a distribution function `distance` from the normal one (Massart's bound, 1990)."""
        spare = distance - self._compute_threshold
        return 1 - 2 * float(np.exp(-2 * self.count * spare**2)) if spare > 0 else 0.0


@dataclass(frozen=True)
class Unrelated:
    """Whether two releases of normal noise of mean zero are independent, however one is shifted along the other.

    Under independence the cosine of the angle between them has at every shift the distribution of a Student t with
    `count - 1` degrees of freedom; the shifts share the false alarm.
    """

    count: int
    false_alarm: float

    @cached_property
    def _compute_threshold(self) -> float:
        return float(stats.t.isf(self.false_alarm / self.count / 2, self.count - 1))

    def accepts(self, left: Values, right: Values) -> bool:
        assert left.size == right.size == self.count
        products = np.fft.irfft(np.conj(np.fft.rfft(left)) * np.fft.rfft(right), n=self.count)
        cosine = products / (np.linalg.norm(left) * np.linalg.norm(right))
        return bool(np.max(np.abs(_compute_student_t(cosine, self.count))) <= self._compute_threshold)

    def power(self, correlation: float) -> float:
        """At least this, against noise of which so much is shared (at one shift)."""
        rare = 1e-4
        # Given one release, t of the other is noncentral by that one's length, which is hardly ever shorter than this.
        length = np.sqrt(stats.chi2.ppf(rare, self.count))
        noncentral = correlation * length / np.sqrt(1 - correlation**2)
        return (1 - rare) * float(stats.nct.sf(self._compute_threshold, self.count - 1, noncentral))


def _compute_student_t(cosine: Values, count: int) -> Values:
    with np.errstate(divide="ignore"):  # of a release with itself
        return cosine * np.sqrt((count - 1) / np.maximum(0.0, 1 - cosine**2))


@dataclass(frozen=True)
class Rate:
    """Whether independent trials succeed at `rate`: their number is binomial."""

    trials: int
    rate: float
    false_alarm: float

    @cached_property
    def _compute_bounds(self) -> tuple[int, int]:
        half = self.false_alarm / 2
        least = int(stats.binom.ppf(half, self.trials, self.rate))
        return least, int(stats.binom.isf(half, self.trials, self.rate))

    def accepts(self, successes: int) -> bool:
        least, most = self._compute_bounds
        return bool(least <= successes <= most)

    def power(self, rate: float) -> float:
        """Against trials that succeed at another rate."""
        least, most = self._compute_bounds
        below = stats.binom.cdf(least - 1, self.trials, rate)
        return float(below + stats.binom.sf(most, self.trials, rate))

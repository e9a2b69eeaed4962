"""Poisson sampling and Gaussian noise: the random steps on which the privacy guarantee is based."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fedtune.codec import require
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.randomness import RandomStream
from fedtune.spec import ConfigError, check_at_least, check_at_most, check_fraction, check_positive, check_whole, spec

Unit = Literal["record", "user"]
"""The privacy unit of an (epsilon, delta) guarantee: a single record, or a user with all of their records at a site."""
MAX_EPSILON = 100.0
MIN_SAMPLING_RATE, MIN_CLIP_NORM = 1e-6, 1e-30
"""Limits of noise calibration. Beyond these limits, computing a privacy loss distribution takes minutes."""
MAX_RUNS = 120
"""Maximum number of planned runs (monthly for ten years), which limits a site's run time for accounting."""


@spec
class PrivacySpec:
    """The privacy guarantee of a run for each privacy unit, and the parameters of its mechanisms.

    Attributes:
        mechanism: "dp_sgd", or "none" for training without a guarantee.
        unit: the privacy unit: "record", or "user" for all records of a person at a site, identified by the role
            `user`. With "user" every size, rate and denominator counts users.
        records_per_user: with unit "user", the maximum number of records of one user in a step, sampled again for each
            step.
        epsilon: target epsilon of all rounds and steps of all `planned_runs` together, at every site.
        planned_runs: number of runs like this one that may use the same person's records; together they spend
            `epsilon`, and a single run spends less.
        delta: delta of the guarantee; it must be below one over the declared size of every site.
        noise_multiplier: standard deviation of the noise divided by the clip norm; null: calibrated to `epsilon`.
        max_grad_norm: clip norm C of the joint gradient of one unit over all trainable tensors.
        sampling_rate: probability with which a unit joins a step (Poisson sampling).
        metrics: "noised": in each round each site also releases noised scores of its held-out records
            (`data.heldout_fraction`), which the same epsilon covers; "none": a site releases no scores.
        metrics_noise_multiplier: standard deviation of the noise on these scores, divided by their sensitivity to one
            unit.
        cohorts: the arrival cohorts that the run admits and charges, as `{period: year, first: null, last: "2026"}`, if
            the sites' populations have arrivals; null: everybody.
        start_epsilon: epsilon of all training behind `model.adapter`, summed over its lineage and derived from the run
            folders; null: no start adapter, or an unknown or unbounded privacy loss.
        start_delta: delta at which `start_epsilon` holds, summed over the same lineage, in [0, 1); null: no start
            adapter, or an unknown privacy loss.
        start_unit: privacy unit of `start_epsilon`, "record" or "user"; null: no start adapter, or an unknown unit.
        start_keys: Ed25519 public keys (64 hex digits each) of the real sites whose signed receipts prove
            `start_epsilon`; null: not all of it follows from receipts.
    """

    mechanism: Literal["dp_sgd", "none"] = "dp_sgd"
    unit: Unit = "record"
    records_per_user: int = 8
    epsilon: float = 8.0
    planned_runs: int = 1
    delta: float = 1e-5
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    sampling_rate: float = 0.2
    metrics: Literal["none", "noised"] = "none"
    metrics_noise_multiplier: float = 20.0
    cohorts: Cohorts | None = None
    start_epsilon: float | None = None
    start_delta: float | None = None
    start_unit: Unit | None = None
    start_keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("records_per_user", "planned_runs"):
            check_whole(name, getattr(self, name))
            check_at_least(name, getattr(self, name), 1)
        check_at_most("planned_runs", self.planned_runs, MAX_RUNS)
        check_positive("epsilon", self.epsilon)
        check_fraction("delta", self.delta)
        if self.noise_multiplier is not None:
            check_positive("noise_multiplier", self.noise_multiplier)
        elif self.private and self.epsilon > MAX_EPSILON:
            bound = f"must be at most {MAX_EPSILON:g}: a larger epsilon provides no meaningful guarantee; "
            bound += "use privacy=none to train without noise"
            raise ConfigError("epsilon", self.epsilon, bound)
        check_at_least("max_grad_norm", self.max_grad_norm, MIN_CLIP_NORM)
        check_fraction("sampling_rate", self.sampling_rate, one=True)
        check_at_least("sampling_rate", self.sampling_rate, MIN_SAMPLING_RATE)
        check_positive("metrics_noise_multiplier", self.metrics_noise_multiplier)
        for name in ("start_epsilon", "start_delta"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 0)
        bound = "requires a run with privacy: otherwise the scores would be exact"
        require("metrics", self.metrics, self.metrics == "none" or self.private, bound)
        bound = "requires unit = user: arrival dates are stored by user id"
        require("cohorts", str(self.cohorts), self.cohorts is None or self.unit == "user", bound)

    @property
    def start(self) -> dict[str, Any]:
        """The settings about the training behind `model.adapter`, by name."""
        return {name: value for name, value in asdict(self).items() if name.startswith("start_")}

    @property
    def private(self) -> bool:
        """Whether the run trains with differential privacy."""
        return self.mechanism == "dp_sgd"

    @property
    def contribution(self) -> int:
        """The maximum number of records of one unit in a step."""
        return self.records_per_user if self.unit == "user" else 1

    @property
    def metrics_noise(self) -> float:
        """Noise multiplier of the released scores, or 0 if the run releases no scores."""
        return self.metrics_noise_multiplier if self.metrics != "none" else 0.0


def draw_poisson_sample(num_units: int, sampling_rate: float, stream: RandomStream) -> npt.NDArray[np.int64]:
    """Draw a Poisson sample: each unit joins the step independently with probability `sampling_rate`.

    Returns:
        Ascending indices in [0, num_units). The sample may be empty; an empty step still adds noise and counts.
    """
    return np.flatnonzero(stream.bernoulli(num_units, sampling_rate))


def choose_records(num_records: int, most: int, stream: RandomStream) -> npt.NDArray[np.int64]:
    """Draw the records of a sampled user for one step: all records, or a random subset of size `most`.

    Fresh draws in each step let the model learn from every record over a run; a fixed subset would never use the other
    records. Fresh draws have no privacy cost: a user's draws depend only on that user's records, and the user's clipped
    mean has at most the clip norm for any draw. So, conditioned on all draws, the step is the Gaussian mechanism on a
    Poisson sample. The weights of this mixture are equal with and without one user, and the hockey-stick divergence is
    jointly convex, so the mixture reveals at most as much as its worst component.

    Returns:
        Ascending indices in [0, num_records).
    """
    if num_records <= most:
        return np.arange(num_records, dtype=np.int64)
    return np.sort(np.argsort(stream.uniform64(num_records), kind="stable")[:most]).astype(np.int64)


GRID_BITS = 24
"""Resolution of the integer grid: sums, noise and scores are counted in cells of 2**-24 of the clip norm, or of a score
of 1.

Fine enough that rounding costs next to nothing (6e-5 of the clip norm at most, over a million coordinates), and coarse
enough that float32 holds every coordinate and float64 the sum of half a billion of them exactly.
"""
Sums = Mapping[str, npt.NDArray[np.int64]]


class SumOnDevice(Protocol):
    """A sum that an accelerator may still compute; its conversion to an array waits for the result."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.int64]: ...


Noise = Literal["gaussian", "laplace"]
"""Distribution of the added noise."""


def compute_cell_width(max_grad_norm: float) -> float:
    """Return the cell width of the integer grid for a clip norm C: C * 2**-24."""
    return max_grad_norm * 2.0**-GRID_BITS


def add_gaussian_noise(
    sums: Mapping[str, npt.NDArray[np.int64] | SumOnDevice],
    *,
    noise_multiplier: float,
    stream: RandomStream,
    sensitivity: float = 1.0,
) -> dict[str, npt.NDArray[np.int64]]:
    """Add Gaussian noise to an integer sum, once per logical batch.

    Args:
        sums: tensors in cells: in exact arithmetic, the sum over the sampled units of vectors whose joint L2 norm is at
            most `sensitivity * 2**GRID_BITS`.
        noise_multiplier: standard deviation of the noise divided by the sensitivity.
        stream: source of the noise; one draw per value, in the order of `sums`.
        sensitivity: L2 sensitivity of the sum, in clip norms.

    Returns:
        The noised tensors, in cells.

    Guarantee: one event `GaussianDpEvent(noise_multiplier)` for the sampled units. The noise is a normal value rounded
    to an integer. The sum is an integer too, so sum + round(noise) = round(sum + noise): the Gaussian mechanism,
    followed by rounding, which is post-processing.
    """
    deviation = noise_multiplier * sensitivity * 2.0**GRID_BITS
    # Drawn before any sum is read, while an accelerator still computes.
    noise = {name: stream.draw_rounded_normal(one.size, deviation).reshape(one.shape) for name, one in sums.items()}
    return {name: np.asarray(total) + noise[name] for name, total in sums.items()}


def release_scores(
    scores: npt.NDArray[np.float64], *, declared_size: float, noise_multiplier: float, stream: RandomStream
) -> tuple[float, float]:
    """Release the mean score and the number of held-out units by one Gaussian mechanism.

    Args:
        scores: (units,), one score per unit; clamped to [0, 1], and 0 if not finite.
        declared_size: declared number of held-out units: the public denominator of both values.
        noise_multiplier: standard deviation of the noise divided by the sensitivity.
        stream: source of the noise.

    Returns:
        (noised sum of scores, noised number of units), both divided by `declared_size`; not clamped.

    Guarantee: one `GaussianDpEvent(noise_multiplier)`, since one unit adds (score, 1), with the score rounded down to
    the grid, which has an L2 norm of at most sqrt(2).
    """
    usable = np.clip(np.where(np.isfinite(scores), scores, 0.0), 0.0, 1.0)
    in_cells = np.floor(usable * 2.0**GRID_BITS).astype(np.int64)
    sums = {"sums": np.array([in_cells.sum(), len(in_cells) << GRID_BITS])}  # a unit counts 1, in cells
    # The next float above, so that rounding never makes the noise smaller than stated.
    root = float(np.nextafter(np.sqrt(2.0), 2.0))
    noisy = add_gaussian_noise(sums, noise_multiplier=noise_multiplier, stream=stream, sensitivity=root)
    score, count = noisy["sums"] * compute_cell_width(1.0) / declared_size
    return float(score), float(count)

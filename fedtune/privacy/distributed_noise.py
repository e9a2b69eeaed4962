"""Distributed noise: each site adds a share of the noise, and secure aggregation reveals only the total to the server.

Each site adds its share of the noise to its own sum, in integers, before it masks the result. An observer of only the
total of h honest sites sees the Gaussian mechanism with the noise of all h shares, even though each share was rounded
separately. Theorem: let site k have y_k = g_k + Z_k, where Z_k is normal with a standard deviation of s cells, and let
it send R(y_k) = floor(y_k + 1/2), all in cells. With V_k = y_k + 1/2 - R(y_k), in [0, 1), and Y = y_1 + ... + y_h

    R(y_1) + ... + R(y_h) = floor(Y + h/2 - V_1 - ... - V_(h-1)),

since R(y_h) is the remainder of Y after subtracting the integers of the other sites. Given Y and y_1, ..., y_(k-1),
the value y_k is normal with variance (1 - 1/n) s^2, where n = h - k + 1 sites remain: at least s^2 / 2. A normal value
of variance v, wrapped around a circle of length 1, is uniform up to a total variation of exp(-2 pi^2 v), by its Fourier
series. So V_1, ..., V_(h-1) are uniform and independent of Y, for any g_k, up to a total variation of

    (h - 1) exp(-pi^2 s^2)

per value. If this held exactly, the total would be post-processing of Y, the Gaussian mechanism with variance h s^2 on
the sum of the g_k, with random numbers that do not depend on any record. `MIN_CELLS` keeps s at 8 or more: over 2^60
values of 2^10 sites the total variation stays below 1e-250 altogether, and is part of eta in docs/proof.md. Hence
a release is an ordinary Gaussian event with the noise of the honest shares, and every proof about such events applies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fedtune.codec import require
from fedtune.privacy import accountant, events
from fedtune.privacy.dp_library import DpEvent, SelfComposedDpEvent
from fedtune.privacy.mechanism import GRID_BITS, Sums, add_gaussian_noise
from fedtune.privacy.randomness import RandomStream
from fedtune.privacy.threshold import min_threshold
from fedtune.spec import ConfigError, check_whole, spec

MIN_CELLS = 8.0  # smallest standard deviation of a share, in cells of 2**-cell_bits: the theorem's s
MAX_SHARES = 2**10
MAX_BOUND = 2**32
"""Largest bound on a value of a site's sum, in clip norms: with all noise, int64 holds it on the finest grid."""
USUAL_BOUND = 2**10  # in clip norms; exceeded only if over 1000 units have their whole gradient in one coordinate
_TAIL = 16  # standard deviations; a value of a share exceeds them with probability below 1e-56


@spec
class SecureAggregationSpec:
    """Parameters of secure aggregation: the number of sites, the threshold, and the tolerated number of colluders.

    Attributes:
        num_sites: K, the number of sites in the run.
        threshold: t, the smallest number of sites in a sum; a sum of fewer sites is never unmasked.
        colluders: c, the number of sites that may reveal their noise to the server; the guarantee counts the noise of t
            - c sites.

    Raises:
        ConfigError: 2t is not above K + c, so that a server could unmask two sums of one release that differ by one
            site.
    """

    num_sites: int
    threshold: int
    colluders: int

    def __post_init__(self) -> None:
        # A plan may come from a server's request, so every field is checked.
        _check_range("num_sites", self.num_sites, 2, MAX_SHARES)
        _check_range("colluders", self.colluders, 0, self.num_sites - 1)
        check_whole("threshold", self.threshold)
        least = min_threshold(self.num_sites, colluders=self.colluders)
        bound = (
            f"must be from {least} to {self.num_sites}, the number of sites: otherwise a server could unmask two sums"
        )
        require("threshold", self.threshold, least <= self.threshold <= self.num_sites, bound)

    def compute_share_for_total(self, total: float) -> float:
        """Compute the smallest noise share, to four decimals, for a noise multiplier of `total` in every sum."""
        honest = self.threshold - self.colluders
        share = math.ceil(total / math.sqrt(honest) * 1e4) / 1e4
        while combine_noise_shares(share, honest) < total:
            share = round(share + 1e-4, 4)
        return share

    def with_share(self, noise_multiplier: float, *, bound: int = USUAL_BOUND) -> DistributedNoise:
        """Create the `DistributedNoise` with these parameters and the given noise share of each site.

        Args:
            noise_multiplier: standard deviation of one site's noise, divided by the clip norm.
            bound: largest absolute value in a site's sum, in clip norms.
        """
        return DistributedNoise(
            num_sites=self.num_sites,
            threshold=self.threshold,
            colluders=self.colluders,
            noise_multiplier=noise_multiplier,
            cell_bits=compute_min_cell_bits(noise_multiplier),
            bound=bound,
        )


@spec
class DistributedNoise(SecureAggregationSpec):
    """Parameters of distributed noise: secure aggregation in which each site adds an equal share of the noise.

    Attributes:
        noise_multiplier: standard deviation of one site's noise share, divided by the clip norm.
        cell_bits: resolution of the sent integers: one cell is 2**-cell_bits of the clip norm.
        bound: largest absolute value in a site's sum, in clip norms; larger values are clipped before noise is added.
    """

    noise_multiplier: float
    cell_bits: int
    bound: int

    def __post_init__(self) -> None:
        SecureAggregationSpec.__post_init__(self)
        accountant.check_noise("noise_multiplier", self.noise_multiplier)
        _check_range("cell_bits", self.cell_bits, 0, GRID_BITS)
        _check_range("bound", self.bound, 1, MAX_BOUND)
        if _compute_noise_in_cells(self.noise_multiplier, self.cell_bits) < MIN_CELLS:
            bound = (
                f"must be at least {compute_min_cell_bits(self.noise_multiplier)}, or rounding removes the noise shares"
            )
            raise ConfigError("cell_bits", self.cell_bits, bound)

    @property
    def largest_value(self) -> int:
        """Bound on the values of one site's noised vector, in cells of 2**-cell_bits of the clip norm.

        A value exceeds the bound with probability below 1e-56. A modulus above 2 * num_sites * largest_value can
        represent each sum. Privacy does not depend on this bound.
        """
        return (
            (self.bound << self.cell_bits)
            + math.ceil(_TAIL * _compute_noise_in_cells(self.noise_multiplier, self.cell_bits))
            + 1
        )

    @property
    def smallest_honest_noise(self) -> float:
        """Noise multiplier of the honest shares in the smallest sum that may be unmasked."""
        return self.compute_honest_noise(self.colluders)

    def compute_honest_noise(self, colluders: int) -> float:
        """Compute the noise multiplier of the honest shares in the smallest allowed sum if `colluders` sites collude.

        If all other sites collude, only the site's own share counts.
        """
        return combine_noise_shares(
            self.noise_multiplier, self.count_honest_shares(survivors=self.threshold, colluders=colluders)
        )

    def count_honest_shares(self, *, survivors: int, colluders: int) -> int:
        """Count the noise shares that colluders cannot know in a sum of `survivors` sites.

        The site's own share always counts.
        """
        assert 1 <= survivors <= self.num_sites
        return max(1, survivors - colluders)


def _check_range(key: str, value: int, least: int, most: int) -> None:
    check_whole(key, value)
    require(key, value, least <= value <= most, f"must be from {least} to {most}")


def compute_min_cell_bits(noise_multiplier: float) -> int:
    """Find the coarsest resolution at which rounding adds at most a thousandth to the variance of a noise share.

    Args:
        noise_multiplier: standard deviation of the share, divided by the clip norm.

    Returns:
        The smallest number of bits b such that cells of 2**-b of the clip norm are fine enough.
    """
    return next(bits for bits in range(GRID_BITS + 1) if _compute_noise_in_cells(noise_multiplier, bits) >= MIN_CELLS)


def _compute_noise_in_cells(noise_multiplier: float, bits: int) -> float:
    """Convert a share's noise multiplier to cells of 2**-bits of the clip norm."""
    return noise_multiplier * 2.0**bits


def add_noise_share(sums: Sums, shared: DistributedNoise, stream: RandomStream) -> dict[str, npt.NDArray[np.int64]]:
    """Add a site's noise share to the site's own sum, and round the sum to the resolution of secure aggregation.

    Args:
        sums: tensors in cells of 2**-24 of the clip norm (`mechanism.compute_cell_width`): in exact arithmetic, the sum
            over the sampled units of vectors whose joint L2 norm is at most the clip norm.
        shared: division of the noise among the sites.
        stream: a fresh stream for each release, even for a retry; one draw per value, in the order of `sums`.

    Returns:
        The noised tensors in cells of 2**-cell_bits of the clip norm.

    Guarantee: an observer of only the total over the honest sites learns at most what the event of
    `build_secure_aggregation_event` allows for that many honest sites, up to the total variation in the module
    docstring. Clipping values never increases the distance between two sums, so one unit still changes a sum by at most
    the clip norm. Rounding first to fine cells, and then half up to cells whose width is a multiple, equals rounding
    once with a slightly larger offset than the theorem's 1/2; the offset is identical for all values of a site.
    """
    most, width = shared.bound << GRID_BITS, 1 << (GRID_BITS - shared.cell_bits)
    bounded = {name: np.clip(total, -most, most) for name, total in sums.items()}
    noisy = add_gaussian_noise(bounded, noise_multiplier=shared.noise_multiplier, stream=stream)
    return {name: (total + width // 2) // width for name, total in noisy.items()}


def build_secure_aggregation_event(*, sampling_rate: float, noise_multiplier: float, honest: int) -> DpEvent:
    """Build the privacy event of one secure aggregation, in which `honest` noise shares are unknown to the adversary.

    Args:
        sampling_rate: probability with which each unit joins a step; each site draws its own sample in secret.
        noise_multiplier: noise multiplier of one share.
        honest: number of sites in the sum whose noise is secret, this site included.

    Guarantee: under add-or-remove-one adjacency for a unit of one site, the sum of clipped gradients, at adapters that
    depend only on earlier releases, is as private as this event. Given the contributions of the other sites, which do
    not depend on the unit, the sum is one Gaussian mechanism with the variance of `honest` shares on a Poisson sample
    (module docstring). Each site takes one step per sum: after several local steps, its contribution would depend on a
    state that only its own share hides.
    """
    noise = combine_noise_shares(noise_multiplier, honest)
    return events.build_dp_sgd_event(sampling_rate=sampling_rate, noise_multiplier=noise, steps=1)


def combine_noise_shares(noise_multiplier: float, shares: int) -> float:
    """Compute the noise multiplier of the sum of `shares` independent noise shares.

    It is sqrt(shares) times the multiplier of one share, rounded down.
    """
    total = noise_multiplier * math.sqrt(shares)
    while Fraction(total) ** 2 > Fraction(noise_multiplier) ** 2 * shares:
        total = math.nextafter(total, 0.0)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Epsilons:
    """Epsilon of one privacy unit at a site against three adversaries. None means an unbounded epsilon.

    Attributes:
        server_alone: epsilon against the server, if every site is honest.
        with_colluders: epsilon against the server and the number of colluding sites in the plan.
        with_all_others: epsilon against the server and all other sites.
    """

    server_alone: float | None
    with_colluders: float | None
    with_all_others: float | None


def compute_epsilons_by_adversary(
    shared: DistributedNoise,
    *,
    survivors: Mapping[int, int],
    sampling_rate: float,
    delta: float,
    also: Sequence[DpEvent] = (),
) -> Epsilons:
    """Compute the PLD epsilon of one privacy unit against each adversary on the coarse grid.

    Each sum is one DP-SGD step.

    Args:
        shared: division of the noise among the sites.
        survivors: number of sites in a sum -> number of sums with this number of sites.
        sampling_rate: probability with which each unit joins a step.
        delta: delta of all three epsilons.
        also: events outside secure aggregation; all three epsilons include them.

    Guarantee: upper bounds, provided that the survivors of each sum do not depend on earlier releases. The epsilons for
    `{threshold: releases}` are upper bounds for any survivors of at least the threshold, even if an adversary selects
    them adaptively: a sum with more noise can be computed from the same sum with less.
    """

    def epsilon(colluding: int) -> float:
        sums = [
            SelfComposedDpEvent(
                build_secure_aggregation_event(
                    sampling_rate=sampling_rate,
                    noise_multiplier=shared.noise_multiplier,
                    honest=shared.count_honest_shares(survivors=number, colluders=colluding),
                ),
                times,
            )
            for number, times in survivors.items()
        ]
        return accountant.epsilon_pld([*sums, *also], delta, interval=accountant.COARSE)

    return Epsilons(
        server_alone=epsilon(0), with_colluders=epsilon(shared.colluders), with_all_others=epsilon(shared.num_sites - 1)
    )

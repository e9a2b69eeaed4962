"""Cryptographic randomness for noise and sampling: AES-256-CTR keystreams, keyed by the operating system's CSPRNG.

torch's CPU generator uses only 32 bits of its seed, and numpy's generators are not cryptographically secure, so neither
of them draws noise or samples here. Each stream serves one purpose, is used once, and is never stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from mpmath.ctx_iv import MPIntervalContext
from mpmath.libmp import to_rational

_MAX_EXTENSIONS = 8
"""Extensions of 128 bits each. The probability that none of them decides a value is far below 2^-900."""


_interval_context = cache(MPIntervalContext)  # creating a context takes milliseconds


class RandomStream:
    """A cryptographic keystream that yields uniform bits, Bernoulli bits, and rounded Gaussian and Laplace values.

    Args:
        key: AES-256 key of 32 bytes. Secret, except in a marked study.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) == 32
        # The nonce may be constant because a key is used for one stream only.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform64(self, count: int) -> npt.NDArray[np.uint64]:
        """Draw `count` integers, uniform over [0, 2**64)."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Draw `count` independent Bernoulli bits with `probability`, rounded down to a multiple of 2**-64."""
        if probability >= 1:  # 2**64 does not fit into 64 bits
            return np.ones(count, dtype=np.bool_)
        return self.uniform64(count) < np.uint64(int(probability * 2.0**64))

    def draw_rounded_normal(self, count: int, deviation: float) -> npt.NDArray[np.int64]:
        """Draw `count` independent normal values with mean 0, each rounded to the nearest integer.

        Args:
            count: number of values.
            deviation: standard deviation before rounding.

        Guarantee: exact. A Box-Muller pair is a function of two uniform real numbers, and the first 64 bits of each are
        drawn. The float64 result is used unless it is so close to the midpoint of two integers that its error bound
        could change the rounding. Such a pair (a few in 10^6 at a noise of one clip norm) draws further bits, and
        interval arithmetic decides once both ends of the interval round to the same integer. So no gaps in the
        floating-point grid reveal the value without noise (Mironov 2012), and the tails are complete.

        Assumptions: numpy's log, sqrt, sin and cos are accurate to the bound in `_apply_box_muller`, which
        tests/privacy/test_randomness.py measures, and the keystream is indistinguishable from random bits.
        """
        pairs = -(-count // 2)
        radius_bits, angle_bits = self.uniform64(pairs), self.uniform64(pairs)
        values, error = _apply_box_muller(radius_bits, angle_bits, deviation)
        whole = np.rint(values)
        with np.errstate(invalid="ignore"):
            # Negated, so that the NaN or infinity of an all-zero radius is in doubt too.
            in_doubt = ~(np.abs(np.abs(values - whole) - 0.5) > error)
        whole[in_doubt] = 0
        rounded = whole.astype(np.int64)
        for place in np.flatnonzero(in_doubt.any(axis=0)):
            rounded[:, place] = self._round_exactly(int(radius_bits[place]), int(angle_bits[place]), deviation)
        return rounded.reshape(-1)[:count]

    def draw_rounded_laplace(self, count: int, scale: float) -> list[int]:
        """Draw `count` independent Laplace values of scale `scale`, each rounded to the nearest integer.

        Guarantee: exact, as in `_decide_rounding`: no rounding decision uses floating-point arithmetic. The absolute
        value is -scale x log(u) for a uniform real number u, and a separate random bit decides the sign.
        """
        prefixes, signs = self.uniform64(count), self.bernoulli(count, 0.5)
        sizes = [
            self._decide_rounding([int(bits)], lambda iv, uniform: [-scale * iv.log(uniform)])[0] for bits in prefixes
        ]
        return [size if positive else -size for size, positive in zip(sizes, signs, strict=True)]

    def _round_exactly(self, radius_bits: int, angle_bits: int, deviation: float) -> tuple[int, int]:
        """Round one Box-Muller pair exactly, by interval arithmetic."""

        def pair(intervals: Any, uniform: Any, turn: Any) -> list[Any]:
            radius, angle = deviation * intervals.sqrt(-2 * intervals.log(uniform)), 2 * intervals.pi * turn
            return [radius * intervals.cos(angle), radius * intervals.sin(angle)]

        first, second = self._decide_rounding([radius_bits, angle_bits], pair)
        return first, second

    def _decide_rounding(self, prefixes: list[int], values: Callable[..., list[Any]]) -> list[int]:
        """Round functions of uniform real numbers exactly: draw further bits until every rounding is decided.

        Args:
            prefixes: the first 64 bits of each uniform number; only the first number may be the argument of a
                logarithm.
            values: function of an interval-arithmetic context and one interval per uniform number; returns the values
                to round.
        """
        intervals, num_bits = _interval_context(), 64
        for _ in range(_MAX_EXTENSIONS):
            num_bits += 128
            prefixes = [self._extend_bits(bits) for bits in prefixes]
            intervals.prec = 2 * num_bits
            if prefixes[0] == 0:  # log(0): the interval has no lower end
                continue
            numbers = [intervals.mpf([bits, bits + 1]) / 2**num_bits for bits in prefixes]
            ends = [[_round_to_nearest(end) for end in value._mpi_] for value in values(intervals, *numbers)]
            if all(low == high for low, high in ends):
                return [low for low, _ in ends]
        raise AssertionError("a thousand further bits did not decide a rounding (probability below 2**-900)")

    def _extend_bits(self, bits: int) -> int:
        first, second = (int(more) for more in self.uniform64(2))
        return bits << 128 | first << 64 | second


def _apply_box_muller(
    radius_bits: npt.NDArray[np.uint64], angle_bits: npt.NDArray[np.uint64], deviation: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Apply the Box-Muller transform in float64, with error bounds.

    The exact uniform number is within one unit of its 64-bit prefix. The prefix and the conversion to float64 change
    its logarithm by 1/bits + 2^-53, and hence the radius r = sqrt(-2 log u) by that amount divided by r; the remaining
    error is a few units in the last place of r and of a sine or cosine. The bound at least doubles each term.

    Returns:
        The values, (2, pairs), and an error bound for each pair, (pairs,).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        # abs, not minus: bits that round to 1.0 would give a radius of -0.0 and an error of minus infinity.
        radius = np.sqrt(2.0 * np.abs(np.log(radius_bits.astype(np.float64) * 2.0**-64)))
        angle = angle_bits.astype(np.float64) * (2.0**-63 * np.pi)
        values = deviation * radius * np.stack([np.cos(angle), np.sin(angle)])
        error = deviation * (radius * 2.0**-45 + (2.0 / radius_bits + 2.0**-51) / radius)
    return values, error


def _round_to_nearest(end: Any) -> int:
    """Round an endpoint of an interval to the nearest integer, exactly: mpmath stores it as a binary fraction."""
    numerator, denominator = to_rational(end)
    return int((2 * numerator + denominator) // (2 * denominator))


class Randomness(Protocol):
    """A source of random streams for noise and sampling."""

    @property
    def seeded(self) -> bool:
        """Whether the streams are derived from a seed.

        Anybody with the seed can reproduce them, so there is no guarantee.
        """
        ...

    def stream(self, *purpose: str | int) -> RandomStream:
        """Return a fresh stream. Only seeded sources use `purpose` (site, round, attempt, use)."""
        ...


class SystemRandomness:
    """Streams keyed with 256 fresh bits of the operating system's CSPRNG. Real sites use no other source."""

    seeded = False

    def stream(self, *purpose: str | int) -> RandomStream:
        """Return a fresh stream that cannot be reproduced."""
        return RandomStream(os.urandom(32))


@dataclass(frozen=True)
class SeededRandomness:
    """Reproducible streams for tests and studies.

    Guarantee: none. Anyone who knows or guesses the seed can subtract the noise; the ledger and reports mark such runs.
    """

    seed: int
    seeded = True

    def stream(self, *purpose: str | int) -> RandomStream:
        """Return the stream for this seed and purpose. Different purposes yield independent streams."""
        label = "\x1f".join(map(str, (self.seed, *purpose)))
        return RandomStream(hashlib.sha256(b"fedtune study without a guarantee\x00" + label.encode()).digest())

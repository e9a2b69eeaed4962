"""Where the randomness of privacy comes from: an AES-256-CTR keystream under a key of the operating system.

torch's CPU generator keeps 32 bits of its seed and numpy's generators are no CSPRNG, so neither draws a noise value
or a sampling bit here.  A stream is made for one purpose, used once and dropped; nothing about it is stored.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_DRAWS_PER_NORMAL = 4


class RandomStream:
    """Uniform bits, Bernoulli bits and Gaussian values from a cryptographic keystream.

    Args:
        key: 32 bytes.  Secret unless this is a marked study.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) == 32
        # The nonce may be constant because a key is used for one stream only.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform64(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` integers, uniform over [0, 2**64)."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """`count` independent bits, each one with `probability` (exact to 2**-64, rounded down)."""
        if probability >= 1:
            return np.ones(count, dtype=np.bool_)
        return self.uniform64(count) < np.uint64(int(probability * 2.0**64))

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """`count` independent standard normal values in float64.

        Each is the sum of four Box-Muller values divided by two.  A single transformed float leaves holes in its
        output from which the value without noise can be told (Mironov 2012); a sum of several makes the number of
        ways to reach each output too large to enumerate (Holohan and Braghin 2021, arXiv 2107.10138, section 3).
        """
        pairs = (_DRAWS_PER_NORMAL // 2, count)
        radius = np.sqrt(-2.0 * np.log(self._open_unit(pairs[0] * count))).reshape(pairs)
        angle = 2.0 * np.pi * self._open_unit(pairs[0] * count).reshape(pairs)
        # The sine of a pair goes to the next value: r cos + r sin of one pair would be a single draw in disguise.
        total = (radius * np.cos(angle)).sum(axis=0) + np.roll((radius * np.sin(angle)).sum(axis=0), 1)
        return total / np.sqrt(_DRAWS_PER_NORMAL)  # type: ignore[no-any-return]

    def _open_unit(self, count: int) -> npt.NDArray[np.float64]:
        """Uniform values strictly between 0 and 1, with 53 random bits each."""
        return ((self.uniform64(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


class Randomness(Protocol):
    """Hands out one stream for each purpose."""

    @property
    def seeded(self) -> bool:
        """True if the streams can be repeated by who knows the seed: a study without a guarantee."""
        ...

    def stream(self, *purpose: str | int) -> RandomStream:
        """A fresh stream; `purpose` (site, round, attempt, what for) only matters to a seeded source."""
        ...


class SystemRandomness:
    """The only source at a real site: every stream has 256 fresh bits of the operating system's CSPRNG as its key."""

    seeded = False

    def stream(self, *purpose: str | int) -> RandomStream:
        """A stream that nobody can repeat."""
        return RandomStream(os.urandom(32))


@dataclass(frozen=True)
class SeededRandomness:
    """Repeatable streams for tests and studies.

    Guarantee: none.  Who knows or guesses the seed can subtract the noise; runs that use it are marked.
    """

    seed: int
    seeded = True

    def stream(self, *purpose: str | int) -> RandomStream:
        """The stream for this seed and purpose; different purposes give independent streams."""
        label = "\x1f".join(map(str, (self.seed, *purpose)))
        return RandomStream(hashlib.sha256(b"fedtune study without a guarantee\x00" + label.encode()).digest())

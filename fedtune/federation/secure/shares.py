"""Shamir secret sharing of 256-bit secrets over a prime field: t shares determine the secret, t - 1 reveal nothing."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedtune.privacy.ledger.chain import to_canonical_json

PRIME = 2**256 + 297  # the smallest prime above 2**256, so that any 32 bytes are a valid secret
SHARE_BYTES = 33


def split_secret(secret: bytes, *, threshold: int, num_shares: int) -> list[int]:
    """Split a secret into the values at 0, 1, ..., num_shares of a random polynomial of degree threshold - 1.

    The value at 0 is the secret; the share at point i is the value at index i.

    Guarantee: the values at any threshold - 1 points other than 0 are uniform and independent of the secret.

    Args:
        secret: 32 bytes.
        threshold: the number of shares that determine the secret.
        num_shares: the number of shares.
    """
    assert len(secret) == 32
    assert 1 <= threshold <= num_shares
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_evaluate_polynomial(place, coefficients) for place in range(num_shares + 1)]


def combine_shares(shares: Mapping[int, int]) -> int:
    """Interpolate shares, a mapping from nonzero point to value, and return the value at 0."""
    weights = _compute_lagrange_weights(tuple(shares))
    return sum(weight * share for weight, share in zip(weights, shares.values(), strict=True)) % PRIME


def hash_share(share: int, *about: str | int) -> bytes:
    """Return the SHA-256 of a share, bound to its context `about`.

    A site publishes the digest of every share that it deals, so that wrong shares can be detected.  A digest does not
    help to guess a share, because secrets and shares have 256 random bits.
    """
    return hashlib.sha256(b"fedtune share\0" + to_canonical_json(about) + share.to_bytes(SHARE_BYTES)).digest()


def _evaluate_polynomial(place: int, coefficients: list[int]) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value


@lru_cache(maxsize=64)
def _compute_lagrange_weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Compute the Lagrange weights at 0 for a set of points."""
    weights = []
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)

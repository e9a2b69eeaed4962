"""Shamir secret sharing of 256-bit secrets over a prime field: t shares determine the secret, t - 1 reveal nothing
about it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedtune.privacy.ledger.chain import to_canonical_json

PRIME = 2**256 + 297  # the smallest prime above 2**256, so that every 32 bytes are a secret
SHARE_BYTES = 33


def split_secret(secret: bytes, *, threshold: int, num_shares: int) -> list[int]:
    """Split a secret: return the values at 0, 1, ..., num_shares of a random polynomial of degree threshold - 1 that is
    equal to the secret at 0.

    Guarantee: the values at any threshold - 1 places other than 0 are uniform and independent of the secret.

    Args:
        secret: 32 bytes.
        threshold: how many shares determine the secret.
        num_shares: the number of shares; the share at place i is the value at index i.
    """
    assert len(secret) == 32
    assert 1 <= threshold <= num_shares
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_evaluate_polynomial(place, coefficients) for place in range(num_shares + 1)]


def combine_shares(shares: Mapping[int, int]) -> int:
    """Interpolate the shares, place -> value, and return the value at 0; no place may be 0."""
    weights = _compute_lagrange_weights(tuple(shares))
    return sum(weight * share for weight, share in zip(weights, shares.values(), strict=True)) % PRIME


def share_digest(share: int, *about: str | int) -> bytes:
    """Return the SHA-256 of a share, bound to `about`, which says what the share belongs to.

    A site publishes the digest of every share that it deals, so that wrong shares can be detected.  Secrets and shares
    have 256 random bits, so that a digest does not allow guessing them.
    """
    return hashlib.sha256(b"fedtune share\0" + to_canonical_json(about) + share.to_bytes(SHARE_BYTES)).digest()


def _evaluate_polynomial(place: int, coefficients: list[int]) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value


@lru_cache(maxsize=64)
def _compute_lagrange_weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Compute the Lagrange weights at 0; they depend only on the sites that contribute shares."""
    weights = []
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)

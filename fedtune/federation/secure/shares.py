"""Shamir's secret sharing of 256-bit secrets over a prime field: t shares give the secret, t - 1 say nothing of it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedtune.privacy.ledger.chain import canonical

PRIME = 2**256 + 297  # the smallest prime above 2**256, so that every 32 bytes are a secret
SHARE_BYTES = 33


def split(secret: bytes, *, threshold: int, num_shares: int) -> list[int]:
    """Values at 0, 1, ..., num_shares of a random polynomial of degree threshold - 1, whose value at 0 is the secret.

    Guarantee: the values at any threshold - 1 places but 0 are uniform and independent of the secret.

    Args:
        secret: 32 bytes.
        threshold: how many of the shares give the secret.
        num_shares: how many there are; the one at place i is the value with index i.
    """
    assert len(secret) == 32
    assert 1 <= threshold <= num_shares
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value_at(place, coefficients) for place in range(num_shares + 1)]


def joined(shares: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial of least degree through these values by place, none of which is 0."""
    weights = _weights(tuple(shares))
    return sum(weight * share for weight, share in zip(weights, shares.values(), strict=True)) % PRIME


def digest(share: int, *about: str | int) -> bytes:
    """SHA-256 of a share and what it is a share of.

    A site publishes it of every share that it deals, so that a wrong one is known for wrong.  Secret and shares have
    256 random bits, so that it tells nothing of them that could be found by trying.
    """
    return hashlib.sha256(b"fedtune share\0" + canonical(about) + share.to_bytes(SHARE_BYTES)).digest()


def _value_at(place: int, coefficients: list[int]) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value


@lru_cache(maxsize=64)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0; they are the same for all secrets that the same sites give shares of."""
    weights = []
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)

"""Shares of a secret: t of them give it, fewer say nothing."""

import itertools
import os
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.federation.secure import shares
from fedtune.federation.secure.shares import PRIME, digest, joined, split


def test_the_field_has_a_prime_number_of_elements() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):  # Miller and Rabin: a composite number passes one trial with probability below 1/4
        power = pow(random.randrange(2, PRIME - 1), odd, PRIME)
        seen = [pow(power, 2**doubled, PRIME) for doubled in range(twos)]
        assert power == 1 or PRIME - 1 in seen
    assert 2**256 < PRIME < 2 ** (8 * shares.SHARE_BYTES)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 3), st.randoms())
def test_any_t_shares_give_the_secret(secret: bytes, threshold: int, more: int, chance: random.Random) -> None:
    values = split(secret, threshold=threshold, num_shares=threshold + more)
    assert values[0] == int.from_bytes(secret)
    places = chance.sample(range(1, threshold + more + 1), threshold)
    assert joined({place: values[place] for place in places}) == values[0]


def test_fewer_shares_fit_every_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a field of seven elements: all polynomials, and what two of three shares say of the secret.
    monkeypatch.setattr(shares, "PRIME", 7)
    seen: Counter[tuple[int, int, int]] = Counter()
    for secret, *coefficients in itertools.product(range(7), repeat=3):
        draws = iter(coefficients)
        monkeypatch.setattr(shares.secrets, "randbelow", lambda bound, draws=draws: next(draws))
        values = split(secret.to_bytes(32), threshold=3, num_shares=4)
        seen[values[0], values[2], values[4]] += 1
    assert seen == Counter(itertools.product(range(7), repeat=3))
    bounds: list[int] = []
    monkeypatch.undo()
    monkeypatch.setattr(shares.secrets, "randbelow", lambda bound: bounds.append(bound) or 1)
    split(bytes(32), threshold=3, num_shares=3)
    assert bounds == [PRIME, PRIME], "coefficients are drawn from the whole field"


def test_a_wrong_share_gives_another_secret_and_has_another_digest() -> None:
    values = split(os.urandom(32), threshold=2, num_shares=3)
    assert joined({1: values[1], 2: (values[2] + 1) % PRIME}) != values[0]
    assert digest(values[1], "a", 1) == digest(values[1], "a", 1)
    others = [digest(values[1] ^ 1, "a", 1), digest(values[1], "a", 2), digest(values[1], "b", 1)]
    assert digest(values[1], "a", 1) not in others

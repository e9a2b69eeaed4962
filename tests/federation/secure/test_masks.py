"""Masks, their packing and their seeds: uniqueness, cancellation in the sum, and secret sharing."""

import hmac
import itertools
import os
import random
from collections import Counter

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.federation.secure import shares
from fedtune.federation.secure.masks import MaskKey, PairSecrets, is_mask_key, sum_masks
from fedtune.federation.secure.packing import (
    compute_packed_size,
    pack_residues,
    reduce_residues,
    to_signed_integers,
    unpack_residues,
)
from fedtune.federation.secure.shares import PRIME, combine_shares, hash_share, split_secret

from .parties import Federation, make_terms

SESSION = "ab" * 32


def make_pair(session: str = SESSION, other_session: str = SESSION) -> tuple[PairSecrets, PairSecrets]:
    a, b = MaskKey(), MaskKey()
    keys = {"a": a.public, "b": b.public}
    return a.derive_secrets(session, keys), b.derive_secrets(other_session, keys)


def test_two_sites_derive_the_same_seed_per_release() -> None:
    at_a, at_b = make_pair()
    seeds = [at_a.derive_mask_seed("a", "b", release=release) for release in (1, 2, 3)]
    assert seeds == [at_b.derive_mask_seed("b", "a", release=release) for release in (1, 2, 3)]
    assert len(set(seeds)) == 3
    assert all(len(seed) == 32 for seed in seeds)
    at_a, at_b = make_pair(other_session="cd" * 32)
    assert at_a.derive_mask_seed("a", "b", release=1) != at_b.derive_mask_seed("b", "a", release=1)


def test_mask_seed_matches_plain_hkdf() -> None:
    """Compares with HKDF from the standard library (RFC 5869), because sites of one protocol version must derive equal
    seeds.
    """
    private = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    other = X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
    key = MaskKey()
    key._private = private
    seed = key.derive_secrets(SESSION, {"b": other.public_key().public_bytes_raw().hex()}).derive_mask_seed(
        "b", "b", release=7
    )
    extracted = hmac.digest(bytes.fromhex(SESSION), other.exchange(private.public_key()), "sha256")
    assert seed == hmac.digest(extracted, b'fedtune secure aggregation\0["mask",7,"b","b"]\x01', "sha256")


def test_sealed_text_opens_only_for_its_receiver_release_and_session() -> None:
    at_a, at_b = make_pair()
    sealed = at_a.seal(b"text", sender="a", receiver="b", release=1)
    assert at_b.unseal(sealed, sender="a", receiver="b", release=1) == b"text"
    assert at_b.unseal(sealed, sender="a", receiver="b", release=2) is None
    assert at_a.unseal(sealed, sender="b", receiver="a", release=1) is None
    assert at_b.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), sender="a", receiver="b", release=1) is None
    assert at_b.unseal(b"", sender="a", receiver="b", release=1) is None
    assert sealed not in (at_a.seal(b"text", sender="a", receiver="b", release=2), b"text")
    assert make_pair()[1].unseal(sealed, sender="a", receiver="b", release=1) is None


@pytest.mark.parametrize(
    "key",
    ["0" * 64, "01" + "0" * 62, "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", "AB" * 32, ""],
)
def test_low_order_public_keys_are_refused(key: str) -> None:
    assert not is_mask_key(key)
    assert is_mask_key(MaskKey().public)


def test_mask_is_the_chacha20_keystream_and_pairs_cancel() -> None:
    seed = os.urandom(32)
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(8 * 5))
    assert sum_masks("a", {"a": seed}, length=5).tobytes() == stream
    for index in (0, 3, 31):  # a seed truncated to fewer bits would ignore some of them
        other = bytes(byte ^ (index == position) for position, byte in enumerate(seed))
        assert not np.any(sum_masks("a", {"a": other}, length=5) == sum_masks("a", {"a": seed}, length=5))
    # The masks of a pair cancel; a site's own mask does not.
    own_seed = os.urandom(32)
    first, second = sum_masks("a", {"b": seed, "a": own_seed}, length=9), sum_masks("b", {"a": seed}, length=9)
    assert np.array_equal(first + second, sum_masks("a", {"a": own_seed}, length=9))
    assert np.any(second != 0)


def mask_vector(federation: Federation, release: int, site: str = "a") -> np.ndarray:
    data = federation.parties[site].upload(release, federation.make_vector(site))
    terms = federation.terms
    return unpack_residues(data[-terms.length * terms.bits // 8 :], terms.length, terms.bits)


def test_masked_uploads_and_their_differences_are_uniform() -> None:
    """A chi-square test over 2^8 cells of the lowest and of the highest bits, with a false alarm rate of 10^-7 each."""
    federation = Federation(make_terms(3, 2, length=1 << 16, largest=10_000))
    assert federation.terms.bits == 16
    first, second, other = mask_vector(federation, 1), mask_vector(federation, 2), mask_vector(federation, 2, "b")
    bits = federation.terms.bits
    for numbers in (
        first,
        second,
        other,
        reduce_residues(first - second, bits),
        reduce_residues(second - other, bits),
        reduce_residues(second + other, bits),
    ):
        for byte in (numbers & np.uint64(255), numbers >> np.uint64(8)):
            counts = np.bincount(byte.astype(np.int64), minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-7


BITS = st.integers(1, 64)


@settings(deadline=None)
@given(BITS, st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_packed_values_round_trip_in_the_fewest_bytes(bits: int, values: list[int]) -> None:
    numbers = reduce_residues(np.array(values, np.uint64), bits)
    data = pack_residues(numbers, bits)
    assert len(data) == compute_packed_size(len(values), bits) == (len(values) * bits + 7) // 8
    assert unpack_residues(data, len(values), bits).tolist() == [value % 2**bits for value in values]
    packed = sum(int(number) << place * bits for place, number in enumerate(numbers))
    assert int.from_bytes(data, "little") == packed, "values must be packed without gaps"


@pytest.mark.parametrize("bits", [1, 17, 31, 33, 64])
def test_long_vectors_round_trip_through_packing(bits: int) -> None:
    count = (1 << 17) + 5
    numbers = reduce_residues(np.random.default_rng(bits).integers(0, 2**64, count, dtype=np.uint64), bits)
    assert np.array_equal(unpack_residues(pack_residues(numbers, bits), count, bits), numbers)


def test_invalid_packed_bytes_are_refused() -> None:
    data = pack_residues(np.array([1, 2, 3], np.uint64), 3)
    assert len(data) == 2
    for other in (data + b"\0", data[:1], bytes([data[0], data[1] | 0x80])):
        with pytest.raises(ValueError, match=r"length|unused bits"):
            unpack_residues(other, 3, 3)


@given(BITS, st.data())
def test_signed_values_round_trip_through_the_modulus(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=9))
    assert (
        to_signed_integers(reduce_residues(np.array(values, np.int64).astype(np.uint64), bits), bits).tolist() == values
    )


def test_shamir_field_order_is_prime() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):  # Miller and Rabin: a composite number passes one trial with probability below 1/4
        power = pow(random.randrange(2, PRIME - 1), odd, PRIME)
        squares = [pow(power, 2**exponent, PRIME) for exponent in range(twos)]
        assert power == 1 or PRIME - 1 in squares
    assert 2**256 < PRIME < 2 ** (8 * shares.SHARE_BYTES)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 3), st.randoms())
def test_any_threshold_of_shares_recovers_the_secret(
    secret: bytes, threshold: int, extra: int, rng: random.Random
) -> None:
    values = split_secret(secret, threshold=threshold, num_shares=threshold + extra)
    assert values[0] == int.from_bytes(secret)
    points = rng.sample(range(1, threshold + extra + 1), threshold)
    assert combine_shares({point: values[point] for point in points}) == values[0]


def test_fewer_shares_than_the_threshold_reveal_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a field of seven elements: all polynomials, and what two of three shares reveal about the secret.
    monkeypatch.setattr(shares, "PRIME", 7)
    counts: Counter[tuple[int, int, int]] = Counter()
    for secret, *coefficients in itertools.product(range(7), repeat=3):
        draws = iter(coefficients)
        monkeypatch.setattr(shares.secrets, "randbelow", lambda bound, draws=draws: next(draws))
        values = split_secret(secret.to_bytes(32), threshold=3, num_shares=4)
        counts[values[0], values[2], values[4]] += 1
    assert counts == Counter(itertools.product(range(7), repeat=3))
    bounds: list[int] = []
    monkeypatch.undo()
    monkeypatch.setattr(shares.secrets, "randbelow", lambda bound: bounds.append(bound) or 1)
    split_secret(bytes(32), threshold=3, num_shares=3)
    assert bounds == [PRIME, PRIME], "coefficients must be drawn from the whole field"


def test_wrong_share_changes_the_secret_and_its_digest() -> None:
    values = split_secret(os.urandom(32), threshold=2, num_shares=3)
    assert combine_shares({1: values[1], 2: (values[2] + 1) % PRIME}) != values[0]
    assert hash_share(values[1], "a", 1) == hash_share(values[1], "a", 1)
    digests = [hash_share(values[1] ^ 1, "a", 1), hash_share(values[1], "a", 2), hash_share(values[1], "b", 1)]
    assert hash_share(values[1], "a", 1) not in digests

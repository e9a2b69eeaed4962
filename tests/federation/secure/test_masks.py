"""Masks: no two alike, none that is seen twice, all of them gone in the sum."""

import hmac
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from fedtune.federation.secure.masks import MaskKey, PairSecrets, is_mask_key, masks
from fedtune.federation.secure.packing import reduced, unpacked

from .parties import Federation, terms_of

SESSION = "ab" * 32


def pair(session: str = SESSION, other_session: str = SESSION) -> tuple[PairSecrets, PairSecrets]:
    a, b = MaskKey(), MaskKey()
    keys = {"a": a.public, "b": b.public}
    return a.agreed_in(session, keys), b.agreed_in(other_session, keys)


def test_two_sites_have_one_seed_for_each_release() -> None:
    at_a, at_b = pair()
    seeds = [at_a.mask_seed("a", "b", release=release) for release in (1, 2, 3)]
    assert seeds == [at_b.mask_seed("b", "a", release=release) for release in (1, 2, 3)]
    assert len(set(seeds)) == 3
    assert all(len(seed) == 32 for seed in seeds)
    at_a, at_b = pair(other_session="cd" * 32)
    assert at_a.mask_seed("a", "b", release=1) != at_b.mask_seed("b", "a", release=1)


def test_a_seed_is_what_two_plain_hashes_make_of_the_agreed_key() -> None:
    """HKDF with the standard library alone (RFC 5869): two sites of one protocol version must derive the same."""
    private = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    other = X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
    key = MaskKey()
    key._private = private
    seed = key.agreed_in(SESSION, {"b": other.public_key().public_bytes_raw().hex()}).mask_seed("b", "b", release=7)
    extracted = hmac.digest(bytes.fromhex(SESSION), other.exchange(private.public_key()), "sha256")
    assert seed == hmac.digest(extracted, b'fedtune secure sum\0["mask",7,"b","b"]\x01', "sha256")


def test_what_is_sealed_opens_for_its_receiver_its_sender_its_release_and_its_session_alone() -> None:
    at_a, at_b = pair()
    sealed = at_a.seal(b"text", sender="a", receiver="b", release=1)
    assert at_b.opened(sealed, sender="a", receiver="b", release=1) == b"text"
    assert at_b.opened(sealed, sender="a", receiver="b", release=2) is None
    assert at_a.opened(sealed, sender="b", receiver="a", release=1) is None
    assert at_b.opened(sealed[:-1] + bytes([sealed[-1] ^ 1]), sender="a", receiver="b", release=1) is None
    assert at_b.opened(b"", sender="a", receiver="b", release=1) is None
    assert sealed not in (at_a.seal(b"text", sender="a", receiver="b", release=2), b"text")
    assert pair()[1].opened(sealed, sender="a", receiver="b", release=1) is None


@pytest.mark.parametrize(
    "key",
    ["0" * 64, "01" + "0" * 62, "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", "AB" * 32, ""],
)
def test_a_key_under_which_everybody_knows_the_secret_is_none(key: str) -> None:
    assert not is_mask_key(key)
    assert is_mask_key(MaskKey().public)


def test_a_mask_is_the_keystream_of_its_whole_seed_and_those_of_a_pair_cancel() -> None:
    seed = os.urandom(32)
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(8 * 5))
    assert masks("a", {"a": seed}, length=5).tobytes() == stream
    for place in (0, 3, 31):  # a seed that is cut to fewer bits would leave some without effect
        other = bytes(byte ^ (place == at) for at, byte in enumerate(seed))
        assert not np.any(masks("a", {"a": other}, length=5) == masks("a", {"a": seed}, length=5))
    # Masks of a pair cancel, and a site's own does not.
    own = os.urandom(32)
    first, second = masks("a", {"b": seed, "a": own}, length=9), masks("b", {"a": seed}, length=9)
    assert np.array_equal(first + second, masks("a", {"a": own}, length=9))
    assert np.any(second != 0)


def masked(federation: Federation, release: int, site: str = "a") -> np.ndarray:
    data = federation.parties[site].upload(release, federation.vector(site))
    terms = federation.terms
    return unpacked(data[-terms.length * terms.bits // 8 :], terms.length, terms.bits)


def test_a_masked_upload_is_uniform_and_so_are_differences_of_two() -> None:
    """By chi-square over 2^8 cells of the lowest and of the highest bits; a false alarm once in 10^7 each."""
    federation = Federation(terms_of(3, 2, length=1 << 16, largest=1000, bits=16))
    one, two, other = masked(federation, 1), masked(federation, 2), masked(federation, 2, "b")
    bits = federation.terms.bits
    for numbers in (one, two, other, reduced(one - two, bits), reduced(two - other, bits), reduced(two + other, bits)):
        for byte in (numbers & np.uint64(255), numbers >> np.uint64(8)):
            counts = np.bincount(byte.astype(np.int64), minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-7

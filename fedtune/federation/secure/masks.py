"""Pairwise masks and their keys: X25519 between two sites, HKDF-SHA256 per release, ChaCha20 keystream per vector.

No seed is used in two releases, and one seed reveals nothing about another: each seed is either 32 fresh random bytes,
or HKDF-SHA256 of a key agreed between two sites, bound to session, release and purpose.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.privacy.ledger.chain import to_canonical_json

SEED_BYTES = 32
TAG_BYTES = 16


class MaskKey:
    """A site's X25519 private key for one session; it exists only in memory, so that no backup can restore it."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()

    @property
    def public(self) -> str:
        """The public key as 64 hex digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def derive_secrets(self, session: str, keys: Mapping[str, str]) -> PairSecrets:
        """Derive the pairwise secrets with every member of a session.

        Args:
            session: the digest of the session.
            keys: site -> its public key, validated by `is_mask_key`.
        """
        return PairSecrets(session, {site: self._private.exchange(_load_public_key(key)) for site, key in keys.items()})


def is_mask_key(text: str) -> bool:
    """Return True if `text` is a valid public key: 64 lower-case hex digits that do not encode a point of small order.

    With a point of small order, every shared secret would be zero, and therefore public.
    """
    try:
        X25519PrivateKey.generate().exchange(_load_public_key(text))
    except ValueError:
        return False
    return text == bytes.fromhex(text).hex()


def _load_public_key(key: str) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(bytes.fromhex(key))


class PairSecrets:
    """The pairwise secrets of a site with every member of a session, including itself."""

    def __init__(self, session: str, agreed: Mapping[str, bytes]) -> None:
        self._session, self._agreed = session, agreed

    def derive_mask_seed(self, site: str, other: str, *, release: int) -> bytes:
        """Derive the seed of the mask that `site` and `other` share in one release; both derive the same seed."""
        return self._derive_key(other, "mask", release, *sorted((site, other)))

    def seal(self, text: bytes, *, sender: str, receiver: str, release: int) -> bytes:
        """Encrypt a message from `sender` to `receiver` in one release; call it only once per release, because the
        nonce is constant.
        """
        return self._make_cipher(receiver, sender, receiver, release).encrypt(bytes(12), text, None)

    def unseal(self, sealed: bytes, *, sender: str, receiver: str, release: int) -> bytes | None:
        """Decrypt a message that `sender` sealed for `receiver` in this release; None if the ciphertext is not
        authentic.
        """
        try:
            return self._make_cipher(sender, sender, receiver, release).decrypt(bytes(12), sealed, None)
        except InvalidTag:
            return None

    def _make_cipher(self, other: str, sender: str, receiver: str, release: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(self._derive_key(other, "shares", release, sender, receiver))

    def _derive_key(self, other: str, *about: str | int) -> bytes:
        salt, info = bytes.fromhex(self._session), b"fedtune secure aggregation\0" + to_canonical_json(about)
        return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=salt, info=info).derive(self._agreed[other])


def sum_masks(site: str, seeds: Mapping[str, bytes], *, length: int) -> npt.NDArray[np.uint64]:
    """Compute the sum of all masks of `site` in a release, modulo 2**64; shape (length,).

    If two sites share a mask, the first site in name order adds it and the second site subtracts it, so that the mask
    cancels in the sum of their vectors.  The masks also cancel modulo every smaller power of two.

    Args:
        site: the site that applies the masks.
        seeds: peer site -> the seed of the shared mask; the seed of the site's own mask is under its own name.
        length: the number of values in a vector.
    """
    total = np.zeros(length, np.uint64)
    for other, seed in seeds.items():
        stream = _generate_keystream(seed, length)
        if site <= other:
            total += stream
        else:
            total -= stream
    return total


def _generate_keystream(seed: bytes, length: int) -> npt.NDArray[np.uint64]:
    """Generate a ChaCha20 keystream of `length` uint64 values; the nonce is constant because each seed is used once."""
    assert len(seed) == SEED_BYTES
    cipher = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * length)), dtype="<u8")

"""Masks and the keys behind them: X25519 between two sites, HKDF for each release, ChaCha20 for each value.

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
    """A site's X25519 key, kept only in memory and never written to disk, so that no backup can restore it."""

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
            keys: site -> its public key, each accepted by `is_mask_key`.
        """
        return PairSecrets(session, {site: self._private.exchange(_load_public_key(key)) for site, key in keys.items()})


def is_mask_key(text: str) -> bool:
    """Return True if `text` can be a public key: 64 lower-case hex digits that do not encode a point of small order.

    With a point of small order, every shared secret would be zero, and therefore known to everybody.
    """
    try:
        X25519PrivateKey.generate().exchange(_load_public_key(text))
    except ValueError:
        return False
    return text == bytes.fromhex(text).hex()


def _load_public_key(key: str) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(bytes.fromhex(key))


class PairSecrets:
    """The secrets that a site shares with each member of a session, itself included."""

    def __init__(self, session: str, agreed: Mapping[str, bytes]) -> None:
        self._session, self._agreed = session, agreed

    def mask_seed(self, site: str, other: str, *, release: int) -> bytes:
        """Return the seed of the mask that two sites share in one release; both sites derive the same seed."""
        return self._derive_key(other, "mask", release, *sorted((site, other)))

    def seal(self, text: bytes, *, sender: str, receiver: str, release: int) -> bytes:
        """Encrypt a message from `sender` to `receiver` in one release; call it once, because the key is used with a
        single nonce.
        """
        return self._make_cipher(receiver, sender, receiver, release).encrypt(bytes(12), text, None)

    def unseal(self, sealed: bytes, *, sender: str, receiver: str, release: int) -> bytes | None:
        """Decrypt what `sender` sealed for `receiver` in this release; None if the ciphertext is anything else."""
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
    """Sum the masks that `site` adds to its vector in a release, modulo 2**64; shape (length,).

    Of the mask shared by two sites, the first by name adds it and the other subtracts it, so that it cancels in the sum
    of both.  The same holds modulo every smaller power of two.

    Args:
        site: the site that applies the masks.
        seeds: seeds by the site that the mask is shared with; the site's own mask is under its own name.
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
    """Generate a ChaCha20 keystream of `length` values; the nonce may be constant because each seed has one stream
    only.
    """
    assert len(seed) == SEED_BYTES
    cipher = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * length)), dtype="<u8")

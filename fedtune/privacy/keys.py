"""Ed25519 keys: a site's, under which it signs its ledger and its receipts, and a lead's, for its requests."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.privacy.durable import fsync_folder
from fedtune.spec import ConfigError

# Every encoding, its sign bit left out, of the points whose order divides 8.
_SMALL_ORDER = {
    "00" * 32,
    "01" + "00" * 31,
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
}


class SigningKey:
    """A private key and the secrets derived from it; none of them ever leaves the machine that made it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._raw = private.private_bytes_raw()

    @classmethod
    def load_or_make(cls, path: Path) -> SigningKey:
        """The key in the PEM file `path`, which is made, for its owner alone to read, when it is missing."""
        if not path.exists():
            _write_new(path, Ed25519PrivateKey.generate())
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key in the PEM file `path`.

        Raises:
            ConfigError: the file is missing or holds no Ed25519 key.
        """
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
            if not isinstance(private, Ed25519PrivateKey):
                raise TypeError("another kind of key")
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError("key", str(path), "must be a PEM file with an Ed25519 private key") from error
        return cls(private)

    @property
    def public(self) -> str:
        """The public key, 64 hex digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, purpose: str, message: bytes) -> str:
        """Signature, in hex, of `message`; one made for another purpose does not pass for it."""
        return self._private.sign(_framed(purpose, message)).hex()

    def secret(self, purpose: str) -> bytes:
        """32 secret bytes for `purpose`: who does not hold the key cannot test a guess of what they were used on."""
        return hmac.digest(self._raw, b"fedtune secret\0" + purpose.encode(), hashlib.sha256)


def is_signed(public: str, purpose: str, message: bytes, signature: str) -> bool:
    """`signature` is the holder's of `public` on `message`, for `purpose`; each has one spelling."""
    if not (is_public_key(public) and _is_hex(signature, 128)):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _framed(purpose, message))
    except (InvalidSignature, ValueError):  # ValueError: no point of the curve
        return False
    return True


def is_public_key(text: str) -> bool:
    """`text` can be a public key: 64 lower-case hex digits, and no point of small order.

    Under a point of small order (all zeros among them) anybody can make signatures that pass.
    """
    return _is_hex(text, 64) and text[:62] + f"{int(text[62:], 16) & 0x7F:02x}" not in _SMALL_ORDER


def check_public_key(key: str, text: str) -> None:
    """Require `text` to be what `is_public_key` takes for one."""
    if not is_public_key(text):
        raise ConfigError(key, text, "must be a public key of 64 lower-case hex digits")


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(digit in "0123456789abcdef" for digit in text)


def _framed(purpose: str, message: bytes) -> bytes:
    return b"fedtune " + purpose.encode() + b"\0" + message


def _write_new(path: Path, private: Ed25519PrivateKey) -> None:
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # fails where another process was first: then its key is the one
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    fsync_folder(path.parent)

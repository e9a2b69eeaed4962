"""Ed25519 signing keys of sites (for ledgers and receipts) and of leads (for requests).

Only this module reads private keys: from a PEM file, which may be encrypted, or from the output of a command.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired, run

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune import system
from fedtune.codec import read_regular_file
from fedtune.privacy.durable import write_durably
from fedtune.spec import ConfigError, format_value
from fedtune.system import fsync_folder

PASSPHRASE_FILE = "FEDTUNE_KEY_PASSPHRASE_FILE"  # environment variable: a file whose first line is the passphrase
_COMMAND_S = 10.0  # timeout of a key command
# All encodings, without the sign bit, of the points whose order divides 8.
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
    """An Ed25519 private key and the secrets derived from it.

    Neither the key nor a derived secret leaves the machine.
    """

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._raw = private.private_bytes_raw()

    @classmethod
    def load_or_create(cls, path: Path, *, command: Sequence[str] = (), named_in: Path | None = None) -> SigningKey:
        """Load the key as `load` does, and create a missing key file.

        A new key file is readable by its owner only. No file is created if a command provides the key.

        A new key is encrypted if the environment variable `PASSPHRASE_FILE` points to a file with a passphrase.
        """
        if not command and not path.exists():
            _write_new_key(path, Ed25519PrivateKey.generate())
        return cls.load(path, command=command, named_in=named_in)

    @classmethod
    def load(cls, path: Path, *, command: Sequence[str] = (), named_in: Path | None = None) -> SigningKey:
        """Load the key from the PEM file `path`, or from the PEM output of `command`, which is never written to disk.

        Guarantee: the command runs only if the file `named_in`, which configures it, belongs to the current account,
        and nobody else can write that file.

        Raises:
            ConfigError: the key is not an Ed25519 key, or its passphrase is missing or wrong. The message contains
                neither the key nor the passphrase.
        """
        key, value = ("key_command", command[0]) if command else ("key", str(path))
        bound, passphrase = "is not an Ed25519 private key in PEM format", None
        try:
            if command:
                _check_command(command, named_in)
            pem = _run_key_command(tuple(command)) if command else read_regular_file(path)
        except OSError as error:
            raise ConfigError(key, value, f"{bound} ({error.strerror})") from None
        if b"ENCRYPTED" in pem:
            bound = "is encrypted with another passphrase, or is not an Ed25519 private key"
            if (passphrase := _read_passphrase()) is None:
                remedy = f"set {PASSPHRASE_FILE} to a file with its passphrase"
                raise ConfigError(key, value, "is encrypted", remedy=remedy)
        try:
            private = serialization.load_pem_private_key(pem, password=passphrase)
            if not isinstance(private, Ed25519PrivateKey):
                raise TypeError("unsupported key type: Ed25519 is required")
        except (ValueError, TypeError, UnsupportedAlgorithm):  # their messages could quote the key
            raise ConfigError(key, value, bound) from None
        return cls(private)

    @property
    def public(self) -> str:
        """The public key as 64 hex digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, purpose: str, message: bytes) -> str:
        """Sign `message` for `purpose`, and return the signature in hex.

        The signature is invalid for any other purpose.
        """
        return self._private.sign(_frame_message(purpose, message)).hex()

    def derive_secret(self, purpose: str) -> bytes:
        """Derive a 32-byte secret for `purpose`, used as an HMAC key to prevent dictionary attacks."""
        return hmac.digest(self._raw, b"fedtune secret\0" + purpose.encode(), hashlib.sha256)


def is_signed(public: str, purpose: str, message: bytes, signature: str) -> bool:
    """Whether `signature` is a valid signature by `public` on `message` for `purpose`.

    Key and signature must be lower-case hex, so that each has only one encoding.
    """
    if not (is_public_key(public) and _is_hex(signature, 128)):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _frame_message(purpose, message))
    except (InvalidSignature, ValueError):  # ValueError: not a point on the curve
        return False
    return True


def is_public_key(text: str) -> bool:
    """Whether `text` is a valid public key: 64 lower-case hex digits that do not encode a point of small order.

    Anybody can make valid signatures under a point of small order (the all-zero key is one).
    """
    return _is_hex(text, 64) and text[:62] + f"{int(text[62:], 16) & 0x7F:02x}" not in _SMALL_ORDER


def check_public_key(key: str, text: str) -> None:
    """Check that `text` is a valid public key (`is_public_key`).

    Raises:
        ConfigError: the text is not a public key.
    """
    if not is_public_key(text):
        raise ConfigError(key, text, "must be a public key of 64 lower-case hex digits")


def parse_public_key(key: str, text: str | None) -> str | None:
    """Parse a public key that a person gave, in one piece or in groups of digits as `group_hex` formats it.

    Raises:
        ConfigError: the text is not a public key.
    """
    if text is not None:
        check_public_key(key, text := "".join(text.split()))
    return text


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(digit in "0123456789abcdef" for digit in text)


def _frame_message(purpose: str, message: bytes) -> bytes:
    return b"fedtune " + purpose.encode() + b"\0" + message


def _check_command(command: Sequence[str], named_in: Path | None) -> None:
    about = None if named_in is None else named_in.stat()
    if about is None or about.st_uid != system.effective_user() or about.st_mode & 0o022:
        bound = "must be configured in a file that belongs to the current account and that nobody else can write"
        raise ConfigError(f"{named_in}: key_command", command[0], bound)
    if not os.path.isabs(command[0]) or "\0" in "".join(command):
        bound = "must begin with the absolute path of a program, and must not contain NUL bytes"
        raise ConfigError("key_command", command[0], bound)


@cache
def _run_key_command(command: tuple[str, ...]) -> bytes:
    """Run a command without a shell, once per process, and return its standard output.

    Error messages show only the program, because its arguments may be secret.
    """
    try:
        ran = run(command, stdin=DEVNULL, capture_output=True, timeout=_COMMAND_S, check=False)
    except TimeoutExpired:
        bound = f"did not finish within {_COMMAND_S:g} seconds, including its child processes"
        raise ConfigError("key_command", command[0], bound) from None
    if ran.returncode:
        line, _, _ = ran.stderr.decode(errors="replace").strip().partition("\n")
        raise ConfigError("key_command", command[0], f"failed with exit status {ran.returncode}: {format_value(line)}")
    return ran.stdout


def _read_passphrase() -> bytes | None:
    """Read the passphrase from the file that `PASSPHRASE_FILE` points to; None if the variable is not set."""
    if not (name := os.environ.get(PASSPHRASE_FILE)):
        return None
    try:
        if not stat.S_ISREG(mode := os.stat(name).st_mode) or mode & 0o077:
            raise ConfigError(PASSPHRASE_FILE, name, "must be a file that only its owner can read (mode 600)")
        with open(name, "rb") as file:
            passphrase = file.readline(2000).rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(PASSPHRASE_FILE, name, f"must be a readable file ({error.strerror})") from None
    if not 12 <= len(passphrase) <= 1023:  # short ones are easy to guess; 1023 is the library's limit
        raise ConfigError(PASSPHRASE_FILE, name, "must have a passphrase of 12 to 1023 bytes on its first line")
    return passphrase


def _write_new_key(path: Path, private: Ed25519PrivateKey) -> None:
    passphrase = _read_passphrase()
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as closed:
        building = Path(closed) / path.name  # a private folder
        write_durably(building, pem)
        building.chmod(0o600)
        with suppress(FileExistsError):  # another process was faster; use its key
            os.link(building, path)
    fsync_folder(path.parent)

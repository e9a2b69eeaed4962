"""Keys: made once, kept private, and every signature good for one key, one purpose and one message."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from fedtune.privacy.keys import SigningKey, is_public_key, is_signed
from fedtune.spec import ConfigError

from .builders import make_key


def test_a_key_is_made_once_and_then_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key.pem"
    first = SigningKey.load_or_make(path)
    assert SigningKey.load_or_make(path).public == SigningKey.load(path).public == first.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "only its owner can read it"
    assert [each.name for each in path.parent.iterdir()] == ["key.pem"], "nothing is left beside it"
    assert SigningKey.load_or_make(tmp_path / "other.pem").public != first.public


def test_the_key_of_a_process_that_was_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key.pem"
    first = SigningKey.load_or_make(path)
    seen = iter([False])  # the other process made it just after this one looked
    monkeypatch.setattr(Path, "exists", lambda self: next(seen))
    assert SigningKey.load_or_make(path).public == first.public


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\n", b"\xff\xfe", "rsa", "encrypted", None])
def test_what_is_no_ed25519_key_is_a_config_error(tmp_path: Path, content: object) -> None:
    path = tmp_path / "key.pem"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    if content == "rsa":
        key = generate_private_key(public_exponent=65537, key_size=1024)
        content = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    elif content == "encrypted":
        content = make_key(1)._private.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret"))
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"key\.pem.*must be a PEM file with an Ed25519 private key"):
        SigningKey.load(path)


def test_a_signature_is_good_for_its_key_purpose_and_message_alone() -> None:
    key, other = make_key(1), make_key(2)
    signature = key.sign("receipt", b"message")
    assert is_signed(key.public, "receipt", b"message", signature)
    assert not is_signed(other.public, "receipt", b"message", signature)
    assert not is_signed(key.public, "ledger head", b"message", signature)
    assert not is_signed(key.public, "receipt", b"massage", signature)
    assert not is_signed(key.public, "receipt", b"message", other.sign("receipt", b"message"))
    assert not is_signed(key.public, "receipts", b"ent", key.sign("receipt", b"sent")), "it is not cut elsewhere"


def test_signature_and_key_have_one_spelling() -> None:
    # Or a stored signature could be changed without being found.
    def others(text: str) -> tuple[str, ...]:
        return text.upper(), " " + text, text[:2] + " " + text[2:], text[:-2], text + "00", "", "x" * len(text)

    key = make_key(1)
    assert is_public_key(key.public)
    signature = key.sign("receipt", b"message")
    for other, other_signature in zip(others(key.public), others(signature), strict=True):
        assert not is_public_key(other)
        assert not is_signed(key.public, "receipt", b"message", other_signature)
        assert not is_signed(other, "receipt", b"message", signature)


def test_secrets_differ_by_purpose_and_key_stay_the_same_and_do_not_show() -> None:
    purposes = ("receipt head", "data fingerprint")
    secrets = {make_key(number).secret(purpose) for number in (1, 2) for purpose in purposes}
    assert len(secrets) == 4
    assert {len(secret) for secret in secrets} == {32}
    key = make_key(1)
    assert (secret := key.secret("receipt head")) in secrets
    assert not [hidden for hidden in (key._raw, secret) if hidden.hex() in repr(key) + key.public]

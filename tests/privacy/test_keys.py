"""Keys: generated once, kept private, and each signature valid for one key, one purpose and one message."""

import stat
import traceback
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from fedtune.privacy import keys
from fedtune.privacy.keys import SigningKey, is_public_key, is_signed
from fedtune.spec import ConfigError

from .builders import make_key


def test_signing_key_is_created_once_and_then_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key.pem"
    first = SigningKey.load_or_create(path)
    assert SigningKey.load_or_create(path).public == SigningKey.load(path).public == first.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "only the owner may read the key"
    assert [file.name for file in path.parent.iterdir()] == ["key.pem"], "no other file may be left in the folder"
    assert SigningKey.load_or_create(tmp_path / "other.pem").public != first.public


def test_key_created_first_by_another_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key.pem"
    first = SigningKey.load_or_create(path)
    checks = iter([False])  # the other process creates it just after the check
    monkeypatch.setattr(Path, "exists", lambda self: next(checks))
    assert SigningKey.load_or_create(path).public == first.public


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\n", b"\xff\xfe", "rsa", None])
def test_invalid_key_files_raise_a_config_error(tmp_path: Path, content: object) -> None:
    path = tmp_path / "key.pem"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    if content == "rsa":
        key = generate_private_key(public_exponent=65537, key_size=1024)
        content = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"key\.pem.*is not an Ed25519 private key"):
        SigningKey.load(path)


@pytest.fixture
def encrypted_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A key encrypted with the passphrase in the file next to it."""
    (tmp_path / "passphrase").write_text("correct horse battery\nnothing\n")
    (tmp_path / "passphrase").chmod(0o600)
    monkeypatch.setenv(keys.PASSPHRASE_FILE, str(tmp_path / "passphrase"))
    SigningKey.load_or_create(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def test_new_key_is_encrypted_with_the_passphrase_from_the_file(encrypted_key: Path, monkeypatch: Any) -> None:
    private: Any = serialization.load_pem_private_key(encrypted_key.read_bytes(), password=b"correct horse battery")
    assert SigningKey.load(encrypted_key).public == private.public_key().public_bytes_raw().hex()
    monkeypatch.delenv(keys.PASSPHRASE_FILE)
    with pytest.raises(ConfigError, match="is encrypted: set FEDTUNE_KEY_PASSPHRASE_FILE to a file"):
        SigningKey.load(encrypted_key)


@pytest.mark.parametrize(
    ("passphrase", "bound"),
    [
        *(
            ("wrong horse battery", "with another passphrase"),
            ("too short", "12 to 1023 bytes"),
            (None, "readable file"),
        ),
        ("correct horse battery", "only its owner can read"),
    ],
)
def test_wrong_passphrase_is_refused_and_never_shown(encrypted_key: Path, passphrase: Any, bound: str) -> None:
    encrypted_key.with_name("passphrase").unlink()
    if passphrase:
        encrypted_key.with_name("passphrase").write_text(passphrase)
        encrypted_key.with_name("passphrase").chmod(0o644 if "owner" in bound else 0o600)
    with pytest.raises(ConfigError, match=bound) as caught:
        SigningKey.load(encrypted_key)
    assert passphrase is None or passphrase not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def command_file(tmp_path: Path) -> Path:
    """A file of mode 600 that names a command."""
    (tmp_path / "site.toml").touch(mode=0o600)
    return tmp_path / "site.toml"


def test_key_from_a_command_is_never_written_to_disk(tmp_path: Path, command_file: Path) -> None:
    key_file = tmp_path / "vault" / "key.pem"
    public, command = SigningKey.load_or_create(key_file).public, ("/bin/cat", str(key_file))
    assert SigningKey.load_or_create(tmp_path / "key.pem", command=command, named_in=command_file).public == public
    key_file.unlink()
    reloaded = SigningKey.load(tmp_path / "key.pem", command=command, named_in=command_file)
    assert reloaded.public == public, "the command must run once per process"
    assert {*tmp_path.rglob("*")} == {key_file.parent, command_file}


@pytest.mark.parametrize(
    ("script", "bound"),
    [
        ("echo locked >&2; echo more >&2; exit 3", "failed with exit status 3: 'locked'$"),
        ("sleep 600", "did not finish within 0.5 seconds, including its child processes$"),
        ("echo key; setsid sleep 5 &", "did not finish within 0.5 seconds, including its child processes$"),
        ("echo rubbish", "is not an Ed25519 private key in PEM format$"),
    ],
)
def test_key_command_with_invalid_output_is_refused(
    script: str, bound: str, command_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_COMMAND_S", 0.5)
    with pytest.raises(ConfigError, match=f"^key_command = '/bin/sh': .*{bound}"):
        SigningKey.load(Path("key.pem"), command=("/bin/sh", "-c", script), named_in=command_file)


def test_key_command_requires_an_absolute_path_and_sole_file_ownership(command_file: Path, monkeypatch: Any) -> None:
    for command in (("sh",), ("./sh",), ("/bin/sh", "a\0b")):
        with pytest.raises(
            ConfigError, match="must begin with the absolute path of a program, and must not contain NUL bytes"
        ):
            SigningKey.load(Path("key.pem"), command=command, named_in=command_file)
    monkeypatch.setattr(keys.system, "effective_user", lambda: command_file.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"site\.toml: key_command = '/bin/cat': must be configured in a file"):
        SigningKey.load(Path("key.pem"), command=("/bin/cat",), named_in=command_file)
    monkeypatch.undo()
    command_file.chmod(0o666)
    with pytest.raises(ConfigError, match="that nobody else can write"):
        SigningKey.load(Path("key.pem"), command=("/bin/cat",), named_in=command_file)


def test_signature_is_valid_only_for_its_key_purpose_and_message() -> None:
    key, other_key = make_key(1), make_key(2)
    signature = key.sign("receipt", b"message")
    assert is_signed(key.public, "receipt", b"message", signature)
    assert not is_signed(other_key.public, "receipt", b"message", signature)
    assert not is_signed(key.public, "ledger head", b"message", signature)
    assert not is_signed(key.public, "receipt", b"massage", signature)
    assert not is_signed(key.public, "receipt", b"message", other_key.sign("receipt", b"message"))
    assert not is_signed(key.public, "receipts", b"ent", key.sign("receipt", b"sent")), "the split must be signed"


def test_signature_and_public_key_encodings_are_unique() -> None:
    # Otherwise a stored signature could be changed without detection.
    def list_alternative_encodings(text: str) -> tuple[str, ...]:
        return text.upper(), " " + text, text[:2] + " " + text[2:], text[:-2], text + "00", "", "x" * len(text)

    key = make_key(1)
    assert is_public_key(key.public)
    signature = key.sign("receipt", b"message")
    for other_key, other_signature in zip(
        list_alternative_encodings(key.public), list_alternative_encodings(signature), strict=True
    ):
        assert not is_public_key(other_key)
        assert not is_signed(key.public, "receipt", b"message", other_signature)
        assert not is_signed(other_key, "receipt", b"message", signature)


def test_derived_secrets_differ_by_purpose_and_key_and_stay_hidden() -> None:
    purposes = ("receipt head", "data fingerprint")
    secrets = {make_key(number).derive_secret(purpose) for number in (1, 2) for purpose in purposes}
    assert len(secrets) == 4
    assert {len(secret) for secret in secrets} == {32}
    key = make_key(1)
    assert (secret := key.derive_secret("receipt head")) in secrets
    assert not [hidden for hidden in (key._raw, secret) if hidden.hex() in repr(key) + key.public]

"""A site's join request: content, proof of both keys, and secrecy of the private keys."""

import json
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.ops.kits.certificates import encode_public_pem, read_connection_key
from fedtune.ops.kits.kit_file import read_signing_key
from fedtune.ops.kits.members import JoinRequest, initialize_site
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError

from .conftest import Desk


def test_join_request_matches_the_policy(request_of: Any) -> None:
    path = request_of("north", declared_size=8000)
    request, folder = JoinRequest.read(path), path.parent
    assert (request.site, request.datasets) == ("north", {"patients": 8000})
    assert request.site_key == SigningKey.load(folder.parent / "site_key.pem").public
    assert request.node_key == encode_public_pem(read_connection_key(folder / "connection_key.pem"))


def test_private_keys_are_readable_only_by_their_owner(tmp_path: Path, now: datetime) -> None:
    # Without a federation, which would refuse to read exposed keys first.
    folder = Desk(tmp_path / "federation", now).request("north").parent
    for key in (folder / "connection_key.pem", folder.parent / "site_key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["connection_key.pem", "join_request.json"]
    data = (folder / "join_request.json").read_bytes()
    assert b"PRIVATE" not in data
    connection = read_connection_key(folder / "connection_key.pem")
    site_key = serialization.load_pem_private_key((folder.parent / "site_key.pem").read_bytes(), password=None)
    for key in (connection, site_key):
        secret = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        assert secret.hex()[-64:] not in data.decode()
    assert f"{connection.private_numbers().private_value:x}" not in data.decode()


@pytest.mark.parametrize(("name", "message"), [("n" * 65, "must"), ("Server", "is a reserved name")])
def test_invalid_site_name_creates_no_files(name: str, message: str, tmp_path: Path, site_policy: Any) -> None:
    write_policy(site_policy(name), tmp_path / "site.toml")
    with pytest.raises(ConfigError, match=rf"site\.toml: site = '{name}': {message}"):
        initialize_site(tmp_path / "site.toml", out=None)
    assert [path.name for path in tmp_path.iterdir()] == ["site.toml"]


def test_exposed_or_missing_site_key_is_refused(tmp_path: Path, site_policy: Any) -> None:
    site_toml, file = tmp_path / "site.toml", tmp_path / "site_key.pem"
    write_policy(site_policy("north"), site_toml)
    key = SigningKey.load_or_create(file)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"site_key\.pem = 'mode 644': must be readable only by its owner"):
        initialize_site(site_toml, out=None, new_ledger=True)
    assert {path.name for path in tmp_path.iterdir()} == {"site.toml", "site_key.pem"}
    SiteLedger(tmp_path / "ledger.db", read_policy(site_toml), key, create=True)
    file.unlink()
    with pytest.raises(ConfigError, match="restore it from its backup"):
        initialize_site(site_toml, out=None)
    assert not file.exists()


def test_site_with_a_key_command_has_no_key_file(tmp_path: Path, site_policy: Any) -> None:
    site_toml, key_file = tmp_path / "site.toml", tmp_path / "kept.pem"
    public = SigningKey.load_or_create(key_file).public
    write_policy(site_policy("north", key_command=("/bin/cat", str(key_file))), site_toml)
    with pytest.raises(ConfigError, match="if this key never had one, add --new-ledger"):
        initialize_site(site_toml, out=None)
    kit = initialize_site(site_toml, out=None, new_ledger=True)
    assert JoinRequest.read(kit / "join_request.json").site_key == read_signing_key(site_toml).public == public
    assert SiteFiles.from_site_toml(site_toml).open_ledger(create=True).history.opening.site_key == public
    assert SiteFiles.from_site_toml(site_toml).public_key is None, "reading a policy must not run the command"
    secret = {path.name for path in tmp_path.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()}
    assert secret == {"kept.pem", "connection_key.pem"}


def resign_request(path: Path, **changes: Any) -> bytes:
    """Change a request and sign it with the site's own key."""
    fields = json.loads(path.read_text()) | changes
    del fields["signature"]
    key = SigningKey.load(path.parent.parent / "site_key.pem")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({**fields, "signature": key.sign("join request", text.encode())}).encode()


@pytest.mark.parametrize(
    ("key", "value"), [("site", "south"), ("datasets", {"patients": 101}), ("signature", "00" * 64)]
)
def test_changed_join_request_is_refused(request_of: Any, key: str, value: object) -> None:
    path = request_of("north")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=r"join_request\.json: signature = .*was changed after signing"):
        JoinRequest.read(path)


_P256, _P384 = (ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1()))


def make_csr(key: Any, *names: str) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    csr = x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def test_csr_proves_possession_of_the_private_key(request_of: Any) -> None:
    path = request_of("north")
    csr = x509.load_pem_x509_csr(json.loads(path.read_text())["csr"].encode())
    another_s = encode_public_pem(ec.generate_private_key(ec.SECP384R1()))
    encoded = csr.public_bytes(serialization.Encoding.DER).replace(
        _read_point(encode_public_pem(csr)), _read_point(another_s)
    )
    forged = x509.load_der_x509_csr(encoded).public_bytes(serialization.Encoding.PEM).decode()
    assert encode_public_pem(x509.load_pem_x509_csr(forged.encode())) == another_s
    with pytest.raises(ConfigError, match="must be signed with the key that it contains"):
        JoinRequest.parse_request(resign_request(path, csr=forged))


def _read_point(public: bytes) -> bytes:
    key = serialization.load_pem_public_key(public)
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def test_invalid_fields_of_a_signed_request_are_refused(request_of: Any) -> None:
    path = request_of("north")
    for change, message in (
        ({"site": "../north"}, "site = '../north': must consist of"),
        ({"site": "lead"}, "is a reserved name"),
        ({"site_key": "00" * 32}, "site_key = .*must be a public key"),
        ({"datasets": {}}, "must declare at least one data set"),
        ({"datasets": {"../a": 5}}, "datasets = '../a': must consist of"),
        ({"datasets": {"a": 0}}, "datasets.a = 0: must be at least 1"),
        ({"datasets": {"a": 2**60}}, "must be at least 1 and below 2"),
        ({"csr": make_csr(_P256, "north")}, "csr = .*must contain an EC P-384 key"),
        ({"csr": make_csr(_P384, "south")}, "csr = 'south': must have the site's name"),
        ({"csr": make_csr(_P384, "north", "south")}, "csr = null: must have the site's name"),
        ({"csr": "none"}, "csr = 'unreadable': must be a certificate signing request"),
    ):
        with pytest.raises(ConfigError, match=message):
            JoinRequest.parse_request(resign_request(path, **change))


def test_malformed_or_oversized_request_is_refused(tmp_path: Path, request_of: Any) -> None:
    for text in (b"[]", b"\xff\xfe", b'{"version": 1'):
        (tmp_path / "request").write_bytes(text)
        with pytest.raises(ConfigError, match=f"{tmp_path}/request: request = .*must be"):
            JoinRequest.read(tmp_path / "request")
    path = request_of("north")
    data = path.read_bytes()
    path.write_bytes(data + b" " * (65536 - len(data)))
    assert JoinRequest.read(path).site == "north"
    path.write_bytes(data + b" " * (65537 - len(data)))
    with pytest.raises(ConfigError, match="must have at most 65536 bytes"):
        JoinRequest.read(path)

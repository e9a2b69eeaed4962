"""Reading of kits: complete kits are accepted, and missing, invalid or exposed files are named."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from fedtune.ops.kits import provisioning
from fedtune.ops.kits.certificates import encode_certificate_pem, extract_p384_public_key, read_certificate
from fedtune.ops.kits.kit_file import Address, Kit, KitFile, KitModel, read_spec
from fedtune.ops.kits.members import Roster
from fedtune.privacy.keys import SigningKey
from fedtune.spec import KIT_SCHEMA, ConfigError

KINDS = ("server", "lead", "site")
BELONGS = r"site\.pem = 'north': must match the key in connection_key\.pem"


@pytest.fixture
def kits(federation: Path, join_site: Any) -> dict[str, Path]:
    return {"site": join_site("north"), "server": federation / "server", "lead": federation / "lead"}


FILES = [
    *(("site", name) for name in ("kit.toml", "ca.pem", "site.pem", "connection_key.pem")),
    *(("server", name) for name in ("kit.toml", "ca.pem", "server.pem", "server_key.pem", "roster.json")),
    *(("lead", name) for name in ("kit.toml", "lead.pem", "connection_key.pem", "lead_key.pem", "roster.json")),
]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_missing_kit_file_or_exposed_key_is_named(kits: dict[str, Path], kind: str, name: str) -> None:
    if "key" in name:
        (kits[kind] / name).chmod(0o604)
        with pytest.raises(ConfigError, match=rf"{name}.*mode 604.*chmod 600"):
            Kit.read(kits[kind], kind=kind)
    (kits[kind] / name).unlink()
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as caught:
        Kit.read(kits[kind], kind=kind)
    assert str(kits[kind]) in str(caught.value)


def test_invalid_line_in_kit_toml_is_named(kits: dict[str, Path]) -> None:
    path = kits["site"] / "kit.toml"
    valid = path.read_text().splitlines()
    for key, value, message in (
        ("server", "fl.example.org", "server = 'fl.example.org': must be the server's address"),
        ("lead", "00", "lead = '00': must be a public key"),
        ("site", "../etc", "site = '../etc': must consist of"),
        ("collor", "red", "collor: is not a known key"),
    ):
        path.write_text("\n".join([f'{key} = "{value}"', *(line for line in valid if not line.startswith(f"{key} ="))]))
        with pytest.raises(ConfigError, match=message) as caught:
            Kit.read(kits["site"], kind="site")
        assert str(path) in str(caught.value)


def test_lead_key_and_server_certificate_must_match_the_kit(kits: Any, now: datetime) -> None:
    (kits["lead"] / "lead_key.pem").unlink()
    SigningKey.load_or_create(kits["lead"] / "lead_key.pem")
    with pytest.raises(ConfigError, match=r"kit\.toml: lead = .*must be the public key of"):
        Kit.read(kits["lead"], kind="lead")
    path = kits["server"] / "kit.toml"
    path.write_text(path.read_text().replace("127.0.0.1", "elsewhere.org"))
    with pytest.raises(
        ConfigError, match=r"'elsewhere\.org': must be one of the names in the certificate.*fl\.example\.org"
    ):
        Kit.read(kits["server"], kind="server").check_certificate(now)


def test_certificate_of_another_site_is_refused(kits: Any, request_of: Any, federation_toml: Path, now: Any) -> None:
    kit, other_kit = (
        kits["site"],
        provisioning.init_federation(federation_toml, out=federation_toml.parent / "other", now=now).folder,
    )
    south = (kit / "kit.toml").read_bytes().replace(b'"north"', b'"south"')
    for name, data, message in (
        ("connection_key.pem", (request_of("south").parent / "connection_key.pem").read_bytes(), BELONGS),
        ("ca.pem", (other_kit / "server" / "ca.pem").read_bytes(), r"must be issued by the authority in ca\.pem"),
        ("kit.toml", south, "must be a certificate for south"),
    ):
        before = (kit / name).read_bytes()
        (kit / name).write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            Kit.read(kit, kind="site").check_certificate(now)
        (kit / name).write_bytes(before)


@pytest.mark.parametrize("kind", KINDS)
def test_expired_certificate_error_suggests_renewal(kits: dict[str, Path], kind: str, now: datetime) -> None:
    kit = Kit.read(kits[kind], kind=kind)
    kit.check_certificate(now + timedelta(days=364))
    with pytest.raises(ConfigError, match=f"must be in the future: the certificate has expired: .*renew-{kind}"):
        kit.check_certificate(now + timedelta(days=366))
    with pytest.raises(ConfigError, match="provision the federation again"):
        kit.check_certificate(now + timedelta(days=4000))
    with pytest.raises(ConfigError, match="set the clock"):
        kit.check_certificate(now - timedelta(days=1))


def _swap(key: str, value: Any) -> Callable[[Any], None]:
    return lambda fields: fields["sites"][0].update({key: value})


def test_invalid_roster_is_refused(federation: Path, join_site: Any) -> None:
    join_site("north")
    path = federation / "server" / "roster.json"
    valid = path.read_text()
    for change, message in (
        (
            lambda fields: fields["sites"].append(fields["sites"][0]),
            "site = 'north': has the name or a key of another site",
        ),
        (_swap("site", "../north"), "site = '../north': must consist of"),
        (_swap("site", "south"), "certificate = 'south': must be a certificate for this site's name"),
        (_swap("certificate", "none"), "certificate = 'north': must be a certificate in PEM format"),
        (_swap("site_key", "00" * 32), "site_key = .*must be a public key"),
        (_swap("revoked", "yesterday"), "revoked = 'yesterday': must be a time"),
        (_swap("datasets", {"a": 10**400}), "datasets.a = 1000.*: must be"),
    ):
        fields = json.loads(valid)
        change(fields)
        path.write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match=message) as caught:
            Roster.read(path)
        assert str(path) in str(caught.value)


def test_roster_certificate_with_an_unreadable_key_is_refused(federation: Path, join_site: Any) -> None:
    der = read_certificate(join_site("north") / "site.pem").public_bytes(serialization.Encoding.DER)
    path = federation / "server" / "roster.json"
    fields = json.loads(path.read_text())
    # An invalid encoding of the public key's point, and an unknown type of key.
    for valid, invalid in (("03620004", "03620008"), ("06072a8648ce3d0201", "06071a8648ce3d0201")):
        assert der.count(bytes.fromhex(valid)) == 1
        damaged = x509.load_der_x509_certificate(der.replace(bytes.fromhex(valid), bytes.fromhex(invalid)))
        with pytest.raises(ConfigError, match="must contain an EC P-384 key"):
            extract_p384_public_key(damaged, key="certificate")
        fields["sites"][0]["certificate"] = encode_certificate_pem(damaged).decode()
        path.write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match="must be a certificate in PEM format"):
            Roster.read(path)


def test_server_address_must_be_host_and_port() -> None:
    for text, host, port in (
        ("fl.example.org:9092", "fl.example.org", 9092),
        ("FL.Example.org:1", "fl.example.org", 1),
        ("fl_server:443", "fl_server", 443),
        ("10.0.0.3:65535", "10.0.0.3", 65535),
        ("[2001:DB8:0::1]:9092", "2001:db8::1", 9092),
    ):
        address = Address.parse_address(text)
        assert (address.host, address.port) == (host, port)
        assert Address.parse_address(str(address)) == address
    for invalid in (
        *("", ":", ":9092", "fl.example.org", "fl.example.org:", "fl.example.org:0", "fl.example.org:65536"),
        *("fl.example.org:09092", "fl.example.org:+1", "fl.example.org:9092 ", "https://fl.example.org:9092"),
        *("fl.example.org/x:9092", "*.example.org:9092", "-a.org:1", "a..org:1", ".org:1", "0.0.0.0:9092", "[::]:9092"),
        *("10.0.0.300:9092", "2001:db8::1:9092", "[fl.example.org]:9092", "[fe80::1%eth0]:9092", "224.0.0.1:9"),
        *("a" * 64 + ".org:1", "a." * 130 + "org:1", "fl.example.org:९", "straße.de:1", "user@host:1"),
    ):
        with pytest.raises(ConfigError, match=r"server = .*as host:port"):
            Address.parse_address(invalid)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
        lambda text: text.isprintable() and bool(text.strip())
    )
)
def test_any_license_text_round_trips_through_kit_toml(tmp_path_factory: pytest.TempPathFactory, license: str) -> None:
    fields = {"version": KIT_SCHEMA, "kind": "site", "federation": "f", "server": "[::1]:1", "site": "a"}
    kit = KitFile(**fields, lead="ab" * 32, model=(KitModel(name="m", sha256="00" * 32, license=license),))
    path = tmp_path_factory.mktemp("kit") / "kit.toml"
    path.write_text(kit.to_toml(), encoding="utf-8")
    assert read_spec(KitFile, path) == kit

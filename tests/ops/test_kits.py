"""A kit that is whole is read; anything that is missing, wrong or open to others is named."""

import json
import shutil
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
from fedtune.ops.kits.certificates import certificate_pem, p384_of, read_certificate
from fedtune.ops.kits.kit_file import Address, Kit, KitFile, KitModel, read_spec
from fedtune.ops.kits.members import Roster
from fedtune.privacy.keys import SigningKey
from fedtune.spec import KIT_SCHEMA, ConfigError

KINDS = ("server", "lead", "site")


@pytest.fixture
def kits(federation: Path, joined: Any) -> dict[str, Path]:
    return {"site": joined("north"), "server": federation / "server", "lead": federation / "lead"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kit_says_where_its_files_are(kits: dict[str, Path], kind: str, now: datetime) -> None:
    kit = Kit.read(kits[kind], kind=kind)
    assert (kit.kind, kit.federation, kit.server) == (kind, "cardiology-2026", "127.0.0.1:9092")
    assert kit.model == (KitModel(name="minilm", sha256="53" * 32, licence="Apache-2.0"),)
    assert kit.site == ("north" if kind == "site" else None)
    assert kit.lead == SigningKey.load(kits["lead"] / "lead_key.pem").public
    assert kit.certificate.name == f"{kind}.pem"
    assert kit.key.name == ("server_key.pem" if kind == "server" else "connection_key.pem")
    for path in (kit.ca, kit.certificate, kit.key, *([] if kind == "site" else [kit.roster])):
        assert path.is_file()
    found = kit.check_certificate(now)
    assert found.name == ("north" if kind == "site" else kind)
    assert found.not_before < now < found.not_after


FILES = [
    *(("site", name) for name in ("kit.toml", "ca.pem", "site.pem", "connection_key.pem")),
    *(("server", name) for name in ("kit.toml", "ca.pem", "server.pem", "server_key.pem", "roster.json")),
    *(("lead", name) for name in ("kit.toml", "lead.pem", "connection_key.pem", "lead_key.pem", "roster.json")),
]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_missing_file_is_named(kits: dict[str, Path], kind: str, name: str) -> None:
    (kits[kind] / name).unlink()
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as caught:
        Kit.read(kits[kind], kind=kind)
    assert str(kits[kind]) in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in FILES if "key" in name])
def test_a_key_that_others_can_read_is_refused(kits: dict[str, Path], kind: str, name: str) -> None:
    (kits[kind] / name).chmod(0o604)
    with pytest.raises(ConfigError, match=rf"{name}.*mode 604.*chmod 600"):
        Kit.read(kits[kind], kind=kind)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('server = "fl.example.org"', "server = 'fl.example.org': must be host:port"),
        ('lead = "00"', "lead = '00': must be a public key"),
        ('site = "../etc"', "site = '../etc': must be made of"),
        ('collor = "red"', "collor: is not a key"),
    ],
)
def test_a_wrong_line_in_kit_toml_is_named(kits: dict[str, Path], line: str, message: str) -> None:
    path = kits["site"] / "kit.toml"
    key = line.split(" ")[0]
    lines = [one for one in path.read_text().splitlines() if not one.startswith(f"{key} =")]
    path.write_text("\n".join([line, *lines]))
    with pytest.raises(ConfigError, match=message) as caught:
        Kit.read(kits["site"], kind="site")
    assert str(path) in str(caught.value)


def test_a_lead_s_kit_has_the_key_that_it_names(kits: dict[str, Path]) -> None:
    (kits["lead"] / "lead_key.pem").unlink()
    SigningKey.load_or_make(kits["lead"] / "lead_key.pem")
    with pytest.raises(ConfigError, match=r"kit\.toml: lead = .*must be the public key of"):
        Kit.read(kits["lead"], kind="lead")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("key", r"site\.pem = 'north': must belong to the key in connection_key\.pem"),
        ("authority", r"must be issued by the authority in ca\.pem"),
        ("site", "must be the certificate of south"),
    ],
)
def test_a_certificate_for_something_else_is_refused(
    kits: dict[str, Path], request_of: Any, federation_toml: Path, now: datetime, wrong: str, message: str
) -> None:
    kit, text = kits["site"], (kits["site"] / "kit.toml").read_text()
    if wrong == "key":
        shutil.copy(request_of("south").parent / "connection_key.pem", kit)
    elif wrong == "authority":
        provisioning.init(federation_toml, out=federation_toml.parent / "other", now=now)
        shutil.copy(federation_toml.parent / "other" / "server" / "ca.pem", kit)
    else:
        (kit / "kit.toml").write_text(text.replace('"north"', '"south"'))
    with pytest.raises(ConfigError, match=message):
        Kit.read(kit, kind="site").check_certificate(now)


def test_a_server_s_certificate_is_for_its_address(kits: dict[str, Path], now: datetime) -> None:
    path = kits["server"] / "kit.toml"
    path.write_text(path.read_text().replace("127.0.0.1", "elsewhere.org"))
    with pytest.raises(ConfigError, match=r"'elsewhere\.org': must be in the certificate.*fl\.example\.org"):
        Kit.read(kits["server"], kind="server").check_certificate(now)


@pytest.mark.parametrize(
    ("kind", "command"), [("site", "renew-site"), ("server", "renew-server"), ("lead", "renew-lead")]
)
def test_an_expired_certificate_says_the_way_out(kits: dict[str, Path], kind: str, command: str, now: datetime) -> None:
    kit = Kit.read(kits[kind], kind=kind)
    kit.check_certificate(now + timedelta(days=364))
    with pytest.raises(ConfigError, match=f"is when the certificate expired: .*{command}"):
        kit.check_certificate(now + timedelta(days=366))
    with pytest.raises(ConfigError, match="provision the federation again"):
        kit.check_certificate(now + timedelta(days=4000))
    with pytest.raises(ConfigError, match="set the clock"):
        kit.check_certificate(now - timedelta(days=1))


def _swap(key: str, value: Any) -> Callable[[Any], None]:
    return lambda fields: fields["sites"][0].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["sites"].append(fields["sites"][0]), "site = 'north': must not repeat"),
        (_swap("site", "../north"), "site = '../north': must be made of"),
        (_swap("site", "south"), "certificate = 'south': must be the site's own"),
        (_swap("certificate", "none"), "certificate = 'north': must be one in PEM form"),
        (_swap("site_key", "00" * 32), "site_key = .*must be a public key"),
        (_swap("revoked", "yesterday"), "revoked = 'yesterday': must be a time"),
        (_swap("datasets", [{"id": "a", "declared_size": 10**400}]), "declared_size = 1000.*: must be"),
    ],
)
def test_a_wrong_roster_is_refused(federation: Path, joined: Any, change: Any, message: str) -> None:
    joined("north")
    path = federation / "server" / "roster.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message) as caught:
        Roster.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # The point of the public key in a form that there is none of, and a kind of key that there is none of.
        (b"\x03\x62\x00\x04", b"\x03\x62\x00\x08"),
        (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06071a8648ce3d0201")),
    ],
    ids=["point", "kind"],
)
def test_a_certificate_of_an_unreadable_key(federation: Path, joined: Any, right: bytes, wrong: bytes) -> None:
    der = read_certificate(joined("north") / "site.pem").public_bytes(serialization.Encoding.DER)
    assert der.count(right) == 1
    damaged = x509.load_der_x509_certificate(der.replace(right, wrong))
    with pytest.raises(ConfigError, match="must be for an EC P-384 key"):
        p384_of(damaged, key="certificate")
    path = federation / "server" / "roster.json"
    fields = json.loads(path.read_text())
    fields["sites"][0]["certificate"] = certificate_pem(damaged).decode()
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="must be one in PEM form"):
        Roster.read(path)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("fl.example.org:9092", "fl.example.org", 9092),
        ("FL.Example.org:1", "fl.example.org", 1),
        ("fl_server:443", "fl_server", 443),
        ("10.0.0.3:65535", "10.0.0.3", 65535),
        ("[2001:DB8:0::1]:9092", "2001:db8::1", 9092),
    ],
)
def test_an_address_is_host_and_port(text: str, host: str, port: int) -> None:
    address = Address.of(text)
    assert (address.host, address.port) == (host, port)
    assert Address.of(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":9092", "fl.example.org", "fl.example.org:", "fl.example.org:0", "fl.example.org:65536"),
        *("fl.example.org:09092", "fl.example.org:+1", "fl.example.org:9092 ", "https://fl.example.org:9092"),
        *("fl.example.org/x:9092", "*.example.org:9092", "-a.org:1", "a..org:1", ".org:1", "0.0.0.0:9092", "[::]:9092"),
        *("10.0.0.300:9092", "2001:db8::1:9092", "[fl.example.org]:9092", "[fe80::1%eth0]:9092", "224.0.0.1:9"),
        *("a" * 64 + ".org:1", "a." * 130 + "org:1", "fl.example.org:९", "straße.de:1", "user@host:1"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"server = .*must be host:port"):
        Address.of(text)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
        lambda text: text.isprintable() and bool(text.strip())
    )
)
def test_any_licence_comes_back_from_kit_toml(tmp_path_factory: pytest.TempPathFactory, licence: str) -> None:
    about = {"version": KIT_SCHEMA, "kind": "site", "federation": "f", "server": "[::1]:1", "site": "a"}
    kit = KitFile(**about, lead="ab" * 32, model=(KitModel(name="m", sha256="00" * 32, licence=licence),))
    path = tmp_path_factory.mktemp("kit") / "kit.toml"
    path.write_text(kit.to_toml(), encoding="utf-8")
    assert read_spec(KitFile, path) == kit

"""Provisioning of a federation folder: complete, with private secrets, and never partly written."""

import os
import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest

from fedtune.ops.kits import provisioning
from fedtune.ops.kits.certificates import list_certificate_host_names, read_certificate
from fedtune.ops.kits.federation_folder import FederationFolder
from fedtune.ops.kits.kit_file import Kit, read_signing_key
from fedtune.privacy.keys import SigningKey
from fedtune.spec import ConfigError

from ..conftest import read_files
from .conftest import Desk, expect_unchanged

ANOTHER = f'[[model]]\nname = "minilm"\nsha256 = "{"00" * 32}"\nlicense = "MIT"\n'
SECRETS = {"authority/ca_key.pem", "server/server_key.pem", "lead/connection_key.pem", "lead/lead_key.pem"}


def test_init_creates_all_folders_with_private_secrets(federation: Path, federation_toml: Path) -> None:
    assert read_files(federation).keys() == SECRETS | {
        *("federation.toml", "authority/ca.pem"),
        *(f"server/{name}" for name in ("kit.toml", "ca.pem", "server.pem", "roster.json", "README.md")),
        *(f"lead/{name}" for name in ("kit.toml", "ca.pem", "lead.pem", "roster.json", "README.md")),
    }
    assert (federation / "federation.toml").read_bytes() == federation_toml.read_bytes()
    assert (federation / "sites").is_dir()
    for name, data in read_files(federation).items():
        private = b"PRIVATE" in data
        assert private == (name in SECRETS), name
        assert not private or stat.S_IMODE((federation / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(federation.stat().st_mode) == 0o700


def test_lead_with_a_key_command_has_no_key_file(federation_toml: Path, now: datetime) -> None:
    public = SigningKey.load_or_create(key_file := federation_toml.with_name("kept.pem")).public
    federation_toml.write_text(f'key_command = ["/bin/cat", "{key_file}"]\n{federation_toml.read_text()}')
    federation = provisioning.init_federation(federation_toml, out=federation_toml.parent / "made", now=now)
    assert federation.lead_key == read_signing_key(federation.folder / "lead" / "kit.toml").public == public
    assert not (federation.folder / "lead" / "lead_key.pem").exists()
    text = (file := federation.folder / "server" / "kit.toml").read_text()
    file.write_text(f'key_command = ["true"]\n{text}')
    with pytest.raises(ConfigError, match=r"key_command = \['true'\]: is allowed only in the lead's kit"):
        Kit.read(file.parent, kind="server")


def test_certificates_have_the_configured_validity_and_names(federation_toml: Path, now: datetime) -> None:
    text = federation_toml.read_text().replace("127.0.0.1:9092", "[2001:db8::1]:443")
    text = text.replace('"fl.example.org"', '"FL.example.org", "10.0.0.3", "localhost"')
    days = "authority_days = 100\nserver_days = 20\nlead_days = 30\nsite_days = 4000\n"
    federation_toml.write_text(f"{text}\n[certificates]\n{days}")
    federation = provisioning.init_federation(federation_toml, out=federation_toml.parent / "made", now=now)
    lifetimes = [certificate.not_after - now for certificate in federation.certificates.values()]
    assert lifetimes == [timedelta(days=days) for days in (100, 20, 30)]
    names = list_certificate_host_names(read_certificate(federation.folder / "server" / "server.pem"))
    assert sorted(names) == ["10.0.0.3", "2001:db8::1", "fl.example.org", "localhost"]


def test_invalid_federation_file_creates_nothing(federation_toml: Path, now: datetime) -> None:
    text = federation_toml.read_text()
    for old, new, message in (
        ("name", "nmae", "nmae: is not a known key"),
        ('server = "127.0.0.1:9092"\n', "", "server: is required"),
        ("127.0.0.1:9092", "127.0.0.1", "server = '127.0.0.1': must be the server's address"),
        ('"localhost"', '"localhost:9092"', "also_known_as = 'localhost:9092': must be a DNS name"),
        ('"localhost"', '"*.example.org"', r"also_known_as = '\*.example.org': must be a DNS name"),
        ("cardiology-2026", "../cardiology", "name = '../cardiology': must consist of"),
        ("cardiology-2026", "c" * 65, "name = 'c+': must have at most 64 characters"),
        ("[[model]]", "[certificates]\nsite_days = 0\n[[model]]", "certificates.site_days = 0: must be a number"),
        ("5353", "53", "sha256 = '(53)+': must be 64 lower-case hex digits"),
        ('"Apache-2.0"', '""', "license = '': must name the model's license"),
        ("[[model]]", f"{ANOTHER}[[model]]", "must not repeat"),
    ):
        assert old in text
        federation_toml.write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=message) as caught:
            provisioning.init_federation(federation_toml, out=federation_toml.parent / "made", now=now)
        assert str(federation_toml) in str(caught.value)
        assert os.listdir(federation_toml.parent) == ["federation.toml"]


def test_existing_output_folder_is_not_changed(federation: Path, federation_toml: Path, now: datetime) -> None:
    with expect_unchanged(federation), pytest.raises(ConfigError, match=f"--out = '{federation}': already exists"):
        provisioning.init_federation(federation_toml, out=federation, now=now)
    dangling = federation_toml.parent / "dangling"
    dangling.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="already exists"):
        provisioning.init_federation(federation_toml, out=dangling, now=now)
    with pytest.raises(ConfigError, match=r"--out = '.*/made': cannot be written: .*toml"):
        provisioning.init_federation(federation_toml, out=federation_toml / "made", now=now)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_init_leaves_no_files(federation_toml: Path, now: Any, monkeypatch: Any, error: Any) -> None:
    monkeypatch.setattr(provisioning.FederationFolder, "apply_change", Mock(side_effect=error))
    with pytest.raises((ConfigError, KeyboardInterrupt), match=r"cannot be written: No space left on device|^$"):
        provisioning.init_federation(federation_toml, out=federation_toml.parent / "made", now=now)
    assert os.listdir(federation_toml.parent) == ["federation.toml"]


@pytest.mark.parametrize("kind", ["server", "lead"])
def test_renewal_keeps_keys_and_other_files(federation: Path, kind: Literal["server", "lead"], now: datetime) -> None:
    before = read_files(federation)
    key = read_certificate(federation / kind / f"{kind}.pem").public_key()
    later = now + timedelta(days=300)
    provisioning.renew_own_certificate(federation, kind, days=None, now=later)
    changed = {name for name, data in read_files(federation).items() if data != before[name]}
    rosters = {"server/roster.json", "lead/roster.json"}  # which carry the new certificate to their readers
    assert changed == {f"{kind}/{kind}.pem", f"{kind}/README.md", *rosters}  # the README contains the new date
    assert read_certificate(federation / kind / f"{kind}.pem").public_key() == key
    warning = Kit.read(federation / kind, kind=kind).check_certificate(later)
    assert warning.not_after == later + timedelta(days=365)
    assert provisioning.renew_own_certificate(federation, kind, days=7, now=later).not_after == later + timedelta(
        days=7
    )


def test_renewed_server_takes_new_names_but_federation_name_is_fixed(federation: Path, desk: Desk, now: Any) -> None:
    settings, site = federation / "federation.toml", desk.request("north")
    settings.write_text(settings.read_text().replace("127.0.0.1:9092", "new.example.org:443"))
    unknown = pytest.raises(ConfigError, match=r"server = 'new.example.org:443': is not in .*renew-server first")
    with expect_unchanged(federation), unknown:
        desk.add(site)
    provisioning.renew_own_certificate(federation, "server", days=None, now=now)
    desk.add(site)
    assert 'server = "new.example.org:443"' in (federation / "sites" / "north" / "kit.toml").read_text()
    assert Kit.read(federation / "server", kind="server").check_certificate(now)
    settings.write_text(settings.read_text().replace("cardiology-2026", "oncology"))
    with pytest.raises(ConfigError, match=r"federation\.toml: name = 'oncology': must stay 'cardiology-2026'"):
        provisioning.renew_own_certificate(federation, "lead", days=None, now=now)


def test_offline_authority_is_required_and_must_match_the_federation(
    desk: Desk, federation: Path, federation_toml: Any
) -> None:
    desk.join("north")
    (federation / "authority").rename(federation.parent / "offline")
    assert len(FederationFolder.open(federation).roster.sites) == 1
    with (
        expect_unchanged(federation),
        pytest.raises(ConfigError, match=r"ca_key\.pem.*restore the authority's folder"),
    ):
        desk.add(desk.request("south"))
    desk.revoke("north")
    (federation.parent / "offline").rename(federation / "authority")
    desk.add(federation.parent / "south/kit/join_request.json")
    other = provisioning.init_federation(federation_toml, out=federation_toml.parent / "other", now=desk.now).folder
    for name in ("ca_key.pem", "ca.pem"):
        (other / "authority" / name).replace(federation / "authority" / name)
    with pytest.raises(ConfigError, match="must be the authority of this federation"):
        provisioning.renew_own_certificate(federation, "lead", days=None, now=desk.now)


def test_certificate_days_must_be_within_bounds(federation: Path, now: datetime) -> None:
    for days in (0, -1, 10**9):
        bounds = pytest.raises(ConfigError, match=f"--days = {days}: must be a number of days from 1 to 36500")
        with expect_unchanged(federation), bounds:
            provisioning.renew_own_certificate(federation, "server", days=days, now=now)


@pytest.mark.parametrize("kind", ["server", "lead", "site"])
def test_kit_readme_lists_secrets_and_expiry_dates(federation: Path, join_site: Any, kind: str, now: datetime) -> None:
    folder = join_site("north") if kind == "site" else federation / kind
    text = (folder / "README.md").read_text()
    for path in folder.iterdir():
        if path.name not in ("README.md", "join_request.json"):
            row = next(line for line in text.splitlines() if line.startswith(f"| {path.name} "))
            assert ("**secret**" in row) == (b"PRIVATE" in path.read_bytes()), row
    assert f"{now + timedelta(days=365):%Y-%m-%d}" in text
    assert "{" not in text

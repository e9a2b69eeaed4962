"""Joining, renewal and revocation of sites: isolation, permanent revocation of keys, and no older rosters."""

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits import federation_folder, members, provisioning
from fedtune.ops.kits.certificates import read_connection_key
from fedtune.ops.kits.federation_folder import CHANGE, FederationFolder
from fedtune.ops.kits.kit_file import Kit, KitCertificate
from fedtune.ops.kits.members import REQUEST, JoinRequest, Roster
from fedtune.ops.services.lead_and_server import KitRoster
from fedtune.ops.services.lead_and_server import find_members as members_of
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import write_policy
from fedtune.spec import KIT_SCHEMA, ConfigError

from ..conftest import fail_where, read_files
from .conftest import Desk, Killed, expect_unchanged, kill_at_step, unpack

KIT = ["README.md", "ca.pem", "kit.toml", "site.pem"]


def test_added_site_receives_a_matching_kit_without_secrets(desk: Desk) -> None:
    request = desk.request("north")
    result = desk.add(request)
    assert result.archive == desk.folder / "sites" / "north-kit.zip"
    unpack(result.archive, request.parent)
    kit = Kit.read(request.parent, kind="site")
    assert kit.site == "north"
    assert kit.check_certificate(desk.now).not_after == desk.now + timedelta(days=365)
    assert (result.member.site, result.changes) == ("north", ())
    with zipfile.ZipFile(result.archive) as archive:
        assert archive.namelist() == KIT
        for entry in archive.infolist():
            data = archive.read(entry)
            assert data == (desk.folder / "sites" / "north" / entry.filename).read_bytes()
            assert b"PRIVATE" not in data
            assert entry.external_attr >> 16 == stat.S_IFREG | 0o644
    assert read_files(desk.folder / "sites").keys() == {"north-kit.zip", *(f"north/{name}" for name in KIT)}


def test_renewal_and_revocation_do_not_affect_other_sites(desk: Desk) -> None:
    desk.join("north")
    south = desk.join("south")
    before, at_south, node_key = read_files(desk.folder), read_files(south), desk.member("north").node_key
    rosters = {"server/roster.json", "lead/roster.json"}

    def list_changed() -> set[str]:
        return {name for name, data in read_files(desk.folder).items() if data != before[name]}

    assert desk.renew("north", later=300).changes == ()
    assert list_changed() == rosters | {"sites/north/site.pem", "sites/north/README.md", "sites/north-kit.zip"}
    assert read_files(south) == at_south
    assert desk.member("north").node_key == node_key
    assert desk.member("north").certificate != desk.member("south").certificate
    before = read_files(desk.folder)
    desk.revoke("north")
    assert list_changed() == rosters
    assert (desk.member("north").revoked, desk.member("south").revoked) == (desk.now.isoformat(), None)
    with pytest.raises(ConfigError, match=r"site = 'north': was already revoked on 20"):
        desk.revoke("north")


def test_new_request_updates_connection_key_and_declared_sizes(desk: Desk) -> None:
    desk.join("north")
    old = desk.member("north")
    request = desk.request("north", kit="new", declared_size=250)
    result = desk.renew("north", request)
    assert desk.member("north").node_key == JoinRequest.read(request).node_key != old.node_key
    assert desk.member("north").datasets == {"patients": 250}
    assert desk.member("north").site_key == old.site_key
    assert result.changes == (
        "The site has a new connection key; the old key can never be used again.",
        "Data set patients has a declared size of 250 instead of 100.",
    )


def test_revoked_connection_key_can_never_be_reused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    first = desk.join("north") / "join_request.json"
    key = read_connection_key(first.with_name("connection_key.pem"))
    desk.revoke("north")
    with monkeypatch.context() as patch, expect_unchanged(desk.folder):
        patch.setattr(members, "generate_connection_key", lambda: key)  # the same key under another name
        with pytest.raises(
            ConfigError, match=r"join_request\.json: connection key = .*was the key of the revoked site north"
        ):
            desk.add(desk.request("south"))
        with pytest.raises(ConfigError, match=r"was revoked on .*: add it again with `renew-site north REQUEST`"):
            desk.add(first)
        for request in (None, first):
            with pytest.raises(ConfigError, match=r"was revoked on .*can never be used again: ask the site for a new"):
                desk.renew("north", request)
    result = desk.renew("north", desk.request("north", kit="new"))
    assert desk.member("north").revoked is None
    assert result.changes[0] == "The site was revoked and now takes part again."
    with pytest.raises(ConfigError, match="was replaced and can never be used again"):
        desk.renew("north", first)


def test_name_or_key_of_another_site_is_refused(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    (tmp_path / "west").mkdir()
    shutil.copy(tmp_path / "north" / "site_key.pem", tmp_path / "west")
    with expect_unchanged(desk.folder):
        for name in ("north", "NORTH"):
            with pytest.raises(ConfigError, match=rf"join_request\.json: site = '{name}': is the name of another site"):
                desk.add(desk.request(name, kit="again"))
        with pytest.raises(ConfigError, match="site = 'south': must be 'north', the name of the site to renew"):
            desk.renew("north", desk.request("south"))
        with pytest.raises(ConfigError, match=r"site_key = .*belongs to site north"):
            desk.add(desk.request("west"))


def test_new_site_key_requires_explicit_agreement(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    (tmp_path / "north" / "site_key.pem").unlink()
    request = desk.request("north", kit="new")
    refused = pytest.raises(ConfigError, match=r"site_key = .*a new ledger, .*budget .*starts over.*add --new-site-key")
    with expect_unchanged(desk.folder), refused:
        desk.renew("north", request)
    result = desk.renew("north", request, new_site_key=True)
    assert desk.member("north").site_key == SigningKey.load(tmp_path / "north" / "site_key.pem").public
    assert (
        "The site has a new site key and a new ledger, which does not count the spending of the old ledger."
        in result.changes
    )


def test_site_key_stays_bound_to_one_site(desk: Desk, tmp_path: Path) -> None:
    """Two sites with one key could not be distinguished, and an abandoned ledger would belong to another site."""
    for site in ("north", "south"):
        desk.join(site)
    for site in ("west", "east"):
        (tmp_path / site).mkdir()
    shutil.copy(desk.folder / "lead" / "lead_key.pem", tmp_path / "east" / "site_key.pem")
    shutil.move(tmp_path / "north" / "site_key.pem", tmp_path / "given_up.pem")
    shutil.copy(tmp_path / "south" / "site_key.pem", tmp_path / "north")
    used, same_key = desk.request("north", kit="taken"), tmp_path / "same.json"
    fields = json.loads(used.read_text()) | {
        "csr": json.loads((tmp_path / "north" / "kit" / REQUEST).read_text())["csr"]
    }
    fields["signature"] = SigningKey.load(tmp_path / "north" / "site_key.pem").sign(
        members.PURPOSE, members.encode_for_signature({**fields, "signature": ""})
    )
    same_key.write_text(json.dumps(fields))  # with the site's current connection key
    with expect_unchanged(desk.folder):
        for request in (used, same_key):
            with pytest.raises(ConfigError, match=r"site_key = .*belongs to site south"):
                desk.renew("north", request, new_site_key=True)
        with pytest.raises(ConfigError, match=r"site_key = .*is the lead's key"):
            desk.add(desk.request("east"))
    (tmp_path / "north" / "site_key.pem").unlink()
    desk.renew("north", desk.request("north", kit="new"), new_site_key=True)
    for site in ("north", "west"):
        shutil.copy(tmp_path / "given_up.pem", tmp_path / site / "site_key.pem")
    with expect_unchanged(desk.folder):
        with pytest.raises(ConfigError, match=r"site_key = .*was replaced and can never be used again"):
            desk.renew("north", desk.request("north", kit="back"), new_site_key=True)
        with pytest.raises(ConfigError, match=r"site_key = .*was replaced and can never be used again"):
            desk.add(desk.request("west"))


def read_whole_folder(folder: Path) -> dict[str, bytes]:
    """Read a federation's folder after a command has opened it; its files must belong to one change."""
    FederationFolder.open(folder)
    files = {name: data for name, data in read_files(folder).items() if not name.endswith(".partial")}
    roster = FederationFolder.open(folder).roster
    assert CHANGE not in files
    assert files["lead/roster.json"] == files["server/roster.json"] == roster.to_bytes()
    for member in roster.sites:
        assert files[f"sites/{member.site}/site.pem"].decode() == member.certificate
        with zipfile.ZipFile(folder / f"sites/{member.site}-kit.zip") as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {
                name: files[f"sites/{member.site}/{name}"] for name in KIT
            }
    return files


def test_interrupted_membership_change_is_complete_or_absent(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    kept, ends = tmp_path / "kept", set()
    shutil.copytree(desk.folder, kept)
    before = read_whole_folder(kept)
    moved_request, new = desk.request("north", kit="moved"), desk.request("south")
    changes: dict[str, Callable[[], object]] = {
        "renew-site": lambda: desk.renew("north", later=300),
        "renew-site with another key": lambda: desk.renew("north", moved_request),
        "add-site": lambda: desk.add(new),
        "renew-server": lambda: provisioning.renew_own_certificate(desk.folder, "server", days=None, now=desk.now),
        "renew-lead": lambda: provisioning.renew_own_certificate(desk.folder, "lead", days=None, now=desk.now),
        "revoke-site": lambda: desk.revoke("north"),
    }
    for name, change in changes.items():
        step, result = 0, False
        while not result:
            shutil.rmtree(desk.folder)
            shutil.copytree(kept, desk.folder)
            with pytest.MonkeyPatch.context() as patch:
                steps = kill_at_step(step, patch)
                try:
                    change()
                except Killed:
                    pass
                else:
                    result = True
            listed = {(desk.folder / kind / "roster.json").read_bytes() for kind in ("server", "lead")}
            after = read_whole_folder(desk.folder)
            assert listed <= {before["server/roster.json"], after["server/roster.json"]}, (name, step)
            # What counts is what a running process has shown the server.
            if listed != {before["server/roster.json"]} or result:
                assert after["server/roster.json"] != before["server/roster.json"], (name, step)
            if after["server/roster.json"] == before["server/roster.json"]:
                assert after == before, (name, step, steps)
            ends.add((name, after != before))
            step += 1
        assert step > 10, "each file must take several steps"
    assert all({(name, False), (name, True)} <= ends for name in changes)


def test_change_on_a_full_disk_is_undone_or_completed_later(desk: Desk, monkeypatch: Any) -> None:
    request, kit = desk.request("north"), desk.folder / "sites/north-kit.zip"
    before, full = read_whole_folder(desk.folder), OSError(28, "No space left on device", str(kit))
    with monkeypatch.context() as patch:
        fail_where(patch, federation_folder, "write_durably", lambda path, data: path.name == CHANGE, full)
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            desk.add(request)
    assert read_whole_folder(desk.folder) == before, "without disk space nothing may change"
    with monkeypatch.context() as patch:
        fail_where(patch, federation_folder, "write_durably", lambda path, data: path == kit, full)
        for change in (desk.add, lambda _: desk.revoke("north"), lambda _: FederationFolder.open(desk.folder)):
            with pytest.raises(ConfigError, match=r"has a partly written change.*No space left.*north-kit\.zip"):
                change(request)
        assert Roster.read(desk.folder / "server" / "roster.json").sites == ()
    assert [member.site for member in FederationFolder.open(desk.folder).roster.sites] == ["north"]
    read_whole_folder(desk.folder)
    assert sorted(path.name for path in (desk.folder / "sites").iterdir()) == ["north", "north-kit.zip"]


def test_concurrently_added_sites_are_all_registered(desk: Desk) -> None:
    requests = [desk.request(f"site-{number}") for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(desk.add, requests))
    registered = {member.site for member in Roster.read(desk.folder / "server" / "roster.json").sites}
    assert registered == {f"site-{number}" for number in range(6)}


def test_unreadable_pending_change_or_retired_keys_stop_admission(desk: Desk) -> None:
    request, before = desk.request("north"), read_whole_folder(desk.folder)
    for name, text in (
        (CHANGE, json.dumps({"version": KIT_SCHEMA, "files": {"lead/roster.json": "x"}})),
        *((CHANGE, '{"version": 1, "files": {}}'), (CHANGE, "nothing"), ("retired_keys.json", "nothing")),
        ("retired_keys.json", json.dumps({"version": KIT_SCHEMA})),
        ("retired_keys.json", json.dumps({"version": KIT_SCHEMA, "fingerprints": [1]})),
    ):
        (desk.folder / name).write_text(text)
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            desk.add(request)
        (desk.folder / name).unlink()
    assert read_whole_folder(desk.folder) == before
    (desk.folder / "retired_keys.json").mkdir()
    with pytest.raises(ConfigError, match=r"retired_keys\.json': must be a readable file"):
        desk.add(request)
    (desk.folder / "retired_keys.json").rmdir()
    assert FederationFolder.open(desk.folder).read_retired_keys() == frozenset()
    desk.add(request)


def test_site_lists_only_the_current_members_of_its_roster(
    desk: Desk, command: Any, site_policy: Any, tmp_path: Path
) -> None:
    kit, file = desk.join("north"), desk.folder / "server/roster.json"
    for name in ("south", "west", "abroad"):
        desk.join(name)
    desk.revoke("west")
    keys = {name: desk.member(name).site_key for name in ("north", "south", "west")}
    site_toml, own = tmp_path / "north/site.toml", ("--kit", str(kit), "--site", str(tmp_path / "north/site.toml"))
    trusted = {"south": keys["north"], "west": keys["west"], "east": keys["south"]}
    write_policy(site_policy("north", trust={"members": trusted}), site_toml)
    with expect_unchanged(tmp_path / "north"):
        listed = json.loads(command("site", "members", str(file), *own, "--json").printed)
    assert listed["number"] == FederationFolder.open(desk.folder).roster.number
    assert {member["site"]: member["state"] for member in listed["members"]} == {
        "south": "in [trust].members WITH ANOTHER KEY: call that site",
        "west": f"in [trust].members, but revoked {desk.now:%Y-%m-%d}: remove it",
        "abroad": "not in [trust].members",
        "east": "in [trust].members, but not in the federation: remove it",
    }
    assert "from the lead's roster number" in command("site", "members", str(file), *own).out
    file.write_text(file.read_text().replace(keys["south"], "ab" * 32))
    for copied in (own, (*own, "--json")):
        assert (
            "is not the signature of the federation's lead" in command("site", "members", str(file), *copied).failed()
        )


# What a running process reads from its kit.


def read_roster(desk: Desk) -> Roster:
    return FederationFolder.open(desk.folder).roster


def load_lead_key(desk: Desk) -> SigningKey:
    return SigningKey.load(desk.folder / "lead/lead_key.pem")


@pytest.fixture
def kit(desk: Desk) -> Kit:
    return Kit.read(desk.folder / "server", kind="server")


def test_every_membership_change_produces_a_newer_signed_roster(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kept = read_roster(desk).number, (desk.folder / "server/roster.json").read_bytes()
    read_roster(desk).check_lead_signature(load_lead_key(desk).public)
    for change in (desk.join, desk.revoke):
        change("north")
        newer = read_roster(desk)
        newer.check_lead_signature(load_lead_key(desk).public)
        assert newer.number > before
        before = newer.number
    # A folder restored from a backup does not reuse a number.
    (desk.folder / "server/roster.json").write_bytes(kept)
    monkeypatch.setattr("fedtune.ops.kits.federation_folder.time.time", lambda: before + 60.0)
    desk.join("south")
    assert read_roster(desk).number > before


def test_server_accepts_only_newer_rosters_signed_by_the_lead(desk: Desk, kit: Kit, tmp_path: Path) -> None:
    served = KitRoster(kit)
    first = served.read_newest()
    desk.join("north")
    assert [member.site for member in served.read_newest().sites] == ["north"]
    newer = read_roster(desk)
    forged = replace(newer, number=newer.number + 1)
    for invalid, reason in (
        (forged, r"roster\.json: roster\.signature = .*is not the signature of the federation's lead"),
        (
            forged.sign_roster(SigningKey.load_or_create(tmp_path / "stranger.pem")),
            "is not the signature of the federation's lead",
        ),
        (replace(forged, federation="other").sign_roster(load_lead_key(desk)), "must be 'cardiology-2026'"),
        (first, rf"roster\.number = {first.number}: must be higher than {newer.number}"),
        (replace(newer, sites=()).sign_roster(load_lead_key(desk)), "must be higher than"),
    ):
        kit.roster.write_bytes(invalid.to_bytes())
        for _ in range(2):
            with pytest.raises(ConfigError, match=reason):
                served.read_newest()
    kit.roster.write_text("{")
    with pytest.raises(ConfigError, match="must be one complete JSON object"):  # while it is being copied
        served.read_newest()
    kit.roster.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        served.read_newest()
    kit.roster.write_bytes(newer.to_bytes())
    assert served.read_newest() == newer


def test_revoked_key_stays_revoked_while_the_server_runs(desk: Desk, kit: Kit) -> None:
    served = KitRoster(kit)
    desk.join("north")
    joined = served.read_newest()
    desk.revoke("north")
    revoked = served.read_newest()
    dropped = replace(joined, sites=(), number=revoked.number + 1).sign_roster(load_lead_key(desk))
    returned = replace(joined, number=revoked.number + 2).sign_roster(load_lead_key(desk))
    for before in (revoked, dropped):
        kit.roster.write_bytes(before.to_bytes())
        assert served.read_newest() == before
        kit.roster.write_bytes(returned.to_bytes())
        with pytest.raises(ConfigError, match=r"roster\.sites = \['north'\]: must stay revoked"):
            served.read_newest()
    # With a new key the site may return.
    desk.renew("north", desk.request("north", kit="another"))
    reinstated = replace(read_roster(desk), number=revoked.number + 3).sign_roster(load_lead_key(desk))
    kit.roster.write_bytes(reinstated.to_bytes())
    assert served.read_newest().sites[0].revoked is None


def test_lead_refuses_a_tampered_roster(desk: Desk) -> None:
    desk.join("north")
    desk.revoke("north")
    kit = Kit.read(desk.folder / "lead", kind="lead")
    fields = json.loads(kit.roster.read_bytes())
    kit.roster.write_text(json.dumps({**fields, "sites": [{**fields["sites"][0], "revoked": None}]}))
    with pytest.raises(ConfigError, match="is not the signature of the federation's lead"):
        members_of(kit, ("north",))


def test_replaced_kit_certificate_is_used_once_complete(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    kit = Kit.read(desk.join("north"), kind="site")
    certificate = KitCertificate(kit)
    before = certificate.certificate
    result = provisioning.renew_site(desk.folder, "north", days=400, now=desk.now)
    other = Kit.read(desk.join("south"), kind="site").certificate
    for invalid in (result.member.certificate[:200].encode(), b"", other.read_bytes()):
        kit.certificate.write_bytes(invalid)
        assert not certificate.is_new()
        assert not certificate.is_new()
        assert certificate.certificate == before
    assert caplog.text.count("the kit's new certificate is ignored") == 2, "each reason must be logged once"
    kit.certificate.unlink()
    assert not certificate.is_new()
    kit.certificate.write_text(result.member.certificate)
    assert certificate.is_new()
    assert not certificate.is_new()
    assert (certificate.certificate.not_after - before.not_after).days == 35

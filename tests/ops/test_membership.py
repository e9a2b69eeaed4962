"""Sites come, renew and go: each for itself, and a key that was let go never comes back."""

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits import federation_folder, members, provisioning
from fedtune.ops.kits.certificates import read_connection_key
from fedtune.ops.kits.federation_folder import CHANGE, FederationFolder
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.kits.members import JoinRequest, Roster
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import write_policy
from fedtune.spec import ConfigError

from ..conftest import fail_where, files_in
from .conftest import Desk, Killed, killed_at, unpack

KIT = ["README.md", "ca.pem", "kit.toml", "site.pem"]


def test_a_site_gets_a_kit_that_fits_its_key_and_holds_no_secret(desk: Desk) -> None:
    request = desk.request("north")
    done = desk.add(request)
    assert done.archive == desk.folder / "sites" / "north-kit.zip"
    unpack(done.archive, request.parent)
    kit = Kit.read(request.parent, kind="site")
    assert kit.site == "north"
    assert kit.check_certificate(desk.now).not_after == desk.now + timedelta(days=365)
    assert (done.member.site, done.changes) == ("north", ())
    with zipfile.ZipFile(done.archive) as archive:
        assert archive.namelist() == KIT
        for entry in archive.infolist():
            data = archive.read(entry)
            assert data == (desk.folder / "sites" / "north" / entry.filename).read_bytes()
            assert b"PRIVATE" not in data
            assert entry.external_attr >> 16 == stat.S_IFREG | 0o644
    assert files_in(desk.folder / "sites").keys() == {"north-kit.zip", *(f"north/{name}" for name in KIT)}


def test_renewing_with_the_same_key_changes_nothing_at_the_others(desk: Desk) -> None:
    desk.join("north")
    south = desk.join("south")
    before, at_south, node_key = files_in(desk.folder), files_in(south), desk.member("north").node_key
    done = desk.renew("north", later=300)
    changed = {name for name, data in files_in(desk.folder).items() if data != before[name]}
    assert changed == {
        *("sites/north/site.pem", "sites/north/README.md", "sites/north-kit.zip"),
        *("server/roster.json", "lead/roster.json"),
    }
    assert files_in(south) == at_south
    assert desk.member("north").node_key == node_key
    assert desk.member("north").certificate != desk.member("south").certificate
    assert done.changes == ()


def test_a_new_request_changes_connection_key_and_declared_sizes(desk: Desk) -> None:
    desk.join("north")
    old = desk.member("north")
    request = desk.request("north", kit="new", declared_size=250)
    done = desk.renew("north", request)
    assert desk.member("north").node_key == JoinRequest.read(request).node_key != old.node_key
    assert desk.member("north").sizes == {"patients": 250}
    assert desk.member("north").site_key == old.site_key
    assert done.changes == (
        "It has a new connection key; the old one can never be used again.",
        "Data set patients has a declared size of 250 instead of 100.",
    )


def test_revoking_marks_the_roster_and_touches_nothing_else(desk: Desk) -> None:
    desk.join("north")
    desk.join("south")
    before = files_in(desk.folder)
    desk.revoke("north")
    changed = {name for name, data in files_in(desk.folder).items() if data != before[name]}
    assert changed == {"server/roster.json", "lead/roster.json"}
    assert desk.member("north").revoked == desk.now.isoformat()
    assert desk.member("south").revoked is None
    with pytest.raises(ConfigError, match=r"site = 'north': was revoked before, on 20"):
        desk.revoke("north")


def test_a_revoked_connection_key_can_never_be_used_again(desk: Desk) -> None:
    first = desk.join("north") / "join_request.json"
    desk.revoke("north")
    before = files_in(desk.folder)
    with pytest.raises(ConfigError, match=r"was revoked on .*: let it in again with `renew-site north REQUEST`"):
        desk.add(first)
    for request in (None, first):
        with pytest.raises(ConfigError, match=r"was revoked on .*can never be used again: ask the site for a new"):
            desk.renew("north", request)
    assert files_in(desk.folder) == before

    done = desk.renew("north", desk.request("north", kit="new"))
    assert desk.member("north").revoked is None
    assert done.changes[0] == "The site was revoked, and takes part again."
    with pytest.raises(ConfigError, match="was replaced before and can never be used again"):
        desk.renew("north", first)


def test_a_revoked_key_does_not_come_back_under_another_name(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    key = desk.join("north") / "connection_key.pem"
    desk.revoke("north")
    monkeypatch.setattr(members, "make_key", lambda: read_connection_key(key))
    with pytest.raises(ConfigError, match=r"join_request\.json: connection key = .*was revoked with site north"):
        desk.add(desk.request("south"))


def test_another_site_s_keys_are_refused(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    (tmp_path / "south").mkdir()
    shutil.copy(tmp_path / "north" / "site_key.pem", tmp_path / "south" / "site_key.pem")
    with pytest.raises(ConfigError, match=r"site_key = .*belongs to site north"):
        desk.add(desk.request("south"))


@pytest.mark.parametrize("name", ["north", "NORTH"])
def test_a_name_is_taken_once(desk: Desk, name: str) -> None:
    desk.join("north")
    before = files_in(desk.folder)
    with pytest.raises(ConfigError, match=rf"join_request\.json: site = '{name}': is taken by a site"):
        desk.add(desk.request(name, kit="again"))
    assert files_in(desk.folder) == before


def test_a_request_of_another_site_renews_nobody(desk: Desk) -> None:
    desk.join("north")
    with pytest.raises(ConfigError, match="site = 'south': must be 'north', the site that is renewed"):
        desk.renew("north", desk.request("south"))


def test_another_site_key_means_a_new_ledger_and_has_to_be_agreed(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    (tmp_path / "north" / "site_key.pem").unlink()
    request = desk.request("north", kit="new")
    before = files_in(desk.folder)
    with pytest.raises(ConfigError, match=r"site_key = .*a new ledger: .*budget starts anew.*add --new-site-key"):
        desk.renew("north", request)
    assert files_in(desk.folder) == before
    done = desk.renew("north", request, new_site_key=True)
    assert desk.member("north").site_key == SigningKey.load(tmp_path / "north" / "site_key.pem").public
    assert "It has a new site key, and so a new ledger: what the old one spent no longer counts." in done.changes


def changes(desk: Desk) -> list[tuple[str, Callable[[], object]]]:
    """Each command that changes a federation."""
    moved, new = desk.request("north", kit="moved"), desk.request("south")
    return [
        ("renew-site", lambda: desk.renew("north", later=300)),
        ("renew-site with another key", lambda: desk.renew("north", moved)),
        ("add-site", lambda: desk.add(new)),
        ("renew-server", lambda: provisioning.renew(desk.folder, "server", days=None, now=desk.now)),
        ("renew-lead", lambda: provisioning.renew(desk.folder, "lead", days=None, now=desk.now)),
        ("revoke-site", lambda: desk.revoke("north")),
    ]


def whole(folder: Path) -> dict[str, bytes]:
    """What is in a federation's folder, once a command has opened it, which must be of one change."""
    FederationFolder.open(folder)
    files = {name: data for name, data in files_in(folder).items() if not name.endswith(".partial")}
    roster = FederationFolder.open(folder).roster
    assert CHANGE not in files
    assert files["lead/roster.json"] == files["server/roster.json"] == roster.to_bytes()
    for one in roster.sites:
        assert files[f"sites/{one.site}/site.pem"].decode() == one.certificate
        with zipfile.ZipFile(folder / f"sites/{one.site}-kit.zip") as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {
                name: files[f"sites/{one.site}/{name}"] for name in KIT
            }
    return files


def test_a_change_that_is_killed_anywhere_is_whole_or_not_there(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    kept, ends = tmp_path / "kept", set()
    shutil.copytree(desk.folder, kept)
    before = whole(kept)
    all_of_them = changes(desk)
    for name, change in all_of_them:
        step, done = 0, False
        while not done:
            shutil.rmtree(desk.folder)
            shutil.copytree(kept, desk.folder)
            with pytest.MonkeyPatch.context() as patch:
                begun = killed_at(step, patch)
                try:
                    change()
                except Killed:
                    pass
                else:
                    done = True
            shown = {(desk.folder / kind / "roster.json").read_bytes() for kind in ("server", "lead")}
            after = whole(desk.folder)
            assert shown <= {before["server/roster.json"], after["server/roster.json"]}, (name, step)
            # What a process that runs from this folder has shown the server is what counts.
            if shown != {before["server/roster.json"]} or done:
                assert after["server/roster.json"] != before["server/roster.json"], (name, step)
            if after["server/roster.json"] == before["server/roster.json"]:
                assert after == before, (name, step, begun)
            ends.add((name, after != before))
            step += 1
        assert step > 10, "each file takes some steps"
    assert all({(name, False), (name, True)} <= ends for name, _ in all_of_them)


def test_a_change_that_is_made_is_completed_before_the_next(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    request, kit = desk.request("north"), desk.folder / "sites/north-kit.zip"
    full = OSError(28, "No space left on device", str(kit))
    with monkeypatch.context() as patch:
        fail_where(patch, federation_folder, "write_durably", lambda path, data: path == kit, full)
        for again in (desk.add, lambda _: desk.revoke("north"), lambda _: FederationFolder.open(desk.folder)):
            with pytest.raises(ConfigError, match=r"has a change that is made.*No space left.*north-kit\.zip"):
                again(request)
        assert Roster.read(desk.folder / "server" / "roster.json").sites == ()
    assert [one.site for one in FederationFolder.open(desk.folder).roster.sites] == ["north"]
    whole(desk.folder)


def test_a_change_for_which_there_is_no_room_is_not_made(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    request, before = desk.request("north"), whole(desk.folder)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        fail_where(patch, federation_folder, "write_durably", lambda path, data: path.name == CHANGE, full)
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            desk.add(request)
    assert whole(desk.folder) == before
    desk.add(request)  # the same request still goes through
    assert sorted(path.name for path in (desk.folder / "sites").iterdir()) == ["north", "north-kit.zip"]


def test_a_change_that_somebody_damaged_is_named(desk: Desk) -> None:
    before = whole(desk.folder)
    for text in ("nothing", '{"version": 2, "files": {"lead/roster.json": "x"}}', '{"version": 3, "files": {}}'):
        (desk.folder / CHANGE).write_text(text)
        with pytest.raises(ConfigError, match=r"change\.json"):
            FederationFolder.open(desk.folder)
    (desk.folder / CHANGE).unlink()
    assert whole(desk.folder) == before


def test_sites_added_at_once_are_all_in(desk: Desk) -> None:
    requests = [desk.request(f"site-{number}") for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(desk.add, requests))
    found = {one.site for one in Roster.read(desk.folder / "server" / "roster.json").sites}
    assert found == {f"site-{number}" for number in range(6)}


def test_retired_keys_that_cannot_be_read_stop_admission(desk: Desk) -> None:
    request = desk.request("north")
    for text in ("nothing", '{"version": 2}', '{"version": 2, "fingerprints": [1]}'):
        (desk.folder / "retired_keys.json").write_text(text)
        with pytest.raises(ConfigError, match=r"retired_keys\.json"):
            desk.add(request)
    (desk.folder / "retired_keys.json").unlink()
    (desk.folder / "retired_keys.json").mkdir()
    with pytest.raises(ConfigError, match=r"retired_keys\.json': must be a readable file"):
        desk.add(request)
    (desk.folder / "retired_keys.json").rmdir()
    assert FederationFolder.open(desk.folder).retired() == frozenset()
    desk.add(request)


def test_a_site_sees_who_is_there_and_no_more(desk: Desk, command: Any, site_policy: Any, tmp_path: Path) -> None:
    kit, file = desk.join("north"), desk.folder / "server/roster.json"
    for name in ("south", "west", "abroad"):
        desk.join(name)
    desk.revoke("west")
    keys = {name: desk.member(name).site_key for name in ("north", "south", "west")}
    site_toml, own = tmp_path / "north/site.toml", ("--kit", str(kit), "--site", str(tmp_path / "north/site.toml"))
    trusted = {"south": keys["north"], "west": keys["west"], "east": keys["south"]}
    write_policy(site_policy("north", trust={"members": trusted}), site_toml)
    before = files_in(tmp_path / "north")
    shown = json.loads(command("site", "members", str(file), *own, "--json").printed)
    assert shown["number"] == FederationFolder.open(desk.folder).roster.number
    assert {one["site"]: one["state"] for one in shown["members"]} == {
        "south": "in [trust].members WITH ANOTHER KEY: call that site",
        "west": f"in [trust].members, and revoked {desk.now:%Y-%m-%d}: take it out",
        "abroad": "not in [trust].members",
        "east": "in [trust].members, and not in the federation: take it out",
    }
    assert "by the lead's roster number" in command("site", "members", str(file), *own).out
    file.write_text(file.read_text().replace(keys["south"], keys["north"]))
    for copied in (own, (*own, "--json")):
        assert "must be signed by the federation's lead" in command("site", "members", str(file), *copied).failed()
    assert files_in(tmp_path / "north") == before

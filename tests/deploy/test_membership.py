"""Sites come, renew and go: each for itself, and a key that was let go never comes back."""

from __future__ import annotations

import shutil
import stat
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.deploy.files import locked, zip_of
from fedtune.deploy.kits import members, provisioning
from fedtune.deploy.kits.certificates import read_connection_key
from fedtune.deploy.kits.federation_folder import FederationFolder
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.kits.members import JoinRequest, Member, read_roster
from fedtune.deploy.kits.provisioning import Admitted
from fedtune.privacy.keys import SigningKey
from fedtune.spec import ConfigError

from .conftest import files_in

KIT = ["README.md", "ca.pem", "kit.toml", "site.pem"]


@pytest.fixture
def add(federation: Path, now: datetime) -> Callable[[Path], Admitted]:
    return lambda request: provisioning.add_site(federation, request=request, days=None, now=now)


@pytest.fixture
def renew(federation: Path, now: datetime) -> Callable[..., Admitted]:
    def make(
        name: str, request: Path | None = None, *, days: int | None = None, new_site_key: bool = False, later: int = 0
    ) -> Admitted:
        moment = now + timedelta(days=later)
        return provisioning.renew_site(
            federation, name, request=request, days=days, new_site_key=new_site_key, now=moment
        )

    return make


@pytest.fixture
def member(federation: Path) -> Callable[[str], Member]:
    """A site in the server's roster, which must be the lead's, too."""

    def find(name: str) -> Member:
        members = read_roster(federation / "server" / "roster.json")
        assert members == read_roster(federation / "lead" / "roster.json")
        return next(one for one in members if one.site == name)

    return find


def test_a_site_gets_a_kit_that_fits_its_key(
    federation: Path, request_of: Callable[..., Path], add: Callable[[Path], Admitted], now: datetime
) -> None:
    request = request_of("north")
    done = add(request)
    assert done.archive == federation / "sites" / "north-kit.zip"
    with zipfile.ZipFile(done.archive) as archive:
        archive.extractall(request.parent)
    kit = Kit.read(request.parent, kind="site")
    assert kit.site == "north"
    assert kit.check_certificate(now).not_after == now + timedelta(days=365)
    assert (done.member.site, done.requested, done.changes) == ("north", True, ())


def test_the_archive_holds_the_folder_s_files_and_no_secret(
    federation: Path, request_of: Callable[..., Path], add: Callable[[Path], Admitted]
) -> None:
    done = add(request_of("north"))
    with zipfile.ZipFile(done.archive) as archive:
        assert archive.namelist() == KIT
        for entry in archive.infolist():
            data = archive.read(entry)
            assert data == (federation / "sites" / "north" / entry.filename).read_bytes()
            assert b"PRIVATE" not in data
            assert entry.external_attr >> 16 == stat.S_IFREG | 0o644
    assert files_in(federation / "sites").keys() == {"north-kit.zip", *(f"north/{name}" for name in KIT)}


def test_the_archive_is_the_same_for_the_same_files(
    federation: Path, request_of: Callable[..., Path], add: Callable[[Path], Admitted], now: datetime
) -> None:
    done = add(request_of("north"))
    files = files_in(federation / "sites" / "north")
    moment = done.member.issued.not_valid_before_utc
    again = zip_of(dict(reversed(list(files.items()))), moment=moment)
    assert again == done.archive.read_bytes()
    with zipfile.ZipFile(done.archive) as archive:
        dates = {datetime(*entry.date_time, tzinfo=UTC) for entry in archive.infolist()}
    assert all(abs(date - moment) <= timedelta(seconds=2) for date in dates)  # the certificate's, not the clock's


def test_no_roster_holds_a_private_key(federation: Path, joined: Callable[[str], Path]) -> None:
    joined("north")
    for kind in ("server", "lead"):
        assert b"PRIVATE" not in (federation / kind / "roster.json").read_bytes()


def test_renewing_with_the_same_key_changes_nothing_at_the_others(
    federation: Path, joined: Callable[[str], Path], renew: Callable[..., Admitted], member: Callable[[str], Member]
) -> None:
    joined("north")
    south = joined("south")
    before, at_south, node_key = files_in(federation), files_in(south), member("north").node_key
    done = renew("north", later=300)
    changed = {name for name, data in files_in(federation).items() if data != before[name]}
    assert changed == {
        *("sites/north/site.pem", "sites/north/README.md", "sites/north-kit.zip"),
        *("server/roster.json", "lead/roster.json"),
    }
    assert files_in(south) == at_south
    assert member("north").node_key == node_key
    assert member("north").certificate != member("south").certificate
    assert (done.requested, done.changes) == (False, ())


def test_a_renewed_kit_is_unzipped_over_the_old_one(
    joined: Callable[[str], Path], renew: Callable[..., Admitted], now: datetime
) -> None:
    kit = joined("north")
    with zipfile.ZipFile(renew("north", later=300).archive) as archive:
        archive.extractall(kit)
    found = Kit.read(kit, kind="site").check_certificate(now + timedelta(days=400))
    assert found.not_after == now + timedelta(days=665)


def test_a_new_request_changes_connection_key_and_declared_sizes(
    request_of: Callable[..., Path],
    joined: Callable[[str], Path],
    renew: Callable[..., Admitted],
    member: Callable[[str], Member],
) -> None:
    joined("north")
    old = member("north")
    request = request_of("north", kit="new", declared_size=250)
    done = renew("north", request)
    assert member("north").node_key == JoinRequest.read(request).node_key != old.node_key
    assert member("north").sizes == {"patients": 250}
    assert member("north").site_key == old.site_key
    assert done.changes == (
        "It has a new connection key; the old one can never be used again.",
        "Data set patients has a declared size of 250 instead of 100.",
    )


def test_a_replaced_connection_key_never_comes_back(
    request_of: Callable[..., Path], joined: Callable[[str], Path], renew: Callable[..., Admitted]
) -> None:
    first = joined("north") / "join_request.json"
    renew("north", request_of("north", kit="second"))
    with pytest.raises(ConfigError, match=r"connection key = .*was replaced before and can never be used again"):
        renew("north", first)


def test_revoking_marks_the_roster_and_touches_nothing_else(
    federation: Path, joined: Callable[[str], Path], member: Callable[[str], Member], now: datetime
) -> None:
    joined("north")
    joined("south")
    before = files_in(federation)
    provisioning.revoke_site(federation, "north", now=now)
    changed = {name for name, data in files_in(federation).items() if data != before[name]}
    assert changed == {"server/roster.json", "lead/roster.json"}
    assert member("north").revoked == now.isoformat()
    assert member("south").revoked is None
    with pytest.raises(ConfigError, match=r"site = 'north': was revoked before, on 20"):
        provisioning.revoke_site(federation, "north", now=now)


def test_a_revoked_connection_key_can_never_be_used_again(
    federation: Path,
    request_of: Callable[..., Path],
    joined: Callable[[str], Path],
    add: Callable[[Path], Admitted],
    renew: Callable[..., Admitted],
    member: Callable[[str], Member],
    now: datetime,
) -> None:
    first = joined("north") / "join_request.json"
    provisioning.revoke_site(federation, "north", now=now)
    before = files_in(federation)
    with pytest.raises(ConfigError, match=r"was revoked on .*: let it in again with `renew-site north REQUEST`"):
        add(first)
    for request in (None, first):
        with pytest.raises(ConfigError, match=r"was revoked on .*can never be used again: ask the site for a new"):
            renew("north", request)
    assert files_in(federation) == before

    done = renew("north", request_of("north", kit="new"))
    assert member("north").revoked is None
    assert done.changes[0] == "The site was revoked, and takes part again."
    with pytest.raises(ConfigError, match="was replaced before and can never be used again"):
        renew("north", first)


def test_a_revoked_key_does_not_come_back_under_another_name(
    federation: Path,
    tmp_path: Path,
    request_of: Callable[..., Path],
    joined: Callable[[str], Path],
    add: Callable[[Path], Admitted],
    monkeypatch: pytest.MonkeyPatch,
    now: datetime,
) -> None:
    key = joined("north") / "connection_key.pem"
    provisioning.revoke_site(federation, "north", now=now)
    monkeypatch.setattr(members, "make_key", lambda: read_connection_key(key))
    with pytest.raises(ConfigError, match=r"join_request\.json: connection key = .*was revoked with site north"):
        add(request_of("south"))


def test_another_site_s_keys_are_refused(
    request_of: Callable[..., Path], joined: Callable[[str], Path], add: Callable[[Path], Admitted], tmp_path: Path
) -> None:
    joined("north")
    (tmp_path / "south").mkdir()
    shutil.copy(tmp_path / "north" / "site_key.pem", tmp_path / "south" / "site_key.pem")
    with pytest.raises(ConfigError, match=r"site_key = .*belongs to site north"):
        add(request_of("south"))


@pytest.mark.parametrize("name", ["north", "North", "NORTH"])
def test_a_name_is_taken_once(
    federation: Path,
    request_of: Callable[..., Path],
    joined: Callable[[str], Path],
    add: Callable[[Path], Admitted],
    name: str,
) -> None:
    joined("north")
    before = files_in(federation)
    with pytest.raises(ConfigError, match=rf"join_request\.json: site = '{name}': is taken by a site"):
        add(request_of(name, kit="again"))
    assert files_in(federation) == before


def test_a_request_of_another_site_renews_nobody(
    request_of: Callable[..., Path], joined: Callable[[str], Path], renew: Callable[..., Admitted]
) -> None:
    joined("north")
    with pytest.raises(ConfigError, match="site = 'south': must be 'north', the site that is renewed"):
        renew("north", request_of("south"))


def test_an_unknown_site_is_named(
    federation: Path, joined: Callable[[str], Path], renew: Callable[..., Admitted], now: datetime
) -> None:
    for known in ("none yet", "north"):
        with pytest.raises(ConfigError, match=f"site = 'west': must be a site of the federation: {known}"):
            renew("west")
        with pytest.raises(ConfigError, match=f"site = 'west': must be a site of the federation: {known}"):
            provisioning.revoke_site(federation, "west", now=now)
        if known == "none yet":
            joined("north")


def test_another_site_key_means_a_new_ledger_and_has_to_be_agreed(
    federation: Path,
    tmp_path: Path,
    request_of: Callable[..., Path],
    joined: Callable[[str], Path],
    renew: Callable[..., Admitted],
    member: Callable[[str], Member],
) -> None:
    joined("north")
    (tmp_path / "north" / "site_key.pem").unlink()
    request = request_of("north", kit="new")
    before = files_in(federation)
    with pytest.raises(ConfigError, match=r"site_key = .*a new ledger: .*budget starts anew.*add --new-site-key"):
        renew("north", request)
    with pytest.raises(ConfigError, match="--new-site-key = True: needs the REQUEST"):
        renew("north", new_site_key=True)
    assert files_in(federation) == before
    done = renew("north", request, new_site_key=True)
    assert member("north").site_key == SigningKey.load(tmp_path / "north" / "site_key.pem").public
    assert "It has a new site key, and so a new ledger: what the old one spent no longer counts." in done.changes


def test_the_server_s_roster_is_written_last_and_nothing_counts_before(
    federation: Path,
    request_of: Callable[..., Path],
    add: Callable[[Path], Admitted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of("north")
    roster = (federation / "server" / "roster.json").read_bytes()
    real = provisioning.write_durably
    for stop in ("north-kit.zip", "server/roster.json"):

        def fail(path: Path, data: bytes, stop: str = stop) -> None:
            if str(path).endswith(stop):
                raise OSError(28, "No space left on device")
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr("fedtune.deploy.kits.provisioning.write_durably", fail)
            patch.setattr("fedtune.deploy.kits.members.write_durably", fail)
            with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
                add(request)
        assert (federation / "server" / "roster.json").read_bytes() == roster
    assert len(read_roster(federation / "lead" / "roster.json")) == 1  # was written before, and does not count
    add(request)  # the same request still goes through
    assert [one.site for one in read_roster(federation / "server" / "roster.json")] == ["north"]
    assert files_in(federation / "server")["roster.json"] == files_in(federation / "lead")["roster.json"]
    assert sorted(path.name for path in (federation / "sites").iterdir()) == ["north", "north-kit.zip"]


def test_commands_wait_for_each_other(
    federation: Path, request_of: Callable[..., Path], add: Callable[[Path], Admitted]
) -> None:
    request = request_of("north")
    thread = threading.Thread(target=add, args=(request,))
    with locked(federation):
        thread.start()
        time.sleep(0.3)
        assert read_roster(federation / "server" / "roster.json") == ()
        assert thread.is_alive()
    thread.join(10)
    assert len(read_roster(federation / "server" / "roster.json")) == 1


def test_sites_added_at_once_are_all_in(
    federation: Path, request_of: Callable[..., Path], add: Callable[[Path], Admitted]
) -> None:
    requests = [request_of(f"site-{number}") for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, requests))
    found = {one.site for one in read_roster(federation / "server" / "roster.json")}
    assert found == {f"site-{number}" for number in range(6)}


def test_retired_keys_that_cannot_be_read_stop_admission(
    federation: Path, request_of: Callable[..., Path], add: Callable[[Path], Admitted]
) -> None:
    request = request_of("north")
    for text in ("nothing", '{"version": 1}', '{"version": 1, "fingerprints": [1]}'):
        (federation / "retired_keys.json").write_text(text)
        with pytest.raises(ConfigError, match=r"retired_keys\.json"):
            add(request)
    (federation / "retired_keys.json").unlink()
    (federation / "retired_keys.json").mkdir()
    with pytest.raises(ConfigError, match=r"retired_keys\.json': must be a readable file"):
        add(request)
    (federation / "retired_keys.json").rmdir()
    assert FederationFolder.open(federation).retired() == frozenset()
    add(request)

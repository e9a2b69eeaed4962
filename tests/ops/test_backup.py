"""Backups of site, server and lead, written while their processes run, and restored."""

import hashlib
import json
import re
import shutil
import sqlite3
import threading
import zipfile
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.services.site_state import SiteState, lock_ledger
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.release import Reason, Refused

from ..books import Books
from ..conftest import read_files, run_command, run_proposal
from ..privacy.builders import train


class Here(Books):
    @property
    def anchor(self) -> Path:
        return self.folder / "other disk/anchor.json"

    def train(self, *rounds: int, **asked: Any) -> SiteLedger:
        train(ledger := self.open(), run_proposal(**asked), *rounds)
        return ledger

    def does(self, what: str, file: Path, *args: str) -> Any:
        location = ("--kit", str(self.folder / "kit"), "--site", str(self.site_toml))
        return run_command("site", what, str(file), *args, *location)

    def write_backup(self, name: str = "backup.zip") -> Path:
        file = self.folder / name
        assert self.does("backup", file).code == 0
        return file


@pytest.fixture
def north_site(north_folder: Path) -> Here:
    return Here(north_folder)


@pytest.fixture
def file(north_site: Here) -> Path:
    north_site.train(1)
    return north_site.write_backup()


def test_backups_of_a_running_site_are_consistent(north_site: Here) -> None:
    north_site.train(1)
    training_ended = threading.Event()

    def train_rounds() -> None:
        for number in range(30):
            ledger = north_site.train(run=f"run {number}")
            ledger.record_refusal(Refused(Reason.MAX_RANK), run="r", round=1, request=f"{number}")
        training_ended.set()

    working, backups_seen = threading.Thread(target=train_rounds), []
    with lock_ledger(north_site.ledger):
        working.start()
        while not training_ended.is_set():
            copy = north_site.folder / "copy.db"
            with zipfile.ZipFile(north_site.write_backup(f"backup-{len(backups_seen)}.zip")) as archive:
                copy.write_bytes(archive.read("ledger.db"))
                assert "site_key.pem" not in " ".join(archive.namelist())
            backups_seen.append(len(verify(copy).events))
        working.join()
    assert len(set(backups_seen)) > 1, "some backups must be made between events"
    assert backups_seen == sorted(backups_seen)
    assert (north_site.folder / "backup-0.zip").stat().st_mode & 0o777 == 0o600


def test_restore_charges_rounds_trained_after_the_backup(north_site: Here) -> None:
    state, adapter_file = SiteState.in_kit(north_site.folder / "kit"), north_site.folder / "kit/adapters/r/adapter.bin"
    adapter_file.parent.mkdir(parents=True)
    adapter_file.write_bytes(b"kept")
    state.set_paused(True)
    north_site.train(1)
    file = north_site.write_backup()
    spent = north_site.train(2, 3).history.epsilon()
    north_site.ledger.unlink()
    shutil.rmtree(adapter_file.parents[1])
    state.set_paused(False)
    assert "Charged now, as one sum" in north_site.does("restore", file).printed
    ledger = north_site.train()
    assert ledger.history.epsilon() == pytest.approx(spent)
    assert ledger.history.charged_rounds("r") == 3
    assert adapter_file.read_bytes() == b"kept"
    assert state.paused_file.exists(), "a paused site must stay paused"
    with pytest.raises(Refused, match="run_ended"):
        north_site.train(4)
    north_site.train(1, run="another")
    # A second restore changes nothing: the ledger is intact and contains everything in the backup.
    before = north_site.ledger.read_bytes()
    assert "is intact and was not replaced" in north_site.does("restore", file).printed
    assert north_site.ledger.read_bytes() == before


def test_restore_is_refused_for_a_running_site_or_without_an_anchor(
    north_site: Here, file: Path, site_policy: Any
) -> None:
    north_site.ledger.unlink()
    with lock_ledger(north_site.ledger):
        assert "is already in use" in north_site.does("restore", file).failed()
    moved_anchor = north_site.anchor.rename(north_site.folder / "elsewhere.json")
    write_policy(site_policy("north"), north_site.site_toml)
    assert "--anchor" in north_site.does("restore", file).failed()
    assert not north_site.ledger.exists()
    assert north_site.does("restore", file, "--anchor", str(moved_anchor)).code == 0
    north_site.train(2)


def roll_back_ledger_and_anchor(site: Here, *rounds: int) -> tuple[bytes, bytes]:
    """Roll ledger and anchor back together, so that only a lead's receipt reveals it; return the newest anchor."""
    older_ledger, old_anchor = site.ledger.read_bytes(), site.anchor.read_bytes()
    receipt, newest_anchor = site.train(*rounds).sign_receipt("r"), site.anchor.read_bytes()
    site.ledger.write_bytes(older_ledger)
    site.anchor.write_bytes(old_anchor)
    with pytest.raises(Refused, match="ledger_behind_receipt"):
        site.train().require_receipt(receipt)
    return older_ledger, newest_anchor


def test_backup_with_a_ledger_in_doubt_is_not_restored(north_site: Here) -> None:
    north_site.train(1)
    roll_back_ledger_and_anchor(north_site, 2)
    file = north_site.write_backup()
    north_site.ledger.unlink()
    assert "still in doubt" in north_site.does("restore", file).failed(1)
    assert not north_site.ledger.exists()


@pytest.mark.parametrize("by_hand", [True, False])
def test_doubt_survives_restoring_an_older_ledger(north_site: Here, file: Path, by_hand: bool) -> None:
    """A snapshot restores ledger and anchor, a lead's receipt reveals it, and then a backup is restored."""
    older_ledger, newest_anchor = roll_back_ledger_and_anchor(north_site, 2, 3, 4)
    north_site.ledger.write_bytes(older_ledger if by_hand else b"damaged" * 1000)
    by_policy = partial(run_command, "ledger", "restore", "--policy", str(north_site.site_toml))
    restore = by_policy if by_hand else partial(north_site.does, "restore", file)
    assert "still in doubt" in restore().failed(1)
    if by_hand:
        with pytest.raises(Refused, match="ledger_behind_receipt"):
            north_site.train(1, run="another")
    (north_site.folder / "found.json").write_bytes(newest_anchor)
    assert restore("--anchor", str(north_site.folder / "found.json")).code == 0
    assert north_site.train(1, run="another").history.charged_rounds("r") == 4


def test_restored_policy_reports_denied_runs_and_the_lifetime_cap(north_site: Here) -> None:
    north_site.train(1)
    file, site_toml, first = north_site.write_backup(), north_site.site_toml, north_site.site_toml.read_bytes()
    north_site.edit(budget={"max_epsilon": 2.5})
    north_site.train().deny(run_proposal(run="denied"), "no")
    north_site.ledger.unlink()
    site_toml.unlink()
    restore = partial(north_site.does, "restore", file, "--anchor", str(north_site.anchor))
    assert "(lifetime cap: at most 2.5)" in restore().printed
    assert site_toml.read_bytes() == first
    with pytest.raises(Refused, match="denied"):
        north_site.train(1, run="denied")
    spent = run_command("ledger", "spent", str(north_site.folder)).out
    assert "then at most 2.5" in spent, "the ledger must remember that the cap was lower"
    assert "site.toml is not the policy" not in restore().out, "the policy must now match"
    # If only the policy is lost, its ledger has it.
    north_site.edit(recorded=True, budget={"max_epsilon": 1.5})
    site_toml.unlink()
    output = restore().out
    assert "is intact and was not replaced" in output
    assert "(lifetime cap: at most 1.5)" in output


@pytest.mark.parametrize("lost", [True, False])
def test_restore_moves_a_damaged_ledger_and_its_journal_aside(north_site: Here, file: Path, lost: bool) -> None:
    if lost:  # SQLite would apply the journal to a new ledger of this name
        north_site.ledger.unlink()
        (north_site.folder / "ledger.db-journal").write_bytes(b"of the lost one")
    else:
        north_site.ledger.write_bytes(b"damaged" * 1000)
    assert north_site.does("backup", other_backup := north_site.folder / "other.zip").code == (2 if lost else 1)
    assert not other_backup.exists()
    assert north_site.does("restore", file).code == 0
    north_site.train(2)
    set_aside = {path.name.partition(".damaged-")[2][15:] for path in north_site.folder.glob("ledger.db.damaged-*")}
    assert set_aside == {"-journal" if lost else ""}


@pytest.mark.parametrize("what", ["older", "of another version"])
def test_restore_keeps_an_intact_ledger(north_site: Here, what: str) -> None:
    """Otherwise a backup would replace the ledger and lose its later charges."""
    north_site.train(1)
    older_ledger = north_site.ledger.read_bytes()
    if what == "older":
        north_site.train(2)
    file = north_site.write_backup()
    north_site.ledger.write_bytes(older_ledger)
    if what != "older":
        north_site.tamper("PRAGMA user_version = 1")
    current = north_site.ledger.read_bytes()
    remedy = "move it away" if what == "older" else "use the version of fedtune that wrote the ledger"
    assert remedy in north_site.does("restore", file).failed()
    assert north_site.ledger.read_bytes() == current


def test_restore_on_a_new_machine_requires_the_site_key(north_site: Here, file: Path, tmp_path: Path) -> None:
    new = replace(north_site, folder=tmp_path / "new machine")
    north_site.ledger.unlink()
    new.folder.mkdir()
    assert new.does("restore", file).code == 2
    assert not new.ledger.exists()
    shutil.copy(north_site.folder / "site_key.pem", new.folder)
    assert new.does("restore", file).code == 0
    assert new.train().history.charged_rounds("r") == 1
    assert run_command("site", "init", "--site", str(new.folder / "site.toml")).code == 0


def test_existing_backup_is_kept_and_tampered_backup_is_refused(north_site: Here, file: Path) -> None:
    assert "already exists" in north_site.does("backup", file).failed()
    north_site.ledger.unlink()
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    listed, nothing = json.loads(held["backup.json"]), hashlib.sha256().hexdigest()
    for name, changed in {
        "content": {**held, "site.toml": held["site.toml"] + b"#"},
        "missing": {name: data for name, data in held.items() if name != "ledger.db"},
        "outside": {**held, "../x": b"", "backup.json": json.dumps({**listed, "sha256": {"../x": nothing}}).encode()},
        "another's": {**held, "backup.json": json.dumps({**listed, "kind": "server"}).encode()},
        "no list": {name: data for name, data in held.items() if name != "backup.json"},
    }.items():
        with zipfile.ZipFile(north_site.folder / "changed.zip", "w") as archive:
            for entry, data in changed.items():
                archive.writestr(entry, data)
        assert north_site.does("restore", north_site.folder / "changed.zip").failed().startswith("FILE = "), name
        assert not north_site.ledger.exists(), name
    assert north_site.does("restore", north_site.site_toml).code == 2


def forge(file: Path, key: str, value: str) -> Path:
    """Write a copy of a backup whose policy has another value, with a manifest that matches."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(forged := file.with_name("forged.zip"), "w") as new:
        policy, changes = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", old.read("site.toml").decode())
        assert changes == 1
        manifest = json.loads(old.read("backup.json"))
        manifest["sha256"]["site.toml"] = hashlib.sha256(policy.encode()).hexdigest()
        held = {"site.toml": policy, "backup.json": json.dumps(manifest), "ledger.db": old.read("ledger.db")}
        for name, data in held.items():
            new.writestr(name, data)
    return forged


@pytest.mark.parametrize("lost", [(), ("ledger.db",), ("site.toml", "ledger.db")], ids=str)
def test_backup_without_the_signature_of_the_site_is_refused(
    north_site: Here, file: Path, lost: tuple[str, ...]
) -> None:
    forged = forge(file, "max_epsilon", "500.0")
    for name in lost:
        (north_site.folder / name).unlink()
    before = read_files(north_site.folder)
    assert "must be a backup that this site signed" in north_site.does("restore", forged).failed()
    assert read_files(north_site.folder) == before
    assert north_site.does("restore", file).code == 0


def test_restore_never_runs_the_key_command_of_a_backup(north_site: Here, file: Path) -> None:
    marker = north_site.folder / "ran"
    north_site.site_toml.unlink()
    forged = forge(file, "key_command", f'["touch", "{marker}"]')
    assert "must not run unread" in north_site.does("restore", forged).failed()
    assert not any(path.exists() for path in (marker, north_site.site_toml))


def test_server_database_is_backed_up_during_writes(federation: Path, tmp_path: Path) -> None:
    kit, data, new = federation / "server", tmp_path / "data", tmp_path / "new"
    for folder in (data, new):
        folder.mkdir()
    with closing(sqlite3.connect(data / "server.db", isolation_level=None)) as file:
        file.executescript("PRAGMA journal_mode = WAL; CREATE TABLE messages (number INTEGER);")
        file.executescript("INSERT INTO messages VALUES (1); BEGIN IMMEDIATE; INSERT INTO messages VALUES (2);")
        backup = (str(tmp_path / "server.zip"), "--kit", str(kit), "--data")
        assert run_command("server", "backup", *backup, str(data)).printed
        file.execute("COMMIT")
    assert run_command("server", "restore", *backup, str(new)).code == 0
    with closing(sqlite3.connect(new / "server.db")) as file:
        assert file.execute("SELECT number FROM messages").fetchall() == [(1,)]
    assert "already exists" in run_command("server", "restore", *backup, str(new)).failed()


def list_modes(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if path.is_file() or any(path.iterdir()))
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in paths}


def test_federation_folder_round_trips_through_a_backup(federation: Path, north_folder: Path, tmp_path: Path) -> None:
    file, new = tmp_path / "lead.zip", tmp_path / "new"
    assert run_command("provision", "backup", str(file), "--federation", str(federation)).code == 0
    assert file.stat().st_mode & 0o777 == 0o600, "the backup contains the authority's key"
    assert run_command("provision", "restore", str(file), "--out", str(new)).code == 0
    assert read_files(new) == read_files(federation)
    inside = run_command("provision", "backup", str(federation / "backup"), "--federation", str(federation)).failed()
    assert "must be outside the federation's folder" in inside
    before = list_modes(federation)
    kept = {name: mode for name, mode in before.items() if (federation / name).is_file() or "/" not in name}
    own = dict.fromkeys(before, 0o700)  # folders of sites, whose modes depended on the umask
    assert list_modes(new) == own | kept, "the server's account must keep its access, but no key"
    Kit.read(new / "lead", kind="lead")
    assert run_command("provision", "renew-site", "north", "--federation", str(new)).code == 0
    assert "already exists" in run_command("provision", "restore", str(file), "--out", str(new)).failed()

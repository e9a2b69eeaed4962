"""Backups of site, server and lead: written beside a process that works, put back where something is missing."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.services.site_state import SiteState, serving
from fedtune.privacy.ledger.site_ledger import Ledger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_files import SiteFiles

from ..conftest import files_in
from .conftest import charge

Propose = Callable[..., Proposal]


def words(folder: Path) -> tuple[str, ...]:
    return ("--kit", str(folder / "kit"), "--site", str(folder / "site.toml"))


def train(folder: Path, proposal: Proposal, *rounds: int) -> Ledger:
    ledger = SiteFiles.of(folder / "site.toml").open()
    charge(ledger, proposal, *rounds)
    return ledger


def lose(folder: Path) -> None:
    (folder / "ledger.db").unlink()


def test_backups_beside_a_working_site_are_whole(north: Path, run_proposal: Propose, command: Any) -> None:
    train(north, run_proposal(), 1)
    ended = threading.Event()

    def work() -> None:
        for number in range(30):
            train(north, run_proposal(run=f"run {number}")).refuse(
                Refused(Reason.MAX_RANK), run="r", round=1, request=f"{number}"
            )
        ended.set()

    working = threading.Thread(target=work)
    found = []
    with serving(north / "ledger.db"):
        working.start()
        while not ended.is_set():
            file = north / f"backup-{len(found)}.zip"
            assert command("site", "backup", str(file), *words(north)).code == 0
            with zipfile.ZipFile(file) as archive:
                (north / "copy.db").write_bytes(archive.read("ledger.db"))
                assert "site_key.pem" not in " ".join(archive.namelist())
            found.append(len(verify(north / "copy.db").events))
        working.join()
    assert len(set(found)) > 1, "some were made while events came"
    assert found == sorted(found)
    assert (north / "backup-0.zip").stat().st_mode & 0o777 == 0o600


def test_what_was_charged_after_a_backup_is_charged_when_it_is_put_back(
    north: Path, run_proposal: Propose, command: Any
) -> None:
    asked, file = run_proposal(), north / "backup.zip"
    (north / "kit/adapters/r").mkdir(parents=True)
    (north / "kit/adapters/r/adapter.bin").write_bytes(b"kept")
    SiteState.of(north / "kit").set_paused(True)
    train(north, asked, 1)
    assert command("site", "backup", str(file), *words(north)).code == 0
    spent = train(north, asked, 2, 3).history.epsilon()
    lose(north)
    shutil.rmtree(north / "kit/adapters")
    SiteState.of(north / "kit").set_paused(False)
    assert "Charged now, as one sum" in command("site", "restore", str(file), *words(north)).printed
    ledger = SiteFiles.of(north / "site.toml").open()
    assert ledger.history.epsilon() == pytest.approx(spent)
    assert ledger.history.charged_rounds(asked.run) == 3
    assert (north / "kit/adapters/r/adapter.bin").read_bytes() == b"kept"
    assert SiteState.of(north / "kit").paused.exists(), "a site that was paused stays so"
    with pytest.raises(Refused, match="run_ended"):
        ledger.reserve(asked, round=4, request="4")
    train(north, run_proposal(run="another"), 1)
    # Again it changes nothing: the ledger is whole, and knows what the backup does.
    before = (north / "ledger.db").read_bytes()
    assert "is whole, and stays" in command("site", "restore", str(file), *words(north)).printed
    assert (north / "ledger.db").read_bytes() == before


def test_without_an_anchor_nothing_is_put_back(
    north: Path, run_proposal: Propose, command: Any, site_policy: Any
) -> None:
    train(north, run_proposal(), 1)
    file, anchor = north / "backup.zip", north / "other disk/anchor.json"
    assert command("site", "backup", str(file), *words(north)).code == 0
    elsewhere = anchor.rename(north / "elsewhere.json")
    write_policy(site_policy("north"), north / "site.toml")
    lose(north)
    assert "--anchor" in command("site", "restore", str(file), *words(north)).failed()
    assert not (north / "ledger.db").exists()
    assert command("site", "restore", str(file), "--anchor", str(elsewhere), *words(north)).code == 0
    train(north, run_proposal(), 2)


def test_a_backup_that_a_receipt_puts_in_doubt_is_not_put_back(
    north: Path, run_proposal: Propose, command: Any
) -> None:
    asked, file, anchor = run_proposal(), north / "backup.zip", north / "other disk/anchor.json"
    train(north, asked, 1)
    older, old_anchor = (north / "ledger.db").read_bytes(), anchor.read_bytes()
    receipt = train(north, asked, 2).receipt(asked.run)
    (north / "ledger.db").write_bytes(older)  # ledger and anchor are put back together, so that no anchor shows it
    anchor.write_bytes(old_anchor)
    with pytest.raises(Refused, match="ledger_behind_receipt"):
        train(north, asked).require_contains(receipt)
    assert command("site", "backup", str(file), *words(north)).code == 0
    lose(north)
    assert "still in doubt" in command("site", "restore", str(file), *words(north)).failed(1)
    assert not (north / "ledger.db").exists()


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_doubt_outlasts_the_ledger_that_noted_it(
    north: Path, run_proposal: Propose, command: Any, by_hand: bool
) -> None:
    """A machine's snapshot puts ledger and anchor back, a lead's receipt shows it, and then the backup is put back."""
    asked, file, anchor = run_proposal(), north / "backup.zip", north / "other disk/anchor.json"
    train(north, asked, 1)
    assert command("site", "backup", str(file), *words(north)).code == 0
    older, old_anchor = (north / "ledger.db").read_bytes(), anchor.read_bytes()
    receipt, newest = train(north, asked, 2, 3, 4).receipt(asked.run), anchor.read_bytes()
    (north / "ledger.db").write_bytes(older)
    anchor.write_bytes(old_anchor)
    with pytest.raises(Refused, match="ledger_behind_receipt"):
        train(north, asked).require_contains(receipt)
    if by_hand:
        (north / "ledger.db").write_bytes(older)
        restore = ("ledger", "restore", "--policy", str(north / "site.toml"))
    else:
        (north / "ledger.db").write_bytes(b"damaged" * 1000)
        restore = ("site", "restore", str(file), *words(north))
    assert "still in doubt" in command(*restore).failed(1)
    if by_hand:
        with pytest.raises(Refused, match="ledger_behind_receipt"):
            train(north, run_proposal(run="another"), 1)
    (north / "found.json").write_bytes(newest)
    assert command(*restore, "--anchor", str(north / "found.json")).code == 0
    assert train(north, run_proposal(run="another"), 1).history.charged_rounds(asked.run) == 4


def test_a_policy_from_a_backup_brings_no_denied_run_and_no_older_cap_back_unsaid(
    north: Path, run_proposal: Propose, command: Any
) -> None:
    site_toml, file, denied = north / "site.toml", north / "backup.zip", run_proposal(run="denied")
    train(north, run_proposal(), 1)
    assert command("site", "backup", str(file), *words(north)).code == 0
    first = site_toml.read_bytes()
    policy = SiteFiles.of(site_toml).policy
    write_policy(replace(policy, budget=replace(policy.budget, max_epsilon=2.5)), site_toml)
    SiteFiles.of(site_toml).open().deny(denied, "no")
    lose(north)
    site_toml.unlink()
    restore = ("site", "restore", str(file), "--anchor", str(north / "other disk/anchor.json"), *words(north))
    assert "(lifetime cap: at most 2.5)" in command(*restore).printed
    assert site_toml.read_bytes() == first
    with pytest.raises(Refused, match="denied"):
        train(north, denied, 1)
    spent = command("ledger", "spent", str(north)).out
    assert "then at most 2.5" in spent, "a cap that is higher again is never unseen"
    assert "site.toml is not the policy" not in command(*restore).out, "by now it is"
    # Where the policy alone is lost, its ledger knows.
    write_policy(replace(policy, budget=replace(policy.budget, max_epsilon=1.5)), site_toml)
    train(north, run_proposal())
    site_toml.unlink()
    outcome = command(*restore)
    assert ("is whole, and stays" in outcome.out, "(lifetime cap: at most 1.5)" in outcome.out) == (True, True)


@pytest.mark.parametrize("lost", [True, False])
def test_a_damaged_ledger_makes_room_and_so_does_a_journal(
    north: Path, run_proposal: Propose, command: Any, lost: bool
) -> None:
    train(north, run_proposal(), 1)
    file = north / "backup.zip"
    assert command("site", "backup", str(file), *words(north)).code == 0
    if lost:  # SQLite would apply the journal to whatever ledger takes the place
        lose(north)
        (north / "ledger.db-journal").write_bytes(b"of the lost one")
    else:
        (north / "ledger.db").write_bytes(b"damaged" * 1000)
    assert command("site", "backup", str(north / "other.zip"), *words(north)).code == (2 if lost else 1)
    assert command("site", "restore", str(file), *words(north)).code == 0
    train(north, run_proposal(), 2)
    moved = {path.name.partition(".damaged-")[2][15:] for path in north.glob("ledger.db.damaged-*")}
    assert moved == {"-journal" if lost else ""}


def test_another_ledger_is_not_replaced(north: Path, run_proposal: Propose, command: Any) -> None:
    asked, file, first = run_proposal(), north / "backup.zip", north / "first.zip"
    train(north, asked, 1)
    assert command("site", "backup", str(first), *words(north)).code == 0
    older = (north / "ledger.db").read_bytes()
    train(north, asked, 2)
    assert command("site", "backup", str(file), *words(north)).code == 0
    (north / "ledger.db").write_bytes(older)
    assert "move it away" in command("site", "restore", str(file), *words(north)).failed()
    assert (north / "ledger.db").read_bytes() == older


def test_a_ledger_of_another_version_is_not_taken_for_a_damaged_one(
    north: Path, run_proposal: Propose, command: Any
) -> None:
    """Else a backup would take its place, and what it has charged since would be forgotten."""
    train(north, run_proposal(), 1)
    assert command("site", "backup", str(north / "backup.zip"), *words(north)).code == 0
    with closing(sqlite3.connect(north / "ledger.db")) as file:
        file.execute("PRAGMA user_version = 1")
        file.commit()
    there = (north / "ledger.db").read_bytes()
    assert (
        "go on with the version of fedtune that wrote it"
        in command("site", "restore", str(north / "backup.zip"), *words(north)).failed()
    )
    assert (north / "ledger.db").read_bytes() == there


def test_a_site_that_runs_is_not_restored(north: Path, run_proposal: Propose, command: Any) -> None:
    train(north, run_proposal(), 1)
    file = north / "backup.zip"
    assert command("site", "backup", str(file), *words(north)).code == 0
    lose(north)
    with serving(north / "ledger.db"):
        outcome = command("site", "restore", str(file), *words(north))
    assert (outcome.code, "is being served" in outcome.message) == (2, True)
    assert not (north / "ledger.db").exists()


def test_on_an_empty_machine_the_key_comes_first(
    north: Path, run_proposal: Propose, command: Any, tmp_path: Path
) -> None:
    train(north, run_proposal(), 1)
    file, new = north / "backup.zip", tmp_path / "new machine"
    assert command("site", "backup", str(file), *words(north)).code == 0
    lose(north)
    new.mkdir()
    assert command("site", "restore", str(file), *words(new)).code == 2
    assert not (new / "ledger.db").exists()
    shutil.copy(north / "site_key.pem", new)
    assert command("site", "restore", str(file), *words(new)).code == 0
    assert SiteFiles.of(new / "site.toml").open().history.charged_rounds(run_proposal().run) == 1
    assert command("site", "init", "--site", str(new / "site.toml")).code == 0


def test_a_backup_replaces_no_file_and_a_changed_one_is_refused(
    north: Path, federation: Path, run_proposal: Propose, command: Any
) -> None:
    train(north, run_proposal(), 1)
    file = north / "backup.zip"
    assert command("site", "backup", str(file), *words(north)).code == 0
    assert "exists already" in command("site", "backup", str(file), *words(north)).failed()
    lose(north)
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    listed = json.loads(held["backup.json"])
    for name, changed in {
        "content": {**held, "site.toml": held["site.toml"] + b"#"},
        "missing": {name: data for name, data in held.items() if name != "ledger.db"},
        "outside": {**held, "../x": b"", "backup.json": json.dumps({**listed, "sha256": {"../x": _NOTHING}}).encode()},
        "another's": {**held, "backup.json": json.dumps({**listed, "kind": "server"}).encode()},
        "no list": {name: data for name, data in held.items() if name != "backup.json"},
    }.items():
        with zipfile.ZipFile(north / "changed.zip", "w") as archive:
            for entry, data in changed.items():
                archive.writestr(entry, data)
        outcome = command("site", "restore", str(north / "changed.zip"), *words(north))
        assert outcome.code == 2, name
        assert outcome.message.startswith("FILE = "), name
        assert not (north / "ledger.db").exists(), name
    assert command("site", "restore", str(north / "site.toml"), *words(north)).code == 2


_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes


def test_a_server_s_database_is_copied_while_it_is_written(federation: Path, command: Any, tmp_path: Path) -> None:
    kit, data, new = federation / "server", tmp_path / "data", tmp_path / "new"
    for folder in (data, new):
        folder.mkdir()
    with closing(sqlite3.connect(data / "server.db", isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("CREATE TABLE messages (number INTEGER)")
        file.execute("INSERT INTO messages VALUES (1)")
        file.execute("BEGIN IMMEDIATE")
        file.execute("INSERT INTO messages VALUES (2)")
        backup = str(tmp_path / "server.zip")
        outcome = command("server", "backup", backup, "--kit", str(kit), "--data", str(data))
        assert outcome.code == 0, outcome
        file.execute("COMMIT")
    assert command("server", "restore", backup, "--kit", str(kit), "--data", str(new)).code == 0
    with closing(sqlite3.connect(new / "server.db")) as file:
        assert file.execute("SELECT number FROM messages").fetchall() == [(1,)]
    assert "exists already" in command("server", "restore", backup, "--kit", str(kit), "--data", str(new)).failed()


def test_a_federation_s_folder_is_backed_up_whole(federation: Path, north: Path, command: Any, tmp_path: Path) -> None:
    file, new = tmp_path / "lead.zip", tmp_path / "new"
    assert command("provision", "backup", str(file), "--federation", str(federation)).code == 0
    assert file.stat().st_mode & 0o777 == 0o600, "it holds the authority's key"
    assert command("provision", "restore", str(file), "--out", str(new)).code == 0
    assert files_in(new) == files_in(federation)
    Kit.read(new / "lead", kind="lead")
    assert command("provision", "renew-site", "north", "--federation", str(new)).code == 0
    assert "exists already" in command("provision", "restore", str(file), "--out", str(new)).failed()

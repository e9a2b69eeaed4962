"""Procedures of docs/operations.md and docs/site_policy.md at a site, executed as documented."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.doctor.check import Status
from fedtune.ops.doctor.examination import Examination
from fedtune.ops.kits.certificates import read_certificate
from fedtune.ops.kits.federation_folder import FederationFolder
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.kits.members import REQUEST
from fedtune.ops.services.site_state import SiteState, lock_ledger
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.release import Refused
from fedtune.privacy.site_files import SiteFiles

from ..conftest import read_files, run_command, run_proposal
from ..privacy.builders import train
from .conftest import Desk, unpack

pytestmark = pytest.mark.nightly


def open_ledger(folder: Path, *rounds: int, **fields: Any) -> SiteLedger:
    """Open the ledger as the site's process does, after these rounds of a run."""
    files, state = SiteFiles.from_site_toml(folder / "site.toml"), SiteState.in_kit(folder / "kit")
    assert not state.left_file.exists()
    ledger = state.open_ledger(files)
    train(ledger, run_proposal(**fields), *rounds)
    return ledger


def test_connection_key_can_be_rotated_and_replaced_after_loss(desk: Desk, north_folder: Path) -> None:
    kit = north_folder / "kit"
    key = (kit / "connection_key.pem").read_bytes()
    desk.revoke("north")
    assert (
        run_command(
            "site", "init", "--site", str(north_folder / "site.toml"), "--out", str(north_folder / "new-kit")
        ).code
        == 0
    )
    renewed = desk.renew("north", north_folder / "new-kit" / REQUEST)
    (north_folder / "new-kit/connection_key.pem").replace(kit / "connection_key.pem")
    unpack(renewed.archive, kit)
    assert (kit / "connection_key.pem").read_bytes() != key
    assert Kit.read(kit, kind="site").check_certificate(datetime.now(UTC)).name == "north"
    member = desk.member("north")
    assert member.revoked is None
    assert member.x509_certificate.public_key() == read_certificate(kit / "site.pem").public_key()
    with FederationFolder.open_locked(desk.folder) as locked:
        assert len(locked.read_retired_keys()) == 1
    # Key and kit are lost and have no backup: with a new key and a renewed kit, the ledger continues.
    before = open_ledger(north_folder).history.opening.ledger
    shutil.rmtree(kit)
    assert run_command("site", "init", "--site", str(north_folder / "site.toml")).code == 0
    unpack(desk.renew("north", kit / REQUEST).archive, kit)
    Kit.read(kit, kind="site").check_certificate(datetime.now(UTC))
    assert open_ledger(north_folder).history.opening.ledger == before


def test_site_can_be_moved_to_another_machine(north_folder: Path, tmp_path: Path) -> None:
    open_ledger(north_folder, 1)
    moved = tmp_path / "another machine"
    with lock_ledger(north_folder / "ledger.db"):
        pass  # no process serves the old one
    shutil.copytree(north_folder, moved)
    (moved / "site.toml").write_text((moved / "site.toml").read_text().replace(str(north_folder), str(moved)))
    Kit.read(moved / "kit", kind="site").check_certificate(datetime.now(UTC))
    there = open_ledger(moved, 2)
    assert there.history.charged_rounds("r") == 2
    # If the old site is started by mistake, a lead's receipt from the new site reveals it.
    with pytest.raises(Refused, match="ledger_behind_receipt"):
        open_ledger(north_folder).require_receipt(there.sign_receipt("r"))


def test_doctor_changes_nothing_on_a_running_site(north_folder: Path) -> None:
    open_ledger(north_folder, 1)
    with lock_ledger(north_folder / "ledger.db"):
        before = read_files(north_folder)
        visit = Examination(kit_folder=north_folder / "kit", site_toml=north_folder / "site.toml", timeout_s=1.0)
        checks = {check.name: check for check in visit.run_checks()}
        assert checks["serving"].status is Status.OK
        after = read_files(north_folder)
    assert after.keys() - before.keys() <= {"kit/state/doctor.log"}
    assert before.items() <= after.items()


def test_site_can_return_after_leaving(north_folder: Path) -> None:
    open_ledger(north_folder, 1)
    words = ("--kit", str(north_folder / "kit"), "--site", str(north_folder / "site.toml"))
    assert run_command("site", "leave", *words).code == 0
    left_file = SiteState.in_kit(north_folder / "kit").left_file
    assert left_file.exists()
    left_file.unlink()
    assert open_ledger(north_folder).history.charged_rounds("r") == 1
    open_ledger(north_folder, 1, run="another")

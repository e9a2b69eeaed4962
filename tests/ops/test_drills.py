"""Procedures of docs/operations.md and docs/site_policy.md at a site, done as they are written there."""

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

from ..conftest import command, files_in, run_proposal
from ..privacy.builders import train
from .conftest import Desk, unpack

pytestmark = pytest.mark.nightly


def ledger_of(folder: Path, *rounds: int, **asked: Any) -> SiteLedger:
    """The ledger, as the site's process opens it, after these rounds of a run."""
    files, state = SiteFiles.from_site_toml(folder / "site.toml"), SiteState.in_kit(folder / "kit")
    assert not state.left_file.exists()
    assert files.ledger.is_file() or not state.has_served()
    opened = files.open_ledger()
    state.check_ledger(opened.history.opening.ledger)
    train(opened, run_proposal(**asked), *rounds)
    return opened


def test_connection_key_can_be_rotated_and_replaced_after_loss(desk: Desk, north: Path) -> None:
    kit = north / "kit"
    key = (kit / "connection_key.pem").read_bytes()
    desk.revoke("north")
    assert command("site", "init", "--site", str(north / "site.toml"), "--out", str(north / "new-kit")).code == 0
    renewed = desk.renew("north", north / "new-kit" / REQUEST)
    (north / "new-kit/connection_key.pem").replace(kit / "connection_key.pem")
    unpack(renewed.archive, kit)
    assert (kit / "connection_key.pem").read_bytes() != key
    assert Kit.read(kit, kind="site").check_certificate(datetime.now(UTC)).name == "north"
    member = desk.member("north")
    assert member.revoked is None
    assert member.x509_certificate.public_key() == read_certificate(kit / "site.pem").public_key()
    with FederationFolder.open_locked(desk.folder) as held:
        assert len(held.read_retired_keys()) == 1
    # Key and kit are lost, and need no backup: a new key and a renewed kit, and the ledger goes on.
    before = ledger_of(north).history.opening.ledger
    shutil.rmtree(kit)
    assert command("site", "init", "--site", str(north / "site.toml")).code == 0
    unpack(desk.renew("north", kit / REQUEST).archive, kit)
    Kit.read(kit, kind="site").check_certificate(datetime.now(UTC))
    assert ledger_of(north).history.opening.ledger == before


def test_site_can_be_moved_to_another_machine(north: Path, tmp_path: Path) -> None:
    ledger_of(north, 1)
    moved = tmp_path / "another machine"
    with lock_ledger(north / "ledger.db"):
        pass  # nobody serves the old one
    shutil.copytree(north, moved)
    (moved / "site.toml").write_text((moved / "site.toml").read_text().replace(str(north), str(moved)))
    Kit.read(moved / "kit", kind="site").check_certificate(datetime.now(UTC))
    there = ledger_of(moved, 2)
    assert there.history.charged_rounds("r") == 2
    # Started again by mistake, the old one is found as soon as a lead shows it the new one's receipt.
    with pytest.raises(Refused, match="ledger_behind_receipt"):
        ledger_of(north).require_receipt(there.sign_receipt("r"))


def test_doctor_changes_nothing_on_a_running_site(north: Path) -> None:
    ledger_of(north, 1)
    with lock_ledger(north / "ledger.db"):
        before = files_in(north)
        visit = Examination(kit_folder=north / "kit", site_toml=north / "site.toml", timeout_s=1.0)
        checks = {check.name: check for check in visit.run_checks()}
        assert checks["serving"].status is Status.OK
        after = files_in(north)
    assert after.keys() - before.keys() <= {"kit/state/doctor.log"}
    assert before.items() <= after.items()


def test_site_can_return_after_leaving(north: Path) -> None:
    ledger_of(north, 1)
    words = ("--kit", str(north / "kit"), "--site", str(north / "site.toml"))
    assert command("site", "leave", *words).code == 0
    left = SiteState.in_kit(north / "kit").left_file
    assert left.exists()
    left.unlink()
    assert ledger_of(north).history.charged_rounds("r") == 1
    ledger_of(north, 1, run="another")

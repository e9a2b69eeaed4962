"""What fedtune 0.1.0 left behind is opened in place: kits, policy, ledger, anchor and receipts."""

from __future__ import annotations

import json
import shutil
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedtune.deploy.doctor.check import Status
from fedtune.deploy.doctor.examination import Visit, examine
from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.federation_folder import FederationFolder
from fedtune.deploy.kits.kit_file import Kit
from fedtune.deploy.kits.members import REQUEST, JoinRequest, Roster, site_init
from fedtune.deploy.services.lead_and_server import ServerDesk
from fedtune.deploy.services.site_state import SiteState
from fedtune.privacy.ledger.site_ledger import Reservation
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Refused, receipt_from_json
from fedtune.privacy.site_files import SiteFiles

LEFT = Path(__file__).parent / "fixtures" / "fedtune-0.1.0"


def copied(folder: Path) -> Path:
    """A copy, with the modes that git does not keep."""
    shutil.copytree(LEFT, folder)
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder


@pytest.fixture
def left(tmp_path: Path) -> Path:
    return copied(tmp_path / "left")


@pytest.fixture
def files(left: Path) -> SiteFiles:
    return SiteFiles.of(left / "north/site.toml")


def proposal(left: Path, **changes: object) -> Proposal:
    fields = json.loads((left / "north/proposal.json").read_text())
    return Proposal.from_json({**fields, **changes})


def test_its_kits_are_used(left: Path) -> None:
    places = {"server": "federation/server", "lead": "federation/lead", "site": "north/kit"}
    for kind, place in places.items():
        kit = Kit.read(left / place, kind=kind)
        assert kit.check_certificate(datetime.now(UTC)).days_left(datetime.now(UTC)) > 30_000
    assert Kit.read(left / "north/kit", kind="site").site_files(left / "north/site.toml").policy.site == "north"


def test_its_federation_takes_sites_and_renews_them(left: Path) -> None:
    folder = left / "federation"
    assert JoinRequest.read(left / "north/kit" / REQUEST).site == "north"
    (folder / "sites").mkdir()
    now = datetime.now(UTC).replace(microsecond=0)
    provisioning.renew_site(folder, "north", days=None, now=now)
    south = left / "south"
    south.mkdir()
    text = (left / "north/site.toml").read_text().replace('site = "north"', 'site = "south"')
    (south / "site.toml").write_text(text)
    provisioning.ask_to_add(
        folder, request=site_init(south / "site.toml", out=None) / REQUEST, days=None, now=now
    ).let_in()
    with FederationFolder.held(folder) as held:
        assert [member.site for member in held.members] == ["north", "south"]
        held.roster.check_signed(held.lead_key)


def test_its_roster_is_served_and_a_signed_one_takes_its_place(left: Path, tmp_path: Path) -> None:
    kit = Kit.read(left / "federation/server", kind="server")
    before = kit.roster.read_bytes()
    assert Roster.of(before).number == 0
    desk = ServerDesk(kit, tmp_path)
    assert [one.site for one in desk.look().sites] == ["north"]
    provisioning.revoke_site(left / "federation", "north", now=datetime.now(UTC))
    assert [one.revoked is None for one in desk.look().sites] == [False]
    kit.roster.write_bytes(before)
    assert [one.revoked is None for one in desk.look().sites] == [False], "the older one lets nobody in again"


def test_its_ledger_is_whole_and_goes_on(left: Path, files: SiteFiles) -> None:
    before = files.verified()
    assert before is not None
    assert before.rollback_excluded
    assert before.history.charged_rounds("first") == 2
    ledger = files.open()
    SiteState.of(left / "north/kit").check_ledger(ledger.history.opened.ledger)
    # The answer that its site gave last is given again, and not charged again.
    asked = proposal(left)
    assert ledger.reserve(asked, round=2, request="first 2") == b"reply 2"
    assert isinstance(ledger.reserve(asked, round=3, request="first 3"), Reservation)
    again = proposal(left, run="second")
    assert isinstance(ledger.reserve(again, round=1, request="second 1"), Reservation)
    after = verify(files.ledger, anchor=ledger.head())
    assert after.events[: len(before.events)] == before.events
    assert (after.history.charged_rounds("first"), after.history.charged_rounds("second")) == (3, 1)
    # What was spent before counts.
    with pytest.raises(Refused) as caught:
        deque(ledger.reserve(proposal(left, run=f"run {n}"), round=1, request=f"{n}") for n in range(3, 100))
    assert caught.value.reason in (Reason.MAX_EPSILON, Reason.MAX_EPSILON_PER_PERIOD)


def test_its_receipt_is_believed(left: Path, files: SiteFiles) -> None:
    receipt = receipt_from_json(json.loads((left / "north/receipt.json").read_text()))
    assert receipt.is_signed()
    ledger = files.open()
    assert ledger.history.opened.site_key == receipt.site_key
    ledger.require_contains(receipt)
    assert ledger.receipt("first").charged_rounds == receipt.charged_rounds


def test_the_doctor_says_what_is_to_be_changed(left: Path) -> None:
    visit = Visit(kit=left / "north/kit", site_toml=left / "north/site.toml", timeout_s=1.0)
    checks = {check.name: check for check in examine(visit)}
    for name in ("policy", "kit", "certificate", "ledger", "site key", "budget", "data discharge_letters", "lead"):
        assert checks[name].status in (Status.OK, Status.WARNING), checks[name]
    assert checks["base model minilm"].status is Status.FAILED

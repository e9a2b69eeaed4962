"""What a process that runs takes from its kit: a newer roster that the lead signed, and a new certificate."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.ops.kits import provisioning
from fedtune.ops.kits.federation_folder import FederationFolder
from fedtune.ops.kits.kit_file import Kit, KitCertificate
from fedtune.ops.kits.members import Roster
from fedtune.ops.services.lead_and_server import KitRoster, members
from fedtune.privacy.keys import SigningKey
from fedtune.spec import ConfigError

from .conftest import Desk


def roster(desk: Desk) -> Roster:
    return FederationFolder.open(desk.folder).roster


def lead_key(desk: Desk) -> SigningKey:
    return SigningKey.load(desk.folder / "lead/lead_key.pem")


@pytest.fixture
def kit(desk: Desk) -> Kit:
    return Kit.read(desk.folder / "server", kind="server")


def test_every_change_makes_a_newer_roster_that_the_lead_signed(desk: Desk) -> None:
    seen = [roster(desk)]
    desk.join("north")
    seen.append(roster(desk))
    desk.revoke("north")
    seen.append(roster(desk))
    numbers = [one.number for one in seen]
    assert numbers == sorted(set(numbers))
    for one in seen:
        one.check_signed(lead_key(desk).public)


def test_a_folder_from_a_backup_uses_no_number_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (desk.folder / "server/roster.json").read_bytes()
    desk.join("north")
    lost = roster(desk).number
    (desk.folder / "server/roster.json").write_bytes(kept)
    monkeypatch.setattr("fedtune.ops.kits.federation_folder.time.time", lambda: lost + 60.0)
    desk.join("south")
    assert roster(desk).number > lost


def test_a_server_takes_the_lead_s_newer_roster_alone(desk: Desk, kit: Kit, tmp_path: Path) -> None:
    served = KitRoster(kit)
    first = served.look()
    desk.join("north")
    assert [one.site for one in served.look().sites] == ["north"]
    newer = roster(desk)
    forged = replace(newer, number=newer.number + 1)
    for wrong, why in (
        (forged, r"roster\.json: roster\.signature = .*must be signed by the federation's lead"),
        (forged.signed(SigningKey.load_or_make(tmp_path / "stranger.pem")), "must be signed by the federation's lead"),
        (replace(forged, federation="other").signed(lead_key(desk)), "must be 'cardiology-2026'"),
        (first, rf"roster\.number = {first.number}: must be higher than {newer.number}"),
        (replace(newer, sites=()).signed(lead_key(desk)), "must be higher than"),
    ):
        kit.roster.write_bytes(wrong.to_bytes())
        for _ in range(2):
            with pytest.raises(ConfigError, match=why):
                served.look()
    kit.roster.write_text("{")
    with pytest.raises(ConfigError, match="must be JSON"):  # in the middle of being copied
        served.look()
    kit.roster.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        served.look()
    kit.roster.write_bytes(newer.to_bytes())
    assert served.look() == newer


def test_a_key_that_was_revoked_is_not_back_while_the_server_runs(desk: Desk, kit: Kit) -> None:
    served = KitRoster(kit)
    desk.join("north")
    joined = served.look()
    desk.revoke("north")
    revoked = served.look()
    dropped = replace(joined, sites=(), number=revoked.number + 1).signed(lead_key(desk))
    returned = replace(joined, number=revoked.number + 2).signed(lead_key(desk))
    for before in (revoked, dropped):
        kit.roster.write_bytes(before.to_bytes())
        assert served.look() == before
        kit.roster.write_bytes(returned.to_bytes())
        with pytest.raises(ConfigError, match=r"roster\.sites = \['north'\]: must stay revoked"):
            served.look()
    # With a new key the site may come back.
    desk.renew("north", desk.request("north", kit="another"))
    back = replace(roster(desk), number=revoked.number + 3).signed(lead_key(desk))
    kit.roster.write_bytes(back.to_bytes())
    assert served.look().sites[0].revoked is None


def test_a_lead_asks_nobody_by_a_roster_that_somebody_changed(desk: Desk) -> None:
    desk.join("north")
    desk.revoke("north")
    kit = Kit.read(desk.folder / "lead", kind="lead")
    fields = json.loads(kit.roster.read_bytes())
    kit.roster.write_text(json.dumps({**fields, "sites": [{**fields["sites"][0], "revoked": None}]}))
    with pytest.raises(ConfigError, match="must be signed by the federation's lead"):
        members(kit, ("north",))


def test_a_certificate_put_into_a_kit_is_used_once_it_is_whole(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    kit = Kit.read(desk.join("north"), kind="site")
    certificate = KitCertificate(kit)
    before = certificate.certificate
    done = provisioning.renew_site(desk.folder, "north", days=400, now=desk.now)
    other = Kit.read(desk.join("south"), kind="site").certificate
    for wrong in (done.member.certificate[:200].encode(), b"", other.read_bytes()):
        kit.certificate.write_bytes(wrong)
        assert not certificate.is_new()
        assert not certificate.is_new()
        assert certificate.certificate == before
    assert caplog.text.count("the kit's certificate is not used") == 2, "each reason is said once"
    kit.certificate.unlink()
    assert not certificate.is_new()
    kit.certificate.write_text(done.member.certificate)
    assert certificate.is_new()
    assert not certificate.is_new()
    assert (certificate.certificate.not_after - before.not_after).days == 35

"""Rosters and renewals that come by way of the server: who signs what, and what is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.doctor import site_checks
from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.certificates import make_key, read_certificate
from fedtune.deploy.kits.federation_folder import FederationFolder
from fedtune.deploy.kits.kit_file import Kit
from fedtune.deploy.kits.members import Roster
from fedtune.deploy.kits.renewal import CertificateKeeper, RenewalRequest, RosterBook, is_due, issued_to
from fedtune.deploy.services.lead_and_server import LeadService, ServerDesk, exchange
from fedtune.deploy.services.site_state import SiteState
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.site_policy import Policy
from fedtune.spec import ConfigError, RunError

from .conftest import Desk, Killed, killed_at, new_federation, of_odd_version

YEAR = timedelta(days=365)


@pytest.fixture(scope="module")
def now() -> datetime:
    """When the federation was made: so long ago that a certificate of a day may be about to end."""
    return datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, now: datetime) -> Path:
    return new_federation(tmp_path_factory.mktemp("long ago"), now=now)


@pytest.fixture
def north(desk: Desk) -> Kit:
    return Kit.read(desk.join("north"), kind="site")


def book(desk: Desk, path: Path) -> RosterBook:
    return RosterBook.of(Kit.read(desk.folder / "server", kind="server"), path)


def roster(desk: Desk) -> Roster:
    return FederationFolder.open(desk.folder).roster


def test_a_certificate_is_due_in_the_last_third_of_its_time(north: Kit, desk: Desk) -> None:
    certificate = north.check_certificate(desk.now)
    begun, life = certificate.not_before, certificate.not_after - certificate.not_before
    assert not is_due(certificate, begun + 2 / 3 * life - timedelta(seconds=2))
    assert is_due(certificate, begun + 2 / 3 * life + timedelta(seconds=2))


def test_every_change_makes_a_newer_roster_that_the_lead_signed(desk: Desk) -> None:
    lead, seen = FederationFolder.open(desk.folder).lead_key, [roster(desk)]
    desk.join("north")
    seen.append(roster(desk))
    provisioning.renew(desk.folder, "server", days=None, now=desk.now)
    seen.append(roster(desk))
    desk.revoke("north")
    seen.append(roster(desk))
    numbers = [one.number for one in seen]
    assert numbers == sorted(set(numbers))
    for one in seen:
        one.check_signed(lead)
    assert seen[-1].certificate_of("server") == (desk.folder / "server/server.pem").read_text()
    assert seen[2].certificate_of("north") is not None
    assert seen[-1].certificate_of("north") is None, "a site that was revoked has none"


def test_a_folder_from_a_backup_uses_no_number_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (desk.folder / "server/roster.json").read_bytes()
    desk.join("north")
    lost = roster(desk).number
    (desk.folder / "server/roster.json").write_bytes(kept)
    monkeypatch.setattr("fedtune.deploy.kits.federation_folder.time.time", lambda: lost + 60.0)
    desk.join("south")
    assert roster(desk).number > lost


def test_only_the_lead_s_newer_roster_is_taken(desk: Desk, tmp_path: Path) -> None:
    own = book(desk, tmp_path / "seen.json")
    first = roster(desk)
    own.take(first.to_bytes())
    desk.join("north")
    newer = roster(desk)
    forged = replace(newer, number=newer.number + 1)
    stranger = forged.signed(SigningKey.load_or_make(tmp_path / "stranger.pem"))
    lead = SigningKey.load(desk.folder / "lead/lead_key.pem")
    for wrong, why in (
        (forged, "must be signed by the federation's lead"),
        (stranger, "must be signed by the federation's lead"),
        (replace(first, number=0, signature=""), "must be signed by the federation's lead"),
        (replace(newer, federation="other").signed(lead), "must be 'cardiology-2026'"),
        (replace(newer, number=first.number).signed(lead), "must be higher than"),
        (replace(newer, number=first.number - 1).signed(lead), "must be higher than"),
    ):
        with pytest.raises(ConfigError, match=why):
            own.take(wrong.to_bytes())
        assert own.newest() == first
    assert own.take(newer.to_bytes()) == own.take(newer.to_bytes()) == own.newest() == newer
    with pytest.raises(ConfigError, match="must be higher than"):
        own.take(first.to_bytes())


def test_a_newest_roster_that_somebody_changed_is_not_believed(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    desk.revoke("north")
    seen = book(desk, tmp_path / "seen.json")
    seen.take(roster(desk).to_bytes())
    fields = json.loads(seen.path.read_bytes())
    again = {**fields, "sites": [{**fields["sites"][0], "revoked": None}]}
    for changed in (again, {**fields, "number": fields["number"] + 1}, {**fields, "signature": ""}, "no roster"):
        seen.path.write_text(json.dumps(changed))
        for call in (seen.newest, lambda: seen.take(roster(desk).to_bytes())):
            with pytest.raises(
                ConfigError, match=r"newest roster = '.*seen\.json': must be .*\. Move the file away, and"
            ):
                call()
    seen.path.unlink()
    assert seen.take(roster(desk).to_bytes()) == seen.newest()


def test_the_server_keeps_the_newest_whatever_is_copied_into_its_kit(desk: Desk, tmp_path: Path) -> None:
    kit = Kit.read(desk.folder / "server", kind="server")
    old = kit.roster.read_bytes()
    desk.join("north")
    desk.revoke("north")
    assert [one.revoked is None for one in ServerDesk(kit, tmp_path).look().sites] == [False]
    kit.roster.write_bytes(old)
    for served in (ServerDesk(kit, tmp_path), ServerDesk(kit, tmp_path)):  # it starts again, too
        assert [one.site for one in served.look().sites] == ["north"]
    kit.roster.write_text(json.dumps({**json.loads(old), "sites": [], "number": 1 << 40}))
    with pytest.raises(ConfigError, match="must be signed by the federation's lead"):
        ServerDesk(kit, tmp_path).look()


def asked(desk: Desk, kit: Kit, *, later: timedelta) -> provisioning.Answered:
    return provisioning.answer_renewals(desk.folder, [RenewalRequest.make(kit)], now=desk.now + later)


def test_who_holds_the_key_that_was_compared_gets_a_certificate_for_it(desk: Desk, north: Kit) -> None:
    later = timedelta(days=300)
    before = read_certificate(north.certificate)
    answered = asked(desk, north, later=later)
    assert answered == provisioning.Answered(renewed={"north": desk.now + later + YEAR}, refused={})
    issued = issued_to(north, roster(desk), now=desk.now + later)
    assert issued is not None
    north.certificate.write_bytes(issued)
    assert north.check_certificate(desk.now + later).not_after == desk.now + later + YEAR
    assert read_certificate(north.certificate).public_key() == before.public_key()
    assert issued_to(north, roster(desk), now=desk.now + later) is None, "it has it"


@pytest.mark.parametrize("kind", ["server", "lead"])
def test_server_and_lead_are_renewed_the_same_way(desk: Desk, kind: str, tmp_path: Path) -> None:
    kit = Kit.read(desk.folder / kind, kind=kind)
    request, old = RenewalRequest.make(kit), kit.certificate.read_bytes()
    later = desk.now + timedelta(days=300)
    answered = provisioning.answer_renewals(desk.folder, [request], now=later)
    assert answered.renewed == {kind: later + YEAR}
    kit.certificate.write_bytes(old)  # the machine that asked is another one than that which signs
    issued = issued_to(kit, roster(desk), now=later)
    assert issued is not None
    kit.certificate.write_bytes(issued)
    assert kit.check_certificate(later).not_after == later + YEAR


@pytest.mark.parametrize("kind", ["server", "lead"])
def test_a_renewal_that_is_killed_anywhere_needs_no_hand(
    desk: Desk, kind: Literal["server", "lead"], tmp_path: Path
) -> None:
    shutil.copytree(desk.folder, tmp_path / "kept")
    later, step, done = desk.now + timedelta(days=300), 0, False
    while not done:
        shutil.rmtree(desk.folder)
        shutil.copytree(tmp_path / "kept", desk.folder)
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        kit = Kit.read(shutil.copytree(desk.folder / kind, tmp_path / "elsewhere"), kind=kind)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(step, patch)
            try:
                provisioning.renew(desk.folder, kind, days=None, now=later)
            except Killed:
                pass
            else:
                done = True
        had_one = issued_to(kit, roster(desk), now=later)
        answered = asked(desk, kit, later=timedelta(days=300))
        assert answered.renewed.keys() == (set() if had_one else {kind}), (step, answered.refused)
        issued = issued_to(kit, roster(desk), now=later)
        assert issued is not None, step
        assert roster(desk).certificate_of(kind) == (desk.folder / kind / f"{kind}.pem").read_text() == issued.decode()
        step += 1
    assert step > 10


def test_the_roster_says_which_certificate_a_server_has(desk: Desk, tmp_path: Path) -> None:
    """As for one whose new certificate lies in the federation's folder alone."""
    kit = Kit.read(shutil.copytree(desk.folder / "server", tmp_path / "elsewhere"), kind="server")
    before = roster(desk)
    provisioning.renew(desk.folder, "server", days=None, now=desk.now + timedelta(days=1))
    for name in ("server", "lead"):
        (desk.folder / name / "roster.json").write_bytes(before.to_bytes())
    assert asked(desk, kit, later=timedelta(days=300)).renewed.keys() == {"server"}


def test_nobody_else_gets_one(desk: Desk, north: Kit) -> None:
    south, late = Kit.read(desk.join("south"), kind="site"), timedelta(days=300)
    request = RenewalRequest.of(RenewalRequest.make(north))

    def refused(wrong: RenewalRequest, *, later: timedelta = late) -> str:
        before = roster(desk)
        data = json.dumps(asdict(wrong)).encode()
        answered = provisioning.answer_renewals(desk.folder, [data], now=desk.now + later)
        assert answered.renewed == {}
        assert roster(desk) == before
        (why,) = answered.refused.values()
        return why

    def signed(wrong: RenewalRequest, key: ec.EllipticCurvePrivateKey) -> RenewalRequest:
        return replace(wrong, signature=key.sign(wrong._signed_bytes(), ec.ECDSA(hashes.SHA384())).hex())

    others = RenewalRequest.of(RenewalRequest.make(south))
    for wrong in (
        signed(request, make_key()),
        replace(request, signature=others.signature),
        replace(request, signature=""),
        replace(request, signature="no hex"),
    ):
        assert "must be signed with the key of the certificate that it replaces" in refused(wrong)
    assert "must be for the certificate that its holder has now" in refused(replace(others, name="north"))
    assert "must be for the certificate" in refused(replace(request, federation="another"))
    assert "before the last third" in refused(request, later=timedelta(days=200))
    assert "must be a site of the federation" in refused(replace(request, name="west"))
    assert provisioning.answer_renewals(desk.folder, [b"{", b""], now=desk.now).renewed == {}
    asked(desk, north, later=late)
    assert "must be for the certificate that its holder has now" in refused(request), "an old request is no use"
    desk.revoke("south")
    assert "was revoked on" in refused(others)


def test_without_the_authority_s_key_nothing_is_issued(desk: Desk, north: Kit) -> None:
    (desk.folder / "authority/ca_key.pem").rename(desk.folder / "elsewhere.pem")
    before = roster(desk)
    answered = asked(desk, north, later=timedelta(days=300))
    assert "bring the authority's folder back" in answered.refused["north"]
    assert roster(desk) == before


class Served:
    """A server's desk as a site reaches it, without the network between them."""

    def __init__(self, desk: ServerDesk, name: str) -> None:
        self._desk, self._name, self.is_away = desk, name, False
        self.asked = 0

    def roster(self) -> bytes:
        return self._desk.roster()

    def ask(self, request: bytes) -> int:
        self.asked += 1
        if self.is_away:
            raise RunError("no connection to the server")
        return self._desk.ask(self._name, request)

    def send_roster(self, data: bytes) -> None:
        self._desk.take_roster(data)


@pytest.fixture
def served(desk: Desk, tmp_path: Path) -> Served:
    (tmp_path / "data").mkdir()
    return Served(ServerDesk(Kit.read(desk.folder / "server", kind="server"), tmp_path / "data"), "north")


def nearly_over(desk: Desk, name: str, kit: Kit) -> datetime:
    """Give a site a certificate that ends in ten minutes; when."""
    now = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1, minutes=-10)
    done = provisioning.renew_site(desk.folder, name, days=1, now=now)
    kit.certificate.write_text(done.member.certificate)
    return now + timedelta(days=1)


def test_a_running_site_asks_and_takes_what_the_lead_signed(
    desk: Desk, north: Kit, served: Served, tmp_path: Path
) -> None:
    ends = nearly_over(desk, "north", north)
    keeper = CertificateKeeper(north, book=book(desk, tmp_path / "seen.json"), desk=served)  # type: ignore[arg-type]
    assert not keeper.look()
    assert keeper.certificate.not_after == ends
    assert not keeper.look()
    assert served.asked == 1, "it asks again in half a minute"
    answered = provisioning.answer_renewals(desk.folder, served._desk.requests(), now=datetime.now(UTC))
    assert [*answered.renewed] == ["north"]
    keeper._next = 0.0
    assert keeper.look()
    assert keeper.certificate.not_after > ends + timedelta(days=360)
    keeper._next = 0.0
    assert not keeper.look()
    assert served.asked == 2, "it asks no more"


def test_without_a_person_s_word_nothing_is_asked(desk: Desk, north: Kit, tmp_path: Path) -> None:
    nearly_over(desk, "north", north)
    keeper = CertificateKeeper(north, book=book(desk, tmp_path / "seen.json"), desk=None)
    assert not keeper.look()
    assert not (tmp_path / "seen.json").exists()


def test_a_kit_that_is_being_unzipped_is_waited_for(
    desk: Desk, north: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = CertificateKeeper(north, book=book(desk, tmp_path / "seen.json"), desk=None)
    before = keeper.certificate
    done = desk.renew("north")
    north.certificate.write_text(done.member.certificate[:200])
    assert not keeper.look()
    assert keeper.certificate == before
    assert "the kit's certificate is not used" in caplog.text
    other = Kit.read(desk.join("south"), kind="site")
    north.certificate.write_bytes(other.certificate.read_bytes())
    assert not keeper.look()
    north.certificate.write_text(done.member.certificate)
    assert keeper.look() == (done.member.issued.not_valid_after_utc != before.not_after)


def test_a_server_that_is_away_is_asked_again(desk: Desk, north: Kit, served: Served, tmp_path: Path) -> None:
    nearly_over(desk, "north", north)
    served.is_away = True
    keeper = CertificateKeeper(north, book=book(desk, tmp_path / "seen.json"), desk=served)  # type: ignore[arg-type]
    assert not keeper.look()
    assert not served._desk.requests()
    served.is_away, keeper._next = False, 0.0
    assert not keeper.look()
    assert len(served._desk.requests()) == 1


class Hostile:
    """What a server's administrator may answer; each round's answers are the next ones."""

    def __init__(self, *rosters: Callable[[], bytes]) -> None:
        self._rosters = iter(rosters)

    def ask(self, request: bytes) -> int:
        return 1 << 60

    def roster(self) -> bytes:
        return next(self._rosters)()


def with_odd_certificate(honest: Roster) -> bytes:
    fields = json.loads(honest.to_bytes())
    fields["sites"][0]["certificate"] = of_odd_version(fields["sites"][0]["certificate"])
    return json.dumps(fields).encode()


class OfNobodysKind(Exception):
    """What no code expects."""


def test_nothing_that_a_server_answers_ends_a_site(
    desk: Desk, north: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nearly_over(desk, "north", north)
    odd = with_odd_certificate(roster(desk))

    def raises() -> bytes:
        raise OfNobodysKind("its text")

    hostile = Hostile(lambda: odd, raises, lambda: b"\xff", lambda: roster(desk).to_bytes())
    keeper = CertificateKeeper(north, book=book(desk, tmp_path / "seen.json"), desk=hostile)
    for _ in range(3):
        keeper._next = 0.0
        assert not keeper.look()
        assert not (tmp_path / "seen.json").exists()
    assert "no new certificate yet: OfNobodysKind" in caplog.text
    assert "its text" not in caplog.text
    keeper._next = 0.0
    desk.renew("north")
    assert keeper.look()


def test_a_roster_with_an_odd_certificate_is_no_roster(desk: Desk, north: Kit, tmp_path: Path) -> None:
    honest = roster(desk)
    odd = with_odd_certificate(honest)
    with pytest.raises(ConfigError, match="certificate = 'north': must be one in PEM form"):
        Roster.of(odd)
    with pytest.raises(ConfigError, match="certificate = 'north'"):
        exchange(Hostile(lambda: odd), book(desk, tmp_path / "seen.json"))  # type: ignore[arg-type]
    server = of_odd_version(north.certificate.read_text())
    with pytest.raises(ConfigError, match="must have a certificate in PEM form"):
        issued_to(Kit.read(desk.folder / "server", kind="server"), replace(honest, server=server), now=desk.now)


def test_a_roster_whose_certificate_is_for_another_key_changes_nothing(desk: Desk, north: Kit) -> None:
    nearly_over(desk, "north", north)
    desk.renew("north", desk.request("north", kit="another"))
    assert issued_to(north, roster(desk), now=datetime.now(UTC)) is None


def test_a_new_roster_answers_all_requests(desk: Desk, north: Kit, served: Served) -> None:
    nearly_over(desk, "north", north)
    served.ask(RenewalRequest.make(north))
    assert len(served._desk.requests()) == 1
    desk.join("south")
    served.send_roster(roster(desk).to_bytes())
    assert served._desk.requests() == []


def test_the_server_keeps_no_request_that_the_lead_would_refuse(desk: Desk, north: Kit, served: Served) -> None:
    """One that stayed would be refused in each `provision sync`, in a name that its maker chose."""
    server, south = served._desk, Kit.read(desk.join("south"), kind="site")
    number = roster(desk).number
    old = RenewalRequest.make(north)
    with pytest.raises(ConfigError, match="before the last third"):
        server.ask("north", old)
    nearly_over(desk, "north", north)
    request = RenewalRequest.of(RenewalRequest.make(north))
    for name, data, why in (
        ("south", RenewalRequest.make(north), "must be in the name of south, who asks"),
        ("north", json.dumps(asdict(replace(request, signature="00"))).encode(), "must be signed with the key"),
        ("north", json.dumps(asdict(replace(request, federation="other"))).encode(), "must be for the certificate"),
        ("north", b'{"version": 2}', "is required"),
        ("north", b"", "must be JSON"),
    ):
        with pytest.raises(ConfigError, match=why):
            server.ask(name, data)
    assert server.ask("north", old) > number, "a certificate that it has no more: the newer one is in that roster"
    assert server.requests() == []
    nearly_over(desk, "south", south)
    for name, kit in (("north", north), ("south", south)):
        server.ask(name, RenewalRequest.make(kit))
    answered = provisioning.answer_renewals(desk.folder, [b"{}", *server.requests()], now=datetime.now(UTC))
    assert (answered.renewed.keys(), answered.refused.keys()) == ({"north", "south"}, {"a request"})


def test_what_the_server_last_saw_is_had_without_the_disk(desk: Desk, served: Served) -> None:
    before = served._desk.roster()
    desk.join("north")
    assert served._desk.known() == before
    served._desk.look()
    assert served._desk.known() == roster(desk).to_bytes()
    (desk.folder / "server/roster.json").unlink()
    assert served._desk.known() == (desk.folder / "lead/roster.json").read_bytes()


def test_lead_and_server_leave_with_the_newer_roster(desk: Desk, served: Served, tmp_path: Path) -> None:
    own = RosterBook.of(Kit.read(desk.folder / "lead", kind="lead"), tmp_path / "a lead elsewhere.json")
    old = roster(desk)
    own.take(old.to_bytes())
    desk.join("north")
    assert served._desk.look() != old
    assert exchange(served, own) == own.newest() == roster(desk)  # type: ignore[arg-type]
    # A standby that was copied long ago hears of what came since.
    kit = tmp_path / "standby"
    kit.mkdir()
    for name in ("kit.toml", "ca.pem", "server.pem", "server_key.pem"):
        (kit / name).write_bytes((desk.folder / "server" / name).read_bytes())
    (kit / "server_key.pem").chmod(0o600)
    (kit / "roster.json").write_bytes(old.to_bytes())
    standby = Served(ServerDesk(Kit.read(kit, kind="server"), kit), "lead")
    assert standby._desk.look().sites == ()
    exchange(standby, own)  # type: ignore[arg-type]
    assert [one.site for one in standby._desk.look().sites] == ["north"]


def test_a_roster_in_which_a_revoked_key_is_back_is_taken_by_nobody(desk: Desk, tmp_path: Path) -> None:
    desk.join("north")
    kept = roster(desk)
    desk.revoke("north")
    seen = book(desk, tmp_path / "seen.json")
    seen.take(roster(desk).to_bytes())
    lead = SigningKey.load(desk.folder / "lead/lead_key.pem")
    restored = replace(kept, number=roster(desk).number + 5).signed(lead)
    with pytest.raises(ConfigError, match=r"roster\.sites = \['north'\]: must stay revoked"):
        seen.take(restored.to_bytes())
    assert seen.newest() == roster(desk)


def rosters_of_a_return(desk: Desk) -> tuple[Roster, Roster, Roster, Roster]:
    """With a site, with it revoked, without it, and with it once more: the last two signed as after an old backup."""
    desk.join("north")
    joined = roster(desk)
    desk.revoke("north")
    revoked, lead = roster(desk), SigningKey.load(desk.folder / "lead/lead_key.pem")
    dropped = replace(joined, sites=(), number=revoked.number + 1).signed(lead)
    returned = replace(joined, number=revoked.number + 2).signed(lead)
    return joined, revoked, dropped, returned


def test_a_revoked_key_is_not_back_after_a_roster_that_lacks_its_site(desk: Desk, tmp_path: Path) -> None:
    joined, revoked, dropped, returned = rosters_of_a_return(desk)
    lead, kept = SigningKey.load(desk.folder / "lead/lead_key.pem"), tmp_path / "seen.revoked.json"

    def refused(path: Path) -> None:
        with pytest.raises(ConfigError, match=r"roster\.sites = \['north'\]: must stay revoked"):
            book(desk, path).take(returned.to_bytes())

    for seen in ((revoked, dropped), (joined, revoked, dropped), (revoked, dropped, replace(dropped).signed(lead))):
        for path in (tmp_path / "seen.json", kept):
            path.unlink(missing_ok=True)
        for one in seen:
            assert book(desk, tmp_path / "seen.json").take(one.to_bytes()) == one
        refused(tmp_path / "seen.json")
        assert book(desk, tmp_path / "seen.json").newest() == dropped
    (tmp_path / "seen.json").unlink()
    refused(tmp_path / "seen.json")
    # A newest roster without such a list beside it.
    (tmp_path / "older.json").write_bytes(revoked.to_bytes())
    book(desk, tmp_path / "older.json").take(dropped.to_bytes())
    refused(tmp_path / "older.json")
    # With a new key the site may come back.
    desk.renew("north", desk.request("north", kit="another"))
    back = replace(roster(desk), number=revoked.number + 3).signed(lead)
    assert book(desk, tmp_path / "older.json").take(back.to_bytes()).sites[0].revoked is None
    for damaged in ("", "{}", "[7]", '"text"', "[" * 100_000):
        kept.write_text(damaged)
        with pytest.raises(ConfigError, match=r"revoked keys = '.*seen\.revoked\.json': must be the list"):
            book(desk, tmp_path / "seen.json").take(back.to_bytes())


def test_a_crash_while_a_roster_is_taken_forgets_no_revoked_key(desk: Desk, tmp_path: Path) -> None:
    _, revoked, dropped, returned = rosters_of_a_return(desk)
    step, done = 0, False
    while not done:
        own = book(desk, tmp_path / f"{step}.json")
        own.path.write_bytes(revoked.to_bytes())
        with pytest.MonkeyPatch.context() as patch:
            killed_at(step, patch)
            try:
                own.take(dropped.to_bytes())
            except Killed:
                pass
            else:
                done = True
        with pytest.raises(ConfigError, match="must stay revoked"):
            own.take(returned.to_bytes())
        step += 1
    assert step > 4


def test_a_lead_whose_kit_was_copied_anew_has_its_newest_certificate_from_its_roster(desk: Desk) -> None:
    provisioning.renew(desk.folder, "lead", days=1, now=desk.now)
    kit = Kit.read(desk.folder / "lead", kind="lead")
    ended = kit.certificate.read_bytes()
    newest = provisioning.renew(desk.folder, "lead", days=None, now=desk.now)
    kit.certificate.write_bytes(ended)
    with pytest.raises(ConfigError, match=r"lead\.pem.*expired"):
        LeadService(kit=kit).meet()
    assert not LeadService(kit=kit, renew=True).meet()  # its server is away
    assert kit.check_certificate(desk.now) == newest


def test_doctor_says_what_it_sees_of_a_renewal(desk: Desk, north: Kit) -> None:
    for days, status, said in ((200, "ok", ""), (300, "ok", "was started with --renew asks"), (340, "warning", "")):
        check = site_checks.certificate(north, desk.now + timedelta(days=days))
        assert (check.status.value, said in check.found) == (status, True)
        assert f"{365 - days} days from now" in check.found
        assert ("start the site with --renew" in check.fix) == (status == "warning")
    assert "--renew" not in site_checks.certificate(north, desk.now + timedelta(days=200)).found


def test_doctor_compares_whom_a_site_trusts_with_the_newest_roster(
    desk: Desk, north: Kit, site_policy: Callable[..., Policy]
) -> None:
    for name in ("south", "west"):
        desk.join(name)
    keys = {name: desk.member(name).site_key for name in ("south", "west")}

    def doctor_says(**trusted: str) -> list[tuple[str, str]]:
        policy = site_policy("north", trust={"members": trusted})
        return [(one.status.value, one.found) for one in site_checks.members(north, policy)]

    assert doctor_says() == []
    ((status, found),) = doctor_says(**keys)
    assert (status, "has seen no roster yet" in found) == ("skipped", True)
    seen = book(desk, SiteState.of(north.folder).roster)
    seen.take(roster(desk).to_bytes())
    ((status, found),) = doctor_says(**keys, north="ab" * 32)
    assert (status, "in the newest roster seen here, with that key" in found) == ("ok", True)
    desk.revoke("west")
    seen.take(roster(desk).to_bytes())
    ((status, found),) = doctor_says(south="cd" * 32, west=keys["west"], east="ef" * 32)
    assert status == "warning"
    assert found.split(", ", 1)[1] == (
        "south is in [trust].members WITH ANOTHER KEY; "
        f"west is in [trust].members, and revoked {desk.now:%Y-%m-%d}; "
        "east is in [trust].members, and not in the federation"
    )
    seen.path.write_bytes(seen.path.read_bytes().replace(keys["south"].encode(), b"cd" * 32))
    with pytest.raises(ConfigError, match="newest roster"):  # the examination makes a line of it
        doctor_says(**keys)

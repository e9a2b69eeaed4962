"""Members change while everything runs: certificates end and are renewed, sites come and go, rosters are sent."""

from __future__ import annotations

import json
import shutil
import socket
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from fedtune.flower.wire.desk import DeskLine

from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.certificates import Certificate, read_certificate
from fedtune.deploy.kits.kit_file import Kit
from fedtune.deploy.kits.members import Roster
from fedtune.deploy.services.lead_and_server import LeadService, desk_of
from fedtune.federation.run_folder import RunFolder
from fedtune.flower.wire.fleet import Unauthorised, hello
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.spec import RunError

from .federation import Federation, dealt, settings
from .networks import Loopback
from .processes import RUN_S, wait_for

pytestmark = pytest.mark.nightly

LONG_AGO = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)
LEFT_S = 75.0
"""That the certificates which are renewed here still have.  A renewal takes 6 s, of which a process waits 5."""


@pytest.fixture(scope="module")
def members(make_federation: Callable[..., Federation]) -> Federation:
    """A server and two sites that may renew their certificates, all up."""
    federation = make_federation(names=("north", "south"), network=Loopback([]), made=LONG_AGO)
    federation.start_server("--renew")
    for site in federation.sites.values():
        site.start("--renew")
    return federation


def address(federation: Federation) -> str:
    return f"{federation.network.address}:{federation.network.port}"


def site_kit(federation: Federation, name: str) -> Kit:
    return Kit.read(federation.sites[name].kit, kind="site")


def shown_by_the_server(federation: Federation) -> Certificate:
    """What it shows to a new connection."""
    context = site_kit(federation, "north").tls().client_context()
    with (
        socket.create_connection(("127.0.0.1", federation.network.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
    ):
        shown = encrypted.getpeercert(True)
    assert shown is not None
    return Certificate.of(x509.load_der_x509_certificate(shown))


def test_certificates_are_renewed_while_server_site_and_lead_run(members: Federation) -> None:
    """Nobody starts anything again, nobody copies a file, and the next round is answered past the old ones' end."""
    north, server = members.sites["north"], members.server
    assert server is not None
    pids = (north.up.pid, server.pid)
    keys = {
        path: path.read_bytes() for path in (north.kit / "connection_key.pem", members.home / "server/server_key.pem")
    }
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=LEFT_S)
    # Kits that a lead makes by hand: a running process takes the new certificate from its kit.
    began = ends - timedelta(days=1)
    done = provisioning.renew_site(members.home, "north", days=1, now=began)
    provisioning.renew(members.home, "server", days=1, now=began)
    with zipfile.ZipFile(done.archive) as archive:
        archive.extractall(north.kit)
    until = {"certificate_until": ends.isoformat()}
    for process in (north.up, server):
        process.wait_for_text("a new certificate is used")
        assert process.lines("a new certificate is used")[-1].items() >= until.items()
        process.wait_for_text("a new certificate is asked for")
    assert shown_by_the_server(members).not_after == ends

    moments = [datetime.now(UTC)]
    said = members.do("provision", "sync", "--federation", str(members.home)).out
    moments.append(datetime.now(UTC))  # perhaps of the next day
    for name in ("north", "server"):
        days = {f"{moment + timedelta(days=365):%Y-%m-%d}" for moment in moments}
        assert any(f"{name}: a new certificate, valid until {day}" in said for day in days)
    for process in (north.up, server):
        process.wait_for_text("a new certificate is used", count=2)
    assert datetime.now(UTC) < ends, "a renewal takes seconds"
    assert {path: path.read_bytes() for path in keys} == keys, "the keys stayed where they were, as they were"
    assert shown_by_the_server(members).not_after > ends + timedelta(days=360)
    assert Certificate.of(read_certificate(north.kit / "site.pem")).not_after > ends + timedelta(days=360)

    time.sleep(max(0.0, (ends - datetime.now(UTC)).total_seconds() + 1))
    lead = members.lead("past-the-end", *settings("federation.num_rounds=4"))
    folder = RunFolder(members.run_folder("past-the-end"))
    wait_for(folder.asked.exists, seconds=RUN_S, what="the first round", needs=lead)
    provisioning.renew(members.home, "lead", days=None, now=datetime.now(UTC))
    assert lead.end(seconds=RUN_S) == 0, lead.text
    assert [len(one["sites"]) for one in members.result("past-the-end")["rounds"]] == [2, 2, 2, 2]
    assert "a new certificate is used" in folder.log.read_text(), "by the lead, in the middle of its run"
    assert (north.up.pid, server.pid) == pids
    assert north.up.code is None
    assert "no contact" not in north.up.text


def test_a_roster_is_applied_while_the_server_runs_and_no_older_one_comes_back(members: Federation) -> None:
    desk, server = desk_of(Kit.read(members.lead_kit, kind="lead")), address(members)
    before = (members.home / "server/roster.json").read_bytes()
    elsewhere = members.folder / "lead elsewhere"
    shutil.copytree(members.lead_kit, elsewhere)
    assert hello(server, site_kit(members, "south").tls()) == "south"
    said = members.do("provision", "revoke-site", "south", "--federation", str(members.home), "--sync").out
    assert "The server has the newest roster" in said
    with pytest.raises(Unauthorised, match="revoked"):  # its next call
        hello(server, site_kit(members, "south").tls())

    newest = Roster.read(members.home / "server/roster.json")
    with pytest.raises(RunError, match="must be higher than"):
        desk.send_roster(before)
    stranger = SigningKey.load_or_make(members.folder / "stranger.pem")
    forged = replace(Roster.of(before), number=newest.number + 1)
    with pytest.raises(RunError, match="must be signed by the federation's lead"):
        desk.send_roster(forged.signed(stranger).to_bytes())
    of_a_site = DeskLine(server=server, tls=site_kit(members, "north").tls())
    for call in (lambda: of_a_site.send_roster(newest.to_bytes()), of_a_site.requests):
        with pytest.raises(RunError, match="not this caller's to make"):
            call()
    with pytest.raises(RunError, match="not signed by the lead"):
        DeskLine(server=server, tls=desk.tls, lead=stranger).requests()
    of_a_revoked_site = DeskLine(server=server, tls=site_kit(members, "south").tls())
    with pytest.raises(RunError, match="revoked"):
        of_a_revoked_site.roster()

    # Also with the old file in its kit, and started again.
    assert members.server is not None
    (members.home / "server/roster.json").write_bytes(before)
    members.server.stop()
    members.start_server("--renew")
    with pytest.raises(Unauthorised, match="revoked"):
        hello(server, site_kit(members, "south").tls())
    (members.home / "server/roster.json").write_bytes(newest.to_bytes())

    # A lead on another machine hears of it when it starts a run, and so does who comes newly.
    lead = LeadService(kit=Kit.read(elsewhere, kind="lead"))
    assert lead.meet()
    assert {one.site: one.revoked is None for one in Roster.read(elsewhere / "roster.json").sites} == {
        "north": True,
        "south": False,
    }
    assert not lead.meet()


def test_a_site_comes_with_one_command_of_the_lead(members: Federation) -> None:
    west = members.prepare("west", dealt(("north", "south"))["south"][:20])
    members.admit(west, "--federation", str(members.home), "--sync")
    with zipfile.ZipFile(members.home / "sites/west-kit.zip") as archive:
        archive.extractall(west.kit)
    assert hello(address(members), Kit.read(west.kit, kind="site").tls()) == "west"


def test_a_site_sees_who_is_there_and_nothing_is_changed_for_it(members: Federation) -> None:
    north = members.sites["north"]
    before = north.site_toml.read_bytes()
    said = members.do("site", "members", *north.own).out
    assert "west" in said
    assert "not in [trust].members" in said
    keys = {one.site: one.site_key for one in Roster.read(members.home / "server/roster.json").sites}
    policy = read_policy(north.site_toml)
    for trusted, words in (
        ({"west": keys["west"]}, "in [trust].members, with this key"),
        ({"west": keys["north"]}, "in [trust].members WITH ANOTHER KEY: call that site"),
        ({"south": keys["south"]}, "in [trust].members, and revoked"),
        ({"east": keys["south"]}, "in [trust].members, and not in the federation: take it out"),
    ):
        write_policy(replace(policy, trust=replace(policy.trust, members=trusted)), north.site_toml)
        given = north.site_toml.read_bytes()
        shown = json.loads(members.do("site", "members", *north.own, "--json").out)["members"]
        (name,) = trusted
        assert words in {one["site"]: one["state"] for one in shown}[name]
        assert north.site_toml.read_bytes() == given
    north.site_toml.write_bytes(before)
    # It takes no roster that is older than what it has seen.
    assert (north.kit / "state/newest_roster.json").read_bytes() == (members.home / "server/roster.json").read_bytes()

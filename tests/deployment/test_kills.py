"""Killed or disconnected sites, servers and leads in the middle of a round: the run continues with consistent
ledgers.
"""

import configparser
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedtune.privacy.trust import Trust

from ..processes import FEDTUNE, REPOSITORY, RUN_S, Process
from .books import check_full_run, check_same_adapter
from .federation import LEAD, Federation, list_settings, partition_records
from .networks import Namespaces

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def shared_federation(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation(held=True)


@pytest.fixture
def federation(shared_federation: Federation) -> Iterator[Federation]:
    """The module's federation with all processes running and no paused site, whatever the previous test did."""
    assert shared_federation.server.code is None
    assert all(site.up.code is None for site in shared_federation.sites.values())
    yield shared_federation
    for site in shared_federation.sites.values():
        site.hold(False)


def test_killed_site_resumes_and_is_charged_for_started_rounds(federation: Federation) -> None:
    site = federation.sites["north"]
    lead = site.hold_in_first_round("site-killed", *list_settings("federation.spare_rounds=1"))
    site.up.kill()
    assert not site.events("site-killed", "commit")
    site.hold(False)
    site.start(held=True)
    assert lead.end() == 0, lead.text
    check_full_run(federation, "site-killed", charged={"north": 3, "south": 2, "west": 2})
    reserved = [(event.round, event.attempt) for event in site.events("site-killed", "reserve")]
    assert reserved == [(1, 1), (1, 2), (2, 1)]


def test_disconnected_site_resumes_without_a_restart(make_networks: None, federation: Federation) -> None:
    site, outage_s = federation.sites["south"], 22.0  # the server drops a site after twenty seconds
    pid, contacts = site.up.pid, site.up.text.count("no contact")
    lead = site.hold_in_first_round("cut-off")
    federation.network.connect("south", up=False)
    start = time.monotonic()
    try:
        site.hold(False)
        site.wait_for("cut-off", "commit", round=1)
        time.sleep(max(0.0, start + outage_s - time.monotonic()))
        assert not federation.run_folder("cut-off").joinpath("checkpoints", "round-0001.safetensors").exists()
    finally:
        federation.network.connect("south", up=True)
    assert lead.end(seconds=RUN_S) == 0, lead.text
    assert site.up.pid == pid
    assert site.up.text.count("no contact") > contacts
    check_full_run(federation, "cut-off")


def test_server_restored_from_a_backup_completes_the_run(federation: Federation) -> None:
    """The database is restored during the run."""
    north = federation.sites["north"]
    lead = north.hold_in_first_round("backed-up", *list_settings("federation.num_rounds=2"))
    kit, file = federation.home / "server", federation.folder / "server.zip"
    federation.do("server", "backup", str(file), "--kit", str(kit))
    # The backup contains only the question; the answer is lost with the database.
    north.hold(False)
    north.wait_for("backed-up", "commit", round=1)
    federation.server.kill()
    databases = list(kit.glob("server.db*"))
    assert databases
    for path in databases:
        path.unlink()
    federation.do("server", "restore", str(file), "--kit", str(kit))
    assert (kit / "server.db").is_file()
    federation.start_server()
    assert lead.end(seconds=RUN_S) == 0, lead.text
    assert "trying again" in (federation.run_folder("backed-up") / "log.txt").read_text()
    check_full_run(federation, "backed-up")


# A lead started by its systemd unit, and a standby server.

UNIT = REPOSITORY / "deployment/systemd/fedtune-lead@.service"
TWO_SITES, STANDBY = ("north", "south"), "standby"


def run_unit_command(federation: Federation, settings: list[str]) -> Process:
    """Start the command of systemd's unit `fedtune-lead@served`, with SETTINGS from a file."""
    unit = configparser.RawConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.read_string(UNIT.read_text())
    program, *words = shlex.split(unit["Service"]["execstart"].replace("%i", "served"))
    assert program == "/opt/fedtune/bin/fedtune"
    assert words[-1] == "$SETTINGS", "systemd splits only an unbraced word of its own"
    return federation.run("lead-served", LEAD, [*FEDTUNE, *words[:-1], *settings])


def test_killed_lead_resumes_and_completes_once(federation: Federation) -> None:
    """The public stage is finished before the first kill and is not trained again."""
    (federation.folder / "kit").symlink_to(federation.lead_kit)
    shutil.copy(REPOSITORY / "conf/experiment/debug.yaml", federation.folder / "served.yaml")
    public = federation.folder / "public.csv"
    public.write_text("text,label\nWhere is my card?,card_arrival\nIs it lost?,lost_or_stolen_card\n")
    settings = [word for word in list_settings("federation.num_rounds=2") if not word.startswith("experiment=")]
    settings.append(f"public.train_file={public}")
    north = federation.sites["north"]
    north.hold(True)
    lead = run_unit_command(federation, settings)
    north.wait_for("served", "reserve", round=1, lead=lead)
    lead.kill()
    north.hold(False)
    north.wait_for("served", "commit", round=1)
    north.hold(True)
    second = run_unit_command(federation, settings)
    north.wait_for("served", "reserve", round=2, lead=second)
    second.kill()
    north.hold(False)
    third = run_unit_command(federation, settings)
    assert third.end() == 0, third.text
    assert ["Public stage" in process.text for process in (lead, second, third)] == [True, False, False]
    check_full_run(federation, "served")
    for site in federation.sites.values():
        assert [event.round for event in site.events("served", "reserve")] == [1, 2], "no round may be charged twice"
    # When a machine boots and starts a finished run again, nothing changes.
    before = [len(site.events("served")) for site in federation.sites.values()]
    result = (federation.run_folder("served") / "run.json").read_bytes()
    finished = run_unit_command(federation, settings)
    assert finished.end(seconds=120) == 0, finished.text
    assert "served is finished." in finished.text
    assert [len(site.events("served")) for site in federation.sites.values()] == before
    assert (federation.run_folder("served") / "run.json").read_bytes() == result


@pytest.mark.usefixtures("make_networks")  # on loopback the address could not move
def test_standby_server_takes_over_within_a_round(make_federation: Callable[..., Federation]) -> None:
    """The standby has a kit that is older than the last roster, and no database."""
    federation = make_federation(names=TWO_SITES, network=Namespaces([LEAD, *TWO_SITES, STANDBY]))
    revoked = federation.join("gone", partition_records(TWO_SITES)["north"][:20])
    kit, data_folder = federation.folder / STANDBY, federation.folder / "data of the standby"
    shutil.copytree(federation.home / "server", kit)
    data_folder.mkdir()
    federation.do("provision", "revoke-site", revoked.name, "--federation", str(federation.home))
    federation.start(*TWO_SITES, held=True)

    north = federation.sites["north"]
    lead = north.hold_in_first_round("first", *list_settings("federation.num_rounds=2"))
    federation.server.kill()
    federation.network.hand_over(STANDBY)
    words = [*FEDTUNE, "server", "start", "--kit", str(kit), "--data", str(data_folder)]
    standby = federation.run(STANDBY, STANDBY, [*words, "--host", federation.network.address])
    standby.wait_for_text("the server is listening")
    assert "gone is registered" in standby.text, "it must only know its copy of the kit"
    north.hold(False)
    assert lead.end(seconds=RUN_S) == 0, lead.text
    check_full_run(federation, "first")

    # The page's last step copies the roster that it missed.
    assert "gone was revoked" not in standby.text
    shutil.copy(federation.home / "server/roster.json", kit)
    standby.wait_for_text("gone was revoked")
    federation.finish("second", *list_settings("federation.num_rounds=1", "sites=[north,south]"))


SECURE = (
    *("experiment=debug", "runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true"),
    *("federation.aggregation=secure", "federation.threshold=3", "training.local_steps=1"),
    *("federation.num_rounds=3", "data.validation_rows=10", "data.test_rows=10"),
)


def test_secure_round_survives_a_killed_server(
    make_federation: Callable[..., Federation], run_in_one_process: Any
) -> None:
    """The server is killed after two uploads: no site trains again, and no second sum is requested."""
    federation = make_federation()
    for site in federation.sites.values():
        members = {name: other.site_key for name, other in federation.sites.items() if other is not site}
        site.edit(trust=Trust(secure=True, members=members))
    federation.start(held=True)
    west = federation.sites["west"]
    west.hold(True)
    lead = federation.lead("server-killed", *SECURE)
    for site in federation.sites.values():
        site.wait_for("server-killed", "commit" if site is not west else "reserve", round=1, lead=lead)
    federation.server.kill()
    west.hold(False)
    west.wait_for("server-killed", "commit", round=1)
    federation.start_server()
    assert lead.end() == 0, lead.text
    check_full_run(federation, "server-killed", rounds=3, averaged=False)
    check_same_adapter(federation, "server-killed", run_in_one_process("same", *SECURE), tolerance=0)

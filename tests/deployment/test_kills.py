"""Sites, server and lead that die or are cut off in the middle of a round: the run goes on, and the books are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from .books import check_average, check_books
from .federation import NAMES, Federation, settings
from .processes import RUN_S

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def whole(make_federation: Callable[..., Federation]) -> Federation:
    """A federation whose sites can be held up in a round."""
    federation = make_federation()
    federation.start(held=True)
    return federation


@pytest.fixture
def federation(whole: Federation) -> Iterator[Federation]:
    """The same, all of it up and nobody held up, whatever the test before did."""
    assert whole.server is not None
    assert whole.server.code is None
    assert all(site.up.code is None for site in whole.sites.values())
    yield whole
    for site in whole.sites.values():
        site.hold(False)


def charged(federation: Federation, run: str) -> dict[str, int]:
    return {name: about["rounds"] for name, about in federation.result(run)["privacy"]["sites"].items()}


def check_whole(federation: Federation, run: str) -> None:
    """Check that all sites took part in all of a run's two rounds, each once."""
    check_books(federation, run)
    check_average(federation, run)
    assert [round["sites"] for round in federation.result(run)["rounds"]] == [list(NAMES)] * 2


def test_a_killed_site_comes_back_and_pays_for_what_it_began(federation: Federation) -> None:
    site = federation.sites["north"]
    site.hold(True)
    lead = federation.lead("site-killed", *settings("federation.spare_rounds=1"))
    site.wait_for("site-killed", "reserve", round=1, lead=lead)
    site.up.kill()
    assert not site.events("site-killed", "commit")
    site.hold(False)
    site.start(held=True)
    assert lead.end() == 0, lead.text
    check_whole(federation, "site-killed")
    reserved = [(event.round, event.attempt) for event in site.events("site-killed", "reserve")]
    assert reserved == [(1, 1), (1, 2), (2, 1)]
    assert charged(federation, "site-killed") == {"north": 3, "south": 2, "west": 2}


def test_a_run_survives_its_server(federation: Federation) -> None:
    site = federation.sites["south"]
    site.hold(True)
    lead = federation.lead("server-killed")
    site.wait_for("server-killed", "reserve", round=1, lead=lead)
    assert federation.server is not None
    federation.server.kill()
    site.hold(False)
    site.wait_for("server-killed", "commit", round=1)
    lead_log = federation.run_folder("server-killed") / "log.txt"
    federation.start_server()
    assert lead.end() == 0, lead.text
    assert "trying again" in lead_log.read_text()
    check_whole(federation, "server-killed")
    assert charged(federation, "server-killed") == dict.fromkeys(NAMES, 2)


def test_a_killed_lead_resumes_from_its_last_round(federation: Federation) -> None:
    site = federation.sites["west"]
    lead = federation.lead("lead-killed")
    site.wait_for("lead-killed", "commit", round=1)
    site.hold(True)
    for each in federation.sites.values():  # a site hears of its question before the lead has put the next one's
        each.wait_for("lead-killed", "reserve", round=2, lead=lead)
    lead.kill()
    site.hold(False)
    for each in federation.sites.values():
        each.wait_for("lead-killed", "commit", round=2)
    assert not (federation.run_folder("lead-killed") / "run.json").exists()
    again = federation.resume("lead-killed")
    assert again.end() == 0, again.text
    # The second round was answered before: the same bytes come again, and are not charged again.
    check_whole(federation, "lead-killed")
    assert charged(federation, "lead-killed") == dict.fromkeys(NAMES, 2)


def test_a_site_that_was_cut_off_needs_no_restart(own_networks: None, federation: Federation) -> None:
    site, cut_s = federation.sites["south"], 22.0  # the server has given it up after twenty
    pid, contacts = site.up.pid, site.up.text.count("no contact")
    site.hold(True)
    lead = federation.lead("cut-off")
    site.wait_for("cut-off", "reserve", round=1, lead=lead)
    federation.network.connect("south", up=False)
    began = time.monotonic()
    try:
        site.hold(False)
        site.wait_for("cut-off", "commit", round=1)
        time.sleep(max(0.0, began + cut_s - time.monotonic()))
        assert not federation.run_folder("cut-off").joinpath("checkpoints", "round-0001.safetensors").exists()
    finally:
        federation.network.connect("south", up=True)
    assert lead.end(seconds=RUN_S) == 0, lead.text
    assert site.up.pid == pid
    assert site.up.text.count("no contact") > contacts
    check_whole(federation, "cut-off")
    assert charged(federation, "cut-off") == dict.fromkeys(NAMES, 2)

"""Manual steps at both ends: approval and pause at a site; status, stop, resume and end at the lead."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedtune.ops.services.lead_and_server import find_running_process

from ..processes import FEDTUNE, RUN_S, wait_for
from .books import check_books
from .federation import LEAD, Federation, list_settings
from .site_folder import SiteFolder

pytestmark = pytest.mark.nightly

SITES = ("north", "south")


@pytest.fixture(scope="module")
def federation(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation(names=SITES, held=True)


def print_status(federation: Federation, run: str) -> dict[str, Any]:
    outcome = federation.do("run", "status", str(federation.run_folder(run)), "--json")
    return dict(json.loads(outcome.out))


@pytest.fixture
def manual_site(federation: Federation) -> Iterator[SiteFolder]:
    """The site north, where a person approves each run."""
    site = federation.sites["north"]
    site.edit(approval="manual")
    yield site
    site.edit(approval="automatic")


def test_run_waits_for_approval_and_then_continues(federation: Federation, manual_site: SiteFolder) -> None:
    """The output is tested in tests/cli/test_site.py."""
    site, loaded = manual_site, len(manual_site.up.lines("the base model is loaded"))
    lead = federation.lead("asked", *list_settings("federation.num_rounds=1", "data.max_length=17"))
    site.up.wait_for_text("a run waits for approval")
    wait_for(lambda: "south: would_take_part" in lead.text, seconds=RUN_S, what="south's offer", needs=lead)
    # Before all sites have approved the run, this site has done nothing, and no site was charged.
    assert not [member for member in federation.sites.values() if member.events("asked", "plan")]
    assert len(site.up.lines("the base model is loaded")) == loaded
    (run,) = (event.run for event in site.events("asked", "refusal"))
    assert "Approved, and recorded in the ledger" in federation.do("site", "approve", run, *site.args, "--yes").out
    assert lead.end() == 0, lead.text
    assert "awaiting_approval" in lead.text
    check_books(federation, "asked")
    order = [event.detail.get("what", event.kind.value) for event in site.events("asked")]
    assert order == ["refusal", "approved", "plan", "reserve", "commit", "run_ended"]
    assert len(site.up.lines("the base model is loaded")) == loaded + 1
    assert "No run waits for approval" in federation.do("site", "approve", *site.args).out


def test_run_denied_by_a_site_ends(federation: Federation, manual_site: SiteFolder) -> None:
    lead = federation.lead("denied", *list_settings("federation.num_rounds=1", "federation.min_sites=2"))
    wait_for(lambda: manual_site.count_answers("awaiting_approval", "denied"), seconds=RUN_S, what="a wait", needs=lead)
    (run,) = (event.run for event in manual_site.events("denied", "refusal"))
    words = [*FEDTUNE, "site", "deny", run, "--reason", "no quorum of the board", *manual_site.args]
    denial = federation.run("denial", "north", words)
    assert denial.end() == 0, denial.text
    # The lead asks again automatically, receives the denial, and stops.
    assert lead.end() == 3, lead.text
    output = " ".join(lead.text.split())
    assert "north: denied" in output
    assert "nothing was charged for this run" in output
    assert "board" not in lead.text + (federation.run_folder("denied") / "answers.json").read_text()
    assert manual_site.count_answers("denied", "denied") == 1
    assert manual_site.notes("denied") == ["denied"]
    assert not [site for site in federation.sites.values() if site.events("denied", "plan")]


def test_site_withdraws_from_an_accepted_run_and_the_other_site_continues(federation: Federation) -> None:
    """The site withdraws during its first round: the round stays charged, and no update is sent."""
    site, other = federation.sites["north"], federation.sites["south"]
    lead = site.hold_in_first_round(
        "ended", *list_settings("federation.num_rounds=2", "federation.min_sites=1", "federation.straggler_grace_s=3")
    )
    (run,) = (event.run for event in site.events("ended", "plan"))
    words = [*FEDTUNE, "site", "deny", run, "--reason", "consent withdrawn", "--by", "Anna Weber", "--ticket", "DPO-7"]
    denial = federation.run("ending", "north", [*words, *site.args])
    assert denial.end() == 0, denial.text
    site.hold(False)
    assert lead.end() == 0, lead.text
    assert "consent" not in lead.text + (federation.run_folder("ended") / "answers.json").read_text()
    assert "north: denied" in " ".join(lead.text.split())
    order = [event.detail.get("what", event.kind.value) for event in site.events("ended")]
    assert order[:3] == ["plan", "reserve", "denied"]
    assert set(order[3:]) == {"refusal"}, "no reply and no further round may follow"
    history = site.verified().history
    assert history.runs[run].charged_rounds == 1
    assert not history.count_remaining_charges(history.clock), "the reserve must be released"
    (decision,) = history.decided[history.runs[run].proposal.digest()]
    assert (decision["what"], decision["by"], decision["ticket"]) == ("denied", "Anna Weber", "DPO-7")
    assert other.verified().history.runs[run].charged_rounds == 2
    check_books(federation, "ended")


def test_run_is_inspected_stopped_and_resumed(federation: Federation) -> None:
    site, run = federation.sites["south"], "stopped"
    folder = federation.run_folder(run)
    lead = site.hold_in_first_round(run)
    assert find_running_process(folder) == lead.pid
    before = print_status(federation, run)
    assert (before["running"], before["finished"], before["round"], before["num_rounds"]) == (True, False, 0, 2)
    # A request without an answer counts as charged for now.
    assert before["sites"]["south"]["upper_bound"]
    assert before["sites"]["south"]["rounds_charged"] == 1
    assert f"{run} is stopped" in federation.do("run", "stop", str(folder)).out
    assert lead.end(seconds=60) == 1
    assert find_running_process(folder) is None
    assert "Interrupted. Continue with: fedtune run resume" in " ".join(lead.text.split())
    assert not (folder / "adapter").exists()
    site.hold(False)
    site.wait_for(run, "commit", round=1)
    resumed = federation.resume(run)
    assert resumed.end() == 0, resumed.text
    after = print_status(federation, run)
    assert (after["running"], after["finished"], after["round"]) == (False, True, 2)
    assert {name: status["last_answer"] for name, status in after["sites"].items()} == dict.fromkeys(SITES, "update")
    # Rounds that had been answered before the stop are neither trained nor charged again.
    assert {name: status["rounds_charged"] for name, status in after["sites"].items()} == dict.fromkeys(SITES, 2)
    check_books(federation, run)


def test_paused_site_is_skipped_and_stopped_run_ends_everywhere(federation: Federation) -> None:
    paused, held, run = federation.sites["north"], federation.sites["south"], "given-up"
    folder = federation.run_folder(run)
    held.hold(True)
    federation.do("site", "pause", "--kit", str(paused.kit))
    lead = federation.lead(run, *list_settings("federation.straggler_grace_s=3"))
    held.wait_for(run, "reserve", round=1, lead=lead)
    wait_for(lambda: paused.count_answers("paused", run), seconds=RUN_S, what="north to pause", needs=lead)
    assert not paused.events(run, "plan")
    federation.do("site", "resume", "--kit", str(paused.kit))
    paused.wait_for(run, "commit", round=1, lead=lead)
    federation.do("run", "stop", str(folder))
    assert lead.end(seconds=60) == 1
    held.hold(False)
    held.wait_for(run, "commit", round=1)
    assert [site.notes(run) for site in federation.sites.values()] == [[], []]
    words = ["run", "stop", str(folder), "--for-good", "--kit", str(federation.lead_kit)]
    end = federation.run("lead-end", LEAD, [*FEDTUNE, *words])
    assert end.end() == 0, end.text
    assert sorted(
        end.text.partition("Sites that were notified of the end of the run: ")[2].strip().rstrip(".").split(", ")
    ) == list(SITES)
    for site in federation.sites.values():
        assert site.notes(run) == ["run_ended"]
        history = site.verified().history
        (name,) = (name for name in history.runs if name.startswith(f"{run}-"))
        assert history.runs[name].charged_rounds == 1
        assert not history.runs[name].count_remaining_charges(history.now())


def test_site_that_leaves_shuts_down_cleanly(federation: Federation) -> None:
    site = federation.sites["north"]
    site.hold(True)
    settings = ("federation.num_rounds=2", "federation.min_sites=1", "federation.straggler_grace_s=3")
    lead = federation.lead("left", *list_settings(*settings))
    site.wait_for("left", "reserve", round=1, lead=lead)
    leaving = federation.run("leaving", "north", [*FEDTUNE, "site", "leave", *site.args])
    assert leaving.end() == 0, leaving.text
    assert "north has left banks; 1 open run ended" in leaving.text
    site.hold(False)
    assert site.up.end(seconds=60) == 0
    assert site.up.lines("the site has stopped")
    # The round that it had started is charged, and nothing stays reserved.
    history = site.verified().history
    assert history.charged_rounds(next(name for name in history.runs if name.startswith("left-"))) == 1
    assert not history.count_remaining_charges(history.now())
    assert lead.end() == 0, lead.text
    assert [round["sites"] for round in federation.result("left")["rounds"]][1] == ["south"]
    federation.do("provision", "revoke-site", "north", "--federation", str(federation.home))
    audit = federation.home / "server" / "audit.jsonl"
    wait_for(lambda: '"member revoked"' in audit.read_text(), seconds=60, what="the server to shut north out")
    assert federation.sites["south"].up.code is None

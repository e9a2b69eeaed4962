"""`fedtune site start|approve|pause|resume|leave`: what they print, what they change, and their exit codes."""

import io
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedtune.extras import install_command
from fedtune.ops.services.site_state import serving
from fedtune.privacy.accountant import epsilon_pld, epsilon_text
from fedtune.privacy.filter import epsilon_filter
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.words import spoken_start

from ..conftest import command, named, run_proposal, stranger_key
from ..privacy.builders import reason_of, reserve
from . import snapshots
from .conftest import Here

Propose = Callable[..., Proposal]
SETTINGS = json.dumps({"seed": 3, "training": {"learning_rate": 0.25}, "data": {"labels": ["a[/]", "b"]}})
R, TRIAGE, OTHER = (named(run, SETTINGS) for run in ("r", "triage", "other"))

pytestmark = pytest.mark.usefixtures("own_process")


def proposed(run: str = "r", **changes: Any) -> Proposal:
    """What a lead proposes for a run with these settings."""
    return run_proposal(run=named(run, SETTINGS), **changes)


@pytest.fixture
def north(joined: Any) -> Here:
    return joined("north")


def test_what_waits_is_listed_with_its_price(north: Here) -> None:
    assert approve(north, OTHER, "--yes").failed().endswith("must be a run that waits for approval: none")
    north.state.wait_for_approval(proposed("triage"), SETTINGS)
    message = approve(north, OTHER, "--yes").failed()
    assert message == f"RUN = '{OTHER}': must be a run that waits for approval: {TRIAGE}"
    north.state.wait_for_approval(proposed("follow-up"), SETTINGS)
    plan = proposed().plan
    listed = json.loads(approve(north, "--json").out)["waiting"]
    assert {one["run"] for one in listed} == {TRIAGE, named("follow-up", SETTINGS)}
    assert {one["epsilon"] for one in listed} == {epsilon_pld([plan.whole], plan.delta)}
    assert approve(north, TRIAGE, "--json").code == 2


def test_approval_shows_the_price_and_lets_the_run_start(north: Here) -> None:
    earlier, asked = proposed("earlier"), proposed("triage", spare_rounds=0)
    north.start_run(earlier, 1)
    north.state.wait_for_approval(asked, SETTINGS)
    assert reason_of(reserve, north.open(), asked) is Reason.AWAITING_APPROVAL
    out = approve(north, TRIAGE, "--yes").printed
    ledger = north.open()
    delta, order = asked.plan.delta, ledger.history.order
    before = epsilon_filter([earlier.plan.whole], order=order, delta=delta)
    after = epsilon_filter([earlier.plan.whole, asked.plan.whole], order=order, delta=delta)
    assert 0 < before < after < 5
    price = epsilon_text(epsilon_pld([asked.plan.whole], delta))
    assert f"epsilon {price} at delta 1e-05 for each record, for the whole run" in out
    assert f"epsilon {epsilon_text(before)} is taken, {epsilon_text(after)} with this run" in out
    assert set(ledger.history.approved) == {earlier.digest(), asked.digest()}
    assert reserve(ledger, asked)
    assert north.state.waiting() == []


@pytest.mark.parametrize(
    ("name", "policy", "asked"),
    [
        ("head", {"allow": {"adapters": ("none",), "target_modules": ()}}, {"adapter": "none", "target_modules": ()}),
        ("seeded", {"allow": {"seeded_noise": True}}, {"seeded_noise": True}),
        (
            "bare",
            {"limits": {"min_noise_multiplier": 0.0}, "budget": {"max_epsilon": math.inf}},
            {"noise_multiplier": 0.0},
        ),
    ],
)
def test_what_is_said_of_a_policy_and_a_run(north: Here, name: str, policy: Any, asked: Any, monkeypatch: Any) -> None:
    """A run that trains its head alone, and runs without a guarantee, which are not given a price."""
    monkeypatch.chdir(north.folder)
    north.edit(**policy)
    north.state.wait_for_approval(proposed(**asked), SETTINGS)
    said = command("site", "check-policy", "site.toml").printed
    said += "".join(approve(north, *words).printed for words in ((), (R, "--yes")))
    snapshots.check_output(f"site-approve-{name}", said)


def test_a_long_list_is_shown_to_its_end(north: Here) -> None:
    settings = json.dumps({"data": {"labels": [*(f"ordinary subject {n}" for n in range(60)), "is HIV positive"]}})
    north.state.wait_for_approval(run_proposal(run=named("r", settings)), settings)
    assert "is HIV positive" in " ".join(approve(north, named("r", settings), "--yes").printed.split())


@pytest.mark.parametrize(("typed", "yes"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_a_person_is_asked(north: Here, typed: str, yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    north.state.wait_for_approval(proposed(), SETTINGS)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    outcome = approve(north, R)
    assert (outcome.code, "not approved: the run still waits" in outcome.err) == ((0, False) if yes else (1, True))
    assert "Let it start? [y/N]" in outcome.out
    assert bool(north.open().history.approved) is yes
    assert (north.state.waiting() == []) is yes


def test_what_the_budget_refuses_is_not_approved_and_waits(north: Here) -> None:
    north.state.wait_for_approval(proposed(), SETTINGS)
    north.edit(budget={"max_epsilon": 0.5}, limits={"max_rounds": 2})
    outcome = approve(north, R, "--yes")
    assert outcome.failed(3).startswith("policy or budget refuse this run: ")
    for words in ("the lifetime budget would be passed", "too many rounds (asked 4, allowed at most 2)"):
        assert words in outcome.message
    assert "epsilon 0.000 is taken" in outcome.out
    assert len(north.state.waiting()) == 1
    assert not (north.folder / "ledger.db").exists(), "asking made no ledger"
    north.edit(dataset=(replace(read_policy(north.site_toml).dataset[0], id="others"),))
    assert "the site has no such data set (asked patients" in approve(north, R, "--yes").failed(3)
    (north.folder / "ledger.db").write_bytes(b"no ledger" * 1000)
    assert "the site would not start" in approve(north, R, "--yes").failed(1)


def test_of_two_runs_with_one_name_one_is_approved(north: Here) -> None:
    one, other = proposed(), proposed(lead=stranger_key.public)
    north.edit(allow={"leads": (one.lead, other.lead)})
    for proposal in (one, other):
        north.state.wait_for_approval(proposal, SETTINGS)
    message = approve(north, R, "--yes").failed()
    assert "was proposed in 2 ways" in message
    for proposal in (one, other):
        assert f"{proposal.digest()[:12]} (lead {spoken_start(proposal.lead)})" in message
    assert approve(north, other.digest()[:12], "--yes").code == 0
    assert set(north.open().history.approved) == {other.digest()}
    assert [pending.proposal for pending in north.state.waiting()] == [one]


@pytest.mark.parametrize("name", ["[bold]r[/bold]", "[/]", "a [red]b", "r\\"])
def test_a_leads_brackets_are_shown_as_they_are(north: Here, name: str) -> None:
    north.state.wait_for_approval(proposed(name), SETTINGS)
    assert name in approve(north).out
    assert name in approve(north, named(name, SETTINGS), "--yes").printed


def approve(here: Here, *words: str, by: str = "approve") -> Any:
    return command("site", by, *words, *here.words)


def test_denying_notes_a_reason_and_the_run_waits_no_longer(north: Here) -> None:
    denied, other = proposed("triage"), proposed("other")
    for proposal in (denied, other):
        north.state.wait_for_approval(proposal, SETTINGS)
    for reason in ("", " ", "two\nlines", "x" * 301):
        message = approve(north, TRIAGE, "--reason", reason, by="deny").failed()
        assert "must be one line of at most 300 characters" in message
    assert approve(north, TRIAGE, by="deny").code == 2
    assert len(north.state.waiting()) == 2
    told = approve(north, TRIAGE, "--reason", "not [red] in summer", by="deny")
    assert told.printed[:30] == "Denied, and noted in the ledge"
    assert [pending.proposal for pending in north.state.waiting()] == [other]
    for proposal, why in ((denied, Reason.DENIED), (other, Reason.AWAITING_APPROVAL)):
        assert reason_of(reserve, north.open(), proposal) is why
    shown = " ".join(command("ledger", "show", str(north.folder / "ledger.db")).out.split())
    assert "denied the run as it was proposed: not [red] in summer" in shown
    assert not north.open().history.charged()
    assert approve(north, TRIAGE, "--reason", "again", by="deny").code == 2
    assert approve(north, TRIAGE, "--yes").code == 2


def test_a_site_ends_one_run_that_has_begun_and_the_ledger_names_who_decided(north: Here, monkeypatch: Any) -> None:
    monkeypatch.setenv("SUDO_USER", "mkeller")
    asked, other = proposed("triage"), proposed("other")
    for proposal in (asked, other):
        north.state.wait_for_approval(proposal, SETTINGS)
    for option in ("--by", "--ticket", "--reason"):
        assert "must be one line" in approve(north, TRIAGE, "--yes", option, " ").failed()
    words = ("--by", "Anna Weber", "--ticket", "DPO-7", "--reason", "ethics vote of May")
    assert approve(north, TRIAGE, "--yes", *words).code == 0
    assert approve(north, OTHER, "--yes").code == 0
    north.charge(asked, 1, committed=False)
    north.charge(other, 1, committed=False)
    said = approve(north, TRIAGE, "--reason", "consent withdrawn", by="deny")
    assert "no further round is charged, and no reply of it leaves" in " ".join(said.printed.split())
    assert reason_of(reserve, north.open(), asked, 2) is Reason.DENIED
    reserve(north.open(), other, 2)
    assert f"waits for approval or has begun: {OTHER}" in approve(north, TRIAGE, "--reason", "x", by="deny").failed()
    ledger = str(north.folder / "ledger.db")
    shown = " ".join(command("ledger", "show", ledger).out.split())
    assert "Anna Weber approved the run as it was proposed: ticket DPO-7; ethics vote of May" in shown
    assert "mkeller denied the run as it was proposed: consent withdrawn" in shown
    runs = command("ledger", "show", ledger).out
    assert all(who in runs for who in ("approved by Anna Weber", "denied by mkeller", "approved by mkeller"))


def test_pausing_and_resuming_say_what_they_do_and_do_it_twice(north: Here) -> None:
    for _ in range(2):
        assert command("site", "pause", *north.kit).printed[:8] == "Paused: "
        assert north.state.paused.exists()
    for _ in range(2):
        assert command("site", "resume", *north.kit).printed == "The site takes part again.\n"
        assert not north.state.paused.exists()


def test_leaving_ends_open_runs_and_frees_what_they_set_aside(north: Here) -> None:
    north.start_run(run_proposal(run="over"), 1)
    north.open().end("over")
    north.start_run(run_proposal(run="open"), 1)
    before = north.open().history
    assert before.set_aside(before.now())
    out = command("site", "leave", *north.words).printed
    assert "north has left cardiology; 1 open run ended" in out
    assert "fedtune provision revoke-site north" in out
    assert str(north.folder / "ledger.db") in out
    ledger = north.open()
    assert not ledger.history.set_aside(ledger.history.now())
    assert ledger.history.epsilon() == before.epsilon()
    assert reason_of(reserve, ledger, run_proposal(run="open"), 2) is Reason.RUN_ENDED
    assert "0 open runs ended" in command("site", "leave", *north.words).printed
    message = command("site", "start", *north.words).failed(1)
    assert message == f"this site has left the federation; remove {north.state.left} to take part again"


def test_another_site_s_policy_is_refused_by_all_who_read_it(joined: Any) -> None:
    north, south = joined("north"), joined("south")
    north.state.wait_for_approval(proposed(), SETTINGS)
    told = f"{south.site_toml}: site = 'south': must be north, as in the kit"
    for words in (("start",), ("approve", "r", "--yes"), ("leave",)):
        assert command("site", *words, *north.kit, "--site", str(south.site_toml)).failed() == told
    assert not (south.folder / "ledger.db").exists()
    assert not north.state.left.exists()


def test_a_kit_of_another_kind_or_none_is_wrong_input(north: Here) -> None:
    lead = north.folder.parent / "federation" / "lead"
    for name in ("start", "approve", "leave", "pause", "resume"):
        site = () if name in ("pause", "resume") else north.words[2:]
        message = command("site", name, "--kit", str(lead), *site).failed()
        assert message == f"{lead / 'kit.toml'}: kind = 'lead': must be 'site' here"
        message = command("site", name, "--kit", str(north.folder / "nowhere"), *site).failed()
        assert "must be the folder of a site's kit" in message
    assert not (lead / "state").exists()


def test_what_a_site_does_not_start_with(joined: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expired certificate, a ledger that another process serves, a key that is gone or open, a missing package."""
    old, north = joined("old", days_ago=400), joined("north")
    told = "is when the certificate expired: ask the lead for a new kit"
    assert told in command("site", "start", *old.words).failed()
    assert not (old.folder / "ledger.db").exists()
    with serving(north.folder / "ledger.db"):
        outcome = command("site", "start", *north.words)
    assert outcome.code == 2
    warning, message = outcome.err.splitlines()
    assert f"is being served by process {os.getpid()} already" in message
    assert json.loads(warning)["event"].startswith("the kit's lead is not among the policy's allow.leads: all its")
    for key in (north.folder / "kit" / "connection_key.pem", north.folder / "site_key.pem"):
        key.chmod(0o640)
        assert f"chmod 600 {key}" in command("site", "start", *north.words).failed()
        key.chmod(0o600)
    north.edit(dataset=(replace(read_policy(north.site_toml).dataset[0], path="records.parquet"),))
    for module, extra, path in (
        ("gguf", "gguf", f"kit/models/{'ab' * 32}/a.gguf"),
        ("pyarrow", "data", "records.parquet"),
    ):
        (north.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (north.folder / path).touch()
        monkeypatch.setitem(sys.modules, module, None)
        assert f"needs {module}: {install_command(extra)}" in command("site", "start", *north.words).failed()
        (north.folder / path).unlink()
    key.unlink()
    assert f"site_key = {str(key)!r}: is missing" in command("site", "start", *north.words).failed()
    assert not key.exists(), "another key would be another site's"


def test_a_site_does_not_start_without_the_ledger_that_it_served(north: Here) -> None:
    north.state.check_ledger(north.open().history.opened.ledger)
    ledger = north.folder / "ledger.db"
    ledger.unlink()
    gone = command("site", "start", *north.words)
    assert gone.code == 1
    assert gone.err.splitlines()[-1].endswith(f"ledger {ledger} is gone, and this site has served one; put it back")
    assert not ledger.exists(), "nor is a new one made"
    north.open()
    another = command("site", "start", *north.words)
    assert (another.code, "put the old one back, or remove" in another.err) == (1, True)

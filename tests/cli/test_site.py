"""`fedtune site`: approval, denial, pausing, policies, and scoring of kept adapters."""

import io
import json
import math
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.cli.run_settings import compose_for_one_site
from fedtune.data.load import read_own_records
from fedtune.extras import build_install_command
from fedtune.formatting import format_key_start
from fedtune.ops.services.site_state import lock_ledger
from fedtune.privacy.accountant import epsilon_pld, format_epsilon
from fedtune.privacy.filter import epsilon_filter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.site_files import SiteFiles
from fedtune.show.budget_text import compute_amount
from fedtune.sites.site_settings import read_site_settings
from fedtune.version import find_config_folder

from ..conftest import edit_config, name_run, read_files, run_command, run_proposal, stranger_key
from ..privacy.builders import read_refusal_reason, reserve
from . import snapshots
from .conftest import Here

SETTINGS = json.dumps({"seed": 3, "training": {"learning_rate": 0.25}, "data": {"labels": ["a[/]", "b"]}})
R, TRIAGE, OTHER = (name_run(run, SETTINGS) for run in ("r", "triage", "other"))
NO_LIMITS = {"limits": {"min_noise_multiplier": 0.0}, "budget": {"max_epsilon": math.inf}}

pytestmark = pytest.mark.usefixtures("own_process")


def propose_run(run: str = "r", **changes: Any) -> Proposal:
    """Return the lead's proposal for a run with these settings."""
    return run_proposal(run=name_run(run, SETTINGS), **changes)


@pytest.fixture
def north(join_site: Any) -> Here:
    return join_site("north")


def test_pending_runs_are_listed_with_their_epsilon(north: Here) -> None:
    assert approve(north, OTHER, "--yes").failed().endswith("must be a run that waits for approval: none")
    north.state.queue_for_approval(propose_run("triage"), SETTINGS)
    message = approve(north, OTHER, "--yes").failed()
    assert message == f"RUN = '{OTHER}': must be a run that waits for approval: {TRIAGE}"
    north.state.queue_for_approval(propose_run("follow-up"), SETTINGS)
    plan = propose_run().plan
    listed = json.loads(approve(north, "--json").out)["waiting"]
    assert {entry["run"] for entry in listed} == {TRIAGE, name_run("follow-up", SETTINGS)}
    assert {entry["epsilon"] for entry in listed} == {epsilon_pld([plan.full_event], plan.delta)}
    assert approve(north, TRIAGE, "--json").code == 2


def test_approval_shows_the_epsilon_and_lets_the_run_start(north: Here) -> None:
    earlier, proposal = propose_run("earlier"), propose_run("triage", spare_rounds=0)
    north.start_run(earlier, 1)
    north.state.queue_for_approval(proposal, SETTINGS)
    assert read_refusal_reason(reserve, north.open(), proposal) is Reason.AWAITING_APPROVAL
    out = approve(north, TRIAGE, "--yes").printed
    ledger = north.open()
    delta, order = proposal.plan.delta, ledger.history.order
    before = epsilon_filter([earlier.plan.full_event], order=order, delta=delta)
    after = epsilon_filter([earlier.plan.full_event, proposal.plan.full_event], order=order, delta=delta)
    assert 0 < before < after < 5
    cost = format_epsilon(epsilon_pld([proposal.plan.full_event], delta))
    assert f"epsilon {cost} at delta 1e-05 for each record, for the whole run" in out
    assert f"epsilon {format_epsilon(before)} is spent, {format_epsilon(after)} with this run" in out
    assert set(ledger.history.approved) == {earlier.digest(), proposal.digest()}
    assert reserve(ledger, proposal)
    assert north.state.list_pending_runs() == []


@pytest.mark.parametrize(
    ("name", "policy", "changes"),
    [
        ("head", {"allow": {"adapters": ("none",), "target_modules": ()}}, {"adapter": "none", "target_modules": ()}),
        ("seeded", {"allow": {"seeded_noise": True}}, {"seeded_noise": True}),
        ("bare", NO_LIMITS, {"noise_multiplier": 0.0}),
    ],
)
def test_check_policy_and_approve_output_match_snapshots(
    north: Here, name: str, policy: Any, changes: Any, monkeypatch: Any
) -> None:
    """A head-only run, and runs without a guarantee, which have no price."""
    monkeypatch.chdir(north.folder)
    north.edit(**policy)
    north.state.queue_for_approval(propose_run(**changes), SETTINGS)
    output = run_command("site", "check-policy", "site.toml").printed
    output += "".join(approve(north, *words).printed for words in ((), (R, "--yes")))
    snapshots.check_output(f"site-approve-{name}", output)


def test_long_settings_are_shown_in_full_for_approval(north: Here) -> None:
    settings = json.dumps({"data": {"labels": [*(f"ordinary subject {n}" for n in range(60)), "is HIV positive"]}})
    north.state.queue_for_approval(run_proposal(run=name_run("r", settings)), settings)
    assert "is HIV positive" in " ".join(approve(north, name_run("r", settings), "--yes").printed.split())


@pytest.mark.parametrize(("typed", "yes"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_approval_requires_an_explicit_yes(north: Here, typed: str, yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    north.state.queue_for_approval(propose_run(), SETTINGS)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    outcome = approve(north, R)
    assert (outcome.code, "not approved: the run still waits" in outcome.err) == ((0, False) if yes else (1, True))
    assert "Approve this run? [y/N]" in outcome.out
    assert bool(north.open().history.approved) is yes
    assert (north.state.list_pending_runs() == []) is yes


def test_run_over_budget_cannot_be_approved_and_stays_pending(north: Here) -> None:
    north.state.queue_for_approval(propose_run(), SETTINGS)
    north.edit(budget={"max_epsilon": 0.5}, limits={"max_rounds": 2})
    outcome = approve(north, R, "--yes")
    assert outcome.failed(3).startswith("the policy or the budget refuses this run: ")
    for reason in ("the lifetime budget would be exceeded", "too many rounds (requested 4, allowed at most 2)"):
        assert reason in outcome.message
    assert "epsilon 0.000 is spent" in outcome.out
    assert len(north.state.list_pending_runs()) == 1
    assert not (north.folder / "ledger.db").exists(), "the check created no ledger"
    north.edit(dataset=(replace(read_policy(north.site_toml).dataset[0], id="others"),))
    assert "the site has no such data set (requested patients" in approve(north, R, "--yes").failed(3)
    (north.folder / "ledger.db").write_bytes(b"no ledger" * 1000)
    assert "the site would refuse to start" in approve(north, R, "--yes").failed(1)


def test_proposals_with_one_run_name_are_approved_separately(north: Here) -> None:
    first, other = propose_run(), propose_run(lead=stranger_key.public)
    north.edit(allow={"leads": (first.lead, other.lead)})
    for proposal in (first, other):
        north.state.queue_for_approval(proposal, SETTINGS)
    message = approve(north, R, "--yes").failed()
    assert "has 2 proposals" in message
    for proposal in (first, other):
        assert f"{proposal.digest()[:12]} (lead {format_key_start(proposal.lead)})" in message
    assert approve(north, other.digest()[:12], "--yes").code == 0
    assert set(north.open().history.approved) == {other.digest()}
    assert [pending.proposal for pending in north.state.list_pending_runs()] == [first]


@pytest.mark.parametrize("name", ["[bold]r[/bold]", "[/]", "a [red]b", "r\\"])
def test_markup_in_a_run_name_is_shown_literally(north: Here, name: str) -> None:
    north.state.queue_for_approval(propose_run(name), SETTINGS)
    assert name in approve(north).out
    assert name in approve(north, name_run(name, SETTINGS), "--yes").printed


def approve(here: Here, *words: str, by: str = "approve") -> Any:
    return run_command("site", by, *words, *here.words)


def test_denial_records_its_reason_and_removes_the_pending_run(north: Here) -> None:
    denied, other = propose_run("triage"), propose_run("other")
    for proposal in (denied, other):
        north.state.queue_for_approval(proposal, SETTINGS)
    for reason in ("", " ", "two\nlines", "x" * 301):
        message = approve(north, TRIAGE, "--reason", reason, by="deny").failed()
        assert "must be one line of at most 300 characters" in message
    assert approve(north, TRIAGE, by="deny").code == 2
    assert len(north.state.list_pending_runs()) == 2
    outcome = approve(north, TRIAGE, "--reason", "not [red] in summer", by="deny")
    assert outcome.printed.startswith("Denied, and recorded in the ledger.")
    assert [pending.proposal for pending in north.state.list_pending_runs()] == [other]
    for proposal, refusal in ((denied, Reason.DENIED), (other, Reason.AWAITING_APPROVAL)):
        assert read_refusal_reason(reserve, north.open(), proposal) is refusal
    shown = " ".join(run_command("ledger", "show", str(north.folder / "ledger.db")).out.split())
    assert "denied the run as it was proposed: not [red] in summer" in shown
    assert not north.open().history.count_total_charges()
    assert approve(north, TRIAGE, "--reason", "again", by="deny").code == 2
    assert approve(north, TRIAGE, "--yes").code == 2


def test_denial_of_a_started_run_records_the_responsible_person(north: Here, monkeypatch: Any) -> None:
    monkeypatch.setenv("SUDO_USER", "mkeller")
    triage, other = propose_run("triage"), propose_run("other")
    for proposal in (triage, other):
        north.state.queue_for_approval(proposal, SETTINGS)
    for option in ("--by", "--ticket", "--reason"):
        assert "must be one line" in approve(north, TRIAGE, "--yes", option, " ").failed()
    options = ("--by", "Anna Weber", "--ticket", "DPO-7", "--reason", "ethics vote of May")
    assert approve(north, TRIAGE, "--yes", *options).code == 0
    assert approve(north, OTHER, "--yes").code == 0
    north.charge(triage, 1, committed=False)
    north.charge(other, 1, committed=False)
    outcome = approve(north, TRIAGE, "--reason", "consent withdrawn", by="deny")
    assert "no further round is charged, and no further reply is sent" in " ".join(outcome.printed.split())
    assert read_refusal_reason(reserve, north.open(), triage, 2) is Reason.DENIED
    reserve(north.open(), other, 2)
    assert f"waits for approval or has begun: {OTHER}" in approve(north, TRIAGE, "--reason", "x", by="deny").failed()
    ledger = str(north.folder / "ledger.db")
    shown = " ".join(run_command("ledger", "show", ledger).out.split())
    assert "Anna Weber approved the run as it was proposed: ticket DPO-7; ethics vote of May" in shown
    assert "mkeller denied the run as it was proposed: consent withdrawn" in shown
    runs = run_command("ledger", "spent", ledger).out
    assert all(entry in runs for entry in ("approved by Anna Weber", "denied by mkeller", "approved by mkeller"))


def test_pause_and_resume_are_idempotent_and_report_the_state(north: Here) -> None:
    for command, message in (("pause", "Paused: "), ("resume", "The site takes part again.\n")):
        for _ in range(2):
            assert run_command("site", command, *north.kit).printed.startswith(message)
            assert north.state.paused_file.exists() is (command == "pause")


def test_leaving_ends_open_runs_and_releases_their_reserves(north: Here) -> None:
    north.start_run(run_proposal(run="over"), 1)
    north.open().end_run("over")
    north.start_run(run_proposal(run="open"), 1)
    before = north.open().history
    assert before.count_remaining_charges(before.now())
    out = run_command("site", "leave", *north.words).printed
    assert "north has left cardiology; 1 open run ended" in out
    assert "fedtune provision revoke-site north" in out
    assert str(north.folder / "ledger.db") in out
    ledger = north.open()
    assert not ledger.history.count_remaining_charges(ledger.history.now())
    assert ledger.history.epsilon() == before.epsilon()
    assert read_refusal_reason(reserve, ledger, run_proposal(run="open"), 2) is Reason.RUN_ENDED
    assert "0 open runs ended" in run_command("site", "leave", *north.words).printed
    message = run_command("site", "start", *north.words).failed(1)
    assert message == f"this site has left the federation; remove {north.state.left_file} to take part again"


def test_site_commands_refuse_the_policy_of_another_site(join_site: Any) -> None:
    north, south = join_site("north"), join_site("south")
    north.state.queue_for_approval(propose_run(), SETTINGS)
    message = f"{south.site_toml}: site = 'south': must be north, as in the kit"
    for words in (("start",), ("approve", "r", "--yes"), ("leave",)):
        assert run_command("site", *words, *north.kit, "--site", str(south.site_toml)).failed() == message
    assert not (south.folder / "ledger.db").exists()
    assert not north.state.left_file.exists()


def test_site_commands_refuse_a_server_or_lead_kit(north: Here) -> None:
    lead = north.folder.parent / "federation" / "lead"
    for name in ("start", "approve", "leave", "pause", "resume"):
        site = () if name in ("pause", "resume") else north.words[2:]
        message = run_command("site", name, "--kit", str(lead), *site).failed()
        assert message == f"{lead / 'kit.toml'}: kind = 'lead': must be 'site', because this command needs a site's kit"
        message = run_command("site", name, "--kit", str(north.folder / "nowhere"), *site).failed()
        assert "must be the folder of a site's kit" in message
    assert not (lead / "state").exists()


def test_site_start_refuses_expired_certificates_and_missing_keys(
    join_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expired certificate, locked ledger, missing or readable key, and missing package."""
    old, north = join_site("old", days_ago=400), join_site("north")
    expired = "must be in the future: the certificate has expired: ask the lead for a new kit"
    assert expired in run_command("site", "start", *old.words).failed()
    assert not (old.folder / "ledger.db").exists()
    with lock_ledger(north.folder / "ledger.db"):
        outcome = run_command("site", "start", *north.words)
    assert outcome.code == 2
    warning, message = outcome.err.splitlines()
    assert f"is already in use by process {os.getpid()};" in message
    assert json.loads(warning)["event"].startswith("the policy's allow.leads does not contain the kit's lead: all its")
    for key in (north.folder / "kit" / "connection_key.pem", north.folder / "site_key.pem"):
        key.chmod(0o640)
        assert f"chmod 600 {key}" in run_command("site", "start", *north.words).failed()
        key.chmod(0o600)
    north.edit(dataset=(replace(read_policy(north.site_toml).dataset[0], path="records.parquet"),))
    gguf = f"kit/models/{'ab' * 32}/a.gguf"
    for module, extra, path in (("gguf", "gguf", gguf), ("pyarrow", "data", "records.parquet")):
        (north.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (north.folder / path).touch()
        monkeypatch.setitem(sys.modules, module, None)
        assert (
            f"requires {module}: {build_install_command(extra)}" in run_command("site", "start", *north.words).failed()
        )
        (north.folder / path).unlink()
    key.unlink()
    assert f"site_key = {str(key)!r}: is missing" in run_command("site", "start", *north.words).failed()
    assert not key.exists(), "no new key is created"


def test_site_start_refuses_a_missing_or_different_ledger(north: Here) -> None:
    north.state.open_ledger(SiteFiles.from_site_toml(north.folder / "site.toml"))
    ledger = north.folder / "ledger.db"
    ledger.unlink()
    missing = run_command("site", "start", *north.words)
    assert missing.code == 1
    bound = "training is not possible without it: restore it from a backup"
    assert missing.err.splitlines()[-1].endswith(f"ledger {ledger} is missing; {bound}")
    assert not ledger.exists(), "no new ledger is created"
    north.open()
    different = run_command("site", "start", *north.words)
    assert (different.code, "restore the old ledger, or remove" in different.err) == (1, True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize(
    ("command", "file", "kind"),
    [
        *(("pause", "kit/state/paused", "folder"), ("resume", "kit/state/paused", "folder")),
        *(("pause", "kit/state", "file"), ("pause", "kit/state", "loop")),
        *(("start", "kit/state/ledger_id", kind) for kind in ("folder", "bytes", "pipe")),
        *(("start", "ledger.db.serving", kind) for kind in ("folder", "pipe")),
    ],
)
def test_unusable_state_file_is_named_in_one_line(north: Here, command: str, file: str, kind: str) -> None:
    path = north.folder / file
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    actions: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "file": path.touch,
        "loop": lambda: path.symlink_to(path),
        "bytes": lambda: path.write_bytes(b"\xff"),
        "pipe": lambda: os.mkfifo(path),
    }
    north.open()
    actions[kind]()
    outcome = run_command("site", command, *(north.words if command == "start" else north.kit))
    assert outcome.code == (1 if kind == "bytes" else 2)
    assert str(path) in outcome.err.splitlines()[-1]


def list_keys(table: Any, prefix: str = "") -> set[str]:
    if isinstance(table, list | tuple) and table and isinstance(table[0], dict):
        return list_keys(table[0], prefix)
    if not isinstance(table, dict) or prefix in ("dataset.columns.", "trust.members."):
        return {prefix.removesuffix(".")}
    return {leaf for name, value in table.items() for leaf in list_keys(value, f"{prefix}{name}.")}


def test_policy_template_is_commented_and_incomplete_until_filled_in(tmp_path: Path) -> None:
    out, file = run_command("site", "template").printed, tmp_path / "site.toml"
    assert out == (find_config_folder() / "site.toml").read_text(encoding="utf-8")
    file.write_text(out)
    fresh = run_command("site", "check-policy", str(file), "--json")
    unanswered = {"asserted.no_person_at_another_site", "allow.leads", "allow.base_models"}
    assert (fresh.code, {one["key"] for one in json.loads(fresh.out)["warnings"]}) == (0, unanswered)
    answered = out.replace("# no_person_at_another_site = ?", "no_person_at_another_site = true")
    file.write_text(answered)
    assert read_policy(file).site == "north-hospital"
    entries = json.loads(run_command("site", "check-policy", str(file), "--json").out)["warnings"]
    warnings = {warning["key"]: warning["text"] for warning in entries}
    assert warnings.keys() == {"allow.leads", "allow.base_models"}
    assert warnings["allow.leads"] == "empty: every request is refused"
    # The template sets and explains every key.
    parsed = asdict(read_policy(file)) | asdict(read_site_settings(file))
    assert list_keys(tomllib.loads(answered)) == list_keys(parsed)
    for before, line in pairwise(out.splitlines()):
        commented = re.match(r"#|(max_local_steps|path|max_epsilon_per_period|max_lora_scale) = ", before)
        assert commented or not re.match(r"\w+ = ", line), line


@pytest.mark.parametrize("words", [("init", "--site"), ("doctor", "--kit", "kit", "--site")])
def test_only_check_policy_accepts_an_incomplete_policy(words: tuple[str, ...], site: Any) -> None:
    site.write_policy(no_person_at_another_site=None)
    outcome = run_command("site", *words, str(site.site_toml))
    output = " ".join((outcome.out + outcome.err).split())
    assert outcome.code == 2
    assert re.search(r"asserted.no_person_at_another_site:? must be true", output)
    assert not (site.folder / "kit").exists()


def test_a_site_composes_a_run_over_real_sites_with_its_own_declared_size(site: Any) -> None:
    """Declared sizes in the experiment apply only to simulated sites."""
    policy = read_policy(site.site_toml)
    words = ["experiment=hospitals_abstracts", "sites=[north,south]", f"data.dataset={policy.dataset[0].id}"]
    size = policy.dataset[0].declared_size
    assert compose_for_one_site(words, policy).declared_sizes() == {"north": size, "south": size}
    assert compose_for_one_site([*words, "data.declared_sizes=[5,6]"], policy).declared_sizes()["south"] == 6


def test_check_policy_figures_match_the_ledger(site: Any) -> None:
    reference = read_policy(site.site_toml).budget.reference
    amount = json.loads(run_command("site", "check-policy", str(site.site_toml), "--json").out)["amount"]
    assert amount["reference_pld"] == epsilon_pld([reference.event], 1e-5)
    assert site.open().history.order == amount["order"]
    figures = json.loads(run_command("ledger", "spent", str(site.ledger), "--json").out)
    assert figures["reference_runs_in_lifetime"] == amount["runs_in_lifetime"]
    assert figures["reference_remaining_runs"] == amount["runs_in_period"]
    assert asdict(compute_amount(read_policy(site.site_toml))) == amount


@snapshots.parametrize_mistakes("site-warnings")
def test_check_policy_warns_about_risky_settings(typed: str, site: Any) -> None:
    site.write_policy(**{"anchor": '"elsewhere/anchor.json"', **json.loads(typed)})  # this anchor causes no warning
    out = run_command("site", "check-policy", str(site.site_toml), "--json").printed
    (warning,) = json.loads(out)["warnings"]
    snapshots.check_message("site-warnings", typed, f"{warning['key']}: {warning['text']}")


def test_placeholder_lead_key_is_refused_at_start(site: Any) -> None:
    # The all-zero key is a point of small order: anybody can make signatures that verify under it.
    site.write_policy(leads=f'["{"0" * 64}"]')
    outcome = run_command("site", "check-policy", str(site.site_toml))
    assert outcome.code == 2 or "anybody can sign for it" in outcome.out


@snapshots.parametrize_mistakes("site-ledgers")
def test_check_policy_refuses_a_ledger_of_another_site_or_policy(typed: str, site_with_history: Any) -> None:
    site_with_history.write_policy(**json.loads(typed))
    outcome = run_command("site", "check-policy", str(site_with_history.site_toml))
    message = outcome.failed().removeprefix(f"{site_with_history.site_toml}: ")
    snapshots.check_message("site-ledgers", typed, message)
    assert "It does not match this policy" in outcome.out
    ledger = json.loads(run_command("site", "check-policy", str(site_with_history.site_toml), "--json").out)["ledger"]
    assert [difference["key"] for difference in ledger["differences"]] == [message.partition(" = ")[0]]


def test_check_policy_refuses_a_wrong_site_key(site_with_history: Any) -> None:
    key = site_with_history.folder / "site_key.pem"
    shutil.copy(site_with_history.folder / "lead.pem", key)
    assert "site_key" in run_command("site", "check-policy", str(site_with_history.site_toml)).failed()
    for path in (site_with_history.anchor, key):
        path.unlink()
    listed = json.loads(run_command("site", "check-policy", str(site_with_history.site_toml), "--json").out)["warnings"]
    assert {warning["key"] for warning in listed} == {"site_key", "anchor"}


def test_check_policy_fails_for_a_rolled_back_ledger(put_back: Any) -> None:
    assert "rolled back to an older copy" in run_command("site", "check-policy", str(put_back.site_toml)).failed(1)


@pytest.fixture
def site_here(join_site: Any, finished_run: Path) -> Any:
    """A site with the final adapter of run `first`, records of two wards, and unusable records."""
    site = join_site("north")
    labels = yaml.safe_load((finished_run / "config.yaml").read_text())["data"]["labels"]
    rows = [
        {"text": f"my card number {number} is late", "label": labels[number % 2], "ward": f"w{number % 3 // 2}"}
        for number in range(120)
    ]
    unusable = ['{"text": 3, "label": "none"}', "no JSON at all", json.dumps({"text": "x", "label": "no such label"})]
    (site.folder / "letters.jsonl").write_text("\n".join([*map(json.dumps, rows), *unusable]) + "\n")
    adapter = site.folder / "kit" / "adapters" / "first"
    shutil.copytree(finished_run, adapter, ignore=shutil.ignore_patterns("run.json", "report*", "checkpoints", "sites"))
    edit_config(adapter, data={"train_file": str(site.folder / "letters.jsonl"), "heldout_fraction": 0.5})
    return site


def test_site_score_uses_the_held_out_records_of_the_site(site_here: Any) -> None:
    before = read_files(site_here.folder)
    out = run_command("site", "score", "first", *site_here.words, "--by", "ward", "--smallest", "10", "--json").printed
    result = json.loads(out)
    from fedtune.config import read_saved_config
    from fedtune.tasks.registry import get_task

    key = SigningKey.load(site_here.folder / "site_key.pem").derive_secret("held-out split")
    data = read_saved_config(site_here.folder / "kit" / "adapters" / "first").data
    fault = get_task("classification").record_validator(data)
    expected = read_own_records(data, columns=dict(data.columns), fault=fault, key=key).heldout
    assert result["records"] == len(expected) > 30
    assert [model["name"] for model in result["models"]] == ["base", "tuned"]
    groups = result["groups"]["by ward"]["groups"]
    assert {group["name"] for group in groups} == {"w0", "w1"}
    assert sum(group["units"] for group in groups) == len(expected)
    assert read_files(site_here.folder) == before, "nothing is charged, and nothing is written"
    # Terminal output.
    out = run_command("site", "score", "first", *site_here.words).printed
    assert "Tuned " in out
    assert "Cost" not in out, "the site has no run.json"


def test_score_without_adapter_or_held_out_records_is_refused(site_here: Any) -> None:
    assert (
        'is stored here (final_adapter = "keep"): first'
        in run_command("site", "score", "second", *site_here.words).failed()
    )
    edit_config(site_here.folder / "kit" / "adapters" / "first", data={"heldout_fraction": 0.0})
    assert run_command("site", "score", "first", *site_here.words).failed().split(":")[0] == "data.heldout_fraction = 0"
    assert run_command("site", "score", "first", *site_here.words, "--smallest", "3").code == 2


@pytest.mark.nightly
def test_personalized_adapter_is_created_at_the_site(site_here: Any) -> None:
    before = read_files(site_here.folder)
    out = run_command("site", "personalize", "first", *site_here.words, "--json").printed
    result = json.loads(out)["sites"]["north"]
    folder = site_here.folder / "kit" / "private_to_north" / "first"
    assert (result["folder"], set(result["values"])) == (str(folder), {"base", "alone", "shared", "own"})
    assert result["scored_records_were_trained_on"] is False
    record = json.loads((site_here.folder / "own_adapters.json").read_text())
    assert [set(entry) for entry in record] == [{"run", "made"}], "no digest, no score"
    after = read_files(site_here.folder)
    assert {name: after[name] for name in before} == before, "the ledger and the stored adapter do not change"
    repeated = run_command("site", "personalize", "first", *site_here.words, "--json")
    assert json.loads(repeated.out) == {**json.loads(out)}, "the same records give the same adapter"

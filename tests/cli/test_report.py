"""`fedtune report`: complete reports, and detection of changes by `fedtune report verify`."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.report import format_verdict
from fedtune.config import AboutSpec
from fedtune.formatting import group_hex
from fedtune.ops.kits.members import Roster
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.report import from_ledger, signing
from fedtune.report.facts import BudgetVerdict
from fedtune.report.model import Report
from fedtune.report.page.translations import load_catalog
from fedtune.report.verify_report import derive_report
from fedtune.spec import REPORT_SCHEMA

from ..conftest import edit_config, parse_command, run_command, run_proposal, simulate
from ..privacy.builders import stranger_key as other
from . import snapshots

HASH = "0123456789abcdef" * 4
_EPSILON = ("sites", 0, "spent", "epsilon_pld")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lead") / "lead_key.pem"
    SigningKey.load_or_create(path)
    return path


@pytest.fixture
def signed_run(run_folder: Path, key_file: Path) -> Path:
    """Run folder with a signed report, settings, model and model card."""
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    return run_folder / "report.json"


def report_in(folder: Path) -> Report:
    return signing.parse_report((folder / "report.json").read_bytes())


def edit_json_value(path: Path, *keys: Any, to: Any) -> None:
    """Change a value in a JSON file."""
    data = json.loads(path.read_text())
    part = data
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to(part[keys[-1]]) if callable(to) else to
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")  # as fedtune writes it


@pytest.mark.parametrize("arguments", ["runs/a", "build runs/a", "./verify", "--pdf runs/a"])
def test_report_build_subcommand_may_be_omitted(arguments: str) -> None:
    parsed = parse_command("report", *arguments.split())
    assert (str(parsed["path"]), parsed["pdf"]) == (arguments.split()[-1].removeprefix("./"), "--pdf" in arguments)


@pytest.mark.parametrize(
    ("kind", "state", "expected"),
    [
        ("run", "within", "The lead's limit for this run was kept: "),
        ("ledger", "within", "The site's own limit for all runs was kept: "),
        ("run", "exceeded", "EXCEEDED: the privacy loss is above a limit (x): "),
        ("ledger", "exceeded", "EXCEEDED: the privacy loss is above a limit (x): "),
        ("run", "no_guarantee", "NO GUARANTEE (x): "),
    ],
)
def test_verdict_line_matches_the_text_of_the_page(
    kind: str, state: Any, expected: str, run_folder: Path, site_with_history: Any
) -> None:
    report = report_in(run_folder) if kind == "run" else from_ledger.build_ledger_report(site_with_history.ledger)
    verdict = BudgetVerdict(state=state, reasons=() if state == "within" else ("x",))
    assert format_verdict(replace(report, verdict=verdict))[0].startswith(expected)


def test_report_of_a_run_is_written_to_its_folder(run_folder: Path) -> None:
    for name in ("report.json", "report.html"):
        (run_folder / name).unlink(missing_ok=True)
    banner, verdict, two_figures, *paths = run_command("report", str(run_folder)).printed.splitlines()
    assert banner == load_catalog("en").texts["banner"]["simulation"]
    assert verdict.startswith("The lead's limit for this run was kept: epsilon 0.")
    assert "at delta 1e-05 for each record" in verdict
    assert two_figures == load_catalog("en").texts["publish"]["which_run"]
    assert [line.split()[-1] for line in paths] == [f"{run_folder}/report.{ending}" for ending in ("json", "html")]
    digest = hashlib.sha256((run_folder / "report.json").read_bytes()).hexdigest()
    assert digest in (run_folder / "report.html").read_text()
    assert report_in(run_folder).facts.kind == "run"
    assert not list(run_folder.glob("*.partial"))


def test_registry_entry_lists_fields_for_manual_completion(run_folder: Path, tmp_path: Path) -> None:
    out = run_command("report", str(run_folder), "--registry", "--output", str(tmp_path / "before")).printed
    assert "lacks entries that only a person can provide in report.about: curator" in " ".join(out.split())
    folder = shutil.copytree(run_folder, tmp_path / "run")
    edit_config(folder, report={"about": asdict(AboutSpec(curator="Hospital of the North"))})
    assert run_command("report", str(folder), "--registry").code == 0
    entry = json.loads((folder / "registry.json").read_text())
    assert entry["curator"] == "Hospital of the North"
    assert "curator" not in entry["missing"]
    assert entry["report_sha256"] == hashlib.sha256((folder / "report.json").read_bytes()).hexdigest()
    assert entry["privacy"]["result"] == "within", "the configuration has not changed since the run"


def test_registry_fields_of_a_site_come_from_its_policy(site_with_history: Any, tmp_path: Path) -> None:
    policy = read_policy(site_with_history.site_toml)
    write_policy(policy, site_with_history.site_toml, others={"about": {"curator": "Hospital of the North"}})
    assert read_policy(site_with_history.site_toml).digest() == policy.digest()
    out = run_command("report", str(site_with_history.site_toml), "--registry", "--output", str(tmp_path)).printed
    entry = json.loads((tmp_path / "registry.json").read_text())
    assert (entry["curator"], "sector" in entry["missing"]) == ("Hospital of the North", True)
    assert "in [about] of site.toml: description" in " ".join(out.split())
    assumptions = json.loads((tmp_path / "report.json").read_text())["assumptions"]
    assert not any(item["code"] == "policy_noted" and item["status"] == "violated" for item in assumptions)


def test_report_is_reproducible_and_changes_to_page_or_label_are_detected(run_folder: Path, tmp_path: Path) -> None:
    a, b, names = tmp_path / "a", tmp_path / "b", {"label.svg", "report.html", "report.json"}
    for folder in (a, b):
        words = ("--label", "--language", "de", "--output", str(folder))
        assert f"label.svg:   {folder / 'label.svg'}" in run_command("report", str(run_folder), *words).printed
        assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert 'lang="de"' in (a / "report.html").read_text()
    label = (a / "label.svg").read_text()
    assert "Datenschutz-Etikett" in label
    assert hashlib.sha256((a / "report.json").read_bytes()).hexdigest() in label
    # A changed page or label is detected.
    assert run_command("report", "verify", str(a)).code == 0
    for name in ("report.html", "label.svg"):
        (a / name).write_text((a / name).read_text().replace("0", "1"))
        assert name in run_command("report", "verify", str(a)).failed(1)
        shutil.copy(b / name, a)


def test_ledger_report_is_signed_by_its_site_or_fails_verification(site_with_history: Any, key_file: Path) -> None:
    before, folder = site_with_history.ledger.read_bytes(), site_with_history.folder / "ledger.db.report"
    site_key, key = ("--sign", str(site_with_history.folder / "site_key.pem")), ("--key", site_with_history.key.public)
    assert f"not by {site_with_history.key.public}" in run_command(
        "report", str(site_with_history.ledger), "--sign", str(key_file)
    ).failed(1)
    assert not folder.exists()
    for path, sign in (
        (site_with_history.ledger, ()),
        (site_with_history.folder, ()),
        (site_with_history.site_toml, site_key),
        (site_with_history.ledger, site_key),
    ):
        anchor = ("--anchor", str(site_with_history.anchor)) if path == site_with_history.ledger and sign else ()
        assert run_command("report", str(path), *anchor, *sign).code == 0
        report = report_in(folder)
        assert (report.facts.kind, report.sites[0].source) == ("ledger", "own_ledger")
        assert report.facts.verification.rollback_excluded is bool(sign), "only with an anchor"
        outcome = run_command("report", "verify", str(folder), *(key if sign else ()))
        assert (outcome.code == 0) == bool(sign), "an unsigned ledger report proves nothing"
    assert site_with_history.ledger.read_bytes() == before


@snapshots.parametrize_mistakes("mistakes-report")
def test_invalid_report_command_is_refused(typed: str, run_folder: Path, site_with_history: Any) -> None:
    words = typed.replace("RUN", str(run_folder)).replace("LEDGER", str(site_with_history.ledger)).split()
    message = run_command("report", *words).failed()
    snapshots.check_message("mistakes-report", typed, message.replace(str(run_folder), "RUN"))


def test_missing_or_changed_signature_is_reported(signed_run: Path, key_file: Path) -> None:
    key, report = SigningKey.load(key_file).public, signing.parse_report(signed_run.read_bytes())
    verify = ("report", "verify", str(signed_run))
    assert run_command(*verify, "--key", key).code == 0
    expected = f"The signature matches the key in the file, {group_hex(key)}, but this key was not checked"
    assert re.search(f"signature +not checked +{expected}", " ".join(run_command(*verify).printed.split()))
    for name in ("report.html", "adapter/README.md", "adapter/label.svg"):
        (signed_run.parent / name).unlink()
    edit_json_value(signed_run, "signature", to=None)
    assert re.search("signature +not checked +The report is not signed", run_command(*verify).printed)
    assert run_command(*verify, "--key", key).code == 1
    signed_run.write_text(signing.report_to_json(signing.sign_report(report, other)))
    assert run_command(*verify).code == 0  # the expected key is not given
    outcome = run_command(*verify, "--key", key)
    assert (outcome.code, f"The report is signed by {other.public}" in outcome.out) == (1, True)
    edit_json_value(
        signed_run, "signature", "signature", to=lambda text: text[:-2] + ("00" if text[-2:] != "00" else "01")
    )
    assert "the report or the signature was changed" in run_command(*verify).out


@pytest.mark.parametrize(("signature", "state"), [("signed", "failed"), ("unsigned", "skipped")])
def test_changed_figures_are_reported_by_verify(signature: str, state: str, signed_run: Path) -> None:
    edit_json_value(signed_run, *_EPSILON, to=0.25)
    if signature == "unsigned":
        edit_json_value(signed_run, "signature", to=None)
    outcome = run_command("report", "verify", str(signed_run))
    assert "does not hold" in outcome.failed(1)
    assert "found" in outcome.out  # the message names both figures
    checks = {
        one["name"]: one for one in json.loads(run_command("report", "verify", str(signed_run), "--json").out)["checks"]
    }
    states = {"schema": "passed", "signature": state, "figures": "failed", "verdict": "passed"}
    states |= {"site keys": "skipped", "configuration": "passed", "files": "passed"}
    assert {name: check["state"] for name, check in checks.items()} == states
    key, reported, recomputed = checks["figures"]["problems"][0]
    assert (key, reported) == ("sites.site-1.spent.epsilon_pld", 0.25)
    assert recomputed > 0.25


def test_report_with_another_configuration_is_reported(signed_run: Path, looser_run: Path, tmp_path: Path) -> None:
    other_run = shutil.copytree(looser_run, tmp_path / "two")
    shutil.copy(signed_run, other_run)
    assert run_command("report", "verify", str(other_run)).failed(1).endswith("does not hold: configuration, files")
    digest = signing.parse_report(signed_run.read_bytes()).facts.provenance.config_sha256
    assert digest
    assert run_command("report", "verify", str(signed_run), "--config", digest).code == 0
    outcome = run_command("report", "verify", str(signed_run), "--config", HASH)
    assert outcome.code == 1
    assert f"provenance.config_sha256 is {digest}, but {HASH} was found" in outcome.out
    settings = signed_run.with_name("config.yaml")
    settings.write_text(settings.read_text().replace("local_steps: 2", "local_steps: 3"))
    assert run_command("report", "verify", str(signed_run)).code == 1
    settings.unlink()
    assert re.search("configuration +not checked", run_command("report", "verify", str(signed_run)).printed)


def test_report_is_verified_with_the_roster_key(
    join_site: Any, signed_run: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report with a raised cap that is signed with another key is refused."""
    here = join_site("a")
    here.start_run(run_proposal(), 1)
    assert run_command("report", str(here.site_toml), "--sign", str(here.folder / "site_key.pem")).code == 0
    path = next(here.folder.rglob("report.json"))
    report = signing.parse_report(path.read_bytes())
    command = signing.format_verify_command(report)
    assert f"<code>{command}</code>" in path.with_name("report.html").read_text()
    words = [group_hex(report.signature.key) if word == "KEY" else word for word in command.split()[1:]]
    monkeypatch.chdir(path.parent)
    assert run_command(*words).code == 0
    roster = next(here.folder.parent.joinpath("federation").rglob("roster.json"))
    by_roster = ("--roster", str(roster))
    assert re.search("signature +passed", run_command("report", "verify", str(path), *by_roster).out)
    report = signing.parse_report(path.read_bytes())
    facts = report.facts
    verification = replace(facts.verification, site_key=other.public)
    forged = replace(facts, approved=replace(facts.approved, max_epsilon_per_run=99.0), verification=verification)
    path.write_text(signing.report_to_json(signing.sign_report(derive_report(forged), other)))
    path.with_name("report.html").unlink()
    assert (
        run_command("report", "verify", str(path))
        .failed(1)
        .endswith("could not be checked completely; not compared: signature")
    )
    outcome = run_command("report", "verify", str(path), *by_roster)
    assert outcome.code == 1
    assert re.search("signature +FAILED", outcome.out)
    message = run_command("report", "verify", str(signed_run), *by_roster).failed(1)
    assert "not signed with the key of the lead that signed" in message
    roster.write_bytes(Roster.read(roster).sign_roster(SigningKey.load(key_file)).to_bytes())
    outcome = run_command("report", "verify", str(signed_run), *by_roster)
    assert re.search("signature +passed", outcome.out)
    assert outcome.failed(1).endswith("not compared: site keys"), "a roster does not list a simulation's site keys"


def test_report_name_cannot_inject_terminal_control_sequences(signed_run: Path) -> None:
    edit_json_value(signed_run, "facts", "name", to="\x1b[31m[red]evil\u202e\n")
    edit_json_value(signed_run, "facts", "provenance", "config_sha256", to="[bold]\x1b[2J")
    out = run_command("report", "verify", str(signed_run)).out
    assert "[red]evil" in out
    assert "[bold]" in out
    assert "\x1b" not in out
    assert "\u202e" not in out


@pytest.fixture(scope="module")
def looser_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = ("privacy.noise_multiplier=3.0", "training.learning_rate=0.5")
    return simulate(*overrides, into=tmp_path_factory.mktemp("runs"), name="two")


@pytest.mark.usefixtures("narrow_terminal")
def test_report_tables_fit_the_terminal_width(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder.parent)
    for arguments in (["verify", "one"], ["one", "--registry"]):
        assert snapshots.find_wide_lines(run_command("report", *arguments).out) == []


def test_malformed_report_files_are_refused(run_folder: Path, tmp_path: Path) -> None:
    report, path = (run_folder / "report.json").read_text(), tmp_path / "a.json"
    for content, message in (
        (None, "must be a report.json, or a folder with one"),
        ("{}", f"schema_version = 'absent': does not match report schema version {REPORT_SCHEMA}"),
        ("[1]", f"report = 'another value': does not match report schema version {REPORT_SCHEMA}"),
        ('{\n"a', "report = 'text that is not JSON from line 2 on': must be a complete report.json"),
        ("[" * 100_000, "report = 'not JSON in UTF-8': must be a complete report.json"),
        (report.replace('"rounds": 2', f'"rounds": {"9" * 4200}', 1), "at most 19 digits"),
        ("sparse", "at most 64 MiB"),
    ):
        if content is None:
            os.mkfifo(tmp_path / "pipe")
        else:
            path.write_text(content)
        if content == "sparse":
            os.truncate(path, 20 << 30)
        for file in (path,) if content else (path, tmp_path / "pipe"):
            assert message in run_command("report", "verify", str(file)).failed()


def test_standalone_verifier_runs_without_fedtune(run_folder: Path, tmp_path: Path) -> None:
    assert run_command("report", str(run_folder), "--verifier").code == 0
    program = run_folder / "verify_report.py"
    text = program.read_text()
    assert len(text.splitlines()) <= 700
    assert not re.search(r"^\s*(from|import) fedtune", text, re.MULTILINE)
    blocked = tmp_path / "fedtune.py"
    blocked.write_text("raise ImportError('fedtune')")
    words = [sys.executable, "-P", str(program), str(run_folder)]
    result = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=False)
    assert (result.returncode, result.stdout.split()[:2]) == (0, ["HOLDS", "within:"]), result.stdout + result.stderr


def test_registry_entry_and_model_card_are_compared_with_the_report(
    run_folder: Path, looser_run: Path, tmp_path: Path
) -> None:
    assert run_command("report", str(run_folder), "--registry").code == 0
    assert run_command("report", "verify", str(run_folder)).code == 0
    for name in ("registry.json", "adapter/README.md"):
        path = run_folder / name
        original = path.read_bytes()
        path.write_bytes(original.replace(b"simulat", b"deploy"))
        assert run_command("report", "verify", str(run_folder)).failed(1).endswith(f"does not hold: {name}")
        path.write_bytes(original)
    copy = shutil.copytree(run_folder / "adapter", tmp_path / "model")
    assert run_command("report", "verify", str(run_folder), "--model", str(copy)).code == 0
    other = ("report", "verify", str(run_folder), "--model", str(looser_run / "adapter"))
    assert run_command(*other).failed(1).endswith("does not hold: files")

"""`fedtune attack` on a finished run: output, files and refusals."""

import json
from dataclasses import replace
from pathlib import Path

from markupsafe import escape

from fedtune.codec import decode
from fedtune.config import read_saved_config
from fedtune.report import signing
from fedtune.report.attacks import NAMES, AttackFinding, RunAttacks, read_findings
from fedtune.report.facts import RunFacts
from fedtune.report.verify_report import problems

from ..conftest import run_command, simulate


def test_attack_runs_all_attacks_and_writes_page_and_json(run_folder: Path) -> None:
    others = read_saved_config(run_folder).data.test_file
    outcome = run_command("attack", str(run_folder), "--others", str(others), "--shadows", "4", "--json")
    assert outcome.code == 0, outcome.err
    fields = json.loads((run_folder / "attack.json").read_text())
    attacks = decode(RunAttacks, {key: value for key, value in fields.items() if key != "schema_version"})
    assert tuple(dict.fromkeys(finding.attack for finding in attacks.findings)) == NAMES
    assert json.loads(outcome.printed)["result"]["adapter_sha256"] == attacks.adapter_sha256
    membership, site, identified, reconstruction, extraction, attribute = attacks.findings
    assert membership.low is not None
    assert membership.ceiling is not None
    assert membership.low <= membership.ceiling
    assert "never protected" in site.sentence
    assert identified.figures is not None
    assert (identified.figures["picked without clipping and noise"] or 0) > 0.9, "but truncated duplicates"
    assert None not in (identified.low, identified.strength, identified.ceiling)
    assert identified.low <= identified.ceiling < 0.1, "noise of 4 hides the record in a step"  # type: ignore[operator]
    assert reconstruction.ceiling is not None
    assert (extraction.applies, "generates no text" in extraction.sentence) == (False, True)
    assert attribute.low is not None
    assert outcome.err.startswith("scoring ")
    page = (run_folder / "attack.html").read_text()
    assert "records identified in one noisy step" in page


def test_report_and_gate_take_the_attacks_on_this_model_alone(run_folder: Path, tmp_path: Path) -> None:
    others, rules = str(read_saved_config(run_folder).data.test_file), tmp_path / "rules.toml"
    limits = (
        "max_membership_auroc = 1.0",
        "max_reconstruction_advantage = 0.1",
        "max_extraction_advantage = 0.0",
        "max_attribute_advantage = 1.0",
    )
    rules.write_text("\n".join(['name = "attacked"', *limits]))
    message = run_command("gate", str(run_folder), str(rules)).failed(1)
    assert message.endswith(f"these rules fail: {', '.join(limit.split(' ')[0] for limit in limits)}")
    assert run_command("attack", str(run_folder), "--others", others, "--shadows", "2").code == 0
    assert run_command("report", str(run_folder)).code == 0
    report = signing.read_report(str(run_folder))[1]
    assert isinstance(report.facts, RunFacts)
    assert report.facts.attacks is not None
    assert "attack_on_real_records" in report.unprotected_figures
    page = (run_folder / "report.html").read_text()
    for finding in report.facts.attacks.findings:
        assert escape(finding.sentence) in page
    assert "all rules hold" in run_command("gate", str(run_folder), str(rules)).failed(1)
    assert run_command("report", "verify", str(run_folder)).code == 0
    assert read_findings(run_folder, "00") is None
    other = replace(report, facts=replace(report.facts, attacks=replace(report.facts.attacks, adapter_sha256="00")))
    assert [problem.where for problem in problems(other)] == ["attacks.adapter_sha256"]
    (run_folder / "attack.json").write_text("{}")
    assert "run fedtune attack again" in run_command("report", str(run_folder)).failed(1)


def test_attack_refuses_small_groups_and_missing_secrets(run_folder: Path, tmp_path: Path) -> None:
    assert "must have at least 20 records" in run_command("attack", str(run_folder)).failed()
    secrets = tmp_path / "planted.jsonl"
    secrets.write_text('{"text": "my code", "label": "card_arrival", "secret": "1234"}\n')
    others = str(read_saved_config(run_folder).data.test_file)
    message = run_command("attack", str(run_folder), "--others", others, "--secrets", str(secrets)).failed()
    assert "must occur in one of the record's texts" in message
    assert not (run_folder / "attack.json").exists()


def test_extraction_from_a_language_model_tries_planted_secrets(tmp_path: Path) -> None:
    model = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.declared_sizes=40", "data.max_length=64")
    run = simulate(*model, "federation.num_rounds=1", into=tmp_path, name="tables")
    secrets = tmp_path / "planted.jsonl"
    secrets.write_text(json.dumps({"mr": "name[Eagle]", "ref": "the code is 4711", "secret": "4711"}) + "\n")
    others = str(read_saved_config(run).data.test_file)
    outcome = run_command("attack", str(run), "--others", others, "--secrets", str(secrets), "--json")
    assert outcome.code == 0, outcome.err
    findings = [decode(AttackFinding, finding) for finding in json.loads(outcome.printed)["result"]["findings"]]
    by_measure = {finding.measure: finding for finding in findings if finding.attack == "extraction"}
    assert set(by_measure) == {"exposed_secrets", "written_secrets", "written_answers"}
    written = by_measure["written_secrets"]
    assert (written.strength, written.guessing) == (0, 0), "random weights know no secret"
    assert "generates 0 of 1 secrets" in written.sentence

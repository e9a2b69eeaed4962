"""`fedtune gate` on a run folder: defective files, the decision in the model card, and exit codes."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.ops.kits.members import Roster
from fedtune.privacy.keys import SigningKey
from fedtune.report import signing
from fedtune.report.facts import Audit, AuditBound
from fedtune.report.from_run import build_run_report
from fedtune.report.gate_verdict import GateVerdict, read_verdict
from fedtune.spec import RUN_SCHEMA

from ..conftest import Outcome, edit_config, edit_json, run_command

RULES = """\
name = "own"
record = true
files = true
ledgers = true
finished = true
guarantee = true
max_epsilon = 1.0
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    SigningKey.load_or_create(path := tmp_path / "lead_key.pem")
    return path


def judge(folder: Path, rules: Path, *words: str) -> Outcome:
    return run_command("gate", str(folder), str(rules), *words)


def verdict_in(folder: Path) -> GateVerdict:
    verdict = read_verdict(folder, build_run_report(folder).facts)  # type: ignore[arg-type]
    assert verdict is not None
    return verdict


def card_in(folder: Path) -> str:
    return (folder / "adapter" / "README.md").read_text()


def change_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def change_event(folder: Path) -> None:
    ledger = next((folder / "sites").glob("*/ledger.db"))
    with sqlite3.connect(ledger) as file:
        for (trigger,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            file.execute(f"DROP TRIGGER {trigger}")
        file.execute("UPDATE events SET detail = replace(detail, '1', '2') WHERE sequence = 3")
    file.close()


def change_scores(folder: Path) -> None:
    final = json.loads((folder / "run.json").read_text())["final"]
    edit_json(folder / "run.json", final={**final, "metrics": {**final["metrics"], "accuracy": 0.99}})


def change_digit(folder: Path) -> None:
    text = (folder / "report.json").read_text()
    assert '"epsilon": 0.' in text
    (folder / "report.json").write_text(text.replace('"epsilon": 0.', '"epsilon": 0.0', 1))


def write_report(folder: Path) -> None:
    assert run_command("report", str(folder)).code == 0


def replace_weights(folder: Path) -> None:
    """Change the last value of the adapter, and let fedtune write a report that lists the changed file."""
    change_byte(folder / "adapter" / "adapter_model.safetensors")
    write_report(folder)


def reverse_labels(folder: Path) -> None:
    """Reverse the labels in the adapter's settings, and let fedtune write a report that lists the changed file."""
    settings = folder / "adapter" / "fedtune.json"
    edit_json(settings, labels=json.loads(settings.read_text())["labels"][::-1])
    write_report(folder)


def reverse_labels_in_all_records(folder: Path) -> None:
    reverse_labels(folder)
    edit_json(folder / "run.json", adapter_digest=compute_adapter_digest(folder / "adapter"))
    write_report(folder)


def claim_old_weights(folder: Path) -> None:
    """Let exports.json name the adapter's files with the hashes that the report lists, and change the weights."""
    files = build_run_report(folder).facts.files  # type: ignore[union-attr]
    (folder / "exports.json").write_text(json.dumps(dict(files)))
    replace_weights(folder)


def add_note(folder: Path) -> None:
    (folder / "adapter" / "notes").mkdir()
    (folder / "adapter" / "notes" / "README.md").write_bytes(b"records")


def write_into_label(folder: Path) -> None:
    (folder / "adapter" / "README.md").unlink()
    (folder / "adapter" / "label.svg").write_bytes(b"records")


def link_adapter(folder: Path) -> None:
    (folder / "adapter").rename(elsewhere := folder.parent / "elsewhere")
    (folder / "adapter").symlink_to(elsewhere)


def lose_receipts(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    write_report(folder)


def hide_audit(folder: Path) -> None:
    """Leave the results of an audit, whose canaries AUDIT.txt would name."""
    write_audit(folder, right=60)
    write_report(folder)


def leave_out_sites(folder: Path) -> None:
    edit_json(folder / "report.json", facts={**json.loads((folder / "report.json").read_text())["facts"], "sites": []})


DEFECTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "weights of another run": ("files", replace_weights),
    "weights under old hashes": ("files", claim_old_weights),
    "other order of labels": ("files", reverse_labels),
    "other order of labels in all records": ("files", reverse_labels_in_all_records),
    "added README": ("files", add_note),
    "payload as label": ("record", write_into_label),
    "no receipts": ("ledgers", lose_receipts),
    "hidden audit": ("finished", hide_audit),
    "report of no site": ("record", leave_out_sites),
    "model": ("files", lambda folder: change_byte(folder / "adapter" / "adapter_model.safetensors")),
    "added file": ("files", lambda folder: (folder / "adapter" / "more.bin").write_bytes(b"0") and None),
    "scores": ("record", change_scores),
    "settings": ("record", lambda folder: edit_config(folder, privacy={"max_grad_norm": 0.5})),
    "figure": ("record", change_digit),
    "report": ("record", lambda folder: (folder / "report.json").write_text("{}") and None),
    "page": ("record", lambda folder: change_byte(folder / "report.html")),
    "event": ("ledgers", change_event),
    "no ledger": ("ledgers", lambda folder: next((folder / "sites").glob("*/ledger.db")).unlink()),
    "canaries": ("finished", lambda folder: (folder / "AUDIT.txt").write_text("canaries") and None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_gate_fails_a_defective_run_folder(defect: str, run_folder: Path, rules: Path) -> None:
    named, change = DEFECTS[defect]
    change(run_folder)
    said = judge(run_folder, rules).failed(1)
    assert named in said.partition("these rules fail: ")[2].split(", ")


def test_gate_passes_a_correct_run_and_updates_its_card(run_folder: Path, rules: Path) -> None:
    assert "## Release" not in card_in(run_folder)
    assert "the model may be released" in judge(run_folder, rules).printed
    verdict = verdict_in(run_folder)
    assert (verdict.failed, verdict.rules, verdict.limits["max_epsilon"]) == ((), "own", "1.0")
    assert set(verdict.results) == {line.split(" = ")[0] for line in RULES.splitlines()[1:]}
    assert f"Report that was judged | SHA-256 {signing.compute_report_digest(build_run_report(run_folder))}" in card_in(
        run_folder
    )
    assert "**The model may leave** by the rules own." in card_in(run_folder)
    assert run_command("report", "verify", str(run_folder)).code == 0, "the card is the one that fedtune draws"
    assert run_command("report", str(run_folder)).code == 0
    assert "## Release" in card_in(run_folder), "a report that is written anew keeps the verdict"
    assert "report has changed" not in card_in(run_folder)
    edit_json(run_folder / "gate.json", report_sha256="0" * 64)
    assert run_command("report", str(run_folder)).code == 0
    assert "**The report has changed since**: run `fedtune gate` again." in card_in(run_folder)


def test_gate_writes_failed_rules_to_verdict_and_card(run_folder: Path, rules: Path) -> None:
    rules.write_text(RULES.replace("max_epsilon = 1.0", "max_epsilon = 0.1"))
    outcome = judge(run_folder, rules)
    assert outcome.failed(1) == f"the model of {run_folder} must not be released: these rules fail: max_epsilon"
    (line,) = [line for line in outcome.out.splitlines() if "FAILS" in line]
    assert line.split()[:2] == ["max_epsilon", "FAILS"]
    assert verdict_in(run_folder).failed == ("max_epsilon",)
    assert "**The model may not leave**: by the rules own these fail: max\\_epsilon." in card_in(run_folder)
    told = json.loads(judge(run_folder, rules, "--json").out)
    assert (told["passed"], told["verdict"]["results"]["max_epsilon"]) == (False, "wrong")


def test_modified_signed_verdict_is_dropped_from_the_card(run_folder: Path, rules: Path, key_file: Path) -> None:
    key = SigningKey.load(key_file).public
    assert judge(run_folder, rules, "--sign", str(key_file)).code == 0
    assert verdict_in(run_folder).has_valid_signature
    assert f"signed with the key {key}" in card_in(run_folder)
    edit_json(run_folder / "gate.json", rules="stricter")
    assert read_verdict(run_folder, build_run_report(run_folder).facts) is None  # type: ignore[arg-type]
    assert "adapter/README.md" in run_command("report", "verify", str(run_folder)).failed(1)


def test_verdict_on_another_model_is_omitted_from_the_card(run_folder: Path, rules: Path) -> None:
    assert judge(run_folder, rules).code == 0
    facts = build_run_report(run_folder).facts
    assert read_verdict(run_folder, facts) is not None  # type: ignore[arg-type]
    for changed in (replace(facts, run="other"), replace(facts, files={"adapter/x": "00"})):
        assert read_verdict(run_folder, changed) is None  # type: ignore[arg-type]
    (run_folder / "gate.json").write_text("{}")
    assert read_verdict(run_folder, facts) is None  # type: ignore[arg-type]


def test_gate_requires_a_key_for_signed_reports(run_folder: Path, rules: Path, key_file: Path) -> None:
    rules.write_text('name = "signed"\nsigned = true\n')
    key = SigningKey.load(key_file).public
    assert judge(run_folder, rules).code == 1
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    assert judge(run_folder, rules).code == 1, "anybody can sign with a key of their own"
    assert judge(run_folder, rules, "--key", key).code == 0
    assert judge(run_folder, rules, "--key", "ab" * 32).code == 1
    signature = json.loads((run_folder / "report.json").read_text())["signature"]["signature"]
    text = (run_folder / "report.json").read_text().replace(signature, signature[::-1])
    (run_folder / "report.json").write_text(text)
    assert "signed" in judge(run_folder, rules, "--key", key).failed(1)


def test_gate_reads_the_key_of_the_lead_from_the_roster(
    join_site: Any, run_folder: Path, rules: Path, key_file: Path
) -> None:
    rules.write_text('name = "signed"\nsigned = true\n')
    join_site("a")
    roster = next((run_folder.parent / "federation").rglob("roster.json"))
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    assert judge(run_folder, rules, "--roster", str(roster)).failed(1).endswith("these rules fail: signed")
    roster.write_bytes(Roster.read(roster).sign_roster(SigningKey.load(key_file)).to_bytes())
    assert judge(run_folder, rules, "--roster", str(roster)).code == 0
    roster.write_text("{}")
    assert "roster" in judge(run_folder, rules, "--roster", str(roster)).failed(2)


def make_bound(right: int, *, claimed: float = 0.4) -> AuditBound:
    lower, best = (compute_epsilon_lower_bound(100, 100, count, delta=1e-5, confidence=0.95) for count in (right, 100))
    return AuditBound(
        site=None,
        claimed_epsilon=claimed,
        lower_bound=lower,
        best_possible=best,
        canaries=100,
        guesses=100,
        right=right,
    )


def write_audit(folder: Path, *, right: int) -> None:
    found = {"method": "x", "confidence": 0.95, "delta": 1e-5, "seeded": False, "exceeded": False, "membership": ()}
    audit = Audit(bounds=(make_bound(right),), **found)  # type: ignore[arg-type]
    (folder / "audit.json").write_text(json.dumps({"schema_version": RUN_SCHEMA, **asdict(audit)}))


def test_gate_accepts_only_audits_of_the_same_plan(run_folder: Path, rules: Path, tmp_path: Path) -> None:
    rules.write_text('name = "audited"\nmax_audit_bound = 1.0\n')
    assert "fedtune audit" in " ".join(judge(run_folder, rules).out.split())
    audited = Path(shutil.copytree(run_folder, tmp_path / "audited"))
    assert "audit.json" in judge(run_folder, rules, "--audit", str(audited)).failed(2)
    write_audit(audited, right=60)
    assert judge(run_folder, rules, "--audit", str(audited)).code == 0
    write_audit(audited, right=100)
    assert judge(run_folder, rules, "--audit", str(audited)).failed(1), "its counts refute the claim"
    edit_json(audited / "audit.json", bounds=[asdict(make_bound(100, claimed=500.0))])
    assert "unbounded" in judge(run_folder, rules, "--audit", str(audited)).out, "the run claims less than the audit"
    edit_json(audited / "audit.json", bounds=[{**asdict(make_bound(100)), "lower_bound": 0.0}])
    assert "do not follow from its counts" in judge(run_folder, rules, "--audit", str(audited)).failed(2)
    write_audit(audited, right=60)
    settings = yaml.safe_load((audited / "config.yaml").read_text())
    edit_config(audited, lora={"rank": settings["lora"]["rank"] * 2})
    assert "another plan, model or training" in judge(run_folder, rules, "--audit", str(audited)).failed(2)
    edit_config(audited, lora=settings["lora"], training={"learning_rate": 1e-9})
    assert "another plan, model or training" in judge(run_folder, rules, "--audit", str(audited)).failed(2)


def test_gate_refuses_bad_input_and_writes_nothing(run_folder: Path, rules: Path, tmp_path: Path) -> None:
    assert "RULES" not in run_command("gate", str(tmp_path / "absent")).failed(2)
    assert "absent.toml" in run_command("gate", str(run_folder), "absent.toml").failed(2)
    assert "--key" in judge(run_folder, rules, "--key", "ab").failed(2)
    assert "--groups" in judge(run_folder, rules, "--groups", str(rules)).failed(2)
    digest = json.loads((run_folder / "run.json").read_text())["adapter_digest"]
    group = {"name": "y", "units": 5, "scores": {"a": {"value": 0.5}}, "gaps": {"a": {"value": float("nan")}}}
    told = {"models": [{"name": "a", "adapter_digest": digest}], "groups": {"x": {"groups": [group]}}}
    (tmp_path / "groups.json").write_text(json.dumps({**told, "primary_metric": "accuracy"}))
    assert "--groups" in judge(run_folder, rules, "--groups", str(tmp_path / "groups.json")).failed(2)
    rules.write_text("max_epsilon = 1.0\n")
    assert "name" in judge(run_folder, rules).failed(2)
    rules.write_text('name = "empty"\nrecord = false\n')
    assert "has no rule" in judge(run_folder, rules).failed(2)
    rules.write_text(RULES)
    link_adapter(run_folder)
    assert "symbolic link" in judge(run_folder, rules).failed(2)
    assert not (run_folder / "gate.json").exists()


def test_signed_report_still_verifies_after_the_gate(run_folder: Path, rules: Path, key_file: Path) -> None:
    key = SigningKey.load(key_file).public
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    for _ in range(2):
        assert judge(run_folder, rules, "--key", key).code == 0, "its card is the one that fedtune renders"
    assert run_command("report", "verify", str(run_folder), "--key", key).code == 0
    assert "report has changed" not in card_in(run_folder)


def test_gate_refuses_damaged_files_without_a_traceback(run_folder: Path, rules: Path) -> None:
    environment = run_folder / "environment.json"
    told = environment.read_text()
    environment.write_text(told.replace('"python": "', '"python": "\\ud800', 1))
    assert "not Unicode" in judge(run_folder, rules).failed(1)
    assert "not Unicode" in run_command("report", str(run_folder)).failed(1)
    assert not (run_folder / "gate.json").exists()
    environment.unlink()
    environment.mkdir()
    assert "environment.json is damaged" in judge(run_folder, rules).failed(1)
    environment.rmdir()
    environment.write_text(told)
    (run_folder / "adapter" / "head.safetensors").unlink()
    os.mkfifo(run_folder / "adapter" / "head.safetensors")
    assert "a pipe or a device" in judge(run_folder, rules).failed(2)


def test_gate_judges_what_follows_from_the_folder(run_folder: Path, rules: Path) -> None:
    rules.write_text('name = "bounded"\nmax_epsilon = 0.1\n')
    change_digit(run_folder)
    assert "max_epsilon" in judge(run_folder, rules).failed(1), "report.json claims a tenth"

"""`fedtune gate` on a run folder: defective files, the decision in the model card, and exit codes."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fedtune.codec import decode
from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.ops.kits.members import Roster
from fedtune.privacy.keys import SigningKey
from fedtune.report import checks, signing
from fedtune.report.facts import Audit, AuditBound
from fedtune.report.from_run import build_run_report
from fedtune.report.gate_verdict import GateVerdict, read_verdict, verdict_to_json
from fedtune.spec import RUN_SCHEMA

from ..conftest import Outcome, edit_config, edit_json, run_command, simulate

Tensors = dict[str, np.ndarray]

RULES = """\
name = "own"
consistent = true
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


HOLDS = "must not be released: all rules hold, but the run is a simulation"


def judge(folder: Path, rules: Path, *words: str) -> Outcome:
    return run_command("gate", str(folder), str(rules), *words)


def parse_verdict(folder: Path) -> GateVerdict:
    return decode(GateVerdict, json.loads((folder / "gate.json").read_text()))


def read_card(folder: Path) -> str:
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
    write_audit(folder, correct=60)
    write_report(folder)


def leave_out_sites(folder: Path) -> None:
    edit_json(folder / "report.json", facts={**json.loads((folder / "report.json").read_text())["facts"], "sites": []})


DEFECTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "weights of another run": ("files", replace_weights),
    "weights under old hashes": ("files", claim_old_weights),
    "other order of labels": ("files", reverse_labels),
    "other order of labels in all records": ("files", reverse_labels_in_all_records),
    "added README": ("files", add_note),
    "payload as label": ("consistent", write_into_label),
    "no receipts": ("ledgers", lose_receipts),
    "hidden audit": ("finished", hide_audit),
    "report of no site": ("consistent", leave_out_sites),
    "model": ("files", lambda folder: change_byte(folder / "adapter" / "adapter_model.safetensors")),
    "added file": ("files", lambda folder: (folder / "adapter" / "more.bin").write_bytes(b"0") and None),
    "scores": ("consistent", change_scores),
    "settings": ("consistent", lambda folder: edit_config(folder, privacy={"max_grad_norm": 0.5})),
    "figure": ("consistent", change_digit),
    "report": ("consistent", lambda folder: (folder / "report.json").write_text("{}") and None),
    "page": ("consistent", lambda folder: change_byte(folder / "report.html")),
    "event": ("ledgers", change_event),
    "no ledger": ("ledgers", lambda folder: next((folder / "sites").glob("*/ledger.db")).unlink()),
    "canaries": ("finished", lambda folder: (folder / "AUDIT.txt").write_text("canaries") and None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_gate_fails_a_defective_run_folder(defect: str, run_folder: Path, rules: Path) -> None:
    rule, change = DEFECTS[defect]
    change(run_folder)
    message = judge(run_folder, rules).failed(1)
    assert rule in message.partition("these rules fail: ")[2].split(", ")


def edit_settings(adapter: Path, group: str = "", *, file: str = "fedtune.json", **values: Any) -> None:
    """Change settings in one of the adapter's files, in the form in which fedtune writes it."""
    settings = json.loads((adapter / file).read_text())
    settings |= {group: settings[group] | values} if group else values
    (adapter / file).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


edit_for_peft = partial(edit_settings, file="adapter_config.json")


def edit_tensors(adapter: Path, name: str, change: Callable[[Tensors], Tensors], **metadata: str) -> None:
    """Replace the tensors of one of the adapter's safetensors files."""
    path = adapter / f"{name}.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"} | metadata)


def add_noise(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def swap_head(adapter: Path) -> None:
    """Move the true head into the file of the adapter, where a head that is not trained leaves it in the hash."""
    head = {
        f"head.{name}": value for name, value in load_file(adapter / "head.safetensors").items() if name == "weight"
    }
    edit_settings(adapter, "head", train=False)
    edit_tensors(adapter, "adapter_model", lambda tensors: tensors | head)
    edit_tensors(adapter, "head", add_noise)


def swap_base(adapter: Path) -> None:
    edit_settings(adapter, "model", sha256="ee" * 32)
    provenance = json.loads((adapter.parent / "run.json").read_text())["provenance"]
    provenance["base_model"]["sha256"] = "ee" * 32
    edit_json(adapter.parent / "run.json", provenance=provenance)


def add_magnitudes(adapter: Path) -> None:
    edit_for_peft(adapter, use_dora=True)
    edit_tensors(
        adapter,
        "adapter_model",
        lambda old: old | {f"{next(iter(old))}.lora_magnitude_vector": next(iter(old.values()))},
    )


def shadow_offsets(adapter: Path) -> None:
    """Let the offsets' file hold the true A and B, and the adapter's file others."""
    factors = {key: t for key, t in load_file(adapter / "adapter_model.safetensors").items() if "lora_m" not in key}
    edit_tensors(adapter, "offsets", lambda tensors: tensors | factors)
    edit_tensors(adapter, "adapter_model", add_noise)


def repeat_key(path: Path, key: str, value: str) -> None:
    path.write_text(path.read_text().replace(f'"{key}":', f'"{key}": {value}, "{key}":', 1))


Forgery = Callable[[Path], object]
FORGERIES: dict[str, Forgery] = {
    "other head under the signed hash": swap_head,
    "other base in all records": swap_base,
    "scale for PEFT": lambda adapter: edit_for_peft(adapter, lora_alpha=800.0),
    "base for PEFT": lambda adapter: edit_for_peft(adapter, base_model_name_or_path="evil/base"),
    "layers for PEFT": lambda adapter: edit_for_peft(adapter, layers_to_transform=[0]),
    "text as PEFT's version": lambda adapter: edit_for_peft(adapter, peft_version="a record"),
    "magnitudes of DoRA": add_magnitudes,
    "pickled weights": lambda adapter: (adapter / "adapter_model.bin").write_bytes(b"pickle"),
    "records": lambda adapter: (adapter / "records.csv").write_text("patient,1"),
    "text in the metadata": lambda adapter: edit_tensors(adapter, "head", dict, note="a record"),
    "spaces between settings": lambda adapter: edit_json(adapter / "fedtune.json"),
    "texts": lambda adapter: edit_settings(adapter, texts=2),
    "input": lambda adapter: edit_settings(adapter, input="image"),
    "seed": lambda adapter: edit_settings(adapter, seed=7),
    "number format": lambda adapter: edit_settings(adapter, "model", dtype="nf4"),
    "GGUF file": lambda adapter: edit_settings(adapter, "model", gguf_file="evil.gguf"),
    "location of the base": lambda adapter: edit_settings(adapter, "model", path="evil/base", revision="evil"),
    "texts of labels": lambda adapter: edit_settings(adapter, "head", label_texts=["a record"] * 77),
    "hidden layers": lambda adapter: edit_settings(adapter, "head", hidden=[5]),
    "layers": lambda adapter: edit_settings(adapter, "lora", layers=[0]),
    "repeated setting": lambda adapter: repeat_key(adapter / "fedtune.json", "labels", '["evil"]'),
}


def forge(folder: Path, change: Forgery) -> None:
    """Change an adapter, and let all records of the run name it."""
    change(folder / "adapter")
    edit_json(folder / "run.json", adapter_digest=compute_adapter_digest(folder / "adapter"))
    write_report(folder)


@pytest.fixture
def files_only(rules: Path) -> Path:
    rules.write_text('name = "files"\nfiles = true\n')
    return rules


@pytest.mark.parametrize("forgery", FORGERIES)
def test_gate_refuses_a_forged_adapter_in_consistent_records(forgery: str, run_folder: Path, files_only: Path) -> None:
    forge(run_folder, FORGERIES[forgery])
    assert judge(run_folder, files_only).failed(1).endswith("these rules fail: files")


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_gate_refuses_tensors_that_shadow_the_trained_ones(kind: str, files_only: Path, tmp_path: Path) -> None:
    folder = simulate(f"lora.kind={kind}", "lora.train_a=false", into=tmp_path)
    write_report(folder)
    assert judge(folder, files_only).failed(1).endswith(HOLDS)
    shadow: dict[str, Forgery] = {
        "lora": lambda adapter: shutil.copy(adapter / "head.safetensors", adapter / "offsets.safetensors")
    }
    shadow |= {"dora": shadow_offsets, "ia3": lambda adapter: edit_tensors(adapter, "adapter_model", add_noise)}
    forge(folder, shadow[kind])
    assert judge(folder, files_only).failed(1).endswith("these rules fail: files")


def test_gate_refuses_a_repeated_key_in_the_result(run_folder: Path, files_only: Path) -> None:
    repeat_key(run_folder / "run.json", "adapter_digest", '"evil"')
    assert "run.json is damaged" in judge(run_folder, files_only).failed(1)


def test_gate_refuses_an_undecodable_file_name(run_folder: Path, files_only: Path) -> None:
    with open(os.fsencode(run_folder) + b"/adapter/\xff", "wb"):
        assert "is not a printable name" in judge(run_folder, files_only).failed(2)


def test_gate_refuses_an_adapter_that_was_exchanged_after_hashing(
    run_folder: Path, files_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, result = shutil.copytree(run_folder / "adapter", run_folder / "true"), (run_folder / "run.json").read_bytes()
    forge(run_folder, lambda adapter: edit_tensors(adapter, "adapter_model", add_noise))
    verify = checks._verify_adapter_folder

    def exchange(*arguments: Any, **options: Any) -> str:
        shutil.rmtree(run_folder / "adapter")
        shutil.copytree(copy, run_folder / "adapter")
        (run_folder / "run.json").write_bytes(result)
        return verify(*arguments, **options)

    monkeypatch.setattr(checks, "_verify_adapter_folder", exchange)
    assert judge(run_folder, files_only).failed(1).endswith("these rules fail: files")


def test_cards_of_several_exports_repeat_the_signed_verdict(
    run_folder: Path, rules: Path, key_file: Path, tmp_path: Path
) -> None:
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    assert judge(run_folder, rules, "--sign", str(key_file)).failed(1).endswith(HOLDS)
    for name in ("first", "second"):
        assert run_command("export", str(run_folder), "--to", str(tmp_path / name)).code == 0
        assert f"**By the rules own, the model {HOLDS}**" in (tmp_path / name / "README.md").read_text()
    assert run_command("report", str(run_folder)).code == 0, "the new report lists the exports and is unsigned"
    assert "all rules hold" not in read_card(run_folder)
    assert run_command("report", "verify", str(run_folder)).code == 0


def test_gate_updates_the_card_of_a_simulation_that_meets_all_rules(
    run_folder: Path, rules: Path, key_file: Path
) -> None:
    assert "## Release" not in read_card(run_folder)
    key = SigningKey.load(key_file).public
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    assert judge(run_folder, rules, "--sign", str(key_file)).failed(1) == f"the model of {run_folder} {HOLDS}"
    verdict = parse_verdict(run_folder)
    assert (verdict.failed, verdict.rules, verdict.limits["max_epsilon"]) == ((), "own", "1.0")
    assert set(verdict.results) == {line.split(" = ")[0] for line in RULES.splitlines()[1:]}
    digest = signing.compute_report_digest(build_run_report(run_folder))
    assert f"Report that was judged | SHA-256 {digest}" in read_card(run_folder)
    assert f"**By the rules own, the model {HOLDS}**" in read_card(run_folder)
    real = replace(verdict, simulated=False)
    assert (verdict.passed, real.passed, real.decision) == (False, True, "may be released")
    assert f"signed with the key {key}" in read_card(run_folder)
    assert run_command("report", "verify", str(run_folder)).code == 0, "the card is unchanged output of fedtune"
    assert run_command("report", str(run_folder)).code == 0
    assert "## Release" in read_card(run_folder), "a rewritten report keeps the verdict"
    assert "report has changed" not in read_card(run_folder)
    other = replace(verdict, report_sha256="0" * 64).sign(SigningKey.load(key_file))
    (run_folder / "gate.json").write_bytes(verdict_to_json(other))
    assert run_command("report", str(run_folder)).code == 0
    assert "**The report has changed since**: run `fedtune gate` again." in read_card(run_folder)


def test_gate_writes_failed_rules_to_verdict_and_card(run_folder: Path, rules: Path, key_file: Path) -> None:
    rules.write_text(RULES.replace("max_epsilon = 1.0", "max_epsilon = 0.1"))
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    outcome = judge(run_folder, rules, "--sign", str(key_file))
    assert outcome.failed(1) == f"the model of {run_folder} must not be released: these rules fail: max_epsilon"
    (line,) = [line for line in outcome.out.splitlines() if "FAILS" in line]
    assert line.split()[:2] == ["max_epsilon", "FAILS"]
    assert parse_verdict(run_folder).failed == ("max_epsilon",)
    assert "**By the rules own, the model must not be released: these rules fail: max\\_epsilon**" in read_card(
        run_folder
    )
    output = json.loads(judge(run_folder, rules, "--json").out)
    assert (output["passed"], output["verdict"]["results"]["max_epsilon"]) == (False, "failed")


def test_card_repeats_only_a_verdict_signed_with_the_key_of_the_report(
    run_folder: Path, rules: Path, key_file: Path, tmp_path: Path
) -> None:
    stranger = SigningKey.load_or_create(tmp_path / "stranger.pem")
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    rules.write_text(RULES.replace("max_epsilon = 1.0", "max_epsilon = 0.1"))
    assert judge(run_folder, rules, "--sign", str(key_file)).code == 1
    good = replace(parse_verdict(run_folder), results=dict.fromkeys(parse_verdict(run_folder).results, "passed"))
    for forged in (good, replace(good, signature=None), good.sign(stranger), None):
        (run_folder / "gate.json").write_bytes(verdict_to_json(forged) if forged else b"{}")
        assert run_command("report", str(run_folder)).code == 0
        assert "all rules hold" not in read_card(run_folder)
        assert "No verdict of `fedtune gate` on this model is signed" in read_card(run_folder)
        assert read_verdict(run_folder, build_run_report(run_folder)) is None
    (run_folder / "gate.json").write_bytes(verdict_to_json(good.sign(SigningKey.load(key_file))))
    assert "adapter/README.md" in run_command("report", "verify", str(run_folder)).failed(1), "the verdict is missing"


def test_verdict_on_another_model_is_omitted_from_the_card(run_folder: Path, rules: Path, key_file: Path) -> None:
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    assert judge(run_folder, rules, "--sign", str(key_file)).failed(1).endswith(HOLDS)
    report = build_run_report(run_folder)
    assert read_verdict(run_folder, report) is not None
    for changed in ({"run": "other"}, {"files": {"adapter/x": "00"}}):
        assert read_verdict(run_folder, replace(report, facts=replace(report.facts, **changed))) is None  # type: ignore[arg-type]


def test_gate_requires_a_key_for_signed_reports(run_folder: Path, rules: Path, key_file: Path) -> None:
    rules.write_text('name = "signed"\nsigned = true\n')
    key = SigningKey.load(key_file).public
    assert judge(run_folder, rules).code == 1
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    assert judge(run_folder, rules).code == 1, "anybody can sign with a key of their own"
    assert judge(run_folder, rules, "--key", key).failed(1).endswith(HOLDS)
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
    assert judge(run_folder, rules, "--roster", str(roster)).failed(1).endswith(HOLDS)
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
        correct=right,
    )


def write_audit(folder: Path, *, correct: int) -> None:
    fields = {"method": "x", "confidence": 0.95, "delta": 1e-5, "seeded": False, "exceeded": False, "membership": ()}
    audit = Audit(bounds=(make_bound(correct),), **fields)  # type: ignore[arg-type]
    (folder / "audit.json").write_text(json.dumps({"schema_version": RUN_SCHEMA, **asdict(audit)}))


def test_gate_accepts_only_audits_of_the_same_plan(run_folder: Path, rules: Path, tmp_path: Path) -> None:
    rules.write_text('name = "audited"\nmax_audit_bound = 1.0\n')
    assert "fedtune audit" in " ".join(judge(run_folder, rules).out.split())
    audited = Path(shutil.copytree(run_folder, tmp_path / "audited"))
    assert "audit.json" in judge(run_folder, rules, "--audit", str(audited)).failed(2)
    write_audit(audited, correct=60)
    assert judge(run_folder, rules, "--audit", str(audited)).failed(1).endswith(HOLDS)
    write_audit(audited, correct=100)
    assert judge(run_folder, rules, "--audit", str(audited)).failed(1), "the audit's counts refute the claim"
    edit_json(audited / "audit.json", bounds=[asdict(make_bound(100, claimed=500.0))])
    assert "unbounded" in judge(run_folder, rules, "--audit", str(audited)).out, "the run claims less than the audit"
    edit_json(audited / "audit.json", bounds=[{**asdict(make_bound(100)), "lower_bound": 0.0}])
    assert "do not follow from its counts" in judge(run_folder, rules, "--audit", str(audited)).failed(2)
    write_audit(audited, correct=60)
    settings = yaml.safe_load((audited / "config.yaml").read_text())
    edit_config(audited, lora={"rank": settings["lora"]["rank"] * 2})
    assert "another plan, model or training" in judge(run_folder, rules, "--audit", str(audited)).failed(2)
    edit_config(audited, lora=settings["lora"], training={"learning_rate": 1e-9})
    assert "another plan, model or training" in judge(run_folder, rules, "--audit", str(audited)).failed(2)


def test_gate_refuses_bad_input_and_writes_nothing(run_folder: Path, rules: Path, tmp_path: Path) -> None:
    assert "RULES" not in run_command("gate", str(tmp_path / "absent")).failed(2)
    assert "absent.toml" in run_command("gate", str(run_folder), "absent.toml").failed(2)
    assert "--key" in judge(run_folder, rules, "--key", "ab").failed(2)
    assert "--sign = " in judge(run_folder, rules, "--sign", "nowhere.pem").failed(2)
    assert "--groups" in judge(run_folder, rules, "--groups", str(rules)).failed(2)
    digest = json.loads((run_folder / "run.json").read_text())["adapter_digest"]
    group = {"name": "y", "units": 5, "scores": {"a": {"value": 0.5}}, "gaps": {"a": {"value": float("nan")}}}
    groups = {"models": [{"name": "a", "adapter_digest": digest}], "groups": {"x": {"groups": [group]}}}
    (tmp_path / "groups.json").write_text(json.dumps({**groups, "primary_metric": "accuracy"}))
    assert "--groups" in judge(run_folder, rules, "--groups", str(tmp_path / "groups.json")).failed(2)
    rules.write_text("max_epsilon = 1.0\n")
    assert "name" in judge(run_folder, rules).failed(2)
    rules.write_text('name = "empty"\nconsistent = false\n')
    assert "has no rule" in judge(run_folder, rules).failed(2)
    rules.write_text(RULES)
    link_adapter(run_folder)
    assert "symbolic link" in judge(run_folder, rules).failed(2)
    assert not (run_folder / "gate.json").exists()


def test_signed_report_still_verifies_after_the_gate(run_folder: Path, rules: Path, key_file: Path) -> None:
    key = SigningKey.load(key_file).public
    assert run_command("report", str(run_folder), "--sign", str(key_file)).code == 0
    for _ in range(2):
        assert judge(run_folder, rules, "--key", key).failed(1).endswith(HOLDS), (
            "the card is unchanged output of fedtune"
        )
    assert run_command("report", "verify", str(run_folder), "--key", key).code == 0
    assert "report has changed" not in read_card(run_folder)


def test_gate_refuses_damaged_files_without_a_traceback(run_folder: Path, rules: Path) -> None:
    environment = run_folder / "environment.json"
    original = environment.read_text()
    environment.write_text(original.replace('"python": "', '"python": "\\ud800', 1))
    assert "not Unicode" in judge(run_folder, rules).failed(1)
    assert "not Unicode" in run_command("report", str(run_folder)).failed(1)
    assert not (run_folder / "gate.json").exists()
    environment.unlink()
    environment.mkdir()
    assert "environment.json is damaged" in judge(run_folder, rules).failed(1)
    environment.rmdir()
    environment.write_text(original)
    (run_folder / "adapter" / "head.safetensors").unlink()
    os.mkfifo(run_folder / "adapter" / "head.safetensors")
    assert "a pipe or a device" in judge(run_folder, rules).failed(2)


def test_gate_uses_figures_recomputed_from_the_folder(run_folder: Path, rules: Path) -> None:
    rules.write_text('name = "bounded"\nmax_epsilon = 0.1\n')
    change_digit(run_folder)
    assert "max_epsilon" in judge(run_folder, rules).failed(1), "report.json claims a tenth of the true epsilon"

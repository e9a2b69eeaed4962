"""`fedtune attack` on a finished run: output, files and refusals."""

import json
from pathlib import Path

from fedtune.codec import decode
from fedtune.config import read_saved_config
from fedtune.report.attacks import NAMES, RunAttacks

from ..conftest import run_command


def test_attack_runs_all_attacks_and_writes_page_and_json(run_folder: Path) -> None:
    others = read_saved_config(run_folder).data.test_file
    outcome = run_command("attack", str(run_folder), "--others", str(others), "--shadows", "4", "--json")
    assert outcome.code == 0, outcome.err
    fields = json.loads((run_folder / "attack.json").read_text())
    found = decode(RunAttacks, {key: value for key, value in fields.items() if key != "schema_version"})
    assert [one.attack for one in found.findings] == list(NAMES)
    assert json.loads(outcome.printed)["result"]["adapter_sha256"] == found.adapter_sha256
    membership, site, reconstruction, extraction, attribute = found.findings
    assert membership.low is not None
    assert membership.ceiling is not None
    assert membership.low <= membership.ceiling
    assert "never protected" in site.sentence
    assert reconstruction.ceiling is not None
    assert (extraction.strength, "generates no text" in extraction.sentence) == (None, True)
    assert attribute.low is not None
    assert outcome.err.startswith("scoring ")
    page = (run_folder / "attack.html").read_text()
    assert all(name in page for name in NAMES.values())


def test_attack_refuses_small_groups_and_missing_secrets(run_folder: Path, tmp_path: Path) -> None:
    assert "must have at least 20 records" in run_command("attack", str(run_folder)).failed()
    secrets = tmp_path / "planted.jsonl"
    secrets.write_text('{"text": "my code", "label": "card_arrival", "secret": "1234"}\n')
    others = str(read_saved_config(run_folder).data.test_file)
    refused = run_command("attack", str(run_folder), "--others", others, "--secrets", str(secrets)).failed()
    assert "must occur in one of the record's texts" in refused
    assert not (run_folder / "attack.json").exists()

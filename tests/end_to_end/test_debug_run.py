"""One complete private run through the command line, with all of its outputs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedtune.config import read_saved_config
from fedtune.data.load import read_lead_records, sample_rows
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.privacy.ledger.verify import verify

from ..cli import snapshots
from ..conftest import check_planned_bytes, list_tiny_overrides, read_result, run_command


@pytest.fixture(scope="module")
def printed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run with calibrated noise, and its terminal output."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ("experiment=debug", f"tracking.output_dir={runs}", "name=whole", "runtime.device=cpu")
    more = ("runtime.num_threads=1", "head.center=true", "data.test_rows=40", "federation.num_rounds=3")
    outcome = run_command("simulate", *arguments, *more)
    assert outcome.err == ""
    return runs / "whole", outcome.printed


@pytest.fixture(scope="module")
def folder(printed_run: tuple[Path, str]) -> Path:
    return printed_run[0]


@pytest.fixture(scope="module")
def result(folder: Path) -> Any:
    return read_result(folder)


def test_run_folder_contains_the_documented_files(folder: Path) -> None:
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    snapshots.check_text("run-folder.txt", "\n".join(paths) + "\n")
    for key in folder.rglob("*.pem"):
        assert key.stat().st_mode & 0o077 == 0, "only the owner may read a private key"


def mask_varying(value: Any) -> Any:
    """Mask the parts of the output that vary between runs and machines."""
    if isinstance(value, dict):
        varying = value.keys() & {"detail", "energy", "findings"}
        return {key: mask_varying(inner) for key, inner in value.items()} | dict.fromkeys(varying, "any")
    if isinstance(value, list):
        return [mask_varying(inner) for inner in value]
    return "number" if isinstance(value, float) or (isinstance(value, int) and value > 999) else value


def test_run_json_has_its_documented_keys_and_the_adapter_digest(result: Any, folder: Path) -> None:
    snapshots.check_json("run", json.dumps(mask_varying(result)), folder=folder)
    saved = json.loads((folder / "adapter" / "fedtune.json").read_text())
    assert result["provenance"]["base_model"]["sha256"] == saved["model"]["sha256"]
    assert result["adapter_digest"] == compute_adapter_digest(folder / "adapter")
    assert result["config_sha256"] == read_saved_config(folder).digest()
    assert all(entry["seconds"] > 0 for entry in result["rounds"])
    check_planned_bytes(folder)
    assert result["final"]["seconds"] > 0
    assert result["final"]["peak_memory_bytes"] > 50 * 2**20
    assert result["final"]["metrics"] != result["final"]["metrics_before"]
    assert {site["metrics_noise_multiplier"] for site in result["privacy"]["sites"].values()} == {0}


def test_epsilon_stays_below_target_and_matches_an_independent_accountant(result: Any, folder: Path) -> None:
    privacy = result["privacy"]
    for name, site in privacy["sites"].items():
        step = PoissonSampledDpEvent(site["sampling_rate"], GaussianDpEvent(site["noise_multiplier"]))
        relation = NeighboringRelation.ADD_OR_REMOVE_ONE
        accountants = {"epsilon": PLDAccountant(relation), "epsilon_rdp": RdpAccountant(neighboring_relation=relation)}
        for key, accountant in accountants.items():
            accountant.compose(step, site["steps"])
            assert site[key] == pytest.approx(accountant.get_epsilon(privacy["delta"]), abs=1e-3)
        assert site["epsilon"] <= 8.0
        assert site["epsilon"] > 7.9, "the budget must be used almost entirely"
        # Its steps match the events in the site's ledger.
        verified = verify(folder / "sites" / name / "ledger.db")
        assert verified.history.count_total_charges() == {step: site["steps"]}
        (run,) = verified.history.runs.values()
        assert run.expires is None, "nothing may stay reserved at the end"
        kinds = [event.kind for event in verified.events]
        assert kinds == ["note", "note", "plan", *["reserve", "commit"] * 3, "note"]
        assert len({event.detail["fingerprint"] for event in verified.events if event.kind == "commit"}) == 1
    assert privacy["epsilon"] == max(site["epsilon"] for site in privacy["sites"].values())


def test_evaluate_reproduces_the_final_test_scores(folder: Path, result: Any, tmp_path: Path) -> None:
    test_file = tmp_path / "test.jsonl"
    name, columns = "simulations/data/banking77/test.jsonl.gz", {"text": "text", "label": "label"}
    scored = sample_rows(read_lead_records(name, columns=columns, key="data.test_file")[0], 40)
    test_file.write_text("".join(json.dumps(dict(record.fields)) + "\n" for record in scored))
    outcome = run_command("evaluate", str(folder), "--data", str(test_file), "--device", "cpu", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    scores = json.loads(outcome.out)["scores"]
    assert set(scores) == {"accuracy", "macro_f1", "auroc", "ece", "loss"}
    assert scores == pytest.approx(result["final"]["metrics"], abs=1e-4)


def test_terminal_shows_rounds_epsilon_and_paths_without_warnings(printed_run: tuple[Path, str], result: Any) -> None:
    folder, output = printed_run
    for round in (1, 2, 3):
        (line,) = (line for line in output.splitlines() if line.startswith(f"round {round}/3"))
        assert "2/2 sites" in line
        assert re.search(r"loss \d\.\d{3}", line)
        assert re.search(r"epsilon \d\.\d{3}", line)
        assert ("left" in line) == (round == 2), "the first round includes one-time work"
    shown = float(re.findall(r"^epsilon ([\d.]+) at delta 1e-05", output, re.MULTILINE)[0])
    assert shown == math.ceil(result["privacy"]["epsilon"] * 1000) / 1000
    assert f"run folder: {folder}" in output
    # A site's loss or counts must not reach the lead's log, which has only Flower's messages and our warnings.
    assert "loss" not in (folder / "log.txt").read_text()
    for line in output.splitlines():
        assert not re.search("warn|deprecat|error", line, re.IGNORECASE), line


def test_diverged_run_suggests_lower_learning_rates(tmp_path: Path) -> None:
    overrides = ("training.learning_rate=1e9", "federation.num_rounds=1", "data.test_rows=40")
    outcome = run_command("simulate", *list_tiny_overrides(*overrides, into=tmp_path))
    assert "Training diverged: do not use this adapter." in outcome.printed
    assert "training.learning_rate=3.3e+08" in outcome.out
    assert read_result(tmp_path / "run")["final"]["findings"] == ["diverged"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["facts"]["findings"] == ["diverged"]
    assert "Training diverged. This adapter should not be used" in (tmp_path / "run" / "report.html").read_text()
    assert run_command("report", "verify", str(tmp_path / "run")).code == 0

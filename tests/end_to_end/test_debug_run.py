"""One whole private run through the command line, looked at from every side a user has."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from safetensors.numpy import load_file

from fedtune.config import saved_config
from fedtune.data.load import chosen_rows, lead_records
from fedtune.privacy.ledger.verify import verify

from ..conftest import adapter_of, command, result_of, simulate, tiny

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with noise that was calibrated for it, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ("experiment=debug", f"tracking.output_dir={runs}", "name=whole", "runtime.device=cpu")
    further = ("runtime.num_threads=1", "head.centre=true", "data.test_rows=40", "federation.num_rounds=3")
    outcome = command("simulate", *arguments, *further)
    assert outcome.err == ""
    return runs / "whole", outcome.printed


@pytest.fixture(scope="module")
def folder(run: tuple[Path, str]) -> Path:
    return run[0]


@pytest.fixture(scope="module")
def result(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def test_the_run_folder_holds_what_the_design_lists(folder: Path) -> None:
    top = {
        "config.yaml", "run.json", "environment.json", "adapter", "checkpoints", "log.txt", "report.html",
        "report.json", "sites"
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == top
    adapter = {
        "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "fedtune.json", "README.md", "label.svg"
    }  # fmt: skip
    assert {path.name for path in (folder / "adapter").iterdir()} == adapter
    assert {path.name for path in (folder / "sites").iterdir()} == {
        "dealt_out.json", "lead_key.pem", "receipts.json", "site-1", "site-2"
    }  # fmt: skip
    for site in ("site-1", "site-2"):
        names = {path.name for path in (folder / "sites" / site).iterdir()}
        assert names == {"ledger.db", "site.toml", "site_key.pem"}
    assert not list(folder.rglob("*.partial"))
    for key in folder.rglob("*.pem"):
        assert key.stat().st_mode & 0o077 == 0, "a private key is for its owner alone"


def test_run_json_has_the_keys_that_others_rely_on(result: Any, folder: Path) -> None:
    assert set(result) == {
        "schema_version", "fedtune_version", "config_sha256", "adapter_digest", "task", "rounds", "final", "privacy",
        "provenance"
    }  # fmt: skip
    assert (result["schema_version"], result["task"]) == (2, "classification")
    made = result["provenance"]
    assert made["population"] == {
        "dataset": "banking77", "unit": "record", "declared_sizes": {"site-1": 230, "site-2": 230}
    }  # fmt: skip
    assert (made["base_model"]["path"], made["base_model"]["public_id"]) == ("random:bert", None)
    about = json.loads((folder / "adapter" / "fedtune.json").read_text())
    assert made["base_model"]["sha256"] == about["model"]["sha256"]
    assert (made["start_adapter"], made["template"], made["test_rows"]) == (None, None, 40)
    assert result["config_sha256"] == saved_config(folder).digest()
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3]
    for entry in result["rounds"]:
        assert set(entry) == {
            "round", "seconds", "sites", "failed_sites", "bytes_down", "bytes_up", "metrics", "site_scores", "ended",
            "diverged"
        }  # fmt: skip
        assert entry["site_scores"] == {}, "unless they are planned for, no scores leave a site"
        assert entry["sites"] == ["site-1", "site-2"]
        assert entry["failed_sites"] == {}
        assert min(entry["seconds"], entry["bytes_down"], entry["bytes_up"]) > 0
        assert set(entry["metrics"]) == {"accuracy", "macro_f1", "loss"}
    final = result["final"]
    assert set(final) == {
        "metrics", "metrics_before", "seconds", "peak_memory_bytes", "findings", "detail", "energy", "kept"
    }  # fmt: skip
    assert final["seconds"] > 0
    assert final["peak_memory_bytes"] > 50 * 2**20
    assert final["metrics"] != final["metrics_before"]
    privacy = result["privacy"]
    assert set(privacy) == {
        "unit", "records_per_user", "neighbouring_relation", "delta", "epsilon", "seeded_noise", "sites"
    }  # fmt: skip
    assert (privacy["unit"], privacy["neighbouring_relation"]) == ("record", "add_or_remove_one")
    assert privacy["records_per_user"] == 1
    assert privacy["seeded_noise"] is False
    for site in privacy["sites"].values():
        assert set(site) == {
            "epsilon", "epsilon_rdp", "planned_epsilon", "rounds", "steps", "sampling_rate", "noise_multiplier",
            "metrics_noise_multiplier", "upper_bound",
        }  # fmt: skip
        assert (site["rounds"], site["steps"], site["upper_bound"]) == (3, 6, False)
        assert site["metrics_noise_multiplier"] == 0


def test_bytes_are_those_of_the_adapter_and_little_more(result: Any, folder: Path) -> None:
    tensors = [*load_file(folder / "adapter" / "adapter_model.safetensors").values()]
    tensors.append(load_file(folder / "adapter" / "head.safetensors")["weight"])
    values, sites = sum(tensor.size for tensor in tensors), 2
    for entry in result["rounds"]:
        # Four bytes a value down, and two up; the rest is names, settings and signatures.
        assert sites * 4 * values < entry["bytes_down"] < sites * (4 * values + 8_000)
        assert sites * 2 * values < entry["bytes_up"] < sites * (2 * values + 4_000)


def test_epsilon_keeps_below_its_target_and_equals_an_independent_computation(result: Any) -> None:
    privacy = result["privacy"]
    for site in privacy["sites"].values():
        step = dp_event.PoissonSampledDpEvent(site["sampling_rate"], dp_event.GaussianDpEvent(site["noise_multiplier"]))
        accountants = {
            "epsilon": PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE),
            "epsilon_rdp": RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE),
        }
        for key, accountant in accountants.items():
            accountant.compose(step, site["steps"])
            assert site[key] == pytest.approx(accountant.get_epsilon(privacy["delta"]), abs=1e-3)
        assert site["epsilon"] <= 8.0
        assert site["epsilon"] > 7.9, "the budget should be used"
    assert privacy["epsilon"] == max(site["epsilon"] for site in privacy["sites"].values())


def test_steps_are_those_in_the_sites_ledgers(result: Any, folder: Path) -> None:
    for site, spent in result["privacy"]["sites"].items():
        verified = verify(folder / "sites" / site / "ledger.db")
        step = PoissonSampledDpEvent(spent["sampling_rate"], GaussianDpEvent(spent["noise_multiplier"]))
        assert verified.history.charged() == {step: spent["steps"]}
        (run,) = verified.history.runs.values()
        assert run.expires is None, "at the end nothing stays set aside"
        kinds = [event.kind for event in verified.events]
        assert kinds == ["note", "note", "plan", *["reserve", "commit"] * 3, "note"]
        assert len({event.detail["fingerprint"] for event in verified.events if event.kind == "commit"}) == 1


def test_the_report_repeats_the_figures_and_says_within(result: Any, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())["derived"]
    assert report["verdict"]["state"] == "within"
    assert (report["epsilon"], report["target_epsilon"]) == (result["privacy"]["epsilon"], 8.0)
    assert report["randomness"] == "operating_system"
    page = (folder / "report.html").read_text()
    assert "limit for this run was kept" in page
    assert "<script" not in page
    assert 'src="http' not in page


def test_evaluate_repeats_the_final_scores_on_the_test_file(folder: Path, result: Any, tmp_path: Path) -> None:
    test_file = tmp_path / "test.jsonl"
    name, columns = "simulations/data/banking77/test.jsonl.gz", {"text": "text", "label": "label"}
    scored = chosen_rows(lead_records(name, columns=columns, key="data.test_file")[0], 40)
    test_file.write_text("".join(json.dumps(dict(record.fields)) + "\n" for record in scored))
    outcome = command("evaluate", str(folder), "--data", str(test_file), "--device", "cpu", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    scores = json.loads(outcome.out)["scores"]
    assert set(scores) == {"accuracy", "macro_f1", "auroc", "ece", "loss"}
    assert scores == pytest.approx(result["final"]["metrics"], abs=1e-4)


def test_terminal_shows_rounds_sites_epsilon_and_paths_and_no_warning(run: tuple[Path, str], result: Any) -> None:
    folder, out = run
    for round in (1, 2, 3):
        (line,) = (line for line in out.splitlines() if line.startswith(f"round {round}/3"))
        assert "2/2 sites" in line
        assert re.search(r"loss \d\.\d{3}", line)
        assert re.search(r"epsilon \d\.\d{3}", line)
        assert ("left" in line) == (round == 2), "the first one has work that is done once"
    shown = float(re.findall(r"^epsilon ([\d.]+) at delta 1e-05", out, re.MULTILINE)[0])
    assert shown == math.ceil(result["privacy"]["epsilon"] * 1000) / 1000
    assert f"run folder: {folder}" in out
    # A site's own loss or counts must not reach the lead's log: only Flower's notes and our warnings belong there.
    assert "loss" not in (folder / "log.txt").read_text()
    for line in out.splitlines():
        assert not re.search("warn|deprecat|error", line, re.IGNORECASE), line


def test_without_privacy_epsilon_is_null_and_nothing_is_promised(tmp_path: Path) -> None:
    unprotected = simulate("privacy=none", into=tmp_path)
    privacy = result_of(unprotected)["privacy"]
    assert privacy["epsilon"] is None
    for site in privacy["sites"].values():
        assert (site["epsilon"], site["epsilon_rdp"], site["noise_multiplier"]) == (None, None, 0.0)
        assert site["steps"] == 4
    report = json.loads((unprotected / "report.json").read_text())["derived"]
    assert report["verdict"] == {"state": "no_guarantee", "reasons": ["no_noise"]}
    assert (report["target_epsilon"], report["epsilon"]) == (None, None)
    for site in report["sites"]:
        (mechanism,) = site["mechanisms"]
        assert [charge["event"] for charge in mechanism["charges"]] == [{"kind": "non_private"}]
    page = (unprotected / "report.html").read_text()
    assert "No guarantee" in page
    assert "There is no promise" in page


def test_a_seeded_study_repeats_and_is_marked_wherever_its_epsilon_stands(tmp_path: Path) -> None:
    for name in ("one", "other"):
        outcome = command("simulate", *tiny("runtime.seeded_noise=true", into=tmp_path, name=name))
        assert outcome.code == 0
    assert adapter_of(tmp_path / "one") == adapter_of(tmp_path / "other")
    assert "study without a guarantee" in outcome.out
    assert result_of(tmp_path / "other")["privacy"]["seeded_noise"] is True
    report = json.loads((tmp_path / "other" / "report.json").read_text())["derived"]
    assert report["verdict"] == {"state": "no_guarantee", "reasons": ["seeded_noise"]}


def test_a_rate_that_is_far_too_high_is_told_with_lower_ones(tmp_path: Path) -> None:
    chosen = ("training.learning_rate=1e9", "federation.num_rounds=1", "data.test_rows=40")
    outcome = command("simulate", *tiny(*chosen, into=tmp_path))
    assert "Training diverged: do not use this adapter." in outcome.printed
    assert "training.learning_rate=3.3e+08" in outcome.out
    assert result_of(tmp_path / "run")["final"]["findings"] == ["diverged"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())["derived"]
    assert report["utility"]["findings"] == ["diverged"]
    assert "Training diverged. This adapter should not be used" in (tmp_path / "run" / "report.html").read_text()
    assert command("report", "verify", str(tmp_path / "run")).code == 0

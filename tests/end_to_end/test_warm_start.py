"""A run that starts from another run's adapter: its start, its reports, and the messages to its sites."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import read_saved_config
from fedtune.federation.lead import Checkpoints
from fedtune.flower.simulation import simulate as run_simulation
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.privacy.ledger.verify import verify

from ..cli import snapshots
from ..conftest import edit_json, list_tiny_overrides, read_result, run_command, simulate, write_config
from .test_resume import Stop, make_listener

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with noise."""
    return Path(simulate("federation.num_rounds=1", into=tmp_path_factory.mktemp("first"), name="first"))


@pytest.fixture(scope="module")
def second_run(first_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("second")
    overrides = (f"model.adapter={first_run}", "federation.num_rounds=1", "tracking.progress=true")
    return runs / "second", run_command("simulate", *list_tiny_overrides(*overrides, into=runs, name="second")).printed


def read_digest(folder: Path) -> str:
    return compute_adapter_digest(folder / "adapter")


def test_warm_start_keeps_final_scores_and_states_its_lineage(first_run: Path, second_run: Any) -> None:
    result = read_result(second_run[0])
    assert result["final"]["metrics_before"] == read_result(first_run)["final"]["metrics"]
    assert result["final"]["metrics"] != result["final"]["metrics_before"]
    spent = {key: read_result(first_run)["privacy"][key] for key in ("unit", "delta", "epsilon")}
    start = {"digest": read_digest(first_run), "head": True, "from": "first", "dataset": "banking77"} | spent
    assert result["provenance"]["start_adapter"] == start
    assert f"starts from the adapter {read_digest(first_run)[:12]} of first" in second_run[1]
    assert "its head is reused" in second_run[1]
    assert read_result(first_run)["provenance"]["start_adapter"] is None
    report = json.loads((second_run[0] / "report.json").read_text())
    start = {"digest": read_digest(first_run), "run": "first", "dataset": "banking77", "public": False} | spent
    assert report["facts"]["provenance"]["start_adapter"] == start
    page = (second_run[0] / "report.html").read_text()
    assert read_digest(first_run) in page
    assert "training, as the lead states it, not included in this report&#39;s figures" in page
    assert run_command("report", "verify", str(second_run[0])).code == 0
    assert json.loads((first_run / "report.json").read_text())["facts"]["provenance"]["start_adapter"] is None
    assert read_saved_config(second_run[0]).privacy.start_epsilon == spent["epsilon"]


def test_ledgers_record_the_start_adapter_digest_without_its_path(first_run: Path, second_run: Any) -> None:
    folder, _ = second_run
    output = run_command("ledger", "show", str(folder / "sites" / "site-1" / "ledger.db")).out
    assert f"starts from the adapter {read_digest(first_run)[:16]}" in " ".join(output.split())
    for site in ("site-1", "site-2"):
        history = verify(folder / "sites" / site / "ledger.db").history
        (run,) = history.runs.values()
        assert run.proposal.start_adapter == read_digest(first_run)
        assert str(first_run).encode() not in (folder / "sites" / site / "ledger.db").read_bytes()


def test_run_id_depends_on_the_start_adapter_contents(first_run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(first_run, tmp_path / "elsewhere")

    def compose_tiny(*overrides: str) -> Any:
        return compose_run(list_tiny_overrides(*overrides, into=tmp_path))

    original, moved = compose_tiny(f"model.adapter={first_run}"), compose_tiny(f"model.adapter={copied}")
    assert original.digest() == moved.digest() != compose_tiny().digest()
    assert original.model.adapter_sha256 == read_digest(first_run)


def test_stopped_run_continues_without_the_start_adapter_folder(first_run: Path, tmp_path: Path) -> None:
    copied, folder = shutil.copytree(first_run, tmp_path / "start"), tmp_path / "run"
    config = compose_run(list_tiny_overrides(f"model.adapter={copied}", into=tmp_path))
    write_config(config, folder)
    with pytest.raises(Stop):
        run_simulation(config, folder, make_listener(1))
    shutil.rmtree(copied)
    run_simulation(compose_run([f"resume={folder}"]), folder, make_listener(None))
    assert read_result(folder)["provenance"]["start_adapter"]["digest"] == read_digest(first_run)
    assert Checkpoints(folder / "checkpoints", config.digest()).load().round == 2
    assert read_saved_config(folder).model.adapter_sha256 is not None


@snapshots.parametrize_mistakes("mistakes-start")
def test_incompatible_start_adapter_is_refused_before_training(first_run: Path, tmp_path: Path, typed: str) -> None:
    words = typed.replace("FIRST", str(first_run)).split()
    message = (
        run_command("simulate", *list_tiny_overrides(*words, into=tmp_path / "runs"))
        .failed()
        .replace(str(first_run), "FIRST")
    )
    snapshots.check_message("mistakes-start", typed, message)
    assert not (tmp_path / "runs").exists()


def test_audited_adapter_cannot_start_a_run(first_run: Path, tmp_path: Path) -> None:
    audited = shutil.copytree(first_run, tmp_path / "audited")
    (audited / "AUDIT.txt").write_text("canaries\n")
    outcome = run_command("simulate", *list_tiny_overrides(f"model.adapter={audited}", into=tmp_path / "runs"))
    assert (outcome.code, "is an audit" in outcome.message) == (2, True)


def test_gate_adds_the_starts_of_a_chain_and_ignores_edits_of_their_entry(
    first_run: Path, second_run: Any, tmp_path: Path
) -> None:
    (rules := tmp_path / "rules.toml").write_text('name = "own"\nmax_epsilon = 8.0\nmax_expected_failures = 0.0\n')
    third = simulate(f"model.adapter={second_run[0]}", "federation.num_rounds=1", into=tmp_path, name="third")
    own, *others = (read_result(run)["privacy"]["epsilon"] for run in (third, first_run, second_run[0]))
    before = sum(others)
    assert read_saved_config(third).privacy.start_epsilon == pytest.approx(before)
    output = " ".join(run_command("gate", str(third), str(rules)).out.split())
    assert f"epsilon with all starts before this run is {own + before:.4g} (" in output
    failures = re.search(r"times the largest declared size, is \S+", output)
    lowered = {"epsilon": 0.0, "delta": 1e-300, "unit": "user", "from": "imagenet"}
    entry = read_result(third)["provenance"]["start_adapter"] | lowered
    edit_json(third / "run.json", provenance=read_result(third)["provenance"] | {"start_adapter": entry})
    checkpoints = Checkpoints(third / "checkpoints", read_saved_config(third).digest())
    checkpoints.save(replace(checkpoints.load(), start_adapter=entry))
    run_command("report", str(third))
    edited = " ".join(run_command("gate", str(third), str(rules)).out.split())
    assert f"epsilon with all starts before this run is {own + before:.4g} (" in edited
    assert failures is not None
    assert failures[0] in edited

"""A run that begins where another one ended: what it starts with, what it says of it, and what its sites are told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import saved_config
from fedtune.federation.lead import Checkpoints
from fedtune.flower.simulation import simulate as run_simulation
from fedtune.privacy.ledger.verify import verify

from ..cli import snapshots
from ..conftest import command, result_of, simulate, tiny, write_config
from .test_resume import Stop, follower

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with noise that promises something."""
    return Path(simulate("federation.num_rounds=1", into=tmp_path_factory.mktemp("first"), name="first"))


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    into = tmp_path_factory.mktemp("second")
    chosen = (f"model.adapter={first}", "federation.num_rounds=1", "tracking.progress=true")
    return into / "second", command("simulate", *tiny(*chosen, into=into, name="second")).printed


def digest_of(folder: Path) -> str:
    return str(json.loads((folder / "adapter" / "fedtune.json").read_text())["adapter_digest"])


def test_warm_start_keeps_final_scores_and_states_its_lineage(first: Path, second: Any) -> None:
    begun = result_of(second[0])
    assert begun["final"]["metrics_before"] == result_of(first)["final"]["metrics"]
    assert begun["final"]["metrics"] != begun["final"]["metrics_before"]
    spent = {key: result_of(first)["privacy"][key] for key in ("unit", "delta", "epsilon")}
    about = {"digest": digest_of(first), "head": True, "from": "first", "dataset": "banking77"} | spent
    assert begun["provenance"]["start_adapter"] == about
    assert f"begins in the adapter {digest_of(first)[:12]} of first" in second[1]
    assert "its head is taken, too" in second[1]
    assert result_of(first)["provenance"]["start_adapter"] is None
    report = json.loads((second[0] / "report.json").read_text())
    about = {"digest": digest_of(first), "run": "first", "dataset": "banking77", "public": False} | spent
    assert report["facts"]["provenance"]["start_adapter"] == about
    page = (second[0] / "report.html").read_text()
    assert digest_of(first) in page
    assert "Epsilon of its own tuning, not part of the figures here" in page
    assert command("report", "verify", str(second[0])).code == 0
    assert json.loads((first / "report.json").read_text())["facts"]["provenance"]["start_adapter"] is None


def test_ledgers_record_the_start_adapter_digest_without_its_path(first: Path, second: Any) -> None:
    folder, _ = second
    shown = command("ledger", "show", str(folder / "sites" / "site-1" / "ledger.db")).out
    assert f"it starts from the adapter {digest_of(first)[:16]}" in " ".join(shown.split())
    for site in ("site-1", "site-2"):
        history = verify(folder / "sites" / site / "ledger.db").history
        (run,) = history.runs.values()
        assert run.proposal.start_adapter == digest_of(first)
        assert str(first).encode() not in (folder / "sites" / site / "ledger.db").read_bytes()


def test_run_id_depends_on_the_start_adapter_contents(first: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(first / "adapter", tmp_path / "elsewhere")

    def composed(*chosen: str) -> Any:
        return compose_run(tiny(*chosen, into=tmp_path))

    here, there = composed(f"model.adapter={first}"), composed(f"model.adapter={copied}")
    assert here.digest() == there.digest() != composed().digest()
    assert here.model.adapter_sha256 == digest_of(first)


def test_stopped_run_continues_without_the_start_adapter_folder(first: Path, tmp_path: Path) -> None:
    copied, folder = shutil.copytree(first, tmp_path / "start"), tmp_path / "run"
    config = compose_run(tiny(f"model.adapter={copied}", into=tmp_path))
    write_config(config, folder)
    with pytest.raises(Stop):
        run_simulation(config, folder, follower(1))
    shutil.rmtree(copied)
    run_simulation(compose_run([f"resume={folder}"]), folder, follower(None))
    assert result_of(folder)["provenance"]["start_adapter"]["digest"] == digest_of(first)
    assert Checkpoints(folder / "checkpoints", config.digest()).load().round == 2
    assert saved_config(folder).model.adapter_sha256 is not None


@snapshots.mistakes("mistakes-start")
def test_incompatible_start_adapter_is_refused_before_training(first: Path, tmp_path: Path, typed: str) -> None:
    words = typed.replace("FIRST", str(first)).split()
    message = command("simulate", *tiny(*words, into=tmp_path / "runs")).failed().replace(str(first), "FIRST")
    snapshots.check_message("mistakes-start", typed, message)
    assert not (tmp_path / "runs").exists()


def test_audited_adapter_cannot_start_a_run(first: Path, tmp_path: Path) -> None:
    audited = shutil.copytree(first, tmp_path / "audited")
    (audited / "AUDIT.txt").write_text("canaries\n")
    outcome = command("simulate", *tiny(f"model.adapter={audited}", into=tmp_path / "runs"))
    assert (outcome.code, "is an audit" in outcome.message) == (2, True)

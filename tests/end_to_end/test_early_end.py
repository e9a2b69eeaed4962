"""A run with early stopping for its users: files, report, card, ledger and refusals."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.config import read_saved_config
from fedtune.federation.lead import Checkpoints, compute_charged_epsilons
from fedtune.privacy.ledger.verify import verify
from fedtune.report import from_run
from fedtune.report.derive import profile
from fedtune.report.verify_report import problems
from fedtune.tasks.saved import SavedAdapter

from ..conftest import list_tiny_overrides, read_result, run_command, simulate

TINY_RATES = ("training.learning_rate=1e-30", "training.head_learning_rate=1e-60")
"""The head stays zero (its rate is below float32), so all classes tie and no round scores better than the first."""


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run planned for five rounds that stopped after the third and kept the first."""
    folder = tmp_path_factory.mktemp("runs")
    settings = (
        "federation.num_rounds=5",
        "federation.early_stopping_patience=2",
        "federation.checkpoint_selection=best",
        *TINY_RATES,
    )
    return simulate(*settings, into=folder)


def test_early_stopping_keeps_the_best_adapter_and_the_planned_epsilon(stopped_run: Path) -> None:
    config = read_saved_config(stopped_run)
    state = Checkpoints(stopped_run / "checkpoints", config.digest()).load()
    assert (
        SavedAdapter.read_initial(str(stopped_run)).trained_sha256
        == state.kept_adapter.digest()
        != state.adapter.digest()
    )
    result, plan = read_result(stopped_run), config.plan()
    score = result["rounds"][0]["metrics"]["accuracy"]
    assert result["final"]["selected_round"] == {
        "round": 1,
        "primary_metric": "accuracy",
        "score": score,
        "stopped_early": True,
    }
    planned, charged = (compute_charged_epsilons(plan, rounds)[0] for rounds in (5, 3))
    assert charged < planned == result["privacy"]["epsilon"]
    for site in result["privacy"]["sites"].values():
        assert (site["rounds"], site["epsilon"], site["planned_epsilon"]) == (3, charged, planned)


def test_report_and_card_state_the_selected_round_and_both_epsilons(stopped_run: Path) -> None:
    report = from_run.build_run_report(stopped_run)
    assert problems(report) == []
    assert report.verdict.reasons == ("charged_less",)
    assert (report.utility.selected_round.round, report.utility.selected_round.stopped_early) == (1, True)
    for site in report.sites:
        assert site.spent.epsilon_pld < report.epsilon == site.spent.epsilon == site.spent.planned_epsilon
        planned = profile.bound_correct_of_100(profile.count_charged_events(report.facts.plan, 5))
        assert site.meaning.correct_of_100_mechanism == pytest.approx(planned), "it must bound the whole plan"
    (assumption,) = [item for item in report.assumptions if item.code == "chosen_by_the_leads_own_records"]
    assert (assumption.status, assumption.evidence) == ("assumed", "accuracy, round 1; 3 / 5")
    page = (stopped_run / "report.html").read_text()
    assert "Training stopped early. The figures still cover every planned round." in page
    assert "the score no longer improved" in page
    card = (stopped_run / "adapter" / "README.md").read_text()
    assert "Kept is what round 1 of 3 gave, by accuracy on the lead's own validation file" in card


def test_report_claiming_another_selected_round_is_detected(stopped_run: Path) -> None:
    report = from_run.build_run_report(stopped_run)
    for claim in (
        replace(report.utility.selected_round, stopped_early=False),
        replace(report.utility.selected_round, round=2, score=0.999),
    ):
        assert problems(replace(report, utility=replace(report.utility, selected_round=claim))) != []


def test_resuming_a_stopped_run_charges_nothing(stopped_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped_run, tmp_path / "run"))
    ledger, before = folder / "sites/site-1/ledger.db", read_result(folder)
    events = len(verify(ledger).events)
    (folder / "run.json").unlink()  # as if the run had been killed before its end
    assert "the run had ended after round 3" in run_command("simulate", f"resume={folder}").printed
    after = read_result(folder)
    assert len(verify(ledger).events) == events
    assert [after[key] for key in ("rounds", "privacy")] == [before[key] for key in ("rounds", "privacy")]
    assert after["final"]["metrics"] == before["final"]["metrics"]


def test_early_stopping_requires_separate_validation_records(tmp_path: Path) -> None:
    share = ("data.validation_file=null", "data.validation_fraction=0.2")
    for settings in (share[:1], share):
        for rule in ("federation.early_stopping_patience=2", "federation.checkpoint_selection=best"):
            outcome = run_command("simulate", *list_tiny_overrides(rule, *settings, into=tmp_path))
            assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
            assert outcome.message.startswith("data.validation_file = null: must be the lead's own file")
    train = "simulations/data/banking77/train.jsonl.gz"
    best = ("federation.checkpoint_selection=best", f"data.validation_file={train}")
    outcome = run_command("simulate", *list_tiny_overrides(*best, into=tmp_path))
    assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
    assert outcome.message.startswith(f"data.validation_file = '{train}': has the same records as data.train_file")

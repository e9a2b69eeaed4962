"""A run's report beside its settings: the plan that they give is the one that the report states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import RunConfig, read_saved_config
from fedtune.report import from_run
from fedtune.report.checks import find_settings_problems
from fedtune.report.facts import StartAdapter
from fedtune.report.from_run import read_run
from fedtune.report.model import Report
from fedtune.report.verify_report import derive_report, problems
from fedtune.version import __version__


@pytest.fixture(scope="module")
def config(run_folder: Path) -> RunConfig:
    return read_saved_config(run_folder)


def forge_report(folder: Path, **changes: Any) -> Report:
    """A report that agrees with itself, of a plan that the run did not have."""
    record = read_run(folder)
    return derive_report(
        from_run.collect_run_facts(folder, replace(record, plan=replace(record.plan, **changes)), own={})
    )


def list_problem_places(report: Report, config: RunConfig) -> set[str]:
    return {problem.where.rpartition(".")[2] for problem in find_settings_problems(report.facts, config)}


def test_report_matches_its_settings_and_detects_others_by_digest(run_report: Report, config: Any) -> None:
    assert list_problem_places(run_report, config) == set()
    changed = replace(config, training=replace(config.training, learning_rate=0.123))
    (problem,) = find_settings_problems(run_report.facts, changed)
    assert (problem.where, problem.expected) == ("provenance.config_sha256", changed.digest())


def test_plan_from_different_settings_is_detected(run_folder: Path, config: RunConfig) -> None:
    other_values = {"noise_multiplier": 20.0, "sampling_rate": 0.01, "max_grad_norm": 0.5, "delta": 1e-4}
    for key, value in (other_values | {"local_steps": 1, "num_rounds": 1}).items():
        report = forge_report(run_folder, **{key: value})
        assert problems(report) == [] or key == "num_rounds", "it agrees with itself"
        assert [site.receipt for site in report.facts.sites] == [None, None], "no site signed that plan"
        assert key in list_problem_places(report, config)


def test_reported_settings_are_compared_with_the_configuration(run_report: Report, config: RunConfig) -> None:
    changes = {"target_epsilon": 80.0, "name": "another", "early_stopping_patience": 1, "checkpoint_selection": "best"}
    for key, value in (changes | {"settings": {"runtime": "deployment"}}).items():
        assert list_problem_places(replace(run_report, facts=replace(run_report.facts, **{key: value})), config) - {
            "run"
        } == {key}
    shorter = replace(run_report.facts, rounds=run_report.facts.rounds[:1])
    assert derive_report(shorter).verdict.reasons == ("not_finished",), "a shorter run is one that is not finished"


def test_start_adapter_is_public_only_with_a_public_stage_in_settings(run_report: Report, config: RunConfig) -> None:
    config = replace(config, model=replace(config.model, adapter_sha256="ab" * 32))
    start = StartAdapter(digest="ab" * 32, run=None, dataset=None, unit=None, delta=None, epsilon=None, public=True)
    provenance = replace(run_report.facts.provenance, start_adapter=start, config_sha256=config.digest())
    assert list_problem_places(replace(run_report, facts=replace(run_report.facts, provenance=provenance)), config) == {
        "public"
    }
    changed = replace(provenance, start_adapter=replace(start, digest="cd" * 32, public=False))
    assert list_problem_places(replace(run_report, facts=replace(run_report.facts, provenance=changed)), config) == {
        "digest"
    }


@pytest.mark.parametrize("bound", [2.0, None])
@pytest.mark.parametrize("loss", [{}, {"epsilon": 0.5}, {"delta": 1e-300}, {"unit": "user"}])
def test_start_with_another_loss_than_in_settings_is_detected(
    run_report: Report, config: RunConfig, bound: float | None, loss: dict[str, Any]
) -> None:
    privacy = replace(config.privacy, start_epsilon=bound, start_delta=1e-5, start_unit="record")
    config = replace(config, model=replace(config.model, adapter_sha256="ab" * 32), privacy=privacy)
    start_fields: dict[str, Any] = {"run": "a", "dataset": "b", "unit": "record", "delta": 1e-5, "epsilon": bound}
    start = StartAdapter(digest="ab" * 32, **start_fields | loss)
    provenance = replace(run_report.facts.provenance, start_adapter=start, config_sha256=config.digest())
    report = replace(run_report, facts=replace(run_report.facts, provenance=provenance))
    assert list_problem_places(report, config) - {"run"} == {*loss}


@pytest.mark.nightly
def test_calibrated_noise_is_recalibrated_for_verification(run_folder: Path, config: RunConfig) -> None:
    searched = replace(config, privacy=replace(config.privacy, noise_multiplier=None))
    noise = searched.plan().noise_multiplier

    def check_with_noise(value: float, version: str = __version__) -> Report:
        report = forge_report(run_folder, noise_multiplier=value)
        provenance = replace(report.facts.provenance, config_sha256=searched.digest(), fedtune_version=version)
        return replace(report, facts=replace(report.facts, provenance=provenance))

    assert list_problem_places(check_with_noise(noise), searched) == set()
    assert list_problem_places(check_with_noise(noise + 1e-4, "0.1.0"), searched) == set(), (
        "another version's last digit"
    )
    for extra, version in ((1e-4, __version__), (2e-4, "0.1.0")):
        assert "noise_multiplier" in list_problem_places(check_with_noise(noise + extra, version), searched)
    assert "noise_multiplier" in list_problem_places(check_with_noise(0.99 * noise), searched)

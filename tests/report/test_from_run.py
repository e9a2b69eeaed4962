"""A run's report: against the run's own files, also those of a run that did not get to its end."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from omegaconf import OmegaConf

from fedtune.config import read_saved_config
from fedtune.evaluation import audit_bound
from fedtune.federation.lead import Checkpoints
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.release import Receipt
from fedtune.report import from_run, signing
from fedtune.report.derive import run_figures
from fedtune.report.facts import BudgetVerdict
from fedtune.report.model import Report
from fedtune.report.verify_report import problems
from fedtune.spec import RUN_SCHEMA, ConfigError, RunError

from ..books import resign_receipt
from .shown import read_status, require_sound

SITES = ("site-1", "site-2")


def read_result(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def test_report_figures_match_run_json(run_folder: Path) -> None:
    report, result = from_run.build_run_report(run_folder), read_result(run_folder)
    facts = report.facts
    assert (facts.kind, facts.name, facts.provenance.config_sha256) == ("run", "run", result["config_sha256"])
    assert (report.epsilon, report.facts.delta) == (result["privacy"]["epsilon"], result["privacy"]["delta"])
    assert (report.facts.target_epsilon, report.facts.seeded_noise) == (8.0, False)
    for site in report.sites:
        stated = result["privacy"]["sites"][site.site]
        spent = site.spent
        assert (spent.epsilon, spent.epsilon_rdp) == (stated["epsilon"], stated["epsilon_rdp"])
        assert (spent.rounds, spent.steps) == (stated["rounds"], stated["steps"])
        assert spent.planned_epsilon == stated["planned_epsilon"]
        assert site.source == "charged_by_receipts"
    assert [(facts.is_upper_bound(item), item.statement) for item in facts.sites] == [(False, None)] * 2
    assert facts.declared_sizes == {"site-1": 80, "site-2": 90}
    assert problems(report) == []
    assert not any(str(folder) in signing.report_to_json(report) for folder in (run_folder, run_folder.parent))
    # Rounds, and the epsilon so far.
    assert (facts.final, facts.before) == (result["final"]["metrics"], result["final"]["metrics_before"])
    for cost, entry in zip(facts.rounds, result["rounds"], strict=True):
        assert (cost.round, list(cost.sites), cost.metrics) == (entry["round"], entry["sites"], entry["metrics"])
        assert all(getattr(cost, key) == entry[key] for key in ("seconds", "bytes_down", "bytes_up"))
    first, last = report.utility.epsilons
    assert 0 < first < last == report.epsilon
    times = [step.time for step in report.sites[0].steps]
    assert times == [entry["ended"] for entry in result["rounds"]]
    assert report.facts.date == times[-1]


def test_number_of_compositions_is_bounded_for_many_rounds(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = from_run.collect_run_facts(run_folder, from_run.read_run(run_folder), own={})
    facts = replace(facts, rounds=tuple(replace(facts.rounds[0], round=number) for number in range(1, 5001)))
    composed = Mock(side_effect=itertools.count(0.1, 0.1))
    monkeypatch.setattr(run_figures.profile, "epsilon_pld", composed)
    compute_all_gradients = replace(facts.sites[0], receipt=replace(facts.sites[0].receipt, charged_rounds=5000))
    max_bound = [step.epsilon for step in run_figures._derive_steps(facts, compute_all_gradients, 5.0)]
    assert run_figures._MAX_FIGURES / 2 < composed.call_count <= run_figures._MAX_FIGURES
    assert max_bound == sorted(max_bound)
    assert (len(max_bound), max_bound[0], max_bound[-1]) == (5000, 0.1, 5.0)


def test_report_shows_the_recorded_environments_of_the_run(folder: Path) -> None:
    environment = json.loads((folder / "environment.json").read_text())
    (own_digests,) = environment["environments"]
    other_environment = {"python": "3.0.0", "machine": "abacus", "device": "beads", "system": "Stone"}
    other_environment |= {"fedtune_version": "0.0.1", "libraries": {"torch": "0.0.7"}}
    environment["environments"] = [own_digests | other_environment]
    (folder / "environment.json").write_text(json.dumps(environment))
    provenance = from_run.build_run_report(folder).facts.provenance
    assert (provenance.python, provenance.machine) == ("3.0.0", "Stone abacus, beads")
    assert (provenance.fedtune_version, provenance.libraries) == ("0.0.1", {"torch": "0.0.7"})
    # It was resumed with another Python.
    environment["environments"] = [own_digests, own_digests | {"since": "2040-01-01T00:00:00+00:00", "python": "4.0"}]
    (folder / "environment.json").write_text(json.dumps(environment))
    provenance = from_run.build_run_report(folder).facts.provenance
    assert provenance.python == f"{own_digests['python']} / 4.0"
    assert provenance.machine.count("/") == 0


def test_run_without_a_recorded_environment_is_reported_as_such(folder: Path) -> None:
    (folder / "environment.json").unlink()
    report = require_sound(from_run.build_run_report(folder))
    provenance = report.facts.provenance
    assert (provenance.python, provenance.machine, provenance.libraries) == (None, None, {})
    assert (report.randomness, report.sites[0].mechanisms[0].sampling_run) == ("not_recorded", "not_recorded")
    assert (report.verdict.state, report.verdict.reasons) == ("within", ("sampling_not_recorded",))
    for code in ("noise_in_every_step", "poisson_sampling", "unpredictable_randomness"):
        assert read_status(report, code) == "assumed"


def test_whole_plan_is_counted_without_checkpoints(folder: Path) -> None:
    whole = from_run.build_run_report(folder)
    shutil.rmtree(folder / "checkpoints")
    report = require_sound(from_run.build_run_report(folder))
    assert report.epsilon == whole.sites[0].spent.planned_epsilon
    assert report.verdict == BudgetVerdict(state="within", reasons=("site_silent",))
    assert read_status(report, "receipts_signed") == "assumed"
    assert [site.source for site in report.sites] == ["not_released"] * 2, "no receipt was read"
    (folder / "run.json").unlink()
    with pytest.raises(ConfigError, match="has no checkpoint: the run has not started"):
        from_run.build_run_report(folder)
    with pytest.raises(ConfigError, match=r"must contain a config\.yaml"):
        from_run.build_run_report(folder.parent)


def change_receipts(folder: Path, change: Callable[[Receipt], Receipt]) -> None:
    """Change the receipts in the newest checkpoint."""
    record = from_run.read_run(folder)
    receipts = {site: change(receipt) for site, receipt in record.state.receipts.items()}
    Checkpoints(folder / "checkpoints", record.config_sha256).save(replace(record.state, receipts=receipts))


def build_doubted_report(folder: Path) -> Report:
    """The report of a run whose receipts do not show what was charged: each site counts the whole plan."""
    report, max_rounds = require_sound(from_run.build_run_report(folder)), from_run.read_run(folder).plan.max_rounds
    assert report.verdict == BudgetVerdict(state="within", reasons=("site_silent",))
    assert read_status(report, "every_site_answered") == "violated"
    facts = report.facts
    assert [(facts.count_charged_rounds(site), facts.is_upper_bound(site)) for site in facts.sites] == [
        (max_rounds, True)
    ] * 2
    assert report.epsilon == report.sites[0].spent.planned_epsilon
    return report


@pytest.mark.parametrize(
    ("changed", "changes"),
    [
        *((replace, changes) for changes in ({"charged_rounds": 0}, {"site": "site-9"}, {"run": "run-of-others"})),
        (resign_receipt, {"run": "run-" + "0" * 32, "charged_rounds": 9}),
    ],
)
def test_receipts_not_matching_the_site_or_run_are_ignored(folder: Path, changed: Any, changes: Any) -> None:
    change_receipts(folder, lambda receipt: changed(receipt, **changes))
    report = build_doubted_report(folder)
    assert [site.receipt for site in report.facts.sites] == [None, None]
    assert {item.run for site in report.sites for item in site.mechanisms} == {read_saved_config(folder).run_id()}


def test_receipts_older_than_the_updates_are_ignored(folder: Path) -> None:
    record = from_run.read_run(folder)
    (newest_checkpoint,) = folder.glob("checkpoints/round-0002*")
    newest_checkpoint.rename(folder / "kept")
    older = Checkpoints(folder / "checkpoints", record.config_sha256).load().receipts
    (folder / "kept").rename(newest_checkpoint)
    assert {site: receipt.charged_rounds for site, receipt in older.items()} == dict.fromkeys(SITES, 1)
    change_receipts(folder, lambda receipt: older[receipt.site])
    build_doubted_report(folder)


@pytest.mark.parametrize("journal", [True, False])
def test_checkpoint_before_the_last_round_counts_the_whole_plan(folder: Path, journal: bool) -> None:
    whole = from_run.build_run_report(folder)
    (newest_checkpoint,) = folder.glob("checkpoints/round-0002*")
    newest_checkpoint.unlink()
    if not journal:
        (folder / "checkpoints" / "asked.jsonl").unlink()
    report = build_doubted_report(folder)
    assert report.facts.rounds == whole.facts.rounds, "run.json has all of them"


AUDIT = {
    "schema_version": RUN_SCHEMA,
    "method": "gradient_canaries",
    "confidence": 0.95,
    "delta": 1e-5,
    "seeded": False,
    "exceeded": False,
    "bounds": [],
    "membership": [],
}


def test_audit_attack_exceeding_the_claimed_bound_voids_the_guarantee(folder: Path) -> None:
    assert "attack_on_real_records" not in from_run.build_run_report(folder).unprotected_figures
    max_bound = audit_bound.compute_max_lower_bound(9, delta=1e-5, confidence=0.95)
    bound = {"site": "site-1", "claimed_epsilon": 0.4, "lower_bound": max_bound, "best_possible": max_bound}
    attack = {"site": None, "score": "loss", "members": 9, "non_members": 9}
    attack |= {"auroc": 0.6, "auroc_low": 0.5, "auroc_high": 0.7}
    attack |= {"hit_rates": [{"false_positive_rate": 0.01, "true_positive_rate": None, "low": None, "high": None}]}
    audit = AUDIT | {
        "exceeded": True,
        "bounds": [bound | dict.fromkeys(("canaries", "guesses", "correct"), 9)],
        "membership": [attack],
    }
    (folder / "audit.json").write_text(json.dumps(audit))
    report = require_sound(from_run.build_run_report(folder))
    assert (report.verdict.state, report.verdict.reasons) == ("no_guarantee", ("refuted_by_audit",))
    assert [site.meaning is None for site in report.sites] == [True, False]
    assert "attack_on_real_records" in report.unprotected_figures
    (folder / "audit.json").write_text(json.dumps(audit | {"delta": 1e-4}))
    with pytest.raises(RunError, match="belongs to another run: its delta is"):
        from_run.build_run_report(folder)
    # Nor does it help that the bounds are gone while it says that one was passed.
    (folder / "audit.json").write_text(json.dumps(audit | {"bounds": []}))
    assert [site.verdict.state for site in from_run.build_run_report(folder).sites] == ["no_guarantee"] * 2


def test_report_of_canary_run_without_audit_results_states_no_guarantee(folder: Path) -> None:
    before = from_run.build_run_report(folder)
    RunFolder(folder).audit_mark.write_text("an audit")
    report = require_sound(from_run.build_run_report(folder))
    assert (before.verdict.state, report.verdict.state) == ("within", "no_guarantee")
    assert [site.verdict.reasons for site in report.sites] == [("holds_canaries",)] * 2
    assert [site.meaning for site in report.sites] == [None, None]
    (folder / "audit.json").write_text(json.dumps(AUDIT))
    report = from_run.build_run_report(folder)
    assert (report.verdict.state, report.verdict.reasons) == ("within", ("audited",))
    (folder / "audit.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        from_run.build_run_report(folder)


def test_damaged_run_files_are_named_in_the_error(folder: Path) -> None:
    for name, damage, error, match in (
        ("config.yaml", lambda data: b"[1", ConfigError, "must contain a configuration"),
        ("config.yaml", lambda data: b"- 1", ConfigError, "must contain a configuration"),
        ("config.yaml", lambda data: data.replace(b"rank: 4", b"rank: 0"), ConfigError, r"config\.yaml: lora\.rank"),
        ("run.json", lambda data: data[:-20], RunError, r"run\.json is damaged"),
        ("run.json", lambda data: b"{}", RunError, r"run\.json is damaged"),
        ("run.json", lambda data: data.replace(b'"bytes_up"', b'"bites_up"'), RunError, r"run\.json is damaged"),
        ("environment.json", lambda _: b'{"schema_version": %d}' % RUN_SCHEMA, RunError, r"ment\.json is damaged"),
        ("checkpoints/round-0002*", lambda data: data[:-9], RunError, "is damaged"),
    ):
        (path,) = folder.glob(name)
        original = path.read_bytes()
        path.write_bytes(damage(original))
        with pytest.raises(error, match=match):
            from_run.build_run_report(folder)
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["run.json", "audit.json", "attack.json", "environment.json", "exports.json"])
def test_file_too_large_for_memory_is_never_read(folder: Path, name: str) -> None:
    (folder / name).touch()
    os.truncate(folder / name, 1 << 40)
    with pytest.raises((ConfigError, RunError), match=name.partition(".")[0]):
        from_run.build_run_report(folder)


def test_exports_file_claims_no_name_in_the_runs_own_adapter(folder: Path) -> None:
    own_digests = from_run.hash_model_files(folder)
    assert all(name.startswith("adapter/") for name in own_digests)
    (folder / "exports.json").write_text(
        json.dumps({"adapter/model.safetensors": "ab", "merged/model.safetensors": "cd"})
    )
    assert from_run.hash_model_files(folder) == {**own_digests, "merged/model.safetensors": "cd"}


def test_configuration_with_a_different_privacy_cost_is_refused(folder: Path) -> None:
    path = folder / "config.yaml"
    original = OmegaConf.load(path)
    for changes, key in (
        ({"privacy": {"sampling_rate": 0.1}}, "privacy.sampling_rate"),
        ({"privacy": {"delta": 1e-6}}, "privacy.delta"),
        ({"training": {"local_steps": 1}}, "training.local_steps"),
        ({"privacy": {"unit": "user"}, "data": {"columns": {"user": "text"}}}, "privacy.unit"),
    ):
        path.write_text(OmegaConf.to_yaml(OmegaConf.merge(original, changes)))
        with pytest.raises(ConfigError, match=f"{key}.*does not match run.json"):
            from_run.build_run_report(folder)


def test_configuration_changed_after_the_run_voids_the_guarantee(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    for old, new in (("epsilon: 8.0", "epsilon: 80.0"), ("max_grad_norm: 1.0", "max_grad_norm: 2.0")):
        assert old in text
        (folder / "config.yaml").write_text(text.replace(old, new))
        report = require_sound(from_run.build_run_report(folder))
        assert read_status(report, "configuration_unchanged") == "violated"
        assert (report.verdict.state, report.verdict.reasons) == ("no_guarantee", ("configuration_changed",))
        assert report.facts.provenance.config_sha256 == read_result(folder)["config_sha256"]


def test_nan_scores_are_null_in_the_report(folder: Path) -> None:
    result = read_result(folder)
    result["final"]["metrics"]["loss"] = None
    (folder / "run.json").write_text(json.dumps(result))
    assert from_run.build_run_report(folder).facts.final["loss"] is None

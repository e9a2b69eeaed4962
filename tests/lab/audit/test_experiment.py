"""Complete audits: correct runs pass, and faulty runs are detected."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.evaluation.audit_bound import compute_max_lower_bound
from fedtune.privacy.site_files import SiteFiles
from fedtune.report.derive.verdicts import read_audit
from fedtune.report.facts import Audit
from fedtune.spec import RUN_SCHEMA, RunError

from .conftest import BY_USER, Break, audit

EVERY_TIME = ("privacy.sampling_rate=1.0", "audit.canaries=120")
"""Inserted canaries are in every step, so that few canaries are sufficient."""


@pytest.fixture(scope="module")
def sound_audit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Audit, Path]:
    """Outcome, findings and folder of an audit of the correct implementation."""
    return audit(*EVERY_TIME, into=tmp_path_factory.mktemp("runs"))


def test_audit_passes_a_correct_run(sound_audit: Any) -> None:
    outcome, audit_result, folder = sound_audit
    assert outcome.code == 0, outcome.err
    assert not audit_result.exceeded
    claimed = json.loads((folder / "run.json").read_text())["privacy"]
    assert [bound.site for bound in audit_result.bounds] == ["site-1", "site-2", None]
    for bound in audit_result.bounds:
        site = bound.site or "site-1"
        assert bound.claimed_epsilon == claimed["sites"][site]["epsilon"]
        assert bound.lower_bound < bound.claimed_epsilon
        assert bound.canaries == bound.guesses == (120 if bound.site else 240)
        assert bound.best_possible == compute_max_lower_bound(bound.canaries, delta=1e-5, confidence=0.95)
    assert "No bound is above its claim" in outcome.out
    assert "canaries: do not use it" in outcome.out


@pytest.mark.nightly
def test_audit_passes_a_correct_user_level_run(run_audit: Any) -> None:
    outcome, audit_result, _ = run_audit(*EVERY_TIME, *BY_USER, "--json")
    assert len(json.loads(outcome.printed)["result"]["bounds"]) == len(audit_result.bounds)
    assert [bound.site for bound in audit_result.bounds] == ["site-1", "site-2", None]
    for bound in audit_result.bounds:
        assert bound.lower_bound < bound.claimed_epsilon


@pytest.mark.by_day("no noise-overrides0", "no clipping-overrides1")
@pytest.mark.parametrize(
    ("fault", "overrides"),
    [
        ("no noise", ()),
        ("no clipping", BY_USER),
        # So many clip norms of a user in a step, where one is accounted.
        ("clipping by record", (*BY_USER, "privacy.records_per_user=30")),
    ],
)
def test_audit_detects_an_injected_fault(
    fault: str, overrides: tuple[str, ...], run_audit: Any, inject_fault: Break
) -> None:
    inject_fault(fault)
    outcome, audit_result, folder = run_audit(*EVERY_TIME, *overrides)
    message = outcome.failed(1)
    assert "the implementation or the claim is wrong" in message
    assert "site-1: epsilon is at least 3." in message
    assert audit_result.exceeded
    of_sites = [bound for bound in audit_result.bounds if bound.site]
    assert all(bound.correct == bound.guesses for bound in of_sites), "a canary in every step is told for certain"
    assert all(bound.lower_bound == bound.best_possible > bound.claimed_epsilon for bound in of_sites)
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"] == {"state": "no_guarantee", "reasons": ["refuted_by_audit"]}
    assert report["facts"]["audit"]["exceeded"]


@pytest.mark.nightly
def test_audit_detects_an_injected_fault_from_averages(run_audit: Any, inject_fault: Break) -> None:
    """The attacker sees only the average of each round; steps are plain SGD."""
    inject_fault("no noise")
    overrides = ("audit.sites=[site-2]", "audit.guesses=60", "audit.confidence=0.9", "privacy.noise_multiplier=8.0")
    _, audit_result, _ = run_audit(*EVERY_TIME, "training=sgd", *overrides)
    assert audit_result.confidence == 0.9
    counts = [(bound.site, bound.canaries, bound.guesses) for bound in audit_result.bounds]
    assert counts == [("site-2", 120, 60), (None, 120, 60)]
    assert audit_result.bounds[0].best_possible == compute_max_lower_bound(120, guesses=60, delta=1e-5, confidence=0.9)
    assert audit_result.bounds[1].lower_bound > audit_result.bounds[1].claimed_epsilon


@pytest.mark.nightly
def test_record_canary_audit_reports_membership_scores(run_audit: Any) -> None:
    outcome, audit_result, folder = run_audit("audit.kind=records", "audit.canaries=40", "data.train_fraction=0.1")
    assert outcome.code == 0, outcome.err
    assert audit_result.method == "record_canaries"
    kinds = [(site, score) for site in ("site-1", "site-2", None) for score in ("loss", "reference_ratio")]
    assert [(attack.site, attack.score) for attack in audit_result.membership] == kinds
    everywhere = audit_result.membership[-1]
    assert everywhere.members == sum(attack.members for attack in audit_result.membership[:4:2])
    # Never used are those that the hash held out: about 30 %.
    assert 0.2 < everywhere.non_members / (everywhere.non_members + everywhere.members) < 0.4
    assert everywhere.auroc_low < 0.5 < everywhere.auroc_high or abs(everywhere.auroc - 0.5) < 0.1
    assert everywhere.hit_rates[1].true_positive_rate is None, "too few records for one false alarm in a thousand"
    assert "few records" in outcome.out
    assert "trained on, or never used?" in outcome.out
    assert "artificial records" in (folder / "AUDIT.txt").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "own",
    [
        ("training=sgd", "federation.algorithm=scaffold"),
        ("training=sgd", "lora.train_a=true", "federation.algorithm=aslora"),
        ("lora.rank=2", "federation.ranks=[1]"),
    ],
)
def test_record_canaries_audit_every_algorithm(own: tuple[str, ...], run_audit: Any) -> None:
    outcome, audit_result, _ = run_audit("audit.kind=records", "audit.canaries=40", "data.train_fraction=0.1", *own)
    assert outcome.code == 0, outcome.err
    assert not audit_result.exceeded
    assert [bound.site for bound in audit_result.bounds] == ["site-1", "site-2", None]


@pytest.mark.nightly
def test_audit_detects_a_memorizing_model(run_audit: Any, inject_fault: Break) -> None:
    inject_fault("no noise")
    _, audit_result, _ = run_audit(
        *("audit.kind=records", "audit.canaries=60", "privacy.sampling_rate=1.0", "privacy.noise_multiplier=20.0"),
        *("training.local_steps=25", "training.learning_rate=0.02", "model=random_bert"),
    )
    combined = audit_result.bounds[-1]
    assert combined.correct / combined.guesses > 0.75
    assert combined.lower_bound > 0
    assert all(attack.auroc_low > 0.5 for attack in audit_result.membership if attack.site is None)


def test_audit_findings_appear_in_the_report(sound_audit: Any) -> None:
    _, result, folder = sound_audit
    stored = json.loads((folder / "audit.json").read_text())
    assert stored["schema_version"] == RUN_SCHEMA
    assert (stored["confidence"], stored["delta"], stored["seeded"]) == (0.95, 1e-5, False)
    in_report = json.loads((folder / "report.json").read_text())["facts"]["audit"]
    assert in_report == {key: value for key, value in stored.items() if key != "schema_version"}
    assert [bound["lower_bound"] for bound in in_report["bounds"]] == [bound.lower_bound for bound in result.bounds]
    page = (folder / "report.html").read_text()
    assert "Claimed epsilon, and epsilon shown by the attack" in page
    assert 'data-at="/facts/audit/bounds/2/lower_bound"' in page


def test_audited_run_is_marked_and_cannot_continue(sound_audit: Any, command: Any) -> None:
    folder = sound_audit[2]
    # Sites of an audit take any adapter, so that a broken clip shows as a bound and not as a refusal.
    assert SiteFiles.from_site_toml(folder / "sites" / "site-1" / "site.toml").policy.limits.max_adapter_value == 1e6
    assert "about 60 artificial gradients at each of site-1, site-2" in (folder / "AUDIT.txt").read_text()
    assert "is an audit" in command("simulate", f"resume={folder}").failed()
    refused = command("evaluate", str(folder), "--data", "any.csv", "--device", "cpu")
    assert "is an audit: its training data contain canaries" in refused.failed()
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"] == {"state": "within", "reasons": ["audited"]}


def test_damaged_audit_file_raises_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text(json.dumps({"schema_version": RUN_SCHEMA}))
    with pytest.raises(RunError, match="damaged"):
        read_audit(tmp_path)
    assert read_audit(tmp_path / "nowhere") is None
